//! Backup and restore, between both stores; and a ledger that is older than what it sold.

use crate::stage::*;
use onde_broker::audit::audit;
use onde_broker::backup::{BackupError, backup, restore};
use onde_broker::refusal::Refusal;
use onde_broker::settle::thaw;
use onde_broker::store::{Store, StoreError, ToValue, Tx};
use onde_broker::watch::Heard;
use onde_broker::{Broker, ledger::Ledger};
use onde_client::api::*;
use onde_wire::machine::Stage as VmStage;
use onde_wire::packet::JobStatus;
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

/// A broker with a customer of 100 000 tokens and an open job of ten.
fn with_job(dir: &Dir) -> (Arc<Broker>, Job) {
    let now = Instant::now();
    let broker = broker(&dir.0, now);
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 100_000 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    let job = broker.open_job("a", &purchase(10), now).expect("a job").job;
    (broker, job)
}

fn tokens(count: u32) -> TokensRequest {
    TokensRequest { idempotency_key: fresh_key(), count }
}

fn written(store: &Store) -> Vec<u8> {
    let mut out = Vec::new();
    backup(store, &mut out).expect("a backup");
    out
}

/// Restores a backup of the store under test into `place`, and looks at what it is.
fn check(place: &str) {
    let dir = Dir::new();
    let (broker, job) = with_job(&dir);
    let before = audit(broker.store(), None).expect("sound");
    let file = written(broker.store());
    broker.sell_tokens("a", &job.id.0, &tokens(5)).expect("sold after the backup");

    let restored = Store::open(place).expect("an empty store");
    let books = restore(&restored, &mut &file[..]).expect("restored");
    assert_eq!(books, before, "the same journal");
    assert!(matches!(restore(&restored, &mut &file[..]), Err(BackupError::NotEmpty)));
    let ledger = Ledger::open(place).expect("a ledger");
    let now = Instant::now();
    let second = Broker::new(cluster(), ledger, OPERATOR, now);
    hear(&second, hello(1, 1), now);
    let frozen = second.sell_tokens("a", &job.id.0, &tokens(5));
    assert!(matches!(frozen, Err(Refusal::JobFrozen)), "{frozen:?}");
    let new = second.open_job("a", &purchase(1), now).expect("new jobs are sold").job;
    assert!(new.seq > job.seq);
    second.sell_tokens("a", &new.id.0, &tokens(1)).expect("and their tokens");
    let settled = second.redeem("a", &job.id.0, &certificate(&job, 15, 12 * TOKEN).0);
    assert_eq!(settled.expect("settled by what the node says").refund_micro, 0);
    let books = audit(second.store(), None).expect("sound");
    assert_eq!(books.micro["owner"], 10 * TOKEN as i64, "no more than was paid");
}

#[test]
fn a_backup_restores_into_both_stores_and_sells_nothing_twice() {
    let dir = Dir::new();
    check(dir.0.join("restored.db").to_str().expect("UTF-8"));
    if ON_POSTGRES {
        check(&server::database());
    }
}

#[test]
fn a_damaged_backup_restores_nothing() {
    let dir = Dir::new();
    let (broker, _) = with_job(&dir);
    let whole = written(broker.store());
    let altered = |from: &str, to: &str| {
        let text = String::from_utf8(whole.clone()).expect("JSON");
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1).into_bytes()
    };
    let place = dir.0.join("restored.db");
    let store = Store::open(place.to_str().expect("UTF-8")).expect("a store");
    for bad in [
        whole[..whole.len() / 2].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        Vec::new(),
        altered("[\"a\",", "[\"b\","),
        altered("100000000000", "100000000001"),
        altered("\"table\":\"jobs\"", "\"table\":\"jobs; --\""),
        altered("\"version\":", "\"version\":9"),
    ] {
        restore(&store, &mut &bad[..]).expect_err("damaged");
        let here: i64 =
            store.read(|tx| tx.value("SELECT count(*) FROM accounts", &[])).expect("a count");
        assert_eq!(here, 0);
    }
    restore(&store, &mut &whole[..]).expect("the whole one");
}

#[test]
fn a_node_that_took_more_than_was_sold_freezes_its_own_jobs_until_the_operator_thaws_them() {
    let dir = Dir::new();
    let (broker, job) = with_job(&dir);
    let now = Instant::now();
    hear(&broker, hello(2, 1), now);
    let open = |node| {
        let request = JobRequest { node: Some(NodeChoice::Number(node)), ..purchase(1) };
        broker.open_job("a", &request, now).expect("a job").job
    };
    let (neighbour, elsewhere) = (open(1), open(2));
    let said = |job: &Job, last_index| {
        let status = JobStatus { last_index, ..status(VmStage::Running, TOKEN) };
        broker.hear(&[Heard::Status(job.id.0, status)], now).expect("heard");
    };
    let check = |job: &Job, sells: bool| {
        let told = broker.sell_tokens("a", &job.id.0, &tokens(1));
        match told {
            Ok(_) => assert!(sells, "sold"),
            Err(Refusal::JobFrozen) => assert!(!sells, "frozen"),
            Err(other) => panic!("{other}"),
        }
    };
    said(&job, 10);
    for job in [&job, &neighbour, &elsewhere] {
        check(job, true);
    }
    // Somebody put an old copy of the file in place, and the node was paid what this ledger never sold; or the node lies.
    said(&job, 12);
    for job in [&job, &neighbour] {
        check(job, false);
    }
    check(&elsewhere, true);
    check(&open(1), true);
    let figures = broker.figures(now).expect("figures");
    assert!(figures.contains("onde_broker_jobs_frozen 2\n"), "{figures}");
    let sql = "SELECT text FROM events WHERE kind = 'ledger_is_old'";
    let read = |tx: &Tx<'_>| tx.value::<String>(sql, &[]);
    let told = broker.store().read::<_, StoreError>(read).expect("an event");
    assert!(told.contains("node 1 was shown token 12 of a job that sold 11"), "{told}");

    assert_eq!(thaw(broker.store(), 1).expect("thawing"), 2);
    check(&job, false);
    said(&job, 12);
    said(&neighbour, 2);
    check(&job, false);
    check(&neighbour, false);
    assert_eq!(thaw(broker.store(), 1).expect("thawing"), 3, "one was bought meanwhile");
    said(&job, 11);
    check(&job, true);
    check(&neighbour, false);
    said(&neighbour, 2);
    check(&neighbour, true);
}

#[test]
fn a_broker_that_starts_sells_for_a_job_once_its_node_has_told_of_it() {
    let dir = Dir::new();
    let (first, job) = with_job(&dir);
    let paid = tokens(1);
    let sold = first.sell_tokens("a", &job.id.0, &paid).expect("sold");
    drop(first);
    let now = Instant::now();
    // The copy that somebody put in place for it may be older than what was sold.
    let broker = broker(&dir.0, now);
    hear(&broker, hello(1, 1), now);
    let sell = || broker.sell_tokens("a", &job.id.0, &tokens(1));
    assert!(matches!(sell(), Err(Refusal::NotHeard)));
    assert_eq!(broker.sell_tokens("a", &job.id.0, &paid).expect("told again"), sold);
    let new = broker.open_job("a", &purchase(1), now).expect("a job").job;
    broker.sell_tokens("a", &new.id.0, &tokens(1)).expect("a chain of its own");
    let said = JobStatus { last_index: 11, ..status(VmStage::Running, TOKEN) };
    broker.hear(&[Heard::Status(job.id.0, said)], now).expect("heard");
    assert_eq!(sell().expect("sold").index, 12);
}

/// Guests of jobs that were sold after a backup may live on, and have their addresses.
#[test]
fn a_restored_ledger_gives_out_no_address_that_an_unknown_guest_may_have() {
    let dir = Dir::new();
    let (broker, _) = with_job(&dir);
    let file = written(broker.store());
    let now = Instant::now();
    let large = onde_wire::packet::Hello { mem_mib_free: 1 << 20, slots_free: 999, ..hello(1, 1) };
    let buy = |broker: &Broker, moves| {
        hear(broker, large, now);
        let request = JobRequest { moves, ..purchase(1) };
        broker.open_job("a", &request, now).expect("a job").job
    };
    let mut taken: BTreeSet<_> = (0..20).map(|_| buy(&broker, None).guest_ipv4).collect();
    for round in 0..3 {
        let place = dir.0.join(format!("restored{round}.db"));
        let place = place.to_str().expect("UTF-8");
        restore(&Store::open(place).expect("a store"), &mut &file[..]).expect("restored");
        let second = Broker::new(cluster(), Ledger::open(place).expect("one"), OPERATOR, now);
        let known = second.jobs("a", true, i64::MAX, 1).expect("jobs").jobs[0].clone();
        for _ in 0..10 {
            assert!(taken.insert(buy(&second, None).guest_ipv4), "given to two");
            // A guest that moves keeps its address, and leads nobody back to its neighbours.
            assert_eq!(buy(&second, Some(known.id)).guest_ipv4, known.guest_ipv4);
        }
    }
}

#[test]
fn a_backup_has_each_row_of_large_tables_once() {
    const JOBS: u64 = 7;
    const SAMPLES: u64 = 12_000;
    let (dir, other) = (Dir::new(), Dir::new());
    let (broker, job) = with_job(&dir);
    let said = |i: u64| {
        // Not in the order of any key.
        let age_ms = i * 7919 % SAMPLES;
        let mut id = job.id.0;
        id[0] ^= (age_ms % JOBS) as u8;
        (id, age_ms)
    };
    let insert = "INSERT INTO samples (job, age_ms, at, spent_micro, last_index, cpu_us, mem_mib_ms, sent_bytes, \
        disk_mib_ms) VALUES (?1, ?2, 0, 0, 0, 0, 0, 0, 0)";
    let fill = |tx: &Tx<'_>| {
        (0..SAMPLES).map(said).try_for_each(|(id, age_ms)| {
            tx.execute(insert, &[id.to_value(), age_ms.to_value()]).map(drop)
        })
    };
    broker.store().write(fill).expect("samples");
    let file = written(broker.store());
    let restored = Store::open(other.0.join("restored.db").to_str().expect("UTF-8"));
    let restored = restored.expect("a store");
    restore(&restored, &mut &file[..]).expect("restored");
    let rows = |store: &Store| -> Vec<([u8; 16], u64)> {
        let sql = "SELECT job, age_ms FROM samples ORDER BY job, age_ms";
        let read = |tx: &Tx<'_>| tx.rows(sql, &[], |row| Ok((row.get(0)?, row.get(1)?)));
        store.read::<_, StoreError>(read).expect("rows")
    };
    let mut expect: Vec<_> = (0..SAMPLES).map(said).collect();
    expect.sort_unstable();
    assert_eq!(rows(&restored), expect);
    let told = String::from_utf8(file).expect("JSON");
    let lines: BTreeSet<_> = told.lines().collect();
    assert_eq!(lines.len(), told.lines().count(), "no row twice");
}

/// A backup is one state, whatever is sold meanwhile.
#[test]
fn a_backup_taken_while_sales_run_is_sound() {
    const SALES_MAX: u32 = 50_000;
    let dir = Dir::new();
    let (broker, job) = with_job(&dir);
    let over = AtomicBool::new(false);
    let (tell, told) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..SALES_MAX {
                broker.sell_tokens("a", &job.id.0, &tokens(1)).expect("sold");
                if over.load(Relaxed) || tell.send(()).is_err() {
                    break;
                }
            }
        });
        for round in 0..5 {
            (0..5).for_each(|_| told.recv().expect("sales go on"));
            let store = Store::open(&place(&dir.0)).expect("beside the broker");
            let mut out = Slow { bytes: Vec::new(), told: &told };
            let rows = backup(&store, &mut out).expect("a backup");
            let restored = dir.0.join(format!("restored{round}.db"));
            let restored = Store::open(restored.to_str().expect("UTF-8")).expect("a store");
            let books = restore(&restored, &mut &out.bytes[..]).expect("a sound one");
            let now = audit(broker.store(), Some((books.acts, books.head))).expect("sound");
            assert!(now.acts > books.acts && rows > 0, "sales went on while it was written");
        }
        over.store(true, Relaxed);
    });
}

/// A file that takes its first line only when a sale was made since it was begun.
struct Slow<'a> {
    bytes: Vec<u8>,
    told: &'a Receiver<()>,
}

impl Write for Slow<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.is_empty() {
            while self.told.try_recv().is_ok() {}
            (0..2).for_each(|_| self.told.recv().expect("sales go on"));
        }
        self.bytes.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
