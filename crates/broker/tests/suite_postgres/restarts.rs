//! The tests of `books.rs` over PostgreSQL, and what only a server can do to a broker.

use crate::stage::server::Server;
use crate::stage::{Dir, OPERATOR, TOKEN, cluster, fresh_key, hear, hello, purchase};
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
fn a_connection_is_encrypted_where_the_url_says_so_and_the_server_proves_itself() {
    let server = Server::start();
    server.new_database();
    let made =
        |host: &str| rcgen::generate_simple_self_signed([host.to_owned()]).expect("a certificate");
    // An address of this machine that is nobody else's.
    let host =
        format!("127.77.{}.{}", 1 + std::process::id() % 250, 1 + std::process::id() / 250 % 250);
    let (right, other) = (made(&host), made(&host));
    server.listen_with_tls(&host, &right.cert.pem(), &right.signing_key.serialize_pem());
    let dir = Dir::new();
    let file = |name: &str, text: String| {
        let path = dir.0.join(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let (right, other) = (file("right", right.cert.pem()), file("other", other.cert.pem()));
    let open = |query: &str| {
        let url = format!("postgres://onde@{host}/postgres?{query}");
        Store::open(&url).map(|store| {
            let sql = "SELECT CAST(ssl AS INTEGER) FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
            store.read(|tx| tx.value::<i64>(sql, &[])).expect("a row")
        })
    };
    for mode in ["require", "verify-ca", "verify-full"] {
        let query = format!("sslmode={mode}&sslrootcert={right}");
        assert_eq!(open(&query).expect("a proof"), 1, "{mode}");
        open(&format!("sslmode={mode}&sslrootcert={other}")).expect_err("another's certificate");
        open(&format!("sslmode={mode}")).expect_err("no authority of this machine signed it");
    }
    assert_eq!(open("sslmode=disable").expect("plain"), 0);
    assert_eq!(open("").expect("plain"), 0);
    let told = open("sslmode=perhaps").expect_err("no such mode").to_string();
    assert_eq!(told, "the database's URL: sslmode is disable, require or verify-full");
    // A server that has no TLS is not talked to in plain.
    let told = Store::open(&format!("{}?sslmode=require", Server::start().url("postgres")));
    told.err().expect("a socket in a folder has no name to prove");
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
