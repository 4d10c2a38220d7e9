//! One VM as the kernel holds it: process, cgroup, tap and its filter, console ring, info page. Made and read
//! by [`crate::world`]. Dropping it frees all of it; nothing here decides whether a VM may live.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use onde_sys::link::Links;
use onde_sys::spawn::{Jail, Program, spawn};
use onde_sys::tap;
use onde_wire::machine::{
    CONSOLE_RING_SIZE, INFO_METER, MESSAGE_SIZE, Meter, PAGE_SIZE, VmmCommand, VmmEvent, fds,
};
use onde_wire::packet::{CONSOLE_SLICE_MAX, ConsoleSlice};
use onde_wire::token::JobId;
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal};

use crate::cgroup::{Cgroup, Cgroups};
use crate::files::{Files, memory};
use crate::filter::{Attached, Filter, Pair};
use crate::hearing;
use crate::meter::Reading;
use crate::node::{Spec, Start};

/// First user id of VMMs; slot n runs as this plus n. Above all ids that a host gives to people and services.
const FIRST_USER: u32 = 100_000;
/// Most descriptors of a VMM: a vCPU has one and there can be 64, a device has a few.
const FILES_MAX: u64 = 256;
/// Most bytes that a VMM can say in the log: it says little, and one that was taken over must not fill it. Then nobody
/// reads its pipe any more, and it waits for ever when that is full.
const LOG_MAX: usize = 16 << 10;

/// Where VMs are made: the same for all of a node.
pub struct Place {
    /// The bridge that taps become ports of.
    pub bridge: CString,
    /// `vmm`.
    pub vmm: File,
    /// The image that new VMs start with.
    pub mstrap: PathBuf,
    /// Mount point of the empty file system that VMMs have as their root.
    pub empty: CString,
    /// The parent of all cgroups.
    pub cgroups: Cgroups,
    /// Network interfaces.
    pub links: Links,
    /// What keeps VMs from sending under others' addresses.
    pub filter: Filter,
    /// `/dev/null`.
    pub null: OwnedFd,
}

/// A VM.
pub struct Vm {
    /// Its process.
    pub pid: Pid,
    /// Its job.
    pub job: JobId,
    /// The end of its control socket that is ours.
    pub control: OwnedFd,
    /// The end of its log that is ours.
    pub log: OwnedFd,
    log_left: usize,
    cgroup: Cgroup,
    network: Network,
    has_disk: bool,
    sent: File,
    console: File,
    info: File,
    /// Sequence count of the meter; even between two writes.
    meter_seq: u32,
}

/// A VM's tap, a port of the bridge, with the filter on it. Closing it takes the kernel some grace periods.
pub struct Network {
    tap: OwnedFd,
    _filter: Attached,
}

impl Drop for Network {
    fn drop(&mut self) {
        // A VMM that was taken over may have asked for a tap that stays.
        let _ = tap::forget(&self.tap);
    }
}

/// What could not be made, and why.
#[derive(Debug)]
pub struct VmError(pub &'static str, pub io::Error);

impl VmError {
    fn at<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self(what, error.into())
    }
}

impl Vm {
    /// Makes VM number `serial` of this node and starts its process with `files`. On failure nothing else is left behind.
    pub fn create(
        place: &Place,
        serial: u32,
        slot: u32,
        spec: &Spec,
        files: &Files,
    ) -> Result<Self, VmError> {
        let name = CString::new(format!("onde-{serial}")).expect("no zero in it");
        let network = Network::new(place, &name, spec).map_err(VmError::at("network"))?;
        let sent = File::open(statistics(&name, "rx_bytes")).map_err(VmError::at("counter"))?;
        let console = files.console.try_clone().map_err(VmError::at("console ring"))?;
        let info = info_page(spec).map_err(VmError::at("info page"))?;
        let group = format!("vm-{serial}");
        let cgroup = place.cgroups.create(&group, spec.held_mib, spec.vcpus);
        let cgroup = cgroup.map_err(VmError::at("cgroup"))?;
        let has_disk = files.disk.is_some();
        let swap = cgroup.swap(has_disk || spec.start == Start::Saved);
        let parts = Parts { tap: &network.tap, files, info: &info, cgroup: &cgroup };
        let started = swap.map_err(VmError::at("cgroup"));
        let started = started.and_then(|()| parts.start(place, slot, spec));
        let Process { pid, control, log } = started.inspect_err(|_| {
            cgroup.remove();
        })?;
        Ok(Self {
            pid,
            job: spec.identity.job,
            control,
            log,
            log_left: LOG_MAX,
            cgroup,
            network,
            has_disk,
            sent,
            console,
            info,
            meter_seq: 0,
        })
    }

    /// Its counters now.
    pub fn read(&self) -> io::Result<Reading> {
        Ok(Reading { cpu_us: self.cgroup.cpu_us()?, sent_bytes: number(&self.sent)? })
    }

    /// Lets its memory go to the scratch device, while its machine is there twice: in RAM and in its file; or no more.
    /// With a disk it always may: the disk's pages count as memory of the VM that wrote them.
    pub fn swap(&self, allowed: bool) -> io::Result<()> {
        self.cgroup.swap(allowed || self.has_disk)
    }

    /// Whether the kernel ended it because it wanted more memory than its cgroup may have.
    pub fn is_out_of_memory(&self) -> bool {
        self.cgroup.is_out_of_memory()
    }

    /// Starts its end; the process is gone when it can be waited for.
    pub fn kill(&self) {
        // Either one does it; both, because a cgroup may not know `cgroup.kill` (before Linux 5.14).
        let _ = self.cgroup.kill();
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
    }

    /// Frees what it held, when the process is gone. Returns what takes time: its network, and its cgroup if the
    /// kernel has not let go of it yet.
    pub fn free(self) -> (Network, Option<Cgroup>) {
        (self.network, (!self.cgroup.remove()).then_some(self.cgroup))
    }

    /// Shows the guest its meter: sequence count odd, contents, sequence count even.
    pub fn publish(&mut self, meter: &Meter) -> io::Result<()> {
        let at = INFO_METER as u64;
        self.meter_seq = self.meter_seq.wrapping_add(2);
        let bytes = meter.emit(self.meter_seq);
        self.info.write_all_at(&(self.meter_seq - 1).to_le_bytes(), at)?;
        self.info.write_all_at(&bytes[4..], at + 4)?;
        self.info.write_all_at(&bytes[..4], at)
    }

    /// The next word of the VMM; `Ok(None)` where none waits, `Err` when it has closed its end or talks
    /// nonsense.
    pub fn hear(&self) -> io::Result<Option<VmmEvent>> {
        let mut message = [0u8; MESSAGE_SIZE + 1];
        match rustix::net::recv(&self.control, &mut message[..], RecvFlags::DONTWAIT) {
            Ok((size, _)) => {
                let event = VmmEvent::parse(&message[..size]);
                event.map(Some).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
            }
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Tells the VMM; one that does not listen misses it.
    pub fn tell(&self, command: VmmCommand) {
        let _ = rustix::net::send(&self.control, &command.emit(), SendFlags::DONTWAIT);
    }

    /// What it wrote to its log since the last time, printable; `Ok(None)` at the log's end, or when it has said all
    /// that it may. Errors: `WouldBlock` where there is nothing to read.
    pub fn log_text(&mut self) -> io::Result<Option<String>> {
        let mut bytes = [0u8; 1024];
        let wanted = bytes.len().min(self.log_left);
        let size = rustix::io::read(&self.log, &mut bytes[..wanted])?;
        self.log_left -= size;
        let text = String::from_utf8_lossy(&bytes[..size]);
        let printable = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
        Ok((size > 0).then(|| text.chars().map(printable).collect()))
    }

    /// A slice of its console from this offset, or the oldest still kept.
    pub fn console(&self, offset: u64) -> io::Result<ConsoleSlice> {
        console_slice(&self.console, offset)
    }

    /// The last of its console.
    pub fn console_end(&self) -> io::Result<ConsoleSlice> {
        let total = console_total(&self.console)?;
        console_slice(&self.console, total.saturating_sub(CONSOLE_SLICE_MAX as u64))
    }
}

/// What a VMM is started with, but for what is made for its process alone.
struct Parts<'a> {
    tap: &'a OwnedFd,
    files: &'a Files,
    info: &'a File,
    cgroup: &'a Cgroup,
}

/// A started VMM, and our ends of what it was given.
struct Process {
    pid: Pid,
    control: OwnedFd,
    log: OwnedFd,
}

impl Parts<'_> {
    /// Starts the VMM in its jail.
    fn start(&self, place: &Place, slot: u32, spec: &Spec) -> Result<Process, VmError> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.map_err(VmError::at("/dev/kvm"))?;
        // Opened each time: VMMs must not share a place in the file.
        let mstrap = File::open(&place.mstrap).map_err(VmError::at("mstrap"))?;
        let (control, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(VmError::at("socket"))?;
        let pipe = rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
        let (log, their_log) = pipe.map_err(VmError::at("log"))?;
        // Only our end: the other is a description of its own.
        rustix::fs::fcntl_setfl(&log, OFlags::NONBLOCK).map_err(VmError::at("log"))?;
        let mut given = vec![
            (place.null.as_fd(), 0),
            (place.null.as_fd(), 1),
            (their_log.as_fd(), 2),
            (theirs.as_fd(), fds::CONTROL),
            (kvm.as_fd(), fds::KVM),
            (self.tap.as_fd(), fds::TAP),
            (mstrap.as_fd(), fds::MSTRAP),
            (self.files.console.as_fd(), fds::CONSOLE),
            (self.info.as_fd(), fds::INFO),
        ];
        given.extend(self.files.disk.as_ref().map(|file| (file.as_fd(), fds::DISK)));
        given.extend(self.files.saved.as_ref().map(|file| (file.as_fd(), fds::SAVED)));
        let pid = spawn(&Program {
            file: place.vmm.as_fd(),
            args: &arguments(spec),
            fds: &given,
            jail: Some(Jail {
                user: FIRST_USER + slot,
                cgroup: self.cgroup.as_fd(),
                root: &place.empty,
                files_max: FILES_MAX,
            }),
        });
        Ok(Process { pid: pid.map_err(VmError::at("process"))?, control, log })
    }
}

fn arguments(spec: &Spec) -> Vec<CString> {
    let [mem, vcpus, disk] =
        [spec.mem_mib, spec.vcpus.into(), spec.disk_mib].map(|number: u32| number.to_string());
    let is_clone = matches!(spec.start, Start::Template(_));
    let options = [
        ("--saved", spec.saved_mib > 0 || is_clone),
        ("--wakes", spec.start == Start::Saved),
        ("--clone", is_clone),
    ];
    let options = options.into_iter().filter_map(|(name, is_on)| is_on.then_some(name));
    ["vmm", "--memory-mib", &mem, "--vcpus", &vcpus, "--disk-mib", &disk]
        .into_iter()
        .chain(options)
        .map(|arg| CString::new(arg).expect("no zero in it"))
        .collect()
}

impl Network {
    /// Makes a tap, puts the filters on it, makes it a port of the bridge and switches it on, in this order.
    fn new(place: &Place, name: &CStr, spec: &Spec) -> io::Result<Self> {
        let tap = tap::open(name)?;
        let identity = &spec.identity;
        let boot = Pair { mac: identity.boot_mac, ipv4: identity.boot_ipv4 };
        let guest = Pair { mac: identity.mac, ipv4: identity.ipv4 };
        let filter =
            place.filter.attach(place.links.index(name)?, [boot, guest], spec.net_kib_s)?;
        tap::attach(&tap, &hearing::program([boot.ipv4, guest.ipv4]))?;
        no_ipv6(name)?;
        place.links.add_port(&place.bridge, name)?;
        place.links.set_up(name, true)?;
        Ok(Self { tap, _filter: filter })
    }
}

/// Keeps the kernel from giving an interface an address of its own.
pub fn no_ipv6(name: &CStr) -> io::Result<()> {
    let switch = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", name.to_string_lossy());
    match fs::write(switch, "1") {
        // A kernel without IPv6 has no such file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn statistics(name: &CStr, counter: &str) -> PathBuf {
    let folder = Path::new("/sys/class/net").join(name.to_string_lossy().as_ref());
    folder.join("statistics").join(counter)
}

fn number(file: &File) -> io::Result<u64> {
    let mut text = [0u8; 24];
    let size = file.read_at(&mut text, 0)?;
    let number = std::str::from_utf8(&text[..size]).ok().and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn info_page(spec: &Spec) -> io::Result<File> {
    let mut identity = spec.identity;
    crate::random(&mut identity.seed)?;
    let file = memory(c"info", PAGE_SIZE)?;
    file.write_all_at(&identity.emit(), 0)?;
    Ok(file)
}

fn console_total(ring: &File) -> io::Result<u64> {
    let mut head = [0u8; 8];
    ring.read_exact_at(&mut head, 0)?;
    Ok(u64::from_le_bytes(head))
}

/// Reads the ring. The count in its header is the VMM's word: all that follows from it stays inside the file.
fn console_slice(ring: &File, offset: u64) -> io::Result<ConsoleSlice> {
    let total = console_total(ring)?;
    let offset = offset.clamp(total.saturating_sub(CONSOLE_RING_SIZE), total);
    let len = (total - offset).min(CONSOLE_SLICE_MAX as u64) as usize;
    let mut data = [0; CONSOLE_SLICE_MAX];
    let start = offset % CONSOLE_RING_SIZE;
    let before_end = len.min((CONSOLE_RING_SIZE - start) as usize);
    ring.read_exact_at(&mut data[..before_end], PAGE_SIZE + start)?;
    ring.read_exact_at(&mut data[before_end..len], PAGE_SIZE)?;
    Ok(ConsoleSlice { offset, total, len: len as u16, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring whose byte i is i modulo 251, after `total` bytes.
    fn ring(total: u64) -> File {
        let file = memory(c"console", PAGE_SIZE + CONSOLE_RING_SIZE).unwrap();
        let first = total.saturating_sub(CONSOLE_RING_SIZE);
        for i in first..total {
            file.write_all_at(&[(i % 251) as u8], PAGE_SIZE + i % CONSOLE_RING_SIZE).unwrap();
        }
        file.write_all_at(&total.to_le_bytes(), 0).unwrap();
        file
    }

    fn check(total: u64, asked: u64, expect_offset: u64, expect_len: u16) {
        let slice = console_slice(&ring(total), asked).unwrap();
        let seen = (slice.offset, slice.total, slice.len);
        assert_eq!(seen, (expect_offset, total, expect_len), "{asked} of {total}");
        for (i, byte) in slice.data[..slice.len.into()].iter().enumerate() {
            assert_eq!(u64::from(*byte), (slice.offset + i as u64) % 251);
        }
    }

    #[test]
    fn a_console_is_read_in_slices() {
        const MAX: u16 = CONSOLE_SLICE_MAX as u16;
        check(0, 0, 0, 0);
        check(10, 0, 0, 10);
        check(10, 4, 4, 6);
        // Behind the end, and before the oldest byte kept.
        check(10, 11, 10, 0);
        check(10, u64::MAX, 10, 0);
        check(CONSOLE_RING_SIZE + 5000, 0, 5000, MAX);
        // Round the end of the ring.
        check(CONSOLE_RING_SIZE + 5000, CONSOLE_RING_SIZE - 10, CONSOLE_RING_SIZE - 10, MAX);
    }

    #[test]
    fn a_vmm_that_lies_about_its_console_harms_nobody() {
        let file = memory(c"console", PAGE_SIZE + CONSOLE_RING_SIZE).unwrap();
        for total in [u64::MAX, u64::MAX - 1, 1 << 63, CONSOLE_RING_SIZE] {
            file.write_all_at(&total.to_le_bytes(), 0).unwrap();
            for asked in [0, 1, total, total / 2, u64::MAX] {
                let slice = console_slice(&file, asked).unwrap();
                assert!(usize::from(slice.len) <= CONSOLE_SLICE_MAX && slice.offset <= total);
            }
        }
        // Nobody can make it shorter under us.
        assert!(file.set_len(PAGE_SIZE).is_err());
    }
}
