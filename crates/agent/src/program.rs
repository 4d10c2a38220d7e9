//! A program of the guest as sessions see it: its output and who follows it, its input, how it ended.
//! One lock, one condition: [`crate::pump`] adds output, [`crate::input`] feeds input, [`crate::children`]
//! reports the end, [`crate::session`] does the rest. Never touches a descriptor of the program itself but its terminal.
//!
//! ```text
//!  program --> pump --> Tail --> sessions' senders --> clients
//!  program <-- feed <-- Input <-- sessions' receivers <--'
//! ```

use onde_wire::session::{Exit, OUTPUT_MAX, Window};
use rustix::termios::Winsize;
use std::io::PipeWriter;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::follower::Followers;
use crate::input::{Input, Malformed};
use crate::tail::Tail;

/// See the module.
pub struct Program {
    pid: u32,
    terminal: Option<OwnedFd>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    tail: Tail,
    followers: Followers,
    input: Input,
    exit: Option<Exit>,
    /// Closed at the program's end, which wakes the pump.
    running: Option<PipeWriter>,
    /// Whether all that the program wrote before its end is in the tail.
    is_drained: bool,
}

/// Where a session's sender stands.
pub struct Cursor<'a> {
    /// The connection's number, if the program waits for this client.
    pub connection: Option<u64>,
    /// Offset of the next byte of output to send.
    pub position: u64,
    /// What the client was told about its input.
    pub accepted: u64,
    /// Set when the receiver is through.
    pub is_closed: &'a AtomicBool,
}

/// What a session's sender does next.
pub enum Step {
    /// Send this many bytes of the buffer.
    Output {
        stream: u8,
        offset: u64,
        count: usize,
    },
    Accepted(u64),
    Exited(Exit),
    /// Another connection of the same client is there.
    Replaced,
    Closed,
    Idle,
}

/// What a client is told when it joins.
pub struct Joined {
    pub connection: Option<u64>,
    pub from: u64,
    pub end: u64,
    pub received: u64,
}

impl Program {
    /// A program that has just been started. `running` is closed when it ends.
    pub fn new(pid: u32, terminal: Option<OwnedFd>, running: PipeWriter) -> Self {
        let state = State {
            tail: Tail::new(),
            followers: Followers::default(),
            input: Input::default(),
            exit: None,
            running: Some(running),
            is_drained: false,
        };
        Self { pid, terminal, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Output is held for a first client that has yet to come.
    pub fn expect_client(&self) {
        self.change(|state| state.followers.expect(Instant::now()));
    }

    /// No client that was here comes again.
    pub fn forget_clients(&self) {
        self.change(|state| state.followers.clear());
    }

    /// Adds output; waits while the tail is full and someone still needs its oldest bytes.
    pub fn put_output(&self, stream: u8, bytes: &[u8]) {
        let mut state = self.lock();
        loop {
            let (floor, holds_for) = state.followers.floor(Instant::now());
            state.tail.forget(bytes.len(), floor);
            if state.tail.room() >= bytes.len() {
                break;
            }
            state = match holds_for {
                None => self.wait(state),
                Some(time) => {
                    let waited = self.changed.wait_timeout(state, time);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        state.tail.push(stream, bytes);
        drop(state);
        self.changed.notify_all();
    }

    /// All that the program wrote before its end was put.
    pub fn drained(&self) {
        self.change(|state| state.is_drained = true);
    }

    /// The program ended.
    pub fn exited(&self, exit: Exit) {
        self.change(|state| {
            state.exit = Some(exit);
            state.running = None;
            state.input.close();
        });
    }

    /// How the program ended, waiting for that until `deadline`.
    pub fn wait_exit(&self, deadline: Instant) -> Option<Exit> {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited =
            self.changed.wait_timeout_while(self.lock(), left, |state| state.exit.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.exit
    }

    /// A client that wants output from `from` on; the program waits for it if `hold`.
    pub fn join(&self, client: u64, from: u64, hold: bool) -> Joined {
        self.change(|state| {
            let end = state.tail.end();
            let from = from.clamp(state.tail.start(), end);
            state.followers.arrive();
            let connection = hold.then(|| state.followers.join(client, from));
            let follower = connection.and_then(|number| state.followers.of(number));
            let received = follower.map_or(0, |follower| follower.received);
            Joined { connection, from, end, received }
        })
    }

    /// The client of a connection is gone, on purpose or not.
    pub fn leave(&self, connection: u64, on_purpose: bool) {
        self.change(|state| match on_purpose {
            true => state.followers.leave(connection),
            false => state.followers.lose(connection, Instant::now()),
        });
    }

    /// Tells the sender of a session that its receiver is through.
    pub fn close(&self, is_closed: &AtomicBool) {
        self.change(|_| is_closed.store(true, Ordering::Relaxed));
    }

    /// A client has all output before `offset`.
    pub fn ack(&self, connection: u64, offset: u64) {
        self.change(|state| {
            let end = state.tail.end();
            if let Some(follower) = state.followers.of(connection) {
                follower.acked = offset.clamp(follower.acked, end.max(follower.acked));
            }
        });
    }

    /// Takes a client's input; what arrived before is skipped.
    pub fn put_input(&self, connection: u64, offset: u64, bytes: &[u8]) -> Result<(), Malformed> {
        self.change(|state| match state.followers.of(connection) {
            Some(follower) => state.input.put(follower, offset, bytes),
            None => Ok(()),
        })
    }

    /// The client has no more input.
    pub fn end_input(&self) {
        self.change(|state| state.input.end());
    }

    /// The next piece of input and whose it is, waiting for it; `None` when no more comes.
    pub fn take_input(&self) -> Option<(u64, Vec<u8>)> {
        let mut state = self.lock();
        loop {
            if let Some(piece) = state.input.take() {
                return Some(piece);
            }
            if state.input.is_over() {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// The program took `count` bytes of this client's input, or will never want them.
    pub fn accept_input(&self, client: u64, count: usize) {
        self.change(|state| {
            if let Some(follower) = state.followers.client(client) {
                follower.accepted += count as u64;
            }
        });
    }

    /// The program's terminal gets a new size, if it has one.
    pub fn resize(&self, window: Window) {
        let Some(terminal) = &self.terminal else { return };
        let size =
            Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
        // A terminal that hung up has no size to set, and the session ends by itself.
        let _ = rustix::termios::tcsetwinsize(terminal, size);
    }

    /// What a sender does next; waits for something if `idle`, else says [`Step::Idle`].
    pub fn next(&self, cursor: &mut Cursor<'_>, out: &mut [u8; OUTPUT_MAX], idle: bool) -> Step {
        let mut state = self.lock();
        loop {
            match state.step(cursor, out) {
                Step::Idle if idle => state = self.wait(state),
                step => return step,
            }
        }
    }
}

impl State {
    fn step(&mut self, cursor: &mut Cursor<'_>, out: &mut [u8; OUTPUT_MAX]) -> Step {
        if cursor.is_closed.load(Ordering::Relaxed) {
            return Step::Closed;
        }
        if let Some(connection) = cursor.connection {
            match self.followers.of(connection).map(|follower| follower.accepted) {
                None => return Step::Replaced,
                Some(accepted) if accepted > cursor.accepted => {
                    cursor.accepted = accepted;
                    return Step::Accepted(accepted);
                }
                Some(_) => {}
            }
        }
        // A client that nobody waits for may find that what comes next is gone.
        let offset = cursor.position.max(self.tail.start());
        if let Some((stream, count)) = self.tail.read(offset, out) {
            cursor.position = offset + count as u64;
            return Step::Output { stream, offset, count };
        }
        match self.exit {
            Some(exit) if self.is_drained => Step::Exited(exit),
            _ => Step::Idle,
        }
    }
}
