//! Everything of one vCPU that a copy needs: read from KVM at FREEZE, set at RESUME, both by the vCPU's own thread.
//! The order of setting is KVM's: see `load`.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use onde_wire::bytes::Reader;
use std::collections::BTreeSet;

use super::plain::{self, Plain};
use crate::fault::{Context, Fault, Part};

/// Time stamp counter; set for itself, as all vCPUs' counters must agree.
const MSR_TSC: u32 = 0x10;
/// When the local APIC's timer is due; means something only once APIC and TSC are set.
const MSR_TSC_DEADLINE: u32 = 0x6E0;
/// Memory types: Linux 6.1 lists none of these as to be saved, yet has them.
const MSRS_MTRR: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20F, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26F, 0x2FF..=0x2FF];
/// KVM takes 256 MSRs at once at most.
const MSRS_AT_ONCE: usize = 128;
/// More MSRs than any KVM lists.
const MSRS_MAX: u32 = 1024;

/// The numbers of the MSRs to save: those of KVM's list that this host has.
#[derive(Clone)]
pub struct MsrList(Vec<u32>);

impl MsrList {
    /// `listed` is what KVM names; which of them can be read shows a vCPU.
    pub fn of(vcpu: &VcpuFd, listed: &[u32]) -> Result<Self, Fault> {
        let mut indices: Vec<u32> = listed.to_vec();
        indices.extend(MSRS_MTRR.into_iter().flatten());
        indices.sort_unstable();
        indices.dedup();
        indices.retain(|index| ![MSR_TSC, MSR_TSC_DEADLINE].contains(index));
        // In this order, after all others.
        indices.extend([MSR_TSC, MSR_TSC_DEADLINE]);
        Ok(Self(get_msrs(vcpu, &indices)?.into_iter().map(|(index, _)| index).collect()))
    }
}

/// A vCPU's state.
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    tsc_khz: u32,
    msrs: Vec<(u32, u64)>,
}

impl VcpuState {
    /// Reads a vCPU that has no access under way.
    pub fn save(vcpu: &VcpuFd, list: &MsrList) -> Result<Self, Fault> {
        let part = Part::Vcpu;
        Ok(Self {
            // First, as it settles INIT and SIPI that wait.
            mp_state: vcpu.get_mp_state().fault(part, "read the vCPU's activity")?,
            regs: vcpu.get_regs().fault(part, "read registers")?,
            sregs: vcpu.get_sregs().fault(part, "read special registers")?,
            xsave: vcpu.get_xsave().fault(part, "read FPU registers")?,
            xcrs: vcpu.get_xcrs().fault(part, "read extended control registers")?,
            lapic: vcpu.get_lapic().fault(part, "read the local APIC")?,
            events: vcpu.get_vcpu_events().fault(part, "read vCPU events")?,
            debug: vcpu.get_debug_regs().fault(part, "read debug registers")?,
            tsc_khz: vcpu.get_tsc_khz().fault(part, "ask for the TSC frequency")?,
            msrs: get_msrs(vcpu, &list.0)?,
        })
    }

    /// Sets a vCPU that has no access under way and runs nothing any more. XCR0 says what the FPU's state means; the
    /// APIC needs its base (special registers) first, and the timer's deadline needs APIC and TSC;
    /// activity comes last.
    pub fn load(&self, vcpu: &VcpuFd) -> Result<(), Fault> {
        let part = Part::Vcpu;
        if vcpu.get_tsc_khz().fault(part, "ask for the TSC frequency")? != self.tsc_khz {
            // Not every processor can: kvm-clock still tells the right time then.
            let _ = vcpu.set_tsc_khz(self.tsc_khz);
        }
        let late = |&(index, _): &(u32, u64)| [MSR_TSC, MSR_TSC_DEADLINE].contains(&index);
        let (late, early): (Vec<_>, Vec<_>) = self.msrs.iter().copied().partition(late);
        vcpu.set_sregs(&self.sregs).fault(part, "set special registers")?;
        vcpu.set_xcrs(&self.xcrs).fault(part, "set extended control registers")?;
        // SAFETY: no feature is enabled whose state is larger than `kvm_xsave`: that takes a permission which this
        // process never asks for.
        unsafe { vcpu.set_xsave(&self.xsave) }.fault(part, "set FPU registers")?;
        set_msrs(vcpu, &early)?;
        vcpu.set_lapic(&self.lapic).fault(part, "set the local APIC")?;
        set_msrs(vcpu, &late)?;
        vcpu.set_vcpu_events(&self.events).fault(part, "set vCPU events")?;
        vcpu.set_debug_regs(&self.debug).fault(part, "set debug registers")?;
        vcpu.set_regs(&self.regs).fault(part, "set registers")?;
        vcpu.set_mp_state(self.mp_state).fault(part, "set the vCPU's activity")
    }

    /// The state's bytes.
    pub fn emit(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(plain::bytes(&self.regs));
        out.extend(plain::bytes(&self.sregs));
        out.extend(plain::bytes(&self.xsave));
        out.extend(plain::bytes(&self.xcrs));
        out.extend(plain::bytes(&self.lapic));
        out.extend(plain::bytes(&self.mp_state));
        out.extend(plain::bytes(&self.events));
        out.extend(plain::bytes(&self.debug));
        out.extend(self.tsc_khz.to_le_bytes());
        out.extend((self.msrs.len() as u32).to_le_bytes());
        for (index, value) in &self.msrs {
            out.extend(index.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        out
    }

    /// Reads a state; `None` for anything but exactly one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        let mut state = Self {
            regs: take(&mut r)?,
            sregs: take(&mut r)?,
            xsave: take(&mut r)?,
            xcrs: take(&mut r)?,
            lapic: take(&mut r)?,
            mp_state: take(&mut r)?,
            events: take(&mut r)?,
            debug: take(&mut r)?,
            tsc_khz: r.u32()?,
            msrs: Vec::new(),
        };
        let count = r.u32().filter(|count| *count <= MSRS_MAX)?;
        for _ in 0..count {
            state.msrs.push((r.u32()?, r.u64()?));
        }
        r.rest().is_empty().then_some(state)
    }
}

fn take<T: Plain>(reader: &mut Reader<'_>) -> Option<T> {
    plain::parse(reader.take(size_of::<T>())?)
}

fn msrs(entries: &[(u32, u64)]) -> Result<Msrs, Fault> {
    let entry = |&(index, data): &_| kvm_msr_entry { index, data, ..Default::default() };
    let entries: Vec<_> = entries.iter().map(entry).collect();
    Msrs::from_entries(&entries).fault(Part::Vcpu, "list MSRs")
}

/// Those that can be read, with their values.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Fault> {
    let mut found = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let mut list = msrs(&chunk.iter().map(|index| (*index, 0)).collect::<Vec<_>>())?;
        let count = vcpu.get_msrs(&mut list).fault(Part::Vcpu, "read MSRs")?;
        found.extend(list.as_slice()[..count].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that it does not have: go on behind it.
        rest = &rest[chunk.len().min(count + 1)..];
    }
    Ok(found)
}

/// Sets those that differ: KVM refuses to write some, also what they are already.
fn set_msrs(vcpu: &VcpuFd, entries: &[(u32, u64)]) -> Result<(), Fault> {
    let indices: Vec<_> = entries.iter().map(|(index, _)| *index).collect();
    let present: BTreeSet<_> = get_msrs(vcpu, &indices)?.into_iter().collect();
    let differ: Vec<_> = entries.iter().copied().filter(|entry| !present.contains(entry)).collect();
    for chunk in differ.chunks(MSRS_AT_ONCE) {
        let count = vcpu.set_msrs(&msrs(chunk)?).fault(Part::Vcpu, "set MSRs")?;
        if let Some((index, _)) = chunk.get(count) {
            return Err(Fault::new(Part::Vcpu, format!("set MSR {index:#x}: refused")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn example() -> VcpuState {
        VcpuState {
            regs: kvm_regs { rip: 0x1234, ..Default::default() },
            sregs: kvm_sregs { cr3: 0x5000, ..Default::default() },
            xsave: Default::default(),
            xcrs: Default::default(),
            lapic: Default::default(),
            mp_state: kvm_mp_state { mp_state: 3 },
            events: Default::default(),
            debug: Default::default(),
            tsc_khz: 2_000_000,
            msrs: vec![(0x2FF, 0xC06), (MSR_TSC, 99)],
        }
    }

    #[test]
    fn a_state_is_read_whole_or_not_at_all() {
        let bytes = example().emit();
        let read = VcpuState::parse(&bytes).unwrap();
        assert_eq!((read.regs.rip, read.sregs.cr3, read.mp_state.mp_state), (0x1234, 0x5000, 3));
        assert_eq!((read.tsc_khz, &read.msrs), (2_000_000, &example().msrs));
        assert_eq!(read.emit(), bytes);
        for size in (0..bytes.len()).step_by(101).chain([bytes.len() - 1]) {
            assert!(VcpuState::parse(&bytes[..size]).is_none(), "{size}");
        }
        assert!(VcpuState::parse(&[&bytes[..], &[0]].concat()).is_none());
        let many = bytes.len() - 2 * 12 - 4;
        let lie = [&bytes[..many], &u32::MAX.to_le_bytes(), &bytes[many + 4..]].concat();
        assert!(VcpuState::parse(&lie).is_none());
    }
}
