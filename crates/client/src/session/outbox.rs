//! What a client still has to say: input that the agent has not accepted, acknowledgements, signals.
//! It outlives connections: input that was sent over a connection that broke is sent again over the next,
//! from where the agent says. Filled by the threads that read input and signals, emptied by the sender's.

use onde_wire::session::{INPUT_MAX, STDIN_MAX, TAIL_MAX, Window};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Signals that wait; more than that a person does not press while a connection is away.
const SIGNALS_MAX: usize = 16;

/// Output is acknowledged in steps of this size, an eighth of what the agent keeps: often enough that a program
/// never waits, seldom enough to cost nothing.
const ACK_BYTES: u64 = TAIL_MAX as u64 / 8;

/// What to send next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Errand {
    Stdin {
        offset: u64,
        bytes: Vec<u8>,
    },
    StdinEof,
    Signal(u8),
    Window(Window),
    Ack(u64),
    Detach,
    /// The connection is over.
    Close,
}

#[derive(Default)]
struct State {
    /// Input from offset `accepted` on.
    input: VecDeque<u8>,
    accepted: u64,
    /// Offset of the first byte of input not sent over this connection.
    sent: u64,
    /// Input before this offset was taken before the agent forgot this client: it counts from here.
    base: u64,
    eof: bool,
    eof_sent: bool,
    signals: VecDeque<u8>,
    window: Option<Window>,
    written: u64,
    acked: u64,
    detach: bool,
    detach_sent: bool,
    closed: bool,
    /// The program needs no more input.
    done: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds input, waiting until there is room; false where no more is wanted.
    pub fn put_input(&self, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        while state.input.len() + bytes.len() > INPUT_MAX && !state.done {
            state = self.wait(state);
        }
        state.input.extend(bytes);
        self.changed.notify_all();
        !state.done
    }

    pub fn end_input(&self) {
        self.change(|state| state.eof = true);
    }

    pub fn signal(&self, signal: u8) {
        self.change(|state| {
            if state.signals.len() < SIGNALS_MAX {
                state.signals.push_back(signal);
            }
        });
    }

    pub fn resize(&self, window: Window) {
        self.change(|state| state.window = Some(window));
    }

    pub fn detach(&self) {
        self.change(|state| state.detach = true);
    }

    /// Whether the user asked to go.
    pub fn is_detaching(&self) -> bool {
        self.lock().detach
    }

    /// The agent has all input before `offset`; the program took it.
    pub fn accept(&self, offset: u64) {
        self.change(|state| state.forget_input(offset.saturating_add(state.base)));
    }

    /// All output before `offset` was written where it belongs.
    pub fn ack(&self, offset: u64) {
        self.change(|state| state.written = offset);
    }

    /// A connection stands: the agent `received` so much input and will send output from `from` on. `is_late`: the one
    /// before is so long ago that the agent may have forgotten this client, and then counts from zero. False if that leaves
    /// in doubt which input the program has: to send it again might double it.
    #[must_use]
    pub fn open(&self, received: u64, from: u64, is_late: bool) -> bool {
        let mut is_sure = true;
        self.change(|state| {
            let known = received.saturating_add(state.base);
            let in_doubt = state.sent > state.accepted;
            let is_forgotten = known < state.accepted || (is_late && received == 0 && in_doubt);
            is_sure = !(is_forgotten && in_doubt);
            if is_forgotten {
                state.base = state.accepted.saturating_sub(received);
            } else {
                state.forget_input(known);
            }
            state.sent = state.accepted;
            (state.eof_sent, state.detach_sent, state.closed) = (false, false, false);
            (state.written, state.acked) = (from, from);
        });
        is_sure
    }

    /// The connection is over: its sender ends.
    pub fn close(&self) {
        self.change(|state| state.closed = true);
    }

    /// Waits until the connection is over, or for so long.
    pub fn wait_closed(&self, time: Duration) {
        let state = self.lock();
        drop(self.changed.wait_timeout_while(state, time, |state| !state.closed));
    }

    /// The session is over: whoever has input for it ends.
    pub fn finish(&self) {
        self.change(|state| state.done = true);
    }

    /// What to send next, waiting for it; `None` at once if `idle` is false and there is nothing.
    pub fn next(&self, idle: bool) -> Option<Errand> {
        let mut state = self.lock();
        loop {
            match state.errand() {
                None if idle => state = self.wait(state),
                errand => return errand,
            }
        }
    }

    /// Waits before the next attempt to connect; less if the user asks to go.
    pub fn pause(&self, time: Duration) {
        let state = self.lock();
        drop(self.changed.wait_timeout_while(state, time, |state| !state.detach));
    }
}

impl State {
    fn forget_input(&mut self, accepted: u64) {
        let count = accepted.saturating_sub(self.accepted).min(self.input.len() as u64);
        self.input.drain(..count as usize);
        self.accepted += count;
        self.sent = self.sent.max(self.accepted);
    }

    fn errand(&mut self) -> Option<Errand> {
        if self.closed {
            return Some(Errand::Close);
        }
        if self.written - self.acked >= ACK_BYTES {
            self.acked = self.written;
            return Some(Errand::Ack(self.acked));
        }
        if let Some(signal) = self.signals.pop_front() {
            return Some(Errand::Signal(signal));
        }
        if let Some(window) = self.window.take() {
            return Some(Errand::Window(window));
        }
        if self.detach && !std::mem::replace(&mut self.detach_sent, true) {
            return Some(Errand::Detach);
        }
        self.input_errand()
    }

    fn input_errand(&mut self) -> Option<Errand> {
        let first = (self.sent - self.accepted) as usize;
        let count = (self.input.len() - first).min(STDIN_MAX);
        if count > 0 {
            let offset = self.sent - self.base;
            self.sent += count as u64;
            let bytes = self.input.range(first..first + count).copied().collect();
            return Some(Errand::Stdin { offset, bytes });
        }
        (self.eof && !std::mem::replace(&mut self.eof_sent, true)).then_some(Errand::StdinEof)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stdin(offset: u64, bytes: &[u8]) -> Option<Errand> {
        Some(Errand::Stdin { offset, bytes: bytes.to_vec() })
    }

    #[test]
    fn input_goes_again_from_where_the_agent_has_it() {
        let outbox = Outbox::default();
        assert!(outbox.open(0, 0, false));
        assert!(outbox.put_input(b"hello"));
        assert_eq!(outbox.next(false), stdin(0, b"hello"));
        outbox.end_input();
        assert_eq!(outbox.next(false), Some(Errand::StdinEof));
        assert_eq!(outbox.next(false), None);
        outbox.close();
        assert_eq!(outbox.next(false), Some(Errand::Close));
        assert!(outbox.open(2, 7, false));
        assert_eq!(outbox.next(false), stdin(2, b"llo"));
        assert_eq!(outbox.next(false), Some(Errand::StdinEof));
        outbox.accept(5);
        assert!(outbox.put_input(b"x"));
        assert_eq!(outbox.next(false), stdin(5, b"x"));
    }

    #[test]
    fn an_agent_that_forgot_its_client_gets_the_rest_and_nothing_twice() {
        let outbox = Outbox::default();
        assert!(outbox.open(0, 0, false) && outbox.put_input(b"hello"));
        assert_eq!(outbox.next(false), stdin(0, b"hello"));
        outbox.accept(5);
        // All of it was taken: the agent counts anew, and so does this.
        assert!(outbox.open(0, 0, true) && outbox.put_input(b"you"));
        assert_eq!(outbox.next(false), stdin(0, b"you"));
        outbox.accept(1);
        assert!(outbox.open(2, 0, true), "it knows this client again");
        assert_eq!(outbox.next(false), stdin(2, b"u"));
        assert!(!outbox.open(0, 0, false), "`u` was taken, or not");
    }

    #[test]
    fn input_of_which_nobody_has_heard_is_in_doubt_when_it_is_late() {
        for (is_late, is_sure) in [(false, true), (true, false)] {
            let outbox = Outbox::default();
            assert!(outbox.open(0, 0, false) && outbox.put_input(b"hello"));
            assert_eq!(outbox.next(false), stdin(0, b"hello"));
            assert_eq!(outbox.open(0, 0, is_late), is_sure, "late: {is_late}");
        }
    }

    #[test]
    fn an_agent_that_accepts_more_than_there_is_harms_nothing() {
        let outbox = Outbox::default();
        assert!(outbox.open(1 << 40, 0, false));
        assert!(outbox.put_input(b"ab"));
        assert_eq!(outbox.next(false), stdin(0, b"ab"));
        outbox.accept(u64::MAX);
        assert_eq!(outbox.next(false), None);
    }

    #[test]
    fn input_waits_for_room_and_ends_with_the_session() {
        let outbox = Outbox::default();
        assert!(outbox.put_input(&[0; INPUT_MAX]));
        std::thread::scope(|scope| {
            let blocked = scope.spawn(|| outbox.put_input(b"more"));
            outbox.finish();
            assert!(!blocked.join().unwrap());
        });
    }
}
