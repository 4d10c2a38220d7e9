//! `/init` of a node image for `cargo xtask bench`: first runs the peer, QEMU's microvm on the node's KVM, with
//! the same guest; then watches how much private memory each `vmm` has; and becomes `noded`. Its results are
//! lines on the node's console. Where `/bench/mover` is, it is the peer's host in the migration benchmark
//! instead ([`mover`]), until it is told to become `noded`. Never part of what is shipped.
#![forbid(unsafe_code)]

mod mover;

use std::ffi::CStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};

/// What the guest prints first (see `bench-guest`).
const MARK: &str = "onde-bench: user space";
/// Memory of the guest, MiB, and so the size of the one mapping that is not the VMM's own.
const GUEST_MIB: u64 = 256;
/// A guest that has not started by then never will: ten times the slowest seen.
const GUEST_START_MAX: Duration = Duration::from_secs(60);
/// More VMs than this are many.
const MANY: usize = 4;
/// How long a guest idles before its VMM's memory is read: its first housekeeping is over by then.
const SETTLE: Duration = Duration::from_secs(2);

fn main() {
    let watch = std::env::args().nth(1).is_some_and(|arg| arg == "watch");
    let done = if watch { watch_vmms() } else { run() };
    if let Err(error) = done {
        println!("bench: failed: {error:#}");
    }
}

fn run() -> Result<()> {
    mount_file_systems()?;
    load_modules()?;
    if Path::new(mover::MARK).exists() {
        mover::serve()?;
        bail!("noded does not start: {}", Command::new("/bin/noded").exec())
    }
    let runs: u32 = fs::read_to_string("/bench/runs")?.trim().parse()?;
    for _ in 0..runs {
        let (boot_ms, private_kib) = qemu_run()?;
        println!("bench: qemu boot_ms={boot_ms} private_kib={private_kib}");
    }
    println!("bench: qemu done");
    Command::new("/proc/self/exe").arg("watch").spawn().context("start the watch")?;
    bail!("noded does not start: {}", Command::new("/bin/noded").exec())
}

fn mount_file_systems() -> Result<()> {
    let none: Option<&CStr> = None;
    let all =
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("cgroup2", "/sys/fs/cgroup")];
    for (kind, target) in all {
        mount(kind, target, kind, MountFlags::empty(), none)
            .with_context(|| format!("mount {target}"))?;
    }
    Ok(())
}

/// Loads what `noded` would load; one of the two modules for KVM does not fit the processor.
fn load_modules() -> Result<()> {
    for name in fs::read_to_string("/etc/onde/modules")?.lines() {
        let file = fs::File::open(Path::new("/lib/modules").join(name))?;
        let _ = rustix::system::finit_module(file, c"", 0);
    }
    if Path::new("/dev/kvm").exists() { Ok(()) } else { bail!("no /dev/kvm") }
}

/// Milliseconds from the start of QEMU to the guest's first line, and QEMU's private memory then.
fn qemu_run() -> Result<(u128, u64)> {
    let line = fs::read_to_string("/bench/cmdline").context("/bench/cmdline")?;
    let start = Instant::now();
    let mut qemu = Command::new("/usr/bin/qemu-system-x86_64")
        .args(["-M", "microvm,accel=kvm,pit=off,pic=off,rtc=off", "-cpu", "host"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-m", &GUEST_MIB.to_string(), "-smp", "1"])
        .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        .args(["-L", "/usr/share/qemu", "-L", "/usr/share/seabios"])
        .args(["-kernel", "/bench/vmlinux", "-initrd", "/bench/guest.cpio"])
        .args(["-append", line.trim()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start QEMU")?;
    let seen = wait_for_mark(&mut qemu, start);
    std::thread::sleep(SETTLE);
    let private = private_kib(qemu.id());
    qemu.kill()?;
    qemu.wait()?;
    Ok((seen?, private?))
}

fn wait_for_mark(qemu: &mut Child, start: Instant) -> Result<u128> {
    let console = BufReader::new(qemu.stdout.take().context("QEMU's output")?);
    for line in console.lines() {
        let line = line?;
        if line.contains(MARK) {
            return Ok(start.elapsed().as_millis());
        }
        if start.elapsed() > GUEST_START_MAX {
            break;
        }
    }
    bail!("the guest under QEMU did not reach user space")
}

/// Private memory of a process but for the guest's RAM, KiB.
fn private_kib(pid: u32) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut private, mut is_ram) = (0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        match name {
            "Size:" => is_ram = value.parse::<u64>()? >= GUEST_MIB << 10,
            "Private_Clean:" | "Private_Dirty:" if !is_ram => private += value.parse::<u64>()?,
            _ => {}
        }
    }
    Ok(private)
}

/// What each VM's control group holds: all that its VMM and its guest have for themselves, the kernel's share included.
fn print_groups() -> Result<usize> {
    let mut held_kib = Vec::new();
    for node in fs::read_dir("/sys/fs/cgroup")?.flatten() {
        for group in fs::read_dir(node.path()).into_iter().flatten().flatten() {
            if let Ok(bytes) = fs::read_to_string(group.path().join("memory.current"))
                && group.file_name().as_encoded_bytes().starts_with(b"vm-")
            {
                held_kib.push(bytes.trim().parse::<u64>()? >> 10);
            }
        }
    }
    held_kib.sort_unstable();
    if let Some(median) = held_kib.get(held_kib.len() / 2) {
        println!("bench: groups count={} median_kib={median}", held_kib.len());
    }
    Ok(held_kib.len())
}

/// Prints the private memory of every `vmm` once a second, for as long as the node lives; of many, their groups' alone,
/// since to look at each page of each would keep the node busy.
fn watch_vmms() -> Result<()> {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        if print_groups()? > MANY {
            continue;
        }
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if command.starts_with(b"vmm\0")
                && let Ok(private) = private_kib(pid)
            {
                println!("bench: vmm pid={pid} private_kib={private}");
            }
        }
    }
}
