//! The home node: what pays for a running VM, little by little, while it makes progress. `onde run` has one in
//! a thread, a detached job in a process of its own. It calls [`Home::step`] once a second; nothing here waits
//! but for answers. It never spends more than the budget in the job's file, and what it bought is in that file
//! before it goes to the node, so that a crash loses nothing.

use crate::api::{Payment, TokensRequest};
use crate::broker::{Broker, BrokerError, new_key};
use crate::echo::{Echo, Exchange, Policy};
use crate::job::{Job, Jobs, JobsError, Purchase};
use crate::node::{Handle, NodeError};
use onde_wire::chain::STEPS_MAX;
use onde_wire::machine::Stage;
use onde_wire::packet::{JobStatus, Status};
use onde_wire::token::{JobId, PaymentToken};
use std::time::Duration;

/// How often a VM is asked how it stands: several times in the shortest descent from a few tokens to none.
pub const STEP_PERIOD: Duration = Duration::from_secs(1);
/// More is bought when less than this is left, seconds: room for a broker that restarts.
const LOW_S: u64 = 20;
/// What is bought lasts this long at the present rate, seconds.
const BUY_S: u64 = 60;
/// Asking once a second, one lost reply is no silence.
const POLICY: Policy = Policy { tries: 3, first: Duration::from_millis(250) };

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The VM lives and is paid for.
    Fine(JobStatus),
    /// Tokens were bought and handed in.
    Paid(JobStatus, u32),
    /// It needs more and the budget is spent: it will end when its balance is gone.
    AtBudget(JobStatus),
    /// The VM is over.
    Over(JobStatus),
}

impl Standing {
    /// How the VM stands.
    pub fn status(&self) -> &JobStatus {
        let (Standing::Fine(status)
        | Standing::Paid(status, _)
        | Standing::AtBudget(status)
        | Standing::Over(status)) = self;
        status
    }
}

/// Why a step failed. The next one may succeed.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The node.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The job's file.
    #[error(transparent)]
    Jobs(#[from] JobsError),
    /// No randomness for a purchase's key.
    #[error("no randomness: {0}")]
    Randomness(#[from] getrandom::Error),
}

/// Where tokens are bought: a [`Broker`], or one that a simulation reaches by other ways.
pub trait Shop {
    /// See [`Broker::tokens`].
    fn tokens(&self, job: &JobId, request: &TokensRequest) -> Result<Payment, BrokerError>;
}

impl Shop for Broker {
    fn tokens(&self, job: &JobId, request: &TokensRequest) -> Result<Payment, BrokerError> {
        Broker::tokens(self, job, request)
    }
}

/// Pays for one job.
#[derive(Debug)]
pub struct Home<E = Echo, S = Broker> {
    echo: E,
    shop: S,
    jobs: Jobs,
    id: JobId,
    handle: Handle,
}

impl<E: Exchange, S: Shop> Home<E, S> {
    /// The home node of `job`.
    pub fn new(echo: E, shop: S, jobs: Jobs, job: &Job) -> Self {
        Self { echo, shop, jobs, id: job.id.0, handle: job.handle() }
    }

    /// Looks how the VM stands, and buys and pays where it needs it and the budget allows.
    pub fn step(&mut self) -> Result<Standing, HomeError> {
        let status = self.handle.status(&mut self.echo, POLICY)?;
        if !status.stage.is_alive() && status.stage != Stage::Suspended {
            return Ok(Standing::Over(status));
        }
        let job = self.jobs.update(&self.id, |job| {
            job.payments.retain(|payment| payment.index > status.last_index);
        })?;
        if job.purchase.is_some() || !job.payments.is_empty() {
            return self.finish(status);
        }
        match due(&status, &job) {
            None => Ok(Standing::Fine(status)),
            Some(0) => Ok(Standing::AtBudget(status)),
            Some(count) => self.buy(status, count),
        }
    }

    /// Buys `count` tokens and hands them in, whatever the balance; they count towards no budget.
    pub fn pay(&mut self, count: u32) -> Result<Standing, HomeError> {
        let status = self.handle.status(&mut self.echo, Policy::default())?;
        self.buy(status, count)
    }

    fn buy(&mut self, status: JobStatus, count: u32) -> Result<Standing, HomeError> {
        let purchase = Purchase { key: new_key()?, count };
        self.jobs.update(&self.id, |job| job.purchase = Some(purchase))?;
        self.finish(status)
    }

    /// Does what is left of a purchase: from the broker to the file, from the file to the node.
    fn finish(&mut self, mut status: JobStatus) -> Result<Standing, HomeError> {
        let mut job = self.jobs.update(&self.id, |_| {})?;
        let bought = job.purchase.as_ref().map_or(0, |purchase| purchase.count);
        if let Some(Purchase { key, count }) = job.purchase {
            let request = TokensRequest { idempotency_key: key, count };
            let payment = self.shop.tokens(&self.id, &request);
            let payment = payment.inspect_err(|error| self.forget_refused(error))?;
            job = self.jobs.update(&self.id, |job| {
                job.purchase = None;
                job.sold = job.sold.max(payment.index);
                job.payments.push(payment);
            })?;
        }
        for payment in &job.payments {
            let token = PaymentToken { index: payment.index, value: payment.value.0 };
            match self.handle.pay(&mut self.echo, token) {
                Ok(paid) => status.balance_micro = paid.balance_micro,
                // Already counted: a later token was faster.
                Err(error) if error.refusal() == Some(Status::BadPayment) => {}
                Err(error) => return Err(error.into()),
            }
            let index = payment.index;
            self.jobs
                .update(&self.id, |job| job.payments.retain(|payment| payment.index > index))?;
        }
        Ok(Standing::Paid(status, bought))
    }

    /// A purchase that the broker refused is none.
    fn forget_refused(&self, error: &BrokerError) {
        if error.word().is_some() {
            // The error that is being returned says more than this one would.
            let _ = self.jobs.update(&self.id, |job| job.purchase = None);
        }
    }
}

/// How many tokens the VM is due: `None` while it has enough, 0 where the budget does not allow any.
fn due(status: &JobStatus, job: &Job) -> Option<u32> {
    if status.seconds_left >= LOW_S && status.stage != Stage::Low {
        return None;
    }
    let micro = status.burn_micro_per_s.saturating_mul(BUY_S);
    let wanted = u32::try_from(micro.div_ceil(job.value_micro.max(1))).unwrap_or(STEPS_MAX);
    Some(wanted.clamp(1, STEPS_MAX).min(job.budget.saturating_sub(job.sold)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Hex;
    use onde_wire::packet::EndReason;
    use std::net::Ipv4Addr;

    fn check(seconds_left: u64, burn_micro_per_s: u64, sold: u32, expect: Option<u32>) {
        let status = JobStatus {
            stage: Stage::Running,
            end: EndReason::None,
            last_index: sold,
            balance_micro: 0,
            spent_micro: 0,
            burn_micro_per_s,
            seconds_left,
            age_ms: 0,
            cpu_us: 0,
            mem_mib_ms: 0,
            sent_bytes: 0,
            disk_mib_ms: 0,
        };
        let job = Job {
            id: Hex([0; 16]),
            key: Hex([0; 32]),
            name: None,
            title: String::new(),
            context: String::new(),
            node: 1,
            node_ipv4: Ipv4Addr::LOCALHOST,
            guest_ipv4: Ipv4Addr::LOCALHOST,
            mem_mib: 64,
            vcpus: 1,
            value_micro: 1_000_000,
            sold,
            budget: 100,
            opened_at: 0,
            has_agent: true,
            exit: None,
            purchase: None,
            payments: Vec::new(),
            settled: None,
        };
        assert_eq!(due(&status, &job), expect);
    }

    #[test]
    fn buys_a_minute_when_little_is_left_and_never_beyond_the_budget() {
        check(LOW_S, 850_000, 10, None);
        check(LOW_S - 1, 850_000, 10, Some(51));
        check(LOW_S - 1, 850_000, 60, Some(40));
        check(0, 850_000, 100, Some(0));
        check(0, 850_000, 200, Some(0));
        check(5, 0, 10, Some(1));
        check(5, u64::MAX, 10, Some(90));
    }
}
