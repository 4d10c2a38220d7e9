//! Purchases a second on the embedded store and on PostgreSQL, each with durable commits, by a few customers at once;
//! what that costs the broker in processor time and memory; and what a thousand running jobs cost it that are asked about
//! every second. `cargo xtask bench` runs it; prints one JSON object.

#[path = "../tests/stage/mod.rs"]
mod stage;

use onde_broker::Broker;
use onde_broker::ledger::Ledger;
use onde_broker::watch::Heard;
use onde_client::api::*;
use onde_wire::machine::Stage;
use onde_wire::packet::{Hello, JobStatus};
use serde_json::json;
use stage::{Dir, OPERATOR, TOKEN, cluster, fresh_key, hear, hello, purchase, server, status};
use std::time::{Duration, Instant};

/// Customers that buy at once.
const BUYERS: usize = 4;
/// How long each store is measured.
const TIME: Duration = Duration::from_secs(5);
/// Jobs that are asked about, in so many rounds.
const JOBS: u32 = 1000;
const ROUNDS: u64 = 20;
/// Kernel ticks of processor time a second, as /proc tells them.
const TICKS_PER_S: f64 = 100.0;

fn main() {
    let dir = Dir::new();
    let sqlite = measure(dir.0.join("ledger.db").to_str().expect("UTF-8"));
    let postgres = measure(&server::database());
    println!("{}", json!({ "sqlite": sqlite, "postgres": postgres }));
}

fn measure(place: &str) -> serde_json::Value {
    let now = Instant::now();
    let broker = Broker::new(cluster(), Ledger::open(place).expect("a store"), OPERATOR, now);
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 100_000_000 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    let (cpu, start) = (cpu_s(), Instant::now());
    let sales: u32 = std::thread::scope(|scope| {
        let buyers: Vec<_> = (0..BUYERS).map(|_| scope.spawn(|| buy(&broker, start))).collect();
        buyers.into_iter().map(|buyer| buyer.join().expect("a buyer")).sum()
    });
    let took_s = start.elapsed().as_secs_f64();
    let cpu_us = (cpu_s() - cpu) * 1e6 / f64::from(sales);
    let memory_kib = memory_kib();
    json!({
        "purchases_per_s": f64::from(sales) / took_s,
        "cpu_us_per_purchase": cpu_us,
        "memory_kib": memory_kib,
        "cpu_ms_per_round_of_polls": polls(&broker),
    })
}

/// Milliseconds of processor time for a round: whom to ask about a thousand jobs, and all that their nodes answer, but for
/// the packets themselves.
fn polls(broker: &Broker) -> f64 {
    let now = Instant::now();
    let large = Hello { mem_mib_free: u32::MAX, slots_free: u16::MAX, ..hello(2, 1) };
    hear(broker, large, now);
    let request = || JobRequest { node: Some(NodeChoice::Number(2)), ..purchase(1) };
    let jobs: Vec<_> =
        (0..JOBS).map(|_| broker.open_job("a", &request(), now).expect("a job").job.id.0).collect();
    let cpu = cpu_s();
    for round in 1..=ROUNDS {
        let (asks, _) = broker.asks(0, now).expect("asks");
        assert!(asks.len() >= jobs.len());
        let said =
            JobStatus { age_ms: round * 1000, last_index: 1, ..status(Stage::Running, round) };
        let heard: Vec<_> = jobs.iter().map(|job| Heard::Status(*job, said)).collect();
        broker.hear(&heard, now).expect("heard");
        broker.tick(now).expect("ticked");
    }
    (cpu_s() - cpu) * 1000.0 / ROUNDS as f64
}

fn buy(broker: &Broker, start: Instant) -> u32 {
    let job = broker.open_job("a", &purchase(1), Instant::now()).expect("a job").job;
    let mut sales = 0;
    while start.elapsed() < TIME {
        let request = TokensRequest { idempotency_key: fresh_key(), count: 1 };
        broker.sell_tokens("a", &job.id.0, &request).expect("sold");
        sales += 1;
    }
    sales
}

/// Processor time of this process, all threads.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let behind = stat.rsplit_once(')').expect("a name").1;
    let ticks = behind.split_whitespace().skip(11).take(2);
    ticks.map(|ticks| ticks.parse::<f64>().expect("ticks")).sum::<f64>() / TICKS_PER_S
}

/// Memory of this process now.
fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
