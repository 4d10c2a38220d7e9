//! What a VM used and what that costs, in whole micro-tokens. Pure arithmetic: the cost is always computed
//! from all that was used since the start, each component rounded down once, so that no sum of
//! small charges can drift away from price times meter.

use onde_wire::packet::Prices;
use onde_wire::price::SENT_MAX_PER_S;
use onde_wire::token::BootToken;

use crate::filter::{burst_bytes, is_limited};

/// Counters of the kernel for one VM, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Processor time of its cgroup, microseconds.
    pub cpu_us: u64,
    /// Bytes that its tap took from it and let pass.
    pub sent_bytes: u64,
}

/// All that a VM used since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meters {
    /// Microseconds of processor time.
    pub cpu_us: u64,
    /// MiB-milliseconds of memory.
    pub mem_mib_ms: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// MiB-milliseconds of disk.
    pub disk_mib_ms: u64,
}

impl Meters {
    /// The meters of a VM of this shape at this age. Never runs backwards, whatever the kernel's counters say.
    pub fn advance(&mut self, shape: &BootToken, age_ms: u64, reading: Reading) {
        let held = |mib: u32| age_ms.saturating_mul(mib.into());
        self.cpu_us = self.cpu_us.max(reading.cpu_us);
        self.mem_mib_ms = self.mem_mib_ms.max(held(shape.mem_mib));
        self.sent_bytes = self.sent_bytes.max(reading.sent_bytes);
        self.disk_mib_ms = self.disk_mib_ms.max(held(shape.disk_mib));
    }

    /// What all this costs, micro-tokens.
    pub fn cost_micro(&self, prices: &Prices) -> u64 {
        prices.cost_micro(self.cpu_us, self.mem_mib_ms, self.sent_bytes, self.disk_mib_ms)
    }
}

/// Micro-tokens a second for what a VM holds even while it does nothing, rounded up.
pub fn burn_held(prices: &Prices, shape: &BootToken) -> u64 {
    prices.held_micro_per_s(shape.mem_mib, shape.disk_mib)
}

/// Most bytes that a VM of this shape can send in a second.
fn sent_max(shape: &BootToken) -> u64 {
    match shape.net_kib_s {
        rate if is_limited(rate) => u64::from(rate) * 1024 + burst_bytes(rate),
        _ => SENT_MAX_PER_S,
    }
}

/// The most micro-tokens a second that a VM of this shape can cost, rounded up.
pub fn burn_max(prices: &Prices, shape: &BootToken) -> u64 {
    let sent = prices.cost_micro(0, 0, sent_max(shape), 0).saturating_add(1);
    prices.busy_micro_per_s(shape.vcpus, shape.mem_mib, shape.disk_mib).saturating_add(sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{PRICES, token};

    fn check(age_ms: u64, cpu_us: u64, sent_bytes: u64, expect_micro: u64) {
        let mut meters = Meters::default();
        meters.advance(&token(1), age_ms, Reading { cpu_us, sent_bytes });
        assert_eq!(meters.cost_micro(&PRICES), expect_micro, "{meters:?}");
    }

    #[test]
    fn cost_is_price_times_meter() {
        check(0, 0, 0, 0);
        // 128 MiB for a second at 200 000 a GiB-second.
        check(1000, 0, 0, 25_000);
        check(0, 1_000_000, 0, 800_000);
        check(0, 0, 1 << 30, 1_000_000);
        // Less than a micro-token costs nothing yet.
        check(0, 1, 1000, 0);
    }

    #[test]
    fn a_cost_beyond_all_bounds_is_the_largest_number() {
        let used = Meters { cpu_us: u64::MAX, sent_bytes: u64::MAX, ..Meters::default() };
        assert_eq!(used.cost_micro(&Prices { vcpu_s: u64::MAX, gib_sent: 1, ..PRICES }), u64::MAX);
    }

    #[test]
    fn many_small_steps_cost_what_one_large_step_costs() {
        let (mut stepped, shape) = (Meters::default(), token(1));
        let mut charged = 0;
        for i in 1..=977 {
            stepped.advance(&shape, i * 13, Reading { cpu_us: i * 7, sent_bytes: i * 999 });
            let cost = stepped.cost_micro(&PRICES);
            assert!(cost >= charged, "a meter ran backwards");
            charged = cost;
        }
        let mut once = Meters::default();
        once.advance(&shape, 977 * 13, Reading { cpu_us: 977 * 7, sent_bytes: 977 * 999 });
        assert_eq!(charged, once.cost_micro(&PRICES));
    }

    #[test]
    fn no_vm_burns_more_than_the_most() {
        let shape = token(1);
        let mut meters = Meters::default();
        let busiest =
            Reading { cpu_us: 1_000_000 * u64::from(shape.vcpus), sent_bytes: SENT_MAX_PER_S };
        meters.advance(&shape, 1000, busiest);
        assert!(meters.cost_micro(&PRICES) <= burn_max(&PRICES, &shape));
        assert!(burn_held(&PRICES, &shape) == 25_000);
    }
}
