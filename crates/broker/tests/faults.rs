//! Ends a broker process at every statement and every commit of purchases, payments and all kinds of refunds, one after the
//! other; then a second process repeats what the first was asked, under the same idempotency keys. No token is sold
//! twice, none is lost, and the books balance at once after the death as well as at the end. This file is its own
//! broker process: the test starts itself with `--life DIR STEP TALE NAME`.

mod stage;

use onde_broker::Broker;
use onde_broker::audit::audit;
use onde_broker::ledger::Ledger;
use onde_broker::payments::Webhook;
use onde_broker::refusal::Refusal;
use onde_broker::store::Store;
use onde_broker::watch::Heard;
use onde_client::api::*;
use onde_wire::machine::Stage;
use stage::*;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// More steps than a life can have: the test ends before.
const STEPS_MAX: u64 = 500;
/// SIGABRT.
const ABORTED: i32 = 6;

pub fn main() {
    let args: Vec<_> = std::env::args().collect();
    match args.iter().position(|arg| arg == "--life") {
        Some(at) => {
            let step = args[at + 2].parse().expect("a number");
            life(Path::new(&args[at + 1]), step, &args[at + 3], &args[at + 4]);
        }
        None => TALES.iter().for_each(every_step_can_be_the_last),
    }
}

/// What happens once in a life, and how it leaves the books: micro-tokens of cash, customers, jobs and the owner, and acts.
struct Tale {
    name: &'static str,
    /// What comes before, without a death: other tales tell of it.
    prepare: fn(&Broker, &str, Instant),
    tell: fn(&Broker, &str, Instant),
    tokens: [i64; 4],
    acts: i64,
}

const TALES: [Tale; 3] = [
    Tale { name: "buys", prepare: |_, _, _| (), tell: buys, tokens: [-100, 96, 0, 4], acts: 4 },
    Tale {
        name: "renews",
        prepare: |broker, name, _| open_account(broker, name),
        tell: renews,
        tokens: [-50, 43, 0, 7],
        acts: 5,
    },
    Tale { name: "ends", prepare: open_four, tell: ends, tokens: [-100, 92, 0, 8], acts: 9 },
];

/// An account, a credit, a purchase, a payment, a certificate redeemed.
fn buys(broker: &Broker, name: &str, now: Instant) {
    open_account(broker, name);
    credit(broker, name);
    let job = open_job(broker, name, "boot", 1, now);
    assert_eq!(sell(broker, name, &job, "more", 5).index, 15);
    let settled = broker.redeem(name, &job.id.0, &certificate(&job, 15, 4 * TOKEN).0);
    assert_eq!(settled.expect("settled").refund_micro, 11 * TOKEN);
}

/// A shop's payment, and tokens up to the end of a chain and of the next one.
fn renews(broker: &Broker, name: &str, now: Instant) {
    let at = broker.store().unix_s();
    let (reference, account) = (name.to_owned(), name.to_owned());
    let body = json(&PaidRequest { reference, account, micro: 50 * TOKEN });
    let signature = Webhook::new(WEBHOOK).sign(at, body.as_bytes());
    broker.webhook_paid(&signature, body.as_bytes(), at).expect("credited");
    let job = open_job(broker, name, "boot", 1, now);
    let end = sell(broker, name, &job, "end", 9);
    assert_eq!((end.index, end.renewal), (18, None), "no more than the chain has");
    let next = sell(broker, name, &job, "next", 3);
    assert_eq!((next.index, next.renewal.map(|renewal| renewal.index)), (21, Some(18)));
    broker.redeem(name, &job.id.0, &certificate(&job, 21, 7 * TOKEN).0).expect("settled");
}

/// All ends of jobs that no customer asks for: never shown, its node restarted, its node silent, its certificate fetched.
fn ends(broker: &Broker, name: &str, now: Instant) {
    let jobs = broker.jobs(name, false, i64::MAX, 9).expect("jobs").jobs;
    let [fetched, silent, restarted, unused] = jobs.try_into().expect("four, the newest first");
    let said = |job: &Job, stage, spent| Heard::Status(job.id.0, status(stage, spent * TOKEN));
    let heard = [
        Heard::Gone(unused.id.0, true),
        said(&restarted, Stage::Running, 3),
        said(&silent, Stage::Running, 1),
        said(&fetched, Stage::Ended, 4),
    ];
    broker.hear(&heard, now).expect("heard");
    let bytes = certificate(&fetched, 10, 4 * TOKEN).0;
    broker.hear(&[Heard::Certificate(fetched.id.0, bytes)], now).expect("heard");
    for second in (0..=63).step_by(9) {
        let now = now + Duration::from_secs(second);
        for node in [hello(1, 1), hello(2, 2)] {
            hear(broker, node, now);
        }
        broker.tick(now).expect("ticked");
    }
    let open = broker.jobs(name, true, i64::MAX, 9).expect("jobs").jobs;
    assert!(open.is_empty(), "{open:?}");
    use SettledBy::{Certificate, NodeRestarted, NodeSilent, Unused};
    let ends = [
        (&unused, Unused),
        (&restarted, NodeRestarted),
        (&silent, NodeSilent),
        (&fetched, Certificate),
    ];
    for (job, by) in ends {
        let job = broker.job(name, &job.id.0).expect("a job");
        assert_eq!(job.settled_by, Some(by));
    }
}

/// A job on each of four nodes; again: the same ones.
fn open_four(broker: &Broker, name: &str, now: Instant) {
    open_account(broker, name);
    credit(broker, name);
    for node in 1..=4 {
        open_job(broker, name, &format!("on {node}"), node, now);
    }
}

fn open_account(broker: &Broker, name: &str) {
    match broker.open_account(&AccountRequest { name: name.into() }) {
        Ok(_) | Err(Refusal::AccountExists) => {}
        Err(error) => panic!("{error}"),
    }
}

fn credit(broker: &Broker, name: &str) {
    let credit = CreditRequest { idempotency_key: name.into(), micro: 100 * TOKEN };
    broker.credit_account(name, &credit).expect("money");
}

fn open_job(broker: &Broker, name: &str, key: &str, node: u32, now: Instant) -> Job {
    let (idempotency_key, node) = (key.into(), Some(NodeChoice::Number(node)));
    let request = JobRequest { idempotency_key, node, ..purchase(10) };
    broker.open_job(name, &request, now).expect("a job").job
}

fn sell(broker: &Broker, name: &str, job: &Job, key: &str, count: u32) -> Payment {
    let request = TokensRequest { idempotency_key: key.into(), count };
    broker.sell_tokens(name, &job.id.0, &request).expect("tokens")
}

/// All of a tale; the process dies at `step`, 0 for never.
fn life(dir: &Path, step: u64, tale: &str, name: &str) {
    let now = Instant::now();
    let ledger = Ledger::open(&place(dir)).expect("a ledger");
    let broker = Broker::new(cluster(), ledger, OPERATOR, now).with_webhook(WEBHOOK);
    let broker = broker.with_chains(3);
    (1..=4).for_each(|node| hear(&broker, hello(node, 1), now));
    let tale = TALES.iter().find(|known| known.name == tale).expect("a tale");
    if tale.name != "ends" {
        hear_unbooted(&broker, now);
    }
    (tale.prepare)(&broker, name, now);
    broker.store().die_at(step);
    (tale.tell)(&broker, name, now);
    broker.store().die_at(0);
}

/// Whether the process lived to its end.
fn lives(dir: &Path, step: u64, tale: &Tale, name: &str) -> bool {
    let mut command = Command::new(std::env::current_exe().expect("this file"));
    command.arg("--life").arg(dir).args([&step.to_string(), tale.name, name]);
    let status = command.status().expect("a process");
    assert!(status.success() || status.signal() == Some(ABORTED), "step {step}: {status}");
    status.success()
}

fn every_step_can_be_the_last(tale: &Tale) {
    let dir = Dir::new();
    // Makes the store before the first life, so that no step of that is one of its making.
    let store = Store::open(&place(&dir.0)).expect("a store");
    for step in 1..STEPS_MAX {
        let name = format!("a{step}");
        let told = format!("{} at step {step}", tale.name);
        let survived = lives(&dir.0, step, tale, &name);
        audit(&store, None).unwrap_or_else(|error| panic!("dead, {told}: {error}"));
        assert!(survived || lives(&dir.0, 0, tale, &name), "nobody ends the second");
        let books = audit(&store, None).unwrap_or_else(|error| panic!("after, {told}: {error}"));
        let lives = i64::try_from(step).expect("a small number");
        let micro: Vec<_> = books.micro.values().copied().collect();
        assert_eq!(micro, tale.tokens.map(|tokens| tokens * TOKEN as i64 * lives), "{told}");
        assert_eq!(books.acts, tale.acts * lives, "each act once, {told}");
        if survived {
            assert!(step > 30, "{step} steps are too few: this proved nothing");
            println!(
                "faults: {}: killed at each of {} steps: the books balance",
                tale.name,
                step - 1
            );
            return;
        }
    }
    panic!("a life of more than {STEPS_MAX} steps");
}
