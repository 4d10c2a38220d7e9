//! What a copy of a machine does first: it becomes somebody else. Everything in it believes to be the source, so
//! it takes its own random numbers, name and addresses, and lets nobody in any more who knew the source. The node
//! lets no packet with the source's addresses out meanwhile. The programs in it go on.

use anyhow::{Context, Result};
use onde_wire::machine::Identity;
use onde_wire::session::Launch;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::session::Guest;
use crate::{guest, network, start};

/// Programs in here are run in a copy, in the order of their names, once it is itself.
const HOOKS: &str = "/etc/onde/forked.d";
/// Most of them.
const HOOKS_MAX: usize = 32;
const MACHINE_ID: &str = "/etc/machine-id";

/// Makes this machine the one of `identity`. Errors: what leaves it no good to anybody.
pub fn become_other(guest: &Guest, identity: &Identity) -> Result<()> {
    // First of all: whatever is drawn from here on is this machine's own.
    onde_sys::random::reseed(&identity.seed).context("cannot reseed random numbers")?;
    guest.door.renew(identity.job, &identity.job_key);
    if let Ok(program) = &guest.program {
        program.forget_clients();
    }
    network::take_over(identity)?;
    guest::set_host_name(identity)?;
    if Path::new(MACHINE_ID).exists() {
        std::fs::write(MACHINE_ID, machine_id(identity))
            .context("cannot write the machine's id")?;
    }
    for hook in hooks() {
        run(guest, &hook);
    }
    println!("onde-agent: copy ready {}", std::net::Ipv4Addr::from(identity.ipv4));
    Ok(())
}

/// 32 hex digits and a newline, machine-id(5).
fn machine_id(identity: &Identity) -> String {
    identity.job.iter().map(|byte| format!("{byte:02x}")).chain(["\n".to_owned()]).collect()
}

/// The hooks that are there.
fn hooks() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(HOOKS).into_iter().flatten();
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.truncate(HOOKS_MAX);
    files
}

/// Starts a hook; it may run for as long as it likes, and what it says is not kept.
fn run(guest: &Guest, hook: &Path) {
    let argv = [hook.as_os_str().as_bytes(), b"\0"].concat();
    let env = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\0";
    let launch = Launch { window: None, uid: 0, gid: 0, cwd: b"/", argv: &argv, env };
    match start::start(&guest.children, &launch) {
        Ok(program) => program.end_input(),
        Err(error) => eprintln!("onde-agent: {}", error.text),
    }
}
