//! What Onde promises, checked by somebody who believes neither node nor broker: every reply that leaves a node is read
//! here, and every VM's use is reckoned anew from what the world let it use. A broken promise is a panic.

use std::collections::HashMap;

use noded::meter::{Held, burn_held, burn_max};
use onde_wire::chain::Value;
use onde_wire::machine::{Meter, Stage};
use onde_wire::packet::{EndReason, Prices, Reply};
use onde_wire::token::{BootToken, CERTIFICATE_SIZE, Certificate, JobId};

/// Shortest time between two looks at a VM: what it may run unpaid at the very end.
const TICK_MIN_MS: u64 = 10;
/// Longest time between two looks: what a node tells may be as old.
const TICK_MAX_MS: u64 = 1000;
/// Announcements kept of each VM.
const ANNOUNCED_MAX: usize = 16;

/// A node's life: its number and how often it booted.
pub type Life = (u32, u64);

/// What a job's VM was, as seen from outside.
pub struct Story {
    pub life: Life,
    pub token: BootToken,
    /// Most tokens that the node said it accepted.
    pub accepted: u32,
    /// What its use cost when the node last looked.
    pub cost_micro: u64,
    /// When the node said how long the balance lasts.
    announced: Vec<Announced>,
    /// When it came to disk, if it is there, and what it cost by then.
    slept: Option<(u64, u64)>,
    pub certificate: Option<[u8; CERTIFICATE_SIZE]>,
    pub ended: Option<EndReason>,
}

/// What a node said of the time that is left, and at what cost so far.
struct Announced {
    at_ms: u64,
    cost_micro: u64,
    burn_micro_per_s: u64,
    seconds_left: u64,
    purge_s: u64,
}

#[derive(Default)]
pub struct Checks {
    pub stories: HashMap<JobId, Story>,
    /// Newest index of each job that the broker ever sold, whether its answer came through or not.
    pub sold: HashMap<JobId, u32>,
    /// Chain values that somebody was sold.
    pub values: HashMap<(JobId, u32), Value>,
    /// How often things happened that are rare, for those who ask whether they did.
    pub sleeps: u32,
    pub purged_from_disk: u32,
    pub renewed: u32,
}

impl Checks {
    /// The broker sold tokens up to `index`.
    pub fn sold(&mut self, job: JobId, index: u32, value: Option<Value>) {
        let newest = self.sold.entry(job).or_default();
        *newest = index.max(*newest);
        if let Some(value) = value {
            let known = self.values.entry((job, index)).or_insert(value);
            assert_eq!(*known, value, "two tokens of one index");
        }
    }

    /// A node makes a VM for this token.
    pub fn started(&mut self, life: Life, token: &BootToken) {
        let sold = self.sold.get(&token.job).copied();
        assert!(sold.is_some_and(|sold| token.first_count <= sold), "a VM that nobody bought");
        let story = Story {
            life,
            token: *token,
            accepted: token.first_count,
            cost_micro: 0,
            announced: Vec::new(),
            slept: None,
            certificate: None,
            ended: None,
        };
        let before = self.stories.insert(token.job, story);
        assert!(before.is_none(), "a boot token was counted twice");
    }

    pub fn story(&mut self, job: &JobId) -> &mut Story {
        self.stories.get_mut(job).expect("a job that was started")
    }

    /// A node accepted tokens up to `index`.
    fn accepted(&mut self, life: Life, job: &JobId, index: u32) {
        let sold = self.sold[job];
        assert!(index <= sold, "token {index} was accepted, and {sold} were sold");
        let story = self.story(job);
        assert_eq!(story.life, life, "a token was counted in two lives");
        assert!(index >= story.accepted, "a payment was forgotten");
        if index > story.accepted {
            assert!(story.certificate.is_none(), "paid after the certificate");
            story.announced.clear();
        }
        story.accepted = index;
    }

    /// The VM's guest was told that its payment was accepted.
    pub fn guest_paid(&mut self, life: Life, job: &JobId, index: u32) {
        let index = index.max(self.story(job).accepted);
        self.accepted(life, job, index);
    }

    /// A reply leaves a node.
    pub fn reply(&mut self, now_ms: u64, life: Life, job: &JobId, reply: &Reply) {
        match reply {
            Reply::Pay(paid) => self.accepted(life, job, paid.last_index),
            Reply::Renew(paid) => {
                self.renewed += 1;
                self.accepted(life, job, paid.last_index);
            }
            Reply::Status(status) | Reply::Suspend(status) | Reply::Wake(status) => {
                self.accepted(life, job, status.last_index);
                let paid = u64::from(status.last_index) * self.story(job).token.value_micro;
                let told = status.spent_micro + status.balance_micro;
                assert_eq!(told, paid, "a node's books do not balance");
                if status.stage == Stage::Suspended {
                    self.announce(
                        job,
                        Announced {
                            at_ms: now_ms,
                            cost_micro: status.spent_micro,
                            burn_micro_per_s: status.burn_micro_per_s,
                            seconds_left: status.seconds_left,
                            purge_s: status.purge_s,
                        },
                    );
                }
            }
            Reply::Stop(bytes) => self.certified(life, job, bytes),
            _ => {}
        }
    }

    fn certified(&mut self, life: Life, job: &JobId, bytes: &[u8; CERTIFICATE_SIZE]) {
        let certificate = Certificate::claim(bytes).expect("a certificate");
        let story = self.story(job);
        assert_eq!((story.life, &certificate.job), (life, job));
        assert_eq!(certificate.last_index, story.accepted, "certified another count");
        let paid = u64::from(story.accepted) * story.token.value_micro;
        assert_eq!(certificate.spent_micro + certificate.unused_micro, paid, "change was lost");
        assert_eq!(certificate.spent_micro, story.cost_micro.min(paid), "not price times meter");
        let first = story.certificate.get_or_insert(*bytes);
        assert_eq!(first, bytes, "two certificates for one job");
    }

    /// A VM that runs at this moment has paid for all it used but the last tick.
    pub fn runs(&mut self, prices: &Prices, job: &JobId, cost_micro: u64) {
        let story = self.story(job);
        let paid = u64::from(story.accepted) * story.token.value_micro;
        let tick = tick_micro(burn_max(prices, &story.token), TICK_MIN_MS);
        assert!(
            cost_micro <= paid + tick,
            "a VM runs unpaid: {cost_micro} used, {paid} paid, {tick} is a tick"
        );
    }

    /// A machine that is on disk has paid for its place there, but for the last looks of its node.
    pub fn is_kept(&mut self, prices: &Prices, job: &JobId, cost_micro: u64) {
        let story = self.story(job);
        let paid = u64::from(story.accepted) * story.token.value_micro;
        // Its last tick as a VM that ran, and one on disk, which is longer.
        let disk = burn_held(prices, Held { mem_mib: 0, disk_mib: story.token.mem_mib });
        let tick =
            tick_micro(burn_max(prices, &story.token), TICK_MIN_MS) + tick_micro(disk, TICK_MAX_MS);
        assert!(cost_micro <= paid + tick, "on disk unpaid: {cost_micro} used, {paid} paid");
        story.cost_micro = cost_micro;
    }

    /// A node told a guest how it stands.
    pub fn announced(&mut self, now_ms: u64, job: &JobId, cost_micro: u64, meter: &Meter) {
        let &Meter { burn_micro_per_s, seconds_left, purge_s, .. } = meter;
        let at_ms = now_ms;
        self.announce(
            job,
            Announced { at_ms, cost_micro, burn_micro_per_s, seconds_left, purge_s },
        );
    }

    fn announce(&mut self, job: &JobId, told: Announced) {
        let announced = &mut self.story(job).announced;
        if announced.len() == ANNOUNCED_MAX {
            announced.remove(ANNOUNCED_MAX / 2);
        }
        announced.push(told);
    }

    /// A VM is on disk now.
    pub fn slept(&mut self, now_ms: u64, job: &JobId, cost_micro: u64) {
        self.story(job).slept = Some((now_ms, cost_micro));
        self.sleeps += 1;
    }

    /// A VM goes on that was on disk, or should have been: what was said before holds no more.
    pub fn woke(&mut self, job: &JobId) {
        let story = self.story(job);
        story.announced.clear();
        story.slept = None;
    }

    /// A VM is gone, for this reason, at this cost.
    pub fn ended(&mut self, now_ms: u64, job: &JobId, reason: EndReason, spent_micro: u64) {
        let story = self.story(job);
        assert!(story.ended.is_none(), "a VM ended twice");
        story.ended = Some(reason);
        let paid = u64::from(story.accepted) * story.token.value_micro;
        assert_eq!(spent_micro, story.cost_micro.min(paid), "charged something else than the use");
        if reason != EndReason::OutOfTokens {
            return;
        }
        assert_eq!(spent_micro, paid, "purged with a balance");
        let (slept, cost_micro) = (story.slept, story.cost_micro);
        story.announced.iter().for_each(|told| told.check(now_ms, slept, cost_micro));
        self.purged_from_disk += u32::from(slept.is_some());
    }
}

/// What is used between two looks at the end of a balance; each of the four prices is rounded.
fn tick_micro(rate_micro_per_s: u64, time_ms: u64) -> u64 {
    rate_micro_per_s * time_ms / 1000 + 4
}

impl Announced {
    /// Whether its VM kept to the rate that was told until this time.
    fn is_as_told(&self, until_ms: u64, cost_micro: u64) -> bool {
        // What a node forgave after it stood still may be less than before.
        let (time_ms, used) = (until_ms - self.at_ms, cost_micro.saturating_sub(self.cost_micro));
        u128::from(used) * 1000 <= u128::from(self.burn_micro_per_s) * u128::from(time_ms)
    }

    /// A VM was purged now that went to disk at a time and cost, if it did.
    fn check(&self, now_ms: u64, slept: Option<(u64, u64)>, cost_micro: u64) {
        let (time_ms, late_ms) = (now_ms - self.at_ms, TICK_MAX_MS);
        let told_s = match slept {
            // It was on disk already: a promise, whatever it does.
            Some((slept_ms, _)) if slept_ms < self.at_ms => self.purge_s,
            Some((slept_ms, cost)) if self.is_as_told(slept_ms, cost) => self.purge_s,
            Some((slept_ms, _)) => {
                let (disk_ms, told_s) = (now_ms - slept_ms, self.purge_s - self.seconds_left);
                assert!(disk_ms + late_ms >= told_s * 1000, "{disk_ms} ms on disk, not {told_s} s");
                return;
            }
            None if self.is_as_told(now_ms, cost_micro) => self.seconds_left,
            None => return,
        };
        let told_ms = told_s.saturating_mul(1000);
        assert!(
            time_ms + late_ms >= told_ms,
            "purged {time_ms} ms after {told_s} s were announced"
        );
    }
}
