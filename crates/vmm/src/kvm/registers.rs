//! What a vCPU's registers hold when it starts: for mstrap, and for a cold machine at RESUME.
//! Sources: Linux `Documentation/arch/x86/boot.rst` (64-bit boot protocol), Xen's `pvh.pandoc`.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use onde_wire::machine::{ColdStart, INFO_START, LOADER_START};

use crate::fault::{Context, Fault, Part};
use crate::mstrap::{GDT, GDT_START, PAGE_TABLE_START};

/// MTRR default type: enabled, fixed ranges too, write-back. Without it `/dev/mem` maps windows
/// uncached.
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
const MTRR_WRITE_BACK: u64 = 0xC06;
/// Fast string operations on, as firmware leaves it.
const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_FAST_STRINGS: u64 = 1;
/// Model-specific registers that mstrap or a loader could have changed and that Linux takes to be
/// zero: SYSENTER_CS/ESP/EIP, STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE, and kvm-clock's two.
const MSRS_ZERO: [u32; 10] = [
    0x174,
    0x175,
    0x176,
    0xC000_0081,
    0xC000_0082,
    0xC000_0083,
    0xC000_0084,
    0xC000_0102,
    0x4B56_4D00,
    0x4B56_4D01,
];

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set; interrupts are off.
const RFLAGS: u64 = 2;

/// x87 control word and SSE control register after FNINIT and at reset.
const FPU_CONTROL: u16 = 0x37F;
const MXCSR: u32 = 0x1F80;

/// A vCPU's state before anything ran, to start cold machines from.
pub struct ResetState {
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    /// None where the host has no XSAVE.
    xcrs: Option<kvm_xcrs>,
}

impl ResetState {
    /// Reads it from a vCPU that was just created.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, Fault> {
        Ok(Self {
            sregs: vcpu.get_sregs().fault(Part::Kvm, "read special registers")?,
            lapic: vcpu.get_lapic().fault(Part::Kvm, "read the local APIC")?,
            events: vcpu.get_vcpu_events().fault(Part::Kvm, "read vCPU events")?,
            debug: vcpu.get_debug_regs().fault(Part::Kvm, "read debug registers")?,
            xcrs: vcpu.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
        })
    }

    /// Sets what every vCPU starts with, whichever way it is entered.
    pub fn set_msrs(&self, vcpu: &VcpuFd) -> Result<(), Fault> {
        let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let mut entries = MSRS_ZERO.map(|index| entry(index, 0)).to_vec();
        entries.push(entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK));
        entries.push(entry(MSR_MISC_ENABLE, MISC_FAST_STRINGS));
        let msrs = Msrs::from_entries(&entries).fault(Part::Kvm, "list MSRs")?;
        let set = vcpu.set_msrs(&msrs).fault(Part::Kvm, "set MSRs")?;
        match entries.get(set) {
            None => Ok(()),
            Some(refused) => {
                Err(Fault::new(Part::Kvm, format!("set MSR {:#x}: refused", { refused.index })))
            }
        }
    }

    /// Registers for mstrap: 64-bit, the VMM's own page tables, interrupts off, SSE on.
    pub fn set_mstrap(&self, vcpu: &VcpuFd, entry: u64) -> Result<(), Fault> {
        let mut sregs = self.sregs;
        set_long_mode(&mut sregs, PAGE_TABLE_START);
        sregs.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT;
        set_segments(&mut sregs, long_code());
        sregs.gdt.base = GDT_START;
        sregs.gdt.limit = (GDT.len() * 8 - 1) as u16;
        let regs = kvm_regs {
            rip: entry,
            rdi: INFO_START,
            rsp: LOADER_START,
            rflags: RFLAGS,
            ..Default::default()
        };
        self.set(vcpu, &sregs, &regs)
    }

    /// Everything for a cold machine: nothing of mstrap and the loader is left.
    pub fn set_cold(&self, vcpu: &VcpuFd, start: &ColdStart) -> Result<(), Fault> {
        let (sregs, regs) = self.cold(start);
        vcpu.set_lapic(&self.lapic).fault(Part::Kvm, "reset the local APIC")?;
        vcpu.set_vcpu_events(&self.events).fault(Part::Kvm, "reset vCPU events")?;
        vcpu.set_debug_regs(&self.debug).fault(Part::Kvm, "reset debug registers")?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).fault(Part::Kvm, "reset XCR0")?;
        }
        self.set_msrs(vcpu)?;
        self.set(vcpu, &sregs, &regs)
    }

    fn cold(&self, start: &ColdStart) -> (kvm_sregs, kvm_regs) {
        let mut sregs = self.sregs;
        let mut regs = kvm_regs { rflags: RFLAGS, ..Default::default() };
        match *start {
            ColdStart::Pvh { entry, start_info } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
                set_segments(&mut sregs, flat(8, 0xB, false));
                (regs.rip, regs.rbx) = (entry.into(), start_info.into());
            }
            ColdStart::Linux64 { entry, boot_params, cr3 } => {
                set_long_mode(&mut sregs, cr3);
                // Linux loads a table of its own before it loads a segment register.
                set_segments(&mut sregs, long_code());
                (regs.rip, regs.rsi) = (entry, boot_params);
            }
        }
        (sregs, regs)
    }

    fn set(&self, vcpu: &VcpuFd, sregs: &kvm_sregs, regs: &kvm_regs) -> Result<(), Fault> {
        let fpu = kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR, ..Default::default() };
        vcpu.set_sregs(sregs).fault(Part::Kvm, "set special registers")?;
        vcpu.set_fpu(&fpu).fault(Part::Kvm, "set FPU registers")?;
        vcpu.set_regs(regs).fault(Part::Kvm, "set registers")
    }
}

fn set_long_mode(sregs: &mut kvm_sregs, cr3: u64) {
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = cr3;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Flat data segments beside the code segment; no interrupt table, so that an exception before
/// the guest has its own is a reset and not a wild jump.
fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment) {
    let data = flat(0x10, 3, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32-bit TSS of the smallest size, as PVH and Intel's VM entry ask for.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xB, s: 0, g: 0, db: 0, ..flat(0, 0xB, false) };
    (sregs.gdt, sregs.idt) = (kvm_dtable::default(), kvm_dtable::default());
}

fn long_code() -> kvm_segment {
    flat(8, 0xB, true)
}

fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reset() -> ResetState {
        ResetState {
            sregs: kvm_sregs { apic_base: 0xFEE0_0900, cr0: 0x6000_0010, ..Default::default() },
            lapic: Default::default(),
            events: Default::default(),
            debug: Default::default(),
            xcrs: None,
        }
    }

    #[test]
    fn pvh_is_entered_in_32_bit_mode() {
        let (sregs, regs) = reset().cold(&ColdStart::Pvh { entry: 0x100_0000, start_info: 0x6000 });
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.type_), (1, 0, 0xB));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x6000, 2));
        assert_eq!(sregs.apic_base, 0xFEE0_0900);
    }

    #[test]
    fn linux64_is_entered_in_long_mode() {
        let start = ColdStart::Linux64 { entry: 0x100_0200, boot_params: 0x7000, cr3: 0x9000 };
        let (sregs, regs) = reset().cold(&start);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.efer), (0x8000_0011, 0x9000, 0x500));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.ss.type_), (0, 1, 3));
        assert_eq!((regs.rip, regs.rsi), (0x100_0200, 0x7000));
    }
}
