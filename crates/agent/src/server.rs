//! Accepts connections and gives each a thread. Only who knows the job key gets a session; strangers can open
//! connections, and dawdle, but among too many of those the oldest goes, so they keep no customer out.

use anyhow::{Context, Result};
use onde_client::channel::Channel;
use onde_wire::channel::PORT;
use onde_wire::machine::Identity;
use onde_wire::token::JobId;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::children::{Children, spawn_thread};
use crate::door::Door;
use crate::program::Program;
use crate::session::{Guest, refuse_busy, serve};
use crate::start::NotStarted;

/// Most sessions at once: each costs four threads and 400 KiB with the command it may run.
const SESSIONS_MAX: usize = 32;
/// Most connections at once that have yet to show that they know the job key: a customer's needs some milliseconds.
const PENDING_MAX: usize = 32;

/// See the module.
pub struct Server {
    listener: TcpListener,
    door: Arc<Door>,
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

/// Connections that have yet to show that they know the job key, the oldest first.
#[derive(Clone, Default)]
struct Pending(Arc<Mutex<VecDeque<(u64, TcpStream)>>>);

/// One of them, until it is dropped.
struct Stranger {
    pending: Pending,
    number: u64,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(u64, TcpStream)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a connection, in place of the oldest if there are too many.
    fn add(&self, number: u64, stream: &TcpStream) -> io::Result<Stranger> {
        let stream = stream.try_clone()?;
        let mut list = self.lock();
        list.push_back((number, stream));
        if list.len() > PENDING_MAX
            && let Some((_, oldest)) = list.pop_front()
        {
            // Its thread finds out; an error means that it has.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        Ok(Stranger { pending: self.clone(), number })
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.pending.lock().retain(|(number, _)| *number != self.number);
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
        Self { listener, door: Door::new(job, job_key) }
    }

    /// Serves for ever. Errors: only what makes accepting impossible for good.
    pub fn run(
        self,
        children: Arc<Children>,
        program: Result<Arc<Program>, NotStarted>,
    ) -> Result<()> {
        let guest = Arc::new(Guest::new(children, program, self.door.clone()));
        let payer = guest.clone();
        // A guest that cannot pay by itself serves all the same.
        let _ = spawn_thread("pocket", move || payer.pocket.run(&payer.copying));
        let sessions: Arc<AtomicUsize> = Arc::default();
        let pending = Pending::default();
        for number in 0.. {
            let (stream, _) = match self.listener.accept() {
                Ok(accepted) => accepted,
                // A client that gave up before it was accepted harms nobody else.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error).context("cannot accept connections"),
            };
            let Ok(stranger) = pending.add(number, &stream) else { continue };
            let Ok(inside) = self.door.enter(number, &stream) else { continue };
            let (guest, sessions) = (guest.clone(), sessions.clone());
            let (job, job_key) = self.door.key();
            // Without memory for a thread this connection is closed, and the next may find some.
            let _ = spawn_thread("session", move || {
                let _inside = inside;
                let Ok(channel) = Channel::accept(stream, &job, &job_key) else { return };
                // Errors concern nobody but the client at the other end.
                let _ = match Count::take(&sessions, SESSIONS_MAX) {
                    Some(_count) => serve(&guest, channel, stranger),
                    None => refuse_busy(channel, stranger),
                };
            });
        }
        Ok(())
    }
}
