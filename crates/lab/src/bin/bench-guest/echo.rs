//! What a guest does while it is moved: answers each UDP probe with the same bytes, and keeps writing to every page of a
//! known set. It writes while it is probed only: a guest that waits for its turn leaves the node to another. Called by
//! `main`.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use onde_sys::inet::Inet;
use onde_sys::link::Links;
use rustix::mount::{MountFlags, mount};

/// Where probes come in.
const PORT: u16 = 7007;
/// Where whoever connects gets as many bytes as go.
const STREAM_PORT: u16 = 7008;
const PAGE: usize = 4096;
/// Without a probe for so long nobody measures: longer than any silence of a move.
const LULL: Duration = Duration::from_secs(2);
/// Most of a probe that is answered.
const PROBE_MAX: usize = 64;

/// As `/init`: brings the network up where the command line says so, and serves.
pub fn boot() -> Result<()> {
    mount("proc", "/proc", "proc", MountFlags::empty(), None)?;
    let line = fs::read_to_string("/proc/cmdline")?;
    let value = |name: &str| {
        line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    let Some(address) = value("bench.ipv4") else { return Ok(()) };
    let address: Ipv4Addr = address.parse()?;
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None)?;
    for name in fs::read_to_string("/modules")?.lines() {
        let file = fs::File::open(Path::new("/").join(name))?;
        rustix::system::finit_module(file, c"", 0).with_context(|| format!("load {name}"))?;
    }
    let links = Links::open()?;
    links.set_up(c"lo", true)?;
    // A guest that was moved tells its neighbours: QEMU asks it to.
    let _ = fs::write("/proc/sys/net/ipv4/conf/eth0/arp_notify", "1");
    Inet::open()?.set_address(c"eth0", address, 15)?;
    links.set_up(c"eth0", true)?;
    serve(value("bench.dirty_mib").unwrap_or("0"))
}

/// Memory in use, KiB, proc(5).
pub fn used() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let value = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    Ok(value("MemTotal:")? - value("MemFree:")?)
}

/// Answers probes for ever; another thread writes to `dirty_mib` MiB.
pub fn serve(dirty_mib: &str) -> Result<()> {
    let size = dirty_mib.parse::<usize>()? << 20;
    let probes = Arc::new(AtomicU64::new(0));
    if size > 0 {
        let probes = probes.clone();
        std::thread::spawn(move || dirty(size, &probes));
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, STREAM_PORT))?;
    std::thread::spawn(move || {
        // One at a time; whoever is gone gets no more.
        for mut stream in listener.incoming().flatten() {
            while stream.write_all(&[0x5A; 64 << 10]).is_ok() {}
        }
    });
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    println!("onde-bench: echo");
    let mut probe = [0; PROBE_MAX];
    loop {
        let (size, from) = socket.recv_from(&mut probe)?;
        probes.fetch_add(1, Ordering::Relaxed);
        // A prober that is gone is no reason to end.
        let _ = socket.send_to(&probe[..size], from);
    }
}

/// Writes to each page of the set, over and over, until no probe came for a while; and again from the next one on.
fn dirty(size: usize, probes: &AtomicU64) {
    let mut set = vec![1u8; size];
    let (mut seen, mut last) = (0, Instant::now());
    loop {
        let now = probes.load(Ordering::Relaxed);
        if now != seen {
            (seen, last) = (now, Instant::now());
        }
        if last.elapsed() < LULL {
            for page in set.chunks_mut(PAGE) {
                page[0] = page[0].wrapping_add(1);
            }
            std::hint::black_box(&set);
        }
        // A pause makes the rate the set's size by the pause, whatever the processor.
        std::thread::sleep(Duration::from_millis(10));
    }
}
