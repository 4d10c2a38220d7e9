//! The broker through its HTTP API: sales, change, settlements, and every refusal a customer can meet.

use crate::stage::*;
use onde_broker::Broker;
use onde_broker::audit::audit;
use onde_broker::ledger::Ledger;
use onde_broker::policy::Policy;
use onde_broker::watch::Heard;
use onde_client::api::*;
use onde_wire::chain;
use onde_wire::key::{Key, job_key, node_key};
use onde_wire::machine::Stage as VmStage;
use onde_wire::packet::Op;
use onde_wire::token::{BootToken, Origin};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// A served broker with nodes 1 and 2 alive, and the moment that its tests count from.
struct Stage {
    broker: Arc<Broker>,
    operator: Caller,
    start: Instant,
    _dir: Dir,
}

impl Stage {
    fn new() -> Self {
        let (dir, start) = (Dir::new(), Instant::now());
        let broker = broker(&dir.0, start);
        hear(&broker, hello(1, 1), start);
        hear(&broker, hello(2, 1), start);
        let operator = Caller::new(&serve(broker.clone()), OPERATOR);
        Self { broker, operator, start, _dir: dir }
    }

    fn buy(&self, customer: &Caller, tokens: u32) -> JobOpened {
        customer.post("/v1/jobs", &purchase(tokens))
    }

    /// Ticks once a second from `from` to `to` seconds, node 1 answering until `silent_from` and node 2 always.
    fn pass(&self, from: u64, to: u64, silent_from: u64) {
        for second in from..=to {
            let now = self.start + Duration::from_secs(second);
            for number in if second < silent_from { 1..=2 } else { 2..=2 } {
                let uptime_ms = 10_000 + second * 1000;
                let hello = onde_wire::packet::Hello { uptime_ms, ..hello(number, 1) };
                hear(&self.broker, hello, now);
            }
            self.broker.tick(now).expect("ticked");
        }
    }
}

/// Sends and expects this refusal.
fn check(caller: &Caller, path: &str, body: Option<&str>, expect: (u16, &str)) {
    let (status, text) = caller.send(path, body).expect("the broker answers");
    let failure: Failure = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{path}: {text}"));
    assert_eq!((status, failure.error.as_str()), expect, "{path} {body:?}: {text}");
    assert!(!failure.message.is_empty());
}

#[test]
fn refuses_what_is_wrong_and_takes_no_money() {
    let stage = Stage::new();
    let (rich, poor) = (stage.operator.customer("rich", 100), stage.operator.customer("poor", 0));
    let nobody = Caller::new(&rich.url, "onde_wrong");
    let buy = |change: fn(&mut JobRequest)| {
        let mut request = purchase(5);
        change(&mut request);
        json(&request)
    };
    let jobs = "/v1/jobs";
    check(&nobody, jobs, Some(&buy(|_| ())), (401, "unauthorized"));
    check(&nobody, "/v1/account", None, (401, "unauthorized"));
    check(&nobody, "/v1/events", None, (401, "unauthorized"));
    check(&poor, jobs, Some(&buy(|_| ())), (402, "no_money"));
    check(&rich, jobs, Some(&buy(|r| r.tokens = 101)), (402, "no_money"));
    check(&rich, jobs, Some(&buy(|r| r.node = Some(NodeChoice::Number(77)))), (404, "not_found"));
    check(
        &rich,
        jobs,
        Some(&buy(|r| r.node = Some(NodeChoice::Id(Hex([9; 16]))))),
        (404, "not_found"),
    );
    check(&rich, jobs, Some(&buy(|r| r.mem_mib = 2000)), (422, "no_fitting_node"));
    check(&rich, jobs, Some(&buy(|r| r.vcpus = 3)), (422, "no_fitting_node"));
    check(&rich, jobs, Some(&buy(|r| r.mem_mib = 63)), (422, "invalid"));
    check(&rich, jobs, Some(&buy(|r| r.mem_mib = u32::MAX)), (422, "invalid"));
    check(&rich, jobs, Some(&buy(|r| r.vcpus = 0)), (422, "invalid"));
    check(&rich, jobs, Some(&buy(|r| r.disk_mib = u32::MAX)), (422, "invalid"));
    check(&rich, jobs, Some(&buy(|r| r.tokens = 0)), (422, "invalid"));
    check(&rich, jobs, Some(&buy(|r| r.tokens = 65_537)), (422, "invalid"));
    check(&rich, jobs, Some(&buy(|r| r.moves = Some(Hex([1; 16])))), (404, "not_found"));
    check(&rich, jobs, Some(&buy(|r| r.idempotency_key.clear())), (422, "invalid"));
    check(&rich, jobs, Some(&buy(|r| r.idempotency_key = "k".repeat(65))), (422, "invalid"));
    check(&rich, jobs, Some("{"), (400, "invalid"));
    check(&rich, jobs, Some("{\"tokens\": 5}"), (422, "invalid"));
    check(&rich, jobs, Some(&"x".repeat(20_000)), (413, "too_large"));
    check(&rich, "/v1/jobs/zz", None, (400, "invalid"));
    check(&rich, "/v1/nothing", None, (404, "not_found"));
    check(&rich, "/healthz", Some("{}"), (405, "wrong_method"));
    check(&rich, "/v1/accounts", Some("{\"name\": \"me\"}"), (403, "not_operator"));
    check(&stage.operator, "/v1/accounts", Some("{\"name\": \"rich\"}"), (409, "account_exists"));
    check(&stage.operator, "/v1/accounts", Some("{\"name\": \"a b\"}"), (422, "invalid"));
    let credit = |micro| json(&CreditRequest { idempotency_key: fresh_key(), micro });
    check(&stage.operator, "/v1/accounts/none/credit", Some(&credit(1)), (404, "not_found"));
    check(&stage.operator, "/v1/accounts/rich/credit", Some(&credit(0)), (422, "invalid"));
    check(&stage.operator, "/v1/accounts/rich/credit", Some(&credit(u64::MAX)), (422, "invalid"));
    assert_eq!(rich.balance(), 100 * TOKEN);
    assert!(rich.get::<JobList>("/v1/jobs").jobs.is_empty());
}

#[test]
fn sells_a_boot_token_that_its_node_accepts_and_payments_that_lead_to_it() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 1000);
    let opened = stage.buy(&customer, 10);
    let key = Key::new(&node_key(&SECRET, &[1; 16]));
    let token = BootToken::parse(&opened.boot_token.0).expect("a boot token");
    assert_eq!(token.sign(&key), opened.boot_tag.0);
    assert_eq!(job_key(&key, &token.job), opened.job_key.0);
    assert_eq!((token.node, token.incarnation, token.job), ([1; 16], [1; 16], opened.job.id.0));
    assert_eq!((token.mem_mib, token.vcpus, token.first_count), (64, 1, 10));
    assert_eq!((token.ipv4, token.prefix_len), (opened.job.guest_ipv4.octets(), 15));
    assert!((130_000..135_000).contains(&token.expiry_ms), "{}", token.expiry_ms);
    let mut last = (10, token.anchor);
    for count in [1, 600] {
        let request = TokensRequest { idempotency_key: fresh_key(), count };
        let path = format!("/v1/jobs/{}/tokens", opened.job.id);
        let paid: Payment = customer.post(&path, &request);
        assert_eq!(paid, customer.post(&path, &request), "the same key, the same token");
        assert_eq!(paid.index, last.0 + count);
        assert!(chain::verify(&last.1, &paid.value.0, count));
        last = (paid.index, paid.value.0);
    }
    assert_eq!(customer.balance(), (1000 - 611) * TOKEN);
    let lines = customer.get::<Account>("/v1/account").entries;
    let deltas: Vec<_> =
        lines.iter().map(|line| (line.reason.as_str(), line.delta_micro)).collect();
    let token = TOKEN as i64;
    assert_eq!(
        deltas,
        [
            ("tokens", -600 * token),
            ("tokens", -token),
            ("boot", -10 * token),
            ("credit", 1000 * token)
        ]
    );
}

#[test]
fn a_clone_is_sold_where_its_template_is_to_whom_it_belongs() {
    let stage = Stage::new();
    let [owner, other] = ["a", "b"].map(|name| stage.operator.customer(name, 1000));
    let whole: JobOpened = owner.post("/v1/jobs", &JobRequest { template: true, ..purchase(1) });
    let origin = |opened: &JobOpened| {
        let token = BootToken::parse(&opened.boot_token.0).expect("a boot token");
        (token.origin, token.mem_mib, token.held_mib)
    };
    assert_eq!(origin(&whole), (Origin::Template, 64, 64));
    let clones = Some(Clones { template: whole.job.id, held_mib: 8 });
    let request = || JobRequest { clones, ..purchase(1) };
    let opened: JobOpened = owner.post("/v1/jobs", &request());
    assert_eq!(origin(&opened), (Origin::Clone(whole.job.id.0), 64, 8));
    assert_eq!(opened.job.node, whole.job.node);
    let larger = JobRequest { mem_mib: 128, ..request() };
    check(&owner, "/v1/jobs", Some(&json(&larger)), (422, "invalid"));
    let both = JobRequest { template: true, ..request() };
    check(&owner, "/v1/jobs", Some(&json(&both)), (422, "invalid"));
    check(&other, "/v1/jobs", Some(&json(&request())), (404, "not_found"));
}

#[test]
fn sells_on_where_a_chain_ends() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 2_000_000);
    let opened = stage.buy(&customer, 10);
    let path = format!("/v1/jobs/{}/tokens", opened.job.id);
    let buy = |count| TokensRequest { idempotency_key: fresh_key(), count };
    check(&customer, &path, Some(&json(&buy(0))), (422, "invalid"));
    check(&customer, &path, Some(&json(&buy(4097))), (422, "invalid"));
    let all = |_| stage.broker.sell_tokens("a", &opened.job.id.0, &buy(4096)).expect("sold");
    let last = (1..256).map(all).fold(None, |_, paid| Some(paid)).expect("a sale");
    let rest: Payment = customer.post(&path, &buy(4000));
    assert!(chain::verify(&last.value.0, &rest.value.0, 4000) && rest.renewal.is_none());
    let request = buy(200);
    let seed: Payment = customer.post(&path, &request);
    assert_eq!(seed.index, 10 + (1 << 20), "no more than the chain has, to its very last");
    assert!(chain::verify(&rest.value.0, &seed.value.0, 96) && seed.renewal.is_none());
    assert_eq!(seed, customer.post(&path, &request), "the same key, the same tokens");
    let request = buy(200);
    let next: Payment = customer.post(&path, &request);
    assert_eq!((next, next.index), (customer.post(&path, &request), seed.index + 200));
    let renewal = next.renewal.expect("a new chain");
    assert!(chain::verify(&renewal.anchor.0, &next.value.0, 200));
    let signed = onde_wire::token::Renewal { index: renewal.index, anchor: renewal.anchor.0 };
    let (node_key, job) = (Key::new(&node_key(&SECRET, &[1; 16])), opened.job.id.0);
    assert!(signed.verify(&node_key, &job, &opened.job.incarnation.0, &renewal.tag.0));
    assert_eq!(renewal.index, seed.index);
    let on: Payment = customer.post(&path, &buy(1));
    assert!(chain::verify(&next.value.0, &on.value.0, 1) && on.renewal.is_none());
    assert_eq!(
        customer.balance(),
        (2_000_000 - u64::from(on.index)) * TOKEN,
        "and no more is paid"
    );
    audit(stage.broker.store(), None).expect("sound books");
}

#[test]
fn an_idempotency_key_buys_once() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let mut request = purchase(10);
    let first: JobOpened = customer.post("/v1/jobs", &request);
    assert_eq!(first, customer.post("/v1/jobs", &request));
    assert_eq!(customer.balance(), 90 * TOKEN);
    request.tokens = 11;
    check(&customer, "/v1/jobs", Some(&json(&request)), (409, "key_reused"));
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 5 };
    for _ in 0..2 {
        let done: Credited = stage.operator.post("/v1/accounts/a/credit", &credit);
        assert_eq!(done.balance_micro, 90 * TOKEN + 5);
    }
}

#[test]
fn redeems_a_certificate_once_and_only_the_right_one() {
    let stage = Stage::new();
    let (customer, other) = (stage.operator.customer("a", 100), stage.operator.customer("b", 100));
    let job = stage.buy(&customer, 10).job;
    let second = stage.buy(&customer, 10).job;
    let path = format!("/v1/jobs/{}/redeem", job.id);
    let redeem = |certificate| json(&RedeemRequest { certificate });
    let right = certificate(&job, 10, 4 * TOKEN);
    let mut forged = right;
    forged.0[70] ^= 1;
    check(&customer, &path, Some(&redeem(forged)), (422, "bad_certificate"));
    check(&customer, &path, Some(&redeem(certificate(&second, 10, 0))), (422, "bad_certificate"));
    check(&customer, &path, Some(&redeem(certificate(&job, 11, 0))), (422, "bad_certificate"));
    check(
        &customer,
        &path,
        Some(&redeem(certificate(&job, 1, 2 * TOKEN))),
        (422, "bad_certificate"),
    );
    let other_life = Job { incarnation: Hex([8; 16]), ..job.clone() };
    check(
        &customer,
        &path,
        Some(&redeem(certificate(&other_life, 10, 0))),
        (422, "bad_certificate"),
    );
    check(&other, &path, Some(&redeem(right)), (404, "not_found"));
    check(&other, &format!("/v1/jobs/{}", job.id), None, (404, "not_found"));
    check(&customer, &path, Some("{\"certificate\": \"00\"}"), (422, "invalid"));
    assert_eq!(customer.balance(), 80 * TOKEN);
    for _ in 0..2 {
        let settled: Job = customer.post(&path, &RedeemRequest { certificate: right });
        assert_eq!(settled.settled_by, Some(SettledBy::Certificate));
        assert_eq!(settled.refund_micro, 6 * TOKEN);
        assert_eq!(customer.balance(), 86 * TOKEN);
    }
    let buy = json(&TokensRequest { idempotency_key: fresh_key(), count: 1 });
    check(&customer, &format!("/v1/jobs/{}/tokens", job.id), Some(&buy), (409, "job_settled"));
}

#[test]
fn tokens_bought_and_never_shown_come_back_too() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let job = stage.buy(&customer, 10).job;
    let request = TokensRequest { idempotency_key: fresh_key(), count: 20 };
    let _: Payment = customer.post(&format!("/v1/jobs/{}/tokens", job.id), &request);
    let request = RedeemRequest { certificate: certificate(&job, 10, 9 * TOKEN + 1) };
    let settled: Job = customer.post(&format!("/v1/jobs/{}/redeem", job.id), &request);
    assert_eq!(settled.refund_micro, 21 * TOKEN - 1);
    assert_eq!(customer.balance(), 91 * TOKEN - 1);
}

#[test]
fn a_restarted_node_costs_what_it_was_seen_to_spend() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let job = stage.buy(&customer, 10).job;
    let now = stage.start;
    let spent = |spent| Heard::Status(job.id.0, status(VmStage::Running, spent));
    stage.broker.hear(&[spent(3 * TOKEN), spent(2 * TOKEN)], now).expect("heard");
    hear(&stage.broker, hello(1, 2), now);
    stage.broker.tick(now).expect("ticked");
    stage.broker.tick(now).expect("ticked");
    let settled: Job = customer.get(&format!("/v1/jobs/{}", job.id));
    assert_eq!(settled.settled_by, Some(SettledBy::NodeRestarted));
    assert_eq!(customer.balance(), 97 * TOKEN);
    let kinds: Vec<_> = stage.operator.get::<EventList>("/v1/events").events;
    let kinds: Vec<_> = kinds.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds, ["job_settled", "node_restarted", "node_up", "node_up"]);
}

#[test]
fn a_silent_node_gives_the_money_back_after_a_minute_and_is_stopped_when_it_returns() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let job = stage.buy(&customer, 10).job;
    let path = format!("/v1/jobs/{}", job.id);
    stage
        .broker
        .hear(&[Heard::Status(job.id.0, status(VmStage::Running, TOKEN))], stage.start)
        .expect("heard");
    stage.pass(1, 60, 1);
    assert_eq!(customer.get::<Job>(&path).settled_by, None);
    stage.pass(61, 61, 1);
    assert_eq!(customer.get::<Job>(&path).settled_by, Some(SettledBy::NodeSilent));
    assert_eq!(customer.balance(), 99 * TOKEN);
    stage.pass(62, 62, 63);
    let now = stage.start + Duration::from_secs(62);
    let (asks, _) = stage.broker.asks(0, now).expect("asks");
    assert_eq!((asks.len(), asks[0].op), (1, Op::Stop));
    let bytes = certificate(&job, 10, 5 * TOKEN).0;
    stage.broker.hear(&[Heard::Certificate(job.id.0, bytes)], now).expect("heard");
    assert_eq!(customer.balance(), 99 * TOKEN, "settled once");
    assert!(stage.broker.asks(0, now).expect("asks").0.is_empty());
}

#[test]
fn a_broker_that_did_not_listen_blames_no_node() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let job = stage.buy(&customer, 10).job;
    stage.broker.tick(stage.start + Duration::from_secs(3600)).expect("ticked");
    assert_eq!(customer.get::<Job>(&format!("/v1/jobs/{}", job.id)).settled_by, None);
}

#[test]
fn a_broker_that_was_cut_off_blames_no_node_for_an_hour() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let job = stage.buy(&customer, 10).job;
    let settled = || customer.get::<Job>(&format!("/v1/jobs/{}", job.id)).settled_by;
    // No node answers for ten minutes, then node 2 does, and its neighbour a moment later.
    let tick = |second| {
        stage.broker.tick(stage.start + Duration::from_secs(second)).expect("ticked");
    };
    (1..=600).for_each(tick);
    stage.pass(601, 660, 601);
    assert_eq!(settled(), None);
    stage.pass(661, 3600, 662);
    assert_eq!(settled(), Some(SettledBy::NodeSilent));

    let request = JobRequest { node: Some(NodeChoice::Number(2)), ..purchase(10) };
    let job = customer.post::<JobOpened>("/v1/jobs", &request).job;
    (3601..=7200).for_each(tick);
    let settled = || customer.get::<Job>(&format!("/v1/jobs/{}", job.id)).settled_by;
    assert_eq!(settled(), None);
    tick(7201);
    assert_eq!(settled(), Some(SettledBy::NodeSilent), "nobody answers for an hour");
}

#[test]
fn a_boot_token_never_shown_is_credited_when_it_has_expired() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let job = stage.buy(&customer, 10).job;
    let cancel = format!("/v1/jobs/{}/cancel", job.id);
    check(&customer, &cancel, Some("{}"), (409, "token_live"));
    let say_gone = |second| {
        let now = stage.start + Duration::from_secs(second);
        let asks = stage.broker.asks(0, now).expect("asks").0;
        let gone: Vec<_> = asks.iter().map(|ask| Heard::Gone(ask.job, ask.expired)).collect();
        assert_eq!(gone.len(), 1);
        stage.broker.hear(&gone, now).expect("heard");
    };
    stage.pass(1, 119, 999);
    say_gone(119);
    check(&customer, &cancel, Some("{}"), (409, "token_live"));
    stage.pass(120, 125, 999);
    say_gone(125);
    let settled: Job = customer.post(&cancel, &());
    assert_eq!(settled.settled_by, Some(SettledBy::Unused));
    assert_eq!(customer.balance(), 100 * TOKEN);
}

#[test]
fn a_booted_job_is_not_cancelled_and_its_end_is_redeemed_by_the_broker() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let job = stage.buy(&customer, 10).job;
    let ended = Heard::Status(job.id.0, status(VmStage::Ended, 4 * TOKEN));
    stage.broker.hear(&[ended], stage.start).expect("heard");
    check(&customer, &format!("/v1/jobs/{}/cancel", job.id), Some("{}"), (409, "job_booted"));
    let bytes = certificate(&job, 10, 4 * TOKEN).0;
    stage.broker.hear(&[Heard::Certificate(job.id.0, bytes)], stage.start).expect("heard");
    assert_eq!(customer.balance(), 96 * TOKEN);
}

#[test]
fn picks_the_cheapest_node_with_room_and_counts_what_it_sold() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let buy = |mem_mib, node| {
        customer
            .send("/v1/jobs", Some(&json(&JobRequest { mem_mib, node, ..purchase(1) })))
            .expect("answers")
    };
    let node_of = |(status, body): (u16, String)| {
        assert_eq!(status, 200, "{body}");
        serde_json::from_str::<JobOpened>(&body).expect("a sale").job
    };
    let first = node_of(buy(600, None));
    let second = node_of(buy(600, None));
    assert_eq!((first.node, second.node), (1, 2), "node 1 is cheaper, then full");
    assert_ne!(first.guest_ipv4, second.guest_ipv4);
    assert_eq!(buy(600, None).0, 422);
    assert_eq!(buy(600, Some(NodeChoice::Number(2))).0, 422);
    assert_eq!(node_of(buy(300, Some(NodeChoice::Id(Hex([2; 16]))))).node, 2);
    let nodes = customer.get::<NodeList>("/v1/nodes").nodes;
    let free: Vec<_> =
        nodes.iter().map(|node| (node.number, node.mem_mib_free, node.slots_free)).collect();
    assert_eq!(free, [(1, 367, 3), (2, 39, 2)]);
}

#[test]
fn a_moving_guest_keeps_its_address() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let from = stage.buy(&customer, 1).job;
    let moving = JobRequest { moves: Some(from.id), ..purchase(1) };
    let to: JobOpened = customer.post("/v1/jobs", &moving);
    assert_eq!(to.job.guest_ipv4, from.guest_ipv4);
    let fresh = stage.buy(&customer, 1).job;
    assert_ne!(fresh.guest_ipv4, from.guest_ipv4, "taken by two jobs, and not given to a third");
}

#[test]
fn lists_come_in_pages() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    let ids: Vec<_> = (0..3).map(|_| stage.buy(&customer, 1).job.id).collect();
    let first: JobList = customer.get("/v1/jobs?limit=2");
    let second: JobList =
        customer.get(&format!("/v1/jobs?limit=2&before={}", first.next.expect("more")));
    let listed: Vec<_> = first.jobs.iter().chain(&second.jobs).map(|job| job.id).collect();
    assert_eq!(listed, [ids[2], ids[1], ids[0]]);
    assert_eq!(second.next, None);
    let nodes: NodeList = customer.get("/v1/nodes?limit=1&after=1");
    assert_eq!(nodes.nodes[0].number, 2);
    let bad = customer.send("/v1/jobs?limit=many", None).expect("answers");
    assert_eq!(bad.0, 400);
}

#[test]
fn describes_itself() {
    let stage = Stage::new();
    let stranger = Caller::new(&stage.operator.url, "");
    let document: serde_json::Value = stranger.get("/openapi.json");
    let paths = document["paths"].as_object().expect("paths");
    assert_eq!(paths.len(), 18, "{:?}", paths.keys());
    assert!(document["components"]["schemas"]["JobRequest"]["properties"]["mem_mib"].is_object());
    assert_eq!(stranger.get::<serde_json::Value>("/healthz"), serde_json::json!({}));
    let (dir, a_minute_ago) = (Dir::new(), Instant::now() - Duration::from_secs(60));
    let neglected = Caller::new(&serve(broker(&dir.0, a_minute_ago)), "");
    check(&neglected, "/readyz", None, (503, "not_ready"));
    let ready: serde_json::Value = stranger.get("/readyz");
    assert_eq!(ready["nodes_alive"], 2);
    check(&stranger, "/metrics", None, (401, "unauthorized"));
    let (_, metrics) = stage.operator.send("/metrics", None).expect("answers");
    let line = "onde_broker_requests_total{route=\"/readyz\",status=\"200\"} 1\n";
    let sold = "onde_broker_jobs_sold_total 0\n";
    assert!(metrics.contains(sold), "{metrics}");
    assert!(metrics.contains(line) && metrics.contains("onde_broker_nodes_alive 2\n"), "{metrics}");
}

#[test]
fn prices_are_the_owners_by_node_and_time_of_day() {
    let (dir, now) = (Dir::new(), Instant::now());
    let hour = Arc::new(AtomicU64::new(12));
    let clock = Arc::clone(&hour);
    let ledger = Ledger::open(&place(&dir.0)).expect("a ledger");
    let ledger = ledger.with_clock(Box::new(move || clock.load(Relaxed) * 3600));
    let rules = "nodes=1 hours=22-6 percent=50\nnodes=2 vcpu_s=9000 gib_s=70\nnodes=3 free";
    let policy = Policy::parse(rules).expect("rules");
    let broker = Broker::new(cluster(), ledger, OPERATOR, now).with_policy(policy);
    (1..=4).for_each(|number| hear(&broker, hello(number, 1), now));
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 100 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    let buy = |node: Option<u32>| {
        let request = JobRequest { node: node.map(NodeChoice::Number), ..purchase(1) };
        let opened = broker.open_job("a", &request, now).expect("a job");
        let token = BootToken::parse(&opened.boot_token.0).expect("a boot token");
        assert_eq!(
            opened.prices,
            Some(token.prices.into()),
            "the customer is told what the node is"
        );
        let usage = broker.usage("a", &opened.job.id.0, None, 1).expect("its usage");
        assert_eq!(usage.prices, opened.prices, "and so is who reads the bill");
        let listed = broker.node_list(None, 9, now).expect("nodes").nodes;
        let listed =
            listed.iter().find(|node| node.number == opened.job.node).expect("it is there");
        assert_eq!(Some(listed.prices), opened.prices, "as `onde price` compares");
        (opened.job.node, token.prices.vcpu_s, token.prices.gib_s)
    };
    assert_eq!(buy(Some(1)), (1, 1001, 10), "by day what the node says");
    assert_eq!(buy(Some(2)), (2, 9000, 70), "fixed");
    assert_eq!(buy(Some(3)), (3, 0, 0), "free");
    assert_eq!(buy(Some(4)), (4, 1004, 10), "no rule");
    assert_eq!(buy(None), (3, 0, 0), "the cheapest");
    hour.store(23, Relaxed);
    assert_eq!(buy(Some(1)), (1, 500, 5), "half at night");
    hour.store(30, Relaxed);
    assert_eq!(buy(Some(1)), (1, 1001, 10), "six o'clock is day");
}

/// Making a chain of 2^31 tokens takes minutes: whoever gets no new one must not wait for it, nor may the broker.
#[test]
fn no_chain_is_made_for_a_sale_that_does_not_come_about() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let (dir, now) = (Dir::new(), Instant::now());
    let first = broker(&dir.0, now);
    hear(&first, hello(1, 1), now);
    for (name, tokens) in [("rich", 100), ("poor", 1)] {
        first.open_account(&AccountRequest { name: name.into() }).expect("an account");
        let credit = CreditRequest { idempotency_key: name.into(), micro: tokens * TOKEN };
        first.credit_account(name, &credit).expect("money");
    }
    let sold = purchase(5);
    let opened = first.open_job("rich", &sold, now).expect("a job");
    let costly = Broker::new(cluster(), Ledger::open(&place(&dir.0)).expect("one"), OPERATOR, now);
    let costly = costly.with_chains(31);
    hear(&costly, hello(1, 1), now);
    let refused = |account: &str, change: fn(&mut JobRequest)| {
        let mut request = purchase(2);
        change(&mut request);
        costly.open_job(account, &request, now).expect_err("no sale").failure().error
    };
    let start = Instant::now();
    assert_eq!(costly.open_job("rich", &sold, now).expect("told again"), opened);
    assert_eq!(refused("poor", |_| ()), "no_money");
    assert_eq!(refused("rich", |request| request.mem_mib = 2000), "no_fitting_node");
    assert_eq!(refused("rich", |request| request.disk_mib = 501), "no_fitting_node");
    assert_eq!(refused("rich", |request| request.moves = Some(Hex([1; 16]))), "not_found");
    let again = JobRequest { tokens: 6, ..sold };
    let reused = costly.open_job("rich", &again, now).expect_err("another request");
    assert_eq!(reused.failure().error, "key_reused");
    assert!(start.elapsed() < PATIENCE, "a chain was made");
}

#[test]
fn a_chain_that_was_not_sold_is_not_lost_to_the_next_customer() {
    let (dir, now) = (Dir::new(), Instant::now());
    let ledger = Ledger::open(&place(&dir.0)).expect("a ledger");
    // Each chain has two tokens, so that a job is soon at the end of its first.
    let broker = Broker::new(cluster(), ledger, OPERATOR, now).with_chains(1);
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 8 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    let job = broker.open_job("a", &purchase(1), now).expect("a job").job;
    let sell = |count| {
        let request = TokensRequest { idempotency_key: fresh_key(), count };
        broker
            .sell_tokens("a", &job.id.0, &request)
            .map(|paid| (paid.index, paid.renewal.is_some()))
    };
    let sold: Vec<_> = (0..4).map(|_| sell(9).map_err(|no| no.failure().error)).collect();
    let no_money = Err("no_money".to_owned());
    assert_eq!(sold, [Ok((3, false)), Ok((5, true)), Ok((7, true)), no_money]);
    assert_eq!(sell(1).expect("the last one"), (8, true));
    audit(broker.store(), None).expect("sound books");
}

#[test]
fn a_disk_is_sold_where_there_is_room_for_it() {
    let stage = Stage::new();
    let customer = stage.operator.customer("a", 100);
    hear(&stage.broker, onde_wire::packet::Hello { disk_mib_free: 0, ..hello(1, 1) }, stage.start);
    let buy = |disk_mib, node| {
        let request = JobRequest { disk_mib, node, ..purchase(1) };
        let (status, body) = customer.send("/v1/jobs", Some(&json(&request))).expect("answers");
        match status {
            200 => Ok(serde_json::from_str::<JobOpened>(&body).expect("a sale").job.node),
            _ => Err(serde_json::from_str::<Failure>(&body).expect("a refusal").message),
        }
    };
    let none = "no node that has room for this otherwise has that much free disk".to_owned();
    let not_there = "the node has not that much free disk".to_owned();
    assert_eq!(buy(0, None), Ok(1), "the cheapest, as long as nobody wants a disk");
    assert_eq!(buy(300, None), Ok(2));
    assert_eq!(buy(300, None), Err(none.clone()), "what was sold is taken, booted or not");
    assert_eq!(buy(200, Some(NodeChoice::Number(1))), Err(not_there.clone()));
    assert_eq!(buy(201, Some(NodeChoice::Number(2))), Err(not_there));
    assert_eq!(buy(200, None), Ok(2));
    assert_eq!(buy(1, None), Err(none));
}
