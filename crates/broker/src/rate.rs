//! How many requests one key, and one address, may make: a token bucket each, in a table of bounded size. `http` asks
//! before anything is done for a request.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Instant;

/// Most buckets in a table, 64 bytes each. When it is full, buckets that have filled up again go: they say nothing.
const BUCKETS_MAX: usize = 16_384;
/// Seconds of the rate that may be used at once.
const BURST_S: f64 = 4.0;

/// What counts as one address: of IPv6, the half that a customer is given as a whole.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let bits = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(bits).into()
        }
        address => address,
    }
}

/// Buckets for keys of type `K`.
#[derive(Debug)]
pub struct Rates<K> {
    per_s: f64,
    buckets: HashMap<K, (f64, Instant)>,
}

impl<K: Hash + Eq> Rates<K> {
    /// Lets each key have `per_s` requests a second; 0 for any number.
    pub fn new(per_s: u32) -> Self {
        Self { per_s: per_s.into(), buckets: HashMap::new() }
    }

    /// Whether `key` may have one more now.
    pub fn take(&mut self, key: K, now: Instant) -> bool {
        if self.per_s == 0.0 {
            return true;
        }
        let (per_s, full) = (self.per_s, self.per_s * BURST_S);
        let level = |(left, at): &(f64, Instant)| {
            (left + now.saturating_duration_since(*at).as_secs_f64() * per_s).min(full)
        };
        if self.buckets.len() >= BUCKETS_MAX && !self.buckets.contains_key(&key) {
            self.buckets.retain(|_, bucket| level(bucket) < full);
            if self.buckets.len() >= BUCKETS_MAX {
                return false;
            }
        }
        let left = self.buckets.get(&key).map_or(full, level);
        let may = left >= 1.0;
        self.buckets.insert(key, (if may { left - 1.0 } else { left }, now));
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_key_gets_its_rate_and_a_burst_and_never_another_ones() {
        let (mut rates, start) = (Rates::new(10), Instant::now());
        let count = |rates: &mut Rates<u32>, key, ms| {
            let now = start + Duration::from_millis(ms);
            (0..1000).filter(|_| rates.take(key, now)).count()
        };
        assert_eq!(count(&mut rates, 1, 0), 40, "a burst");
        assert_eq!(count(&mut rates, 1, 0), 0);
        assert_eq!(count(&mut rates, 2, 0), 40);
        assert_eq!(count(&mut rates, 1, 1000), 10);
        assert_eq!(count(&mut rates, 1, 60_000), 40);
        assert_eq!(count(&mut Rates::new(0), 1, 0), 1000, "no limit");
    }

    #[test]
    fn the_table_stays_bounded_and_takes_new_keys_when_old_ones_are_quiet() {
        let (mut rates, start) = (Rates::new(1), Instant::now());
        let served = (0..BUCKETS_MAX + 9).filter(|key| rates.take(*key, start)).count();
        assert_eq!((served, rates.buckets.len()), (BUCKETS_MAX, BUCKETS_MAX));
        assert!(rates.take(usize::MAX, start + Duration::from_secs(9)));
        assert_eq!(rates.buckets.len(), 1);
    }

    #[test]
    fn a_network_is_an_ipv4_address_or_half_an_ipv6_one() {
        let check = |address: &str, expect: &str| {
            assert_eq!(network(address.parse().unwrap()).to_string(), expect);
        };
        check("198.18.0.9", "198.18.0.9");
        check("::ffff:198.18.0.9", "198.18.0.9");
        check("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::");
    }
}
