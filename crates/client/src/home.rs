//! The home node: what pays for a running VM, little by little, while it makes progress. `onde wallet serve` has one for
//! each job that was left to it, `onde run` one in a thread. It calls [`Home::step`] once a second; nothing here waits
//! but for answers. What it does next follows from the job's file and the node's answer alone, and the file says so
//! before money moves, so that a crash between any two lines loses nothing and pays nothing twice.
//!
//! ```text
//!  broker --- lots of a minute ---> job's file --- releases of seconds ---> node
//! ```
//! Tokens that were bought and not released cost nothing: the broker gives them back. A token of a chain gives all before
//! it, so a release needs no broker.

pub mod judge;
pub mod release;

use crate::api::{self, Payment, Prices, Renewal, TokensRequest};
use crate::broker::{Broker, BrokerError, new_key};
use crate::echo::{Echo, Exchange, Policy};
use crate::job::{Job, Jobs, JobsError, Purchase};
use crate::node::NodeError;
use judge::{Deal, Judge};
use onde_wire::chain;
use onde_wire::machine::Stage;
use onde_wire::packet::JobStatus;
use onde_wire::session::Purse;
use onde_wire::token::{self, JobId, PaymentToken};
use release::Act;
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// How often a VM is asked how it stands: several times in the time that a release lasts.
pub const STEP_PERIOD: Duration = Duration::from_secs(1);
/// Asking once a second, one lost reply is no silence.
const POLICY: Policy = Policy { tries: 3, first: Duration::from_millis(250) };
/// Acts of one step: finish a purchase, buy, show.
const ACTS_MAX: usize = 3;

/// How a step went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The VM lives and is paid for.
    Fine(JobStatus),
    /// Tokens were released to the node; so many of the job are now.
    Paid(JobStatus, u32),
    /// It needs more and the budget is spent: it will end when its balance is gone.
    AtBudget(JobStatus),
    /// It makes no progress, so it gets nothing.
    Withheld(JobStatus),
    /// The node cheats, so it gets nothing more; why.
    Distrusted(JobStatus, String),
    /// The VM is over.
    Over(JobStatus),
    /// The job's file says that it was settled.
    Settled,
}

impl Standing {
    /// How the VM stands, where the node was asked.
    pub fn status(&self) -> Option<&JobStatus> {
        match self {
            Standing::Fine(status)
            | Standing::Paid(status, _)
            | Standing::AtBudget(status)
            | Standing::Withheld(status)
            | Standing::Distrusted(status, _)
            | Standing::Over(status) => Some(status),
            Standing::Settled => None,
        }
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
    /// The broker does not know the job's node, so what it may charge is unknown.
    #[error("the broker knows no prices of node {0}")]
    NoPrices(u32),
    /// The job's file lacks a token that the node was promised.
    #[error("token {0} is not in the job's file")]
    NoToken(u32),
}

/// Where tokens are bought: a [`Broker`], or one that a simulation reaches by other ways.
pub trait Shop {
    /// See [`Broker::tokens`].
    fn tokens(&self, job: &JobId, request: &TokensRequest) -> Result<Payment, BrokerError>;

    /// A node's price list; `None` where the broker does not know the node.
    fn prices(&self, node: u32) -> Result<Option<Prices>, BrokerError>;
}

impl Shop for Broker {
    fn tokens(&self, job: &JobId, request: &TokensRequest) -> Result<Payment, BrokerError> {
        Broker::tokens(self, job, request)
    }

    fn prices(&self, node: u32) -> Result<Option<Prices>, BrokerError> {
        Ok(self.node(node)?.map(|node| node.prices))
    }
}

/// Time since this machine booted, its sleep included: a laptop that was closed for an hour must not take its nodes'
/// clocks for fast. `Instant` stands still meanwhile.
fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Pays for one job.
#[derive(Debug)]
pub struct Home<E = Echo, S = Broker> {
    echo: E,
    shop: S,
    jobs: Jobs,
    id: JobId,
    /// On [`uptime`].
    born: Duration,
    /// Of the node that the job was on when it was heard last.
    judge: (u32, Judge),
}

impl<E: Exchange, S: Shop> Home<E, S> {
    /// The home node of `job`.
    pub fn new(echo: E, shop: S, jobs: Jobs, job: &Job) -> Self {
        let judge = (job.node, Judge::default());
        Self { echo, shop, jobs, id: job.id.0, born: uptime(), judge }
    }

    /// The job that is paid for, as its file has it: another one after the VM moved.
    pub fn job(&self) -> Result<Job, JobsError> {
        self.jobs.get(&self.id)
    }

    /// Where it buys.
    pub fn shop(&self) -> &S {
        &self.shop
    }

    /// Notes what the broker says of a settled job: this one, or the one that has a part of its budget.
    pub fn note(&mut self, told: &api::Job) -> Result<(), HomeError> {
        self.jobs.update(&told.id.0, |job| job.settle(told))?;
        Ok(())
    }

    /// Looks how the VM stands, and buys and releases where it needs it, `has_progress`, and node and budget allow.
    pub fn step(&mut self, has_progress: bool) -> Result<Standing, HomeError> {
        self.step_at(uptime().saturating_sub(self.born), has_progress)
    }

    /// The same at `now`, on a clock that begins anywhere and never jumps.
    pub fn step_at(&mut self, now: Duration, has_progress: bool) -> Result<Standing, HomeError> {
        self.follow()?;
        let turn = self.jobs.turn(&self.id)?;
        let mut job = self.jobs.get(&self.id)?;
        if job.settled.is_some() {
            return Ok(Standing::Settled);
        }
        if job.lent.is_some() || job.inherits {
            job = self.jobs.reckon(&self.id)?;
        }
        let status = job.handle().status(&mut self.echo, POLICY)?;
        // The old VM ends when the new one lives.
        if !status.stage.is_alive() && self.follow()? {
            drop(turn);
            return self.step_at(now, has_progress);
        }
        if !status.stage.is_alive() && status.stage != Stage::Suspended {
            return Ok(Standing::Over(status));
        }
        if let Some(why) = job.distrust {
            return Ok(Standing::Distrusted(status, why));
        }
        let deal = self.deal(&mut job)?;
        if self.judge.0 != job.node {
            self.judge = (job.node, Judge::default());
        }
        if let Err(cheat) = self.judge.1.hear(&deal, now, &status) {
            let why = cheat.to_string();
            self.jobs.update(&self.id, |job| job.distrust = Some(why.clone()))?;
            return Ok(Standing::Distrusted(status, why));
        }
        if !has_progress {
            return Ok(Standing::Withheld(status));
        }
        self.act(&deal, status)
    }

    /// Where the VM has moved, its new job is paid for from now on. Whether it has.
    fn follow(&mut self) -> Result<bool, HomeError> {
        let current = self.jobs.current(&self.id)?;
        let has_moved = std::mem::replace(&mut self.id, current.id.0) != current.id.0;
        if has_moved {
            self.judge = (current.node, Judge::default());
        }
        Ok(has_moved)
    }

    fn act(&mut self, deal: &Deal, mut status: JobStatus) -> Result<Standing, HomeError> {
        for _ in 0..ACTS_MAX {
            // Without the broker, what is at hand still goes to the node.
            let finished = self.finish_purchase();
            match release::next(deal, &status, &self.jobs.get(&self.id)?) {
                Act::Hold => return Ok(Standing::Fine(status)),
                Act::AtBudget => return finished.map(|_| Standing::AtBudget(status)),
                Act::Buy(count) => {
                    finished?;
                    self.order(count)?;
                }
                Act::Show(index) => {
                    self.show(index, &mut status)?;
                    return Ok(Standing::Paid(status, index));
                }
            }
        }
        Ok(Standing::Fine(status))
    }

    /// Buys `count` tokens and releases them all, whatever the balance; they count towards no budget.
    pub fn pay(&mut self, count: u32) -> Result<JobStatus, HomeError> {
        let _turn = self.jobs.turn(&self.id)?;
        let mut job = self.finish_purchase()?;
        let mut status = job.handle().status(&mut self.echo, POLICY)?;
        if status.last_index < job.released {
            self.show(job.released, &mut status)?;
        }
        let wanted = job.sold.saturating_add(count);
        // At a chain's end fewer are sold than were asked for, but one at least.
        while job.sold < wanted {
            self.order(wanted - job.sold)?;
            job = self.finish_purchase()?;
        }
        // What is paid by hand is on top of what the home node may spend.
        job = self.jobs.update(&self.id, |job| job.budget = job.budget.saturating_add(count))?;
        let index = status.last_index.saturating_add(count).min(job.bought());
        for _ in 0..=job.renewals.len() {
            self.show(index, &mut status)?;
        }
        Ok(status)
    }

    /// Tokens for the guest's purse, where it lacks some: beyond what the node has, and within the budget. Who has delivered
    /// them calls [`Home::purse_given`]; to deliver them twice changes nothing.
    pub fn purse(&mut self, status: &JobStatus) -> Result<Option<(Job, Purse)>, HomeError> {
        let _turn = self.jobs.turn(&self.id)?;
        let mut job = self.jobs.get(&self.id)?;
        let shown = status.last_index.max(job.released);
        let is_full = job.purse_last > shown.saturating_add(job.purse / 2);
        if job.purse == 0 || job.distrust.is_some() || is_full {
            return Ok(None);
        }
        let wanted = shown.saturating_add(job.purse).min(job.budget);
        let missing = wanted.saturating_sub(job.bought()).min(job.budget.saturating_sub(job.sold));
        if job.purchase.is_none() && missing > 0 {
            self.order(missing.min(chain::STEPS_MAX))?;
        }
        job = self.finish_purchase()?;
        // The guest cannot go on with another chain.
        let end = job.renewal_at(shown).map(|renewal| renewal.index).or(job.chain_end(shown));
        let last = wanted.min(job.bought()).min(end.unwrap_or(u32::MAX));
        let Some(deal) = job.deal().filter(|_| last > shown.max(job.purse_last)) else {
            return Ok(None);
        };
        let token = token(&job, last).ok_or(HomeError::NoToken(last))?;
        Ok(Some((job, Purse { shown, last, lot: release::lot(&deal), value: token.value })))
    }

    /// The guest has its purse.
    pub fn purse_given(&mut self, last: u32) -> Result<(), HomeError> {
        self.jobs.update(&self.id, |job| job.purse_last = last)?;
        Ok(())
    }

    /// What was bought; a job from before price lists were kept gets its node's present one.
    fn deal(&mut self, job: &mut Job) -> Result<Deal, HomeError> {
        if job.prices.is_none()
            && let Some(prices) = self.shop.prices(job.node)?
        {
            *job = self.jobs.update(&self.id, |job| job.prices = Some(prices))?;
        }
        job.deal().ok_or(HomeError::NoPrices(job.node))
    }

    /// Notes a purchase: the next thing to do is [`Home::finish_purchase`], in this life or the next.
    fn order(&mut self, count: u32) -> Result<(), HomeError> {
        let purchase = Purchase { key: new_key()?, count };
        self.jobs.update(&self.id, |job| job.purchase = Some(purchase))?;
        Ok(())
    }

    /// Does what is left of a purchase, if there is one: from the broker to the file. The job as it is then.
    fn finish_purchase(&mut self) -> Result<Job, HomeError> {
        let job = self.jobs.get(&self.id)?;
        let Some(Purchase { key, count }) = job.purchase else { return Ok(job) };
        let request = TokensRequest { idempotency_key: key, count };
        let payment = self.shop.tokens(&self.id, &request);
        let payment = payment.inspect_err(|error| self.forget_refused(error))?;
        Ok(self.jobs.update(&self.id, |job| {
            job.purchase = None;
            job.sold = job.sold.max(payment.index);
            job.renewals.extend(payment.renewal);
            job.payments.push(payment);
        })?)
    }

    /// Releases all tokens up to `index` to the node, or to the end of the chain that the node is at: then the next is due.
    /// The file knows first: what the node might have seen is never taken for unreleased.
    fn show(&mut self, index: u32, status: &mut JobStatus) -> Result<(), HomeError> {
        let end = self.jobs.get(&self.id)?.chain_end(status.last_index);
        let index = end.map_or(index, |end| index.min(end));
        let (id, last) = (self.id, status.last_index);
        let job = self.jobs.update(&id, |job| job.release(index))?;
        let token = token(&job, index).ok_or(HomeError::NoToken(index))?;
        if let Some(renewal) = job.renewal_at(last).filter(|_| index > last) {
            let (Renewal { index, anchor, tag }, handle) = (renewal, job.handle());
            handle.renew(&mut self.echo, token::Renewal { index, anchor: anchor.0 }, tag.0)?;
        }
        let paid = job.handle().pay(&mut self.echo, token)?;
        self.judge.1.confirm(index);
        status.last_index = last.max(paid.last_index);
        status.balance_micro = paid.balance_micro;
        if !job.renewals.is_empty() {
            let last = status.last_index;
            self.jobs.update(&id, |job| job.renewals.retain(|renewal| renewal.index >= last))?;
        }
        Ok(())
    }

    /// A purchase that the broker refused is none.
    fn forget_refused(&self, error: &BrokerError) {
        if error.word().is_some() {
            // The error that is being returned says more than this one would.
            let _ = self.jobs.update(&self.id, |job| job.purchase = None);
        }
    }
}

/// The token of this index, from the nearest one behind it: at most a purchase's number of steps.
fn token(job: &Job, index: u32) -> Option<PaymentToken> {
    let behind = job.payments.iter().filter(|payment| payment.index >= index);
    let nearest = behind.min_by_key(|payment| payment.index)?;
    let value = chain::walk(&nearest.value.0, nearest.index - index);
    Some(PaymentToken { index, value })
}

#[cfg(test)]
pub(crate) mod tests;
