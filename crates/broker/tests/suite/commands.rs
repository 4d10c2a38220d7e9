//! `broker audit`, `broker backup` and `broker restore` as an owner runs them: the program itself, over real ledgers.

use crate::stage::*;
use onde_broker::ledger::Ledger;
use onde_broker::refusal::Refusal;
use onde_broker::watch::Heard;
use onde_broker::{Broker, store::Store};
use onde_client::api::*;
use onde_wire::machine::Stage as VmStage;
use onde_wire::packet::JobStatus;
use std::process::{Command, Output};
use std::time::Instant;

/// Runs the program.
fn broker_command(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_broker"));
    command.args(args).env_remove("DATABASE_URL").output().expect("the program runs")
}

/// Runs the program, which must succeed; what it printed.
fn run(args: &[&str]) -> String {
    let done = broker_command(args);
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("text")
}

/// Runs the program, which must fail with a line that says `word`, and a clear one: no panic.
fn check_fails(args: &[&str], word: &str) {
    let done = broker_command(args);
    let told = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{args:?}: {told}");
    assert!(told.starts_with("broker: ") && told.contains(word), "{args:?}: {told}");
}

/// A ledger with a customer, and an open job of ten tokens.
fn with_job(dir: &Dir) -> (String, Job) {
    let now = Instant::now();
    let broker = broker(&dir.0, now);
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: "c".into(), micro: 100 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    let job = broker.open_job("a", &purchase(10), now).expect("a job").job;
    (place(&dir.0), job)
}

fn open(place: &str) -> Broker {
    let broker =
        Broker::new(cluster(), Ledger::open(place).expect("a ledger"), OPERATOR, Instant::now());
    hear(&broker, hello(1, 1), Instant::now());
    hear_unbooted(&broker, Instant::now());
    broker
}

fn sell(place: &str, job: &Job) -> Result<Payment, Refusal> {
    let request = TokensRequest { idempotency_key: fresh_key(), count: 3 };
    open(place).sell_tokens("a", &job.id.0, &request)
}

/// The ACT:DIGEST that an audit prints.
fn noted(told: &str) -> String {
    let words = told.lines().next().expect("a line").rsplit(' ');
    words.take(1).collect()
}

#[test]
fn an_audit_proves_the_books_or_names_the_first_bad_act() {
    let dir = Dir::new();
    let (place, job) = with_job(&dir);
    let told = run(&["audit", "--db", &place]);
    assert!(told.starts_with("the books balance: 2 acts"), "{told}");
    let before = noted(&told);
    sell(&place, &job).expect("sold");
    let told = run(&["audit", "--db", &place, "--noted", &before]);
    assert!(told.contains("3 acts") && told.contains("job "), "{told}");
    let after = noted(&told);
    let other = after.replacen("3:", "2:", 1);
    check_fails(
        &["audit", "--db", &place, "--noted", &other],
        "act 2 is not the one that was noted",
    );
    tampered(&place, "UPDATE lines SET delta_micro = delta_micro * 2 WHERE act = 2");
    check_fails(&["audit", "--db", &place], "act 2 was altered");
    tampered(&place, "DELETE FROM lines WHERE act = 3; DELETE FROM acts WHERE seq = 3");
    check_fails(&["audit", "--db", &place, "--noted", &after], "act 2 was altered");
    check_fails(&["audit", "--db", "/nowhere/ledger.db"], "there is no ledger");
}

#[test]
fn an_audit_tells_of_frozen_jobs_and_the_operator_thaws_them() {
    let dir = Dir::new();
    let (place, job) = with_job(&dir);
    let broker = open(&place);
    let said = |last_index| {
        let said = JobStatus { last_index, ..status(VmStage::Running, 0) };
        broker.hear(&[Heard::Status(job.id.0, said)], Instant::now()).expect("heard");
    };
    let audit = || run(&["audit", "--db", &place]);
    said(10);
    assert!(!audit().contains("sell no more"));
    said(11);
    assert!(audit().contains("1 open jobs sell no more"), "{}", audit());
    assert_eq!(run(&["thaw", "--db", &place, "--node", "2"]), "0 jobs of node 2 thaw\n");
    assert_eq!(run(&["thaw", "--db", &place, "--node", "1"]), "1 jobs of node 1 thaw\n");
    assert!(audit().contains("sell no more"), "until the node says what fits");
    said(11);
    assert_eq!(run(&["thaw", "--db", &place, "--node", "1"]), "1 jobs of node 1 thaw\n");
    said(10);
    assert!(!audit().contains("sell no more"));
    check_fails(&["thaw", "--db", "/nowhere/ledger.db", "--node", "1"], "there is no ledger");
}

/// Into `place`: a backup made while a broker sells. What may have been sold since is not sold again.
fn check_restore(place: &str) {
    let dir = Dir::new();
    let (old, job) = with_job(&dir);
    let at_work = open(&old);
    let file = dir.0.join("backup");
    let file = file.to_str().expect("UTF-8");
    run(&["backup", "--db", &old, file]);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(file).expect("it is there").permissions(),
    );
    assert_eq!(mode & 0o777, 0o600, "it holds secrets");
    check_fails(&["backup", "--db", &old, file], "writing the backup");
    let told = run(&["audit", "--db", &old]);
    let request = TokensRequest { idempotency_key: fresh_key(), count: 3 };
    at_work.sell_tokens("a", &job.id.0, &request).expect("sold after the backup");

    assert_eq!(run(&["restore", "--db", place, file]), told, "the same books");
    check_fails(&["restore", "--db", place, file], "not empty");
    check_fails(&["restore", "--db", place, "/nowhere/backup"], "reading the backup");
    let refused = sell(place, &job);
    assert!(matches!(refused, Err(Refusal::JobFrozen)), "{refused:?}");
    let new = open(place).open_job("a", &purchase(1), Instant::now()).expect("a new job").job;
    sell(place, &new).expect("has tokens of its own");
    assert!(run(&["audit", "--db", place]).contains("the books balance"));
}

#[test]
fn a_backup_made_while_selling_restores_and_sells_nothing_twice() {
    let dir = Dir::new();
    let place = dir.0.join("restored.db").to_str().expect("UTF-8").to_owned();
    check_restore(&place);
    if ON_POSTGRES {
        check_restore(&server::database());
    }
}

#[test]
fn a_damaged_backup_restores_nothing() {
    let dir = Dir::new();
    let (place, _) = with_job(&dir);
    let (whole, half, restored) =
        (dir.0.join("whole"), dir.0.join("half"), dir.0.join("restored.db"));
    let path = |file: &std::path::Path| file.to_str().expect("UTF-8").to_owned();
    run(&["backup", "--db", &place, &path(&whole)]);
    let bytes = std::fs::read(&whole).expect("read");
    std::fs::write(&half, &bytes[..bytes.len() / 2]).expect("written");
    check_fails(&["restore", "--db", &path(&restored), &path(&half)], "");
    let store = Store::open(&path(&restored)).expect("a store");
    let rows: i64 =
        store.read(|tx| tx.value("SELECT count(*) FROM accounts", &[])).expect("a count");
    assert_eq!(rows, 0);
}
