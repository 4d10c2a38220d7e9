//! STATUS polls of a thousand jobs on one node: how many a second one core answers, from `packetd`'s check of form and tag
//! to the tagged reply, and what memory the jobs' records take. A quarter of the VMs live, the others have ended and wait
//! for their customers. Prints one line of JSON; `cargo xtask bench` runs it.

use noded::meter::Terms;
use noded::node::{Config, Effect, Event, Node, Tail};
use onde_wire::key::{self, Key};
use onde_wire::packet::{Packet, Prices, Request, RequestUnchecked};
use onde_wire::plan::{self, Plan};
use onde_wire::token::{BootToken, JobId, Origin};
use std::hint::black_box;
use std::time::Instant;

/// Jobs that are asked about.
const JOBS: u32 = 1000;
/// Rounds over all of them, each timed; the median counts.
const ROUNDS: usize = 51;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 3];
const PRICES: Prices =
    Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 };

fn config() -> Config {
    let node = key::node_id(&MAC);
    Config {
        number: 3,
        mac: MAC,
        node,
        incarnation: [5; 16],
        node_key: key::node_key(&[7; 32], &node),
        plan: Plan::new([198, 18, 0, 0], 15).expect("a /15"),
        terms: Terms { prices: PRICES, keep_s: 300 },
        cpus: 2,
        mem_mib: 1 << 20,
        disk_mib: 0,
    }
}

fn id(job: u32) -> JobId {
    std::array::from_fn(|at| job.to_le_bytes()[at % 4])
}

fn token(config: &Config, job: u32) -> BootToken {
    let ipv4 = config.plan.guest(job);
    BootToken {
        broker_key: [0; 8],
        node: config.node,
        incarnation: config.incarnation,
        job: id(job),
        expiry_ms: 60_000,
        anchor: [1; 32],
        value_micro: 1_000_000,
        first_count: 1000,
        loader_sha256: [8; 32],
        mem_mib: 128,
        held_mib: 128,
        origin: Origin::Loader,
        vcpus: 1,
        disk_mib: 0,
        net_kib_s: 0,
        mac: plan::mac(ipv4),
        ipv4,
        gateway: [0; 4],
        prefix_len: 15,
        prices: PRICES,
    }
}

/// Boots a job; ends it, too, where it is not one in four.
fn boot(node: &mut Node, config: &Config, job: u32) {
    let (token, key) = (token(config, job), Key::new(&config.node_key));
    let request = Request::Boot(token, token.sign(&key)).emit(1, &token.job, &key);
    let effects = node.step(1000, Event::Packet([0; 32], request));
    let [Effect::Create(slot, _)] = effects[..] else { panic!("{effects:?}") };
    node.step(1000, Event::Created(slot, true));
    if !job.is_multiple_of(4) {
        let tail = Tail { total: 936, bytes: vec![b'x'; 936] };
        node.step(1000, Event::Gone(slot, tail, 0));
    }
}

fn main() {
    let config = config();
    let (mut node, before_kib) = (Node::new(config), memory_kib());
    (0..JOBS).for_each(|job| boot(&mut node, &config, job));
    let memory_kib = memory_kib() - before_kib;
    let key = Key::new(&config.node_key);
    let asks: Vec<Packet> = (0..JOBS)
        .map(|job| {
            let job_key = Key::new(&key::job_key(&key, &id(job)));
            Request::Status.emit(job.into(), &id(job), &job_key)
        })
        .collect();
    let mut rates: Vec<f64> = (0..ROUNDS).map(|_| round(&mut node, &key, &asks)).collect();
    rates.sort_by(f64::total_cmp);
    let rate = rates[ROUNDS / 2];
    println!("{{\"status_polls_per_s\": {rate:.0}, \"memory_kib\": {memory_kib}}}");
}

/// Polls a second, over all jobs once.
fn round(node: &mut Node, key: &Key, asks: &[Packet]) -> f64 {
    let begun = Instant::now();
    for packet in asks {
        let request = RequestUnchecked::parse(black_box(packet)).expect("a request");
        assert!(request.verify(key));
        let effects = node.step(1000, Event::Packet([0; 32], *packet));
        assert!(matches!(effects[..], [Effect::Reply(..)]));
        black_box(effects);
        // As the loop does before it waits again.
        black_box(node.wake_ms());
    }
    asks.len() as f64 / begun.elapsed().as_secs_f64()
}

/// Memory of this process now.
fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
