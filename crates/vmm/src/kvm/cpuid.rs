//! The CPU that the guest sees: all that KVM supports on this host, as one socket of `count` cores
//! without threads. Sources: Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::fault::{Context, Fault, Part};

const KVM_CPUID_FLAG_SIGNIFCANT_INDEX: u32 = 1;
/// Leaf 1 ECX: the local APIC timer counts to a TSC value, which saves its calibration. KVM
/// emulates it but leaves it to the VMM to say so.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the count in EBX 23:16 is valid.
const MULTI_CORE: u32 = 1 << 28;

/// `supported` with the fields that differ between vCPUs or that KVM leaves open.
pub fn for_vcpu(supported: &CpuId, id: u32, count: u32) -> Result<CpuId, Fault> {
    let extended = |entry: &kvm_cpuid_entry2| matches!(entry.function, 0xB | 0x1F);
    let mut entries: Vec<_> =
        supported.as_slice().iter().copied().filter(|entry| !extended(entry)).collect();
    for entry in &mut entries {
        patch(entry, id, count);
    }
    entries.extend(topology(id, count));
    CpuId::from_entries(&entries).fault(Part::Kvm, "list CPU features")
}

/// Bits of an APIC id that number the cores of one socket.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn patch(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    match entry.function {
        1 => {
            entry.ecx |= TSC_DEADLINE | HYPERVISOR;
            entry.ebx = entry.ebx & 0xFFFF | count << 16 | id << 24;
            entry.edx = entry.edx & !MULTI_CORE | if count > 1 { MULTI_CORE } else { 0 };
        }
        // Intel's caches: the last level is shared by all cores, the others by none.
        4 if entry.eax & 0x1F != 0 => {
            let shared = if entry.eax >> 5 & 7 >= 3 { (1 << core_bits(count)) - 1 } else { 0 };
            let cores = ((1 << core_bits(count)) - 1).min(0x3F);
            entry.eax = entry.eax & 0x3FFF | shared << 14 | cores << 26;
        }
        // AMD: number of cores less one, and bits of the APIC id.
        0x8000_0008 => entry.ecx = core_bits(count) << 12 | (count - 1),
        // AMD's caches, as Intel's.
        0x8000_001D if entry.eax & 0x1F != 0 => {
            let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3FFF | shared << 14;
        }
        // AMD: APIC id, core id with one thread each, one node.
        0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// The extended topology leaf: no threads, then the cores, then the end.
fn topology(id: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    [(0, 0, 1, THREADS), (1, core_bits(count), count, CORES), (2, 0, 0, 0)].map(
        |(index, shift, threads, level)| kvm_cpuid_entry2 {
            function: 0xB,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: threads,
            ecx: level << 8 | index,
            edx: id,
            ..Default::default()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_has_its_own_id_in_one_socket() {
        let entry = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let supported = CpuId::from_entries(&[entry(1), entry(0xB), entry(0x8000_0008)]).unwrap();
        for (id, count, bits) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (63, 64, 6)] {
            let cpuid = for_vcpu(&supported, id, count).unwrap();
            let [one, amd, smt, core, end] = *cpuid.as_slice() else { panic!("entries") };
            assert_eq!(one.ebx, id << 24 | count << 16);
            assert_eq!(one.ecx, TSC_DEADLINE | HYPERVISOR);
            assert_eq!(one.edx != 0, count > 1);
            assert_eq!(amd.ecx, bits << 12 | (count - 1));
            assert_eq!((smt.eax, smt.ebx, smt.edx), (0, 1, id));
            assert_eq!((core.eax, core.ebx, core.ecx), (bits, count, 0x201));
            assert_eq!((end.ebx, end.index), (0, 2));
        }
    }
}
