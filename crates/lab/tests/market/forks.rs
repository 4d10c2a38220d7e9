//! Cases in which a running VM becomes many.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use onde_wire::machine::fits_mib;
use serde_json::Value;

use crate::world::{World, wait};

/// Draws a random number and looks who it is, over and over; a line each. It also talks to the host and says
/// when it cannot any more.
const PROGRAM: &str = r#"
echo none > /etc/machine-id
exec 3<>/dev/tcp/198.18.255.1/PORT
(while read -r line <&3; do echo "$line" >&3; done; echo over > /dev/shm/over) &
while :; do
  read -r draw < /proc/sys/kernel/random/uuid
  read -r name < /proc/sys/kernel/hostname
  read -r mac < /sys/class/net/eth0/address
  read -r id < /etc/machine-id
  echo "$draw $name $mac $id" >> /dev/shm/log
  sleep 0.05
done"#;

/// Number of children of the usual case: two levels of the tree.
const COUNT: usize = 3;

fn log(world: &World, job: &str) -> Result<Vec<[String; 4]>> {
    let told = world.onde(["exec", job, "--", "/bin/bash", "-c", "echo \"$(</dev/shm/log)\""])?;
    let lines = told.lines().filter_map(|line| {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        words.try_into().ok()
    });
    Ok(lines.collect())
}

/// Starts the program in a VM called `name`; the host's end of its connection.
fn start(world: &World, name: &str) -> Result<BufReader<std::net::TcpStream>> {
    let listener = TcpListener::bind("198.18.255.1:0")?;
    let script = PROGRAM.replace("PORT", &listener.local_addr()?.port().to_string());
    let order = ["run", "-d", "--name", name, "--memory", "128", "--node", "1"];
    let files = ["--file", "/usr/bin/sleep", "--", "/bin/bash", "-c", &script];
    world.onde([&order[..], &files].concat())?;
    let connection = listener.accept()?.0;
    wait("the program to draw", || Ok(log(world, name)?.len() >= 3))?;
    Ok(BufReader::new(connection))
}

fn fork(world: &World, args: &[&str]) -> Result<(bool, Value)> {
    let mut command = world.command([&["fork", "--json"], args].concat())?;
    let done = command.output()?;
    let complaint = String::from_utf8_lossy(&done.stderr);
    let told: Value = serde_json::from_slice(&done.stdout)
        .with_context(|| format!("{command:?}: {complaint}"))?;
    println!("  {}", complaint.lines().last().unwrap_or_default());
    Ok((done.status.success(), told))
}

fn list<'a>(told: &'a Value, name: &str) -> &'a [Value] {
    told[name].as_array().map_or(&[], |list| list)
}

/// The children of a fork: none ever drew a number or ran a line as somebody else, none has the source's connection, and
/// the source goes on with it.
pub fn are_themselves(world: &World) -> Result<()> {
    let count = std::env::var("ONDE_FORKS").map_or(Ok(COUNT), |count| count.parse())?;
    let money = world.balance()?;
    let mut connection = start(world, "parent")?;
    let args = ["parent", "-n", &count.to_string(), "--nodes", "1,2", "--tokens", "60"];
    let (is_done, told) = fork(world, &[&args[..], &["--budget", "400"]].concat())?;
    ensure!(is_done && list(&told, "made").len() == count, "{told}");
    let depth = list(&told, "made").iter().filter_map(|made| made["depth"].as_u64()).max();
    ensure!(depth > Some(1) || count <= 2, "no child served another: {told}");

    let jobs = list(&told, "made").iter().map(|made| made["job"].as_str().unwrap_or_default());
    let jobs: Vec<_> = jobs.collect();
    let source = log(world, "parent")?;
    let shared: HashSet<_> = source.iter().map(|line| &line[0]).collect();
    let (mut draws, mut names) = (HashSet::new(), HashSet::new());
    for job in &jobs {
        let own = |line: &[String; 4]| !shared.contains(&line[0]);
        wait("a child to draw", || Ok(log(world, job)?.iter().any(own)))?;
        let lines = log(world, job)?;
        ensure!(lines.iter().any(|line| !own(line)), "job {job} remembers nothing of its source");
        for [draw, name, mac, id] in lines.into_iter().filter(own) {
            let is_own = name == format!("onde-{job}") && id.starts_with(job);
            ensure!(is_own, "job {job} ran as {name}, {mac}, {id}");
            ensure!(mac != source[0][2], "job {job} ran with the MAC of its source");
            ensure!(draws.insert(draw), "a number was drawn twice");
            names.insert([name, mac, id]);
        }
        let over = ["exec", job, "--", "/bin/bash", "-c", "[ -e /dev/shm/over ] && echo over"];
        wait("a child to miss the connection", || Ok(world.onde(over)? == "over\n"))?;
    }
    ensure!(names.len() == count, "not {count} machines: {names:?}");
    let guests: HashSet<_> =
        list(&told, "made").iter().map(|made| made["guest"].as_str()).collect();
    ensure!(guests.len() == count, "not {count} addresses: {told}");

    connection.get_mut().write_all(b"still there\n")?;
    let mut line = String::new();
    connection.read_line(&mut line)?;
    ensure!(line == "still there\n", "the source lost its connection: {line:?}");
    let drawn = source.len();
    wait("the source to go on", || Ok(log(world, "parent")?.len() > drawn))?;
    for job in jobs.into_iter().chain(["parent"]) {
        world.onde(["stop", job])?;
    }
    let newest = world.broker.jobs(false, count as u32 + 1)?.jobs;
    let cost = newest.iter().map(|job| world.cost(job)).sum::<Result<u64>>()?;
    ensure!(money - world.balance()? == cost, "the books do not balance");
    Ok(())
}

/// One child's node has no room: it is reported, and the other lives.
pub fn without_room(world: &World) -> Result<()> {
    // What ran there before gives its memory back when it is gone.
    let mut free = 0;
    wait("node 2 to hold nothing", || {
        let hello = world.hello(2)?;
        free = hello.mem_mib_free - 96;
        Ok(hello.mem_mib_free == fits_mib(hello.mem_mib))
    })?;
    let order = ["run", "-d", "--name", "large", "--node", "2", "--memory", &free.to_string()];
    world.onde([&order[..], &["--", "/usr/bin/sleep", "600"]].concat())?;
    drop(start(world, "parent")?);
    let (is_done, told) = fork(world, &["parent", "-n", "2", "--nodes", "1,2", "--tokens", "60"])?;
    let (made, failed) = (list(&told, "made"), list(&told, "failed"));
    ensure!(!is_done && made.len() == 1 && failed.len() == 1, "{told}");
    ensure!(failed[0]["node"] == 2 && failed[0]["why"].as_str() != Some(""), "{told}");
    let job = made[0]["job"].as_str().context("no job")?;
    wait("the child to go on", || Ok(!log(world, job)?.is_empty()))?;
    for job in [job, "parent", "large"] {
        world.onde(["stop", job])?;
    }
    Ok(())
}

/// Fills memory with what does not pack, so that a copy takes a minute and more, says so, and uses up what it was paid.
const FILL: &str =
    "/bin/head -c 120M /dev/urandom > /dev/shm/noise; echo full; while :; do :; done";
/// Tokens for a VM that boots and is filled, on a slow machine, too.
const DRY: &str = "40";
/// A VM with so few seconds left runs dry in the first minute of a copy.
const NEARLY_DRY_S: u64 = 25;

/// The machine that is copied runs dry meanwhile: it goes to disk as any other, its copy is given back and said to have
/// failed, and it goes on once it is paid.
pub fn source_dry(world: &World) -> Result<()> {
    let money = world.balance()?;
    let order = ["run", "-d", "--name", "parent", "--memory", "320", "--node", "1"];
    let paid = ["--tokens", DRY, "--budget", DRY];
    let files = ["--file", "/usr/bin/sleep", "--file", "/usr/bin/head:/bin/head"];
    let program = ["--", "/bin/sh", "-c", FILL];
    world.onde([&order[..], &paid, &files, &program].concat())?;
    wait("the guest to be full", || Ok(world.onde(["logs", "parent"])?.contains("full")))?;
    let status = || -> Result<Value> {
        Ok(serde_json::from_str(&world.onde(["status", "parent", "--json"])?)?)
    };
    wait("its tokens to be nearly gone", || {
        Ok(status()?["seconds_left"].as_u64().context("no time")? < NEARLY_DRY_S)
    })?;

    let mut command =
        world.command(["fork", "parent", "--nodes", "2", "--tokens", "60", "--json"])?;
    let mut copying = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stage = || -> Result<Value> { Ok(status()?["stage"].take()) };
    wait("the source to be asleep", || {
        ensure!(copying.try_wait()?.is_none(), "the copy was over before its source ran dry");
        Ok(stage()? == "suspended")
    })?;
    let done = copying.wait_with_output()?;
    let told: Value = serde_json::from_slice(&done.stdout)?;
    let failed = list(&told, "failed");
    ensure!(
        !done.status.success() && list(&told, "made").is_empty() && failed.len() == 1,
        "{told}"
    );
    let why = failed[0]["why"].as_str().unwrap_or_default();
    ensure!(why.contains("ran out of tokens"), "{why:?}");
    let settled = || Ok(world.newest_job()?.settled_by.is_some());
    wait("the copy's job to be settled", settled)?;
    let copy = world.newest_job()?;
    ensure!(copy.refund_micro > 0, "nothing of the copy came back: {copy:?}");

    world.onde(["pay", "parent", "60"])?;
    wait("the source to be awake", || Ok(stage()? == "running"))?;
    world.onde(["exec", "parent", "--", "/usr/bin/sleep", "0"])?;
    world.onde(["stop", "parent"])?;
    let newest = world.broker.jobs(false, 2)?.jobs;
    let cost = newest.iter().map(|job| world.cost(job)).sum::<Result<u64>>()?;
    ensure!(money - world.balance()? == cost, "the books do not balance");
    Ok(())
}

/// What a program keeps writing to, MiB: three times what a machine is frozen with at most.
const HOT_MIB: &str = "48";
/// Where the program answers.
const ECHO_PORT: u16 = 7007;

/// A program that writes faster than it can be copied is stopped for the end of it: its VM moves, and makes others.
pub fn hot_writer(world: &World) -> Result<()> {
    let order = ["run", "-d", "--name", "hot", "--memory", "192", "--node", "1", "--tokens", "60"];
    let program = ["--", env!("CARGO_BIN_EXE_bench-guest"), "echo", HOT_MIB];
    world.onde([&order[..], &program].concat())?;
    // Wherever it moves, it keeps its address.
    let guest = world.jobs()?.find("hot")?.guest_ipv4;
    answers(guest)?;
    world.onde(["migrate", "hot", "2"])?;
    answers(guest)?;
    let (is_done, told) = fork(world, &["hot", "--nodes", "1", "--tokens", "60"])?;
    let [made] = list(&told, "made") else { bail!("{told}") };
    ensure!(is_done, "{told}");
    answers(guest)?;
    answers(made["guest"].as_str().context("no address")?.parse()?)?;
    for job in ["hot", made["job"].as_str().context("no job")?] {
        world.onde(["stop", job])?;
    }
    Ok(())
}

/// Waits until the program at `guest` answers.
fn answers(guest: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind("198.18.255.1:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    wait("the program to answer", || {
        // A guest that is not there yet is asked again.
        let sent = socket.send_to(b"?", (guest, ECHO_PORT));
        Ok(sent.and_then(|_| socket.recv(&mut [0; 64])).is_ok())
    })
}
