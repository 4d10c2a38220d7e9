//! Kills a real broker process with SIGKILL at random moments while customers buy and redeem, starts it again over the
//! same ledger, and checks that the books balance to the micro-token. Customers repeat what got no answer, under
//! the same idempotency key. This file is its own broker process: the test starts itself with `--broker DIR`.

pub(crate) mod stage;

use onde_broker::audit::audit;
use onde_broker::ledger::Ledger;
use onde_client::api::*;
use stage::*;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

const KILLS: u32 = 12;
const CUSTOMERS: usize = 3;
const MONEY: u64 = 1_000_000;
/// Longest wait for anything, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn main() {
    let args: Vec<_> = std::env::args().collect();
    match args.iter().position(|arg| arg == "--broker") {
        Some(at) => run_broker(Path::new(&args[at + 1])),
        None => books_balance_after_kills(),
    }
}

fn run_broker(dir: &Path) {
    serve_until_killed(&broker(dir, Instant::now()));
}

/// Serves a broker whose one node has room for everything; says where on standard output.
pub fn serve_until_killed(broker: &std::sync::Arc<onde_broker::Broker>) {
    println!("{}", serve(broker.clone()));
    let big =
        onde_wire::packet::Hello { mem_mib_free: u32::MAX, slots_free: u16::MAX, ..hello(1, 1) };
    std::thread::spawn(move || {
        // The test holds the other end: when it dies, so does this broker.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    let (_stop, stopped) = channel::<()>();
    loop {
        hear(broker, big, Instant::now());
        hear_unbooted(broker, Instant::now());
        let _ = stopped.recv_timeout(Duration::from_secs(1));
    }
}

fn random() -> u32 {
    getrandom::u32().expect("random")
}

/// Starts this program as a broker; its process and where it serves.
pub fn start(dir: &Path) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().expect("this file"))
        .arg("--broker")
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a broker process");
    let mut url = String::new();
    let stdout = child.stdout.take().expect("piped");
    BufReader::new(stdout).read_line(&mut url).expect("its address");
    (child, url.trim().into())
}

/// Where the broker is at the moment, and whether customers go on.
struct World {
    url: Mutex<String>,
    /// Each act that was answered.
    tell: Sender<()>,
    over: AtomicBool,
}

impl World {
    /// Repeats a request until some broker answers it.
    fn insist<T: serde::de::DeserializeOwned>(&self, key: &str, path: &str, body: &str) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let url = self.url.lock().expect("no panic").clone();
            match Caller::new(&url, key).send(path, Some(body)) {
                Ok((200, text)) => {
                    self.tell.send(()).expect("the test listens");
                    return serde_json::from_str(&text).expect("an answer");
                }
                // It has just started, and asks the node first.
                Ok((503, _)) => assert!(Instant::now() < deadline, "no broker sells"),
                Ok((status, text)) => panic!("{path}: {status} {text}"),
                Err(_) => assert!(Instant::now() < deadline, "no broker answers"),
            }
        }
    }
}

/// Buys, pays and redeems until told to stop; gives the balance that its account has to have, and its acts.
fn live(world: &World, key: &str) -> (u64, u64) {
    let (mut balance, mut acts) = (MONEY * TOKEN, 0);
    while !world.over.load(Ordering::Relaxed) {
        let opened: JobOpened = world.insist(key, "/v1/jobs", &json(&purchase(3)));
        let path = |act: &str| format!("/v1/jobs/{}/{act}", opened.job.id);
        let request = TokensRequest { idempotency_key: fresh_key(), count: 2 };
        let paid: Payment = world.insist(key, &path("tokens"), &json(&request));
        assert_eq!(paid.index, 5);
        balance -= 5 * TOKEN;
        acts += 2;
        if random() & 3 != 0 {
            let spent = u64::from(random()) % (3 * TOKEN);
            let request = RedeemRequest { certificate: certificate(&opened.job, 3, spent) };
            let settled: Job = world.insist(key, &path("redeem"), &json(&request));
            assert_eq!(settled.refund_micro, 5 * TOKEN - spent);
            balance += settled.refund_micro;
            acts += 1;
        }
    }
    (balance, acts)
}

fn books_balance_after_kills() {
    let dir = Dir::new();
    // A database server is this process's, not the broker's that is killed.
    place(&dir.0);
    let (mut child, url) = start(&dir.0);
    let operator = Caller::new(&url, OPERATOR);
    let keys: Vec<_> =
        (0..CUSTOMERS).map(|i| operator.customer(&format!("customer{i}"), MONEY).key).collect();
    let (tell, told) = channel();
    let world = World { url: Mutex::new(url), tell, over: AtomicBool::new(false) };
    let lives = std::thread::scope(|scope| {
        let lives: Vec<_> = keys.iter().map(|key| scope.spawn(|| live(&world, key))).collect();
        for _ in 0..KILLS {
            // Between two random acts of somebody's, at a random moment of the next.
            (0..10 + random() % 20)
                .for_each(|_| told.recv_timeout(PATIENCE).expect("customers live"));
            std::thread::sleep(Duration::from_micros(u64::from(random() % 20_000)));
            child.kill().expect("SIGKILL");
            child.wait().expect("dead");
            let (next, url) = start(&dir.0);
            child = next;
            *world.url.lock().expect("no panic") = url;
        }
        world.over.store(true, Ordering::Relaxed);
        lives.into_iter().map(|life| life.join().expect("a life")).collect::<Vec<_>>()
    });
    let url = world.url.lock().expect("no panic").clone();
    for (key, (balance, _)) in keys.iter().zip(&lives) {
        assert_eq!(Caller::new(&url, key).balance(), *balance, "what the broker tells");
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("dead");
    let expect: Vec<_> = lives.iter().map(|(balance, _)| *balance as i64).collect();
    check_books(&dir.0, &expect);
    let acts: u64 = lives.iter().map(|(_, acts)| acts).sum();
    assert!(acts > 100, "only {acts} acts: this proved nothing");
    println!("kill: {acts} acts of {CUSTOMERS} customers over {KILLS} kills: the books balance");
}

/// Reads the ledger: the audit proves it, and balances are what customers know.
fn check_books(dir: &Path, expect: &[i64]) {
    let ledger = Ledger::open(&place(dir)).expect("the ledger");
    let books = audit(ledger.store(), None).expect("sound books");
    assert_eq!(books.micro.values().sum::<i64>(), 0);
    let sql = "SELECT balance_micro FROM books WHERE name LIKE 'customer:%' ORDER BY name";
    let balances: Vec<i64> =
        ledger.read(|tx| Ok(tx.rows(sql, &[], |row| row.get(0))?)).expect("rows");
    assert_eq!(balances, expect, "balance against what customers know");
}
