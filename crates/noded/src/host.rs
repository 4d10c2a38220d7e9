//! What a node is started from, as first process or as service alike: opens programs, cgroups and links, counts memory
//! and processors, and joins all that to the loop. Called by [`crate::init`] and [`crate::service`].

use std::ffi::{CStr, CString};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use onde_sys::link::Links;
use onde_sys::signals::Signals;
use onde_sys::tap;
use onde_wire::cluster::Cluster;
use onde_wire::handover::Setup;
use onde_wire::key;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::cgroup::Cgroups;
use crate::filter::Filter;
use crate::meter::Terms;
use crate::node::{Config, Node};
use crate::packetd::Packetd;
use crate::run::Loop;
use crate::vm::Place;
use crate::world::World;

/// Memory that stays with the kernel and our own programs whatever VMs do, MiB: 16 for `noded` and `packetd`,
/// the rest for page cache, slabs and network buffers of a busy node.
const RESERVE_MIB: u64 = 64;
/// Most open files: eight for each VM, two more for a template, as many taps on their way out, and room.
const FILES_MAX: u64 = 16_384;
/// Ahead of VMs, which would else delay charges and answers when all processors are busy.
const PRIORITY: i32 = -10;
/// The tap that the filter is attached to first.
const FILTER_TAP: &CStr = c"onde-filter";

/// Why a node cannot start: what was tried, what came of it, and what to do about it.
#[derive(Debug)]
pub struct Trouble {
    what: String,
    hint: &'static str,
}

impl Trouble {
    /// Something that is not as it has to be.
    pub fn new(what: impl Into<String>, hint: &'static str) -> Self {
        Self { what: what.into(), hint }
    }

    /// For `map_err`: what was tried when the error came.
    pub fn at<E: fmt::Display>(
        what: impl fmt::Display,
        hint: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |error| Self::new(format!("{what}: {error}"), hint)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, "\nhint: {}", self.hint) }
    }
}

/// Where our programs are.
pub struct Programs {
    /// `packetd`.
    pub packetd: PathBuf,
    /// `vmm`.
    pub vmm: PathBuf,
    /// The image that new VMs start with.
    pub mstrap: PathBuf,
}

/// All that a node is started with.
pub struct Settings {
    /// The cluster file.
    pub cluster: Cluster,
    /// The node's number, where somebody gave it one.
    pub number: Option<u32>,
    /// The bridge that taps become ports of; it is up.
    pub bridge: CString,
    /// MAC of the node's card.
    pub mac: [u8; 6],
    /// Our programs.
    pub programs: Programs,
    /// Mount point of an empty, read-only file system.
    pub empty: CString,
    /// Name of the cgroup that VMs' groups are in.
    pub cgroup: String,
    /// Whether VMs have to be capped by their cgroups.
    pub is_capped: bool,
    /// Disk for VMs, MiB: there is as much swap.
    pub disk_mib: u32,
}

/// Reads a cluster file.
pub fn read_cluster(file: &Path) -> Result<Cluster, Trouble> {
    let hint = "`onde lab` writes one; see the head of crates/wire/src/cluster.rs for its form";
    let text = fs::read_to_string(file).map_err(Trouble::at(file.display(), hint))?;
    Cluster::parse(&text).map_err(Trouble::at(file.display(), hint))
}

impl Settings {
    /// Opens all of it. The first `packetd` is started by the loop.
    pub fn start(self, signals: Signals) -> Result<Loop, Trouble> {
        let config = self.config()?;
        let place = self.place()?;
        raise_files().map_err(Trouble::at("limit of open files", ""))?;
        rustix::process::setpriority_process(None, PRIORITY)
            .map_err(Trouble::at("priority", "noded has to run as root"))?;
        let packetd = Packetd::new(open(&self.programs.packetd)?, self.setup(&config)?);
        let node = Node::new(config);
        println!(
            "onde: node {} at {}, bridge {}, {} MiB, {} MiB of disk and {} processors for VMs",
            config.number,
            std::net::Ipv4Addr::from(config.plan.node(config.number)),
            self.bridge.to_string_lossy(),
            config.mem_mib,
            config.disk_mib,
            config.cpus,
        );
        let joined = World::new(place, packetd).and_then(|world| Loop::new(node, world, signals));
        joined.map_err(Trouble::at("epoll", ""))
    }

    fn config(&self) -> Result<Config, Trouble> {
        let plan = self.cluster.plan;
        let low = u32::from(u16::from_be_bytes([self.mac[4], self.mac[5]]));
        let number = self.number.unwrap_or(low % plan.nodes_max());
        if number >= plan.nodes_max() {
            let what = format!("node {number} of a network with room for {}", plan.nodes_max());
            return Err(Trouble::new(
                what,
                "give a smaller number, or the cluster a larger network",
            ));
        }
        let node = key::node_id(&self.mac);
        let mut incarnation = [0; 16];
        crate::random(&mut incarnation).map_err(Trouble::at("random numbers", ""))?;
        let cpus = std::thread::available_parallelism().map_or(1, |count| count.get());
        Ok(Config {
            number,
            mac: self.mac,
            node,
            incarnation,
            node_key: key::node_key(&self.cluster.secret, &node),
            plan,
            terms: Terms { prices: self.cluster.prices, keep_s: self.cluster.keep_s },
            cpus: cpus.try_into().unwrap_or(u16::MAX),
            mem_mib: memory_mib().map_err(Trouble::at("/proc/meminfo", ""))?,
            disk_mib: self.disk_mib,
        })
    }

    /// The filter, with its first tap, which stays switched off.
    fn filter(links: &Links) -> io::Result<Filter> {
        let tap = tap::open(FILTER_TAP)?;
        Filter::load()?.warm_up(tap, links.index(FILTER_TAP)?)
    }

    fn place(&self) -> Result<Place, Trouble> {
        let hint = "a node needs cgroup version 2 with the controllers cpu, memory and pids; \
                    for development, --uncapped goes without them";
        // Looked at now, so that a node without it says so at its start and not to its first customer.
        let kvm_hint = "load kvm_amd or kvm_intel, and switch virtualisation on in the firmware";
        File::open("/dev/kvm").map_err(Trouble::at("/dev/kvm", kvm_hint))?;
        open(&self.programs.mstrap)?;
        let links = Links::open().map_err(Trouble::at("socket for interfaces", ""))?;
        Ok(Place {
            filter: Self::filter(&links)
                .map_err(Trouble::at("filter for taps", "is another noded running?"))?,
            links,
            bridge: self.bridge.clone(),
            vmm: open(&self.programs.vmm)?,
            mstrap: self.programs.mstrap.clone(),
            empty: self.empty.clone(),
            cgroups: Cgroups::open(&self.cgroup, self.is_capped)
                .map_err(Trouble::at("cgroups", hint))?,
            null: onde_sys::spawn::dev_null().map_err(Trouble::at("/dev/null", ""))?,
        })
    }

    fn setup(&self, config: &Config) -> Result<Setup, Trouble> {
        let name = self.bridge.to_bytes();
        let mut interface = [0; 16];
        interface
            .get_mut(..name.len())
            .ok_or_else(|| Trouble::new("the bridge's name is too long", ""))?
            .copy_from_slice(name);
        let ipv4 = config.plan.node(config.number);
        Ok(Setup { interface, ipv4, node_key: config.node_key })
    }
}

/// A VM takes ten descriptors here, and the usual limit is 1 024.
fn raise_files() -> rustix::io::Result<()> {
    let limit = Some(FILES_MAX);
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit })
}

fn open(program: &Path) -> Result<File, Trouble> {
    let hint = "packetd, vmm and mstrap are looked for beside noded, or in --libexec";
    File::open(program).map_err(Trouble::at(program.display(), hint))
}

/// Memory that VMs can have, MiB: what is available now but for the reserve.
fn memory_mib() -> io::Result<u32> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let mib = kib.ok_or(io::ErrorKind::InvalidData)? / 1024;
    // A large machine's kernel needs more: a thirty-second of it.
    let reserve = RESERVE_MIB.max(mib / 32);
    Ok(mib.saturating_sub(reserve).try_into().unwrap_or(u32::MAX))
}

/// Makes bridge `bridge` with `port` as its port and the port's MAC, and switches both on.
pub fn make_bridge(links: &Links, bridge: &CStr, port: &CStr) -> io::Result<[u8; 6]> {
    let mac = links.mac(port)?;
    links.add_bridge(bridge)?;
    let join = || {
        links.set_mac(bridge, mac)?;
        crate::vm::no_ipv6(bridge)?;
        crate::vm::no_ipv6(port)?;
        links.add_port(bridge, port)?;
        links.set_up(port, true)?;
        links.set_up(bridge, true)
    };
    join().inspect_err(|_| {
        let _ = links.remove_bridge(bridge);
    })?;
    Ok(mac)
}

/// Mounts an empty file system that nobody can write to.
pub fn mount_empty(place: &CStr) -> Result<(), Trouble> {
    use rustix::mount::{MountFlags, mount};
    let folder = place.to_string_lossy();
    fs::create_dir_all(folder.as_ref()).map_err(Trouble::at(&folder, ""))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(c"none", place, c"tmpfs", flags, c"size=4k,nr_inodes=2,mode=555")
        .map_err(Trouble::at(&folder, "noded has to run as root"))
}
