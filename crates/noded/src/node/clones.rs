//! Templates and their clones: what memory a token's VM starts from, what that takes from the node, and who pays for
//! a template's pages. A template is a machine in its file, like one that was suspended, but in memory, and it never goes on;
//! clones share what they have not written of it.

use onde_wire::machine::Stage;
use onde_wire::packet::{EndReason, Reply, Status};
use onde_wire::plan::{SLOTS_MAX, VMS_MAX};
use onde_wire::token::{BootToken, JobId, Origin};

use super::{Effect, Node, Start};
use crate::admission;
use crate::job::Job;

impl Node {
    /// What a token's VM starts from.
    pub(super) fn start_of(&self, token: &BootToken) -> Result<Start, Status> {
        let Origin::Clone(id) = token.origin else { return Ok(Start::Loader) };
        let template = self.jobs.get(&id).map(|record| &record.job);
        let is_it = |job: &&Job| job.is_going() && job.stage() == Stage::Template;
        let template = template.filter(is_it).ok_or(Status::NoTemplate)?.token();
        let shape = |token: &BootToken| (token.mem_mib, token.vcpus, token.disk_mib);
        if shape(template) == shape(token) {
            Ok(Start::Template(id))
        } else {
            Err(Status::BadLimits)
        }
    }

    /// A slot for a VM, where there is memory for it. Slots with an mstrap address take turns; clones take the others
    /// first.
    pub(super) fn free_slot(&self, token: &BootToken) -> Result<u32, Status> {
        if admission::reserve_mib(token) > self.mem_mib_free {
            return Err(Status::NoMemory);
        }
        let is_free = |slot: &u32| self.slots[*slot as usize].is_none();
        let slot = match token.origin {
            Origin::Clone(_) => (0..VMS_MAX).rev().find(is_free),
            Origin::Loader | Origin::Template => {
                (0..SLOTS_MAX).map(|i| (self.next_slot + i) % SLOTS_MAX).find(is_free)
            }
        };
        slot.ok_or(Status::NoRoom)
    }

    /// Where a new VM can be spoken with: its mstrap's address, or a clone's own.
    pub(super) fn boot_ipv4(&self, token: &BootToken, slot: u32) -> [u8; 4] {
        match token.origin {
            Origin::Clone(_) => token.ipv4,
            Origin::Loader | Origin::Template => self.config.plan.mstrap(self.config.number, slot),
        }
    }

    /// Tells whoever waits for it that a VM is there.
    pub(super) fn answer_boot(&mut self, slot: u32) -> Option<Effect> {
        let caller = self.tenant(slot)?.boot.take()?;
        Some(self.reply(&caller, &self.booted(&self.jobs[&caller.job].job, slot)))
    }

    /// A machine that is in its file takes no memory any more, and a template only its pages, which are shared.
    pub(super) fn keep_memory(&mut self, id: JobId) {
        let Some(record) = self.jobs.get_mut(&id) else { return };
        let kept_mib = record.job.held_mib().min(record.reserved_mib);
        self.mem_mib_free += record.reserved_mib - kept_mib;
        (record.reserved_mib, record.shared_mib) = (kept_mib, kept_mib);
    }

    /// A job that is over holds no memory; pages that clones still have pass to one of them.
    pub(super) fn free_memory(&mut self, id: JobId) {
        let Some(record) = self.jobs.get_mut(&id) else { return };
        let reserved_mib = std::mem::take(&mut record.reserved_mib);
        let shared_mib = std::mem::take(&mut record.shared_mib);
        let template = match record.job.token().origin {
            Origin::Clone(template) => template,
            Origin::Loader | Origin::Template => id,
        };
        self.mem_mib_free += reserved_mib - self.bequeath(template, shared_mib);
    }

    /// Pages of a template, which is gone or never paid for again, pass to a clone that still has them: it pays for them
    /// from now on. How many MiB did.
    fn bequeath(&mut self, template: JobId, mib: u32) -> u32 {
        let is_heir = |id: &&JobId| self.jobs[*id].job.token().origin == Origin::Clone(template);
        let heir = self.slots.iter().flatten().find(is_heir).copied();
        let Some(heir) = heir.and_then(|id| self.jobs.get_mut(&id)).filter(|_| mib > 0) else {
            return 0;
        };
        heir.job.inherit(mib);
        heir.reserved_mib += mib;
        heir.shared_mib += mib;
        mib
    }

    /// The answer to who waits for a VM that ended before it was there.
    pub(super) fn never_there(&mut self, id: JobId, reason: EndReason) -> Option<Effect> {
        let caller = self.jobs.get_mut(&id)?.boot.take()?;
        let status = match reason {
            EndReason::OutOfMemory => Status::NoMemory,
            EndReason::Fault => Status::NodeFault,
            _ => Status::Ended,
        };
        Some(self.reply(&caller, &Reply::Refused(onde_wire::packet::Op::Boot, status)))
    }
}
