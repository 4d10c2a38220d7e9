//! Things that fail on the customer's, the broker's and the node's side: the customer hears of it and
//! pays for nothing that was not had.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use onde_client::api::SettledBy;
use onde_lab::programs;
use rustix::process::{Pid, Signal, kill_process};

use crate::world::{World, wait};

pub fn cannot_run(world: &World) -> Result<()> {
    let before = world.balance()?;
    world.onde_fails(["run", "--", "no-such-program"], 125, "no-such-program")?;
    let foreign = world.file("foreign");
    fs::write(&foreign, foreign_elf())?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&foreign, mode)?;
    let path = foreign.display().to_string();
    world.onde_fails(["run", "--", &path], 125, "x86-64")?;
    world.onde_fails(["boot", "--kernel", "/etc/passwd"], 1, "kernel")?;
    world.onde_fails(["run", "--memory", "65536", "--", "/bin/true"], 125, "hint:")?;
    ensure!(world.balance()? == before, "it cost something");
    let poor = world.operator.open_account("poor")?;
    world.onde(["account", "use", &poor.key, "--context", "poor"])?;
    world.onde(["context", "use", "default"])?;
    world.onde_fails(["--context", "poor", "run", "--", "/bin/true"], 125, "hint:")
}

/// The head of a program for another processor (ARM).
fn foreign_elf() -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16] = 2;
    elf[18] = 183;
    elf[20] = 1;
    elf[52] = 64;
    elf
}

/// A job's tokens run out: its VM goes, the customer is told, and the account lost exactly the budget.
pub fn out_of_tokens(world: &World) -> Result<()> {
    let before = world.balance()?;
    // It spins, so that they do soon.
    let spin = "while :; do :; done";
    let run = ["run", "--tokens", "6", "--budget", "6", "--", "/bin/sh", "-c", spin];
    world.onde_fails(run, 125, "token")?;
    let job = world.newest_job()?;
    ensure!(world.cost(&job)? == 6 * job.value_micro, "it cost {}", world.cost(&job)?);
    ensure!(before - world.balance()? == 6 * job.value_micro, "the books do not balance");
    Ok(())
}

/// The broker dies and comes back: the VM goes on with what it was paid, and its change is not lost. The
/// last case, since it leaves the lab without a broker.
pub fn broker_away(world: &World) -> Result<()> {
    let order = ["--name", "alone", "--tokens", "100", "--budget", "100"];
    let run = [&["run", "-d"], &order[..], &["--", "/usr/bin/sleep", "600"]].concat();
    world.onde(run)?;
    let job = world.newest_job()?;
    let status = world.lab.status()?;
    let broker =
        status.members.iter().find(|member| member.name == "broker").context("no broker")?;
    let pid = Pid::from_raw(broker.pid as i32).context("the broker has no process")?;
    kill_process(pid, Signal::KILL)?;
    wait("the broker to be gone", || {
        Ok(world.command(["node", "ls"])?.output()?.status.code() != Some(0))
    })?;
    world.onde_fails(["node", "ls"], 1, "hint:")?;
    let status: serde_json::Value =
        serde_json::from_str(&world.onde(["status", "alone", "--json"])?)?;
    ensure!(status.to_string().contains("running"), "{status}");
    let dir = world.lab.dir();
    let mut broker = Command::new(programs::find("broker")?)
        .args(["--listen", "198.18.255.1:8400", "--db"])
        .arg(dir.join("broker.db"))
        .arg("--cluster")
        .arg(dir.join("cluster"))
        .arg("--admin-key-file")
        .arg(dir.join("admin.key"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let settled = wait("the broker to be back", || Ok(world.broker.nodes().is_ok()))
        .and_then(|()| world.onde(["stop", "alone"]))
        .and_then(|_| Ok(world.broker.job(&job.id.0)?.settled_by));
    broker.kill()?;
    broker.wait()?;
    ensure!(settled.as_ref().is_ok_and(|by| *by == Some(SettledBy::Certificate)), "{settled:?}");
    Ok(())
}

/// A node loses its power while a job runs there: the customer who waits for it hears of it, and the broker
/// gives back what the node had not charged.
pub fn node_lost(world: &World) -> Result<()> {
    let before = world.balance()?;
    let order = ["--node", "2", "--name", "lost", "--tokens", "200", "--budget", "200"];
    let run = [&["run"], &order[..], &["--", "/usr/bin/cat"]].concat();
    let mut command = world.command(run)?;
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut waiting = piped.spawn()?;
    // What the program says back shows that it runs: a node lost during the upload is another story.
    let mut input = waiting.stdin.take().context("no stdin")?;
    input.write_all(b"up\n")?;
    let mut up = [0; 3];
    if waiting.stdout.as_mut().context("no stdout")?.read_exact(&mut up).is_err() {
        bail!("it did not start: {}", String::from_utf8_lossy(&waiting.wait_with_output()?.stderr));
    }
    wait("the broker to see a charge", || Ok(world.newest_job()?.spent_micro > 0))?;
    let job = world.newest_job()?;
    world.lab.kill_node(2)?;
    world.lab.boot_node(2)?;
    let done = waiting.wait_with_output()?;
    drop(input);
    let told = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.code() == Some(125) && told.contains("lost"), "{}: {told}", done.status);
    let settled = || Ok(world.broker.job(&job.id.0)?.settled_by.is_some());
    wait("the broker to settle", settled)?;
    let job = world.broker.job(&job.id.0)?;
    ensure!(job.settled_by == Some(SettledBy::NodeRestarted), "{:?}", job.settled_by);
    ensure!(world.cost(&job)? == job.spent_micro, "{job:?}");
    ensure!(before - world.balance()? == job.spent_micro, "the books do not balance");
    let listed = world.onde(["ps", "--all"])?;
    ensure!(
        listed.lines().any(|line| line.contains("lost") && line.contains("settled")),
        "{listed}"
    );
    Ok(())
}
