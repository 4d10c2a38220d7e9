//! Programs of the customer's that are run around a copy: those in `/etc/onde/NAME.d`, in the order of their names, one
//! after the other. They are waited for, but not for ever, and are not among the programs that are stopped.

use onde_wire::session::Launch;
use rustix::process::Signal;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::children::Children;
use crate::start;

/// Before a copy is begun, in the machine that is copied.
pub const PRE_FREEZE: &str = "/etc/onde/pre-freeze.d";
/// In a copy whose source goes on, once it is itself, before its programs go on.
pub const FORKED: &str = "/etc/onde/forked.d";
/// In a machine that moved, while its programs go on.
pub const MOVED: &str = "/etc/onde/moved.d";
/// Most of them in a folder.
const HOOKS_MAX: usize = 32;
/// All of a folder together: a copy that waits costs money.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs the hooks of a folder. One that is not done in time is killed, and those behind it do not run.
pub fn run(children: &Children, folder: &str) {
    let deadline = Instant::now() + LIMIT;
    for hook in list(folder) {
        if !run_one(children, &hook, deadline) {
            eprintln!("onde-agent: {} took too long", hook.display());
            return;
        }
    }
}

fn list(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.truncate(HOOKS_MAX);
    files
}

/// Whether the hook was done in time.
fn run_one(children: &Children, hook: &Path, deadline: Instant) -> bool {
    let argv = [hook.as_os_str().as_bytes(), b"\0"].concat();
    let env = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\0";
    let launch = Launch { window: None, uid: 0, gid: 0, cwd: b"/", argv: &argv, env };
    match start::hook(children, &launch) {
        Ok(program) => {
            program.end_input();
            let is_done = program.wait_exit(deadline).is_some();
            children.signal(&program, Signal::KILL);
            is_done
        }
        Err(error) => {
            eprintln!("onde-agent: {}", error.text);
            true
        }
    }
}
