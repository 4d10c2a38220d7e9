//! Onde packets in ICMP Echo, from a customer's side: one socket that asks any number of nodes, sends again
//! what got lost, and takes only the reply that was asked for. `node` and the broker's sweep call it.
//! It needs no privilege: Linux gives ICMP "ping" sockets to the groups of `net.ipv4.ping_group_range`;
//! where it does not, a raw socket serves whoever may open one.

use onde_wire::key::Key;
use onde_wire::packet::{Op, PACKET_SIZE, Packet, Reply};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use rustix::net::{recvfrom, sendto, socket_with, sockopt};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Bytes of an ICMP Echo header (RFC 792).
const ICMP_SIZE: usize = 8;
/// Most bytes of an IPv4 header, which raw sockets deliver and ping sockets do not.
const IPV4_SIZE_MAX: usize = 60;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
/// Kernel buffers, bytes: a sweep over some hundred nodes is answered in one burst, and its requests to addresses
/// that nobody has wait three seconds for ARP.
const BUFFER: usize = 1 << 20;

/// When to send a request again, and when to give up. Every request is idempotent at the node.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// How often a request is sent.
    pub tries: u32,
    /// How long the first try waits for a reply; each further one waits twice as long.
    pub first: Duration,
}

impl Default for Policy {
    /// Five tries, 200 ms doubling: six seconds in all, enough for an emulated node that is busy.
    fn default() -> Self {
        Self { tries: 5, first: Duration::from_millis(200) }
    }
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum EchoError {
    /// Neither a ping socket nor a raw socket may be opened.
    #[error("this user may not send ICMP echo requests")]
    Forbidden,
    /// No try was answered.
    #[error("node {node} does not answer")]
    Silent {
        /// Who was asked.
        node: Ipv4Addr,
    },
    /// The kernel has no way to the node, or refuses the socket call.
    #[error("asking node {node}")]
    Socket {
        /// Who was asked.
        node: Ipv4Addr,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

impl EchoError {
    /// What to do about it, one line.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            EchoError::Forbidden => Some(
                "let your group send them: sysctl -w net.ipv4.ping_group_range=\"0 2147483647\" (or run as root)",
            ),
            EchoError::Silent { .. } => {
                Some("the node may be off or lost; its jobs are credited by the broker")
            }
            EchoError::Socket { .. } => {
                Some("is this machine on the cluster's network, or the lab up?")
            }
        }
    }
}

/// A way to ask nodes: [`Echo`], or a network that a simulation makes up.
pub trait Exchange {
    /// Sends `packet` to `node` until the reply to `op` and `nonce` comes whose tag is right under `key`
    /// (see [`Reply::parse`]). Whatever else comes in meanwhile is dropped.
    fn exchange(
        &mut self,
        node: Ipv4Addr,
        packet: &Packet,
        op: Op,
        nonce: u64,
        key: Option<&Key>,
        policy: Policy,
    ) -> Result<Reply, EchoError>;
}

/// An ICMP Echo socket. Connectionless: one serves all nodes, one exchange at a time.
#[derive(Debug)]
pub struct Echo {
    socket: OwnedFd,
    is_raw: bool,
    identifier: u16,
    sequence: u16,
}

impl Echo {
    /// Opens a ping socket, or else a raw socket.
    pub fn open() -> Result<Self, EchoError> {
        let identifier = getrandom::u32().map_or(std::process::id(), |n| n) as u16;
        let of_kind = |kind, is_raw| {
            let socket =
                socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, Some(ipproto::ICMP))?;
            // Smaller buffers only lose replies and make a sweep wait.
            let _ = sockopt::set_socket_recv_buffer_size(&socket, BUFFER);
            let _ = sockopt::set_socket_send_buffer_size(&socket, BUFFER);
            Ok(Self { socket, is_raw, identifier, sequence: 0 })
        };
        of_kind(SocketType::DGRAM, false)
            .or_else(|_: Errno| of_kind(SocketType::RAW, true))
            .map_err(|_: Errno| EchoError::Forbidden)
    }

    /// Sends one request and waits for nothing. A host that ARP cannot find counts as a lost packet.
    pub fn send(&mut self, node: Ipv4Addr, packet: &Packet) -> Result<(), EchoError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = [0; ICMP_SIZE + PACKET_SIZE];
        message[0] = ECHO_REQUEST;
        message[4..6].copy_from_slice(&self.identifier.to_be_bytes());
        message[6..8].copy_from_slice(&self.sequence.to_be_bytes());
        message[ICMP_SIZE..].copy_from_slice(packet);
        // A ping socket's kernel writes its own identifier and checksum over these.
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        match sendto(&self.socket, &message, SendFlags::empty(), &SocketAddrV4::new(node, 0)) {
            Ok(_) | Err(Errno::HOSTUNREACH | Errno::NOBUFS | Errno::INTR) => Ok(()),
            Err(errno) => Err(EchoError::Socket { node, source: errno.into() }),
        }
    }

    /// The next echo reply of Onde's size, and who it says it is from; `None` at the deadline.
    pub fn receive(&mut self, deadline: Instant) -> Result<Option<(Ipv4Addr, Packet)>, EchoError> {
        let failed =
            |errno: Errno| EchoError::Socket { node: Ipv4Addr::UNSPECIFIED, source: errno.into() };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("a wait is far below the end of time");
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut ready, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
            let mut buffer = [0; IPV4_SIZE_MAX + ICMP_SIZE + PACKET_SIZE];
            match recvfrom(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((size, _, from)) => {
                    let from = from.and_then(|from| SocketAddrV4::try_from(from).ok());
                    if let (Some(from), Some(packet)) = (from, self.payload(&buffer[..size])) {
                        return Ok(Some((*from.ip(), packet)));
                    }
                }
                // An earlier packet's ICMP error may come up here: the retry decides.
                Err(Errno::AGAIN | Errno::INTR | Errno::HOSTUNREACH | Errno::CONNREFUSED) => {}
                Err(errno) => return Err(failed(errno)),
            }
            // A flood of other packets does not hold the caller beyond its deadline.
            if left.is_zero() {
                return Ok(None);
            }
        }
    }

    /// The Onde packet in what the socket gave, if it is an echo reply to this socket.
    fn payload(&self, bytes: &[u8]) -> Option<Packet> {
        let icmp = match self.is_raw {
            true => bytes.get(usize::from(bytes.first()? & 15) * 4..)?,
            false => bytes,
        };
        let (head, payload) = icmp.split_at_checked(ICMP_SIZE)?;
        let is_ours = !self.is_raw || head[4..6] == self.identifier.to_be_bytes();
        (head[0] == ECHO_REPLY && is_ours).then(|| payload.try_into().ok())?
    }
}

impl Exchange for Echo {
    fn exchange(
        &mut self,
        node: Ipv4Addr,
        packet: &Packet,
        op: Op,
        nonce: u64,
        key: Option<&Key>,
        policy: Policy,
    ) -> Result<Reply, EchoError> {
        let mut wait = policy.first;
        for _ in 0..policy.tries {
            self.send(node, packet)?;
            let deadline = Instant::now() + wait;
            while let Some((from, payload)) = self.receive(deadline)? {
                match Reply::parse(&payload, op, nonce, key) {
                    Some(reply) if from == node => return Ok(reply),
                    _ if Instant::now() > deadline => break,
                    _ => {}
                }
            }
            wait *= 2;
        }
        Err(EchoError::Silent { node })
    }
}

/// The Internet checksum (RFC 1071) of a message of even size.
fn checksum(message: &[u8]) -> u16 {
    let sum: u32 =
        message.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xFFFF) + (sum >> 16);
    !((folded + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_wire::packet::{Paid, Request};

    const KEY: [u8; 32] = [7; 32];
    const QUICK: Policy = Policy { tries: 2, first: Duration::from_millis(30) };

    /// The host's own kernel answers 127.0.0.1 with what it got: whatever packet we send, comes back as a reply.
    /// So a reply packet sent as a request stands for a node.
    fn check(packet: &Packet, op: Op, nonce: u64, key: &Key, answered: bool) {
        let mut echo = Echo::open().expect("tests run where ICMP echo may be sent");
        let got = echo.exchange(Ipv4Addr::LOCALHOST, packet, op, nonce, Some(key), QUICK);
        match got {
            Ok(_) => assert!(answered, "took a reply it had to drop"),
            Err(EchoError::Silent { .. }) => assert!(!answered, "dropped its reply"),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn takes_only_the_reply_to_its_own_op_and_nonce_under_its_key() {
        let (key, job) = (Key::new(&KEY), [1; 16]);
        let reply = Reply::Pay(Paid { last_index: 3, balance_micro: 5 }).emit(42, &job, &key);
        check(&reply, Op::Pay, 42, &key, true);
        check(&reply, Op::Pay, 43, &key, false);
        check(&reply, Op::Status, 42, &key, false);
        check(&reply, Op::Pay, 42, &Key::new(&[8; 32]), false);
        let request = Request::Status.emit(42, &job, &key);
        check(&request, Op::Status, 42, &key, false);
    }

    #[test]
    fn checksum_is_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
