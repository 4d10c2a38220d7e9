//! Figures for Prometheus: requests as `http` counts them, and nodes, jobs and money as they stand when somebody asks.
//! No figure names a customer.

use crate::Broker;
use crate::refusal::Refusal;
use crate::settle;
use crate::store::{Latency, StoreError, Tx, params};
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Which requests.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    route: String,
    status: u16,
}

/// How jobs were settled.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Settled {
    by: String,
}

/// All figures.
pub struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    request_seconds: Histogram,
    sold: Counter,
    sold_micro: Counter,
    settled: Family<Settled, Counter>,
    refund_micro: Family<Settled, Counter>,
    nodes_alive: Gauge,
    jobs_open: Gauge,
    jobs_frozen: Gauge,
    balances_micro: Gauge,
}

/// From 0.5 ms to 16 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 16))
}

impl Metrics {
    /// Nothing counted yet, beside what a store measures of itself.
    pub fn new(store: &Latency) -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("onde_broker"),
            requests: Family::default(),
            request_seconds: seconds(),
            sold: Counter::default(),
            sold_micro: Counter::default(),
            settled: Family::default(),
            refund_micro: Family::default(),
            nodes_alive: Gauge::default(),
            jobs_open: Gauge::default(),
            jobs_frozen: Gauge::default(),
            balances_micro: Gauge::default(),
        };
        metrics.register();
        metrics.register_store(store);
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let all = &mut self.registry;
        all.register("requests", "Requests answered", self.requests.clone());
        all.register("request_seconds", "Time to answer one", self.request_seconds.clone());
        all.register("jobs_sold", "Jobs sold", self.sold.clone());
        all.register(
            "sold_micro",
            "Micro-tokens sold, payments for open jobs included",
            self.sold_micro.clone(),
        );
        all.register("settlements", "Jobs settled", self.settled.clone());
        all.register("refund_micro", "Micro-tokens given back", self.refund_micro.clone());
        all.register("nodes_alive", "Nodes that answer", self.nodes_alive.clone());
        all.register("jobs_open", "Jobs not settled", self.jobs_open.clone());
        all.register(
            "jobs_frozen",
            "Of these, those that sell no more: the ledger may be older than what they sold",
            self.jobs_frozen.clone(),
        );
        all.register("balances_micro", "Micro-tokens in all accounts", self.balances_micro.clone());
    }

    fn register_store(&mut self, store: &Latency) {
        for (access, seconds) in [("read", &store.read), ("write", &store.write)] {
            let label = ("access".into(), access.into());
            let part = self.registry.sub_registry_with_label(label);
            part.register(
                "store_seconds",
                "Time that the ledger took for one act",
                seconds.clone(),
            );
        }
    }

    /// A request was answered.
    pub fn request(&self, route: String, status: u16, took: Duration) {
        self.requests.get_or_create(&Answered { route, status }).inc();
        self.request_seconds.observe(took.as_secs_f64());
    }
}

/// What the ledger says of all jobs ever sold.
struct Totals {
    open: i64,
    frozen: i64,
    balances_micro: i64,
    /// How many, and what was given back, by how they were settled.
    settled: Vec<(String, u64, u64)>,
    sold: u64,
    sold_micro: u64,
}

/// From the ledger and not from counters of this process: so they outlive it, and two brokers say the same.
fn totals(tx: &Tx<'_>) -> Result<Totals, StoreError> {
    let one = |sql: &str| tx.value::<i64>(sql, params![]);
    let settled = "SELECT settled_by, count(*), CAST(sum(refund_micro) AS BIGINT) FROM jobs \
         WHERE settled_by IS NOT NULL GROUP BY settled_by";
    let sold_micro = "SELECT CAST(coalesce(sum(sold * value_micro), 0) AS BIGINT) FROM jobs";
    let balances = "SELECT CAST(coalesce(sum(balance_micro), 0) AS BIGINT) FROM books \
         WHERE name LIKE 'customer:%'";
    Ok(Totals {
        open: one("SELECT count(*) FROM jobs WHERE settled_at IS NULL")?,
        frozen: settle::frozen(tx)?,
        balances_micro: one(balances)?,
        settled: tx.rows(settled, params![], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?,
        sold: one("SELECT count(*) FROM jobs")?.unsigned_abs(),
        sold_micro: one(sold_micro)?.unsigned_abs(),
    })
}

impl Broker {
    /// All figures as Prometheus reads them.
    pub fn figures(&self, now: Instant) -> Result<String, Refusal> {
        let metrics = &self.metrics;
        let totals = self.ledger.read(|tx| Ok(totals(tx)?))?;
        metrics.jobs_open.set(totals.open);
        metrics.jobs_frozen.set(totals.frozen);
        metrics.balances_micro.set(totals.balances_micro);
        metrics.nodes_alive.set(self.nodes().alive(now).count() as i64);
        metrics.sold.inner().store(totals.sold, Relaxed);
        metrics.sold_micro.inner().store(totals.sold_micro, Relaxed);
        for (by, count, refund_micro) in totals.settled {
            let by = Settled { by };
            metrics.settled.get_or_create(&by).inner().store(count, Relaxed);
            metrics.refund_micro.get_or_create(&by).inner().store(refund_micro, Relaxed);
        }
        let mut text = String::new();
        encode(&mut text, &metrics.registry).expect("a string takes all");
        Ok(text)
    }
}
