//! Values of every wire type that the tests share, and how bytes are compared. The expected bytes in the
//! tests were computed by another program from the formats' descriptions, not by this crate.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use onde_wire::key::{Key, certificate_key, job_key, node_id, node_key, sha256};
use onde_wire::packet::Prices;
use onde_wire::token::{BootToken, Certificate, Origin, Renewal};

pub const MAC: [u8; 6] = [2, 0x4f, 198, 18, 1, 1];
pub const JOB: [u8; 16] = [9; 16];
pub const NONCE: u64 = 0x1122_3344_5566_7788;

pub fn secret() -> [u8; 32] {
    std::array::from_fn(|index| index as u8)
}

pub fn node() -> Key {
    Key::new(&node_key(&secret(), &node_id(&MAC)))
}

pub fn job() -> Key {
    Key::new(&job_key(&node(), &JOB))
}

pub fn certificates() -> Key {
    Key::new(&certificate_key(&node()))
}

pub fn token() -> BootToken {
    BootToken {
        broker_key: [1; 8],
        node: node_id(&MAC),
        incarnation: [3; 16],
        job: JOB,
        expiry_ms: 60_000,
        anchor: [4; 32],
        value_micro: 1000,
        first_count: 10,
        loader_sha256: [5; 32],
        mem_mib: 128,
        held_mib: 40,
        origin: Origin::Clone([9; 16]),
        vcpus: 2,
        disk_mib: 64,
        net_kib_s: 1024,
        mac: [2, 0, 0, 0, 0, 1],
        ipv4: [198, 19, 0, 1],
        gateway: [198, 18, 0, 1],
        prefix_len: 15,
        prices: Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 },
    }
}

pub fn renewal() -> Renewal {
    Renewal { index: 77, anchor: [6; 32] }
}

pub fn certificate() -> Certificate {
    Certificate {
        job: JOB,
        node: node_id(&MAC),
        incarnation: [3; 16],
        last_index: 70,
        spent_micro: 1_234_567,
        unused_micro: 7_654_321,
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks `bytes` against their hex digits, or against those of their SHA-256 where they are long.
#[track_caller]
pub fn check_golden(bytes: &[u8], golden: &str) {
    let short = golden.len() != 64 || bytes.len() == 32;
    let actual = if short { hex(bytes) } else { hex(&sha256(bytes)) };
    assert_eq!(actual, golden);
}

/// Calls `each` with every copy of `bytes` in which one bit differs, and says which.
pub fn each_flip(bytes: &[u8], mut each: impl FnMut(usize, &[u8])) {
    let mut bytes = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        each(bit, &bytes);
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}
