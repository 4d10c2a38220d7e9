//! The lab's network: one bridge and a tap a node, in the network namespace
//! that the keeper runs in. Uses `ip`; never touches the host's namespace,
//! which the keeper checks before it calls this.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use onde_wire::plan::Plan;

use crate::programs;

/// The bridge: the wire that all nodes and the customer hang on.
const BRIDGE: &str = "onde0";

/// Name of a node's tap.
pub fn tap(node: u8) -> String {
    format!("node{node}")
}

/// The lab's addresses: RFC 2544's network for benchmarks, which nobody routes.
pub fn plan() -> Plan {
    Plan::new([198, 18, 0, 0], 15).unwrap_or_else(|| unreachable!("a /15 with no host bits set"))
}

/// IPv4 address of a node.
pub fn node_ipv4(node: u8) -> Ipv4Addr {
    plan().node(node.into()).into()
}

/// IPv4 address of the bridge: the customer's, and the broker's.
pub fn owner_ipv4() -> Ipv4Addr {
    plan().owner().into()
}

/// MAC address of a node's network card: "ROND" in letters, which is locally administered.
pub fn node_mac(node: u8) -> String {
    format!("52:4f:4e:44:00:{node:02x}")
}

/// Lays the wire for `nodes` nodes.
pub fn build(nodes: u8) -> Result<()> {
    // First, so that the bridge never speaks IPv6 and the nodes' logs stay quiet.
    sysctl("net/ipv6/conf/default/disable_ipv6", &["1"]).ok();
    ip_batch(&script(nodes))?;
    // A user namespace maps one group only, and the kernel wants both ends mapped.
    sysctl("net/ipv4/ping_group_range", &["0 2147483647", "0 0"])
}

fn script(nodes: u8) -> String {
    let (owner, prefix_len) = (owner_ipv4(), plan().prefix_len());
    let mut script = format!(
        "link set lo up\n\
         link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         addr add {owner}/{prefix_len} dev {BRIDGE}\n\
         link set {BRIDGE} up\n"
    );
    for node in 1..=nodes {
        let tap = tap(node);
        script.push_str(&format!(
            "tuntap add dev {tap} mode tap\nlink set {tap} master {BRIDGE} up\n"
        ));
    }
    script
}

fn ip_batch(script: &str) -> Result<()> {
    let mut ip = Command::new(programs::required("ip")?)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip")?;
    let mut input = ip.stdin.take().context("ip has no input")?;
    input.write_all(script.as_bytes())?;
    drop(input);
    let done = ip.wait_with_output()?;
    if !done.status.success() {
        bail!(
            "cannot lay the lab's network: {}\nhint: the lab needs /dev/net/tun and the \
             kernel's bridge; in a container, both have to be allowed",
            String::from_utf8_lossy(&done.stderr).trim()
        );
    }
    Ok(())
}

/// Writes the first of `values` that the kernel takes.
fn sysctl(name: &str, values: &[&str]) -> Result<()> {
    let file = format!("/proc/sys/{name}");
    let mut last = Ok(());
    for value in values {
        last = std::fs::write(&file, value);
        if last.is_ok() {
            break;
        }
    }
    last.with_context(|| format!("cannot write {file}"))
}
