//! The TCP server of mstrap: smoltcp over a network device, one client served at a time. A few more may
//! wait in line, so that a stranger who connects and says nothing keeps nobody out; who is silent for
//! [`HANDSHAKE`] is cut off.
//!
//! Every wait has an end: the [`Limits`] that the caller set.

use crate::server::{Link, Refused};
use onde_wire::channel::{CLIENT_HELLO_SIZE, PORT};
use onde_wire::machine::Identity;
use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet, SocketStorage,
};
use smoltcp::phy::Device;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, Ipv4Address, Ipv4Cidr};

/// Time from a client's first packet until it has proven that it knows the job key: three round trips, and
/// an emulated node that is busy takes seconds for them.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections held at a time: one served, the others in line.
const LINE: usize = 4;
/// Receive window: a few milliseconds of a fast LAN, so that the sender is not held up while we decrypt.
const RX_SIZE: usize = 256 << 10;
/// Room for one report of [`crate::server::SEND_MAX`].
const TX_SIZE: usize = 8 << 10;
/// Bytes received that are worth a turn of the stack even if nobody waits for it.
const TURN_MIN: usize = 4 << 10;
/// Frames taken in before the stack gets to answer: a flood must not hold it up.
const INGRESS_MAX: usize = 256;
/// Rounds of sending in a turn; each sends at most one frame of each connection.
const EGRESS_MAX: usize = 16;
/// Milliseconds that the device gets to send the last frames.
const CLOSE_TURNS: u32 = 100;
/// Longest wait while clients are in line, so that their time is kept.
const ACCEPT_WAIT: Duration = Duration::from_millis(500);

/// The network device with what belongs to it: the time, and waiting for a frame.
pub trait Wire: Device {
    /// Time since some fixed moment.
    fn now(&self) -> Instant;
    /// Lets out what was sent.
    fn flush(&mut self);
    /// Whether all that was sent is out.
    fn is_all_sent(&mut self) -> bool;
    /// Waits for a frame, at most this long.
    fn wait(&mut self, limit: Duration);
}

/// The stack's list of connections.
pub type Storage = [SocketStorage<'static>; LINE];

/// An empty list.
pub const STORAGE: Storage = [const { SocketStorage::EMPTY }; LINE];

/// Bytes of the connections on their way.
pub struct Room {
    rx: [[u8; RX_SIZE]; LINE],
    tx: [[u8; TX_SIZE]; LINE],
}

impl Room {
    /// All zero.
    pub const fn new() -> Self {
        Self { rx: [[0; RX_SIZE]; LINE], tx: [[0; TX_SIZE]; LINE] }
    }
}

impl Default for Room {
    fn default() -> Self {
        Self::new()
    }
}

/// How long a client may take.
#[derive(Clone, Copy)]
pub struct Limits {
    /// When everything must be done; a wait that meets it ends with [`Refused::TooLate`].
    pub deadline: Instant,
    /// Longest silence in the middle of what a client has to say; else [`Refused::Stalled`].
    pub stall: Duration,
}

/// TCP server.
pub struct Server<W> {
    wire: W,
    iface: Interface,
    sockets: SocketSet<'static>,
    line: [Client; LINE],
    /// Whose turn it is, an index of `line`.
    current: usize,
    limits: Limits,
}

#[derive(Clone, Copy)]
struct Client {
    handle: SocketHandle,
    /// When its first packet came; `None` while the place is free.
    since: Option<Instant>,
}

impl<W: Wire> Server<W> {
    /// Configures the stack for this VM; nothing is sent before [`Self::accept`].
    pub fn new(
        mut wire: W,
        identity: &Identity,
        tcp_seed: u64,
        storage: &'static mut Storage,
        room: &'static mut Room,
    ) -> Self {
        let mut config = Config::new(EthernetAddress(identity.boot_mac).into());
        config.random_seed = tcp_seed;
        let now = wire.now();
        let mut iface = Interface::new(config, &mut wire, now);
        let address = Ipv4Address::from(identity.boot_ipv4);
        let prefix_len = identity.prefix_len.min(32);
        iface.update_ip_addrs(|all| {
            all.push(Ipv4Cidr::new(address, prefix_len).into()).expect("room for one address");
        });
        if identity.gateway != [0; 4] {
            let gateway = Ipv4Address::from(identity.gateway);
            iface.routes_mut().add_default_ipv4_route(gateway).expect("room for one route");
        }
        let mut sockets = SocketSet::new(&mut storage[..]);
        let mut buffers = room.rx.iter_mut().zip(room.tx.iter_mut());
        let line = core::array::from_fn(|_| {
            let (rx, tx) = buffers.next().expect("room for each");
            Client { handle: sockets.add(socket(rx, tx)), since: None }
        });
        let limits = Limits { deadline: now, stall: Duration::ZERO };
        Self { wire, iface, sockets, line, current: 0, limits }
    }

    /// Sets the limits from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Waits for a client who has said hello, and makes it the one that is served. Returns the time
    /// when it must have proven itself.
    ///
    /// # Errors
    /// [`Refused::TooLate`] at the deadline.
    pub fn accept(&mut self) -> Result<Instant, Refused> {
        loop {
            self.pump()?;
            for index in 0..LINE {
                if let Some(since) = self.look(index) {
                    self.current = index;
                    return Ok(since + HANDSHAKE);
                }
            }
            self.wait(self.wire.now() + ACCEPT_WAIT);
        }
    }

    /// Keeps one place of the line: frees it from who is silent or gone, and says since when a
    /// client is there who has said hello.
    fn look(&mut self, index: usize) -> Option<Instant> {
        let now = self.wire.now();
        let client = &mut self.line[index];
        let socket = self.sockets.get_mut::<Socket>(client.handle);
        match socket.state() {
            State::Listen => client.since = None,
            State::Closed => {
                client.since = None;
                socket.listen(PORT).expect("a closed socket and a port can listen");
            }
            _ => {
                let since = *client.since.get_or_insert(now);
                if socket.recv_queue() >= CLIENT_HELLO_SIZE {
                    return Some(since);
                }
                let gone = !socket.may_recv() && socket.state() != State::SynReceived;
                if gone || now - since >= HANDSHAKE {
                    socket.abort();
                }
            }
        }
        None
    }

    /// Cuts the current client off.
    pub fn drop_client(&mut self) {
        self.sockets.get_mut::<Socket>(self.line[self.current].handle).abort();
        self.turn();
    }

    /// Cuts off everybody but the current client, and takes no new ones until the next [`Self::accept`].
    pub fn close_line(&mut self) {
        for index in (0..LINE).filter(|index| *index != self.current) {
            self.sockets.get_mut::<Socket>(self.line[index].handle).abort();
        }
        self.turn();
    }

    /// Cuts everybody off for good. Returns when they have been told or after a moment: the VM may end then.
    pub fn close(&mut self) {
        for client in self.line {
            self.sockets.get_mut::<Socket>(client.handle).abort();
        }
        self.turn();
        for _ in 0..CLOSE_TURNS {
            if self.wire.is_all_sent() {
                break;
            }
            self.wire.wait(Duration::from_millis(1));
        }
    }

    /// A turn of the stack, if there is time left.
    fn pump(&mut self) -> Result<(), Refused> {
        self.turn();
        if self.wire.now() >= self.limits.deadline { Err(Refused::TooLate) } else { Ok(()) }
    }

    /// One turn: takes in what has come, sends what is due.
    fn turn(&mut self) {
        let now = self.wire.now();
        for _ in 0..INGRESS_MAX {
            let result = self.iface.poll_ingress_single(now, &mut self.wire, &mut self.sockets);
            if matches!(result, PollIngressSingleResult::None) {
                break;
            }
        }
        for _ in 0..EGRESS_MAX {
            let result = self.iface.poll_egress(now, &mut self.wire, &mut self.sockets);
            if matches!(result, PollResult::None) {
                break;
            }
        }
        self.wire.flush();
    }

    /// Waits until something comes in, the stack has something to do, or `limit`.
    fn wait(&mut self, limit: Instant) {
        let now = self.wire.now();
        let due = self.iface.poll_at(now, &self.sockets).unwrap_or(limit);
        let until = due.min(limit).min(self.limits.deadline);
        if until > now {
            self.wire.wait(until - now);
        }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.line[self.current].handle)
    }

    /// After a turn that moved nothing: waits for more, but not beyond silence since `progress`.
    fn wait_since(&mut self, progress: Instant) -> Result<(), Refused> {
        if self.wire.now() - progress >= self.limits.stall {
            return Err(Refused::Stalled);
        }
        self.wait(progress + self.limits.stall);
        Ok(())
    }
}

fn socket(rx: &'static mut [u8], tx: &'static mut [u8]) -> Socket<'static> {
    let mut socket = Socket::new(SocketBuffer::new(rx), SocketBuffer::new(tx));
    // What came in together is acknowledged together, so a delay would only hold up the sender.
    socket.set_ack_delay(None);
    socket.set_nagle_enabled(false);
    socket
}

impl<W: Wire> Link for Server<W> {
    fn recv(&mut self, buffer: &mut [u8]) -> Result<(), Refused> {
        let mut filled = 0;
        let mut progress = self.wire.now();
        loop {
            let count =
                self.socket().recv_slice(&mut buffer[filled..]).map_err(|_| Refused::Closed)?;
            filled += count;
            let full = filled == buffer.len();
            if full && filled < TURN_MIN {
                return Ok(());
            }
            // Also when all is there: while we decrypt it, the sender's window must open again.
            self.pump()?;
            if full {
                return Ok(());
            }
            if count > 0 {
                progress = self.wire.now();
            } else if self.socket().recv_queue() == 0 {
                self.wait_since(progress)?;
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), Refused> {
        let mut progress = self.wire.now();
        loop {
            let count = self.socket().send_slice(bytes).map_err(|_| Refused::Closed)?;
            self.pump()?;
            bytes = &bytes[count..];
            if bytes.is_empty() {
                return Ok(());
            }
            if count > 0 {
                progress = self.wire.now();
            } else {
                self.wait_since(progress)?;
            }
        }
    }

    fn flush(&mut self) -> Result<(), Refused> {
        let progress = self.wire.now();
        while self.socket().send_queue() > 0 {
            if !self.socket().is_active() {
                return Err(Refused::Closed);
            }
            self.wait_since(progress)?;
            self.pump()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
