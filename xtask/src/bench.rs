//! `cargo xtask bench`: Onde's figures beside its peers', measured in one run on one lab. Medians of several
//! runs; the ratios are what to compare between machines. `bench-node` and `bench-guest` of the lab are
//! the node's and the guest's first programs here.

mod clones;
mod migration;
mod probe;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use onde_client::api::{CreditRequest, Hex, JobRequest, NodeChoice};
use onde_client::bootstrap;
use onde_client::broker::{Broker, new_key};
use onde_client::echo::Echo;
use onde_client::layout::{self, Layout};
use onde_client::node::Handle;
use onde_lab::image::Extra;
use onde_lab::kernel::KernelCache;
use onde_lab::progress::Step;
use onde_lab::{Lab, Shape, guest, programs};
use onde_wire::cluster::TOKEN_MICRO;
use onde_wire::key::{Key, sha256};
use onde_wire::machine::Space;
use onde_wire::stream::Start;
use onde_wire::token::BootToken;
use serde::Serialize;

use crate::step::{output, root, step};
use crate::{build, setup};

/// Times that each thing is measured; the median counts.
const RUNS: usize = 5;
/// Memory of the guest, as `bench-node` gives it to QEMU.
const GUEST_MIB: u32 = 256;
/// What both VMMs' guest is told.
const CMDLINE: &str = "console=ttyS0 quiet tsc=reliable no_timer_check cryptomgr.notests 8250.nr_uarts=1 pci=off panic=-1 reboot=t";
/// What the guest prints when it is in user space (see `bench-guest`).
const MARK: &[u8] = b"onde-bench: user space";
/// Memory of the node: the image with QEMU in it, QEMU's guest or several of ours.
const NODE_MIB: u32 = 2048;
/// The paper's boot packet checks a second.
const PAPER_CHECKS: f64 = 276_500.0;
/// A guest that takes longer will never start.
const BOOT_MAX: Duration = Duration::from_secs(90);
/// Between two looks at the console: below what matters of a boot of seconds.
const LOOK_PERIOD: Duration = Duration::from_millis(10);
/// How long a VM idles before its VMM's memory is read.
const SETTLE: Duration = Duration::from_secs(4);

/// A figure beside its peer's.
#[derive(Serialize)]
struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    peer: String,
    peer_value: f64,
    ratio: f64,
}

impl Figure {
    fn new(
        name: &'static str,
        value: f64,
        unit: &'static str,
        peer: &str,
        peer_value: f64,
    ) -> Self {
        Self { name, value, unit, peer: peer.to_owned(), peer_value, ratio: value / peer_value }
    }
}

/// What measures a group of figures.
type Group = fn() -> Result<Vec<Figure>>;

/// The groups, in the order of the table.
const GROUPS: [(&str, Group); 7] = [
    ("checks", checks),
    ("polls", polls),
    ("sales", sales),
    ("boot", one_node),
    ("nodes", two_nodes),
    ("clones", clones::run),
    ("move", migration::run),
];

/// Measures the groups named, or all, prints the table, and writes it to `json` where given.
pub fn run(names: &[String], json: Option<&Path>) -> Result<()> {
    for name in names {
        let is_known = GROUPS.iter().any(|(group, _)| group == name);
        ensure!(is_known, "no group {name}\nhint: {}", GROUPS.map(|(group, _)| group).join(", "));
    }
    step("setup", setup::run)?;
    build::run()?;
    let mut figures = Vec::new();
    for (group, measure) in GROUPS {
        if names.is_empty() || names.iter().any(|name| name == group) {
            figures.extend(measure()?);
        }
    }
    println!(
        "{:44} {:>12} {:16} {:28} {:>12} {:>7}",
        "figure", "value", "unit", "peer", "peer's", "ratio"
    );
    for figure in &figures {
        let Figure { name, value, unit, peer, peer_value, ratio } = figure;
        println!("{name:44} {value:12.0} {unit:16} {peer:28} {peer_value:12.0} {ratio:7.2}");
    }
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&serde_json::json!({ "figures": figures }))?;
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> Result<f64> {
    ensure!(!values.is_empty(), "nothing was measured");
    values.sort_by(f64::total_cmp);
    Ok(values[values.len() / 2])
}

/// Boot packets that one core can check.
fn checks() -> Result<Vec<Figure>> {
    let example = ["run", "--quiet", "--release", "--package", "packetd", "--example", "checks"];
    let text = output(Command::new("cargo").args(example).current_dir(root()))?;
    let told: serde_json::Value = serde_json::from_str(&text)?;
    let rate = told["boot_checks_per_s"].as_f64().context("no rate")?;
    let peer = "the paper (2006)";
    let memory_kib = told["memory_kib"].as_f64().context("no memory")?;
    Ok(vec![
        Figure::new("boot-token checks, one core", rate, "1/s", peer, PAPER_CHECKS),
        Figure::new("processor time of a check", 1e9 / rate, "ns", peer, 1e9 / PAPER_CHECKS),
        Figure::new("memory while checking", memory_kib, "KiB", "its packets alone", 2048.0),
    ])
}

/// STATUS of a thousand jobs at one node: once a second by the broker and by each job's home node is 2000.
fn polls() -> Result<Vec<Figure>> {
    let example = ["run", "--quiet", "--release", "--package", "noded", "--example", "polls"];
    let text = output(Command::new("cargo").args(example).current_dir(root()))?;
    let told: serde_json::Value = serde_json::from_str(&text)?;
    let value = |key: &str| told[key].as_f64().context("no figure");
    let peer = "needed: 2 a second and job";
    Ok(vec![
        Figure::new(
            "STATUS polls of 1000 jobs, one core",
            value("status_polls_per_s")?,
            "1/s",
            peer,
            2000.0,
        ),
        Figure::new(
            "processor time of a STATUS poll",
            1e9 / value("status_polls_per_s")?,
            "ns",
            "all of a core for 2000 a second",
            1e9 / 2000.0,
        ),
        Figure::new(
            "node's memory for 1000 jobs' records",
            value("memory_kib")?,
            "KiB",
            "its limit, 16384 jobs, to scale",
            40.0 * 1024.0 / 16.384,
        ),
    ])
}

/// Purchases, all of them on disk when they are answered: on the broker's own store beside PostgreSQL.
fn sales() -> Result<Vec<Figure>> {
    let example = ["run", "--quiet", "--release", "--package", "broker", "--example", "sales"];
    let text = output(Command::new("cargo").args(example).current_dir(root()))?;
    let told: serde_json::Value = serde_json::from_str(&text)?;
    let figure = |name, key: &str, unit| -> Result<Figure> {
        let value = |store: &str| told[store][key].as_f64().context("no figure");
        let peer = "broker on PostgreSQL";
        Ok(Figure::new(name, value("sqlite")?, unit, peer, value("postgres")?))
    };
    Ok(vec![
        figure("purchases on the embedded store", "purchases_per_s", "1/s")?,
        figure("broker's processor time a purchase", "cpu_us_per_purchase", "us")?,
        figure("broker's memory under purchases", "memory_kib", "KiB")?,
        figure("broker's processor time to poll 1000 jobs", "cpu_ms_per_round_of_polls", "ms")?,
    ])
}

/// Boot time and memory of a VM beside QEMU's in the same node.
fn one_node() -> Result<Vec<Figure>> {
    let bench = Bench::up(1, RUNS)?;
    let told = bench.lab.console(1)?;
    let qemu_boot = median(numbers(&told, "bench: qemu", "boot_ms="))?;
    let qemu_private = median(numbers(&told, "bench: qemu", "private_kib="))?;
    let (mut boots, mut privates) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (took, vm) = bench.boot(1)?;
        boots.push(took.as_secs_f64() * 1000.0);
        std::thread::sleep(SETTLE);
        let told = numbers(&bench.lab.console(1)?, "bench: vmm", "private_kib=");
        privates.push(*told.last().context("the node tells no vmm's memory")?);
        bench.stop(&vm)?;
    }
    bench.down()?;
    let peer = "QEMU microvm, same node";
    Ok(vec![
        Figure::new("BOOT sent to user space", median(boots)?, "ms", peer, qemu_boot),
        Figure::new("private memory of an idle VM", median(privates)?, "KiB", peer, qemu_private),
    ])
}

/// Bootstrapping every node at once beside one node alone.
fn two_nodes() -> Result<Vec<Figure>> {
    let bench = Bench::up(2, 0)?;
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (took, vm) = bench.boot(1)?;
        alone.push(took.as_secs_f64() * 1000.0);
        bench.stop(&vm)?;
        let start = Instant::now();
        let vms = std::thread::scope(|scope| {
            let bench = &bench;
            let boots = [1, 2].map(|node| scope.spawn(move || bench.boot(node)));
            boots.map(|boot| boot.join().expect("a boot does not panic"))
        });
        together.push(start.elapsed().as_secs_f64() * 1000.0);
        for vm in vms {
            bench.stop(&vm?.1)?;
        }
    }
    bench.down()?;
    let (alone, together) = (median(alone)?, median(together)?);
    let name = "bootstrap of all (2) nodes at once";
    Ok(vec![Figure::new(name, together, "ms", "one node alone", alone)])
}

/// The numbers behind `name` in the lines that start with `line`.
fn numbers(text: &str, line: &str, name: &str) -> Vec<f64> {
    let lines = text.lines().filter(|text| text.contains(line));
    lines
        .filter_map(|text| text.split(name).nth(1)?.split_whitespace().next()?.parse().ok())
        .collect()
}

/// A lab of benchmark nodes and a customer with money.
struct Bench {
    lab: Lab,
    broker: Broker,
    /// The key of the customer's account.
    account: String,
    loader: Vec<u8>,
    layout: Layout,
    dir: PathBuf,
}

impl Bench {
    /// Brings up `nodes` nodes, each of which runs the peer `runs` times first.
    fn up(nodes: u8, runs: usize) -> Result<Self> {
        Self::up_with(&Shape { nodes, memory_mib: NODE_MIB, vcpus: 2, ..Shape::default() }, runs)
    }

    fn up_with(shape: &Shape, runs: usize) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("onde-bench-{}", std::process::id()));
        let files = dir.join("files");
        fs::create_dir_all(&files)?;
        let guest = files.join("guest.cpio");
        fs::write(&guest, guest_image()?)?;
        fs::write(files.join("runs"), runs.to_string())?;
        fs::write(files.join("cmdline"), CMDLINE)?;
        let kernel = KernelCache::find()?;
        let nodes = shape.nodes;
        let progress = Step::new(&format!("{nodes} node(s) boot; the peer runs {runs} times"));
        let lab = Lab::up_for_now(&dir.join("lab"), shape, &extras(&kernel, &files)?)?;
        progress.done("ready");
        fs::remove_dir_all(&files)?;
        lab.enter()?;
        let (broker, account) = customer(&lab, nodes)?;
        let loader = fs::read(programs::find("loader")?)?;
        let (vmlinux, initrd) = (fs::read(kernel.vmlinux)?, guest_image()?);
        let layout = layout::cold(&vmlinux, &initrd, CMDLINE, u64::from(GUEST_MIB) << 20)?;
        Ok(Self { lab, broker, account, loader, layout, dir })
    }

    /// Takes the lab down and removes all files.
    fn down(self) -> Result<()> {
        self.lab.down()?;
        Ok(fs::remove_dir_all(self.dir)?)
    }

    /// Buys and boots a VM; how long it took from the BOOT packet to the guest's first line.
    fn boot(&self, node: u32) -> Result<(Duration, Handle)> {
        let opened = self.broker.open_job(&JobRequest {
            idempotency_key: new_key()?,
            node: Some(NodeChoice::Number(node)),
            mem_mib: GUEST_MIB,
            vcpus: 1,
            disk_mib: 0,
            net_kib_s: 0,
            loader_sha256: Hex(sha256(&self.loader)),
            tokens: 200,
            moves: None,
            template: false,
            clones: None,
        })?;
        let (job, key) = (opened.job.id.0, Key::new(&opened.job_key.0));
        let vm = Handle { job, key, node: opened.job.node_ipv4 };
        let token = BootToken::parse(&opened.boot_token.0).context("the broker's token")?;
        let start = Start { job, space: Space::of_mib(GUEST_MIB, 0), vcpus: 1 };
        let mut echo = Echo::open()?;
        let begun = Instant::now();
        let booted = vm.boot(&mut echo, token, opened.boot_tag.0)?;
        let ipv4 = Ipv4Addr::from(booted.ipv4);
        bootstrap::boot(&vm, ipv4, &self.loader, &start, &self.layout, |_| {})?;
        self.wait_for_mark(&vm, &mut echo)?;
        Ok((begun.elapsed(), vm))
    }

    fn wait_for_mark(&self, vm: &Handle, echo: &mut Echo) -> Result<()> {
        let (begun, mut console) = (Instant::now(), Vec::new());
        while begun.elapsed() < BOOT_MAX {
            let slice = vm.console(echo, console.len() as u64)?;
            console.extend(&slice.data[..usize::from(slice.len)]);
            if console.windows(MARK.len()).any(|window| window == MARK) {
                return Ok(());
            }
            std::thread::sleep(LOOK_PERIOD);
        }
        anyhow::bail!("the guest did not reach user space: {}", String::from_utf8_lossy(&console))
    }

    fn stop(&self, vm: &Handle) -> Result<()> {
        let certificate = vm.stop(&mut Echo::open()?)?;
        self.broker.redeem(&vm.job, &certificate)?;
        Ok(())
    }
}

/// A customer's account with more than all runs can use, once the broker sees the nodes.
fn customer(lab: &Lab, nodes: u8) -> Result<(Broker, String)> {
    let url = &lab.broker_url()?;
    let operator = Broker::new(url, fs::read_to_string(lab.dir().join("admin.key"))?.trim())?;
    let opened = operator.open_account("bench")?;
    let micro = 1_000_000 * TOKEN_MICRO;
    operator.credit("bench", &CreditRequest { idempotency_key: new_key()?, micro })?;
    let broker = Broker::new(url, &opened.key)?;
    let begun = Instant::now();
    while broker.nodes()?.iter().filter(|node| node.alive).count() < usize::from(nodes) {
        ensure!(begun.elapsed() < BOOT_MAX, "the broker does not see all nodes");
        std::thread::sleep(LOOK_PERIOD);
    }
    Ok((broker, opened.key))
}

/// The guest's initramfs: `bench-guest` alone.
fn guest_image() -> Result<Vec<u8>> {
    guest::single(&programs::find("bench-guest")?, &[])
}

/// What the node needs to run the peer: our first program, QEMU with its libraries and firmware, the guest.
fn extras(kernel: &KernelCache, files: &Path) -> Result<Vec<Extra>> {
    let extra = |source: PathBuf, target: &str| Extra { source, target: target.to_owned() };
    let qemu = programs::required("qemu-system-x86_64")?;
    let mut extras = vec![
        extra(programs::find("bench-node")?, "init"),
        extra(programs::find("noded")?, "bin/noded"),
        extra(kernel.vmlinux.clone(), "bench/vmlinux"),
    ];
    for entry in fs::read_dir(files)? {
        let file = entry?;
        let name = file.file_name();
        extras.push(extra(file.path(), &format!("bench/{}", name.to_string_lossy())));
    }
    // QEMU is the distribution's own program, so asking its loader is safe.
    let libraries = output(Command::new("ldd").arg(&qemu))?;
    let paths = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for path in paths {
        extras.push(extra(fs::canonicalize(path)?, path.trim_start_matches('/')));
    }
    extras.push(extra(qemu, "usr/bin/qemu-system-x86_64"));
    for name in
        ["bios-microvm.bin", "linuxboot.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin"]
    {
        let file = PathBuf::from("/usr/share/qemu").join(name);
        extras.push(extra(fs::canonicalize(&file)?, &format!("usr/share/qemu/{name}")));
    }
    Ok(extras)
}
