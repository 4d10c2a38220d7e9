//! The guest's network: loopback, and the one interface that the machine has, with the address from its
//! boot token. Called by `main`, and in a copy of a machine once more.

use anyhow::{Context, Result};
use onde_sys::inet::Inet;
use onde_sys::link::Links;
use onde_sys::packet::PacketSocket;
use onde_wire::machine::Identity;
use std::ffi::CStr;
use std::net::Ipv4Addr;
use std::path::Path;
use std::{fs, io};

const LOOPBACK: &CStr = c"lo";
/// The kernel names Ethernet devices in the order it finds them, and there is one.
const DEVICE: &CStr = c"eth0";

/// Kernel settings, and why. A kernel without one of them works too.
const SETTINGS: [(&str, &str); 3] = [
    // No IPv6 in a cluster yet: spares the node its searches for routers and duplicates.
    ("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1"),
    // A customer who is gone is given up after about 100 s instead of 15 minutes (RFC 1122, 4.2.3.5).
    ("/proc/sys/net/ipv4/tcp_retries2", "8"),
    // Segments stay large up to round trips of 65 ms instead of half a millisecond. To a machine that is busy, Linux
    // would send pieces of two packets, each at the cost of several exits here and there: the stream becomes slower,
    // which keeps the pieces small (net/ipv4/tcp_output.c, `tcp_tso_autosize`).
    ("/proc/sys/net/ipv4/tcp_tso_rtt_log", "16"),
];

/// Whether the device is there.
pub fn has_device() -> bool {
    Path::new("/sys/class/net/eth0").exists()
}

/// Brings the network up.
pub fn bring_up(identity: &Identity) -> Result<()> {
    let links = Links::open().context("cannot set up the network")?;
    let inet = Inet::open().context("cannot set up the network")?;
    let address = Ipv4Addr::from(identity.ipv4);
    links.set_up(LOOPBACK, true).context("cannot bring lo up")?;
    links.index(DEVICE).context("no network device eth0")?;
    for (path, value) in SETTINGS {
        let _ = std::fs::write(path, value);
    }
    inet.set_address(DEVICE, address, identity.prefix_len)
        .with_context(|| format!("cannot give eth0 the address {address}"))?;
    links.set_up(DEVICE, true).context("cannot bring eth0 up")?;
    let gateway = Ipv4Addr::from(identity.gateway);
    if !gateway.is_unspecified() {
        inet.set_gateway(gateway).with_context(|| format!("cannot use the gateway {gateway}"))?;
        write_new("/etc/resolv.conf", &format!("nameserver {gateway}\n"))?;
    }
    write_new("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
    // Now that it can answer: the kernel's own announcement (`arp_notify`) comes before its routes, and what a waiting
    // customer sends upon it is lost, for a second.
    if let Err(error) = announce(identity) {
        eprintln!("onde-agent: {error:#}");
    }
    Ok(())
}

/// Lets nothing out of a machine's copy until it has an address of its own. Forgets routes and neighbours, too.
pub fn take_down() -> Result<()> {
    let links = Links::open().context("cannot set up the network")?;
    links.set_up(DEVICE, false).context("cannot bring eth0 down")
}

/// Makes the network of a machine's copy, which is down, its own: other addresses on the same device.
pub fn take_over(identity: &Identity) -> Result<()> {
    let links = Links::open().context("cannot set up the network")?;
    links.set_mac(DEVICE, identity.mac).context("cannot give eth0 its MAC")?;
    bring_up(identity)
}

/// How long the kernel believes in a neighbour's address: milliseconds, then seconds before it asks again.
const NEIGHBOURS: [(&str, &str, &str); 2] = [
    ("/proc/sys/net/ipv4/neigh/eth0/base_reachable_time_ms", "30000", "86400000"),
    ("/proc/sys/net/ipv4/neigh/eth0/delay_first_probe_time", "5", "86400"),
];

/// Whether neighbours' addresses are held on to, for a day: no ARP leaves a frozen machine.
pub fn hold_neighbours(on: bool) -> io::Result<()> {
    NEIGHBOURS
        .iter()
        .try_for_each(|(path, usual, held)| fs::write(path, if on { held } else { usual }))
}

/// Tells the network where the machine of `identity` is.
pub fn announce(identity: &Identity) -> Result<()> {
    let device = DEVICE.to_str().expect("ASCII");
    let socket = PacketSocket::open(device).context("cannot open a packet socket")?;
    socket.send(&identity.announcement()).context("cannot announce this machine")?;
    Ok(())
}

/// Writes a file unless the customer packed one.
fn write_new(path: &str, text: &str) -> Result<()> {
    let path = Path::new(path);
    if path.exists() {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}
