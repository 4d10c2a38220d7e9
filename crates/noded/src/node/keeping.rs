//! The way to disk and back: SUSPEND and WAKE, what is done when a balance is for the disk only, and what becomes of
//! machines there. A machine is in a process or in its file, and goes from one to the other in one step: only when its
//! VMM said that all of it is there does the file count, and only when RESUME was done does it count no more.

use onde_wire::machine::VmmCommand;
use onde_wire::packet::{EndReason, Op, Reply, Status};
use onde_wire::token::JobId;

use super::{Caller, Effect, Node, Note, Start};
use crate::job::Verdict;

impl Node {
    /// SUSPEND. Repeated, it changes nothing.
    pub(super) fn suspend(&mut self, now_ms: u64, caller: &Caller) -> Vec<Effect> {
        let Some(record) = self.jobs.get_mut(&caller.job) else { return vec![] };
        let job = &mut record.job;
        if let Some(status) = job.why_not_saved() {
            return vec![self.reply(caller, &Reply::Refused(Op::Suspend, status))];
        }
        job.suspend();
        let (status, slot) = (job.status(now_ms), job.slot().filter(|_| !job.is_saved()));
        // What it used so far is charged before the node's own work begins.
        let read = slot.map(Effect::Read);
        let reply = self.reply(caller, &Reply::Suspend(status));
        read.into_iter().chain([reply]).collect()
    }

    /// Has a VM written to disk. It was charged just now.
    pub(super) fn save(&mut self, now_ms: u64, slot: u32) -> Vec<Effect> {
        let Some(record) = self.tenant(slot) else { return vec![] };
        if record.job.is_saving() {
            return vec![];
        }
        record.job.save(now_ms);
        let meter = record.job.meter();
        vec![Effect::Publish(slot, meter), Effect::Command(slot, VmmCommand::Save)]
    }

    /// A VM could not be written to disk, and goes on. Its counters hold the attempt: they are read, not charged.
    pub(super) fn not_saved(&mut self, now_ms: u64, slot: u32) -> Vec<Effect> {
        let Some(record) = self.tenant(slot) else { return vec![] };
        if !record.job.is_saving() {
            // Nobody asked: the file may hold a machine that is about to wake up.
            return vec![];
        }
        record.job.not_saved(now_ms);
        vec![Effect::Empty(slot), Effect::Read(slot)]
    }

    /// WAKE. Repeated, it changes nothing.
    pub(super) fn wake(&mut self, now_ms: u64, caller: &Caller) -> Vec<Effect> {
        let job = &self.jobs[&caller.job].job;
        let woken = match (job.is_going(), job.is_saved() && !job.is_waking()) {
            (false, _) => Err(Status::Ended),
            (true, false) => Ok(vec![]),
            // Its clones share the file that it would leave.
            (true, true) if job.is_template() => Err(Status::BadLimits),
            (true, true) if !job.can_wake() => Err(Status::Unpaid),
            (true, true) => self.start_waking(now_ms, caller.job),
        };
        let reply = match &woken {
            Ok(_) => Reply::Wake(self.jobs[&caller.job].job.status(now_ms)),
            Err(status) => Reply::Refused(Op::Wake, *status),
        };
        let reply = self.reply(caller, &reply);
        woken.unwrap_or_default().into_iter().chain([reply]).collect()
    }

    /// Wakes up a machine that waits for nothing but its balance, if that is there now.
    pub(super) fn wake_by_itself(&mut self, now_ms: u64, id: JobId) -> Vec<Effect> {
        let wants = self.jobs.get(&id).is_some_and(|record| record.job.wants_to_wake());
        // Without memory it stays where it is, and is tried again with its next charge.
        if wants { self.start_waking(now_ms, id).unwrap_or_default() } else { vec![] }
    }

    fn start_waking(&mut self, now_ms: u64, id: JobId) -> Result<Vec<Effect>, Status> {
        let token = *self.jobs[&id].job.token();
        let slot = self.free_slot(&token)?;
        let saved_mib = self.jobs[&id].job.room_mib();
        let spec = self.spec(&token, slot, saved_mib, Start::Saved);
        self.occupy(slot, id, spec.held_mib);
        if let Some(record) = self.jobs.get_mut(&id) {
            record.job.charge_time(now_ms);
            record.job.wake(now_ms, slot);
        }
        Ok(vec![Effect::Create(slot, spec), Effect::Note(id, Note::Wakes(slot))])
    }

    /// RESUME is all but done, by a loader or by a VMM that read a file, whose contents are the past from here on. One
    /// that is to end gets no leave: it was told that it never ran. A template is saved instead.
    pub(super) fn resumed(&mut self, now_ms: u64, slot: u32) -> Vec<Effect> {
        let Some(record) = self.tenant(slot) else { return vec![] };
        let was_saved = record.job.is_saved();
        if record.job.is_template() {
            return if record.job.is_going() { self.save(now_ms, slot) } else { vec![] };
        }
        if was_saved {
            record.job.charge_time(now_ms);
        }
        if !record.job.resume(now_ms) {
            return vec![];
        }
        let (id, meter) = (record.job.token().job, record.job.meter());
        let mut effects = vec![Effect::Command(slot, VmmCommand::Go), Effect::Publish(slot, meter)];
        if was_saved {
            self.saved.remove(&id);
            effects.extend([Effect::Empty(slot), Effect::Read(slot)]);
        }
        self.answer_boot(slot).into_iter().chain(effects).collect()
    }

    /// What takes too long is given up: a bootstrap and a saving with the job, a waking only for now.
    pub(super) fn late(&mut self, now_ms: u64, slot: u32) -> Vec<Effect> {
        let Some(record) = self.tenant(slot) else { return vec![] };
        if record.job.is_waking() {
            record.job.give_up_waking();
            return vec![Effect::Kill(slot)];
        }
        let reason = match record.job.is_saving() {
            true => EndReason::Fault,
            false => EndReason::BootTimeout,
        };
        self.end(now_ms, slot, reason)
    }

    /// Charges for a machine on disk whose time has come, purges one that paid for no more, and wakes up one that can go
    /// on.
    pub(super) fn charge_saved(&mut self, now_ms: u64, id: JobId) -> Vec<Effect> {
        let Some(record) = self.jobs.get_mut(&id) else { return vec![] };
        match record.job.charge_time(now_ms) {
            Verdict::Purge if record.job.slot().is_none() => {
                self.end_saved(now_ms, id, EndReason::OutOfTokens)
            }
            _ => self.wake_by_itself(now_ms, id),
        }
    }

    /// Ends a job whose machine is on disk, and has no process.
    pub(super) fn end_saved(&mut self, now_ms: u64, id: JobId, reason: EndReason) -> Vec<Effect> {
        let Some(record) = self.jobs.get_mut(&id) else { return vec![] };
        record.job.charge_time(now_ms);
        record.job.end(now_ms, reason);
        record.job.gone(now_ms, 0);
        self.over(now_ms, id)
    }
}
