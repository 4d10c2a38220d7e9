//! What Onde promises, checked by somebody who believes neither node nor broker: every reply that leaves a node is read
//! here, and every VM's use is reckoned anew from what the world let it use. A broken promise is a panic.

use std::collections::HashMap;

use noded::meter::{Reading, burn_max};
use onde_wire::chain::Value;
use onde_wire::machine::Meter;
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
    /// When the node said how long the balance lasts: time, use so far, what it said.
    announced: Vec<(u64, u64, Meter)>,
    pub certificate: Option<[u8; CERTIFICATE_SIZE]>,
    pub ended: Option<EndReason>,
}

#[derive(Default)]
pub struct Checks {
    pub stories: HashMap<JobId, Story>,
    /// Newest index of each job that the broker ever sold, whether its answer came through or not.
    pub sold: HashMap<JobId, u32>,
    /// Chain values that somebody was sold.
    pub values: HashMap<(JobId, u32), Value>,
}

/// What use costs: price times meter, each part rounded down.
pub fn cost_micro(prices: &Prices, token: &BootToken, age_ms: u64, reading: Reading) -> u64 {
    let part = |used: u64, price: u64, unit: u64| {
        (u128::from(used) * u128::from(price) / u128::from(unit)) as u64
    };
    part(reading.cpu_us, prices.vcpu_s, 1_000_000)
        + part(age_ms * u64::from(token.mem_mib), prices.gib_s, 1_024_000)
        + part(reading.sent_bytes, prices.gib_sent, 1 << 30)
        + part(age_ms * u64::from(token.disk_mib), prices.disk_gib_s, 1_024_000)
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
    pub fn reply(&mut self, life: Life, job: &JobId, reply: &Reply) {
        match reply {
            Reply::Pay(paid) | Reply::Renew(paid) => self.accepted(life, job, paid.last_index),
            Reply::Status(status) => {
                self.accepted(life, job, status.last_index);
                let paid = u64::from(status.last_index) * self.story(job).token.value_micro;
                let told = status.spent_micro + status.balance_micro;
                assert_eq!(told, paid, "a node's books do not balance");
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
        let tick = burn_max(prices, &story.token) * TICK_MIN_MS / 1000 + 4;
        assert!(
            cost_micro <= paid + tick,
            "a VM runs unpaid: {cost_micro} used, {paid} paid, {tick} is a tick"
        );
    }

    /// A node told a guest how it stands.
    pub fn announced(&mut self, now_ms: u64, job: &JobId, cost_micro: u64, meter: &Meter) {
        let announced = &mut self.story(job).announced;
        if announced.len() == ANNOUNCED_MAX {
            announced.remove(ANNOUNCED_MAX / 2);
        }
        announced.push((now_ms, cost_micro, *meter));
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
        for (then_ms, cost_then, meter) in &story.announced {
            let (time_ms, used) = (now_ms - then_ms, story.cost_micro - cost_then);
            let as_announced =
                u128::from(used) * 1000 <= u128::from(meter.burn_micro_per_s) * u128::from(time_ms);
            assert!(
                !as_announced || time_ms + TICK_MAX_MS >= meter.seconds_left.saturating_mul(1000),
                "purged {time_ms} ms after {} s were announced",
                meter.seconds_left
            );
        }
    }
}
