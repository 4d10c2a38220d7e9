//! The cluster file that every node and the broker of a lab share: its secret,
//! network and prices. Written by `up`; `onde_wire::cluster` says what it means.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// The lab's network (RFC 2544: for benchmarks, never routed). All its machines share one link:
/// there is no gateway.
const NETWORK: &str = "198.18.0.0/15";

/// What the nodes of a lab charge, micro-tokens: high enough that a test sees a balance fall, on disk too.
const PRICES: [(&str, u64); 4] =
    [("vcpu_s", 800_000), ("gib_s", 200_000), ("gib_sent", 1_000_000), ("disk_gib_s", 100_000)];

/// Writes a cluster file with a fresh secret to `file`, which is new and readable by its owner only.
pub fn create(file: &Path) -> Result<()> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).context("no randomness")?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .and_then(|mut out| out.write_all(text(&secret).as_bytes()))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// The cluster file's bytes, for the node image.
pub fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// How long a VM that runs dry is kept, seconds: long enough for somebody who looks on to pay, short enough for
/// somebody who waits to see it go.
const KEEP_S: u32 = 20;

fn text(secret: &[u8; 32]) -> String {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut text = format!("secret={hex}\nnetwork={NETWORK}\n");
    for (name, price) in PRICES {
        text.push_str(&format!("price.{name}={price}\n"));
    }
    text.push_str(&format!("keep_s={KEEP_S}\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_wire::cluster::Cluster;

    #[test]
    fn nodes_understand_the_cluster_file() {
        let cluster = Cluster::parse(&text(&[0xA5; 32])).unwrap();
        assert_eq!(cluster.secret, [0xA5; 32]);
        assert_eq!(cluster.plan, crate::network::plan());
        assert_eq!(cluster.prices.disk_gib_s, 100_000);
    }
}
