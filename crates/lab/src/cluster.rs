//! The cluster file that every node and the broker of a lab share: its secret,
//! addresses and prices, in lines `key=value` that trusted programs can read
//! without a parser worth the name.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Prices in micro-tokens: a vCPU-second, a GiB-second of memory, a GiB sent, a GiB-second of disk.
const PRICES: [(&str, u64); 4] =
    [("vcpu_s", 1_000), ("gib_s", 500), ("gib_sent", 20_000), ("disk_gib_s", 10)];

/// Where the lab's own end of the network is: the broker's and the customer's address.
pub const CUSTOMER_IPV4: &str = "198.18.255.1";
/// Length of the lab's network prefix.
pub const PREFIX_LEN: u8 = 15;
/// The lab's network (RFC 2544: for benchmarks, never routed).
pub const NETWORK: &str = "198.18.0.0/15";

/// Writes a cluster file with a fresh secret to `file`, readable by its owner only. A file that
/// is there already stays as it is: its secret outlives a lab that crashed.
pub fn create(file: &Path) -> Result<()> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).context("no randomness")?;
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    match opened {
        Ok(mut out) => out.write_all(text(&secret).as_bytes())?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).context(format!("cannot write {}", file.display())),
    }
    Ok(())
}

/// The cluster file's bytes, for the node image.
pub fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

fn text(secret: &[u8; 32]) -> String {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    // All nodes and guests share one link: there is no gateway to name.
    let mut text = format!("secret={hex}\nnetwork={NETWORK}\ngateway=0.0.0.0\n");
    for (name, price) in PRICES {
        text.push_str(&format!("price.{name}={price}\n"));
    }
    text
}
