//! The I/O thread's loop: doorbells, the tap, commands from `noded`, and the one timer. The only
//! place of this program with a clock.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use onde_wire::machine::{VIRTIO_NET, VmmCommand};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::fault::{Context, Fault, Part};
use crate::machine::{Doorbell, Machine, Outcome};

/// BOOT goes this long after RESUME: dropping a memory slot stops all vCPUs for milliseconds, and
/// the guest's start is over by then on a fast machine.
const BOOT_DELAY: Duration = Duration::from_secs(1);
/// Between two tries to save the machine, where a copy is being made of it: that takes milliseconds.
const SAVE_PERIOD: Duration = Duration::from_millis(10);
/// How long a machine that is frozen for a copy may take to hear what became of that: a judge that can be asked answers
/// within a second.
const FROZEN_MAX: Duration = Duration::from_secs(10);
/// How long the guest may not hear of a frame that left, unless something else interrupts it: it wants to know, but waits for
/// nothing. An answer mostly brings about the next question sooner.
const LATE: Duration = Duration::from_millis(10);
/// Events taken at once.
const EVENTS_MAX: usize = 16;

/// What each event's data says; doorbells follow from `DOORBELLS` on.
const NODED: u64 = 0;
const WAKE: u64 = 1;
const TAP: u64 = 2;
const DOORBELLS: u64 = 3;
/// The network device's receive queue.
const RX: usize = 0;

/// The loop and what it listens to.
pub struct Io<'a> {
    machine: &'a Machine,
    doorbells: &'a [Doorbell],
    epoll: Epoll,
    drop_boot_at: Option<Instant>,
    /// Since when `noded` wants the machine saved, where it was not possible yet.
    save_wanted: Option<Instant>,
    /// When an interrupt of the network device can wait no longer.
    late_at: Option<Instant>,
}

impl<'a> Io<'a> {
    /// Registers all descriptors.
    pub fn new(machine: &'a Machine, doorbells: &'a [Doorbell]) -> Result<Self, Fault> {
        let epoll = Epoll::new().fault(Part::Io, "create epoll")?;
        let io = Self {
            machine,
            doorbells,
            epoll,
            drop_boot_at: None,
            save_wanted: None,
            late_at: None,
        };
        io.listen().fault(Part::Io, "register with epoll")?;
        Ok(io)
    }

    fn listen(&self) -> io::Result<()> {
        let add = |fd: RawFd, events, data| {
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
        };
        add(self.machine.noded.as_raw_fd(), EventSet::IN, NODED)?;
        add(self.machine.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        // Edges only: while the guest has no buffers, frames stay in the tap without waking us.
        add(self.machine.tap(), EventSet::IN | EventSet::EDGE_TRIGGERED, TAP)?;
        for (index, doorbell) in self.doorbells.iter().enumerate() {
            add(doorbell.bell.as_raw_fd(), EventSet::IN, DOORBELLS + index as u64)?;
        }
        Ok(())
    }

    /// Runs until the machine ends.
    pub fn run(&mut self) -> Outcome {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        loop {
            let count = match self.epoll.wait(self.timeout_ms(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Outcome::Fault(io_fault("wait for events", error)),
            };
            for event in &events[..count] {
                self.serve(event.data());
            }
            if let Some(since) = self.save_wanted
                && self.machine.save_to_file(since.elapsed() < FROZEN_MAX)
            {
                self.save_wanted = None;
            }
            if let Some(outcome) = self.machine.take_outcome() {
                return outcome;
            }
            self.step_late();
            if let Err(fault) = self.step_boot(Instant::now()) {
                return Outcome::Fault(fault);
            }
        }
    }

    fn timeout_ms(&self) -> i32 {
        let next = self.drop_boot_at.into_iter().chain(self.late_at).min();
        match next {
            _ if self.save_wanted.is_some() => SAVE_PERIOD.as_millis() as i32,
            None => -1,
            // One more, so that the time has come when the wait is over.
            Some(at) => at.saturating_duration_since(Instant::now()).as_millis() as i32 + 1,
        }
    }

    fn serve(&mut self, data: u64) {
        // Between two events a vCPU thread may save or load all that is touched here.
        let machine = self.machine;
        let _turn = machine.io_turn();
        match data {
            NODED => self.obey(),
            WAKE => _ = self.machine.wake.read(),
            TAP => self.process(VIRTIO_NET as usize, RX),
            _ => {
                let doorbell = &self.doorbells[(data - DOORBELLS) as usize];
                // Before serving, so that a ring during it is not lost.
                let _ = doorbell.bell.read();
                self.process(doorbell.position, doorbell.queue);
            }
        }
    }

    fn process(&mut self, position: usize, queue: usize) {
        let waits = self.machine.bus.virtio[position].process(queue);
        if position == VIRTIO_NET as usize {
            self.late_at = waits.then(|| self.late_at.unwrap_or_else(|| Instant::now() + LATE));
        }
    }

    /// Raises the interrupt that can wait no longer.
    fn step_late(&mut self) {
        if self.late_at.is_some_and(|at| at <= Instant::now()) {
            self.late_at = None;
            let machine = self.machine;
            let _turn = machine.io_turn();
            machine.bus.virtio[VIRTIO_NET as usize].interrupt_late();
        }
    }

    fn obey(&mut self) {
        match self.machine.noded.hear() {
            Ok(Some(VmmCommand::PayDone(accepted))) => self.machine.noded.pay_done(accepted),
            Ok(Some(VmmCommand::Go)) => self.machine.noded.leave(),
            Ok(Some(VmmCommand::PowerButton)) => self.machine.press_power_button(),
            Ok(Some(VmmCommand::Save)) if self.machine.noded.save_instead() => {}
            Ok(Some(VmmCommand::Save)) => _ = self.save_wanted.get_or_insert_with(Instant::now),
            Ok(None) => {}
            Err(_) => self.machine.end(Outcome::Abandoned),
        }
    }

    /// Drops BOOT when its time has come.
    fn step_boot(&mut self, now: Instant) -> Result<(), Fault> {
        if self.machine.take_boot_is_over() {
            self.drop_boot_at = Some(now + BOOT_DELAY);
        }
        if self.drop_boot_at.is_some_and(|at| at <= now) {
            self.drop_boot_at = None;
            self.machine.drop_boot()?;
        }
        Ok(())
    }
}

fn io_fault(act: &str, error: io::Error) -> Fault {
    Fault::new(Part::Io, format!("{act}: {error}"))
}
