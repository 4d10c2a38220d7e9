//! The peer's host in the migration benchmark: a node with an address and a bridge, on which QEMU runs the guest and
//! moves it to the other node by its own pre-copy migration. The benchmark says what to do, a line at a time over
//! TCP, and hears `ok` and numbers, or why not. Called by `main`; never part of what is shipped.
//!
//! ```text
//!   start MIB      runs the guest, which keeps writing to so much    wait      takes a guest in
//!   move ADDRESS   sends it away    end       ends QEMU              node      becomes `noded`
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use onde_sys::inet::Inet;
use onde_sys::link::Links;
use serde_json::{Value, json};

/// Whether this node is such a host.
pub const MARK: &str = "/bench/mover";
/// Where the benchmark calls, and where the other QEMU does.
const PORT: u16 = 7000;
const INCOMING: u16 = 7001;
/// QEMU's control socket.
const QMP: &str = "/run/qmp";
/// The guest's network card; the same on both hosts, since the guest takes it along.
const GUEST_MAC: &str = "52:54:00:00:be:0c";
/// QEMU makes its socket within moments; a migration of an emulated guest takes seconds.
const QEMU_START_MAX: Duration = Duration::from_secs(20);
const MOVE_MAX: Duration = Duration::from_secs(120);
const LOOK_PERIOD: Duration = Duration::from_millis(20);

/// Serves the benchmark until it wants a `noded` here.
pub fn serve() -> Result<()> {
    let own = address()?;
    let links = Links::open()?;
    links.add_bridge(c"br0")?;
    let mac = links.mac(c"eth0")?;
    links.add_port(c"br0", c"eth0")?;
    links.set_mac(c"br0", mac)?;
    for name in [c"lo", c"eth0", c"br0"] {
        links.set_up(name, true)?;
    }
    Inet::open()?.set_address(c"br0", own, 15)?;
    let listener = TcpListener::bind((own, PORT))?;
    // What the lab waits for.
    println!("onde: node ready");
    let mut qemu = None;
    loop {
        let (stream, _) = listener.accept()?;
        let (mut out, lines) = (stream.try_clone()?, BufReader::new(stream).lines());
        for line in lines {
            let line = line?;
            if line == "node" {
                writeln!(out, "ok")?;
                links.set_up(c"br0", false)?;
                links.remove_port(c"br0", c"eth0")?;
                return Ok(links.remove_bridge(c"br0")?);
            }
            match act(&line, &mut qemu) {
                Ok(told) => writeln!(out, "ok {told}")?,
                Err(error) => writeln!(out, "failed: {error:#}")?,
            }
        }
    }
}

/// The address of this node in the lab's plan.
fn address() -> Result<Ipv4Addr> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let number = line.split_whitespace().find_map(|word| word.strip_prefix("onde.node="));
    Ok(Ipv4Addr::new(198, 18, number.context("no onde.node")?.parse()?, 1))
}

fn act(line: &str, qemu: &mut Option<Qemu>) -> Result<String> {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("start", dirty_mib) => *qemu = Some(Qemu::start(dirty_mib, &[])?),
        ("wait", "") => {
            let incoming = format!("tcp:0.0.0.0:{INCOMING}");
            *qemu = Some(Qemu::start("0", &["-incoming", &incoming])?);
        }
        ("move", target) => {
            return qemu.as_mut().context("no guest here")?.migrate(target.parse()?);
        }
        ("end", "") => drop(qemu.take()),
        _ => bail!("no such command"),
    }
    Ok(String::new())
}

/// A QEMU that runs or awaits the guest.
struct Qemu {
    child: Child,
    requests: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    fn start(dirty_mib: &str, more: &[&str]) -> Result<Self> {
        let _ = fs::remove_file(QMP);
        let read = |name: &str| fs::read_to_string(format!("/bench/{name}"));
        let mut child = Command::new("/usr/bin/qemu-system-x86_64")
            .args(["-M", "microvm,accel=kvm,acpi=on,pit=off,pic=off,rtc=off", "-cpu", "host"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-m", read("mem_mib")?.trim(), "-smp", "1"])
            .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
            .args(["-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no"])
            .args(["-device", &format!("virtio-net-device,netdev=net,mac={GUEST_MAC}")])
            .args(["-qmp", &format!("unix:{QMP},server=on,wait=off")])
            .args(["-L", "/usr/share/qemu", "-L", "/usr/share/seabios"])
            .args(["-kernel", "/bench/vmlinux", "-initrd", "/bench/guest.cpio"])
            .args(["-append", &format!("{} bench.dirty_mib={dirty_mib}", read("cmdline")?.trim())])
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .context("start QEMU")?;
        let begun = Instant::now();
        let requests = loop {
            match UnixStream::connect(QMP) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > QEMU_START_MAX || child.try_wait()?.is_some() => {
                    return Err(error).context("QEMU does not start");
                }
                Err(_) => std::thread::sleep(LOOK_PERIOD),
            }
        };
        let answers = BufReader::new(requests.try_clone()?);
        let mut qemu = Self { child, requests, answers };
        // Once it answers, all that it was told to make is made.
        qemu.ask(json!({ "execute": "qmp_capabilities" }))?;
        let links = Links::open()?;
        links.add_port(c"br0", c"tap0")?;
        links.set_up(c"tap0", true)?;
        Ok(qemu)
    }

    /// Asks over QMP; events in between are nobody's business.
    fn ask(&mut self, request: Value) -> Result<Value> {
        writeln!(self.requests, "{request}")?;
        let mut line = String::new();
        loop {
            line.clear();
            ensure!(self.answers.read_line(&mut line)? > 0, "QEMU ended");
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Moves the guest away; QEMU's own numbers. What is left here is a QEMU whose guest has gone.
    fn migrate(&mut self, target: Ipv4Addr) -> Result<String> {
        let uri = format!("tcp:{target}:{INCOMING}");
        // Its default of 1 Gbit/s is a limit that an emulated network does not reach, so nothing else is set.
        self.ask(json!({ "execute": "migrate", "arguments": { "uri": uri } }))?;
        let begun = Instant::now();
        while begun.elapsed() < MOVE_MAX {
            let told = self.ask(json!({ "execute": "query-migrate" }))?;
            match told["status"].as_str().unwrap_or_default() {
                "completed" => {
                    let number = |value: &Value| value.as_u64().unwrap_or_default();
                    let (total, down) = (number(&told["total-time"]), number(&told["downtime"]));
                    let sent = number(&told["ram"]["transferred"]);
                    return Ok(format!("total_ms={total} downtime_ms={down} sent={sent}"));
                }
                "failed" | "cancelled" => bail!("QEMU's migration failed: {told}"),
                _ => std::thread::sleep(LOOK_PERIOD),
            }
        }
        bail!("QEMU's migration did not end in {} s", MOVE_MAX.as_secs())
    }
}
