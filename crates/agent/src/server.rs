//! Accepts connections and gives each a thread. Bounded: strangers can open connections, and hold
//! them for as long as the hellos may take, but only who knows the job key gets a session.

use anyhow::{Context, Result};
use onde_client::channel::Channel;
use onde_wire::channel::PORT;
use onde_wire::key::Key;
use onde_wire::machine::Identity;
use onde_wire::token::JobId;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::children::{Children, spawn_thread};
use crate::program::Program;
use crate::session::{Guest, refuse_busy, serve};
use crate::start::NotStarted;

/// Most sessions at once: each costs four threads and 400 KiB with the command it may run.
const SESSIONS_MAX: usize = 32;
/// Most connections at once, those in their hellos included.
const CONNECTIONS_MAX: usize = 2 * SESSIONS_MAX;

/// See the module.
pub struct Server {
    listener: TcpListener,
    job: JobId,
    job_key: Key,
}

/// Counts something for as long as it lives.
struct Count(Arc<AtomicUsize>);

impl Count {
    /// One more; `None` if there would be more than `max`.
    fn take(count: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        let more = |now| (now < max).then_some(now + 1);
        let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
        count.fetch_update(set, get, more).is_ok().then(|| Self(count.clone()))
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Server {
    /// Listens on the port of agents, on every address.
    pub fn listen(identity: &Identity) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))
            .with_context(|| format!("cannot listen on port {PORT}"))?;
        Ok(Self::on(listener, identity.job, &identity.job_key))
    }

    /// Serves connections of this listener.
    pub fn on(listener: TcpListener, job: JobId, job_key: &[u8; 32]) -> Self {
        Self { listener, job, job_key: Key::new(job_key) }
    }

    /// Serves for ever. Errors: only what makes accepting impossible for good.
    pub fn run(
        self,
        children: Arc<Children>,
        program: Result<Arc<Program>, NotStarted>,
    ) -> Result<()> {
        let guest = Arc::new(Guest { children, program });
        let (connections, sessions) = (Arc::default(), Arc::default());
        loop {
            let (stream, _) = match self.listener.accept() {
                Ok(accepted) => accepted,
                // A client that gave up before it was accepted harms nobody else.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error).context("cannot accept connections"),
            };
            // Too many: closing is all the answer a stranger gets.
            let Some(count) = Count::take(&connections, CONNECTIONS_MAX) else { continue };
            let (guest, sessions): (_, Arc<AtomicUsize>) = (guest.clone(), Arc::clone(&sessions));
            let (job, job_key) = (self.job, self.job_key.clone());
            // Without memory for a thread this connection is closed, and the next may find some.
            let _ = spawn_thread("session", move || {
                let _count = count;
                converse(&guest, stream, &job, &job_key, &sessions);
            });
        }
    }
}

/// One connection, whose errors concern nobody but the client at its other end.
fn converse(
    guest: &Guest,
    stream: TcpStream,
    job: &JobId,
    job_key: &Key,
    sessions: &Arc<AtomicUsize>,
) {
    let Ok(channel) = Channel::accept(stream, job, job_key) else { return };
    let _ = match Count::take(sessions, SESSIONS_MAX) {
        Some(_count) => serve(guest, channel),
        None => refuse_busy(channel),
    };
}
