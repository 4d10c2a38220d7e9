//! What customers and shops do beside buying: pay in by webhook, hold keys that can do less, read what was used, and keep
//! receipts that nobody has to be asked about.

use crate::stage::*;
use onde_broker::Broker;
use onde_broker::backup::backup;
use onde_broker::ledger::Ledger;
use onde_broker::payments::Webhook;
use onde_broker::store::{StoreError, ToValue, Tx};
use onde_broker::watch::Heard;
use onde_client::api::*;
use onde_client::receipt::BadReceipt;
use onde_wire::machine::Stage as VmStage;
use onde_wire::packet::JobStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A broker with node 1 alive, and its operator.
fn open() -> (Arc<Broker>, Caller, Dir) {
    let dir = Dir::new();
    let broker = broker(&dir.0, Instant::now());
    hear(&broker, hello(1, 1), Instant::now());
    let operator = Caller::new(&serve(broker.clone()), OPERATOR);
    (broker, operator, dir)
}

const NOW: u64 = 1_800_000_000;

fn paid(reference: &str, micro: u64) -> String {
    let (reference, account) = (reference.to_owned(), "a".to_owned());
    json(&PaidRequest { reference, account, micro })
}

#[test]
fn a_webhook_credits_what_the_shop_signed_once() {
    let (broker, operator, _dir) = open();
    let customer = operator.customer("a", 0);
    let check = |signature: &str, body: &str, now: u64, expect: Result<u64, &str>| {
        let told = broker.webhook_paid(signature, body.as_bytes(), now);
        let told = told.map(|done| done.balance_micro).map_err(|no| no.failure().error);
        assert_eq!(told, expect.map_err(String::from), "{body}");
    };
    let sign = |at, body: &str| Webhook::new(WEBHOOK).sign(at, body.as_bytes());
    let body = paid("order-1", 5);
    let right = sign(NOW, &body);
    check(&right, &body, NOW, Ok(5));
    check(&right, &body, NOW + 299, Ok(5));
    check(&right, &body, NOW + 301, Err("bad_signature"));
    check(&right, &body, NOW - 301, Err("bad_signature"));
    check(&sign(NOW + 9, &body), &body, NOW, Ok(5));
    assert_eq!(customer.balance(), 5, "the same payment, told four times");
    check(&right, &paid("order-1", 6), NOW, Err("bad_signature"));
    check(
        &right.replace(&NOW.to_string(), &(NOW + 1).to_string()),
        &body,
        NOW,
        Err("bad_signature"),
    );
    check(&Webhook::new("guessed").sign(NOW, body.as_bytes()), &body, NOW, Err("bad_signature"));
    for wrong in ["", "t=1", "v1=00", "t=x,v1=", &right[..right.len() - 1]] {
        check(wrong, &body, NOW, Err("bad_signature"));
    }
    let signed = |body: &str, expect| check(&sign(NOW, body), body, NOW, expect);
    signed(&paid("order-1", 6), Err("key_reused"));
    signed(&paid("order-2", 0), Err("invalid"));
    signed(&paid("", 1), Err("invalid"));
    signed("{}", Err("invalid"));
    signed(&paid("order-3", 1).replace("\"a\"", "\"b\""), Err("not_found"));
    signed(&paid("order-4", 7), Ok(12));

    // The operator's own references are others, however they are called.
    let request = CreditRequest { idempotency_key: "webhook/order-4".into(), micro: 9 };
    let done = broker.credit_account("a", &request).expect("credited");
    assert_eq!(done.balance_micro, 21);
    signed(&paid("order-4", 7), Ok(12));
    assert_eq!(broker.credit_account("a", &request).expect("told again").balance_micro, 21);

    let at = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    let body = paid("order-5", 1);
    let sent = ureq::post(format!("{}/v1/webhook", operator.url))
        .header("Onde-Signature", sign(at, &body))
        .send(&body);
    assert_eq!(sent.expect("an answer").status(), 200);
    assert_eq!(customer.balance(), 22);
}

#[test]
fn keys_do_what_they_are_for_until_they_end() {
    let (_broker, operator, _dir) = open();
    let customer = operator.customer("a", 100);
    let other = operator.customer("b", 0);
    let key = |scope, expires_in_s| -> AccountOpened {
        operator.post("/v1/accounts/a/keys", &KeyRequest { scope, expires_in_s })
    };
    let status = |caller: &Caller, path: &str, body: Option<&str>| {
        caller.send(path, body).expect("an answer").0
    };
    let buy = json(&purchase(1));
    let reader = Caller::new(&operator.url, &key(Scope::Reader, None).key);
    assert_eq!(reader.balance(), 100 * TOKEN);
    assert_eq!(status(&reader, "/v1/jobs", Some(&buy)), 403);

    let gauge = Caller::new(&operator.url, &key(Scope::Metrics, None).key);
    assert!(gauge.ask("get", "/metrics", None).2.contains("store_seconds_bucket"));
    for (path, body) in [("/v1/account", None), ("/v1/nodes", None), ("/v1/jobs", Some(&*buy))] {
        assert_eq!(status(&gauge, path, body), 403, "{path}");
    }
    for caller in [&reader, &customer] {
        assert_eq!(status(caller, "/metrics", None), 403);
    }

    let second = key(Scope::Customer, Some(3600));
    let caller = Caller::new(&operator.url, &second.key);
    assert_eq!(status(&caller, "/v1/jobs", Some(&buy)), 200);
    let revoke =
        |caller: &Caller, id: &str| caller.ask("delete", &format!("/v1/keys/{id}"), None).0;
    let id = second.id.to_string();
    assert_eq!(revoke(&other, &id), 404, "another account's");
    assert_eq!(revoke(&reader, &id), 403);
    assert_eq!((revoke(&customer, &id), revoke(&operator, &id)), (200, 200));
    assert_eq!(status(&caller, "/v1/account", None), 401);
    assert_eq!(status(&customer, "/v1/account", None), 200);

    let short = Caller::new(&operator.url, &key(Scope::Customer, Some(1)).key);
    let deadline = Instant::now() + Duration::from_secs(30);
    while status(&short, "/v1/account", None) != 401 {
        assert!(Instant::now() < deadline, "it does not end");
    }
    for life in [0, u64::MAX] {
        let body = json(&KeyRequest { expires_in_s: Some(life), ..KeyRequest::default() });
        assert_eq!(status(&operator, "/v1/accounts/a/keys", Some(&body)), 422);
    }
}

#[test]
fn a_settled_job_can_be_explained_and_its_receipt_verified() {
    let (broker, operator, _dir) = open();
    let customer = operator.customer("a", 100);
    let job = customer.post::<JobOpened>("/v1/jobs", &purchase(10)).job;
    let path = |what: &str| format!("/v1/jobs/{}/{what}", job.id);
    assert_eq!(customer.send(&path("receipt"), None).expect("an answer").0, 409, "not settled");
    for second in [1, 2, 2, 3] {
        let said = status(VmStage::Running, second * TOKEN);
        let said = JobStatus { age_ms: second * 1000, cpu_us: second * 7, ..said };
        broker.hear(&[Heard::Status(job.id.0, said)], Instant::now()).expect("heard");
    }
    let first: Usage = customer.get(&path("usage?limit=2"));
    assert_eq!(first.prices.expect("the prices").vcpu_s, 1001);
    let ages = |usage: &Usage| usage.samples.iter().map(|one| one.age_ms).collect::<Vec<_>>();
    assert_eq!((ages(&first), first.next), (vec![1000, 2000], Some(2000)));
    let rest: Usage = customer.get(&path("usage?limit=2&after=2000"));
    assert_eq!((ages(&rest), rest.next), (vec![3000], None));

    let certificate = certificate(&job, 10, 4 * TOKEN);
    let _: Job = customer.post(&path("redeem"), &RedeemRequest { certificate });
    let signed: SignedReceipt = customer.get(&path("receipt"));
    let key = broker.receipt_key();
    assert_eq!(signed.verify(&key), Ok(()));
    assert_eq!(signed.receipt.refund_micro, 6 * TOKEN);
    let last = signed.receipt.last.expect("a sample");
    assert_eq!((last.cpu_us, last.spent_micro, last.last_index), (21, 4 * TOKEN, 10));
    let late = JobStatus { age_ms: 9000, ..status(VmStage::Stopped, 3 * TOKEN) };
    broker.hear(&[Heard::Status(job.id.0, late)], Instant::now()).expect("heard");
    let all: Usage = customer.get(&path("usage"));
    assert_eq!(ages(&all), [1000, 2000, 3000, 3001], "its last row is what it cost");
    assert_eq!(all.samples.last(), Some(&last));
    assert_eq!(signed.verify(&[1; 32]), Err(BadReceipt::OtherKey));
    let check = |change: fn(&mut Receipt)| {
        let mut altered = signed.clone();
        change(&mut altered.receipt);
        assert_eq!(altered.verify(&key), Err(BadReceipt::Signature));
    };
    check(|receipt| receipt.refund_micro -= 1);
    check(|receipt| receipt.account.push('b'));
    check(|receipt| receipt.last = None);
    check(|receipt| receipt.settled_by = SettledBy::Unused);
    let text = json(&signed);
    assert_eq!(
        serde_json::from_str::<SignedReceipt>(&text).expect("read back").verify(&key),
        Ok(())
    );
    let stranger = operator.customer("b", 0);
    assert_eq!(stranger.send(&path("receipt"), None).expect("an answer").0, 404);
    assert_eq!(stranger.send(&path("usage"), None).expect("an answer").0, 404);
}

/// A clock that a test moves.
fn at(dir: &Dir, clock: &Arc<AtomicU64>) -> Broker {
    let clock = Arc::clone(clock);
    let ledger = Ledger::open(&place(&dir.0)).expect("a ledger");
    let ledger = ledger.with_clock(Box::new(move || clock.load(Relaxed)));
    Broker::new(cluster(), ledger, OPERATOR, Instant::now()).signing_with(&[7; 32])
}

#[test]
fn a_receipt_stays_the_same_while_samples_are_thinned() {
    const DAY_S: u64 = 24 * 3600;
    let (dir, clock) = (Dir::new(), Arc::new(AtomicU64::new(NOW / 60 * 60 + 30)));
    let (broker, now) = (at(&dir, &clock), Instant::now());
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 100 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    // One is seen for five minutes, one for a few seconds, one never; each second costs 10 000.
    let run = |seconds: u64| {
        let job = broker.open_job("a", &purchase(10), now).expect("a job").job;
        for second in 1..=seconds {
            clock.fetch_add(1, Relaxed);
            let said = status(VmStage::Running, second * 10_000);
            let said = JobStatus { age_ms: second * 1000, ..said };
            broker.hear(&[Heard::Status(job.id.0, said)], now).expect("heard");
        }
        let bytes = certificate(&job, 10, seconds * 10_000 + 77).0;
        broker.redeem("a", &job.id.0, &bytes).expect("settled");
        job.id.0
    };
    let jobs = [run(300), run(3), run(0)];
    let receipts = || jobs.map(|job| json(&broker.receipt("a", &job).expect("a receipt")));
    let samples = |job| broker.usage("a", job, None, 500).expect("usage").samples;
    let counts = || jobs.each_ref().map(|job| samples(job).len());
    let first = receipts();
    assert_eq!(counts(), [301, 4, 1]);
    for (days, expect) in [(0, [301, 4, 1]), (2, [12, 2, 1]), (80, [12, 2, 1]), (100, [2, 2, 1])] {
        clock.store(NOW + days * DAY_S, Relaxed);
        broker.prune().expect("pruned");
        assert_eq!(counts(), expect, "after {days} days");
        assert_eq!(receipts(), first, "after {days} days");
        for (job, cost) in jobs.iter().zip([3_000_077, 30_077, 77]) {
            let samples = samples(job);
            assert_eq!(samples.last().expect("the last").spent_micro, cost);
            assert!(samples[0].age_ms <= 1000, "the first");
        }
    }
    // A clock that was wrong for a while hides nothing from later prunings.
    clock.store(NOW + 10 * DAY_S, Relaxed);
    broker.prune().expect("pruned");
    let last = run(100);
    clock.store(NOW + 12 * DAY_S, Relaxed);
    broker.prune().expect("pruned");
    assert_eq!(samples(&last).len(), 4, "the first, a minute's two, the last");
}

#[test]
fn much_that_is_old_is_forgotten_in_short_acts() {
    let (dir, clock) = (Dir::new(), Arc::new(AtomicU64::new(NOW)));
    let broker = at(&dir, &clock);
    let fill = "INSERT INTO samples (job, age_ms, at, spent_micro, last_index, cpu_us, mem_mib_ms, sent_bytes, \
        disk_mib_ms) SELECT ?1, a.n * 100 + b.n, ?2 + b.n, 0, 0, 0, 0, 0, 0 FROM numbers a, numbers b";
    let fill = fill.replace("FROM numbers a, numbers b", &format!("FROM {0} a, {0} b", NUMBERS));
    let old = NOW - 2 * 24 * 3600;
    let count = || -> u64 {
        let read = |tx: &Tx<'_>| tx.value("SELECT count(*) FROM samples", &[]);
        broker.store().read::<_, StoreError>(read).expect("a count")
    };
    broker
        .store()
        .write::<_, StoreError>(|tx| tx.execute(&fill, &[[1_u8; 16].to_value(), old.to_value()]))
        .expect("samples");
    assert_eq!(count(), 10_000);
    let mut acts = 0;
    let mut before = count();
    while broker.prune_some().expect("pruned") {
        assert!((1..=2000).contains(&(before - count())), "one act is bounded, and does something");
        (acts, before) = (acts + 1, count());
    }
    assert!(acts >= 4, "{acts}");
    assert!(count() < 500, "{} are left", count());
    assert!(!broker.prune_some().expect("pruned"), "and then there is no more to do");
}

/// The numbers from 0 to 99.
const NUMBERS: &str = "(WITH RECURSIVE c(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM c WHERE n < 99) SELECT n FROM c)";

#[test]
fn no_table_or_file_holds_a_key() {
    let dir = Dir::new();
    let broker = broker(&dir.0, Instant::now());
    let opened = broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let more = broker.add_key("a", KeyRequest::default()).expect("a key");
    let mut all = Vec::new();
    backup(broker.store(), &mut all).expect("all tables");
    let tables = String::from_utf8(all).expect("JSON");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&dir.0).expect("a folder") {
        files.extend(std::fs::read(entry.expect("a file").path()).expect("read"));
    }
    for key in [OPERATOR, &opened.key, &more.key] {
        let secret = key.strip_prefix("onde_").expect("its form");
        // As text, in hex as it is told, and as the bytes that this stands for or consists of.
        let drawn = secret.parse::<Hex<32>>().map_or(vec![], |hex| hex.0.to_vec());
        for bytes in [secret.as_bytes(), &drawn].into_iter().filter(|bytes| !bytes.is_empty()) {
            let as_json = json(&bytes);
            assert!(!tables.contains(as_json.trim_matches(['[', ']'])), "a table has it");
            assert!(!files.windows(bytes.len()).any(|window| window == bytes), "a file has it");
        }
        assert!(!tables.contains(secret), "a table has it");
    }
    let digest = json(&onde_wire::key::sha256(opened.key.as_bytes()));
    assert!(tables.contains(&digest), "this looks where keys are");
}
