//! What of a virtual machine FREEZE saves beside its vCPUs, and the log of the pages that its guest writes.

use std::io;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQCHIP_IOAPIC,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_clock_data, kvm_enable_cap, kvm_irqchip,
};
use onde_wire::machine::{DISK_START, PAGE_SIZE, RAM_HIGH_START};
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::{SLOT_DISK, SLOT_RAM, Vm, plain};
use crate::fault::{Context, Fault, Part};
use crate::memory::Region;

/// The CPUID leaves that tell which instructions there are: a copy must find all of them the same.
const FEATURE_LEAVES: [u32; 6] = [0, 1, 7, 0xD, 0x8000_0001, 0x4000_0001];

// kvm-ioctls does not have it.
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xC0, kvm_clear_dirty_log);

/// The clock and the I/O APIC.
pub struct VmState {
    ioapic: kvm_irqchip,
    /// KVM's clock, nanoseconds.
    pub clock_ns: u64,
}

impl VmState {
    /// Reads a state; `None` where it is none of an I/O APIC.
    pub fn parse(ioapic: &[u8], clock_ns: u64) -> Option<Self> {
        let ioapic: kvm_irqchip = plain::parse(ioapic)?;
        (ioapic.chip_id == KVM_IRQCHIP_IOAPIC).then_some(Self { ioapic, clock_ns })
    }

    /// The I/O APIC's bytes.
    pub fn ioapic(&self) -> Vec<u8> {
        plain::bytes(&self.ioapic).to_vec()
    }
}

/// The slot of RAM or a disk.
fn slot_of(start: u64) -> u32 {
    match start {
        DISK_START => SLOT_DISK,
        RAM_HIGH_START => SLOT_RAM + 1,
        _ => SLOT_RAM,
    }
}

impl Vm {
    /// Starts or ends noting which pages of a region the guest writes; at the start there are none.
    pub fn log_writes(&self, region: &Region, on: bool) -> Result<(), Fault> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let start = region.start_addr().0;
        self.set_slot(slot_of(start), start, region, flags).fault(Part::Kvm, "log writes")
    }

    /// Has KVM keep its log when it is read: what is no more than read stays writable, and the guest's next write costs
    /// no exit.
    pub(super) fn keep_logs(&self) -> Result<(), Fault> {
        let mut cap =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
        self.fd.enable_cap(&cap).fault(Part::Kvm, "keep logs of writes (Linux 5.2 has that)")
    }

    /// The pages of a region that the guest wrote since the last [`Self::take_log`], one bit each.
    pub fn read_log(&self, region: &Region) -> Result<Vec<u64>, Fault> {
        let (slot, size) = (slot_of(region.start_addr().0), region.len() as usize);
        self.fd.get_dirty_log(slot, size).fault(Part::Kvm, "read the log of writes")
    }

    /// The same, and takes these pages out of the log: written once more, they are in it again.
    pub fn take_log(&self, region: &Region) -> Result<Vec<u64>, Fault> {
        let mut pages = self.read_log(region)?;
        let clear = kvm_clear_dirty_log {
            slot: slot_of(region.start_addr().0),
            num_pages: (region.len() / PAGE_SIZE) as u32,
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: pages.as_mut_ptr().cast(),
            },
        };
        // SAFETY: the bitmap has a bit for each page of the slot, in whole words, and KVM only reads it.
        let done = unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &clear) };
        match done {
            0 => Ok(pages),
            _ => Err(io::Error::last_os_error()).fault(Part::Kvm, "clear the log of writes"),
        }
    }

    /// The CPU features that matter to a guest which goes on here.
    pub fn cpu(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for entry in self.cpuid.as_slice() {
            if !FEATURE_LEAVES.contains(&entry.function) {
                continue;
            }
            // In leaf 1 EBX numbers the CPU that was asked; in leaf 0xD it is the present size, not the largest.
            let ebx = if matches!(entry.function, 1 | 0xD) { 0 } else { entry.ebx };
            for word in [entry.function, entry.index, entry.eax, ebx, entry.ecx, entry.edx] {
                out.extend(word.to_le_bytes());
            }
        }
        out
    }

    /// Reads clock and I/O APIC while no vCPU runs.
    pub fn save(&self) -> Result<VmState, Fault> {
        let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.fd.get_irqchip(&mut ioapic).fault(Part::Kvm, "read the I/O APIC")?;
        let clock_ns = self.fd.get_clock().fault(Part::Kvm, "read the clock")?.clock;
        Ok(VmState { ioapic, clock_ns })
    }

    /// Sets them, after all vCPUs: the I/O APIC may hand what it holds to a local APIC at once, and the clock is
    /// counted from the vCPUs' TSC.
    pub fn load(&self, state: &VmState) -> Result<(), Fault> {
        self.fd.set_irqchip(&state.ioapic).fault(Part::Kvm, "set the I/O APIC")?;
        let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).fault(Part::Kvm, "set the clock")
    }
}
