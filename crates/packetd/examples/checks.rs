//! How many boot packets a second one core can check: form and tag of 1024-byte packets that differ, as
//! `packetd` does it for each. Prints one line of JSON; `cargo xtask bench` runs it.

use onde_wire::key::Key;
use onde_wire::packet::{BODY, MAGIC, Op, PACKET_SIZE, Packet, RequestUnchecked, VERSION};
use std::hint::black_box;
use std::time::Instant;

/// Packets in memory: more than the caches next to the core hold, as on a busy link.
const PACKETS: usize = 2048;
/// Rounds over them, each timed; the median counts.
const ROUNDS: usize = 101;

fn main() {
    let key = Key::new(&[7; 32]);
    let packets: Vec<Packet> = (0..PACKETS).map(|index| boot(&key, index as u64)).collect();
    let mut rates: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            let right = packets.iter().filter(|packet| check(&key, packet)).count();
            assert_eq!(right, PACKETS / 2, "every other tag is wrong");
            PACKETS as f64 / start.elapsed().as_secs_f64()
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    println!(
        "{{\"boot_checks_per_s\": {:.0}, \"low\": {:.0}, \"high\": {:.0}, \"memory_kib\": {}}}",
        rates[ROUNDS / 2],
        rates[ROUNDS / 10],
        rates[ROUNDS - 1 - ROUNDS / 10],
        memory_kib(),
    );
}

/// Memory of this process, the packets included.
fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn check(key: &Key, packet: &Packet) -> bool {
    RequestUnchecked::parse(black_box(packet)).is_some_and(|request| request.verify(key))
}

/// A boot packet whose token is noise; the tag is right where `index` is even.
fn boot(key: &Key, index: u64) -> Packet {
    let mut packet = [0; PACKET_SIZE];
    packet[..4].copy_from_slice(&MAGIC);
    packet[4..6].copy_from_slice(&[VERSION, Op::Boot as u8]);
    packet[8..16].copy_from_slice(&index.to_le_bytes());
    packet[BODY..BODY + 8].copy_from_slice(&index.to_le_bytes());
    let mut tag = key.tag(&[&packet[BODY..BODY + Op::Boot.request_size()]]);
    tag[31] ^= (index % 2) as u8;
    packet[32..BODY].copy_from_slice(&tag);
    packet
}
