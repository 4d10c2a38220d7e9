//! Cases in which a running VM becomes a file, and the file VMs.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::Ipv4Addr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use onde_client::api::SettledBy;
use onde_client::stream::StreamWriter;
use onde_sys::packet::PacketSocket;
use onde_wire::cluster::TOKEN_MICRO;
use onde_wire::stream::{Head, Kind, Start};

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
    // What another version of the VMM wrote is refused by the VMM, before RESUME.
    fs::write(file, of_another_version(&bytes)?)?;
    world.onde_fails(["boot", "--from", file], 1, "another version of the VMM")?;
    // Its upload is paid, and nothing else.
    let refused = world.newest_job()?;
    ensure!(refused.settled_by == Some(SettledBy::Certificate), "{refused:?}");
    let cost = world.cost(&refused)?;
    ensure!(money - world.balance()? == cost && cost < 10 * TOKEN_MICRO, "{refused:?}");
    Ok(())
}

/// The same stream with another version of the layout in its machine state.
fn of_another_version(bytes: &[u8]) -> Result<Vec<u8>> {
    // Behind the state's head and the head of its first field.
    const VERSION: usize = 24;
    let (mut rest, mut out) = (bytes, Vec::new());
    let (head, behind) = bytes.split_first_chunk().context("a head")?;
    let size = Head::parse(head).context("a head")?.payload_size as usize;
    let start = Start::parse(&behind[..size]).ok().context("what machine it is")?;
    let (mut stream, mut state) = (StreamWriter::start(&mut out, &start)?, Vec::new());
    while let Some((head, behind)) = rest.split_first_chunk() {
        let head = Head::parse(head).context("a head")?;
        let (payload, behind) = behind.split_at(head.payload_size as usize);
        match head.kind {
            Kind::Start | Kind::Pad | Kind::End => {}
            Kind::Raw | Kind::Zero | Kind::Lz4 => stream.record(&head, payload)?,
            Kind::Machine | Kind::Moved => state = payload.to_vec(),
        }
        rest = behind;
    }
    state[VERSION] ^= 0x80;
    stream.machine(&state)?;
    Ok(out)
}

/// Clones of the case below where `ONDE_CLONES` says no other number. More than these need larger nodes:
/// `ONDE_NODE_MIB`.
const CLONES: usize = 8;
/// What each may hold for itself, MiB; its guest has 128.
const HELD_MIB: &str = "16";
/// Counts, and draws: what it draws once it has another name is a clone's first draw. It rests for REST
/// seconds at each step without a process of its own: a hundred clones share one emulated processor, and a step takes 11 ms of it.
const DRAW: &str = "exec 9<> <(:); read -r mine < /proc/sys/kernel/hostname; i=0; \
                    while :; do i=$((i + 1)); echo $i > /dev/shm/count; \
                    read -r name < /proc/sys/kernel/hostname; read -r draw < /proc/sys/kernel/random/uuid; \
                    [ $name = $mine ] || [ -e /dev/shm/first ] || echo $draw > /dev/shm/first; \
                    read -r -t REST -u 9; done";
/// How far it counted and who it is: name, machine id, MAC, and two draws, the first one and one of now.
const WHO: &str = "until read -r n < /dev/shm/count && read -r first < /dev/shm/first; do :; done; \
                   read -r name < /proc/sys/kernel/hostname; read -r id < /etc/machine-id; \
                   read -r mac < /sys/class/net/eth0/address; read -r now < /proc/sys/kernel/random/uuid; \
                   echo $n $name $id $mac $first $now";

/// Many VMs of one upload on one node: each is somebody else from its first instruction on, goes on where the snapshot was,
/// holds little for itself, and outlives the template. All money is accounted for.
pub fn clones_share_a_template(world: &World) -> Result<()> {
    let wanted = std::env::var("ONDE_CLONES").map_or(Ok(CLONES), |count| count.parse())?;
    let file = world.file("template");
    let file = file.to_str().context("a path")?;
    let before = snapshot_of_drawer(world, file, 1 + wanted / 10)?;
    let money = world.balance()?;
    let begun = Instant::now();
    let template = world.onde(["boot", "--from", file, "--node", "1", "--template"])?;
    let (template, uploaded) = (template.trim(), begun.elapsed());
    let mut first_words = FirstWords::listen()?;
    let count_text = wanted.to_string();
    let order = ["--held", HELD_MIB, "--tokens", "30", "--budget", "400"];
    let ids =
        world.onde([&["boot", "--clone", template, "-n", &count_text], &order[..]].concat())?;
    let ids: Vec<_> = ids.lines().collect();
    let cloned = begun.elapsed() - uploaded;
    println!("  template in {uploaded:.1?}, {} clones in {cloned:.1?}", ids.len());
    ensure!(ids.len() == wanted, "{ids:?}");
    ensure!(world.onde(["status", template])?.contains("template"), "no template's stage");
    // They keep what they share of it.
    world.onde(["stop", template])?;

    let mut told = HashSet::new();
    for &id in &ids {
        let who = world.onde(["exec", id, "--", "/bin/bash", "-c", WHO])?;
        first_words.hear();
        let who: Vec<_> = who.split_whitespace().map(str::to_owned).collect();
        ensure!(who.len() == 6, "job {id} tells {who:?}");
        ensure!(who[0].parse::<u64>()? > before, "job {id} does not go on where {before} was");
        let is_own = who[1] == format!("onde-{id}") && who[2].starts_with(id);
        ensure!(is_own, "job {id} is {who:?}");
        for word in who.into_iter().skip(1) {
            ensure!(told.insert(word.clone()), "{word} of job {id} is another's, too");
        }
    }
    let guests: HashSet<_> = guests(world, &ids)?.into_iter().collect();
    ensure!(guests.len() == wanted, "addresses: {guests:?}");
    first_words.check(&guests)?;
    goes_on(world, ids[0])?;
    for &id in &ids {
        world.onde(["stop", id])?;
    }
    let mut cost = 0;
    for job in world.broker.jobs(false, wanted as u32 + 1)?.jobs {
        ensure!(job.node == 1, "job {} is on node {}", job.id, job.node);
        cost += world.cost(&job)?;
    }
    ensure!(world.balance()? == money - cost, "{} + {cost} is not {money}", world.balance()?);
    wait("the node to have its memory back", || {
        let before = world.new_nodes[0].mem_mib_free;
        Ok(world.hello(1)?.mem_mib_free == before)
    })
}

/// The file of a VM whose program draws numbers and rests for so many seconds; how far it had counted.
fn snapshot_of_drawer(world: &World, file: &str, rest_s: usize) -> Result<u64> {
    let id = world.file("machine-id");
    fs::write(&id, "0123456789abcdef0123456789abcdef\n")?;
    let id = format!("{}:/etc/machine-id", id.to_str().context("a path")?);
    let order = ["run", "-d", "--name", "source", "--memory", "128"];
    let files = ["--file", &id, "--file", "/bin/sh"];
    let draw = DRAW.replace("REST", &rest_s.to_string());
    world.onde([&order[..], &files, &["--", "/bin/bash", "-c", &draw]].concat())?;
    wait("the program to count", || Ok(count(world, "source")? >= 2))?;
    let before = count(world, "source")?;
    world.onde(["snapshot", "source", "-o", file])?;
    world.onde(["stop", "source"])?;
    Ok(before)
}

/// The addresses of these jobs' guests.
fn guests(world: &World, ids: &[&str]) -> Result<Vec<Ipv4Addr>> {
    let mut jobs = world.broker.jobs(false, ids.len() as u32 + 1)?.jobs;
    jobs.retain(|job| ids.iter().any(|id| job.id.to_string().starts_with(id)));
    Ok(jobs.iter().map(|job| job.guest_ipv4).collect())
}

/// The numbers that guests begin their TCP connections with, as everybody on the wire sees them.
struct FirstWords {
    socket: PacketSocket,
    heard: Vec<(Ipv4Addr, u32)>,
}

impl FirstWords {
    fn listen() -> Result<Self> {
        let mut socket = PacketSocket::open("onde0")?;
        // BPF_RET | BPF_K: all of every frame.
        socket.start(&[onde_sys::packet::Instruction { code: 6, jt: 0, jf: 0, k: 2048 }])?;
        Ok(Self { socket, heard: Vec::new() })
    }

    /// Takes in what came since the last time: SYN with ACK, in TCP over IPv4 without options.
    fn hear(&mut self) {
        let heard = &mut self.heard;
        self.socket.receive(usize::MAX, |_, frame| {
            let is_tcp = frame.len() >= 54 && frame[12..15] == [8, 0, 0x45] && frame[23] == 6;
            if is_tcp && frame[47] & 0x12 == 0x12 {
                let word = |at: usize| <[u8; 4]>::try_from(&frame[at..at + 4]).expect("4 bytes");
                heard.push((word(26).into(), u32::from_be_bytes(word(38))));
            }
        });
    }

    /// Every guest was heard, and none said what another one said.
    fn check(&self, guests: &HashSet<Ipv4Addr>) -> Result<()> {
        let heard = self.heard.iter().filter(|(guest, _)| guests.contains(guest));
        let mut by_number = HashMap::new();
        for (guest, number) in heard {
            let other = by_number.insert(number, guest);
            ensure!(other.is_none_or(|other| other == guest), "{guest} and {other:?}: {number}");
        }
        let heard: HashSet<_> = by_number.values().collect();
        ensure!(heard.len() == guests.len(), "heard {} of {}", heard.len(), guests.len());
        println!("  {} first sequence numbers of {} guests", by_number.len(), heard.len());
        Ok(())
    }
}
