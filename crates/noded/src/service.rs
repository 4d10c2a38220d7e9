//! `noded` as a service of an existing host: command line, the bridge it brings and takes away again. Called by `main`
//! where the process id is not 1. Leaves the host as it found it.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

use onde_sys::link::{Links, is_addressed};

use crate::host::{Programs, Settings, Trouble, make_bridge, mount_empty, read_cluster};
use crate::run;

/// What `--help` prints.
pub const USAGE: &str = "\
Usage: noded --interface IF --cluster FILE [--node N] [--libexec DIR] [--disk MIB] [--uncapped]

Offers this host's processors and memory to the VMs of an Onde cluster.

  --interface IF   an existing bridge, whose ports VMs become; or a network card
                   without IP addresses, which gets a bridge for as long as noded runs
  --cluster FILE   the cluster file
  --node N         number of this node (default: from the MAC of the interface)
  --libexec DIR    where packetd, vmm and mstrap are (default: beside noded)
  --disk MIB       disk for VMs: how much of this host's swap they may have (default: 0)
  --uncapped       for development: go without the cgroup controllers that cap VMs
";

/// Name of the bridge that is made.
const BRIDGE: &CStr = c"onde0";
/// Where VMMs' empty root is, in a mount namespace of our own.
const EMPTY: &CStr = c"/run/onde-empty";

/// The command line.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    interface: String,
    cluster: PathBuf,
    node: Option<u32>,
    libexec: Option<PathBuf>,
    disk_mib: u32,
    is_uncapped: bool,
}

impl Arguments {
    /// Reads the arguments behind the program's name; the error is one line for the user.
    pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut out = Self::default();
        while let Some(name) = args.next() {
            let mut value = || args.next().ok_or(format!("{name} needs a value"));
            match name.as_str() {
                "--interface" => out.interface = value()?,
                "--cluster" => out.cluster = value()?.into(),
                "--libexec" => out.libexec = Some(value()?.into()),
                "--uncapped" => out.is_uncapped = true,
                "--disk" => {
                    out.disk_mib = value()?.parse().map_err(|_| "--disk needs a number of MiB")?;
                }
                "--node" => {
                    let number = value()?.parse().map_err(|_| "--node needs a number")?;
                    out.node = Some(number);
                }
                _ => return Err(format!("unknown argument {name}")),
            }
        }
        if out.interface.is_empty() || out.cluster.as_os_str().is_empty() {
            return Err("--interface and --cluster are needed".into());
        }
        Ok(out)
    }
}

/// Runs the node until a signal ends it.
pub fn run(arguments: Arguments) -> Result<(), Trouble> {
    let cluster = read_cluster(&arguments.cluster)?;
    let signals = run::block_signals().map_err(Trouble::at("signals", ""))?;
    onde_sys::mounts::separate().map_err(Trouble::at("own mounts", "noded has to run as root"))?;
    mount_empty(EMPTY)?;
    let name = CString::new(arguments.interface.clone());
    let name = name.map_err(Trouble::at(&arguments.interface, ""))?;
    let attachment = Attachment::new(&name)?;
    let settings = Settings {
        cluster,
        number: arguments.node,
        bridge: attachment.bridge.clone(),
        mac: attachment.mac,
        programs: programs(arguments.libexec)?,
        empty: EMPTY.into(),
        // Several may run on one host, each in a network namespace of its own.
        cgroup: format!("onde-{}", std::process::id()),
        is_capped: !arguments.is_uncapped,
        disk_mib: arguments.disk_mib,
    };
    let ended = settings.start(signals)?.run();
    ended.map(drop).map_err(Trouble::at("the loop", ""))
}

fn programs(libexec: Option<PathBuf>) -> Result<Programs, Trouble> {
    let beside = || {
        let own =
            std::env::current_exe().map_err(Trouble::at("where noded is", "use --libexec"))?;
        Ok(own.parent().unwrap_or(Path::new("/")).to_owned())
    };
    let folder = libexec.map_or_else(beside, Ok)?;
    Ok(Programs {
        packetd: folder.join("packetd"),
        vmm: folder.join("vmm"),
        mstrap: folder.join("mstrap"),
    })
}

/// The bridge that VMs are ports of; one that was made here goes with this.
struct Attachment {
    bridge: CString,
    mac: [u8; 6],
    /// The card that was made a port of our own bridge.
    card: Option<CString>,
    links: Links,
}

impl Attachment {
    fn new(interface: &CStr) -> Result<Self, Trouble> {
        let shown = interface.to_string_lossy();
        let links = Links::open().map_err(Trouble::at("socket for interfaces", ""))?;
        let mac = links
            .mac(interface)
            .map_err(Trouble::at(&shown, "`ip link` lists the interfaces of this host"))?;
        if Path::new("/sys/class/net").join(shown.as_ref()).join("bridge").exists() {
            return Ok(Self { bridge: interface.into(), mac, card: None, links });
        }
        if is_addressed(interface).map_err(Trouble::at(&shown, ""))? {
            let what =
                format!("{shown} has an IP address, and would lose it as a port of a bridge");
            return Err(Trouble::new(
                what,
                "make a bridge, move the address and the card to it, and give the bridge to --interface",
            ));
        }
        make_bridge(&links, BRIDGE, interface)
            .map_err(Trouble::at(format!("bridge with {shown}"), "is another noded running?"))?;
        Ok(Self { bridge: BRIDGE.into(), mac, card: Some(interface.into()), links })
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let Some(card) = &self.card else { return };
        let undone = self
            .links
            .remove_port(&self.bridge, card)
            .and_then(|()| self.links.set_up(&self.bridge, false))
            .and_then(|()| self.links.remove_bridge(&self.bridge));
        if let Err(error) = undone {
            println!("onde: cannot remove the bridge: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expect: Result<Arguments, &str>) {
        let parsed = Arguments::parse(line.split_whitespace().map(String::from));
        assert_eq!(parsed, expect.map_err(String::from), "{line}");
    }

    #[test]
    fn arguments() {
        let least =
            || Arguments { interface: "eth1".into(), cluster: "c".into(), ..Arguments::default() };
        check("--interface eth1 --cluster c", Ok(least()));
        check(
            "--cluster c --node 7 --libexec /x --disk 64 --uncapped --interface eth1",
            Ok(Arguments {
                node: Some(7),
                libexec: Some("/x".into()),
                disk_mib: 64,
                is_uncapped: true,
                ..least()
            }),
        );
        check("--interface eth1", Err("--interface and --cluster are needed"));
        check("--interface", Err("--interface needs a value"));
        check("--disk x", Err("--disk needs a number of MiB"));
        check("--node x", Err("--node needs a number"));
        check("eth1", Err("unknown argument eth1"));
    }
}
