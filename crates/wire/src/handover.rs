//! Between `packetd` and `noded`: messages on a SEQPACKET socketpair. Up go packets whose tag is
//! checked, with a cookie; down come the replies with the same cookie, and once a second the
//! HELLO answer, so that strangers' HELLOs never reach `noded`.

use crate::packet::{PACKET_SIZE, Packet};

/// Bytes that `packetd` finds its way back with (addresses and echo identifiers); `noded` never looks.
pub const COOKIE_SIZE: usize = 32;
/// Bytes of a message.
pub const HANDOVER_SIZE: usize = 8 + COOKIE_SIZE + PACKET_SIZE;

const UP: u64 = u64::from_le_bytes(*b"ONDE  UP");
const DOWN: u64 = u64::from_le_bytes(*b"ONDEDOWN");
const HELLO: u64 = u64::from_le_bytes(*b"ONDEHELO");

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "a message is one packet on the stack, never stored")]
pub enum Handover {
    /// `packetd` to `noded`: a checked request.
    Up([u8; COOKIE_SIZE], Packet),
    /// `noded` to `packetd`: a reply.
    Down([u8; COOKIE_SIZE], Packet),
    /// `noded` to `packetd`: the body of HELLO replies from now on.
    Hello(Packet),
}

impl Handover {
    /// The message's bytes.
    pub fn emit(&self) -> [u8; HANDOVER_SIZE] {
        let (kind, cookie, packet) = match self {
            Handover::Up(cookie, packet) => (UP, *cookie, packet),
            Handover::Down(cookie, packet) => (DOWN, *cookie, packet),
            Handover::Hello(packet) => (HELLO, [0; COOKIE_SIZE], packet),
        };
        let mut out = [0; HANDOVER_SIZE];
        out[..8].copy_from_slice(&kind.to_le_bytes());
        out[8..8 + COOKIE_SIZE].copy_from_slice(&cookie);
        out[8 + COOKIE_SIZE..].copy_from_slice(packet);
        out
    }

    /// Reads a message; `None` if it is none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HANDOVER_SIZE] = bytes.try_into().ok()?;
        let kind = u64::from_le_bytes(bytes[..8].try_into().ok()?);
        let cookie = bytes[8..8 + COOKIE_SIZE].try_into().ok()?;
        let packet = bytes[8 + COOKIE_SIZE..].try_into().ok()?;
        match kind {
            UP => Some(Handover::Up(cookie, packet)),
            DOWN => Some(Handover::Down(cookie, packet)),
            HELLO => Some(Handover::Hello(packet)),
            _ => None,
        }
    }
}

/// Bytes of [`Setup`].
pub const SETUP_SIZE: usize = 64;

/// The first message that `noded` sends to a new `packetd`: all it needs to know.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Name of the interface to listen on, padded with zeros: the bridge that VMs are ports of.
    pub interface: [u8; 16],
    /// The node's address, which no kernel interface has.
    pub ipv4: [u8; 4],
    /// The node key.
    pub node_key: [u8; 32],
}

impl Setup {
    /// The message's bytes.
    pub fn emit(&self) -> [u8; SETUP_SIZE] {
        let mut out = [0; SETUP_SIZE];
        out[..16].copy_from_slice(&self.interface);
        out[16..20].copy_from_slice(&self.ipv4);
        out[20..52].copy_from_slice(&self.node_key);
        out
    }

    /// Reads the message; `None` where the size is wrong.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; SETUP_SIZE] = bytes.try_into().ok()?;
        Some(Self {
            interface: bytes[..16].try_into().ok()?,
            ipv4: bytes[16..20].try_into().ok()?,
            node_key: bytes[20..52].try_into().ok()?,
        })
    }
}
