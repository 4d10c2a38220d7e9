//! Ends a broker process at every statement and every commit of a purchase, a payment and a refund, one after the
//! other; then a second process repeats what the first was asked, under the same idempotency keys. No token is sold
//! twice, none is lost, and the books balance at once after the death as well as at the end. This file is its own
//! broker process: the test starts itself with `--life DIR STEP NAME`.

mod stage;

use onde_broker::audit::audit;
use onde_broker::refusal::Refusal;
use onde_broker::store::Store;
use onde_client::api::*;
use stage::*;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// More steps than a life can have: the test ends before.
const STEPS_MAX: u64 = 500;
/// SIGABRT.
const ABORTED: i32 = 6;

pub fn main() {
    let args: Vec<_> = std::env::args().collect();
    match args.iter().position(|arg| arg == "--life") {
        Some(at) => {
            life(Path::new(&args[at + 1]), args[at + 2].parse().expect("a number"), &args[at + 3])
        }
        None => every_step_can_be_the_last(),
    }
}

/// All that a customer can ask for, once; the process dies at `step`, 0 for never.
fn life(dir: &Path, step: u64, name: &str) {
    let now = Instant::now();
    let broker = broker(dir, now);
    hear(&broker, hello(1, 1), now);
    hear_unbooted(&broker, now);
    broker.store().die_at(step);
    match broker.open_account(&AccountRequest { name: name.into() }) {
        Ok(_) | Err(Refusal::AccountExists) => {}
        Err(error) => panic!("{error}"),
    }
    let credit = CreditRequest { idempotency_key: name.into(), micro: 100 * TOKEN };
    broker.credit_account(name, &credit).expect("money");
    let boot = JobRequest { idempotency_key: "boot".into(), ..purchase(10) };
    let job = broker.open_job(name, &boot, now).expect("a job").job;
    let more = TokensRequest { idempotency_key: "more".into(), count: 5 };
    let paid = broker.sell_tokens(name, &job.id.0, &more).expect("tokens");
    assert_eq!(paid.index, 15);
    let settled = broker.redeem(name, &job.id.0, &certificate(&job, 15, 4 * TOKEN).0);
    assert_eq!(settled.expect("settled").refund_micro, 11 * TOKEN);
    broker.store().die_at(0);
}

/// Whether the process lived to its end.
fn lives(dir: &Path, step: u64, name: &str) -> bool {
    let mut command = Command::new(std::env::current_exe().expect("this file"));
    command.arg("--life").arg(dir).args([&step.to_string(), name]);
    let status = command.status().expect("a process");
    assert!(status.success() || status.signal() == Some(ABORTED), "step {step}: {status}");
    status.success()
}

fn every_step_can_be_the_last() {
    let dir = Dir::new();
    // Makes the store before the first life, so that no step of that is one of its making.
    let store = Store::open(&place(&dir.0)).expect("a store");
    for step in 1..STEPS_MAX {
        let name = format!("a{step}");
        let survived = lives(&dir.0, step, &name);
        audit(&store, None).unwrap_or_else(|error| panic!("dead at step {step}: {error}"));
        assert!(survived || lives(&dir.0, 0, &name), "nobody ends the second");
        let books =
            audit(&store, None).unwrap_or_else(|error| panic!("after step {step}: {error}"));
        let lives = i64::try_from(step).expect("a small number");
        let token = TOKEN as i64;
        let micro: Vec<_> = books.micro.values().copied().collect();
        assert_eq!(micro, [-100 * token * lives, 96 * token * lives, 0, 4 * token * lives]);
        assert_eq!(books.acts, 4 * lives, "each act once");
        if survived {
            assert!(step > 30, "{step} steps are too few: this proved nothing");
            println!("faults: killed at each of {} steps: the books balance", step - 1);
            return;
        }
    }
    panic!("a life of more than {STEPS_MAX} steps");
}
