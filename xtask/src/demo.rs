//! `cargo xtask demo`: what a new user would do, from set-up to change, with real commands on a lab of two diskless
//! nodes. Whatever is not as promised makes it fail; however it ends, the lab is taken down.

mod shell;

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use onde_lab::Lab;
use onde_lab::kernel::KernelCache;
use onde_wire::cluster::TOKEN_MICRO;
use serde_json::Value;

use crate::step::step;
use crate::{build, setup};
use shell::{Shell, Show, Told};

/// Nodes of the lab.
const NODES: u8 = 2;
/// Real input that every Debian has.
const INPUT: &str = "/usr/share/common-licenses/GPL-3";
/// The product of two primes of 16 digits: half a second for a PC, some seconds on emulated metal.
const PRODUCT: &str = "1000000000000128000000000003367";
/// Tokens that the account is opened with.
const CREDIT: u64 = 500;
/// What the customer's own system does: it proves itself, and waits.
const INIT: &str =
    "echo \"my own $(uname -sr) and my own init: 6 * 7 = $((6 * 7))\"\nread forever\n";
/// Memory that a node may have less of after its VMs than before, MiB: far less than any VM has. Its kernel keeps
/// it for the next one in its slabs.
const SLACK_MIB: u64 = 8;
/// Time for the keeper of a lab that was interrupted on its way up to clean up.
const CLEAN_PATIENCE: Duration = Duration::from_secs(20);

/// Runs the demo.
pub fn run() -> Result<()> {
    step("setup", setup::run)?;
    build::run()?;
    let begun = Instant::now();
    let dir = std::env::temp_dir().join(format!("onde-demo-{}", std::process::id()));
    fs::DirBuilder::new().mode(0o700).create(&dir)?;
    let shown = Demo::open(&dir).and_then(|demo| {
        demo.show().inspect_err(|_| {
            explain(&dir.join("lab"));
            // So that its home node, which is in the background, need not find out that the node is gone.
            demo.shell.clean_up(&["onde", "stop", "own"]);
        })
    });
    let cleaned = clean(&dir);
    shown?;
    cleaned?;
    println!("all as promised, in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// The story, and what it has to remember.
struct Demo {
    shell: Shell,
    dir: PathBuf,
}

/// What a node says that it holds while no VM lives.
#[derive(Debug, PartialEq, Eq)]
struct Idle {
    /// Processes, taps, cgroups.
    counts: String,
    free_mib: u64,
    /// Number of such lines on its console so far.
    line: usize,
}

impl Demo {
    fn open(dir: &Path) -> Result<Self> {
        let env = vec![
            ("ONDE_LAB_DIR", dir.join("lab").into()),
            ("ONDE_CONFIG", dir.join("config.toml").into()),
            ("XDG_STATE_HOME", dir.join("state").into()),
        ];
        Ok(Self { shell: Shell::open(env)?, dir: dir.to_owned() })
    }

    fn show(&self) -> Result<()> {
        let nodes = NODES.to_string();
        self.onde(
            "Virtual metal: two diskless nodes that know nobody, and a broker.",
            &["lab", "up", "--nodes", &nodes],
        )?;
        self.account()?;
        self.onde("What is for sale, and at what price in tokens.", &["node", "ls"])?;
        let offers = self.offers()?;
        let idle = (1..=NODES).map(|node| self.idle(node)).collect::<Result<Vec<_>>>()?;
        let seconds = vec![
            ("zip", self.same("zip", &["gzip", "-9nc", INPUT], &["--node", "1"])?),
            ("primes", self.same("primes", &["factor", PRODUCT], &["--node", "2"])?),
            ("own", self.own_kernel()?),
        ];
        let costs = self.costs()?;
        self.change(&costs)?;
        self.as_before(&offers, &idle)?;
        self.onde("Enough.", &["lab", "down"])?;
        println!("\n{:10} {:>4} {:>8} {:>8}  program", "job", "node", "seconds", "tokens");
        for (name, took) in seconds {
            let cost = costs.iter().find(|cost| cost.name == name).context("a job is missing")?;
            let (took, tokens) = (took.as_secs_f64(), tokens(cost.micro));
            println!("{name:10} {:>4} {took:8.1} {tokens:8.2}  {}", cost.node, cost.program);
        }
        Ok(())
    }

    /// Runs `onde` for all to see.
    fn onde(&self, comment: &str, words: &[&str]) -> Result<Told> {
        self.shell.run(comment, &[&["onde"], words].concat(), Show::Output)
    }

    /// Asks `onde` for JSON, without a word.
    fn json(&self, words: &[&str]) -> Result<Value> {
        let told = self.shell.ask(&[&["onde"], words, &["--json"]].concat())?;
        Ok(serde_json::from_slice(&told.output)?)
    }

    /// A prepaid account: opened and credited by the operator, used by the customer.
    fn account(&self) -> Result<()> {
        let opened = self.onde("The operator opens an account.", &["account", "open", "demo"])?;
        let credit = ["account", "credit", "demo", &CREDIT.to_string()];
        self.onde("Somebody paid: the operator credits it.", &credit)?;
        let key = opened.text();
        let take = ["account", "use", key.trim(), "--context", "demo"];
        self.onde("The customer has its key from here on.", &take)?;
        let balance = self.balance()?;
        ensure!(balance == CREDIT * TOKEN_MICRO, "the account has {balance} micro-tokens");
        Ok(())
    }

    fn balance(&self) -> Result<u64> {
        self.json(&["account", "show"])?["balance_micro"].as_u64().context("no balance")
    }

    /// Runs a program of this machine here and in a VM, which must print the same bytes. How long the VM took.
    fn same(&self, name: &str, program: &[&str], order: &[&str]) -> Result<Duration> {
        let here = self.shell.run("A program of this machine, run here.", program, Show::Size)?;
        let files: &[&str] = if program.contains(&INPUT) { &["--file", INPUT] } else { &[] };
        let run = [&["onde", "run", "--name", name], order, files, &["--"], program].concat();
        let comment =
            "The same, neither changed nor recompiled, in a VM that is there for it only.";
        let there = self.shell.run(comment, &run, Show::Size)?;
        let (size, size_there) = (here.output.len(), there.output.len());
        ensure!(here.output == there.output, "{size_there} bytes that are not the {size} of here");
        ensure!(size > 0, "no output");
        eprintln!("  the same {size} bytes as here");
        Ok(there.took)
    }

    /// A VM of the customer's own kernel and initramfs, from boot to certificate. How long it lived.
    fn own_kernel(&self) -> Result<Duration> {
        let kernel = KernelCache::find()?;
        let initrd = self.dir.join("own.cpio");
        fs::write(&initrd, onde_lab::guest::initramfs(INIT)?)?;
        let (vmlinuz, initrd) =
            (kernel.vmlinuz.display().to_string(), initrd.display().to_string());
        let system = [
            "--kernel",
            &vmlinuz,
            "--initrd",
            &initrd,
            "--cmdline",
            "console=ttyS0 quiet panic=-1",
        ];
        let order = ["--name", "own", "--node", "2", "--tokens", "20"];
        let begun = Instant::now();
        let boot = [&["boot"], &system[..], &order].concat();
        self.onde("A kernel and an initramfs of one's own: nothing in it knows of Onde.", &boot)?;
        let expect = format!("my own Linux {} and my own init: 6 * 7 = 42", kernel.version);
        self.shell.wait("the guest to say something", || {
            let told = self.shell.ask(&["onde", "console", "own"])?.text();
            ensure!(!told.contains("Kernel panic"), "the guest panics:\n{told}");
            Ok(told.contains(&expect).then_some(()))
        })?;
        self.onde("What it wrote to its serial console, after a while.", &["console", "own"])?;
        self.onde("It gets five tokens more while it runs.", &["pay", "own", "5"])?;
        let status = self.onde("How it stands.", &["status", "own"])?.text();
        let is_running = status.contains("running") && status.contains("of 25 paid");
        ensure!(is_running, "it does not run, or was not paid");
        self.onde("All jobs that are open.", &["ps"])?;
        let stopped = self.onde("The end: the node signs what was used.", &["stop", "own"])?;
        let certificate = "node 2 certifies: 25 tokens taken";
        ensure!(stopped.errors.contains(certificate), "no certificate");
        Ok(begun.elapsed())
    }

    /// What all jobs cost.
    fn costs(&self) -> Result<Vec<Cost>> {
        self.onde("All jobs there were.", &["ps", "--all"])?;
        let rows = self.json(&["ps", "--all"])?;
        rows.as_array().context("no list")?.iter().map(Cost::of).collect()
    }

    /// The change is in the account, to the last millionth of a token.
    fn change(&self, costs: &[Cost]) -> Result<()> {
        self.onde("What moved the account: the change came back.", &["account", "show"])?;
        let spent: u64 = costs.iter().map(|cost| cost.micro).sum();
        let lost = (CREDIT * TOKEN_MICRO).saturating_sub(self.balance()?);
        ensure!(
            spent > 0 && lost == spent,
            "jobs cost {spent} micro-tokens, the account lost {lost}"
        );
        eprintln!("  the account lost exactly what the jobs cost: {spent} millionths of a token");
        Ok(())
    }

    /// Memory and slots that each node offers.
    fn offers(&self) -> Result<Vec<[Value; 3]>> {
        let nodes = self.json(&["node", "ls"])?;
        let offer =
            |node: &Value| ["number", "mem_mib_free", "slots_free"].map(|key| node[key].clone());
        Ok(nodes.as_array().context("no list")?.iter().map(offer).collect())
    }

    /// What a node last said of itself while no VM lived on it.
    fn idle(&self, node: u8) -> Result<Idle> {
        let console = ["onde", "lab", "console", &node.to_string()];
        self.shell.wait("a node to count what it holds", || {
            Ok(parse_idle(&self.shell.ask(&console)?.text()))
        })
    }

    /// Nodes offer what they offered before, and hold what they held before.
    fn as_before(&self, offers: &[[Value; 3]], idle: &[Idle]) -> Result<()> {
        self.shell.wait("the nodes to offer what they offered at first", || {
            Ok((self.offers()? == offers).then_some(()))
        })?;
        self.onde("The nodes offer what they offered at first.", &["node", "ls"])?;
        for (node, before) in (1..=NODES).zip(idle) {
            self.shell.wait("a node to hold what it held at first", || {
                let after = self.idle(node)?;
                let is_same = after.counts == before.counts;
                let is_free = after.free_mib + SLACK_MIB >= before.free_mib;
                Ok((after.line > before.line && is_same && is_free).then_some(()))
            })?;
            let console = format!("onde lab console {node} | grep idle");
            let comment = "What the node's kernel holds, counted before and after its VMs.";
            self.shell.run(comment, &[&console], Show::Output)?;
        }
        Ok(())
    }
}

/// Micro-tokens as tokens, rounded up as `onde` has costs.
fn tokens(micro: u64) -> f64 {
    micro.div_ceil(10_000) as f64 / 100.0
}

/// What a job cost.
struct Cost {
    name: String,
    node: u64,
    program: String,
    micro: u64,
}

impl Cost {
    fn of(row: &Value) -> Result<Self> {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        ensure!(row["state"] == "settled", "job {} is {}", text("name"), row["state"]);
        Ok(Self {
            name: text("name"),
            node: row["node"].as_u64().context("no node")?,
            program: text("program"),
            micro: row["spent_micro"].as_u64().context("no cost")?,
        })
    }
}

/// The last line `onde: idle: COUNTS, N MiB free` on a console.
fn parse_idle(console: &str) -> Option<Idle> {
    let lines = console.lines().filter_map(|line| line.split_once("onde: idle: "));
    let (line, (_, last)) = lines.enumerate().last()?;
    let (counts, free) = last.rsplit_once(", ")?;
    let free_mib = free.split_once(" MiB")?.0.parse().ok()?;
    Some(Idle { counts: counts.to_owned(), free_mib, line })
}

/// After a failure: what the nodes said last.
fn explain(lab: &Path) {
    let Ok(Some(lab)) = Lab::find(lab) else { return };
    for node in 1..=NODES {
        let console = lab.console(node).unwrap_or_default();
        let lines: Vec<_> = console.lines().collect();
        let tail = &lines[lines.len().saturating_sub(8)..];
        tail.iter().for_each(|line| eprintln!("node {node}: {line}"));
    }
}

/// Takes down what is left of the lab, and removes all files.
fn clean(dir: &Path) -> Result<()> {
    let lab = dir.join("lab");
    let begun = Instant::now();
    // Ends: what runs is told to end, and a keeper that ends by itself is not waited for longer.
    loop {
        let down = match Lab::find(&lab) {
            Ok(Some(lab)) => lab.down(),
            _ => onde_lab::clean(&lab),
        };
        match down {
            Ok(()) => break,
            Err(error) if begun.elapsed() > CLEAN_PATIENCE => {
                return Err(error.context("the lab stays"));
            }
            // Its keeper is at it.
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_count_counts() {
        let console = "onde: node ready\r\nonde: idle: 2 processes, 0 taps, 0 cgroups, 1300 MiB free\r\n\
            onde: idle: 2 processes, 1 taps, 0 cgroups, 1299 MiB free\r\nelse\r\n";
        let counts = "2 processes, 1 taps, 0 cgroups".to_owned();
        assert_eq!(parse_idle(console), Some(Idle { counts, free_mib: 1299, line: 1 }));
        assert_eq!(parse_idle("onde: node ready"), None);
    }
}
