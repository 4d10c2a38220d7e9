//! FREEZE and its other end, RESUME of a full state, as vCPU threads see them: all stand still, each saves or loads its
//! own vCPU, one of them (the caller) sees to the rest of the machine.

use onde_wire::machine::control::{RESULT_INVALID, RESULT_OK};

use super::vcpu::Vcpu;
use super::vcpu_state::VcpuState;
use crate::fault::{Fault, Part};
use crate::gathering::Call;
use crate::machine::{Machine, Outcome};
use crate::noded::Leave;

/// Exits after which an access is done: a string instruction of a page makes one for each byte at most.
const ACCESS_EXITS_MAX: usize = 8192;

impl Vcpu {
    /// Before each KVM_RUN: does what another vCPU's thread called for, then stands still until that is done.
    pub fn attend(&mut self, machine: &Machine) -> Result<(), Fault> {
        let Some(call) = machine.gathering.called(self.id) else { return Ok(()) };
        self.stand_still(machine)?;
        let answer = match call {
            Call::Save => Some(VcpuState::save(&self.fd, &self.msrs)?),
            Call::Load(state) => {
                state.load(&self.fd)?;
                None
            }
        };
        machine.gathering.answer(self.id, answer);
        Ok(())
    }

    /// Waits, with no access under way, until all vCPUs stand still.
    fn stand_still(&mut self, machine: &Machine) -> Result<(), Fault> {
        self.finish_access(machine)?;
        machine.gathering.stand();
        Ok(())
    }

    /// Has KVM finish the access of the last exit, which it does at the next KVM_RUN only: before that
    /// the instruction pointer is still at it.
    pub fn finish_access(&mut self, machine: &Machine) -> Result<(), Fault> {
        self.fd.set_kvm_immediate_exit(1);
        let done = self.run_to_interruption(machine);
        self.fd.set_kvm_immediate_exit(0);
        done
    }

    fn run_to_interruption(&mut self, machine: &Machine) -> Result<(), Fault> {
        for _ in 0..ACCESS_EXITS_MAX {
            match self.fd.run() {
                Err(error) if error.errno() == libc::EINTR => return Ok(()),
                // A vCPU that waits to be started may say this instead.
                Err(error) if error.errno() == libc::EAGAIN => return Ok(()),
                Err(error) => {
                    return Err(Fault::new(Part::Vcpu, format!("finish an access: {error}")));
                }
                // An access in several parts goes on. A command cannot be among them: those registers are whole words.
                Ok(exit) => _ = super::vcpu::answer(exit, self.id, machine),
            }
        }
        Err(Fault::new(Part::Vcpu, "an access does not end"))
    }

    /// FREEZE, for a copy with `role`.
    pub fn freeze(&mut self, role: u32, machine: &Machine) -> Result<u32, Fault> {
        let calls = (0..machine.shape.vcpus).map(|_| Call::Save).collect();
        if !machine.gathering.call(Some(self.id), calls) {
            return Ok(RESULT_INVALID);
        }
        // Its own part in it, which nobody else takes.
        let _ = machine.gathering.called(self.id);
        self.stand_still(machine)?;
        let own = VcpuState::save(&self.fd, &self.msrs)?;
        let Some(states) = machine.gathering.all(self.id, Some(own)) else { return Ok(RESULT_OK) };
        let vcpus = states.iter().flatten().map(VcpuState::emit).collect();
        let result = machine.freeze(role, vcpus)?;
        machine.gathering.release();
        Ok(result)
    }

    /// Makes all vCPUs the guest's, who goes on where this state was saved. Called by the first vCPU's thread.
    pub fn go_on(&mut self, state: Vec<u8>, machine: &Machine) -> Result<u32, Fault> {
        let mut source = match machine.parse_source(&state) {
            Ok(source) => source,
            Err(refused) => return Ok(refused),
        };
        let calls = std::mem::take(&mut source.vcpus)
            .into_iter()
            .map(|vcpu| Call::Load(Box::new(vcpu)))
            .collect();
        if !machine.gathering.call(Some(self.id), calls) {
            return Ok(RESULT_INVALID);
        }
        self.stand_still(machine)?;
        let turn = machine.io_turn();
        machine.reset_devices()?;
        if let Some(Call::Load(own)) = machine.gathering.called(self.id) {
            own.load(&self.fd)?;
        }
        if machine.gathering.all(self.id, None).is_none() {
            return Ok(RESULT_OK);
        }
        // All that can fail comes first: whoever got leave has lived, and nobody goes back to what was before it. The
        // devices, which could send something, come after it.
        machine.load_clock(&source)?;
        drop(turn);
        if machine.noded.ask_leave() == Leave::Save {
            machine.end(Outcome::Kept(state));
            return Ok(RESULT_OK);
        }
        machine.load_devices(source);
        machine.gathering.release();
        machine.drop_boot_soon();
        Ok(RESULT_OK)
    }
}
