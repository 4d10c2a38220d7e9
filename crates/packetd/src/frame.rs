//! Ethernet frames: the two kinds that a node answers, read and written. ARP requests (RFC 826) and ICMP
//! echo requests (RFC 792) in unfragmented IPv4 without options (RFC 791). All else is `None`.

use onde_wire::bytes::{Reader, Writer};
use onde_wire::handover::COOKIE_SIZE;

/// Most bytes of a frame, without its check sequence: IEEE 802.3 without tags.
pub const FRAME_MAX: usize = 1514;
/// Bytes of Ethernet, IPv4 and ICMP headers, before an echo's payload.
pub const HEADERS_SIZE: usize = 14 + IP_SIZE + ICMP_SIZE;
const IP_SIZE: usize = 20;
const ICMP_SIZE: usize = 8;

/// An Ethernet address.
pub type Mac = [u8; 6];
/// An IPv4 address.
pub type Ipv4 = [u8; 4];

const BROADCAST: Mac = [0xff; 6];
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet, IPv4, their address sizes, and the operation.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
/// IPv4 with a header of five words.
const IP_VERSION: u8 = 0x45;
/// The one flag that may be set: a fragment has another or an offset.
const DONT_FRAGMENT: u8 = 0x40;
const PROTOCOL_ICMP: u8 = 1;
/// Type and code.
const ECHO_REQUEST: [u8; 2] = [8, 0];
const ECHO_REPLY: [u8; 2] = [0, 0];
/// Time to live of what we send (RFC 1700).
const TTL: u8 = 64;

/// Whose frames are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its IPv4 address.
    pub ipv4: Ipv4,
}

/// A frame that a node answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Somebody asks for our Ethernet address.
    Arp(Host),
    /// An echo request and its payload.
    Echo(Asker, &'a [u8]),
}

/// Who sent an echo request: all that the reply's headers repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// The sender.
    pub host: Host,
    /// Type of service; a reply has the request's (RFC 1349).
    pub tos: u8,
    /// Echo identifier.
    pub id: [u8; 2],
    /// Echo sequence number.
    pub seq: [u8; 2],
}

// tcb:stranger-begin
impl<'a> Request<'a> {
    /// Reads a frame that came in at `node`'s interface.
    pub fn parse(node: &Host, frame: &'a [u8]) -> Option<Self> {
        if frame.len() > FRAME_MAX {
            return None;
        }
        let mut r = Reader::new(frame);
        let (dst, src): (Mac, Mac) = (r.array()?, r.array()?);
        if src[0] & 1 != 0 || src == [0; 6] || src == node.mac {
            return None;
        }
        match r.array()? {
            TYPE_IPV4 if dst == node.mac => echo(node, src, r),
            TYPE_ARP if dst == node.mac || dst == BROADCAST => arp(node, src, r),
            _ => None,
        }
    }
}

fn arp<'a>(node: &Host, src: Mac, mut r: Reader<'a>) -> Option<Request<'a>> {
    if r.array()? != ARP_REQUEST || r.array()? != src {
        return None;
    }
    let asker = Host { mac: src, ipv4: r.array()? };
    let _unknown: Mac = r.array()?;
    // All zero is a probe for an address in use (RFC 5227) and is answered like any other.
    let may_ask = asker.ipv4 == [0; 4] || is_unicast(asker.ipv4, node);
    (r.array()? == node.ipv4 && may_ask).then_some(Request::Arp(asker))
}

fn echo<'a>(node: &Host, src: Mac, r: Reader<'a>) -> Option<Request<'a>> {
    let packet = r.rest();
    let header: &[u8; IP_SIZE] = packet.first_chunk()?;
    let [version, tos, size_high, size_low, _, _, flags, offset, _, protocol, ..] = *header;
    let whole = version == IP_VERSION && flags & !DONT_FRAGMENT == 0 && offset == 0;
    if !whole || protocol != PROTOCOL_ICMP || checksum(header) != 0 {
        return None;
    }
    let mut addresses = Reader::new(&header[12..]);
    let (ipv4, target): (Ipv4, Ipv4) = (addresses.array()?, addresses.array()?);
    if target != node.ipv4 || !is_unicast(ipv4, node) {
        return None;
    }
    let size = usize::from(u16::from_be_bytes([size_high, size_low]));
    let icmp = packet.get(IP_SIZE..size)?;
    let mut r = Reader::new(icmp);
    if r.array()? != ECHO_REQUEST || checksum(icmp) != 0 {
        return None;
    }
    r.u16()?;
    let asker = Asker { host: Host { mac: src, ipv4 }, tos, id: r.array()?, seq: r.array()? };
    Some(Request::Echo(asker, r.rest()))
}

/// Whether an answer to this address goes to one host that is not the node itself (RFC 1122, 3.2.1.3).
fn is_unicast(ipv4: Ipv4, node: &Host) -> bool {
    !matches!(ipv4[0], 0 | 127 | 224..=255) && ipv4 != node.ipv4
}

/// The Internet checksum (RFC 1071); 0 over bytes that contain their own right one.
fn checksum(bytes: &[u8]) -> u16 {
    let (pairs, last) = bytes.as_chunks::<2>();
    let sum: u32 = pairs.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    let sum = sum + last.first().map_or(0, |byte| u32::from(*byte) << 8);
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Writes the answer to an ARP request and returns it.
pub fn emit_arp<'a>(node: &Host, asker: &Host, out: &'a mut [u8; FRAME_MAX]) -> &'a [u8] {
    const SIZE: usize = 14 + 28;
    let mut w = Writer::new(out);
    put_ethernet(&mut w, asker.mac, node.mac, TYPE_ARP);
    w.put(&ARP_REPLY);
    w.put(&node.mac);
    w.put(&node.ipv4);
    w.put(&asker.mac);
    w.put(&asker.ipv4);
    &out[..SIZE]
}

/// Writes the echo reply with this payload and returns it. `None` where it does not fit a frame, which
/// the payload of a frame that was parsed always does.
pub fn emit_echo<'a>(
    node: &Host,
    asker: &Asker,
    payload: &[u8],
    out: &'a mut [u8; FRAME_MAX],
) -> Option<&'a [u8]> {
    let frame = out.get_mut(..HEADERS_SIZE + payload.len())?;
    let ip_size = (frame.len() - 14) as u16;
    let mut w = Writer::new(frame);
    put_ethernet(&mut w, asker.host.mac, node.mac, TYPE_IPV4);
    w.put(&[IP_VERSION, asker.tos]);
    w.put(&ip_size.to_be_bytes());
    w.put(&[0, 0, DONT_FRAGMENT, 0, TTL, PROTOCOL_ICMP, 0, 0]);
    w.put(&node.ipv4);
    w.put(&asker.host.ipv4);
    w.put(&ECHO_REPLY);
    w.put(&[0, 0]);
    w.put(&asker.id);
    w.put(&asker.seq);
    w.put(payload);
    let (ip, icmp) = frame[14..].split_at_mut(IP_SIZE);
    let (ip_sum, icmp_sum) = (checksum(ip), checksum(icmp));
    ip[10..12].copy_from_slice(&ip_sum.to_be_bytes());
    icmp[2..4].copy_from_slice(&icmp_sum.to_be_bytes());
    Some(frame)
}

fn put_ethernet(w: &mut Writer<'_>, dst: Mac, src: Mac, ethertype: [u8; 2]) {
    w.put(&dst);
    w.put(&src);
    w.put(&ethertype);
}
// tcb:stranger-end

impl Asker {
    /// The cookie that comes back with `noded`'s reply.
    pub fn emit(&self) -> [u8; COOKIE_SIZE] {
        let mut out = [0; COOKIE_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&self.host.mac);
        w.put(&self.host.ipv4);
        w.put(&[self.tos]);
        w.put(&self.id);
        w.put(&self.seq);
        out
    }

    /// Reads a cookie.
    pub fn parse(cookie: &[u8; COOKIE_SIZE]) -> Option<Self> {
        let mut r = Reader::new(cookie);
        let host = Host { mac: r.array()?, ipv4: r.array()? };
        Some(Self { host, tos: r.u8()?, id: r.array()?, seq: r.array()? })
    }
}
