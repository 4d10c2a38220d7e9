//! Frames as a stranger's network card sends them, right and wrong, made without `packetd`'s own code.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use onde_wire::key::Key;
use onde_wire::packet::{Packet, Request};
use onde_wire::token::{BootToken, Origin};

pub const NODE_MAC: [u8; 6] = [0x02, 0x4f, 198, 18, 1, 1];
pub const NODE_IPV4: [u8; 4] = [198, 18, 1, 1];
pub const STRANGER_MAC: [u8; 6] = [0x02, 0x4f, 198, 18, 255, 9];
pub const STRANGER_IPV4: [u8; 4] = [198, 18, 255, 9];
pub const NODE_KEY: [u8; 32] = [7; 32];
pub const JOB: [u8; 16] = [9; 16];
const IP: usize = 14;
const ICMP: usize = IP + 20;
pub const PAYLOAD: usize = ICMP + 8;

/// An ICMP echo request to the node with all in order.
pub fn echo(seq: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&NODE_MAC[..], &STRANGER_MAC, &[8, 0]].concat();
    let size = (28 + payload.len()) as u16;
    frame.extend([0x45, 0xb8]);
    frame.extend(size.to_be_bytes());
    frame.extend([0x12, 0x34, 0x40, 0, 63, 1, 0, 0]);
    frame.extend(STRANGER_IPV4);
    frame.extend(NODE_IPV4);
    frame.extend([8, 0, 0, 0, 0xbe, 0xef]);
    frame.extend(seq.to_be_bytes());
    frame.extend(payload);
    seal(&mut frame);
    frame
}

/// An ARP request for the node's address.
pub fn arp() -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &STRANGER_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    frame.extend(STRANGER_MAC);
    frame.extend(STRANGER_IPV4);
    frame.extend([0; 6]);
    frame.extend(NODE_IPV4);
    frame.resize(60, 0); // the least an Ethernet card sends
    frame
}

/// Makes the IP and ICMP checksums right again.
pub fn seal(frame: &mut [u8]) {
    for (field, start, end) in [(IP + 10, IP, ICMP), (ICMP + 2, ICMP, frame.len())] {
        frame[field..field + 2].fill(0);
        let sum = internet_sum(&frame[start..end]);
        frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// RFC 1071, by the book.
pub fn internet_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn job_key() -> Key {
    Key::new(&onde_wire::key::job_key(&Key::new(&NODE_KEY), &JOB))
}

/// A STATUS request with a right tag.
pub fn status(nonce: u64) -> Packet {
    Request::Status.emit(nonce, &JOB, &job_key())
}

/// A BOOT request with a right tag.
pub fn boot(nonce: u64) -> Packet {
    let token = BootToken {
        broker_key: [1; 8],
        node: [2; 16],
        incarnation: [3; 16],
        job: JOB,
        expiry_ms: 60_000,
        anchor: [4; 32],
        value_micro: 1000,
        first_count: 10,
        loader_sha256: [5; 32],
        mem_mib: 128,
        held_mib: 128,
        origin: Origin::Loader,
        vcpus: 1,
        disk_mib: 0,
        net_kib_s: 0,
        mac: [2, 0, 0, 0, 0, 1],
        ipv4: [198, 19, 0, 1],
        gateway: [0; 4],
        prefix_len: 15,
        prices: onde_wire::packet::Prices::default(),
    };
    let tag = token.sign(&Key::new(&NODE_KEY));
    Request::Boot(token, tag).emit(nonce, &JOB, &job_key())
}

/// A HELLO request.
pub fn hello(nonce: u64) -> Packet {
    Request::Hello.emit(nonce, &[0; 16], &job_key())
}

fn edited(name: &'static str, frame: Vec<u8>, edit: fn(&mut Vec<u8>)) -> (&'static str, Vec<u8>) {
    let mut frame = frame;
    edit(&mut frame);
    seal(&mut frame);
    (name, frame)
}

/// Frames that must never be answered and never reach `noded`; sequence numbers all zero.
pub fn hostile() -> Vec<(&'static str, Vec<u8>)> {
    let good = || echo(0, &boot(1));
    let ping = || echo(0, b"hello, node");
    let mut wrong_ip_sum = ping();
    wrong_ip_sum[IP + 10] ^= 1;
    let mut wrong_icmp_sum = ping();
    wrong_icmp_sum[ICMP + 2] ^= 1;
    let mut beyond_the_end = ping();
    beyond_the_end.pop();
    let mut arp_other_sender = arp();
    arp_other_sender[22] ^= 2;
    let mut arp_other_target = arp();
    arp_other_target[41] ^= 2;
    let mut arp_reply = arp();
    arp_reply[21] = 2;
    let mut arp_from_us = arp();
    arp_from_us[28..32].copy_from_slice(&NODE_IPV4);
    let mut arp_elsewhere = arp();
    arp_elsewhere[..6].copy_from_slice(&[2, 0, 0, 0, 0, 7]);
    vec![
        edited("first bit of the tag", good(), |f| f[PAYLOAD + 32] ^= 1),
        edited("last bit of the tag", good(), |f| f[PAYLOAD + 63] ^= 0x80),
        edited("a bit of the token", good(), |f| f[PAYLOAD + 64 + 100] ^= 1),
        edited("a status with another nonce", echo(0, &status(5)), |f| f[PAYLOAD + 8] ^= 1),
        edited("a stop made of a status", echo(0, &status(5)), |f| f[PAYLOAD + 5] = 6),
        ("a packet cut short", echo(0, &boot(1)[..1023])),
        ("a packet with a byte more", echo(0, &[&boot(1)[..], &[0]].concat())),
        ("the magic alone", echo(0, b"ONDE")),
        edited("no such op", good(), |f| f[PAYLOAD + 5] = 0x7f),
        edited("a reply as a request", good(), |f| f[PAYLOAD + 5] |= 0x80),
        edited("another version", good(), |f| f[PAYLOAD + 4] = 2),
        edited("a first fragment", good(), |f| f[IP + 6] |= 0x20),
        edited("a later fragment", good(), |f| f[IP + 7] = 1),
        edited("the reserved flag", ping(), |f| f[IP + 6] |= 0x80),
        edited("header options", ping(), |f| f[IP] = 0x46),
        edited("IP version 6", ping(), |f| f[IP] = 0x65),
        ("a wrong IP checksum", wrong_ip_sum),
        ("a wrong ICMP checksum", wrong_icmp_sum),
        ("a length beyond the frame", beyond_the_end),
        edited("a length below the headers", ping(), |f| f[IP + 3] = 27),
        edited("to all on the link", ping(), |f| f[..6].fill(0xff)),
        edited("to a group on the link", ping(), |f| f[0] |= 1),
        edited("to another card", ping(), |f| f[5] ^= 1),
        edited("to a broadcast address", ping(), |f| f[IP + 16..IP + 20].fill(0xff)),
        edited("to another host", ping(), |f| f[IP + 19] ^= 1),
        edited("from a group of cards", ping(), |f| f[6] |= 1),
        edited("from a group of hosts", ping(), |f| f[IP + 12] = 224),
        edited("from a broadcast address", ping(), |f| f[IP + 12..IP + 16].fill(0xff)),
        edited("from nowhere", ping(), |f| f[IP + 12..IP + 16].fill(0)),
        edited("from loopback", ping(), |f| f[IP + 12] = 127),
        edited("from ourselves", ping(), |f| {
            f[IP + 12..IP + 16].copy_from_slice(&NODE_IPV4);
        }),
        edited("no echo request", ping(), |f| f[ICMP] = 0),
        edited("another code", ping(), |f| f[ICMP + 1] = 1),
        edited("not ICMP", ping(), |f| f[IP + 9] = 17),
        edited("not IP", ping(), |f| f[12] = 0x86),
        edited("a VLAN tag", ping(), |f| {
            f.splice(12..12, [0x81, 0, 0, 5]);
        }),
        ("ARP from another card", arp_other_sender),
        ("ARP for another host", arp_other_target),
        ("an ARP reply", arp_reply),
        ("ARP with our own address", arp_from_us),
        ("ARP to another card", arp_elsewhere),
    ]
}
