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
#[derive(Clone)]
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

    /// A new one: some 50 ms of one processor, so nobody waits for it with the ledger locked.
    pub fn mint(&self) -> New {
        let (chain, anchor) = Traversal::mint(&crate::random(), self.levels);
        New { chain, anchor }
    }

    /// One out of stock, if there is any.
    pub fn take(&self) -> Option<New> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Puts one back that was not sold.
    pub fn put_back(&self, new: New) {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(new);
    }

    /// Tokens in each.
    pub fn count(&self) -> u32 {
        1 << self.levels
    }

    /// Makes one more if there is room.
    pub fn add(&self) {
        let count = self.ready.lock().unwrap_or_else(PoisonError::into_inner).len();
        if count < STOCK_MAX {
            self.put_back(self.mint());
        }
    }
}

/// The next tokens of a job.
pub struct Sale {
    /// How many they are.
    pub count: u32,
    /// The value that stands for them.
    pub value: Value,
    /// What is left of their chain.
    pub chain: Option<Vec<u8>>,
    /// Index of the token before the first of their chain.
    pub chain_from: u32,
    /// What the first of them leads to, where they are the first of a new chain.
    pub anchor: Option<Value>,
}

/// Sells the next `count` tokens of a job: fewer where its chain ends before, and those of a `fresh` one where it has
/// ended.
pub fn sell(
    job: &JobRow,
    count: u32,
    fresh: impl FnOnce() -> Result<New, Refusal>,
) -> Result<Sale, Refusal> {
    if let Some(sale) = sell_old(job, count) {
        return Ok(sale);
    }
    let chain = job.chain.as_deref().map(|bytes| read(job, bytes)).transpose()?;
    let (mut chain, chain_from, anchor) = match chain.filter(|chain| chain.left() > 0) {
        Some(chain) => (chain, job.chain_from, None),
        None => {
            let New { chain, anchor } = fresh()?;
            (chain, job.sold, Some(anchor))
        }
    };
    let count = count.min(chain.left());
    let value = chain.next_tokens(count).ok_or(Refusal::ChainSpent)?;
    Ok(Sale { count, value, chain: Some(chain.emit()), chain_from, anchor })
}

fn read(job: &JobRow, bytes: &[u8]) -> Result<Traversal, StoreError> {
    let chain = Traversal::parse(bytes).filter(|chain| chain.given() == job.sold - job.chain_from);
    chain.ok_or(StoreError::Shape("a chain that is not as far as its job"))
}

/// The same of a chain that a broker of version 1 began; `None` where the job has another, or this is used up.
fn sell_old(job: &JobRow, count: u32) -> Option<Sale> {
    let left = OLD_COUNT.checked_sub(job.sold).filter(|left| *left > 0 && job.chain.is_none())?;
    let count = count.min(left);
    let value = chain::walk(&job.seed, left - count);
    Some(Sale { count, value, chain: None, chain_from: job.chain_from, anchor: None })
}
