//! Moving a guest between two nodes, beside QEMU's own pre-copy migration on the same two nodes: the same kernel and
//! the same program, which answers probes and, in the second row, keeps writing to a known set of memory.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use onde_client::broker::Broker;
use onde_lab::kernel::KernelCache;
use onde_lab::progress::Step;
use onde_lab::{Lab, Shape, guest, programs};

use super::probe::{Probe, pace};
use super::{BOOT_MAX, CMDLINE, Figure, GUEST_MIB, LOOK_PERIOD, NODE_MIB, RUNS};
use super::{customer, extras, median};

/// What a guest writes to all the time, MiB, and the names of its rows.
const CASES: [(u32, [&str; 3]); 2] = [
    (
        0,
        [
            "silence of a moved guest, idle",
            "time to move an idle guest",
            "bytes sent to move an idle guest",
        ],
    ),
    (
        8,
        [
            "silence of a moved guest, writing 8 MiB",
            "time to move a guest writing 8 MiB",
            "bytes sent to move a guest writing 8 MiB",
        ],
    ),
];
/// QEMU's guest, where no guest of the broker's comes.
const QEMU_GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 200);
/// Where `bench-node` takes commands.
const PORT: u16 = 7000;
/// Probes before and after a move: the guest's neighbours have settled, and stragglers are seen.
const MARGIN: Duration = Duration::from_secs(1);

/// Measures the rows.
pub fn run() -> Result<Vec<Figure>> {
    let dir = std::env::temp_dir().join(format!("onde-bench-move-{}", std::process::id()));
    let files = dir.join("files");
    fs::create_dir_all(&files)?;
    let kernel = KernelCache::find()?;
    let modules = kernel.modules()?.load_order(&["virtio_mmio", "virtio_net"])?;
    fs::write(files.join("guest.cpio"), guest::single(&programs::find("bench-guest")?, &modules)?)?;
    fs::write(files.join("mem_mib"), GUEST_MIB.to_string())?;
    // QEMU puts its devices into ACPI tables as we do: nothing but the address is said otherwise.
    fs::write(files.join("cmdline"), format!("{CMDLINE} bench.ipv4={QEMU_GUEST}"))?;
    fs::write(files.join("mover"), "")?;
    // One processor: steady, and the same for both.
    let shape = Shape { nodes: 2, memory_mib: NODE_MIB, ..Shape::default() };
    let progress = Step::new(&format!("two nodes boot; a guest moves {} times", 4 * RUNS));
    let lab = Lab::up_for_now(&dir.join("lab"), &shape, &extras(&kernel, &files)?)?;
    lab.enter()?;
    let peer = CASES.iter().map(|case| qemu(case.0)).collect::<Result<Vec<_>>>()?;
    for node in [1, 2] {
        Host::call(node)?.tell("node")?;
    }
    let (broker, key) = customer(&lab, 2)?;
    let customer = Customer { broker, dir: &dir };
    customer.onde(&["account", "use", &key, "--broker", &lab.broker_url()?])?;
    let mut figures = Vec::new();
    for ((dirty_mib, names), peer) in CASES.into_iter().zip(peer) {
        let own = customer.moves(dirty_mib)?;
        for (index, (name, unit)) in names.into_iter().zip(["ms", "ms", "KiB"]).enumerate() {
            let of = |moves: &[[f64; 3]]| median(moves.iter().map(|all| all[index]).collect());
            let qemu = "QEMU pre-copy, same nodes";
            figures.push(Figure::new(name, of(&own)?, unit, qemu, of(&peer)?));
        }
    }
    progress.done("measured");
    lab.down()?;
    fs::remove_dir_all(&dir)?;
    Ok(figures)
}

/// A move: silence, ms; time, ms; bytes sent, KiB.
type Move = [f64; 3];

/// Moves of QEMU's guest.
fn qemu(dirty_mib: u32) -> Result<Vec<Move>> {
    let mut hosts = [Host::call(1)?, Host::call(2)?];
    hosts[0].tell(&format!("start {dirty_mib}"))?;
    wait_for(QEMU_GUEST)?;
    let period = pace(QEMU_GUEST)?;
    let mut moves = Vec::new();
    for run in 0..RUNS {
        let (from, to) = (run % 2, 1 - run % 2);
        hosts[to].tell("wait")?;
        let target = format!("move {}", node(to as u8 + 1));
        moves.push(measure(QEMU_GUEST, period, || {
            let told = hosts[from].tell(&target)?;
            let sent = told.split("sent=").nth(1).context("no bytes sent")?;
            Ok(sent.parse::<f64>()? / 1024.0)
        })?);
        hosts[from].tell("end")?;
    }
    for mut host in hosts {
        host.tell("end")?;
    }
    Ok(moves)
}

fn node(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, number, 1)
}

/// Measures while `act` moves `guest` and tells the KiB that were sent.
fn measure(guest: Ipv4Addr, period: Duration, act: impl FnOnce() -> Result<f64>) -> Result<Move> {
    let probe = Probe::start(guest, period)?;
    std::thread::sleep(MARGIN);
    let begun = Instant::now();
    let sent_kib = act()?;
    let took = begun.elapsed();
    wait_for(guest)?;
    std::thread::sleep(MARGIN);
    let silence = probe.end()?.silence.saturating_sub(period);
    println!(
        "moved in {took:.1?}, silent for {silence:.0?} at a probe each {period:.0?}, {sent_kib:.0} KiB"
    );
    Ok([silence.as_secs_f64() * 1000.0, took.as_secs_f64() * 1000.0, sent_kib])
}

/// Waits until a guest answers probes.
fn wait_for(guest: Ipv4Addr) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < BOOT_MAX {
        let probe = Probe::start(guest, LOOK_PERIOD)?;
        std::thread::sleep(LOOK_PERIOD * 20);
        if probe.end().is_ok() {
            return Ok(());
        }
    }
    bail!("the guest at {guest} does not answer")
}

/// A node that runs QEMU.
struct Host {
    stream: TcpStream,
}

impl Host {
    fn call(number: u8) -> Result<Self> {
        let stream = TcpStream::connect((node(number), PORT));
        Ok(Self { stream: stream.with_context(|| format!("node {number} does not listen"))? })
    }

    fn tell(&mut self, line: &str) -> Result<String> {
        writeln!(self.stream, "{line}")?;
        let mut answer = String::new();
        BufReader::new(&self.stream).read_line(&mut answer)?;
        let told = answer.trim().strip_prefix("ok");
        Ok(told.with_context(|| format!("{line}: {}", answer.trim()))?.trim().to_owned())
    }
}

/// A customer with the `onde` program.
struct Customer<'a> {
    broker: Broker,
    dir: &'a Path,
}

impl Customer<'_> {
    fn onde(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(programs::find("onde")?);
        command.args(args).env("ONDE_CONFIG", self.dir.join("config.toml"));
        let done = command.env("XDG_STATE_HOME", self.dir.join("state")).output()?;
        let told = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "onde {args:?}: {}", told.trim());
        Ok(String::from_utf8(done.stdout)?)
    }

    /// Moves of our guest.
    fn moves(&self, dirty_mib: u32) -> Result<Vec<Move>> {
        let (memory, dirty) = (GUEST_MIB.to_string(), dirty_mib.to_string());
        let program = programs::find("bench-guest")?;
        let program = program.to_str().context("a path that is no text")?;
        let order = ["run", "-d", "--name", "moving", "--node", "1", "--memory", &memory];
        self.onde(&[&order[..], &["--budget", "5000", "--", program, "echo", &dirty]].concat())?;
        let job = self.broker.jobs(false, 1)?.jobs.pop().context("no job")?;
        wait_for(job.guest_ipv4)?;
        let period = pace(job.guest_ipv4)?;
        let mut moves = Vec::new();
        for run in 0..RUNS {
            let target = if run % 2 == 0 { "2" } else { "1" };
            moves.push(measure(job.guest_ipv4, period, || {
                let told = self.onde(&["migrate", "moving", target, "--json"])?;
                let last = told.lines().last().context("migrate told nothing")?;
                let last: serde_json::Value = serde_json::from_str(last)?;
                Ok(last["sent_bytes"].as_f64().context("no bytes sent")? / 1024.0)
            })?);
        }
        self.onde(&["stop", "moving"])?;
        Ok(moves)
    }
}
