//! Home nodes: they pay for what makes progress, never beyond the budget, and survive their own death.

use std::fs;

use anyhow::{Context, Result, ensure};
use onde_client::api::{CreditRequest, SettledBy};
use onde_client::broker::new_key;
use onde_client::echo::Echo;
use onde_client::home::Home;
use onde_client::job::Jobs;
use onde_wire::chain::STEPS_MAX;
use onde_wire::cluster::TOKEN_MICRO;
use onde_wire::machine::Stage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::world::{World, wait};

/// Uses all of one processor.
const BUSY: [&str; 4] = ["--", "/bin/sh", "-c", "while :; do :; done"];

/// A job whose customer's check fails is left to run dry, and not one token is bought for it.
pub fn without_progress(world: &World) -> Result<()> {
    let order = ["--name", "idle", "--tokens", "30", "--budget", "300", "--while", "exit 1"];
    world.onde([&["run", "-d"], &order[..], &BUSY].concat())?;
    let job = world.newest_job()?;
    wait("the VM to run dry", || {
        Ok(state(world, "idle")?.is_none_or(|row| row["state"] != "running"))
    })?;
    let job = world.broker.job(&job.id.0)?;
    ensure!(job.sold == 30, "{} tokens sold", job.sold);
    stop(world, "idle")
}

/// However long it runs, a job costs what was allowed and no token more.
pub fn budget(world: &World) -> Result<()> {
    let order = ["--name", "modest", "--tokens", "20", "--budget", "33"];
    world.onde([&["run", "-d"], &order[..], &BUSY].concat())?;
    let id = world.newest_job()?.id.0;
    wait(
        "the budget to be used up",
        || Ok(world.broker.job(&id)?.spent_micro >= 30 * TOKEN_MICRO),
    )?;
    wait("the VM to run dry", || {
        Ok(state(world, "modest")?.is_none_or(|row| row["state"] != "running"))
    })?;
    let job = world.broker.job(&id)?;
    ensure!(job.sold == 33, "{} tokens sold", job.sold);
    stop(world, "modest")
}

/// The wallet is killed; its job runs on with what it was paid; the next wallet goes on paying. Once the job is
/// stopped there is nothing left to serve.
pub fn killed(world: &World) -> Result<()> {
    let before = world.balance()?;
    let order = ["--name", "kept", "--tokens", "20", "--budget", "400"];
    world.onde([&["run", "-d"], &order[..], &BUSY].concat())?;
    let id = world.newest_job()?.id.0;
    let wallet = wallet(world)?;
    kill_process(wallet, Signal::KILL)?;
    wait("the wallet to be dead", || Ok(!is_running(wallet)))?;
    let mut serve = world.command(["wallet", "serve"])?.spawn()?;
    let seen = wait("the next wallet to pay", || {
        let index = state(world, "kept")?.map_or(0, |row| row["spent_micro"].as_u64().unwrap_or(0));
        Ok(index > 25 * TOKEN_MICRO)
    })
    .and_then(|()| {
        let second = world.command(["wallet", "serve", "--until-idle"])?.output()?;
        Ok((world.onde(["ps", "--cost"])?, second))
    });
    serve.kill()?;
    serve.wait()?;
    let (told, second) = seen?;
    ensure!(told.contains("DRY IN") && told.contains("400"), "{told}");
    ensure!(second.status.success(), "a second wallet does not give way");
    // One more detached job brings a wallet back, which takes both.
    world.onde(["run", "-d", "--name", "short", "--", "/bin/true"])?;
    wait("the short job to be settled", || Ok(world.newest_job()?.settled_by.is_some()))?;
    let wallet = self::wallet(world)?;
    world.onde(["stop", "kept"])?;
    wait("the wallet to end with its last job", || Ok(!is_running(wallet)))?;
    let (job, short) = (world.broker.job(&id)?, world.newest_job()?);
    ensure!(job.sold <= 400, "{} tokens sold", job.sold);
    ensure!(before - world.balance()? == world.cost(&job)? + world.cost(&short)?, "the books");
    let told: serde_json::Value =
        serde_json::from_str(&world.onde(["wallet", "statement", "--json"])?)?;
    let rows = told.as_array().context("no list")?;
    let of_job = |key: &str| -> u64 {
        let rows = rows.iter().filter(|row| row["name"] == "kept");
        rows.filter_map(|row| row[key].as_u64()).sum()
    };
    let cost = of_job("bought_micro") - of_job("back_micro");
    ensure!(cost == world.cost(&job)?, "the statement says {cost}");
    Ok(())
}

/// A guest with a purse outlives its wallet: it pays more than the node was ever given.
pub fn purse(world: &World) -> Result<()> {
    let order = ["--name", "own", "--tokens", "20", "--budget", "120", "--purse", "40"];
    world.onde([&["run", "-d"], &order[..], &BUSY].concat())?;
    // Noted once it is delivered. The guest may pay with it before its home node releases anything.
    wait("a purse", || Ok(job_file(world)?["purse_last"].as_u64() > Some(40)))?;
    let wallet = wallet(world)?;
    kill_process(wallet, Signal::KILL)?;
    let released = job_file(world)?["released"].as_u64().context("no number")?;
    wait("the guest to pay", || {
        let spent = state(world, "own")?.map_or(0, |row| row["spent_micro"].as_u64().unwrap_or(0));
        Ok(spent > (released + 2) * TOKEN_MICRO)
    })?;
    stop(world, "own")
}

/// A job buys more than a million tokens: its chain comes to its end, and its VM goes on with the next.
pub fn chain_ends(world: &World) -> Result<()> {
    const CHAIN: u32 = 1 << 20;
    let micro = 2 * u64::from(CHAIN) * TOKEN_MICRO;
    let credit = CreditRequest { idempotency_key: new_key()?, micro };
    world.operator.credit("customer", &credit)?;
    let before = world.balance()?;
    world.onde([&["run", "-d", "--name", "rich", "--tokens", "20"], &BUSY[..]].concat())?;
    let jobs = Jobs::open(&world.file("state/onde/jobs"))?;
    let job = jobs.find("rich")?;
    let mut home = Home::new(Echo::open()?, world.broker.clone(), jobs.clone(), &job);
    let mut status = home.pay(STEPS_MAX)?;
    while status.last_index < job.sold + CHAIN + 100 {
        status = home.pay(STEPS_MAX)?;
        ensure!(status.stage == Stage::Running, "{status:?}");
    }
    ensure!(jobs.get(&job.id.0)?.renewals.is_empty(), "the node has seen the new chain");
    let spent = status.spent_micro;
    wait("the VM to go on", || {
        let row = state(world, "rich")?.context("the job is gone")?;
        ensure!(row["state"] == "running", "{row}");
        Ok(row["spent_micro"].as_u64() > Some(spent + TOKEN_MICRO))
    })?;
    stop(world, "rich")?;
    let job = world.broker.job(&job.id.0)?;
    ensure!(job.settled_by == Some(SettledBy::Certificate), "{job:?}");
    ensure!(before - world.balance()? == world.cost(&job)?, "the books");
    ensure!(world.cost(&job)? < 1000 * TOKEN_MICRO, "the change of all that came back: {job:?}");
    Ok(())
}

/// The newest job's file.
fn job_file(world: &World) -> Result<serde_json::Value> {
    let file = format!("state/onde/jobs/{}.json", world.newest_job()?.id);
    Ok(serde_json::from_slice(&fs::read(world.file(&file))?)?)
}

/// A job's row in `onde ps`, where it is open.
fn state(world: &World, name: &str) -> Result<Option<serde_json::Value>> {
    let rows: serde_json::Value = serde_json::from_str(&world.onde(["ps", "--json"])?)?;
    let rows = rows.as_array().context("no list")?;
    Ok(rows.iter().find(|row| row["name"] == name).cloned())
}

/// Gives a job's VM back, if it is not gone by itself.
fn stop(world: &World, name: &str) -> Result<()> {
    world.onde(["stop", name]).map(drop)
}

/// Whether any thread of a process is alive: its first one may be dead while another still holds the process's locks.
fn is_running(pid: Pid) -> bool {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    matches!(poll(&mut ended, Some(&Timespec::default())), Ok(0))
}

/// The process that serves the customer's detached jobs, once there is one.
fn wallet(world: &World) -> Result<Pid> {
    let mut found = None;
    wait("a wallet to serve", || {
        for entry in fs::read_dir(world.file("state/onde/jobs"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("wallet-") {
                // Empty between its lock and its words.
                let pid = fs::read_to_string(entry.path())?.trim().parse().ok();
                found = pid.and_then(Pid::from_raw).filter(|pid| is_running(*pid));
            }
        }
        Ok(found.is_some())
    })?;
    found.context("no wallet")
}
