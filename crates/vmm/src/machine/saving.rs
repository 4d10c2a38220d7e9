//! A machine that `noded` has saved to a file, and one that wakes up from it. The guest has no part in either: it stands
//! still at one instruction and goes on at the same. A template is saved before its first instruction.

use std::fmt::Display;
use std::sync::PoisonError;

use onde_wire::machine::VmmEvent;
use onde_wire::stream::Start;

use super::{Machine, Outcome};
use crate::fault::{Fault, Part};
use crate::gathering::Call;
use crate::kvm::vcpu_state::VcpuState;
use crate::saved;

impl Machine {
    fn start_record(&self) -> Start {
        Start { job: self.job, space: self.shape.space, vcpus: self.shape.vcpus }
    }

    /// Saves the machine and ends it; the I/O thread calls this. False where it is being copied or resumed now: try again.
    /// A machine that cannot be saved goes on, and `noded` is told: one that is frozen, too, if nobody is patient any more.
    pub fn save_to_file(&self, is_patient: bool) -> bool {
        if self.checkpoint().is_frozen() {
            if !is_patient {
                // A copy of it may live: nobody but its own agent finds out, and for that it has to run.
                self.not_saved(&"nothing is known yet of the copy that it became");
            }
            return !is_patient;
        }
        let _turn = self.io_turn();
        let calls = (0..self.shape.vcpus).map(|_| Call::Save).collect();
        if !self.gathering.call(None, calls) {
            return false;
        }
        // Whoever waits for something else comes to the call first. A payment that `noded` answers later was made all
        // the same: the guest hands the token in again.
        self.noded.pay_done(false);
        self.arrivals.announce();
        let Some(states) = self.gathering.others() else { return true };
        if self.checkpoint().is_frozen() {
            // Since just now.
            self.gathering.release();
            return false;
        }
        let vcpus = states.iter().flatten().map(VcpuState::emit).collect();
        match self.save_all(vcpus) {
            Ok(()) => self.end(Outcome::Saved),
            Err(fault) => {
                self.not_saved(&fault);
                self.gathering.release();
            }
        }
        true
    }

    fn not_saved(&self, why: &dyn Display) {
        eprintln!("vmm: not saved: {why}");
        self.noded.tell(VmmEvent::NotSaved);
    }

    fn save_all(&self, vcpus: Vec<Vec<u8>>) -> Result<(), Fault> {
        let role = self.bus.control().role();
        self.write_to_file(&self.save(role, vcpus)?.emit())
    }

    /// Writes RAM and this state to the machine's file; its disk is in one of its own. Nothing runs in it.
    pub fn write_to_file(&self, state: &[u8]) -> Result<(), Fault> {
        let nowhere = || Fault::new(Part::Saved, "there is no file for it");
        let file = self.saved.as_ref().ok_or_else(nowhere)?;
        let ram = self.memory().ram.clone();
        let written = saved::write(file, &self.start_record(), &ram, state);
        written.map(|_| ()).map_err(|error| Fault::new(Part::Saved, format!("write it: {error}")))
    }

    /// Reads the machine that this one goes on from, before any of its vCPUs runs.
    pub fn read_saved(&self) -> Result<(), Fault> {
        let nowhere = || Fault::new(Part::Saved, "there is no file to wake up from");
        let file = self.saved.as_ref().ok_or_else(nowhere)?;
        let ram = self.memory().ram.clone();
        let state = saved::read(file, &self.start_record(), &ram)?;
        *self.waking.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        Ok(())
    }

    /// The state to go on from, once.
    pub fn take_waking(&self) -> Option<Vec<u8>> {
        self.waking.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
