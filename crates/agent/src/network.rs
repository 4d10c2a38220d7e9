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
    let announced = Announcer::open(identity).and_then(|announcer| Ok(announcer.announce()?));
    if let Err(error) = announced {
        eprintln!("onde-agent: eth0 is not announced: {error:#}");
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

/// Bytes of an Ethernet frame with an ARP packet for IPv4 (RFC 826).
const ARP_SIZE: usize = 42;

/// What tells the network where this machine is. For a move it is made in the source, so that the copy has nothing to do but
/// to send: until then the bridges take packets for it to where it was.
pub struct Announcer {
    socket: PacketSocket,
    frame: [u8; ARP_SIZE],
}

impl Announcer {
    /// For the machine of `identity`, which keeps its addresses.
    pub fn open(identity: &Identity) -> Result<Self> {
        let device = DEVICE.to_str().expect("ASCII");
        let socket = PacketSocket::open(device).context("cannot open a packet socket")?;
        Ok(Self { socket, frame: gratuitous_arp(identity.mac, identity.ipv4) })
    }

    /// Sends a gratuitous ARP (RFC 5227, 3). An error is that of the device.
    pub fn announce(&self) -> io::Result<()> {
        self.socket.send(&self.frame).map(drop)
    }
}

fn gratuitous_arp(mac: [u8; 6], ipv4: [u8; 4]) -> [u8; ARP_SIZE] {
    let mut frame = [0; ARP_SIZE];
    frame[..6].fill(0xFF);
    frame[6..12].copy_from_slice(&mac);
    // ARP; Ethernet, IPv4, their addresses' sizes; a request.
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&ipv4);
    // Its own address is what it asks for.
    frame[38..42].copy_from_slice(&ipv4);
    frame
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gratuitous_arp_is_as_linux_sends_it() {
        let told = gratuitous_arp([2, 0x4F, 0xC6, 0x13, 0, 1], [198, 19, 0, 1]);
        let expect = b"\xff\xff\xff\xff\xff\xff\x02\x4f\xc6\x13\x00\x01\x08\x06\
            \x00\x01\x08\x00\x06\x04\x00\x01\x02\x4f\xc6\x13\x00\x01\xc6\x13\x00\x01\
            \x00\x00\x00\x00\x00\x00\xc6\x13\x00\x01";
        assert_eq!(&told, expect);
    }
}
