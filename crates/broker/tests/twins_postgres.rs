//! Two brokers, two processes, one PostgreSQL database: customers buy tokens of the same job from both at once, while one
//! and then the other is killed. Each token is sold once, also where a chain ends and the next begins. This file is its
//! own broker process: the test starts itself with `--broker DIR`.

#[path = "kill.rs"]
#[allow(dead_code, reason = "only what starts a broker is used here")]
mod kill;

use kill::stage::{Caller, Dir, OPERATOR, cluster, fresh_key, json, place, purchase};
use onde_broker::Broker;
use onde_broker::audit::audit;
use onde_broker::ledger::Ledger;
use onde_broker::store::Store;
use onde_client::api::*;
use onde_wire::chain;
use onde_wire::token::BootToken;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Tokens in a chain: 2^6.
const LEVELS: u32 = 6;
const BUYERS: usize = 4;
const SALES: usize = 60;
const FIRST: u32 = 10;
/// Longest wait for anything, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    let args: Vec<_> = std::env::args().collect();
    match args.iter().position(|arg| arg == "--broker") {
        Some(at) => run_broker(Path::new(&args[at + 1])),
        None => each_token_is_sold_once(),
    }
}

fn run_broker(dir: &Path) {
    let ledger = Ledger::open(&place(dir)).expect("a ledger");
    let broker = Broker::new(cluster(), ledger, OPERATOR, Instant::now());
    kill::serve_until_killed(&Arc::new(broker.with_chains(LEVELS)));
}

/// Where the two brokers are at the moment.
struct World {
    urls: Mutex<[String; 2]>,
    key: String,
    /// Each sale.
    tell: Sender<()>,
}

impl World {
    /// Asks one broker, then the other, until one answers; an answer is asked for again from the other.
    fn insist<T: serde::de::DeserializeOwned>(&self, first: usize, path: &str, body: &str) -> T {
        let deadline = Instant::now() + PATIENCE;
        for turn in first.. {
            let url = self.urls.lock().expect("no panic")[turn % 2].clone();
            match Caller::new(&url, &self.key).send(path, Some(body)) {
                Ok((200, text)) => return serde_json::from_str(&text).expect("an answer"),
                // It has just started, and asks the node first.
                Ok((503, _)) => assert!(Instant::now() < deadline, "no broker sells"),
                Ok((status, text)) => panic!("{path}: {status} {text}"),
                Err(_) => assert!(Instant::now() < deadline, "no broker answers"),
            }
        }
        unreachable!("it has a deadline")
    }

    fn buy(&self, buyer: usize, job: &Job) -> Vec<Payment> {
        let path = format!("/v1/jobs/{}/tokens", job.id);
        let sale = |sale: usize| {
            let count = 1 + (sale % 3) as u32;
            let body = json(&TokensRequest { idempotency_key: fresh_key(), count });
            let paid: Payment = self.insist(buyer + sale, &path, &body);
            let again: Payment = self.insist(buyer + sale + 1, &path, &body);
            assert_eq!(paid, again, "the same key at the other broker");
            self.tell.send(()).expect("the test listens");
            paid
        };
        (0..SALES).map(sale).collect()
    }
}

fn each_token_is_sold_once() {
    let dir = Dir::new();
    let database = place(&dir.0);
    let mut brokers = [kill::start(&dir.0), kill::start(&dir.0)];
    let operator = Caller::new(&brokers[0].1, OPERATOR);
    let customer = operator.customer("a", 2000);
    let (tell, told) = channel();
    let urls = Mutex::new([brokers[0].1.clone(), brokers[1].1.clone()]);
    let world = World { urls, key: customer.key, tell };
    let opened: JobOpened = world.insist(1, "/v1/jobs", &json(&purchase(FIRST)));
    let sold = std::thread::scope(|scope| {
        let (world, job) = (&world, &opened.job);
        let buyers: Vec<_> =
            (0..BUYERS).map(|buyer| scope.spawn(move || world.buy(buyer, job))).collect();
        for killed in [0, 1, 0] {
            (0..40).for_each(|_| told.recv_timeout(PATIENCE).expect("buyers go on"));
            let child = &mut brokers[killed].0;
            child.kill().expect("SIGKILL");
            child.wait().expect("dead");
            brokers[killed] = kill::start(&dir.0);
            world.urls.lock().expect("no panic")[killed] = brokers[killed].1.clone();
        }
        let sold = buyers.into_iter().map(|buyer| buyer.join().expect("a buyer"));
        sold.collect::<Vec<_>>().concat()
    });
    let chains = check_chains(&opened, sold);
    for (mut child, _) in brokers {
        child.kill().expect("SIGKILL");
        child.wait().expect("dead");
    }
    audit(&Store::open(&database).expect("the store"), None).expect("sound books");
    println!("twins: {} sales of {chains} chains by two brokers: each token once", BUYERS * SALES);
}

/// Follows each token to the one before: none is missing, none is there twice. How many chains they are of.
fn check_chains(opened: &JobOpened, mut sold: Vec<Payment>) -> usize {
    sold.sort_by_key(|payment| payment.index);
    let token = BootToken::parse(&opened.boot_token.0).expect("a boot token");
    let (mut index, mut value) = (FIRST, token.anchor);
    for payment in &sold {
        if let Some(renewal) = payment.renewal {
            assert_eq!(renewal.index, index, "a chain begins where the one before ends");
            value = renewal.anchor.0;
        }
        assert!(payment.index > index, "token {index} was sold twice");
        let follows = chain::verify(&value, &payment.value.0, payment.index - index);
        assert!(follows, "{} does not follow {index}", payment.index);
        (index, value) = (payment.index, payment.value.0);
    }
    let chains = 1 + sold.iter().filter(|payment| payment.renewal.is_some()).count();
    assert!(chains > 5, "{chains} chains: this proved nothing");
    chains
}
