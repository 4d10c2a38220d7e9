//! The tests of `books.rs` over PostgreSQL, and what only a server can do to a broker.

#[path = "books.rs"]
mod books;

use books::stage::server::Server;
use books::stage::{OPERATOR, TOKEN, cluster, fresh_key, hear, hello, purchase};
use onde_broker::audit::audit;
use onde_broker::ledger::Ledger;
use onde_broker::refusal::Refusal;
use onde_broker::{Broker, store::Store};
use onde_client::api::*;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

/// Longest wait for anything, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(120);
const BUYERS: usize = 4;
const SALES: usize = 50;

/// Repeats an act under its key until the server is there to do it.
fn insist<T>(mut act: impl FnMut() -> Result<T, Refusal>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match act() {
            Ok(done) => return done,
            Err(Refusal::Ledger(_)) => assert!(Instant::now() < deadline, "the server stays away"),
            Err(refusal) => panic!("{refusal}"),
        }
    }
}

fn buy(broker: &Broker, job: &Job, tell: &Sender<()>, sold: &Mutex<Vec<u32>>) {
    for _ in 0..SALES {
        let request = TokensRequest { idempotency_key: fresh_key(), count: 1 };
        let paid = insist(|| broker.sell_tokens("a", &job.id.0, &request));
        sold.lock().expect("no panic").push(paid.index);
        tell.send(()).expect("the test listens");
    }
}

#[test]
fn a_server_that_crashes_and_cuts_connections_costs_no_token() {
    let server = Server::start();
    let url = server.new_database();
    let now = Instant::now();
    let broker = Broker::new(cluster(), Ledger::open(&url).expect("a ledger"), OPERATOR, now);
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 1000 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    let job = broker.open_job("a", &purchase(1), now).expect("a job").job;
    let (sold, (tell, told)) = (Mutex::new(Vec::new()), channel());
    std::thread::scope(|scope| {
        for _ in 0..BUYERS {
            let (tell, broker, job, sold) = (tell.clone(), &broker, &job, &sold);
            scope.spawn(move || buy(broker, job, &tell, sold));
        }
        for round in 0..6 {
            (0..20).for_each(|_| told.recv_timeout(PATIENCE).expect("buyers go on"));
            if round % 3 == 2 {
                server.crash();
                continue;
            }
            let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                WHERE application_name = 'onde-broker'";
            let mut client = postgres::Client::connect(&url, postgres::NoTls).expect("the server");
            client.batch_execute(cut).expect("connections cut");
        }
    });
    let mut sold = sold.into_inner().expect("no panic");
    sold.sort_unstable();
    assert_eq!(sold, (2..2 + (BUYERS * SALES) as u32).collect::<Vec<_>>(), "each token once");
    let books = audit(&Store::open(&url).expect("the store"), None).expect("sound books");
    assert_eq!(books.acts as usize, 2 + BUYERS * SALES);
}
