//! `packetd` fed with frames and messages of any bytes: no panic, and no answer larger than its request.
//! An input is a list of `kind u8 | size u16 | bytes`, so that state built by one reaches the next.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::bytes::Reader;
use packetd::frame::Host;
use packetd::{Input, Output, Packetd};

const NODE: Host = Host { mac: [2, 0x4f, 198, 18, 1, 1], ipv4: [198, 18, 1, 1] };
/// Bytes of the smallest answer to a request that came with more than its headers and padding.
const ARP_SIZE: usize = 42;

fuzz_target!(|bytes: &[u8]| {
    let mut packetd = Packetd::new(NODE, &[7; 32]);
    let mut r = Reader::new(bytes);
    let mut now_ms = 0;
    while let (Some(kind), Some(size)) = (r.u8(), r.u16()) {
        let Some(bytes) = r.take(size.into()) else { return };
        now_ms += u64::from(kind >> 1);
        // Most frames would end at their addresses and checksums: every other kind gets right ones.
        let mut frame = bytes.to_vec();
        match kind % 4 {
            0 => drop(packetd.step(now_ms, Input::Message(bytes))),
            1 => step(&mut packetd, now_ms, &frame),
            _ => {
                make_right(&mut frame);
                step(&mut packetd, now_ms, &frame);
            }
        }
    }
});

fn step(packetd: &mut Packetd, now_ms: u64, frame: &[u8]) {
    match packetd.step(now_ms, Input::Frame(frame)) {
        Output::Frame(reply) => assert!(reply.len() <= frame.len().max(ARP_SIZE)),
        Output::Message(_) => assert!(frame.len() >= 1024),
        Output::Nothing => {}
    }
}

/// Gives an IPv4 frame the node's addresses and right checksums.
fn make_right(frame: &mut [u8]) {
    if frame.len() < 42 {
        return;
    }
    frame[..6].copy_from_slice(&NODE.mac);
    frame[6] &= !1;
    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
    let size = (frame.len() - 14).min(u16::MAX.into()) as u16;
    frame[16..18].copy_from_slice(&size.to_be_bytes());
    frame[20..22].fill(0);
    frame[23] = 1;
    frame[26] = 198;
    frame[30..34].copy_from_slice(&NODE.ipv4);
    frame[34..36].copy_from_slice(&[8, 0]);
    for (field, start, end) in [(24, 14, 34), (36, 34, frame.len())] {
        frame[field..field + 2].fill(0);
        let sum: u64 = frame[start..end]
            .chunks(2)
            .map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
            .sum();
        let sum = (sum % 0xffff) as u16;
        frame[field..field + 2].copy_from_slice(&(!sum).to_be_bytes());
    }
}
