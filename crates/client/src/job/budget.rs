//! One budget over all moves of a VM. While it moves, two jobs are paid for: the new one gets its part of the budget out of
//! what the old one's home node could still release, in the same moment, so that both together never have more. If the VM
//! stays, the part comes back, less what the new job cost; if it moves, the new job gets what the old one left.
//! `onde migrate` and `onde ticket` split, every home node reckons. Files only: nothing here asks anybody.
//!
//! ```text
//!             old.budget   new.budget
//!   split     B - part     part           in one step: old.lent says so, new.inherits
//!   stayed    B - cost     -              once the new job is settled, or its file never came to be
//!   moved     -            B - spent      once the old job is settled
//! ```

use super::{Job, Jobs, JobsError, Settled};
use crate::api::Hex;
use onde_wire::packet::JobStatus;
use onde_wire::token::JobId;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;

/// Least part, tokens: the bootstrap, the stream, and some time to pay more.
pub const PART_MIN: u32 = 10;
/// What a VM's memory moves at least with, MiB a second, and seconds that a move takes beside that. In this time the old VM
/// goes on: what it may use is nobody else's.
const MOVE_MIB_PER_S: u64 = 16;
const MOVE_S: u64 = 15;

/// A part of a job's budget that another job has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// The job that its VM is to move to.
    pub to: Hex<16>,
    /// Tokens.
    pub tokens: u32,
}

impl Job {
    /// Tokens of the budget for the job that this one's VM is about to move to, at least `first` where there are so many.
    /// `wait_s`: how long the move may take to begin. Half of what the node has not seen; the old VM goes on meanwhile, and is
    /// paid. Where that is less than [`PART_MIN`], what the old node will give back counts, too.
    ///
    /// # Errors
    /// What is left, where that is less than [`PART_MIN`].
    pub fn part(&self, status: &JobStatus, first: u32, wait_s: u64) -> Result<u32, u32> {
        let free = self.budget.saturating_sub(self.shown(status));
        let change = self.change(status, wait_s);
        match free.saturating_add(change) {
            left if left < PART_MIN => Err(left),
            _ => Ok((free / 2).max(first.min(free)).max(PART_MIN)),
        }
    }

    /// Index of the last token that the node has seen, or that a guest with a purse may show it.
    fn shown(&self, status: &JobStatus) -> u32 {
        // One purse may be on its way.
        let shown = self.released.max(status.last_index).saturating_add(self.purse);
        shown.max(self.purse_last)
    }

    /// Tokens that the node will give back at least.
    fn change(&self, status: &JobStatus, wait_s: u64) -> u32 {
        let move_s = MOVE_S + u64::from(self.mem_mib) / MOVE_MIB_PER_S + wait_s;
        let busy = self.deal().map_or(0, |deal| deal.busy_micro_per_s());
        let micro = status.balance_micro.saturating_sub(busy.saturating_mul(move_s));
        u32::try_from(micro / self.value_micro.max(1)).unwrap_or(u32::MAX)
    }

    /// Tokens that the settled job cost, the last one begun.
    fn cost(&self, settled: &Settled) -> u32 {
        let micro = settled.paid_micro.saturating_sub(settled.refund_micro);
        u32::try_from(micro.div_ceil(self.value_micro.max(1))).unwrap_or(u32::MAX)
    }
}

impl Jobs {
    /// Adds the job `new`, to which the VM of `old` is to move, with a part of that one's budget: as much as `part` says
    /// of the file as it is now. `None` where that is less than what was bought for it already; then nothing is written.
    /// Whoever calls this has the old job's turn: nobody releases meanwhile.
    pub fn split(
        &self,
        old: &JobId,
        new: &Job,
        part: impl FnOnce(&Job) -> Result<u32, u32>,
    ) -> Result<Option<Job>, JobsError> {
        let _lock = self.lock()?;
        let before = self.get(old)?;
        let Some(tokens) = part(&before).ok().filter(|tokens| *tokens >= new.sold) else {
            return Ok(None);
        };
        let new = Job { budget: tokens, inherits: true, moves: Some(Hex(*old)), ..new.clone() };
        let mut lender = before.clone();
        lender.budget = before.budget.saturating_sub(tokens);
        lender.lent = Some(Lent { to: new.id, tokens });
        self.write(&lender)?;
        // Whoever dies here has lent to nobody, which the next one to reckon finds out.
        if let Err(error) = self.add_locked(&new) {
            self.write(&before)?;
            return Err(error);
        }
        Ok(Some(new))
    }

    /// Gives the part of `new` back at once: its boot token was never taken, and nobody will show it any more. What was
    /// bought for it the broker gives back when the token has expired.
    pub fn forgo(&self, old: &JobId, new: &JobId) -> Result<(), JobsError> {
        self.update(new, |job| (job.moves, job.inherits, job.budget) = (None, false, job.sold))?;
        self.update(old, |job| {
            if let Some(lent) = job.lent.take_if(|lent| lent.to.0 == *new) {
                job.budget = job.budget.saturating_add(lent.tokens);
            }
        })?;
        Ok(())
    }

    /// Takes in what a move left to reckon of this job's budget, once that is known. The job as it is then.
    pub fn reckon(&self, id: &JobId) -> Result<Job, JobsError> {
        let _lock = self.lock()?;
        let before = self.get(id)?;
        let mut job = before.clone();
        if let Some(Lent { to, tokens }) = job.lent
            && job.moved_to.is_none()
            && let Some(cost) = self.cost(&to.0)?
        {
            job.budget = job.budget.saturating_add(tokens).saturating_sub(cost);
            job.lent = None;
        }
        if let Some(old) = job.moves.filter(|_| job.inherits)
            && let Some((budget, cost)) = self.left(&old.0, id)?
        {
            job.budget = job.budget.saturating_add(budget).saturating_sub(cost);
            job.inherits = false;
        }
        if job != before {
            self.write(&job)?;
        }
        Ok(job)
    }

    /// Tokens that a job cost, none where it came to nothing but a name; `None` where that is not known yet.
    fn cost(&self, id: &JobId) -> Result<Option<u32>, JobsError> {
        match self.known(id)? {
            None => Ok(Some(0)),
            Some(job) => Ok(job.settled.map(|settled| job.cost(&settled))),
        }
    }

    /// Budget and cost of the job that moved to `new`, once it is settled.
    fn left(&self, old: &JobId, new: &JobId) -> Result<Option<(u32, u32)>, JobsError> {
        let Some(job) = self.known(old)? else { return Ok(Some((0, 0))) };
        let settled = job.settled.filter(|_| job.moved_to == Some(Hex(*new)));
        Ok(settled.map(|settled| (job.budget, job.cost(&settled))))
    }

    /// A job's file, where there is one.
    fn known(&self, id: &JobId) -> Result<Option<Job>, JobsError> {
        match self.get(id) {
            Err(JobsError::File { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            job => job.map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Prices, SettledBy};
    use crate::home::tests::honest;
    use crate::job::tests::{Folder, sample};

    const OLD: JobId = [1; 16];
    const NEW: JobId = [2; 16];
    /// A busy VM of 256 MiB costs 0.85 tokens a second: 26.35 while it moves.
    const PRICES: Prices =
        Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 };

    fn old(budget: u32, released: u32) -> Job {
        Job { budget, released, prices: Some(PRICES), ..sample(OLD, None, 1) }
    }

    fn check(job: &Job, balance: u64, first: u32, expect: Result<u32, u32>) {
        let status = JobStatus { balance_micro: balance * 1_000_000, ..honest(0, 0, job.released) };
        assert_eq!(job.part(&status, first, 0), expect, "{} of {}", job.released, job.budget);
    }

    #[test]
    fn a_move_gets_half_of_what_is_left_and_is_refused_where_that_is_too_little() {
        check(&old(600, 40), 20, PART_MIN, Ok(280));
        check(&old(600, 40), 20, 300, Ok(300));
        check(&old(600, 40), 20, 900, Ok(560));
        check(&old(52, 40), 20, PART_MIN, Ok(10));
        // Two are unseen, and of 40 the VM may use 27 on its way: 13 come back.
        check(&old(42, 40), 40, PART_MIN, Ok(10));
        check(&old(42, 40), 34, PART_MIN, Err(9));
        check(&old(40, 40), 36, PART_MIN, Err(9));
        check(&old(30, 30), 30, PART_MIN, Err(3));
        check(&old(30, 40), 0, PART_MIN, Err(0));
        // What the guest has in its purse it may show at any time.
        let purse = Job { purse: 40, purse_last: 75, ..old(100, 40) };
        check(&purse, 20, PART_MIN, Ok(10));
        check(&Job { purse_last: 95, ..purse }, 20, PART_MIN, Err(5));
    }

    fn settled(paid: u64, refund_micro: u64) -> Settled {
        Settled { by: SettledBy::Certificate, paid_micro: paid * 1_000_000, refund_micro, at: 1 }
    }

    /// Files of a move: an old job with 600 tokens of budget, of which the new one gets 280.
    fn begun(name: &str) -> (Folder, Jobs) {
        let folder = Folder::new(&format!("budget-{name}"));
        let jobs = Jobs::open(&folder.0).unwrap();
        jobs.add(&old(600, 40)).unwrap();
        let new = Job { sold: 30, released: 30, budget: 0, ..sample(NEW, None, 2) };
        let none = jobs.split(&OLD, &new, |_| Ok(29)).unwrap();
        assert_eq!((none, jobs.list().unwrap().len()), (None, 1), "less than was bought");
        let status = honest(0, 0, 40);
        let new = jobs.split(&OLD, &new, |old| old.part(&status, 30, 0)).unwrap().unwrap();
        assert_eq!((new.moves, new.budget), (Some(Hex(OLD)), 280));
        assert_eq!(budgets(&jobs), [320, 280]);
        (folder, jobs)
    }

    /// Budgets after both jobs were reckoned by whoever came along, twice.
    fn budgets(jobs: &Jobs) -> [u32; 2] {
        let budget = |id| jobs.known(&id).unwrap().map_or(0, |_| jobs.reckon(&id).unwrap().budget);
        let first = [OLD, NEW].map(budget);
        assert_eq!([OLD, NEW].map(budget), first, "reckoned twice");
        first
    }

    #[test]
    fn a_vm_that_stays_gets_its_budget_back_less_what_was_tried() {
        let (_folder, jobs) = begun("stayed");
        // 30 tokens were paid and 27.5 came back.
        jobs.update(&NEW, |job| job.settled = Some(settled(30, 27_500_000))).unwrap();
        assert_eq!(budgets(&jobs), [597, 280]);
        assert_eq!(jobs.get(&OLD).unwrap().lent, None);
    }

    #[test]
    fn a_vm_that_moved_has_what_its_old_node_left() {
        let (_folder, jobs) = begun("moved");
        jobs.update(&OLD, |job| job.moved_to = Some(Hex(NEW))).unwrap();
        assert_eq!(budgets(&jobs), [320, 280], "the old node has not said");
        // Paid by hand on both sides: it is on top.
        jobs.update(&OLD, |job| job.budget += 5).unwrap();
        jobs.update(&NEW, |job| job.budget += 7).unwrap();
        jobs.update(&OLD, |job| job.settled = Some(settled(60, 18_999_999))).unwrap();
        assert_eq!(budgets(&jobs)[1], 612 - 42);
    }

    #[test]
    fn a_move_that_never_began_costs_nothing_and_bars_no_other() {
        let (_folder, jobs) = begun("forgone");
        jobs.forgo(&OLD, &NEW).unwrap();
        assert_eq!(budgets(&jobs), [600, 30]);
        assert_eq!((jobs.get(&OLD).unwrap().lent, jobs.get(&NEW).unwrap().moves), (None, None));
    }

    #[test]
    fn who_dies_between_the_two_files_has_lent_to_nobody() {
        let (_folder, jobs) = begun("died");
        std::fs::remove_file(jobs.file(&NEW)).unwrap();
        assert_eq!(budgets(&jobs), [600, 0]);
    }

    #[test]
    fn an_old_vm_that_used_more_than_it_was_thought_to_leaves_less() {
        let folder = Folder::new("budget-lent");
        let jobs = Jobs::open(&folder.0).unwrap();
        jobs.add(&old(40, 40)).unwrap();
        let new = Job { sold: 10, released: 10, ..sample(NEW, None, 2) };
        jobs.split(&OLD, &new, |_| Ok(10)).unwrap().unwrap();
        assert_eq!(budgets(&jobs), [30, 10]);
        jobs.update(&OLD, |job| {
            (job.moved_to, job.settled) = (Some(Hex(NEW)), Some(settled(40, 3_000_000)));
        })
        .unwrap();
        assert_eq!(budgets(&jobs)[1], 3, "37 of 40 are gone");
    }
}
