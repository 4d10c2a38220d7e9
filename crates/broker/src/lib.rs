//! The broker: sells tokens, keeps the ledger, gives change. It runs on the owner's server as a plain user.
//! `main` starts it; tests start it with nodes of their own invention. It never talks to a node but by ICMP echo,
//! and it holds the cluster secret, which no customer ever sees.
//!
//! | module | what |
//! |---|---|
//! | `serve`, `tls`, `rate` | connections, the certificate, limits |
//! | `http`, `metrics` | requests and answers, figures |
//! | `audit`, `backup` | the proof that the books are right, and copies of them |
//! | `policy` | what the owner charges where and when |
//! | `accounts`, `payments`, `sale`, `settle`, `jobs`, `usage` | money and jobs |
//! | `ledger`, `journal`, `store` | what is kept: acts once, double entry, SQLite or PostgreSQL |
//! | `chains`, `traversal` | long hash chains, kept as a few values |
//! | `nodes`, `watch`, `poller` | what nodes say, what it means, how to ask |
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod accounts;
pub mod audit;
pub mod backup;
mod chains;
pub mod http;
pub mod jobs;
pub mod journal;
pub mod ledger;
pub mod metrics;
pub mod nodes;
pub mod payments;
pub mod policy;
pub mod poller;
pub mod rate;
pub mod refusal;
mod sale;
pub mod serve;
pub mod settle;
pub mod store;
pub mod tls;
pub mod traversal;
mod usage;
pub mod watch;

use ed25519_dalek::SigningKey;
use ledger::Ledger;
use nodes::Nodes;
use onde_wire::cluster::Cluster;
use onde_wire::key::sha256;
use refusal::Refusal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// All of the broker's state. Locks: the ledger first, then the nodes.
pub struct Broker {
    cluster: Cluster,
    ledger: Ledger,
    nodes: Mutex<Nodes>,
    stock: chains::Stock,
    operator: accounts::KeyDigest,
    metrics: metrics::Metrics,
    webhook: Option<payments::Webhook>,
    signer: SigningKey,
    policy: policy::Policy,
}

impl Broker {
    /// A broker for a cluster, over a store; `operator_key` is what the operator shows as API key.
    pub fn new(cluster: Cluster, ledger: Ledger, operator_key: &str, now: Instant) -> Self {
        let operator = sha256(operator_key.as_bytes());
        let signer = SigningKey::from_bytes(&random());
        let metrics = metrics::Metrics::new(ledger.store().latency());
        Self {
            cluster,
            ledger,
            nodes: Mutex::new(Nodes::new(now)),
            stock: Default::default(),
            operator,
            metrics,
            webhook: None,
            signer,
            policy: Default::default(),
        }
    }

    /// The same, selling chains of 2^`levels` tokens: short ones cost little to make and are soon at their end.
    pub fn with_chains(self, levels: u32) -> Self {
        Self { stock: chains::Stock::new(levels), ..self }
    }

    /// The same, charging by the owner's rules.
    pub fn with_policy(self, policy: policy::Policy) -> Self {
        Self { policy, ..self }
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        // The table is whole between any two statements: a panic elsewhere does not spoil it.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the operator's key. Digests of secrets with 256 bits may be compared in plain.
    fn is_operator(&self, key: &accounts::KeyDigest) -> bool {
        self.operator == *key
    }

    /// The store under the ledger, for audits and backups.
    pub fn store(&self) -> &store::Store {
        self.ledger.store()
    }

    /// Forgets what is too old to matter; see [`Ledger::prune`].
    pub fn prune(&self) -> Result<(), Refusal> {
        self.ledger.prune()
    }

    /// Forgets some of it; see [`Ledger::prune_some`].
    pub fn prune_some(&self) -> Result<bool, Refusal> {
        self.ledger.prune_some()
    }
}

/// Fresh random bytes.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("Linux has random bytes once it has booted");
    bytes
}
