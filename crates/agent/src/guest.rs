//! Makes a guest out of a booted kernel: file systems, modules, name. Called once by `main`, in order;
//! whatever fails here ends the guest with one clear line on its console.

use anyhow::{Context, Result, bail};
use onde_wire::machine::{INFO_SIZE, INFO_START, Identity};
use onde_wire::session::{CLOCK_AHEAD_US, CLOCK_BEHIND_US, MODULES_PATH};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};
use rustix::system::RebootCommand;
use rustix::time::{ClockId, Timespec, clock_settime};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::freezer::CGROUPS;

/// File systems of the kernel and where programs look for them. `/run` and `/tmp` are in memory as they are.
const MOUNTS: [(&str, &str); 5] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
];

/// Links that programs expect in `/dev`, made by udev elsewhere.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Most modules in the list; a packed guest has about ten.
const MODULES_MAX: usize = 256;

/// Mounts all there is to mount.
pub fn mount_all() -> Result<()> {
    for (kind, target) in MOUNTS {
        if let Err(error) = std::fs::create_dir(target)
            && error.kind() != ErrorKind::AlreadyExists
        {
            return Err(error).with_context(|| format!("cannot make {target}"));
        }
        rustix::mount::mount(kind, target, kind, MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    // A guest without it works, and cannot be copied.
    let cgroups = rustix::mount::mount("cgroup2", CGROUPS, "cgroup2", MountFlags::empty(), None);
    if let Err(error) = cgroups {
        eprintln!("onde-agent: cannot mount {CGROUPS}: {error}");
    }
    for (target, link) in LINKS {
        std::os::unix::fs::symlink(target, link).with_context(|| format!("cannot make {link}"))?;
    }
    Ok(())
}

/// Lets programs have as many open files as they ask for; what they have without asking stays small, since
/// select(2) takes no more.
pub fn set_limits() -> Result<()> {
    const FILES_MAX: u64 = 512 << 10;
    let limit = Rlimit { current: Some(1024), maximum: Some(FILES_MAX) };
    rustix::process::setrlimit(Resource::Nofile, limit).context("cannot set limits")
}

/// Keeps the kernel from waking up without a reason: a machine that waits costs its customer nothing but its memory then. Where
/// one of these is not to be had, it wakes up more often.
pub fn quiet_kernel() {
    let settings = [
        // Twice a second, to see whether free memory lies in pieces.
        ("vm/compaction_proactiveness", "0"),
        // Once a second, to add up counters that are near enough as they are.
        ("vm/stat_interval", "60"),
        // Every four seconds, to find out that the node took the processor away.
        ("kernel/watchdog", "0"),
    ];
    for (name, value) in settings {
        let _ = std::fs::write(format!("/proc/sys/{name}"), value);
    }
}

/// The kernel modules that were packed and are not loaded yet, in the order of their list.
pub struct Modules {
    paths: VecDeque<String>,
}

impl Modules {
    /// Those of the packed list.
    pub fn read() -> Result<Self> {
        let list = std::fs::read_to_string(MODULES_PATH)
            .with_context(|| format!("cannot read {MODULES_PATH}"))?;
        Ok(Self { paths: list.lines().take(MODULES_MAX).map(str::to_owned).collect() })
    }

    /// Loads the next ones until `is_enough`, or all of them.
    pub fn load_until(&mut self, is_enough: impl Fn() -> bool) -> Result<()> {
        while !is_enough() {
            let Some(path) = self.paths.pop_front() else { break };
            load(&path)?;
        }
        Ok(())
    }
}

fn load(path: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("no kernel module {path}"))?;
    match rustix::system::finit_module(&file, c"", 0) {
        // What is there already serves as well.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot load {path}")),
    }
}

/// Who this guest is, from the machine's info page.
pub fn identity() -> Result<Identity> {
    let mut page = [0; INFO_SIZE];
    onde_sys::physical::read_page(INFO_START, &mut page)
        .with_context(|| format!("cannot read the info page at {INFO_START:#x}"))?;
    let Some(identity) = Identity::parse(&page) else {
        bail!("no info page at {INFO_START:#x}: this machine is no VM of Onde");
    };
    Ok(identity)
}

/// Names the guest after its job.
pub fn set_host_name(identity: &Identity) -> Result<()> {
    let prefix: String = identity.job[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("onde-{prefix}");
    rustix::system::sethostname(name.as_bytes()).context("cannot set the host name")
}

/// Sets the clock to what the customer's says, if it is off: the machine has none of its own to ask.
pub fn set_clock(unix_us: u64) -> io::Result<()> {
    let own = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    let is_behind = unix_us >= own.saturating_add(CLOCK_BEHIND_US);
    let is_ahead = own >= unix_us.saturating_add(CLOCK_AHEAD_US);
    if !is_behind && !is_ahead {
        return Ok(());
    }
    let tv_sec = i64::try_from(unix_us / 1_000_000).map_err(io::Error::other)?;
    let tv_nsec = (unix_us % 1_000_000 * 1000) as i64;
    Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?)
}

/// Ends the machine. Nothing is written back: all of it is memory.
pub fn power_off() {
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        eprintln!("onde-agent: cannot power off: {error}");
    }
}
