//! The chains of jobs: new ones are minted ahead, since that takes a million hashes, and a sale only takes one out of
//! stock; what a job has left of its own is kept with it as a few values ([`Traversal`]). `sale` calls it.

use crate::jobs::JobRow;
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::traversal::Traversal;
use onde_wire::chain::{self, Value};
use std::sync::{Mutex, PoisonError};

/// Tokens in a chain beside those of the boot token: 2^20. At one a second it lasts twelve days.
const LEVELS: u32 = 20;
/// Tokens in a chain that a broker of version 1 sold, boot token included.
const OLD_COUNT: u32 = 65_536;
/// Chains minted ahead. In memory only: a chain that was never sold is worth nothing.
const STOCK_MAX: usize = 16;

/// A chain nobody has bought yet.
pub struct New {
    /// The chain, with nothing given out.
    pub chain: Traversal,
    /// What its first token leads to.
    pub anchor: Value,
}

/// Chains ready to be sold.
pub struct Stock {
    levels: u32,
    ready: Mutex<Vec<New>>,
}

impl Default for Stock {
    fn default() -> Self {
        Self::new(LEVELS)
    }
}

impl Stock {
    /// None yet, of 2^`levels` tokens each.
    pub fn new(levels: u32) -> Self {
        Self { levels, ready: Mutex::default() }
    }

    fn mint(&self) -> New {
        let (chain, anchor) = Traversal::mint(&crate::random(), self.levels);
        New { chain, anchor }
    }

    /// One out of stock, or else one made now.
    pub fn take(&self) -> New {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop();
        ready.unwrap_or_else(|| self.mint())
    }

    /// Makes one more if there is room: some 50 ms of one processor.
    pub fn add(&self) {
        let count = self.ready.lock().unwrap_or_else(PoisonError::into_inner).len();
        if count < STOCK_MAX {
            let new = self.mint();
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(new);
        }
    }
}

/// The value that stands for the next `count` tokens of a job, and what is left of its chain.
pub fn sell(job: &JobRow, count: u32) -> Result<(Value, Option<Vec<u8>>), Refusal> {
    let Some(bytes) = &job.chain else { return Ok((sell_old(job, count)?, None)) };
    let chain = Traversal::parse(bytes).filter(|chain| chain.given() == job.sold - job.first_count);
    let mut chain = chain.ok_or(StoreError::Shape("a chain that is not as far as its job"))?;
    let value = chain.next_tokens(count).ok_or(Refusal::ChainSpent)?;
    Ok((value, Some(chain.emit())))
}

fn sell_old(job: &JobRow, count: u32) -> Result<Value, Refusal> {
    let left = OLD_COUNT.checked_sub(job.sold).and_then(|left| left.checked_sub(count));
    left.map(|left| chain::walk(&job.seed, left)).ok_or(Refusal::ChainSpent)
}
