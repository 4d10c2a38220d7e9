//! Backup and restore, between both stores; and a ledger that is older than what it sold.

mod stage;

use onde_broker::audit::audit;
use onde_broker::backup::{BackupError, backup, restore};
use onde_broker::refusal::Refusal;
use onde_broker::store::Store;
use onde_broker::watch::Heard;
use onde_broker::{Broker, ledger::Ledger};
use onde_client::api::*;
use onde_wire::machine::Stage as VmStage;
use onde_wire::packet::JobStatus;
use stage::*;
use std::sync::Arc;
use std::time::Instant;

/// A broker with a customer of 100 tokens and an open job of ten.
fn with_job(dir: &Dir) -> (Arc<Broker>, Job) {
    let now = Instant::now();
    let broker = broker(&dir.0, now);
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 100 * TOKEN };
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
        altered("100000000", "100000001"),
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
fn a_node_that_took_more_than_was_sold_shows_that_the_ledger_is_old() {
    let dir = Dir::new();
    let (broker, job) = with_job(&dir);
    let now = Instant::now();
    let other = broker.open_job("a", &purchase(1), now).expect("a job").job;
    let said = |last_index| {
        let status = JobStatus { last_index, ..status(VmStage::Running, TOKEN) };
        broker.hear(&[Heard::Status(job.id.0, status)], now).expect("heard");
    };
    said(10);
    broker.sell_tokens("a", &other.id.0, &tokens(1)).expect("all is well");
    // Somebody put an old copy of the file in place: the node was paid what this ledger never sold.
    said(11);
    for job in [&job, &other] {
        let refused = broker.sell_tokens("a", &job.id.0, &tokens(1));
        assert!(matches!(refused, Err(Refusal::JobFrozen)), "{refused:?}");
    }
    let new = broker.open_job("a", &purchase(1), now).expect("a new chain is sold").job;
    broker.sell_tokens("a", &new.id.0, &tokens(1)).expect("and its tokens");
}
