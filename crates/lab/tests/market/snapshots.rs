//! Cases in which a running VM becomes a file, and the file VMs.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::world::{World, wait};

/// Counts in a shell's memory, and says how far it is in a file that is memory, too.
const COUNT: &str = "i=0; while :; do i=$((i + 1)); echo $i > /dev/shm/count; sleep 0.05; done";
/// The file is empty for an instant at each step.
const READ: &str = "until read n < /dev/shm/count; do :; done; echo $n";
const IDENTITY: &str = "read name < /proc/sys/kernel/hostname; read random < /proc/sys/kernel/random/uuid; \
                        echo $name; echo $random";

/// How far a job's program has counted.
fn count(world: &World, job: &str) -> Result<u64> {
    let told = world.onde(["exec", job, "--", "/bin/sh", "-c", READ])?;
    told.trim().parse().with_context(|| format!("job {job} counts {told:?}"))
}

/// A job's program goes on counting.
fn goes_on(world: &World, job: &str) -> Result<()> {
    let before = count(world, job)?;
    wait("the counter to go on", || Ok(count(world, job)? > before))
}

/// A program goes on counting in its VM, and in two others that are made of one snapshot, where it left off
/// then; they have names, addresses and random numbers of their own.
pub fn wakes_up_twice(world: &World) -> Result<()> {
    let file = world.file("machine");
    let file = file.to_str().context("a path")?;
    let order = ["run", "-d", "--name", "source", "--memory", "128", "--file", "/usr/bin/sleep"];
    world.onde([&order[..], &["--", "/bin/sh", "-c", COUNT]].concat())?;
    wait("the program to count", || Ok(count(world, "source")? >= 20))?;
    let before = count(world, "source")?;
    let told = world.onde(["snapshot", "source", "-o", file, "--json"])?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    println!("  {told}");
    ensure!(told["size"].as_u64() == Some(fs::metadata(file)?.len()), "{told}");
    let after = count(world, "source")?;
    goes_on(world, "source")?;

    let ids = world.onde(["boot", "--from", file, "-n", "2"])?;
    let ids: Vec<_> = ids.lines().collect();
    ensure!(ids.len() == 2, "{ids:?}");
    let mut told = vec![world.onde(["exec", "source", "--", "/bin/sh", "-c", IDENTITY])?];
    for &id in &ids {
        ensure!(count(world, id)? >= before, "job {id} does not go on where {before} was");
        goes_on(world, id)?;
        told.push(world.onde(["exec", id, "--", "/bin/sh", "-c", IDENTITY])?);
        let name = told.last().and_then(|told| told.lines().next()).unwrap_or_default();
        ensure!(name == format!("onde-{id}"), "job {id} has the name {name}");
    }
    told.sort();
    told.dedup();
    ensure!(told.len() == 3, "not three machines: {told:?}");
    ensure!(count(world, "source")? > after, "the source does not go on");
    for job in ids.into_iter().chain(["source"]) {
        world.onde(["stop", job])?;
    }
    // What is cut is refused before anything is bought.
    let bytes = fs::read(file)?;
    fs::write(file, &bytes[..bytes.len() - 1])?;
    let money = world.balance()?;
    world.onde_fails(["boot", "--from", file], 1, "incomplete")?;
    ensure!(world.balance()? == money, "a damaged file cost money");
    Ok(())
}
