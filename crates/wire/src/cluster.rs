//! The cluster file, the only configuration there is: one secret, one network, one price list, the same on
//! every node. Lines of `name=value`; `#` starts a comment. `noded` and `broker` read it.
//!
//! ```text
//! secret=<64 hex digits>
//! network=198.18.0.0/15
//! gateway=198.18.0.1            (optional)
//! price.vcpu_s=800000           (micro-tokens; absent means free)
//! price.gib_s=200000
//! price.gib_sent=1000000
//! price.disk_gib_s=10000
//! keep_s=300                    (seconds that a VM which runs dry is kept on disk)
//! ```

use crate::packet::Prices;
use crate::plan::Plan;

/// Micro-tokens in a token of account.
pub const TOKEN_MICRO: u64 = 1_000_000;

/// A cluster file with its meaning.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// The secret that all keys come from.
    pub secret: [u8; 32],
    /// The address plan.
    pub plan: Plan,
    /// Gateway for guests, all zero for none.
    pub gateway: [u8; 4],
    /// What nodes charge.
    pub prices: Prices,
    /// How long a VM that runs dry is kept on a node's disk, seconds; it pays for that time before.
    pub keep_s: u32,
}

/// Where nothing else is said: time for a person to hear of it and pay. Longer, and what home nodes release for twenty
/// seconds would all be kept back.
const KEEP_S: u32 = 300;

/// What is wrong with a cluster file: the number of the line, from 1; 0 where a line is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterError {
    /// The line.
    pub line: u32,
    /// What is wrong with it.
    pub what: &'static str,
}

impl core::fmt::Display for ClusterError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "cluster file, line {}: {}", self.line, self.what)
    }
}

impl core::error::Error for ClusterError {}

impl Cluster {
    /// Reads a cluster file.
    pub fn parse(text: &str) -> Result<Self, ClusterError> {
        let (mut secret, mut plan) = (None, None);
        let mut gateway = [0; 4];
        let mut prices = Prices::default();
        let mut keep_s = KEEP_S;
        for (line, number) in text.lines().zip(1..) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let error = |what| ClusterError { line: number, what };
            let (name, value) = line.split_once('=').ok_or(error("no `=` in it"))?;
            let price = || value.trim().parse().map_err(|_| error("not a price"));
            match name.trim() {
                "secret" => secret = Some(hex(value.trim()).ok_or(error("not 64 hex digits"))?),
                "network" => plan = Some(Plan::parse(value).ok_or(error("not a /10 to /22"))?),
                "gateway" => {
                    let address: core::net::Ipv4Addr =
                        value.trim().parse().map_err(|_| error("not an IPv4 address"))?;
                    gateway = address.octets();
                }
                "price.vcpu_s" => prices.vcpu_s = price()?,
                "price.gib_s" => prices.gib_s = price()?,
                "price.gib_sent" => prices.gib_sent = price()?,
                "price.disk_gib_s" => prices.disk_gib_s = price()?,
                "keep_s" => {
                    keep_s = value.trim().parse().map_err(|_| error("not a number of seconds"))?;
                }
                _ => return Err(error("unknown name")),
            }
        }
        let missing = |what| ClusterError { line: 0, what };
        Ok(Self {
            secret: secret.ok_or(missing("`secret` is missing"))?,
            plan: plan.ok_or(missing("`network` is missing"))?,
            gateway,
            prices,
            keep_s,
        })
    }
}

/// 32 bytes from 64 hex digits.
pub fn hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(core::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}
