//! Cases in which a running VM moves to another node by itself, and those in which it does not get there. After each move
//! exactly one VM lives, and its program has lost and doubled nothing.

use std::fs::{self, Permissions};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use onde_client::api::SettledBy;
use onde_client::job::Job;
use onde_lab::capture::{Capture, Frame, cut, plug};
use onde_lab::witness::mix;
use onde_wire::channel::PORT;
use onde_wire::plan;
use serde_json::Value;

use crate::witness::{Witness, whereabouts};
use crate::world::{World, wait};

/// How many moves a VM makes: as many as this variable says, or else there and back.
const MOVES: &str = "ONDE_MOVES";
/// How many streams are cut: as many as this variable says, or else two.
const CUTS: &str = "ONDE_CUTS";
/// What they are cut at follows from this number, or else is random.
const SEED: &str = "ONDE_SEED";
/// The end of a stream, bytes: what is frozen, the machine state, the digest.
const TAIL: u64 = 1 << 20;
/// How far the clock of a VM that moved may be off, seconds: a word on its way is as late.
const LAG: f64 = 0.15;
/// How long a cable is out: longer than questions to the judge take, shorter than any patience.
const OUTAGE: Duration = Duration::from_secs(2);
/// A frozen VM whose copy's node is gone goes on before those who talk to it give it up, which takes half a minute.
const SOON: Duration = Duration::from_secs(20);

fn number(variable: &str) -> Result<Option<u64>> {
    let text = std::env::var(variable).ok();
    Ok(text.map(|text| text.parse()).transpose()?)
}

/// A move about to be made.
struct Move {
    job: Job,
    to: u64,
    guest: Ipv4Addr,
}

impl Move {
    /// Of this VM, to the node that it is not on.
    fn of(world: &World, witness: &Witness) -> Result<Self> {
        let job = witness.only_one(world)?;
        Ok(Self { to: [2, 1][job.node as usize - 1], guest: job.guest_ipv4, job })
    }

    fn from(&self) -> u64 {
        self.job.node.into()
    }

    fn begin(&self, world: &World) -> Result<Child> {
        let mut migrate =
            world.command(["migrate", &self.job.short_id(), &self.to.to_string(), "--json"])?;
        Ok(migrate.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// What `onde migrate` says at last, where the VM moved.
    fn end(&self, migrate: Child) -> Result<Option<Value>> {
        let done = migrate.wait_with_output()?;
        let (told, complaint) = (String::from_utf8(done.stdout)?, String::from_utf8(done.stderr)?);
        match done.status.success() {
            true => {
                let last = told.lines().last().context("nothing was told")?;
                Ok(Some(serde_json::from_str(last)?))
            }
            false => {
                println!("  {}", complaint.lines().last().unwrap_or_default());
                ensure!(complaint.contains("hint:"), "{complaint}");
                Ok(None)
            }
        }
    }

    /// Whether a frame bears the guest's address, and not its MAC: the frozen source's only way to send.
    fn is_frozen(&self) -> impl Fn(&Frame) -> bool + use<> {
        let (guest, mac) = (self.guest, plan::mac(self.guest.octets()));
        move |frame| frame.sender() == Some(guest) && frame.src_mac() != mac
    }

    /// Waits for the first frame of its kind from a node.
    fn at_first(&self, node: u64, is: impl Fn(&Frame) -> bool + Send + 'static) -> Result<Moment> {
        Capture::start(node, (), move |(), frame| Ok(!is(&frame)))
    }

    /// Waits for the copy to announce itself.
    fn at_announcement(&self) -> Result<Moment> {
        let guest = self.guest;
        self.at_first(self.to, move |frame| {
            frame.is_announcement() && frame.sender() == Some(guest)
        })
    }
}

type Moment = Capture<()>;

fn wait_for(moment: Moment) -> Result<()> {
    wait("the machine to be frozen, or to be there", || Ok(moment.is_finished()))?;
    moment.end()
}

/// What a source sent.
#[derive(Default)]
struct Sent {
    before: u64,
    flow: u64,
    questions: u64,
    wrong: Option<Frame>,
}

/// Sees that a source says nothing once it is frozen but what carries it away, and questions to the judge.
fn watch_source(world: &World, one: &Move) -> Result<Capture<Sent>> {
    let (is_frozen, guest) = (one.is_frozen(), one.guest);
    let (mac, judge) = (plan::mac(guest.octets()), world.node(one.to as u32));
    Capture::start(one.from(), Sent::default(), move |sent, frame| {
        let is_guest = frame.sender() == Some(guest) || frame.src_mac() == mac;
        let is_flow = frame.segment().is_some_and(|segment| segment.dst_port == PORT);
        match (is_guest, is_frozen(&frame)) {
            (false, _) => {}
            (true, true) if is_flow => sent.flow += 1,
            (true, true) if frame.asks(judge) => sent.questions += 1,
            (true, false) if sent.flow + sent.questions == 0 => sent.before += 1,
            (true, _) => sent.wrong = Some(frame),
        }
        Ok(true)
    })
}

/// A VM moves to and fro: its program's output, its connection and its memory stay whole, the source is silent from the
/// instant on at which the copy was taken, and each node that it left gives change.
pub fn to_and_fro(world: &World) -> Result<()> {
    let hooks = ["--file", &hook(world, "pre-freeze")?, "--file", &hook(world, "moved")?];
    let tools = ["--file", "/usr/bin/dash:/bin/sh", "--file", "/usr/bin/date"];
    let witness = Witness::start_with(world, "mover", &[&hooks[..], &tools].concat())?;
    for moves in 1..=number(MOVES)?.unwrap_or(2) {
        let one = Move::of(world, &witness)?;
        let source = watch_source(world, &one)?;
        let told = one.end(one.begin(world)?)?.context("the VM stays")?;
        println!("  {told}");
        let (now, new) = whereabouts(world, "mover")?;
        ensure!(now == one.to && new != one.job.id.to_string(), "the VM is on node {now}");
        let sent = source.end()?;
        ensure!(sent.wrong.is_none(), "the frozen source sent {:?}", sent.wrong);
        // Questions to the judge are for when the copy's own word does not come.
        let counts = [sent.before, sent.flow];
        ensure!(!counts.contains(&0), "the capture saw too little: {counts:?}");
        witness.only_one(world)?;
        let old = world.broker.job(&one.job.id.0)?;
        ensure!(old.settled_by == Some(SettledBy::Certificate), "{old:?}");
        ensure!(old.refund_micro > 0, "no change from node {}", one.from());
        wait("the hooks to be run", || Ok(hooks_run(world, "mover")? == [moves; 2]))?;
    }
    is_on_time(world, "mover")?;
    witness.end(world)
}

/// A hook that counts in its guest, as an option of `--file`.
fn hook(world: &World, name: &str) -> Result<String> {
    let (local, place) = (world.file(name), format!("/etc/onde/{name}.d/10-count"));
    fs::write(&local, format!("#!/bin/sh\necho here >> /dev/shm/{name}\n"))?;
    fs::set_permissions(&local, Permissions::from_mode(0o755))?;
    Ok(format!("{}:{place}", local.display()))
}

/// How often each of the two hooks was run.
fn hooks_run(world: &World, name: &str) -> Result<[u64; 2]> {
    const READ: &str = "while read -r word; do echo $word; done < /dev/shm/";
    let count = |hook: &str| -> Result<u64> {
        let told = world.onde(["exec", name, "--", "/bin/sh", "-c", &format!("{READ}{hook}")])?;
        Ok(told.lines().count() as u64)
    };
    Ok([count("pre-freeze")?, count("moved")?])
}

/// The guest's clock does not lag behind by the time in which it stood still.
fn is_on_time(world: &World, name: &str) -> Result<()> {
    let now =
        || Ok::<_, anyhow::Error>(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64());
    let before = now()?;
    let told: f64 = world.onde(["exec", name, "--", "/usr/bin/date", "+%s.%N"])?.trim().parse()?;
    let after = now()?;
    ensure!((before - LAG..after + LAG).contains(&told), "{told} between {before} and {after}");
    Ok(())
}

/// The stream's connection is cut behind a number of bytes. Whether the VM moved, and bytes of stream that were seen.
fn cut_at(world: &World, witness: &Witness, offset: u64) -> Result<(bool, u64)> {
    let one = Move::of(world, witness)?;
    let (guest, from, to) = (one.guest, one.from(), one.to);
    let cutter = Capture::start(one.from(), 0, move |sent, frame| {
        let segment = frame.segment().filter(|segment| segment.dst_port == PORT);
        if let Some(segment) = segment.filter(|_| frame.sender() == Some(guest)) {
            *sent += u64::from(segment.size);
            if *sent >= offset {
                cut(from, to, &frame)?;
            }
        }
        Ok(true)
    })?;
    let told = one.end(one.begin(world)?)?;
    let sent = cutter.end()?;
    let job = witness.only_one(world)?;
    let expect = if told.is_some() { one.to } else { one.from() };
    ensure!(u64::from(job.node) == expect, "the VM is on node {}, not {expect}", job.node);
    println!("  cut at {offset} of {sent} bytes: on node {}", job.node);
    Ok((told.is_some(), sent))
}

/// Streams are cut anywhere, and half of them near their end.
pub fn cut_anywhere(world: &World) -> Result<()> {
    let witness = Witness::start(world, "cut")?;
    let seed = number(SEED)?.map_or_else(getrandom::u64, Ok)?;
    println!("  {SEED}={seed}");
    // As long as nothing cuts it.
    let (is_whole, size) = cut_at(world, &witness, u64::MAX)?;
    ensure!(is_whole && size > 2 * TAIL, "the VM stays though nothing was cut, at {size}");
    for trial in 0..number(CUTS)?.unwrap_or(2) {
        let random = mix(seed.wrapping_add(trial));
        let offset = match trial % 2 {
            0 => random % size,
            _ => size.saturating_sub(TAIL) + random % TAIL,
        };
        let cut = cut_at(world, &witness, offset).with_context(|| format!("cut at {offset}"))?;
        let (has_moved, sent) = cut;
        ensure!(!has_moved || offset + TAIL > sent, "the cut at {offset} of {sent} cut nothing");
    }
    witness.end(world)
}

/// The new VM is stopped while it is filled: the program goes on where it was.
pub fn target_stopped(world: &World) -> Result<()> {
    let witness = Witness::start(world, "stayer")?;
    let one = Move::of(world, &witness)?;
    let migrate = one.begin(world)?;
    // Its file is written before anything is sent.
    let new = || {
        let jobs = world.jobs()?.list()?;
        anyhow::Ok(jobs.into_iter().find(|job| job.moves == Some(one.job.id)))
    };
    wait("the new job", || Ok(new()?.is_some()))?;
    let new = new()?.context("the new job")?;
    // Before that its node has not heard of it, and nothing could be stopped.
    wait("the new VM", || Ok(world.onde(["status", &new.short_id()]).is_ok()))?;
    world.onde(["stop", &new.short_id()])?;
    ensure!(one.end(migrate)?.is_none(), "the VM moved into one that was stopped");
    ensure!(witness.only_one(world)?.id == one.job.id, "the VM is elsewhere");
    witness.end(world)
}

/// The cable of the new node is pulled when the machine is frozen, and when its copy is there; then power fails at the new
/// node when the machine is frozen, and at the old one when the copy is there.
pub fn nodes_fail(world: &World) -> Result<()> {
    let witness = Witness::start(world, "survivor")?;
    for is_there in [false, true] {
        let one = Move::of(world, &witness)?;
        let moment = match is_there {
            false => one.at_first(one.from(), one.is_frozen())?,
            true => one.at_announcement()?,
        };
        let migrate = one.begin(world)?;
        wait_for(moment)?;
        plug(one.to, false)?;
        // That long it is out.
        std::thread::sleep(OUTAGE);
        plug(one.to, true)?;
        let told = one.end(migrate)?;
        let job = witness.only_one(world)?;
        println!("  cable out, copy there: {is_there}; moved: {}", told.is_some());
        ensure!(!is_there || u64::from(job.node) == one.to, "the copy does not live");
    }
    let one = Move::of(world, &witness)?;
    let moment = one.at_first(one.from(), one.is_frozen())?;
    let migrate = one.begin(world)?;
    wait_for(moment)?;
    let begun = Instant::now();
    world.lab.kill_node(one.to as u8)?;
    world.lab.boot_node(one.to as u8)?;
    ensure!(one.end(migrate)?.is_none(), "the VM moved to a node without power");
    witness.goes_on()?;
    ensure!(begun.elapsed() < SOON, "the VM stood still for {:?}", begun.elapsed());
    ensure!(witness.only_one(world)?.id == one.job.id, "the VM is elsewhere");

    let one = Move::of(world, &witness)?;
    let moment = one.at_announcement()?;
    let migrate = one.begin(world)?;
    wait_for(moment)?;
    world.lab.kill_node(one.from() as u8)?;
    let told = one.end(migrate)?;
    world.lab.boot_node(one.from() as u8)?;
    println!("  old node lost; told: {}", told.is_some());
    let job = witness.only_one(world)?;
    ensure!(u64::from(job.node) == one.to, "the copy does not live");
    witness.end(world)
}

/// A VM moves because a program in it wants to, and is paid for on; then all VMs of a customer leave a node.
pub fn by_itself_and_drained(world: &World) -> Result<()> {
    let witness = Witness::start(world, "free")?;
    let ticket = world.onde(["ticket", "free", "2"])?;
    world.onde(["exec", "free", "--", "onde-agent", "migrate", "--token", ticket.trim()])?;
    wait("its home node to follow it", || Ok(world.jobs()?.find("free")?.node == 2))?;
    witness.only_one(world)?;
    let order = ["run", "-d", "--name", "other", "--memory", "128", "--node", "2"];
    world.onde([&order[..], &["--", "/usr/bin/sleep", "600"]].concat())?;
    world.onde(["exec", "other", "--", "/usr/bin/sleep", "0"])?;
    world.onde(["migrate", "--drain", "2", "--json"])?;
    for name in ["free", "other"] {
        ensure!(whereabouts(world, name)?.0 == 1, "{name} is still there");
    }
    witness.only_one(world)?;
    // The wallet, which nothing else keeps from ending, has taken up what it pays for from now on.
    let other = world.jobs()?.find("other")?;
    ensure!(world.jobs()?.wallet(&other.context)?.is_none(), "nobody pays for {}", other.id);
    world.onde(["stop", "other"])?;
    witness.end(world)
}
