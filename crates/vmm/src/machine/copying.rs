//! A machine that saves itself, and one that goes on from what another saved: what the control device's commands TRACK
//! to ABORT do, and RESUME of a full state. Called by vCPU threads; where it says so, all of them stand still.

use std::sync::{MutexGuard, PoisonError};

use onde_wire::machine::control::{
    RESULT_INVALID, RESULT_OK, RESULT_UNREADABLE, ROLE_FORKED, ROLE_MOVED,
};
use onde_wire::machine::{COLD_SIZE, ColdStart, STATE_SIZE_MAX, VIRTIO_NET};
use vm_memory::{Bytes, GuestAddress};
use vm_superio::SerialState;

use super::{Machine, Outcome};
use crate::checkpoint::{Checkpoint, Refused};
use crate::control::Control;
use crate::fault::Fault;
use crate::kvm::copying::VmState;
use crate::kvm::vcpu_state::VcpuState;
use crate::state::{self, State, emit_serial, parse_serial};
use crate::virtio::Outgoing;
use crate::virtio::flow::Flow;
use crate::virtio::mmio::{self, Slot};

/// A machine state, as a loader hands it in.
pub enum Given {
    /// Where a machine starts whose memory is all there is of it.
    Cold(ColdStart),
    /// The bytes of a full one.
    Full(Vec<u8>),
}

/// A full state, checked: the machine that this one goes on from.
pub struct Source {
    /// By vCPU.
    pub vcpus: Vec<VcpuState>,
    vm: VmState,
    serial: SerialState,
    control: Control,
    devices: Vec<mmio::Saved>,
}

impl Machine {
    pub(super) fn checkpoint(&self) -> MutexGuard<'_, Checkpoint> {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// TRACK.
    pub fn track(&self, on: bool) -> Result<u32, Fault> {
        self.checkpoint().track(&self.vm, on).map(|()| RESULT_OK)
    }

    /// HARVEST.
    pub fn harvest(&self) -> Result<u32, Fault> {
        let done = self.checkpoint().harvest(&self.vm)?;
        Ok(done.err().unwrap_or(RESULT_OK))
    }

    /// FREEZE, while all vCPUs stand still: saves the rest of the machine beside `vcpus`.
    pub fn freeze(&self, role: u32, vcpus: Vec<Vec<u8>>) -> Result<u32, Fault> {
        if ![ROLE_MOVED, ROLE_FORKED].contains(&role) {
            return Ok(RESULT_INVALID);
        }
        let _turn = self.io_turn();
        let mut checkpoint = self.checkpoint();
        let pages = match checkpoint.take_dirty(&self.vm)? {
            Ok(pages) => pages,
            Err(refused) => return Ok(refused),
        };
        checkpoint.fill(&self.save(role, vcpus)?.emit(), pages)?;
        let mut control = self.bus.control();
        control.be_source();
        let flow = if role == ROLE_MOVED { control.flow() } else { Flow::default() };
        self.bus.virtio[VIRTIO_NET as usize].hold(Outgoing::Only(flow));
        Ok(RESULT_OK)
    }

    pub(super) fn save(&self, role: u32, vcpus: Vec<Vec<u8>>) -> Result<State, Fault> {
        let vm = self.vm.save()?;
        Ok(State {
            shape: self.shape,
            cpu: self.vm.cpu(),
            vcpus,
            ioapic: vm.ioapic(),
            clock_ns: vm.clock_ns,
            serial: emit_serial(&self.bus.serial_state()),
            control: self.bus.control().save(role),
            devices: self.bus.virtio.iter().map(Slot::save).collect(),
        })
    }

    /// COMMIT.
    pub fn commit(&self) -> u32 {
        if !self.checkpoint().is_frozen() {
            return RESULT_INVALID;
        }
        self.end(Outcome::PowerOff);
        RESULT_OK
    }

    /// ABORT.
    pub fn abort(&self) -> Result<u32, Fault> {
        let mut checkpoint = self.checkpoint();
        if !checkpoint.is_frozen() {
            return Ok(RESULT_INVALID);
        }
        checkpoint.discard()?;
        self.bus.virtio[VIRTIO_NET as usize].hold(Outgoing::All);
        Ok(RESULT_OK)
    }

    /// CHECK: whether RESUME would take the state at `address`.
    pub fn check(&self, address: u64) -> u32 {
        let refused = match self.given(address) {
            Ok(Given::Cold(_)) => None,
            Ok(Given::Full(state)) => self.parse_source(&state).err(),
            Err(refused) => Some(refused),
        };
        refused.unwrap_or(RESULT_OK)
    }

    /// The state at `address`, before the guest runs.
    pub fn given(&self, address: u64) -> Result<Given, Refused> {
        let view = self.boot_view().ok_or(RESULT_INVALID)?;
        let read = |bytes: &mut [u8]| {
            view.read_slice(bytes, GuestAddress(address)).map_err(|_| RESULT_INVALID)
        };
        let mut cold = [0; COLD_SIZE];
        read(&mut cold)?;
        if let Some(start) = ColdStart::parse(&cold) {
            return Ok(Given::Cold(start));
        }
        let size = state::size(&cold).ok_or(RESULT_UNREADABLE)?;
        assert!(size <= STATE_SIZE_MAX as usize);
        let mut full = vec![0; size];
        read(&mut full)?;
        Ok(Given::Full(full))
    }

    /// Reads a full state, which must be one for this machine.
    pub fn parse_source(&self, bytes: &[u8]) -> Result<Source, Refused> {
        let state = State::parse(bytes, &self.shape, &self.vm.cpu())?;
        self.parse_parts(&state).ok_or(RESULT_UNREADABLE)
    }

    fn parse_parts(&self, state: &State) -> Option<Source> {
        let slots = self.bus.virtio.iter().zip(&state.devices);
        Some(Source {
            vcpus: state.vcpus.iter().map(|vcpu| VcpuState::parse(vcpu)).collect::<Option<_>>()?,
            vm: VmState::parse(&state.ioapic, state.clock_ns)?,
            serial: parse_serial(&state.serial)?,
            control: Control::parse(&state.control)?,
            devices: slots.map(|(slot, bytes)| slot.parse(bytes)).collect::<Option<_>>()?,
        })
    }

    /// RESUME of a copy, first part, after [`Self::reset_devices`] and all vCPUs, which still stand still: what KVM has
    /// beside them.
    pub fn load_clock(&self, source: &Source) -> Result<(), Fault> {
        self.vm.load(&source.vm)
    }

    /// RESUME of a copy, second part: from here on its devices work.
    pub fn load_devices(&self, source: Source) {
        let _turn = self.io_turn();
        if self.has_ended() {
            return;
        }
        if source.control.has_event() {
            self.power_line.pulse();
        }
        if source.control.role() != ROLE_FORKED {
            // It goes on under its own addresses. Before it runs: what bridges still take to where it was waits for nobody.
            self.bus.virtio[VIRTIO_NET as usize].announce();
        }
        *self.bus.control() = source.control;
        self.bus.set_serial(&source.serial);
        for (slot, saved) in self.bus.virtio.iter().zip(source.devices) {
            slot.load(saved);
        }
    }
}
