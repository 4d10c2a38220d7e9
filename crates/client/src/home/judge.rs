//! Whether a node earns what it is paid: its own words in STATUS have to add up, fit the price list that the job was
//! bought at, and fit the time that went by here. [`crate::home`] asks before each release. Pure state: no clock, no I/O.
//!
//! What cannot be seen from here is not judged: whether the processor time was real, or as fast as it might be. A node
//! that lies about those sells a slow machine at its price list's price, and `--while` is what notices.

use onde_wire::machine::Stage;
use onde_wire::packet::{JobStatus, Prices};
use onde_wire::price::SENT_MAX_PER_S;
use std::time::Duration;

/// A node's clock and this one may differ by this much, and by one part in [`DRIFT`] of the time. Less, and an answer
/// that was long on its way would make an honest node a cheat.
const CLOCK_SLACK_MS: u64 = 10_000;
/// So may two clocks of a node: the one that processor time is counted by and the one that ages are. A VM that is busy for
/// hours uses what went by and a little more.
const DRIFT: u64 = 64;
/// A STATUS tells the age of now and meters of the last charge: processor time of so long may come at once, ms.
const METER_SLACK_MS: u64 = 5_000;

/// At most one in so many micro-tokens paid is kept back for the disk.
const RESERVE_SHARE: u64 = 8;
/// How often a node looks at a VM that is about to run dry.
const LOOKS_PER_S: u64 = 100;

/// What was bought, and at what prices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deal {
    /// Memory, MiB.
    pub mem_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Disk, MiB.
    pub disk_mib: u32,
    /// Micro-tokens that a payment token is worth.
    pub value_micro: u64,
    /// The node's price list when the job was bought.
    pub prices: Prices,
    /// How long the node keeps it on disk when it runs dry, seconds; it pays for that before.
    pub keep_s: u32,
}

impl Deal {
    /// Micro-tokens a second with all vCPUs busy.
    pub fn busy_micro_per_s(&self) -> u64 {
        self.prices.busy_micro_per_s(self.vcpus, self.mem_mib, self.disk_mib)
    }

    /// Most micro-tokens a second that the price list allows for the shape. A quarter is room for quotas of processor
    /// time, which hold over a tenth of a second and not over each second; a saved VM holds its memory as disk.
    pub fn burn_max_micro_per_s(&self) -> u64 {
        let disk_mib = self.disk_mib.saturating_add(self.mem_mib);
        let busy = self.prices.busy_micro_per_s(self.vcpus, self.mem_mib, disk_mib);
        let sent = self.prices.cost_micro(0, 0, SENT_MAX_PER_S, 0);
        busy.saturating_add(busy / 4).saturating_add(sent).saturating_add(2)
    }

    /// Micro-tokens of a balance that a running VM must not use, where its node can save it: what it is kept on disk with,
    /// at most an eighth of all that was paid, and what it uses between two looks of the node. A node that cannot save it
    /// tells the same time twice.
    pub fn reserve_micro(&self, status: &JobStatus) -> u64 {
        if status.purge_s == status.seconds_left && status.stage != Stage::Suspended {
            return 0;
        }
        // Its machine in a file is a little more than its memory.
        let saved_mib = self.mem_mib.saturating_add(self.mem_mib / 64 + 8);
        let rate = self.prices.held_micro_per_s(0, self.disk_mib.saturating_add(saved_mib));
        let paid = u64::from(status.last_index).saturating_mul(self.value_micro);
        let keep = rate.saturating_mul(self.keep_s.into()).min(paid / RESERVE_SHARE);
        keep.saturating_add(self.burn_max_micro_per_s() / LOOKS_PER_S)
    }

    /// What the meters of a STATUS cost.
    pub fn cost_micro(&self, status: &JobStatus) -> u64 {
        let JobStatus { cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms, .. } = *status;
        self.prices.cost_micro(cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms)
    }
}

/// Why a node is not paid any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cheat {
    /// Its charge is not price times meter.
    #[error("it charged {spent_micro} micro-tokens for what costs {cost_micro} by its price list")]
    Overcharge {
        /// What it charged.
        spent_micro: u64,
        /// What its own meters cost.
        cost_micro: u64,
    },
    /// Payment is missing from its account of the job.
    #[error("{0} micro-tokens that it was paid are neither spent nor left")]
    Missing(u64),
    /// Its burn rate is beyond its price list.
    #[error("it burns {told} micro-tokens a second; its price list allows {most} for this VM")]
    Burn {
        /// What it says.
        told: u64,
        /// The most there can be.
        most: u64,
    },
    /// The VM is older than it can be.
    #[error("it charges for {0} ms that have not gone by")]
    Hurry(u64),
    /// The VM used more than it has.
    #[error(
        "its meter shows {told} of {meter}, and a VM of this shape can have used {most} meanwhile"
    )]
    Impossible {
        /// Of what, and in which unit.
        meter: &'static str,
        /// What it says.
        told: u128,
        /// The most there can be.
        most: u128,
    },
    /// A meter ran backwards, or a payment that it had confirmed is gone.
    #[error("it takes back what it said before")]
    Backwards,
}

/// Listens to one node about one job.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    /// When it was first heard, and how old it said the VM was then, ms.
    first: Option<(Duration, u64)>,
    last: Option<JobStatus>,
    /// Processor time that may still come at once, microseconds.
    cpu_room_us: u64,
}

impl Judge {
    /// Hears an answer to STATUS that came at `now`, on a clock that never jumps.
    pub fn hear(&mut self, deal: &Deal, now: Duration, status: &JobStatus) -> Result<(), Cheat> {
        check_account(deal, status)?;
        check_burn(deal, status)?;
        let &mut (at, age_ms) = self.first.get_or_insert((now, status.age_ms));
        check_age(age_ms, now.saturating_sub(at), status.age_ms)?;
        check_meters(deal, status)?;
        if let Some(last) = &self.last {
            check_order(last, status)?;
        }
        self.check_cpu(deal, status)?;
        self.last = Some(*status);
        Ok(())
    }

    /// The node confirmed this payment: it may not forget it.
    pub fn confirm(&mut self, index: u32) {
        if let Some(last) = &mut self.last {
            last.last_index = last.last_index.max(index);
        }
    }

    /// Between two answers a VM cannot have used more processor time than went by, wherever it was idle before.
    fn check_cpu(&mut self, deal: &Deal, status: &JobStatus) -> Result<(), Cheat> {
        let most_us = |ms: u64| {
            let us = ms.saturating_mul(1000).saturating_mul(deal.vcpus.into());
            us.saturating_add(us / DRIFT)
        };
        let (age_ms, cpu_us) =
            self.last.map_or((status.age_ms, status.cpu_us), |last| (last.age_ms, last.cpu_us));
        let room = match self.last {
            None => most_us(METER_SLACK_MS),
            Some(_) => self.cpu_room_us.saturating_add(most_us(status.age_ms - age_ms)),
        };
        let used = status.cpu_us - cpu_us;
        let left = room.checked_sub(used).ok_or(Cheat::Impossible {
            meter: "processor microseconds at once",
            told: used.into(),
            most: room.into(),
        })?;
        self.cpu_room_us = left.min(most_us(METER_SLACK_MS));
        Ok(())
    }
}

fn check_account(deal: &Deal, status: &JobStatus) -> Result<(), Cheat> {
    let cost_micro = deal.cost_micro(status);
    if status.spent_micro > cost_micro {
        return Err(Cheat::Overcharge { spent_micro: status.spent_micro, cost_micro });
    }
    let paid = u64::from(status.last_index).saturating_mul(deal.value_micro);
    match paid.saturating_sub(status.balance_micro.saturating_add(status.spent_micro)) {
        0 => Ok(()),
        missing => Err(Cheat::Missing(missing)),
    }
}

fn check_burn(deal: &Deal, status: &JobStatus) -> Result<(), Cheat> {
    let (told, most) = (status.burn_micro_per_s, deal.burn_max_micro_per_s());
    if told > most { Err(Cheat::Burn { told, most }) } else { Ok(()) }
}

/// A VM grows no faster than time goes by here.
fn check_age(first_ms: u64, elapsed: Duration, age_ms: u64) -> Result<(), Cheat> {
    let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    let most = [elapsed_ms, elapsed_ms / DRIFT, CLOCK_SLACK_MS];
    let most = most.into_iter().fold(first_ms, u64::saturating_add);
    match age_ms.saturating_sub(most) {
        0 => Ok(()),
        early => Err(Cheat::Hurry(early)),
    }
}

/// All meters since the start fit the VM's shape and age.
fn check_meters(deal: &Deal, status: &JobStatus) -> Result<(), Cheat> {
    let age = u128::from(status.age_ms);
    let disk_mib = u128::from(deal.disk_mib) + u128::from(deal.mem_mib);
    let cpu_ms =
        u128::from(deal.vcpus) * (age + age / u128::from(DRIFT) + u128::from(METER_SLACK_MS));
    let meters = [
        ("processor microseconds", status.cpu_us, cpu_ms * 1000),
        ("MiB-milliseconds of memory", status.mem_mib_ms, u128::from(deal.mem_mib) * age),
        ("MiB-milliseconds of disk", status.disk_mib_ms, disk_mib * age),
        ("bytes sent", status.sent_bytes, u128::from(SENT_MAX_PER_S) * (age + 1000) / 1000),
    ];
    let beyond = meters.into_iter().find(|(_, told, most)| u128::from(*told) > *most);
    beyond.map_or(Ok(()), |(meter, told, most)| {
        Err(Cheat::Impossible { meter, told: told.into(), most })
    })
}

fn check_order(last: &JobStatus, status: &JobStatus) -> Result<(), Cheat> {
    let meters = |status: &JobStatus| {
        let JobStatus { spent_micro, age_ms, cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms, .. } =
            *status;
        [spent_micro, age_ms, cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms, status.last_index.into()]
    };
    let runs_back = meters(last).iter().zip(meters(status)).any(|(last, now)| now < *last);
    if runs_back { Err(Cheat::Backwards) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::tests::{DEAL, honest};

    /// What the judge says to answers that come at so many seconds; `expect` is what it says to the last.
    fn check(answers: &[(u64, JobStatus)], expect: Result<(), Cheat>) {
        let mut judge = Judge::default();
        let (last, before) = answers.split_last().unwrap();
        for (at, status) in before {
            assert_eq!(judge.hear(&DEAL, Duration::from_secs(*at), status), Ok(()));
        }
        assert_eq!(judge.hear(&DEAL, Duration::from_secs(last.0), &last.1), expect);
    }

    fn impossible(meter: &'static str, told: u64, most: u64) -> Result<(), Cheat> {
        Err(Cheat::Impossible { meter, told: told.into(), most: most.into() })
    }

    #[test]
    fn an_honest_node_passes_at_any_load_and_any_pause() {
        let (idle, busy) = (honest(600, 0, 1000), honest(660, 60, 1000));
        check(
            &[(0, honest(1, 0, 30)), (5, honest(6, 5, 30)), (5000, honest(5001, 5000, 9000))],
            Ok(()),
        );
        check(&[(0, idle), (60, busy)], Ok(()));
        // It may charge less than it could, as after a stall of its own.
        check(
            &[(0, JobStatus { spent_micro: idle.spent_micro / 2, balance_micro: 1 << 40, ..idle })],
            Ok(()),
        );
        // A day at full load, by a clock that runs a hundredth faster than the other.
        let day: Vec<_> =
            (0..86_400).step_by(99).map(|at| (at, honest(at, at + at / 100, 100_000))).collect();
        check(&day, Ok(()));
        // An answer that was on its way for nine seconds.
        check(&[(9, honest(1, 0, 30)), (10, honest(11, 9, 30))], Ok(()));
        // A VM that was saved holds disk.
        check(&[(0, JobStatus { disk_mib_ms: 256 * 600_000, ..idle })], Ok(()));
    }

    #[test]
    fn a_charge_is_price_times_meter_and_nothing_gets_lost() {
        let right = honest(100, 50, 200);
        let spent_micro = right.spent_micro + 1;
        let over = JobStatus { spent_micro, balance_micro: right.balance_micro - 1, ..right };
        let cost_micro = right.spent_micro;
        check(&[(0, over)], Err(Cheat::Overcharge { spent_micro, cost_micro }));
        let gone = JobStatus { balance_micro: right.balance_micro - 7, ..right };
        check(&[(0, right), (1, gone)], Err(Cheat::Missing(7)));
    }

    #[test]
    fn burn_is_bounded_by_the_price_list() {
        let most = DEAL.burn_max_micro_per_s();
        let right = honest(100, 50, 200);
        check(&[(0, JobStatus { burn_micro_per_s: most, ..right })], Ok(()));
        let told = most + 1;
        check(
            &[(0, JobStatus { burn_micro_per_s: told, ..right })],
            Err(Cheat::Burn { told, most }),
        );
    }

    #[test]
    fn time_and_use_cannot_run_ahead() {
        let first = honest(100, 0, 200);
        check(&[(0, first), (64, honest(100 + 64 + 1 + 10, 0, 200))], Ok(()));
        check(&[(0, first), (64, honest(100 + 64 + 1 + 11, 0, 200))], Err(Cheat::Hurry(1000)));
        let all = impossible("processor microseconds", 107_000_000, 106_562_000);
        check(&[(0, honest(100, 107, 300))], all);
        // Idle for long is no credit for a burst.
        check(&[(0, first), (1, honest(101, 6, 200))], Ok(()));
        let burst = |told, most| impossible("processor microseconds at once", told, most);
        check(&[(0, first), (1, honest(101, 7, 200))], burst(7_000_000, 6_093_750));
        check(
            &[(0, first), (1, honest(101, 6, 200)), (2, honest(102, 8, 200))],
            burst(2_000_000, 1_109_375),
        );
        let mem = JobStatus { mem_mib_ms: first.mem_mib_ms + 1, ..first };
        check(
            &[(0, mem)],
            impossible("MiB-milliseconds of memory", mem.mem_mib_ms, first.mem_mib_ms),
        );
        let (sent_bytes, most) = (102 * SENT_MAX_PER_S, 101 * SENT_MAX_PER_S);
        check(
            &[(0, JobStatus { sent_bytes, ..first })],
            impossible("bytes sent", sent_bytes, most),
        );
    }

    #[test]
    fn nothing_said_can_be_taken_back() {
        let (old, new) = (honest(100, 50, 200), honest(110, 60, 230));
        check(&[(0, new), (1, old)], Err(Cheat::Backwards));
        check(
            &[(0, new), (1, JobStatus { last_index: 229, balance_micro: 1 << 40, ..new })],
            Err(Cheat::Backwards),
        );
        let mut judge = Judge::default();
        judge.hear(&DEAL, Duration::ZERO, &old).unwrap();
        judge.confirm(230);
        assert_eq!(judge.hear(&DEAL, Duration::from_secs(1), &old), Err(Cheat::Backwards));
    }
}
