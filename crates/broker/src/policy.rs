//! What the owner charges: each node's own price list, or what a file of rules says of the node and the time of day. A job
//! keeps the prices that it was bought at, which its boot token tells the node. `sale` and `nodes` ask; pure.
//!
//! ```text
//! # The first line that fits counts; a node that none fits charges by its own list, the cluster file's.
//! nodes=1-4,9 hours=22-6  percent=40           (22:00 to 06:00 UTC: 40 % of its own list)
//! nodes=1-4,9             vcpu_s=500000 gib_s=100000 gib_sent=1000000 disk_gib_s=10000
//! nodes=7                 free
//! ```

use onde_wire::packet::Prices;
use std::ops::RangeInclusive;

/// Most rules: each is looked at for each node that a page shows.
const RULES_MAX: usize = 1000;
/// Most per cent of a node's own list.
const PERCENT_MAX: u64 = 10_000;

/// The owner's rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// Numbers of nodes; none for all.
    nodes: Vec<RangeInclusive<u32>>,
    /// From this hour of the day (UTC) to before that; over midnight where the second is no later.
    hours: Option<(u64, u64)>,
    charge: Charge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Charge {
    Fixed(Prices),
    Percent(u64),
}

/// What is wrong with a file of rules: the number of the line, from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct PolicyError {
    line: usize,
    what: String,
}

impl Policy {
    /// Reads the rules.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let mut rules = Vec::new();
        for (text, line) in text.lines().zip(1..) {
            let text = text.split('#').next().unwrap_or_default();
            let words: Vec<_> = text.split_whitespace().collect();
            if words.is_empty() {
                continue;
            }
            rules.push(Rule::parse(&words).map_err(|what| PolicyError { line, what })?);
            if rules.len() > RULES_MAX {
                let what = format!("more than {RULES_MAX} rules");
                return Err(PolicyError { line, what });
            }
        }
        Ok(Self { rules })
    }

    /// What a job on this node costs that is bought at this time, by the node's own list and the rules.
    pub fn prices(&self, node: u32, own: &Prices, unix_s: u64) -> Prices {
        let hour = unix_s / 3600 % 24;
        let rule = self.rules.iter().find(|rule| rule.fits(node, hour));
        match rule.map(|rule| rule.charge) {
            None => *own,
            Some(Charge::Fixed(prices)) => prices,
            Some(Charge::Percent(percent)) => Prices {
                vcpu_s: share(own.vcpu_s, percent),
                gib_s: share(own.gib_s, percent),
                gib_sent: share(own.gib_sent, percent),
                disk_gib_s: share(own.disk_gib_s, percent),
            },
        }
    }
}

fn share(price: u64, percent: u64) -> u64 {
    (u128::from(price) * u128::from(percent) / 100).try_into().unwrap_or(u64::MAX)
}

impl Rule {
    fn parse(words: &[&str]) -> Result<Self, String> {
        let (mut nodes, mut hours, mut percent) = (Vec::new(), None, None);
        let (mut fixed, mut prices) = (false, Prices::default());
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse().map_err(|_| format!("`{value}` is no number"));
            match name {
                "nodes" => {
                    nodes = parse_nodes(value).ok_or(format!("`{value}` is no list of nodes"))?
                }
                "hours" => {
                    hours = Some(parse_hours(value).ok_or(format!("`{value}` is not HOUR-HOUR"))?);
                }
                "percent" => percent = Some(number()?),
                _ => {
                    fixed = true;
                    match name {
                        "free" => {}
                        "vcpu_s" => prices.vcpu_s = number()?,
                        "gib_s" => prices.gib_s = number()?,
                        "gib_sent" => prices.gib_sent = number()?,
                        "disk_gib_s" => prices.disk_gib_s = number()?,
                        _ => return Err(format!("unknown word `{word}`")),
                    }
                }
            }
        }
        let charge = match (fixed, percent) {
            (true, None) => Charge::Fixed(prices),
            (false, Some(percent)) if percent <= PERCENT_MAX => Charge::Percent(percent),
            (false, Some(_)) => return Err(format!("percent is at most {PERCENT_MAX}")),
            _ => return Err("a rule has prices, or `percent=N`, or `free`".into()),
        };
        Ok(Self { nodes, hours, charge })
    }

    fn fits(&self, node: u32, hour: u64) -> bool {
        let is_named =
            self.nodes.is_empty() || self.nodes.iter().any(|range| range.contains(&node));
        let is_now = self.hours.is_none_or(|(from, to)| match from < to {
            true => (from..to).contains(&hour),
            false => hour >= from || hour < to,
        });
        is_named && is_now
    }
}

fn parse_nodes(text: &str) -> Option<Vec<RangeInclusive<u32>>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last).then_some(first..=last)
    };
    text.split(',').map(range).collect()
}

fn parse_hours(text: &str) -> Option<(u64, u64)> {
    let (from, to) = text.split_once('-')?;
    let (from, to): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
    (from < 24 && to <= 24).then_some((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Prices = Prices { vcpu_s: 800_000, gib_s: 7, gib_sent: 1_000_000, disk_gib_s: 0 };

    const RULES: &str = "
        nodes=1-4,9 hours=22-6 percent=40     # at night
        nodes=1-4,9 vcpu_s=500000 gib_s=100000
        nodes=7 free
        hours=0-24 nodes=20-29 percent=150
    ";

    /// What a processor's second and a GiB-second cost on a node at an hour.
    fn check(node: u32, hour: u64, expect: (u64, u64)) {
        let policy = Policy::parse(RULES).expect("rules");
        for day in [0, 20_000] {
            let prices = policy.prices(node, &OWN, day * 86_400 + hour * 3600 + 1800);
            assert_eq!((prices.vcpu_s, prices.gib_s), expect, "node {node} at {hour}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_node_and_hour_counts() {
        for hour in [22, 23, 0, 5] {
            check(1, hour, (320_000, 2));
            check(9, hour, (320_000, 2));
        }
        for hour in [6, 12, 21] {
            check(4, hour, (500_000, 100_000));
        }
        for hour in [0, 12] {
            check(7, hour, (0, 0));
            check(25, hour, (1_200_000, 10));
            check(5, hour, (800_000, 7));
        }
        assert_eq!(Policy::default().prices(1, &OWN, 0), OWN);
    }

    #[test]
    fn what_is_no_rule_is_named() {
        for (text, expect) in [
            ("free\nnodes=1", "line 2: a rule has prices, or `percent=N`, or `free`"),
            ("percent=5 free", "line 1: a rule has prices, or `percent=N`, or `free`"),
            ("percent=10001", "line 1: percent is at most 10000"),
            ("nodes=4-1 free", "line 1: `4-1` is no list of nodes"),
            ("nodes= free", "line 1: `` is no list of nodes"),
            ("hours=24-3 free", "line 1: `24-3` is not HOUR-HOUR"),
            ("vcpu_s=-1", "line 1: `-1` is no number"),
            ("cheap", "line 1: unknown word `cheap`"),
        ] {
            assert_eq!(Policy::parse(text).map_err(|error| error.to_string()), Err(expect.into()));
        }
    }
}
