//! The machine: built once from the descriptors and the shape that `noded` gives, then shared by
//! the vCPU threads and the I/O thread. Knows the order in which things are built, handed over and
//! ended; the parts do the work.
//!
//! ```text
//!   new -> mstrap runs -> RESUME (hand_over) -> guest runs -> BOOT dropped -> end(outcome)
//!    \-> in its file, or a template's ----------^
//! ```

pub mod copying;
mod saving;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use onde_wire::machine::{
    ACPI_START, GED_GSI, INFO_SIZE, INFO_TSC_KHZ, Identity, SERIAL_GSI, Space, VIRTIO_GSI,
    VIRTIO_START, VIRTIO_STRIDE,
};
use onde_wire::token::JobId;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, VolatileMemory};
use vm_superio::SerialState;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Bus, SerialLine};
use crate::checkpoint::Checkpoint;
use crate::console::Console;
use crate::descriptors::{Descriptors, Tap};
use crate::fault::{Context, Fault, Part};
use crate::gathering::Gathering;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::{Vm, eventfd};
use crate::line::Line;
use crate::memory::{Disk, Memory, View, map_console, map_info, map_registers};
use crate::noded::Noded;
use crate::virtio::Device;
use crate::virtio::blk::Blk;
use crate::virtio::mmio::{ACK_USED, INTERRUPT_ACK, QUEUE_NOTIFY, Slot, Wiring};
use crate::virtio::net::{Arrivals, Net};
use crate::virtio::rng::Rng;
use crate::{acpi, mstrap, saved};

/// The shape of a machine, from the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// RAM and disk.
    pub space: Space,
    /// Number of vCPUs.
    pub vcpus: u32,
}

impl Shape {
    /// Whether there is a disk.
    pub fn has_disk(&self) -> bool {
        self.space.disk_bytes > 0
    }

    /// Number of virtio devices.
    pub fn device_count(&self) -> usize {
        2 + usize::from(self.has_disk())
    }
}

/// Where a machine's memory and state come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A loader writes them.
    Loader,
    /// Its file: it was saved.
    Saved,
    /// Its file, which is a template that it shares: it is a clone.
    Template,
}

/// How a machine ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself, or a vCPU met a triple fault.
    Reset,
    /// The machine is in its file.
    Saved,
    /// The machine, of which this is the state, is to be saved before its first instruction.
    Kept(Vec<u8>),
    /// `noded` closed its socket: nobody pays for this machine any more.
    Abandoned,
    /// The VMM cannot go on.
    Fault(Fault),
}

/// A doorbell that the I/O thread listens to, and the queue it is for.
pub struct Doorbell {
    /// Position of the device.
    pub position: usize,
    /// Number of its queue.
    pub queue: usize,
    /// Counts the guest's writes.
    pub bell: EventFd,
}

/// What all threads of the process share.
pub struct Machine {
    /// Devices.
    pub bus: Bus,
    /// The line to `noded`.
    pub noded: Noded,
    /// News from the network for a vCPU in IDLE.
    pub arrivals: Arc<Arrivals>,
    /// Wakes the I/O thread: the machine ended or BOOT can go soon.
    pub wake: EventFd,
    /// Where vCPU threads stand still together.
    pub gathering: Gathering,
    /// What was built.
    pub shape: Shape,
    vm: Vm,
    memory: Mutex<Memory>,
    checkpoint: Mutex<Checkpoint>,
    /// Held by the I/O thread while it serves anything, and by whoever needs it to stand still.
    io_turn: Mutex<()>,
    job: JobId,
    /// Where the machine is saved to.
    saved: Option<File>,
    /// The state of the machine that this one goes on from, until its first vCPU takes it.
    waking: Mutex<Option<Vec<u8>>>,
    // Never read after start: a slot refers to it as long as the VM lives.
    _info: MmapRegion,
    tap: RawFd,
    power_line: Arc<dyn Line>,
    handed_over: AtomicBool,
    boot_is_over: AtomicBool,
    ended: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
}

/// A machine that is ready to run.
pub struct Built {
    /// The machine.
    pub machine: Arc<Machine>,
    /// Its vCPUs.
    pub vcpus: Vec<Vcpu>,
    /// What the I/O thread listens to.
    pub doorbells: Vec<Doorbell>,
}

/// Builds a machine; its first vCPU is about to run mstrap, or to go on where another one stopped.
pub fn build(shape: Shape, origin: Origin, given: Descriptors) -> Result<Built, Fault> {
    let info = map_info(given.info)?;
    let identity = read_identity(&info)?;
    let (memory, waking) = match (origin, &given.saved) {
        (Origin::Template, Some(file)) => {
            let template = saved::find(file, &shape)?;
            let memory = Memory::of_clone(&shape.space, file, &template.pieces)?;
            (memory, Some(template.state))
        }
        _ => (Memory::new(&shape.space, given.disk.as_ref())?, None),
    };
    let view = memory.ram_and_boot.clone();
    let disk = memory.disk.clone();
    let checkpoint = Checkpoint::new(memory.ram.clone(), disk.clone(), shape.space)?;
    let registers = Arc::new(map_registers(shape.device_count())?);
    let windows = checkpoint.windows(&registers);
    let vm = Vm::new(given.kvm, &view, disk.as_deref(), &info, &windows)?;
    let vcpus = create_vcpus(&vm, shape.vcpus)?;
    if origin == Origin::Loader {
        vcpus[0].enter_mstrap(load_mstrap(given.mstrap, &view, &shape.space)?)?;
    }
    write_tsc_khz(&info, vcpus[0].tsc_khz()?)?;

    let arrivals = Arc::new(Arrivals::default());
    let tap = given.tap.file().as_raw_fd();
    let devices = devices(given.tap, disk, &identity, &arrivals)?;
    let mut doorbells = Vec::new();
    let mut slots = Vec::new();
    for (position, device) in devices.into_iter().enumerate() {
        slots.push(plug(&vm, &view, position, device, &registers, &mut doorbells)?);
    }
    assert_eq!(slots.len(), shape.device_count());
    let line = SerialLine(vm.interrupt_line(SERIAL_GSI));
    let machine = Machine {
        bus: Bus::new(line, Console::new(map_console(given.console)?), slots),
        noded: Noded::new(given.control),
        arrivals,
        wake: eventfd()?,
        power_line: vm.interrupt_line(GED_GSI),
        vm,
        gathering: Gathering::new(shape.vcpus),
        shape,
        memory: Mutex::new(memory),
        checkpoint: Mutex::new(checkpoint),
        io_turn: Mutex::default(),
        job: identity.job,
        saved: given.saved,
        waking: Mutex::new(waking),
        _info: info,
        tap,
        handed_over: AtomicBool::new(false),
        boot_is_over: AtomicBool::new(false),
        ended: AtomicBool::new(false),
        outcome: Mutex::new(None),
    };
    if origin == Origin::Saved {
        machine.read_saved()?;
    }
    Ok(Built { machine: Arc::new(machine), vcpus, doorbells })
}

fn read_identity(info: &MmapRegion) -> Result<Identity, Fault> {
    let mut page = [0; INFO_SIZE];
    info.as_volatile_slice().read_slice(&mut page, 0).fault(Part::Descriptors, "read info page")?;
    Identity::parse(&page)
        .ok_or_else(|| Fault::new(Part::Descriptors, "the info page has no identity"))
}

fn write_tsc_khz(info: &MmapRegion, tsc_khz: u32) -> Result<(), Fault> {
    info.as_volatile_slice()
        .write_slice(&tsc_khz.to_le_bytes(), INFO_TSC_KHZ)
        .fault(Part::Memory, "write info page")
}

fn create_vcpus(vm: &Vm, count: u32) -> Result<Vec<Vcpu>, Fault> {
    (0..count).map(|id| Vcpu::new(vm.create_vcpu(id, count)?, id, vm.msrs())).collect()
}

/// Reads the image, puts it into BOOT and returns its entry point.
fn load_mstrap(file: File, view: &View, space: &Space) -> Result<u64, Fault> {
    let mut image = Vec::new();
    file.take(mstrap::IMAGE_SIZE_MAX)
        .read_to_end(&mut image)
        .fault(Part::Mstrap, "read the mstrap image")?;
    mstrap::write_tables(view, space)?;
    mstrap::load(&image, view)
}

/// The virtio devices in the order of their positions (`wire::machine::VIRTIO_*`).
fn devices(
    tap: Tap,
    disk: Option<Arc<Disk>>,
    identity: &Identity,
    arrivals: &Arc<Arrivals>,
) -> Result<Vec<Box<dyn Device>>, Fault> {
    let net = Net::new(tap, identity, arrivals.clone());
    let mut devices: Vec<Box<dyn Device>> = vec![Box::new(net), Box::new(Rng)];
    if let Some(disk) = disk {
        devices.push(Box::new(Blk::new(disk)));
    }
    Ok(devices)
}

/// Gives a device its place in the address space, its interrupt and its doorbells.
fn plug(
    vm: &Vm,
    view: &Arc<View>,
    position: usize,
    device: Box<dyn Device>,
    registers: &Arc<MmapRegion>,
    doorbells: &mut Vec<Doorbell>,
) -> Result<Slot, Fault> {
    let line = vm.interrupt_line(VIRTIO_GSI + position as u32);
    let start = VIRTIO_START + position as u64 * VIRTIO_STRIDE;
    vm.ignore(start + INTERRUPT_ACK, ACK_USED)?;
    let mut kicks = Vec::new();
    for queue in 0..device.queue_sizes().len() {
        let bell = vm.doorbell(start + QUEUE_NOTIFY, queue as u32)?;
        kicks.push(bell.try_clone().fault(Part::Io, "clone a doorbell")?);
        doorbells.push(Doorbell { position, queue, bell });
    }
    let wiring = Wiring { line, kicks, registers: registers.clone(), position };
    Ok(Slot::new(device, wiring, view.clone()))
}

impl Machine {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tap, to poll; the network device reads it.
    pub fn tap(&self) -> RawFd {
        self.tap
    }

    /// RAM and BOOT, as long as the machine is not handed over.
    pub fn boot_view(&self) -> Option<Arc<View>> {
        let handed_over = self.handed_over.load(Ordering::SeqCst);
        (!handed_over).then(|| self.memory().ram_and_boot.clone())
    }

    /// Waits until the I/O thread is between two events, and keeps it there.
    pub fn io_turn(&self) -> MutexGuard<'_, ()> {
        self.io_turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// RESUME: devices and interrupt controllers as after power-on, none of them able to reach BOOT. Called once, by the
    /// first vCPU.
    pub fn reset_devices(&self) -> Result<(), Fault> {
        self.handed_over.store(true, Ordering::SeqCst);
        let ram = self.memory().ram.clone();
        for slot in &self.bus.virtio {
            slot.hand_over(ram.clone());
        }
        self.bus.set_serial(&SerialState::default());
        self.vm.reset_ioapic().fault(Part::Kvm, "reset the I/O APIC")
    }

    /// RESUME of a cold machine: it finds ACPI tables in its RAM.
    pub fn hand_over(&self) -> Result<(), Fault> {
        self.reset_devices()?;
        let ram = self.memory().ram.clone();
        let tables = acpi::tables(self.shape.vcpus, self.bus.virtio.len() as u64);
        ram.write_slice(&tables, GuestAddress(ACPI_START))
            .and_then(|()| ram.write_slice(&acpi::RESET_CODE, GuestAddress(acpi::RESET_VECTOR)))
            .fault(Part::Memory, "write ACPI tables")
    }

    /// The guest runs: asks the I/O thread to drop BOOT when it no longer delays the start.
    pub fn drop_boot_soon(&self) {
        if !self.memory().has_boot() {
            return;
        }
        self.boot_is_over.store(true, Ordering::SeqCst);
        self.wake_io();
    }

    /// Whether [`Self::drop_boot_soon`] was called since the last time.
    pub fn take_boot_is_over(&self) -> bool {
        self.boot_is_over.swap(false, Ordering::SeqCst)
    }

    /// Takes BOOT from the guest and gives its memory back. After [`Self::hand_over`] only.
    pub fn drop_boot(&self) -> Result<(), Fault> {
        self.vm.drop_boot()?;
        self.memory().drop_boot();
        Ok(())
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.bus.control().press_power_button();
        self.power_line.pulse();
    }

    /// Ends the machine; the first outcome counts. Threads return as soon as they notice.
    pub fn end(&self, outcome: Outcome) {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(outcome);
        self.ended.store(true, Ordering::SeqCst);
        // vCPUs that wait for something wait no longer.
        self.gathering.end();
        self.arrivals.announce();
        self.noded.pay_done(false);
        self.noded.leave();
        self.wake_io();
    }

    /// Whether the machine ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// How the machine ended, once.
    pub fn take_outcome(&self) -> Option<Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn wake_io(&self) {
        // Fails only where the counter would overflow: the I/O thread wakes up then, too.
        let _ = self.wake.write(1);
    }
}
