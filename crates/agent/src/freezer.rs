//! The cgroup of the guest's programs (cgroup-v2.rst, "Core Interface Files"): the agent can stop them all and let them
//! go on, while it works itself. Hooks are not in it. It exists so that a copy of the machine becomes itself before
//! any program runs in it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where cgroups are in a guest.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// The programs' own.
const PROGRAMS: &str = "/sys/fs/cgroup/programs";
/// Programs stop at their next return from the kernel: milliseconds, unless a device hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Default)]
pub struct Freezer {
    /// `None` where the kernel has no such thing: then nothing can be stopped.
    dir: Option<PathBuf>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Those who want the programs stopped.
    holds: u32,
    /// Programs between fork and exec: a stopped one would keep its starter waiting.
    starting: u32,
}

/// While it lives, no program runs.
pub struct Frozen {
    freezer: Arc<Freezer>,
    /// Open, so that letting them go is one write.
    control: File,
}

/// While it lives, programs are not stopped.
pub struct Starting<'a>(&'a Freezer);

impl Freezer {
    /// That of this guest.
    pub fn of_guest() -> Arc<Self> {
        let dir = match std::fs::create_dir(PROGRAMS) {
            Ok(()) => Some(PROGRAMS.into()),
            Err(error) => {
                eprintln!("onde-agent: programs cannot be stopped: {PROGRAMS}: {error}");
                None
            }
        };
        Arc::new(Self { dir, ..Self::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the program that `command` will start be one of those that are stopped; waits while they are.
    pub fn enter(&self, command: &mut Command) -> io::Result<Starting<'_>> {
        if let Some(dir) = &self.dir {
            let procs = OpenOptions::new().write(true).open(dir.join("cgroup.procs"))?;
            onde_sys::leader::enter_cgroup(command, procs);
        }
        let state = self.lock();
        let waited = self.changed.wait_while(state, |state| state.holds > 0);
        waited.unwrap_or_else(PoisonError::into_inner).starting += 1;
        Ok(Starting(self))
    }

    /// Stops all programs; when this returns none of them runs. An error leaves them running.
    pub fn freeze(self: &Arc<Self>) -> io::Result<Frozen> {
        let Some(dir) = &self.dir else { return Err(ErrorKind::Unsupported.into()) };
        let control = OpenOptions::new().write(true).open(dir.join("cgroup.freeze"))?;
        let state = self.lock();
        let waited = self.changed.wait_while(state, |state| state.starting > 0);
        waited.unwrap_or_else(PoisonError::into_inner).holds += 1;
        // From here on an error is undone by the drop.
        let frozen = Frozen { freezer: self.clone(), control };
        (&frozen.control).write_all(b"1")?;
        wait_frozen(dir)?;
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let mut state = self.freezer.lock();
        state.holds -= 1;
        if state.holds == 0
            && let Err(error) = self.control.write_all(b"0")
        {
            eprintln!("onde-agent: programs stay stopped: {error}");
        }
        self.freezer.changed.notify_all();
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.lock().starting -= 1;
        self.0.changed.notify_all();
    }
}

/// Waits until `cgroup.events`, which tells of its changes by POLLPRI, says that all are stopped.
fn wait_frozen(dir: &Path) -> io::Result<()> {
    let mut events = File::open(dir.join("cgroup.events"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let left = Timespec::try_from(left).expect("some seconds");
        poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left))?;
    }
}
