//! What a copy of a machine does first: it becomes somebody else. Everything in it believes to be the source, so
//! it takes its own random numbers, name and addresses, drops the source's connections, and lets nobody in any more
//! who knew the source. Its programs stand still all the while. The node lets no packet with the source's addresses out.
//!
//! ```text
//!   FREEZE returns --become_other--> itself --hold--> serves more copies --release--> hooks, then its programs go on
//! ```

use anyhow::{Context, Result};
use onde_wire::key::Key;
use onde_wire::machine::Identity;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::children::{Children, spawn_thread};
use crate::freezer::Frozen;
use crate::session::Guest;
use crate::{connections, guest, hooks, network};

const MACHINE_ID: &str = "/etc/machine-id";
/// A copy that nobody asked for anything for so long goes on by itself: its client is gone, and it is whole.
const HELD_MAX: Duration = Duration::from_secs(120);

/// What a machine is as a copy: whether its programs still wait.
#[derive(Default)]
pub struct Copied {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    frozen: Option<Frozen>,
    /// When they wait no longer; `None` while more copies are being made of it.
    until: Option<Instant>,
}

impl Copied {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The programs wait for [`Self::release`]. A copy of a copy has them waiting already.
    pub fn set(&self, frozen: Option<Frozen>) {
        let mut state = self.lock();
        state.until = Some(Instant::now() + HELD_MAX);
        state.frozen = state.frozen.take().or(frozen);
    }

    /// Whether the programs wait.
    pub fn is_held(&self) -> bool {
        self.lock().frozen.is_some()
    }

    /// Copies are being made of this machine: its programs wait for as long as that takes, since all of them are to be it at
    /// one instant.
    pub fn serve(&self) {
        self.lock().until = None;
    }

    /// They are made: its client's time begins anew.
    pub fn served(&self) {
        self.lock().until = Some(Instant::now() + HELD_MAX);
        self.changed.notify_all();
    }

    /// The programs wait, but not for ever.
    pub fn hold(self: &Arc<Self>, children: &Arc<Children>) {
        let (copied, children) = (self.clone(), children.clone());
        let started = spawn_thread("hold", move || copied.watch(&children));
        if started.is_err() {
            // Without a thread nobody would let them go.
            self.release_now();
        }
    }

    fn watch(&self, children: &Children) {
        let mut state = self.lock();
        while state.frozen.is_some() {
            let Some(until) = state.until else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return self.release(children);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs the hooks of a copy, then lets its programs go on. A machine whose programs run stays as it is.
    pub fn release(&self, children: &Children) {
        // Taken out under the lock: hooks run once.
        let frozen = self.lock().frozen.take();
        if frozen.is_some() {
            hooks::run(children, hooks::FORKED);
        }
        drop(frozen);
        self.changed.notify_all();
    }

    fn release_now(&self) {
        self.lock().frozen = None;
    }
}

/// Makes this machine, a copy of the one at `source`, the one of `identity`. Errors: what leaves it no good to anybody.
pub fn become_other(guest: &Guest, source: Ipv4Addr, identity: &Identity) -> Result<()> {
    network::take_down()?;
    // First of all: whatever is drawn from here on is this machine's own.
    onde_sys::random::reseed(&identity.seed).context("cannot reseed random numbers")?;
    guest.door.renew(identity.job, &identity.job_key);
    if let Ok(program) = &guest.program {
        program.forget_clients();
    }
    connections::reset_all(source);
    renew_fast_open(identity);
    guest::set_host_name(identity)?;
    if Path::new(MACHINE_ID).exists() {
        std::fs::write(MACHINE_ID, machine_id(identity))
            .context("cannot write the machine's id")?;
    }
    network::take_over(identity)?;
    println!("onde-agent: copy ready {}", Ipv4Addr::from(identity.ipv4));
    Ok(())
}

/// 32 hex digits and a newline, machine-id(5).
fn machine_id(identity: &Identity) -> String {
    identity.job.iter().map(|byte| format!("{byte:02x}")).chain(["\n".to_owned()]).collect()
}

/// The one secret of Linux's TCP that can be set (ip-sysctl.rst, tcp_fastopen_key), from the machine's own seed.
fn renew_fast_open(identity: &Identity) {
    let key = Key::new(&identity.seed).tag(&[b"tcp fast open"]);
    let words = key.as_chunks::<4>().0.iter().take(4);
    let words: Vec<_> = words.map(|word| format!("{:08x}", u32::from_le_bytes(*word))).collect();
    // A kernel without it has no such secret.
    let _ = std::fs::write("/proc/sys/net/ipv4/tcp_fastopen_key", words.join("-"));
}
