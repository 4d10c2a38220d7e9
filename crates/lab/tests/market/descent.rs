//! Cases in which a VM goes to its node's disk: because somebody wants it, or because its tokens ran out; and comes back,
//! or does not.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use onde_client::api::SettledBy;

use crate::world::{World, wait};

/// Says numbers, about eight a second.
const COUNT: &str = "i=0; while [ $i -lt 4000 ]; do i=$((i + 1)); echo $i; sleep 0.1; done";
/// Uses a processor up meanwhile.
const SPIN: &str = "while :; do :; done & ";
/// Tokens for a VM that boots, says a few numbers, and runs dry: soon, as it spins.
const DRY: &str = "16";
/// How much later than said a purge may be seen: the node looks once a second, and emulated ones are slow.
const LATE_MAX: Duration = Duration::from_secs(20);

/// Starts the counter as a detached job, with `beside` to do meanwhile.
fn start(world: &World, name: &str, budget: &str, beside: &str) -> Result<()> {
    let order =
        ["run", "-d", "--name", name, "--memory", "128", "--tokens", budget, "--budget", budget];
    let script = [beside, COUNT].concat();
    let program = ["--file", "/usr/bin/sleep", "--", "/bin/sh", "-c", &script];
    world.onde([&order[..], &program].concat())?;
    wait("the program to count", || Ok(said(world, name)? >= 3))
}

/// How many numbers the program has said; each once, in order, none missing.
fn said(world: &World, name: &str) -> Result<u64> {
    let told = world.onde(["logs", name])?;
    // The last line may not be whole yet.
    let whole = told.rfind('\n').map_or("", |end| &told[..end]);
    for (line, number) in whole.lines().zip(1u64..) {
        ensure!(line == number.to_string(), "{line:?} instead of {number}");
    }
    Ok(whole.lines().count() as u64)
}

fn status(world: &World, name: &str) -> Result<serde_json::Value> {
    Ok(serde_json::from_str(&world.onde(["status", name, "--json"])?)?)
}

fn stage(world: &World, name: &str) -> Result<String> {
    Ok(status(world, name)?["stage"].as_str().context("no stage")?.to_owned())
}

/// Ends the job; its account lost what the node charged, and no more.
fn settle(world: &World, name: &str, before: u64) -> Result<()> {
    world.onde(["stop", name])?;
    let job = world.newest_job()?;
    ensure!(job.settled_by == Some(SettledBy::Certificate), "{:?}", job.settled_by);
    ensure!(before - world.balance()? == world.cost(&job)?, "the books do not balance");
    Ok(())
}

pub fn by_hand(world: &World) -> Result<()> {
    let before = world.balance()?;
    start(world, "sleeper", "100", "")?;
    let free = world.hello(world.newest_job()?.node)?.mem_mib_free;
    for _ in 0..3 {
        let told = world.onde(["suspend", "sleeper"])?;
        ensure!(told.contains("on the disk of node"), "{told:?}");
        let asleep = status(world, "sleeper")?;
        ensure!(asleep["stage"] == "suspended", "{asleep}");
        let node = world.newest_job()?.node;
        // A node renews what HELLO says once a second.
        let is_free = || Ok(world.hello(node)?.mem_mib_free > free + 100);
        wait("the VM's memory to be free", is_free)?;
        // Only its disk is charged.
        let rate = asleep["burn_micro_per_s"].as_u64().context("no rate")?;
        ensure!((1..20_000).contains(&rate), "{asleep}");
        let count = said_before(world, "sleeper")?;
        let told = world.onde(["resume", "sleeper"])?;
        ensure!(told.contains("runs on node"), "{told:?}");
        wait("the program to go on", || Ok(said(world, "sleeper")? > count + 5))?;
    }
    settle(world, "sleeper", before)
}

/// What the home node kept of the program's words while its VM is away.
fn said_before(world: &World, name: &str) -> Result<u64> {
    let job = world.newest_job()?;
    let file = world.file("state").join("onde/jobs").join(format!("{}.out", job.id));
    let told =
        std::fs::read_to_string(&file).with_context(|| format!("{name}: {}", file.display()))?;
    Ok(told.lines().count() as u64)
}

pub fn dry_then_paid(world: &World) -> Result<()> {
    let before = world.balance()?;
    start(world, "dry", DRY, SPIN)?;
    wait("the VM to be asleep", || Ok(stage(world, "dry")? == "suspended"))?;
    let asleep = status(world, "dry")?;
    ensure!(asleep["wake_micro"].as_u64() > Some(0), "{asleep}");
    ensure!(asleep["balance_micro"].as_u64() > Some(0), "{asleep}");
    let count = said_before(world, "dry")?;
    world.onde(["pay", "dry", "40"])?;
    wait("the VM to be awake", || Ok(stage(world, "dry")? == "running"))?;
    wait("the program to go on", || Ok(said(world, "dry")? > count + 5))?;
    settle(world, "dry", before)
}

pub fn purged_in_time(world: &World) -> Result<()> {
    let before = world.balance()?;
    start(world, "gone", DRY, SPIN)?;
    wait("the VM to be asleep", || Ok(stage(world, "gone")? == "suspended"))?;
    let (asked, mut last) = (Instant::now(), Instant::now());
    let purge_s = status(world, "gone")?["purge_s"].as_u64().context("no time")?;
    ensure!(purge_s > 5, "purged in {purge_s} s already");
    wait("the purge", || {
        // The home node settles what is over, and then the node is not asked any more.
        let stands = stage(world, "gone").unwrap_or_else(|_| "settled".into());
        if stands == "suspended" {
            last = Instant::now();
        }
        Ok(stands != "suspended")
    })?;
    let promised = Duration::from_secs(purge_s);
    // `last` was taken after the answer, so it is not before what the answer was true for.
    ensure!(last - asked + Duration::from_secs(2) >= promised, "gone after {:?}", last - asked);
    ensure!(asked.elapsed() < promised + LATE_MAX, "there for {:?}", asked.elapsed());
    wait("the job to be settled", || Ok(world.newest_job()?.settled_by.is_some()))?;
    let job = world.newest_job()?;
    let all = u64::from(job.sold) * job.value_micro;
    ensure!(world.cost(&job)? == all, "it cost {} of {all}", world.cost(&job)?);
    ensure!(before - world.balance()? == all, "the books do not balance");
    Ok(())
}
