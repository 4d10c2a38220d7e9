//! KVM: the virtual machine, its memory slots, its interrupt lines and doorbells. `registers` and
//! `cpuid` say what a vCPU starts with, `vcpu` runs one. With `memory` and `descriptors` the only
//! module that may be unsafe.

pub mod copying;
pub mod cpuid;
mod freeze;
mod plain;
pub mod registers;
pub mod vcpu;
pub mod vcpu_state;

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use onde_wire::machine::{
    BITMAP_START, BOOT_START, DISK_START, FROZEN_START, INFO_START, MIRROR_START, VIRTIO_START,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::fault::{Context, Fault, Part};
use crate::line::Line;
use crate::memory::{Disk, View};

/// Memory slots by number. Those of RAM and of its mirror are in address order, two at most.
const SLOT_RAM: u32 = 0;
const SLOT_BOOT: u32 = 2;
const SLOT_INFO: u32 = 3;
const SLOT_MIRROR: u32 = 4;
const SLOT_BITMAP: u32 = 6;
const SLOT_FROZEN: u32 = 7;
const SLOT_DISK: u32 = 8;
const SLOT_DISK_MIRROR: u32 = 9;
const SLOT_REGISTERS: u32 = 10;

/// Pages that Intel hosts without "unrestricted guest" need: below the local APICs, in the hole.
const TSS_ADDRESS: usize = 0xFFFB_D000;
const IDENTITY_MAP_ADDRESS: u64 = 0xFFFB_C000;

/// Lines of KVM's I/O APIC.
const IOAPIC_PINS: u32 = 24;

/// The windows through which a guest sees its own pages and state, beside MIRROR, and what its devices read as.
pub struct Windows<'a> {
    /// BITMAP.
    pub bitmap: &'a MmapRegion,
    /// FROZEN.
    pub frozen: &'a MmapRegion,
    /// What the registers of virtio devices read as.
    pub registers: &'a MmapRegion,
}

/// A virtual machine.
pub struct Vm {
    fd: Arc<VmFd>,
    cpuid: CpuId,
    /// The MSRs that KVM names as a vCPU's state.
    msrs: Vec<u32>,
    /// The I/O APIC as it was before anything ran.
    ioapic: kvm_irqchip,
}

impl Vm {
    /// Builds a VM over `view` and the info page. All slots come before the interrupt
    /// controllers: a change of slots costs milliseconds after them.
    pub fn new(
        kvm: OwnedFd,
        view: &View,
        disk: Option<&Disk>,
        info: &MmapRegion,
        windows: &Windows<'_>,
    ) -> Result<Self, Fault> {
        // SAFETY: `kvm` is an open descriptor that `Kvm` becomes the owner of; if it is not
        // `/dev/kvm` the first call on it fails.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let fd = kvm.create_vm().fault(Part::Kvm, "create a VM")?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .fault(Part::Kvm, "ask for CPU features")?;
        let msrs = kvm.get_msr_index_list().fault(Part::Kvm, "ask for MSRs")?.as_slice().to_vec();
        fd.set_tss_address(TSS_ADDRESS).fault(Part::Kvm, "set TSS address")?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).fault(Part::Kvm, "set identity map")?;
        let mut vm = Self { fd: Arc::new(fd), cpuid, msrs, ioapic: kvm_irqchip::default() };
        vm.keep_logs()?;
        vm.set_slots(view, disk, info, windows).fault(Part::Kvm, "set memory slots")?;
        vm.fd.create_irq_chip().fault(Part::Kvm, "create interrupt controllers")?;
        vm.route_interrupts().fault(Part::Kvm, "route interrupts")?;
        vm.ioapic.chip_id = KVM_IRQCHIP_IOAPIC;
        vm.fd.get_irqchip(&mut vm.ioapic).fault(Part::Kvm, "read the I/O APIC")?;
        Ok(vm)
    }

    /// Leads every line to the I/O APIC alone. KVM's default leads the first 16 to the old PIC too,
    /// which no hardware-reduced guest masks: its interrupts would look like exceptions.
    fn route_interrupts(&self) -> io::Result<()> {
        let route = |gsi| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin: gsi },
            },
            ..Default::default()
        };
        let routes: Vec<_> = (0..IOAPIC_PINS).map(route).collect();
        let routing = KvmIrqRouting::from_entries(&routes).map_err(io::Error::other)?;
        self.fd.set_gsi_routing(&routing).map_err(io::Error::from)
    }

    fn set_slots(
        &self,
        view: &View,
        disk: Option<&Disk>,
        info: &MmapRegion,
        windows: &Windows<'_>,
    ) -> io::Result<()> {
        let mut ram = 0;
        for region in view.iter() {
            let start = region.start_addr().0;
            if start == BOOT_START {
                self.set_slot(SLOT_BOOT, start, region, 0)?;
                continue;
            }
            self.set_slot(SLOT_RAM + ram, start, region, 0)?;
            self.set_slot(SLOT_MIRROR + ram, MIRROR_START + start, region, KVM_MEM_READONLY)?;
            ram += 1;
        }
        assert!(SLOT_RAM + ram <= SLOT_BOOT);
        if let Some(Disk { region, .. }) = disk {
            self.set_slot(SLOT_DISK, DISK_START, region, 0)?;
            let mirror = MIRROR_START + DISK_START;
            self.set_slot(SLOT_DISK_MIRROR, mirror, region, KVM_MEM_READONLY)?;
        }
        self.set_slot(SLOT_INFO, INFO_START, info, KVM_MEM_READONLY)?;
        self.set_slot(SLOT_BITMAP, BITMAP_START, windows.bitmap, KVM_MEM_READONLY)?;
        self.set_slot(SLOT_FROZEN, FROZEN_START, windows.frozen, KVM_MEM_READONLY)?;
        self.set_slot(SLOT_REGISTERS, VIRTIO_START, windows.registers, KVM_MEM_READONLY)
    }

    fn set_slot<B: Bitmap>(
        &self,
        slot: u32,
        start: u64,
        mapping: &MmapRegion<B>,
        flags: u32,
    ) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: start,
            memory_size: mapping.size() as u64,
            userspace_addr: mapping.as_ptr() as u64,
        };
        // SAFETY: the mapping is live; `Machine` keeps every mapping that has a slot until the
        // slot is gone (BOOT) or the process ends (all others).
        unsafe { self.fd.set_user_memory_region(region) }.map_err(io::Error::from)
    }

    /// Takes the BOOT window away from the guest. Its mapping may go after this.
    pub fn drop_boot(&self) -> Result<(), Fault> {
        let region = kvm_userspace_memory_region { slot: SLOT_BOOT, ..Default::default() };
        // SAFETY: a slot of size zero refers to no memory.
        unsafe { self.fd.set_user_memory_region(region) }.fault(Part::Kvm, "drop BOOT")
    }

    /// The line `gsi` of the I/O APIC.
    pub fn interrupt_line(&self, gsi: u32) -> Arc<dyn Line> {
        Arc::new(Pin { vm: self.fd.clone(), gsi })
    }

    /// An eventfd that counts the guest's 32-bit writes of `value` to `address`.
    pub fn doorbell(&self, address: u64, value: u32) -> Result<EventFd, Fault> {
        let bell = eventfd()?;
        let address = IoEventAddress::Mmio(address);
        self.fd.register_ioevent(&bell, &address, value).fault(Part::Kvm, "register a doorbell")?;
        Ok(bell)
    }

    /// Has KVM drop the guest's 32-bit writes of `value` to `address`.
    pub fn ignore(&self, address: u64, value: u32) -> Result<(), Fault> {
        // It counts them, and keeps what it counts with.
        self.doorbell(address, value).map(drop)
    }

    /// A vCPU with its CPU features set.
    pub fn create_vcpu(&self, id: u32, count: u32) -> Result<VcpuFd, Fault> {
        let vcpu = self.fd.create_vcpu(id.into()).fault(Part::Kvm, "create a vCPU")?;
        let cpuid = cpuid::for_vcpu(&self.cpuid, id, count)?;
        vcpu.set_cpuid2(&cpuid).fault(Part::Kvm, "set CPU features")?;
        Ok(vcpu)
    }

    /// The MSRs that KVM names as a vCPU's state.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Puts the I/O APIC back to what it was before anything ran.
    pub fn reset_ioapic(&self) -> io::Result<()> {
        self.fd.set_irqchip(&self.ioapic).map_err(io::Error::from)
    }
}

/// A line of the I/O APIC. An irqfd would be led there by a kernel thread: two switches between tasks for each interrupt.
struct Pin {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Line for Pin {
    fn pulse(&self) {
        for level in [true, false] {
            let set = self.vm.set_irq_line(self.gsi, level);
            // The controller is there as long as the VM, and has this line.
            set.expect("KVM takes a level of a line that it has");
        }
    }
}

/// An eventfd that never blocks.
pub fn eventfd() -> Result<EventFd, Fault> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).fault(Part::Io, "create an eventfd")
}
