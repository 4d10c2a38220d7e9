//! A node and a token to test with.

use onde_wire::key;
use onde_wire::packet::Prices;
use onde_wire::plan::{self, Plan};
use onde_wire::token::{BootToken, Origin};

use crate::meter::Terms;
use crate::node::Config;

/// The lab's price list.
pub const PRICES: Prices =
    Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 };
/// MAC of the node's card.
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 3];
/// Start of the sample chain.
pub const SEED: [u8; 32] = [7; 32];
/// Length of the sample chain.
pub const CHAIN: u32 = 4_200;

/// Node 3 of 198.18.0.0/15 with two processors and 1 GiB for VMs, and no disk.
pub fn config() -> Config {
    Config {
        number: 3,
        mac: MAC,
        node: key::node_id(&MAC),
        incarnation: [5; 16],
        node_key: [6; 32],
        plan: Plan::new([198, 18, 0, 0], 15).expect("a /15"),
        terms: Terms { prices: PRICES, keep_s: 120 },
        cpus: 2,
        mem_mib: 1024,
        disk_mib: 0,
    }
}

/// Token number `index` of the sample chain.
pub fn payment(index: u32) -> [u8; 32] {
    onde_wire::chain::walk(&SEED, CHAIN - index)
}

/// A token for job `number`: 128 MiB, one vCPU, three tokens of account paid.
pub fn token(number: u8) -> BootToken {
    let ipv4 = Plan::new([198, 18, 0, 0], 15).expect("a /15").guest(number.into());
    BootToken {
        broker_key: [0; 8],
        node: config().node,
        incarnation: [5; 16],
        job: [number; 16],
        expiry_ms: 60_000,
        anchor: payment(3),
        value_micro: 1_000_000,
        first_count: 3,
        loader_sha256: [8; 32],
        mem_mib: 128,
        held_mib: 128,
        origin: Origin::Loader,
        vcpus: 1,
        disk_mib: 0,
        net_kib_s: 0,
        mac: plan::mac(ipv4),
        ipv4,
        gateway: [0; 4],
        prefix_len: 15,
        prices: PRICES,
    }
}

/// A few lines that give the same numbers for the same seed everywhere (SplitMix64, Steele and others, 2014).
pub struct Dice(pub u64);

impl Dice {
    /// A number below `sides`.
    pub fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }
}
