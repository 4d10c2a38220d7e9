//! What a price list makes of meters: one rounding for the node that charges and for the customer that checks.
//! `noded` charges by it, the home node judges by it. Pure arithmetic.

use crate::packet::Prices;

/// MiB-milliseconds in a GiB-second.
const GIB_S: u64 = 1024 * 1000;
/// Microseconds in a second.
const SECOND_US: u64 = 1_000_000;
/// Bytes in a GiB.
const GIB: u64 = 1 << 30;

/// Most bytes a second that a VM can send: what one tap moves with segmentation offload on today's
/// processors, doubled. Too low, and a VM could send for longer than its balance lasts before the node's next
/// look, and customers would take an honest node for a cheat.
pub const SENT_MAX_PER_S: u64 = 4 * GIB;

impl Prices {
    /// What all that was used since the start costs, micro-tokens: the sum of used x price / unit, each rounded down
    /// once.
    pub fn cost_micro(
        &self,
        cpu_us: u64,
        mem_mib_ms: u64,
        sent_bytes: u64,
        disk_mib_ms: u64,
    ) -> u64 {
        let cost = |used: u64, price: u64, unit: u64| {
            u128::from(used) * u128::from(price) / u128::from(unit)
        };
        let sum = cost(cpu_us, self.vcpu_s, SECOND_US)
            + cost(mem_mib_ms, self.gib_s, GIB_S)
            + cost(sent_bytes, self.gib_sent, GIB)
            + cost(disk_mib_ms, self.disk_gib_s, GIB_S);
        sum.try_into().unwrap_or(u64::MAX)
    }

    /// Micro-tokens a second for what a VM holds even while it does nothing, rounded up.
    pub fn held_micro_per_s(&self, mem_mib: u32, disk_mib: u32) -> u64 {
        let held = |mib: u32, price: u64| (u128::from(mib) * u128::from(price)).div_ceil(1024);
        let burn = held(mem_mib, self.gib_s) + held(disk_mib, self.disk_gib_s);
        burn.try_into().unwrap_or(u64::MAX)
    }

    /// Micro-tokens a second of a VM whose vCPUs are all busy, and that sends nothing; rounded up.
    pub fn busy_micro_per_s(&self, vcpus: u16, mem_mib: u32, disk_mib: u32) -> u64 {
        let busy = self.vcpu_s.saturating_mul(vcpus.into());
        self.held_micro_per_s(mem_mib, disk_mib).saturating_add(busy)
    }
}
