//! What customers and shops do beside buying: pay in by webhook, hold keys that can do less, read what was used, and keep
//! receipts that nobody has to be asked about.

mod stage;

use onde_broker::Broker;
use onde_broker::payments::Webhook;
use onde_broker::watch::Heard;
use onde_client::api::*;
use onde_client::receipt::BadReceipt;
use onde_wire::machine::Stage as VmStage;
use onde_wire::packet::JobStatus;
use stage::*;
use std::sync::Arc;
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

    let at = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    let body = paid("order-5", 1);
    let sent = ureq::post(format!("{}/v1/webhook", operator.url))
        .header("Onde-Signature", sign(at, &body))
        .send(&body);
    assert_eq!(sent.expect("an answer").status(), 200);
    assert_eq!(customer.balance(), 13);
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
    assert_eq!(signed.receipt.last.expect("a sample").cpu_us, 21);
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
