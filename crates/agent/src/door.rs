//! Who may come in, and who is in: the job's key, and all connections. A copy of a
//! machine has another key, and nobody in it: its source's customers talk to the source.

use onde_wire::key::Key;
use onde_wire::token::JobId;
use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module.
pub struct Door {
    state: Mutex<State>,
}

struct State {
    job: JobId,
    key: Key,
    inside: HashMap<u64, TcpStream>,
}

/// A connection that is in, until it is dropped.
pub struct Inside {
    door: Arc<Door>,
    number: u64,
}

impl Door {
    /// Opens to those who know this job's key.
    pub fn new(job: JobId, key: &[u8; 32]) -> Arc<Self> {
        let state = State { job, key: Key::new(key), inside: HashMap::new() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The job and its key at present.
    pub fn key(&self) -> (JobId, Key) {
        let state = self.lock();
        (state.job, state.key.clone())
    }

    /// Notes a connection, by its number.
    pub fn enter(self: &Arc<Self>, number: u64, stream: &TcpStream) -> io::Result<Inside> {
        self.lock().inside.insert(number, stream.try_clone()?);
        Ok(Inside { door: self.clone(), number })
    }

    /// This machine moved: it is another job's now, and whoever is in stays.
    pub fn move_to(&self, job: JobId, key: &[u8; 32]) {
        let mut state = self.lock();
        (state.job, state.key) = (job, Key::new(key));
    }

    /// From now on this is another job's machine: all connections end.
    pub fn renew(&self, job: JobId, key: &[u8; 32]) {
        let mut state = self.lock();
        (state.job, state.key) = (job, Key::new(key));
        for stream in state.inside.values() {
            // Its threads find out; an error means that they have.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.door.lock().inside.remove(&self.number);
    }
}
