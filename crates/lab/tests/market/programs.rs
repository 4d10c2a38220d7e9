//! Cases in which all is well: programs and kernels run, and the books say so.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Result, bail, ensure};
use onde_client::api::SettledBy;
use onde_lab::kernel::KernelCache;
use onde_lab::{Lab, guest};

use crate::world::{World, console_tail, wait};

/// Real input that every Debian has.
const INPUT: &str = "/usr/share/common-licenses/GPL-3";

/// A program of the distribution, dynamically linked, gives byte for byte what it gives on the host, and
/// its price is what the account loses.
pub fn same_bytes(world: &World) -> Result<()> {
    let before = world.balance()?;
    let here = Command::new("/usr/bin/sort").arg(INPUT).env("LC_ALL", "C").output()?;
    let run = ["run", "-q", "--env", "LC_ALL", "--file", INPUT, "--", "/usr/bin/sort", INPUT];
    let there = world.command(run)?.output()?;
    let complaint = String::from_utf8_lossy(&there.stderr);
    ensure!(there.status.success(), "{}: {complaint}", there.status);
    ensure!(here.stdout == there.stdout, "{} bytes instead", there.stdout.len());
    let job = world.newest_job()?;
    ensure!(job.settled_by == Some(SettledBy::Certificate), "{:?}", job.settled_by);
    let cost = world.cost(&job)?;
    ensure!(cost > 0 && before - world.balance()? == cost, "cost {cost}");
    Ok(())
}

pub fn pipes_and_status(world: &World) -> Result<()> {
    let script = "read line; echo \"got $line\"; echo trouble >&2; exit 7";
    let mut onde = world.command(["run", "-q", "--", "/bin/sh", "-c", script])?;
    onde.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut onde = onde.spawn()?;
    onde.stdin.take().expect("piped above").write_all(b"this line\nand more\n")?;
    let done = onde.wait_with_output()?;
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.code() == Some(7), "{}: {error}", done.status);
    ensure!(done.stdout == b"got this line\n", "{:?}", String::from_utf8_lossy(&done.stdout));
    ensure!(error.ends_with("trouble\n"), "{error:?}");
    Ok(())
}

pub fn detached(world: &World) -> Result<()> {
    let script = "echo first; read line < /proc/self/stat; while :; do sleep 1; done";
    let sleep = ["--file", "/usr/bin/sleep"];
    let run = [&["run", "-d", "--name", "far"], &sleep[..], &["--", "/bin/sh", "-c", script]];
    world.onde(run.concat())?;
    wait("the program's output", || Ok(world.onde(["logs", "far"])?.contains("first\n")))?;
    let told = world.onde(["exec", "far", "--", "/bin/sh", "-c", "echo in the same VM: $PPID"])?;
    ensure!(told.starts_with("in the same VM"), "{told:?}");
    let rows: serde_json::Value = serde_json::from_str(&world.onde(["ps", "--json"])?)?;
    let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "far"));
    ensure!(row.is_some_and(|row| row["state"] == "running"), "{rows}");
    world.onde(["stop", "far"])?;
    ensure!(world.newest_job()?.settled_by == Some(SettledBy::Certificate), "not settled");
    Ok(())
}

pub fn own_kernel(world: &World) -> Result<()> {
    let before = world.balance()?;
    let initrd = world.file("own.cpio");
    // The kernel opens the console for init once /dev is there.
    fs::write(&initrd, guest::initramfs("echo my own system, kernel and all\nread forever")?)?;
    let kernel = KernelCache::find()?.vmlinuz;
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    let order = ["--name", "own", "--tokens", "60", "--budget", "60"];
    let cmdline = ["--cmdline", "console=ttyS0 quiet panic=-1"];
    let boot = [&["boot", "--kernel", &kernel, "--initrd", &initrd], &order[..], &cmdline].concat();
    world.onde(boot)?;
    wait("the console", || Ok(world.onde(["console", "own"])?.contains("my own system")))?;
    world.onde(["pay", "own", "5"])?;
    let status: serde_json::Value =
        serde_json::from_str(&world.onde(["status", "own", "--json"])?)?;
    ensure!(status.to_string().contains("running"), "{status}");
    world.onde(["stop", "own"])?;
    let job = world.newest_job()?;
    ensure!(job.sold == 65, "{} tokens sold", job.sold);
    ensure!(job.refund_micro > 0, "no change");
    ensure!(before - world.balance()? == world.cost(&job)?, "the books do not balance");
    Ok(())
}

/// A VM that an emulator crashed is no verdict on ours; one that crashes as often as this is.
const EMULATED_TRIALS: u32 = 4;

/// On a lab of its own, whose nodes have two processors.
pub fn processors(world: &World) -> Result<()> {
    for trial in 1..=EMULATED_TRIALS {
        // The lab's QEMU may crash a VM of two processors (README, "What it does not do yet").
        let Some(words) = processors_or_crash(world)? else { return Ok(()) };
        println!("  trial {trial}: the emulated VM or its node crashed: {words}");
    }
    bail!("in each of {EMULATED_TRIALS} trials a VM or its node crashed")
}

/// What was seen of a VM that the emulator crashed; nothing where all was as it should be.
fn processors_or_crash(world: &World) -> Result<Option<String>> {
    let onde = |args: &[&str]| -> Result<String> {
        let mut onde = world.command(args)?;
        onde.env("ONDE_LAB_DIR", world.file("smp")).env("ONDE_CONFIG", world.file("smp.toml"));
        let done = onde.output()?;
        ensure!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(String::from_utf8(done.stdout)?)
    };
    onde(&["lab", "up", "--nodes", "2", "--vcpus", "2"])?;
    let done = both_move(&onde).map(|()| None).or_else(|error| {
        // What its nodes said is about to be gone.
        let status = onde(&["status", "both"]).unwrap_or_else(|error| error.to_string());
        let lab = Lab::attach(&world.file("smp"));
        let tails = |lab: &Lab| [1, 2].map(|node| console_tail(lab, node)).concat();
        let consoles = lab.as_ref().map_or_else(ToString::to_string, tails);
        let is_emulated =
            lab.and_then(|lab| lab.status()).is_ok_and(|lab| lab.accelerator == "tcg");
        // A triple fault, a VM that the processor refuses to enter, or a node that stands still for good.
        let has_crashed = consoles.contains("ended (Reset)")
            || consoles.contains("FailEntry(")
            || onde(&["node", "ls", "--json"]).is_ok_and(is_one_silent);
        let error = error.context(format!("{status}\n{consoles}"));
        if is_emulated && has_crashed { Ok(Some(format!("{error:#}"))) } else { Err(error) }
    });
    // Nobody else could stop it. One that crashed is over already, and a node that did knows nothing.
    let stopped = onde(&["stop", "both"]);
    onde(&["lab", "down"])?;
    match done? {
        None => stopped.map(|_| None),
        crashed => Ok(crashed),
    }
}

/// Whether one of these nodes does not answer.
fn is_one_silent(nodes: String) -> bool {
    let nodes = serde_json::from_str::<Vec<serde_json::Value>>(&nodes).unwrap_or_default();
    nodes.iter().any(|node| node["alive"] == false)
}

/// Two loops, each on a processor of its own, go on after their VM was on disk and after it moved.
fn both_move(onde: &impl Fn(&[&str]) -> Result<String>) -> Result<()> {
    // They sleep: an emulated VM whose processors are both busy crashes more often.
    const COUNT: &str = "count() { exec taskset $1 /bin/sh -c \"i=0; while :; do i=\\$((i + 1)); \
                         echo \\$i > /dev/shm/$2; sleep 0.1; done\"; }; count 1 one & count 2 two";
    const READ: &str = "for name in one two; do until [ -s /dev/shm/$name ] && read n < /dev/shm/$name; do \
                        sleep 0.1; done; echo $n; done; nproc";
    let order = ["run", "-d", "--name", "both", "--vcpus", "2", "--memory", "160", "--node", "1"];
    let files = ["/usr/bin/nproc", "/usr/bin/taskset", "/usr/bin/sleep"];
    let files = files.map(|file| ["--file", file]).concat();
    onde(&[&order[..], &files, &["--", "/bin/sh", "-c", COUNT]].concat())?;
    let read = || -> Result<Vec<u64>> {
        let told = onde(&["exec", "both", "--", "/bin/sh", "-c", READ])?;
        Ok(told.lines().map(str::parse).collect::<Result<_, _>>()?)
    };
    let mut before = vec![0, 0, 2];
    for act in [&["suspend", "both"][..], &["resume", "both"], &["migrate", "both", "2"]] {
        if act[0] != "resume" {
            wait("both loops to go on", || {
                let now = read()?;
                let is_on = now[0] > before[0] && now[1] > before[1] && now[2] == 2;
                before = if is_on { now } else { before.clone() };
                Ok(is_on)
            })?;
        }
        onde(act)?;
    }
    let last = before.clone();
    wait("both loops to go on where they moved to", || {
        let now = read()?;
        ensure!(now[0] >= last[0] && now[1] >= last[1], "{now:?} after {last:?}");
        Ok(now[0] > last[0] && now[1] > last[1] && now[2] == 2)
    })
}

/// Nothing of the VMs before is left on the nodes: as much is free as when they were new.
pub fn node_is_as_before(world: &World) -> Result<()> {
    for (number, new) in (1..).zip(&world.new_nodes) {
        wait("the node to be empty", || {
            let hello = world.hello(number)?;
            Ok((hello.mem_mib_free, hello.slots_free) == (new.mem_mib_free, new.slots_free))
        })?;
    }
    Ok(())
}
