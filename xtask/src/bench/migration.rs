//! Moving a guest between two nodes, beside QEMU's own pre-copy migration between two that are the same: the same kernel
//! and the same program, which answers probes and, in the second case, keeps writing to a known set of memory. At last it
//! sends as much as it can while it moves. Their moves take turns, since a shared machine is faster in one minute than in
//! another; and each pair of nodes is its guest's alone, or an emulator's cache of translated code would hold neither.

use std::cell::Cell;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use onde_client::broker::Broker;
use onde_lab::capture::Capture;
use onde_lab::kernel::KernelCache;
use onde_lab::progress::Step;
use onde_lab::{Lab, Shape, guest, programs};
use onde_wire::channel::PORT as PORT_IN;
use onde_wire::plan;

use super::probe::{PERIOD, Probe};
use super::{BOOT_MAX, CMDLINE, Figure, GUEST_MIB, LOOK_PERIOD, NODE_MIB, RUNS};
use super::{customer, extras, median};

/// What a guest writes to all the time, MiB, and the names of its rows.
const CASES: [(u32, [&str; 4]); 2] = [
    (
        0,
        [
            "silence of a moved guest, idle",
            "time to move an idle guest",
            "bytes sent to move an idle guest",
            "silence, idle, beside its bound",
        ],
    ),
    (
        8,
        [
            "silence of a moved guest, writing 8 MiB",
            "time to move a guest writing 8 MiB",
            "bytes sent to move a guest writing 8 MiB",
            "silence, writing 8 MiB, beside its bound",
        ],
    ),
];
const QEMU: &str = "QEMU pre-copy, same nodes";
/// Moves before those that are measured: the first ones wait for an emulator to translate what does them.
const WARM_UPS: usize = 4;
/// Moves of a guest that sends all the time.
const STREAM_RUNS: usize = 5;
/// Where `bench-guest` sends to whoever connects.
const STREAM_PORT: u16 = 7008;
/// How long it sends before it moves.
const STREAM_TRIAL: Duration = Duration::from_secs(5);
/// QEMU's guest, where no guest of the broker's comes.
const QEMU_GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 200);
/// Where `bench-node` takes commands.
const PORT: u16 = 7000;
/// Between which nodes whose guest moves.
const PEER_NODES: [u8; 2] = [1, 2];
const OWN_NODES: [u8; 2] = [3, 4];
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
    let shape = Shape { nodes: 4, memory_mib: NODE_MIB, ..Shape::default() };
    let progress = Step::new(&format!(
        "four nodes boot; guests move {} times",
        4 * (WARM_UPS + RUNS) + 2 * STREAM_RUNS
    ));
    let lab = Lab::up_for_now(&dir.join("lab"), &shape, &extras(&kernel, &files)?)?;
    lab.enter()?;
    for node in OWN_NODES {
        Host::call(node)?.tell("node")?;
    }
    let (broker, key) = customer(&lab, OWN_NODES.len() as u8)?;
    let customer = Customer { broker, dir: &dir };
    customer.onde(&["account", "use", &key, "--broker", &lab.broker_url()?])?;
    let mut figures = Vec::new();
    for (dirty_mib, names) in CASES {
        let mut peer = Peer::start(dirty_mib)?;
        let guest = customer.start(dirty_mib)?;
        let (mut own, mut peers) = (Vec::new(), Vec::new());
        for run in 0..WARM_UPS + RUNS {
            peer.prepare()?;
            let its = measure(QEMU_GUEST, || peer.go())?;
            let ours = measure(guest.ipv4, || guest.go())?;
            if run >= WARM_UPS {
                peers.push(its);
                own.push(ours);
            }
        }
        let of = |moves: &[Move], what: What| median(moves.iter().map(what).collect());
        let [silence, took, sent, beside_bound] = names;
        let rows: [(_, _, What); 3] = [
            (silence, "ms", |one| one.silence_ms),
            (took, "ms", |one| one.took_ms),
            (sent, "KiB", |one| one.sent_kib),
        ];
        for (name, unit, what) in rows {
            figures.push(Figure::new(name, of(&own, what)?, unit, QEMU, of(&peers, what)?));
        }
        let bound = of(&own, |one| one.bound_ms)?;
        let than = "bytes sent then / bytes a second before";
        figures.push(Figure::new(beside_bound, of(&own, |one| one.silence_ms)?, "ms", than, bound));
        if dirty_mib == 0 {
            let (sent, used) = (of(&own, |one| one.sent_kib)?, guest.used_kib()?);
            let name = "the same, beside its memory in use";
            figures.push(Figure::new(name, sent, "KiB", "its memory in use", used));
            let (mut own, mut peers) = (Vec::new(), Vec::new());
            for _ in 0..STREAM_RUNS {
                peer.prepare()?;
                peers.push(stream(QEMU_GUEST, || peer.go().map(drop))?);
                own.push(stream(guest.ipv4, || guest.go().map(drop))?);
            }
            let name = "throughput kept while a guest moves";
            figures.push(Figure::new(name, median(own)?, "%", QEMU, median(peers)?));
        }
        guest.stop()?;
        peer.stop()?;
    }
    progress.done("measured");
    lab.down()?;
    fs::remove_dir_all(&dir)?;
    Ok(figures)
}

/// A move.
struct Move {
    silence_ms: f64,
    took_ms: f64,
    sent_kib: f64,
    /// What was sent while the guest stood still, at the pace of what was sent before.
    bound_ms: f64,
}

/// A figure of a move.
type What = fn(&Move) -> f64;

/// QEMU's guest.
struct Peer {
    hosts: Vec<Host>,
    /// Which of its nodes has it.
    at: usize,
}

impl Peer {
    /// Starts it on the first of its nodes.
    fn start(dirty_mib: u32) -> Result<Self> {
        let mut hosts = PEER_NODES.map(Host::call).into_iter().collect::<Result<Vec<_>>>()?;
        hosts[0].tell(&format!("start {dirty_mib}"))?;
        wait_for(QEMU_GUEST)?;
        Ok(Self { hosts, at: 0 })
    }

    /// Ends what is left of it on the other node, where another QEMU waits for it then.
    fn prepare(&mut self) -> Result<()> {
        let other = &mut self.hosts[1 - self.at];
        other.tell("end")?;
        other.tell("wait").map(drop)
    }

    /// Moves it to the other node; KiB that were sent. QEMU tells nothing that its bound could be computed from.
    fn go(&mut self) -> Result<(f64, f64)> {
        let (from, to) = (self.at, 1 - self.at);
        let told = self.hosts[from].tell(&format!("move {}", node(PEER_NODES[to])))?;
        self.at = to;
        let sent = told.split("sent=").nth(1).context("no bytes sent")?;
        Ok((sent.parse::<f64>()? / 1024.0, f64::NAN))
    }

    fn stop(mut self) -> Result<()> {
        self.hosts.iter_mut().try_for_each(|host| host.tell("end").map(drop))
    }
}

/// What a guest sends while `act` moves it, percent of what it sent before.
fn stream(guest: Ipv4Addr, act: impl FnOnce() -> Result<()>) -> Result<f64> {
    // One that just moved may not be found yet.
    wait_for(guest)?;
    let mut stream = TcpStream::connect((guest, STREAM_PORT))?;
    let own = stream.try_clone()?;
    let heard = Arc::new(AtomicU64::new(0));
    let count = heard.clone();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(size @ 1..) = stream.read(&mut buffer) {
            count.fetch_add(size as u64, Ordering::Relaxed);
        }
    });
    let rate = |act: Box<dyn FnOnce() -> Result<()> + '_>| -> Result<(f64, Duration)> {
        let (begun, before) = (Instant::now(), heard.load(Ordering::Relaxed));
        act()?;
        let took = begun.elapsed();
        let bytes = heard.load(Ordering::Relaxed) - before;
        Ok((bytes as f64 / took.as_secs_f64(), took))
    };
    std::thread::sleep(MARGIN);
    let (before, _) = rate(Box::new(|| {
        std::thread::sleep(STREAM_TRIAL);
        Ok(())
    }))?;
    let (during, took) = rate(Box::new(act))?;
    let (after, _) = rate(Box::new(|| {
        std::thread::sleep(MARGIN);
        Ok(())
    }))?;
    own.shutdown(Shutdown::Both)?;
    reader.join().expect("a reader does not panic");
    ensure!(after > 0.0, "the connection is lost");
    let mib = |rate: f64| rate / f64::from(1 << 20);
    println!(
        "sent {:.1} MiB/s before, {:.1} MiB/s while it moved in {took:.1?}",
        mib(before),
        mib(during)
    );
    Ok(during / before * 100.0)
}

fn node(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, number, 1)
}

/// Measures while `act` moves `guest` and tells the KiB that were sent, and the bound of the silence, ms.
fn measure(guest: Ipv4Addr, act: impl FnOnce() -> Result<(f64, f64)>) -> Result<Move> {
    let probe = Probe::start(guest)?;
    std::thread::sleep(MARGIN);
    let begun = Instant::now();
    let (sent_kib, bound_ms) = act()?;
    let took = begun.elapsed();
    wait_for(guest)?;
    std::thread::sleep(MARGIN);
    let silence = probe.end()?.saturating_sub(PERIOD);
    println!(
        "moved in {took:.1?}, silent for {silence:.0?}, {sent_kib:.0} KiB, bound {bound_ms:.0} ms"
    );
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    Ok(Move { silence_ms: ms(silence), took_ms: ms(took), sent_kib, bound_ms })
}

/// Waits until a guest answers probes.
fn wait_for(guest: Ipv4Addr) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < BOOT_MAX {
        let probe = Probe::start(guest)?;
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

    /// Starts our guest on the first of its nodes.
    fn start(&self, dirty_mib: u32) -> Result<Guest<'_>> {
        let (memory, dirty) = (GUEST_MIB.to_string(), dirty_mib.to_string());
        let program = programs::find("bench-guest")?;
        let program = program.to_str().context("a path that is no text")?.to_owned();
        let node = OWN_NODES[0].to_string();
        let order = ["run", "-d", "--name", "moving", "--node", &node, "--memory", &memory];
        self.onde(&[&order[..], &["--budget", "5000", "--", &program, "echo", &dirty]].concat())?;
        let job = self.broker.jobs(false, 1)?.jobs.pop().context("no job")?;
        wait_for(job.guest_ipv4)?;
        Ok(Guest { customer: self, program, ipv4: job.guest_ipv4, at: Cell::new(0) })
    }
}

/// Our guest.
struct Guest<'a> {
    customer: &'a Customer<'a>,
    program: String,
    ipv4: Ipv4Addr,
    /// Which of its nodes has it.
    at: Cell<usize>,
}

impl Guest<'_> {
    /// Moves to the other node; KiB that were sent, and the bound of the silence, ms.
    fn go(&self) -> Result<(f64, f64)> {
        let (from, to) = (self.at.get(), 1 - self.at.get());
        let (guest, mac) = (self.ipv4, plan::mac(self.ipv4.octets()));
        let frozen = Capture::start(u64::from(OWN_NODES[from]), 0, move |bytes, frame| {
            // Frozen it sends under another MAC than its own.
            let is_frozen = frame.sender() == Some(guest) && frame.src_mac() != mac;
            let segment =
                frame.segment().filter(|segment| is_frozen && segment.dst_port == PORT_IN);
            *bytes += segment.map_or(0, |segment| u64::from(segment.size));
            Ok(true)
        })?;
        let told =
            self.customer.onde(&["migrate", "moving", &OWN_NODES[to].to_string(), "--json"])?;
        self.at.set(to);
        let lines: Vec<serde_json::Value> =
            told.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let rate = lines.iter().filter_map(|line| line["bytes_per_s"].as_f64()).next_back();
        let rate = rate.context("no rate was told")?;
        let sent = lines.last().and_then(|line| line["sent_bytes"].as_f64());
        let bound_ms = frozen.end()? as f64 / rate * 1000.0;
        Ok((sent.context("no bytes sent")? / 1024.0, bound_ms))
    }

    /// Memory in use, KiB.
    fn used_kib(&self) -> Result<f64> {
        let told = self.customer.onde(&["exec", "moving", "--", &self.program, "used"])?;
        Ok(told.trim().parse()?)
    }

    fn stop(self) -> Result<()> {
        self.customer.onde(&["stop", "moving"]).map(drop)
    }
}
