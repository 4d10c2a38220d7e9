//! One job: what it was sold, what it paid, what it used, where it stands. Pure state: [`crate::node`] calls it.
//! Never looks at a clock or at the kernel.
//!
//! ```text
//!           Resumed            end(reason)                 gone
//!  Booting ---------> Running -------------> (ending) -------------> Ended | Stopped | Purged
//!     |                                         ^
//!     +------------- end(reason) ---------------+
//! ```
//! While ending the stage stays what it was, nothing is charged any more, and payments are refused.

use onde_wire::chain::{self, STEPS_MAX};
use onde_wire::machine::{Meter, Stage};
use onde_wire::packet::{EndReason, JobStatus, Prices, Status};
use onde_wire::token::{BootToken, Certificate, Incarnation, NodeId, PaymentToken};

use crate::meter::{Meters, Reading, burn_held, burn_max};

/// Longest time between two charges. The guest's meter is as old at most.
pub const TICK_MAX_MS: u64 = 1000;
/// Shortest time between two charges: what a VM can run unpaid at the very end of its balance.
/// Shorter, and a VM that idles towards zero would keep the node busy with looking.
pub const TICK_MIN_MS: u64 = 10;
/// Time for mstrap, the loader and the stream. Longer, and an abandoned upload holds memory
/// that others would pay for; shorter, and a large VM cannot come in over a slow line.
pub const BOOT_MAX_MS: u64 = 90_000;
/// After a payment that cost hashes and led nowhere, the job's next one is refused unseen for so long: bounds
/// the work that a guest can cause through its control device to a few hundredths of a processor.
const PAY_PAUSE_MS: u64 = 50;

/// A job's record.
#[derive(Clone, Debug)]
pub struct Job {
    token: BootToken,
    slot: u32,
    stage: Stage,
    end: EndReason,
    /// The newest chain value accepted.
    value: chain::Value,
    last_index: u32,
    pay_from_ms: u64,
    meters: Meters,
    spent_micro: u64,
    started_ms: u64,
    ended_ms: u64,
    due_ms: u64,
    burn: Burn,
    has_resumed: bool,
}

/// The burn rate: measured over whole seconds, because a tick near the end of a balance is too short for it.
#[derive(Clone, Copy, Debug)]
struct Burn {
    micro_per_s: u64,
    from_ms: u64,
    from_cost_micro: u64,
}

impl Job {
    /// A job that was just admitted into `slot`. `token` went through [`crate::admission`].
    pub fn new(token: BootToken, slot: u32, now_ms: u64, prices: &Prices) -> Self {
        let burn = burn_held(prices, &token);
        let mut job = Self {
            slot,
            stage: Stage::Booting,
            end: EndReason::None,
            value: token.anchor,
            last_index: token.first_count,
            pay_from_ms: 0,
            meters: Meters::default(),
            spent_micro: 0,
            started_ms: now_ms,
            ended_ms: 0,
            due_ms: 0,
            burn: Burn { micro_per_s: burn, from_ms: now_ms, from_cost_micro: 0 },
            has_resumed: false,
            token,
        };
        job.due_ms = now_ms + job.tick_ms(prices);
        job
    }

    /// What it was sold.
    pub fn token(&self) -> &BootToken {
        &self.token
    }

    /// Where its VM lives or lived.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether its VM runs and shall go on.
    pub fn is_going(&self) -> bool {
        self.end == EndReason::None
    }

    /// Whether its VM is still there, even if only to be taken down.
    pub fn is_there(&self) -> bool {
        self.stage.is_alive()
    }

    /// When it has to be looked at next: to charge it, or because its time for the bootstrap is over.
    pub fn due_ms(&self) -> u64 {
        match self.stage {
            Stage::Booting => self.due_ms.min(self.started_ms + BOOT_MAX_MS),
            _ => self.due_ms,
        }
    }

    /// When its VM was told to end; 0 before.
    pub fn ended_ms(&self) -> u64 {
        self.ended_ms
    }

    fn paid_micro(&self) -> u64 {
        // Admission keeps the value below 2^32, so the product fits.
        u64::from(self.last_index) * self.token.value_micro
    }

    /// Micro-tokens left.
    pub fn balance_micro(&self) -> u64 {
        self.paid_micro() - self.spent_micro
    }

    /// Number of payment tokens accepted.
    pub fn last_index(&self) -> u32 {
        self.last_index
    }

    /// RESUME is all but done: whether the guest may run. Once it was allowed it counts as a life, even if the VM
    /// is gone before its first instruction.
    pub fn resume(&mut self) -> bool {
        if self.is_going() {
            self.has_resumed = true;
            if self.stage == Stage::Booting {
                self.stage = Stage::Running;
            }
        }
        self.is_going()
    }

    /// Whether its guest ever was allowed to run.
    pub fn has_resumed(&self) -> bool {
        self.has_resumed
    }

    /// Whether the time for the bootstrap is over.
    pub fn is_late(&self, now_ms: u64) -> bool {
        self.stage == Stage::Booting && now_ms >= self.started_ms + BOOT_MAX_MS
    }

    /// Charges all that was used up to now and sets the time of the next charge. Whether the balance is gone.
    pub fn charge(&mut self, now_ms: u64, reading: Reading, prices: &Prices) -> bool {
        self.meters.advance(&self.token, now_ms - self.started_ms, reading);
        let cost = self.meters.cost_micro(prices);
        self.spent_micro = cost.min(self.paid_micro());
        self.burn.update(now_ms, cost);
        self.due_ms = now_ms + self.tick_ms(prices);
        self.balance_micro() == 0 && burn_max(prices, &self.token) > 0
    }

    /// Time until the next charge: no longer than the balance lasts if the VM uses all it can.
    fn tick_ms(&self, prices: &Prices) -> u64 {
        let burn = u128::from(burn_max(prices, &self.token)).max(1);
        let lasts_ms = u128::from(self.balance_micro()) * 1000 / burn;
        (lasts_ms.min(TICK_MAX_MS.into()) as u64).max(TICK_MIN_MS)
    }

    /// Takes a payment. The same token again is accepted again and changes nothing.
    pub fn pay(&mut self, now_ms: u64, token: &PaymentToken) -> Result<(), Status> {
        if !self.is_going() {
            return Err(Status::Ended);
        }
        if token.index == self.last_index && token.value == self.value {
            return Ok(());
        }
        if now_ms < self.pay_from_ms {
            return Err(Status::BadPayment);
        }
        if token.index.abs_diff(self.last_index) > STEPS_MAX {
            return Err(Status::TooManySteps);
        }
        let newer = token.index > self.last_index;
        let steps = token.index.abs_diff(self.last_index);
        let (last, value) =
            if newer { (&self.value, &token.value) } else { (&token.value, &self.value) };
        let fits = chain::verify(last, value, steps);
        if fits && newer {
            (self.last_index, self.value) = (token.index, token.value);
        } else {
            self.pay_from_ms = now_ms + PAY_PAUSE_MS;
        }
        if fits { Ok(()) } else { Err(Status::BadPayment) }
    }

    /// The VM has to go. The first reason stands.
    pub fn end(&mut self, now_ms: u64, reason: EndReason) {
        if self.is_going() {
            (self.end, self.ended_ms) = (reason, now_ms);
        }
    }

    /// The VM is gone, and all it held.
    pub fn gone(&mut self, now_ms: u64) {
        // Nobody asked it to go: the VMM broke down.
        self.end(now_ms, EndReason::Fault);
        self.stage = match self.end {
            EndReason::Stopped => Stage::Stopped,
            EndReason::OutOfTokens => Stage::Purged,
            _ => Stage::Ended,
        };
        self.burn.micro_per_s = 0;
    }

    /// The meter for the guest.
    pub fn meter(&self) -> Meter {
        let burn = self.burn.micro_per_s;
        Meter {
            stage: self.stage,
            balance_micro: self.balance_micro(),
            burn_micro_per_s: burn,
            seconds_left: self.balance_micro().checked_div(burn).unwrap_or(u64::MAX),
        }
    }

    /// The meter for the customer.
    pub fn status(&self, now_ms: u64) -> JobStatus {
        let meter = self.meter();
        let until_ms = if self.is_going() { now_ms } else { self.ended_ms };
        JobStatus {
            stage: self.stage,
            end: self.end,
            last_index: self.last_index,
            balance_micro: meter.balance_micro,
            spent_micro: self.spent_micro,
            burn_micro_per_s: meter.burn_micro_per_s,
            seconds_left: meter.seconds_left,
            age_ms: until_ms - self.started_ms,
            cpu_us: self.meters.cpu_us,
            mem_mib_ms: self.meters.mem_mib_ms,
            sent_bytes: self.meters.sent_bytes,
            disk_mib_ms: self.meters.disk_mib_ms,
            has_resumed: self.has_resumed,
        }
    }

    /// The statement that the broker redeems; final once the VM is gone.
    pub fn certificate(&self, node: NodeId, incarnation: Incarnation) -> Certificate {
        Certificate {
            job: self.token.job,
            node,
            incarnation,
            last_index: self.last_index,
            spent_micro: self.spent_micro,
            unused_micro: self.balance_micro(),
        }
    }
}

impl Burn {
    fn update(&mut self, now_ms: u64, cost_micro: u64) {
        let time_ms = now_ms - self.from_ms;
        if time_ms >= TICK_MAX_MS {
            let cost = u128::from(cost_micro - self.from_cost_micro);
            let rate = cost * 1000 / u128::from(time_ms);
            *self = Self {
                micro_per_s: rate.try_into().unwrap_or(u64::MAX),
                from_ms: now_ms,
                from_cost_micro: cost_micro,
            };
        }
    }
}
