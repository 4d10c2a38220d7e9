//! How much a node is to hold of a customer's money, and when it gets more: the arithmetic of [`crate::home`].
//! Pure: from a STATUS and the job's file to one act.
//!
//! ```text
//!  node holds:  0 ........ half a release ........ a release
//!                 release         buy ahead            hold
//! ```
//! A *release* is what [`RELEASE_S`] seconds cost. Beside it a node that can save the VM holds the *reserve*, which pays for
//! the disk should the VM run dry, and which the price list bounds. A node never holds more than both without having
//! earned it, the first payment and what is paid by hand aside: so that is the most that one which cheats can get.

use super::judge::Deal;
use crate::job::Job;
use onde_wire::chain::STEPS_MAX;
use onde_wire::machine::Stage;
use onde_wire::packet::JobStatus;

/// Seconds that a release pays for, at the told rate or with all processors busy, whichever is more. A VM lives on for
/// half as long at least when its home node is away. Longer, and a node that cheats gets more; shorter, and a home node
/// that restarts, or a lost packet or two, leaves a VM dry.
pub const RELEASE_S: u64 = 20;
/// A VM on disk wakes up with so much to run on, seconds at its last rate; that no node can stretch it beyond a release.
const WAKE_S: u64 = RELEASE_S / 2;
/// What is bought at once lasts so long, seconds: what a broker may be away, and more costs nothing, since what was not
/// released comes back.
const BUY_S: u64 = 60;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing: the node holds enough.
    Hold,
    /// Show the token of this index, once more if it was shown before.
    Show(u32),
    /// Buy so many tokens.
    Buy(u32),
    /// The node needs more, and the budget is spent.
    AtBudget,
}

/// Tokens that a guest shows at once when it pays by itself: half a release.
pub fn lot(deal: &Deal) -> u32 {
    let micro = deal.busy_micro_per_s().saturating_mul(RELEASE_S / 2);
    u32::try_from(micro.div_ceil(deal.value_micro.max(1))).unwrap_or(STEPS_MAX).clamp(1, STEPS_MAX)
}

/// The act that a job is due.
pub fn next(deal: &Deal, status: &JobStatus, job: &Job) -> Act {
    if status.last_index < job.released {
        return Act::Show(job.released);
    }
    let rate =
        deal.busy_micro_per_s().max(status.burn_micro_per_s.min(deal.burn_max_micro_per_s()));
    let (released, value) = (status.last_index, deal.value_micro.max(1));
    let release = rate.saturating_mul(RELEASE_S);
    let paid = u64::from(released).saturating_mul(value);
    let reserve = deal.reserve_micro(status);
    let held = paid.saturating_sub(status.spent_micro).saturating_sub(reserve);
    if rate == 0 || (held >= release && status.wake_micro == 0) {
        return Act::Hold;
    }
    let earned = status.spent_micro.saturating_add(reserve);
    let wanted = earned.saturating_add(release).max(to_wake(deal, status, paid, earned));
    let wanted = u32::try_from(wanted.div_ceil(value)).unwrap_or(u32::MAX);
    let wanted = wanted.min(released.saturating_add(STEPS_MAX));
    if wanted <= released {
        return Act::Hold;
    }
    // While its VM moves, a job may have bought more than its part of the budget: that is given back.
    let bought = job.bought().min(job.budget).max(released);
    // One that ran dry sleeps until it gets this.
    let is_due = held < release / 2 || status.stage == Stage::Low || status.wake_micro > 0;
    if is_due && bought > released {
        return Act::Show(wanted.min(bought));
    }
    if wanted <= bought {
        return Act::Hold;
    }
    let lot = rate.saturating_mul(BUY_S).div_ceil(value).max((wanted - bought).into());
    let lot = u32::try_from(lot).unwrap_or(STEPS_MAX).min(STEPS_MAX);
    match lot.min(job.budget.saturating_sub(job.sold)) {
        0 if is_due => Act::AtBudget,
        0 => Act::Hold,
        count => Act::Buy(count),
    }
}

/// Micro-tokens to pay in all so that a VM which ran dry wakes up: as its node says, as far as the price list goes.
fn to_wake(deal: &Deal, status: &JobStatus, paid: u64, earned: u64) -> u64 {
    let most = deal.burn_max_micro_per_s().saturating_mul(WAKE_S);
    match status.wake_micro {
        0 => 0,
        told => paid.saturating_add(told).min(earned.saturating_add(most)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::tests::{DEAL, honest, job};

    /// `sold` tokens of a budget of 1000 are bought and `released` shown. A release is 17 tokens, half of it 8.5.
    fn check(status: &JobStatus, sold: u32, released: u32, expect: Act) {
        assert_eq!(next(&DEAL, status, &job(sold, released, 1000)), expect);
    }

    #[test]
    fn a_node_gets_a_release_when_half_of_the_last_is_earned() {
        // 100 s at 0.85 tokens a second: 85 spent.
        let at = |index| honest(100, 100, index);
        check(&at(102), 200, 102, Act::Hold);
        check(&at(94), 200, 94, Act::Hold);
        check(&at(93), 200, 93, Act::Show(102));
        check(&JobStatus { stage: Stage::Low, ..at(94) }, 200, 94, Act::Show(102));
        // What the node has not confirmed is shown again, and nothing beyond.
        check(&at(80), 200, 93, Act::Show(93));
    }

    #[test]
    fn tokens_are_bought_ahead_and_never_beyond_the_budget() {
        let at = |seconds, index| honest(seconds, seconds, index);
        check(&at(100, 102), 102, 102, Act::Hold);
        check(&at(100, 101), 101, 101, Act::Buy(51));
        check(&at(100, 93), 93, 93, Act::Buy(51));
        // What is at hand goes first: the broker may be away.
        check(&at(100, 93), 95, 93, Act::Show(95));
        check(&at(1100, 951), 951, 951, Act::Buy(49));
        check(&at(1100, 940), 1000, 940, Act::Show(952));
        check(&at(1170, 996), 1000, 996, Act::Show(1000));
        check(&at(1170, 1000), 1000, 1000, Act::AtBudget);
        check(&at(1160, 1000), 1000, 1000, Act::Hold);
        // The rest of the budget went to the node that the VM moves to: so does what was bought of it.
        let part = |budget| super::next(&DEAL, &at(100, 93), &job(200, 93, budget));
        assert_eq!([part(101), part(95), part(93)], [Act::Show(101), Act::Show(95), Act::AtBudget]);
        assert_eq!(part(50), Act::AtBudget);
    }

    #[test]
    fn what_pays_for_the_disk_is_not_for_running() {
        // 256 MiB on disk for 300 s at 0.01 tokens a GiB-second: 0.8 tokens; a node that can save tells two times.
        let deal = Deal { keep_s: 300, ..DEAL };
        let saves = |index| JobStatus { purge_s: 300, ..honest(100, 100, index) };
        let next = |status: &JobStatus, bought| {
            super::next(&deal, status, &job(bought, status.last_index, 1000))
        };
        assert_eq!(next(&honest(100, 100, 102), 200), Act::Hold);
        assert_eq!(next(&saves(102), 200), Act::Hold);
        assert_eq!(next(&saves(102), 102), Act::Buy(51), "its last token is the disk's");
        assert_eq!(next(&saves(94), 200), Act::Show(103));
        let dear = Deal { keep_s: u32::MAX, ..DEAL };
        // At most an eighth of what was paid is kept back, whatever the terms are.
        assert_eq!(super::next(&dear, &saves(104), &job(300, 104, 1000)), Act::Show(116));
    }

    #[test]
    fn a_vm_on_disk_gets_what_wakes_it_and_a_liar_no_more_than_a_release() {
        let deal = Deal { keep_s: 300, ..DEAL };
        let dry = |index, wake_micro| JobStatus {
            stage: Stage::Suspended,
            purge_s: 300,
            seconds_left: 300,
            wake_micro,
            ..honest(100, 100, index)
        };
        let next =
            |status: &JobStatus| super::next(&deal, status, &job(900, status.last_index, 1000));
        assert_eq!(next(&dry(86, 1_000_000)), Act::Show(103));
        assert_eq!(next(&dry(86, 30_000_000)), Act::Show(116), "it sent much before");
        let most = deal.burn_max_micro_per_s() * WAKE_S;
        let all = (85_000_000 + deal.reserve_micro(&dry(86, 1)) + most).div_ceil(1_000_000) as u32;
        assert_eq!(next(&dry(86, u64::MAX)), Act::Show(all));
        assert_eq!(next(&dry(all, u64::MAX)), Act::Hold);
    }

    #[test]
    fn told_rates_count_as_far_as_the_price_list_goes() {
        let burn = |burn_micro_per_s| JobStatus { burn_micro_per_s, ..honest(0, 0, 30) };
        check(&burn(0), 900, 30, Act::Hold);
        check(&burn(4_000_000), 900, 30, Act::Show(80));
        let most = DEAL.burn_max_micro_per_s();
        let all = (most * RELEASE_S).div_ceil(DEAL.value_micro) as u32;
        check(&burn(most), 900, 30, Act::Show(all));
        check(&burn(u64::MAX), 900, 30, Act::Show(all));
    }
}
