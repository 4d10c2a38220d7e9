//! The line to `noded`: events out, commands in, and the one exchange that a vCPU waits for, a
//! payment. The only socket that this process has.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use onde_wire::machine::{MESSAGE_SIZE, VmmCommand, VmmEvent};
use onde_wire::token::PaymentToken;

/// How long a payment may take before the guest is told that it was refused: `noded` walks at
/// most a bounded hash chain for it.
const PAY_TIMEOUT: Duration = Duration::from_secs(2);

/// The control socket and the payment under way.
pub struct Noded {
    // A SEQPACKET socket: `send` and `recv` of the datagram type are what it needs.
    socket: UnixDatagram,
    /// Held through a payment: vCPUs that pay at the same time take turns.
    turn: Mutex<()>,
    answer: Mutex<Option<bool>>,
    answered: Condvar,
    leave: Mutex<Asking>,
    left: Condvar,
}

/// What a vCPU that is about to run the guest hears from `noded`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// It may, or the machine ended.
    Run,
    /// The machine is to be saved as it is.
    Save,
}

/// Whether leave was asked for, and given.
enum Asking {
    Before,
    Asked,
    Given(Leave),
}

impl Noded {
    /// Takes over the control socket.
    pub fn new(socket: UnixDatagram) -> Self {
        Self {
            socket,
            turn: Mutex::new(()),
            answer: Mutex::new(None),
            answered: Condvar::new(),
            leave: Mutex::new(Asking::Before),
            left: Condvar::new(),
        }
    }

    /// Sends an event. If `noded` is gone, so is the machine: the I/O thread sees that.
    pub fn tell(&self, event: VmmEvent) {
        let _ = self.socket.send(&event.emit());
    }

    /// Next command; `None` for one that makes no sense.
    ///
    /// # Errors
    /// `noded` closed the socket, or it failed.
    pub fn hear(&self) -> io::Result<Option<VmmCommand>> {
        let mut message = [0; MESSAGE_SIZE];
        match self.socket.recv(&mut message)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            size => Ok(VmmCommand::parse(&message[..size])),
        }
    }

    /// Hands in a payment token and waits for the answer: whether it was accepted.
    pub fn pay(&self, token: PaymentToken) -> bool {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer that came after an earlier timeout is not for this token.
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.tell(VmmEvent::Pay(token));
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut answer, _) = self
            .answered
            .wait_timeout_while(answer, PAY_TIMEOUT, |answer| answer.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        answer.take().unwrap_or(false)
    }

    /// Says that the guest is about to run, and waits for leave. A machine that never gets it waits until it
    /// ends. The caller holds nothing that the I/O thread needs.
    pub fn ask_leave(&self) -> Leave {
        let mut asking = self.leave.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *asking {
                Asking::Given(leave) => return leave,
                Asking::Before => {
                    *asking = Asking::Asked;
                    self.tell(VmmEvent::Resumed);
                }
                Asking::Asked => {
                    asking = self.left.wait(asking).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// The guest may run, or the machine ended.
    pub fn leave(&self) {
        self.give(Leave::Run, |asking| !matches!(asking, Asking::Given(_)));
    }

    /// The machine is to be saved; false where nobody waits for leave.
    pub fn save_instead(&self) -> bool {
        self.give(Leave::Save, |asking| matches!(asking, Asking::Asked))
    }

    /// The first answer stands.
    fn give(&self, leave: Leave, is_open: impl Fn(&Asking) -> bool) -> bool {
        let mut asking = self.leave.lock().unwrap_or_else(PoisonError::into_inner);
        let is_open = is_open(&asking);
        if is_open {
            *asking = Asking::Given(leave);
            self.left.notify_all();
        }
        is_open
    }

    /// The answer came, or there will be none.
    pub fn pay_done(&self, accepted: bool) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(accepted);
        self.answered.notify_all();
    }
}

impl AsRawFd for Noded {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_guest_waits_for_leave() {
        for leave in [Leave::Run, Leave::Save] {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            let noded = Noded::new(ours);
            assert!(!noded.save_instead(), "nobody waits");
            thread::scope(|scope| {
                let guest = scope.spawn(|| noded.ask_leave());
                let mut event = [0; MESSAGE_SIZE];
                theirs.recv(&mut event).unwrap();
                assert_eq!(VmmEvent::parse(&event), Some(VmmEvent::Resumed));
                assert!(!guest.is_finished());
                match leave {
                    Leave::Run => noded.leave(),
                    Leave::Save => assert!(noded.save_instead()),
                }
                assert_eq!(guest.join().unwrap(), leave);
                assert!(!noded.save_instead(), "it is said once");
            });
        }
    }

    #[test]
    fn a_payment_waits_for_its_answer() {
        for accepted in [true, false] {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            let noded = Noded::new(ours);
            let token = PaymentToken { index: 3, value: [7; 32] };
            thread::scope(|scope| {
                let payment = scope.spawn(|| noded.pay(token));
                let mut event = [0; MESSAGE_SIZE];
                theirs.recv(&mut event).unwrap();
                assert_eq!(VmmEvent::parse(&event), Some(VmmEvent::Pay(token)));
                theirs.send(&VmmCommand::PayDone(accepted).emit()).unwrap();
                assert_eq!(noded.hear().unwrap(), Some(VmmCommand::PayDone(accepted)));
                noded.pay_done(accepted);
                assert_eq!(payment.join().unwrap(), accepted);
            });
        }
    }
}
