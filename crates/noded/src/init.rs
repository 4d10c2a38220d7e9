//! Duties of the first process of the diskless image: file systems, modules, network card, and switching the
//! machine off. Called by `main` where the process id is 1. Never returns to the kernel, which would panic.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use onde_sys::link::{LinkNews, Links};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::system::{RebootCommand, finit_module, reboot};

use crate::host::{Programs, Settings, Trouble, make_bridge, mount_empty, read_cluster};
use crate::run::{self, Outcome};
use crate::scratch;

/// Name of the bridge.
const BRIDGE: &CStr = c"onde0";
/// Where VMMs' empty root is.
const EMPTY: &CStr = c"/run/empty";
/// How long to wait for a network card, and then for one with a carrier: slow switches take some seconds.
const CARD_TIME: Duration = Duration::from_secs(10);

/// Runs the node until it is told to end, then switches off or starts again.
pub fn run() -> ! {
    let outcome = live().unwrap_or_else(|trouble| {
        println!("onde: {trouble}");
        Outcome::Stop
    });
    let command = match outcome {
        Outcome::Stop => RebootCommand::PowerOff,
        Outcome::Restart => RebootCommand::Restart,
    };
    println!("onde: switching off");
    let failed = reboot(command);
    panic!("the kernel does not switch off: {failed:?}");
}

fn live() -> Result<Outcome, Trouble> {
    mount_all()?;
    let _ = reboot(RebootCommand::CadOff);
    load_modules()?;
    let signals = run::block_signals().map_err(Trouble::at("signals", ""))?;
    let links = Links::open().map_err(Trouble::at("socket for interfaces", ""))?;
    let card = find_card(&links)?;
    let made = make_bridge(&links, BRIDGE, &card);
    let mac = made.map_err(Trouble::at(format!("bridge with {card:?}"), ""))?;
    mount_empty(EMPTY)?;
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let settings = Settings {
        cluster: read_cluster(Path::new("/etc/onde/cluster"))?,
        number: number(&cmdline),
        bridge: BRIDGE.into(),
        mac,
        programs: Programs {
            packetd: "/bin/packetd".into(),
            vmm: "/bin/vmm".into(),
            mstrap: "/boot/mstrap".into(),
        },
        empty: EMPTY.into(),
        cgroup: "onde".into(),
        is_capped: true,
        disk_mib: disk_mib(&cmdline),
    };
    settings.start(signals)?.run().map_err(Trouble::at("the loop", ""))
}

/// `onde.node=N` on the kernel's command line.
fn number(cmdline: &str) -> Option<u32> {
    cmdline.split_whitespace().find_map(|word| word.strip_prefix("onde.node=")?.parse().ok())
}

/// Disk for VMs on the scratch device, MiB. A node without one keeps nobody whose tokens have run out.
fn disk_mib(cmdline: &str) -> u32 {
    let Some(name) = scratch::name(cmdline) else { return 0 };
    scratch::open(&Path::new("/dev").join(name)).unwrap_or_else(|error| {
        println!("onde: scratch device {name}: {error}; there is no disk for VMs");
        0
    })
}

fn mount_all() -> Result<(), Trouble> {
    leave_rootfs().map_err(Trouble::at("a root of our own", ""))?;
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let mounts = [
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("proc", "/proc", safe),
        ("sysfs", "/sys", safe),
        ("cgroup2", "/sys/fs/cgroup", safe),
        ("tmpfs", "/run", safe),
        ("tmpfs", "/tmp", safe),
    ];
    for (kind, place, flags) in mounts {
        fs::create_dir_all(place).map_err(Trouble::at(place, ""))?;
        mount(kind, place, kind, flags, None).map_err(Trouble::at(place, ""))?;
    }
    use_console().map_err(Trouble::at("/dev/console", ""))?;
    // No interface shall get an address by itself, not even those that come later.
    crate::vm::no_ipv6(c"all").map_err(Trouble::at("IPv6", ""))?;
    crate::vm::no_ipv6(c"default").map_err(Trouble::at("IPv6", ""))
}

/// The kernel's first file system cannot be the old root of a pivot_root(2), which jails need: binds it over itself.
fn leave_rootfs() -> io::Result<()> {
    fs::create_dir_all("/run")?;
    mount_bind(c"/", c"/run")?;
    rustix::process::chdir(c"/run")?;
    mount_move(c".", c"/")?;
    rustix::process::chroot(c".")?;
    Ok(rustix::process::chdir(c"/")?)
}

/// Standard streams: an image without `/dev/console` starts without any.
fn use_console() -> io::Result<()> {
    let console = File::options().read(true).write(true).open("/dev/console")?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    Ok(rustix::stdio::dup2_stderr(&console)?)
}

/// Loads what `/etc/onde/modules` lists, in its order; a module that this machine has no use for is no reason to stop.
fn load_modules() -> Result<(), Trouble> {
    let list = match fs::read_to_string("/etc/onde/modules") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        list => list.map_err(Trouble::at("/etc/onde/modules", ""))?,
    };
    for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
        if name.starts_with("kvm") && Path::new("/dev/kvm").exists() {
            continue;
        }
        let loaded = File::open(Path::new("/lib/modules").join(name))
            .and_then(|file| Ok(finit_module(&file, c"", 0)?));
        match loaded {
            // Of the modules for two makers' processors one has nothing to do.
            Err(error) if !name.starts_with("kvm") => println!("onde: module {name}: {error}"),
            _ => {}
        }
    }
    Ok(())
}

/// The first network card with a carrier, or the first if none gets one in time.
fn find_card(links: &Links) -> Result<CString, Trouble> {
    let trouble = |error| Trouble::new(format!("network cards: {error}"), "");
    let news = LinkNews::open().map_err(trouble)?;
    let until = Instant::now() + CARD_TIME;
    loop {
        let cards = cards().map_err(trouble)?;
        for card in &cards {
            links.set_up(card, true).map_err(trouble)?;
        }
        let left = until.saturating_duration_since(Instant::now());
        if let Some(card) = cards.iter().find(|card| has_carrier(card)) {
            return Ok(card.clone());
        }
        if left.is_zero() {
            let hint = "add the card's module to the image (/etc/onde/modules)";
            let none = || Trouble::new("no network card", hint);
            return cards.into_iter().next().ok_or_else(none);
        }
        news.wait(left.as_millis() as i64).map_err(trouble)?;
    }
}

/// Ethernet interfaces that are hardware, by name.
fn cards() -> io::Result<Vec<CString>> {
    let mut cards = Vec::new();
    for entry in fs::read_dir("/sys/class/net")? {
        let path = entry?.path();
        // ARPHRD_ETHER, and a device behind it.
        let is_ethernet = fs::read_to_string(path.join("type"))?.trim() == "1";
        if is_ethernet && path.join("device").exists() {
            cards.extend(
                path.file_name().and_then(|name| CString::new(name.as_encoded_bytes()).ok()),
            );
        }
    }
    cards.sort();
    Ok(cards)
}

fn has_carrier(card: &CStr) -> bool {
    let file =
        PathBuf::from("/sys/class/net").join(card.to_string_lossy().as_ref()).join("carrier");
    fs::read_to_string(file).is_ok_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_command_line_numbers_the_node() {
        assert_eq!(number("console=ttyS0 quiet onde.node=12\n"), Some(12));
        assert_eq!(number("console=ttyS0 onde.nodes=3"), None);
        assert_eq!(number("onde.node=x onde.node=4"), Some(4));
    }
}
