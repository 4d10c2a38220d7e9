//! What a VM used and what that costs, in whole micro-tokens. Pure arithmetic: meters only grow, in whole numbers, and
//! the cost is always computed from all that was used since the start, each component rounded down once, so that no sum
//! of small charges can drift away from price times meter.

use onde_wire::packet::Prices;
use onde_wire::price::SENT_MAX_PER_S;
use onde_wire::token::BootToken;

use crate::filter::{burst_bytes, is_limited};

/// What a node charges, and what it promises for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The price list.
    pub prices: Prices,
    /// How long a VM that runs dry is kept on disk, seconds; it pays for that time before.
    pub keep_s: u32,
}

/// Counters of the kernel for one VM, since its process was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Processor time of its cgroup, microseconds.
    pub cpu_us: u64,
    /// Bytes that its tap took from it and let pass.
    pub sent_bytes: u64,
}

impl Reading {
    /// What was used since an earlier reading; nothing where the kernel's counters ran backwards.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            cpu_us: self.cpu_us.saturating_sub(earlier.cpu_us),
            sent_bytes: self.sent_bytes.saturating_sub(earlier.sent_bytes),
        }
    }

    /// The larger of both, counter by counter.
    pub fn max(&self, other: &Self) -> Self {
        Self {
            cpu_us: self.cpu_us.max(other.cpu_us),
            sent_bytes: self.sent_bytes.max(other.sent_bytes),
        }
    }
}

/// What a VM holds, whether it runs or not, MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Memory.
    pub mem_mib: u32,
    /// Disk.
    pub disk_mib: u32,
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
    /// Adds what was held for so long, and what was used meanwhile.
    pub fn add(&mut self, time_ms: u64, held: Held, used: Reading) {
        let of = |mib: u32| time_ms.saturating_mul(mib.into());
        self.cpu_us = self.cpu_us.saturating_add(used.cpu_us);
        self.mem_mib_ms = self.mem_mib_ms.saturating_add(of(held.mem_mib));
        self.sent_bytes = self.sent_bytes.saturating_add(used.sent_bytes);
        self.disk_mib_ms = self.disk_mib_ms.saturating_add(of(held.disk_mib));
    }

    /// What all this costs, micro-tokens.
    pub fn cost_micro(&self, prices: &Prices) -> u64 {
        prices.cost_micro(self.cpu_us, self.mem_mib_ms, self.sent_bytes, self.disk_mib_ms)
    }
}

/// Micro-tokens a second for what is held even while nothing is done, rounded up.
pub fn burn_held(prices: &Prices, held: Held) -> u64 {
    prices.held_micro_per_s(held.mem_mib, held.disk_mib)
}

/// Most bytes that a VM of this shape can send in a second.
fn sent_max(shape: &BootToken) -> u64 {
    match shape.net_kib_s {
        rate if is_limited(rate) => u64::from(rate) * 1024 + burst_bytes(rate),
        _ => SENT_MAX_PER_S,
    }
}

/// What a VM of this shape holds while it runs.
pub fn held_running(shape: &BootToken) -> Held {
    Held { mem_mib: shape.held_mib, disk_mib: shape.disk_mib }
}

/// The most micro-tokens a second that a VM of this shape can cost, rounded up.
pub fn burn_max(prices: &Prices, shape: &BootToken) -> u64 {
    let sent = prices.cost_micro(0, 0, sent_max(shape), 0).saturating_add(1);
    prices.busy_micro_per_s(shape.vcpus, shape.held_mib, shape.disk_mib).saturating_add(sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Dice, PRICES, token};

    fn check(time_ms: u64, cpu_us: u64, sent_bytes: u64, expect_micro: u64) {
        let mut meters = Meters::default();
        meters.add(time_ms, held_running(&token(1)), Reading { cpu_us, sent_bytes });
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
        let mut full = Meters { mem_mib_ms: u64::MAX, ..used };
        full.add(u64::MAX, held_running(&token(1)), Reading { cpu_us: 1, sent_bytes: 1 });
        assert_eq!(full.mem_mib_ms, u64::MAX);
    }

    /// However a run is cut into looks, whatever it held and used in each: the charges add up to price times meter,
    /// each of the four rounded down once.
    #[test]
    fn the_sum_of_charges_is_price_times_meter() {
        for seed in 0..300 {
            let mut dice = Dice(seed);
            let prices = Prices {
                vcpu_s: dice.throw(3_000_000),
                gib_s: dice.throw(3_000_000),
                gib_sent: dice.throw(9_000_000),
                disk_gib_s: dice.throw(3_000_000),
            };
            let (mut meters, mut charged) = (Meters::default(), 0);
            // Kept apart, in wider numbers: what was used, and the sums of its shares of a micro-token.
            let mut expect = [0u128; 4];
            for _ in 0..500 {
                let time_ms = dice.throw(1500);
                let held = Held {
                    mem_mib: dice.throw(70_000) as u32,
                    disk_mib: dice.throw(70_000) as u32,
                };
                let used = Reading {
                    cpu_us: dice.throw(64_000_000),
                    sent_bytes: dice.throw(5_000_000_000),
                };
                meters.add(time_ms, held, used);
                let cost = meters.cost_micro(&prices);
                assert!(cost >= charged, "a charge was taken back, seed {seed}");
                charged = cost;
                let mib_ms = |mib: u32| u128::from(mib) * u128::from(time_ms);
                let shares = [
                    (u128::from(used.cpu_us), prices.vcpu_s),
                    (mib_ms(held.mem_mib), prices.gib_s),
                    (u128::from(used.sent_bytes), prices.gib_sent),
                    (mib_ms(held.disk_mib), prices.disk_gib_s),
                ];
                for (sum, (amount, price)) in expect.iter_mut().zip(shares) {
                    *sum += amount * u128::from(price);
                }
            }
            let units = [1_000_000, 1_024_000, 1 << 30, 1_024_000];
            let exact: u128 = expect.iter().zip(units).map(|(sum, unit)| sum / unit).sum();
            assert_eq!(u128::from(charged), exact, "seed {seed}");
        }
    }

    #[test]
    fn no_vm_burns_more_than_the_most() {
        let shape = token(1);
        let mut meters = Meters::default();
        let busiest =
            Reading { cpu_us: 1_000_000 * u64::from(shape.vcpus), sent_bytes: SENT_MAX_PER_S };
        meters.add(1000, held_running(&shape), busiest);
        assert!(meters.cost_micro(&PRICES) <= burn_max(&PRICES, &shape));
        assert!(burn_held(&PRICES, held_running(&shape)) == 25_000);
    }

    #[test]
    fn counters_that_run_backwards_cost_nothing() {
        let (high, low) =
            (Reading { cpu_us: 9, sent_bytes: 2 }, Reading { cpu_us: 3, sent_bytes: 4 });
        assert_eq!(low.since(&high), Reading { cpu_us: 0, sent_bytes: 2 });
        assert_eq!(low.max(&high), Reading { cpu_us: 9, sent_bytes: 4 });
    }
}
