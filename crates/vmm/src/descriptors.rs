//! The descriptors that `noded` hands down, and the two tap calls that no safe crate wraps.
//! Nothing here opens anything: what is not handed down does not exist for this process.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use onde_wire::machine::fds;
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};

use crate::fault::{Context, Fault, Part};

/// Bytes of `struct virtio_net_hdr_v1`, which a modern virtio-net device has before each frame.
pub const VNET_HEADER_SIZE: usize = 12;

/// `TUNSETVNETHDRSZ` of linux/if_tun.h.
const TUNSETVNETHDRSZ: u64 = 0x4004_54D8;
/// `TUNSETOFFLOAD` of linux/if_tun.h; also in the system call filter.
pub const TUNSETOFFLOAD: u64 = 0x4004_54D0;

/// All that a `vmm` process ever holds of the outside world.
pub struct Descriptors {
    /// SEQPACKET socket to `noded`.
    pub control: UnixDatagram,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The VM's tap.
    pub tap: Tap,
    /// The mstrap ELF image.
    pub mstrap: File,
    /// The console ring.
    pub console: File,
    /// The info page.
    pub info: File,
    /// The disk, where there is one.
    pub disk: Option<File>,
    /// The file for the machine when it is saved, where there is one.
    pub saved: Option<File>,
}

impl Descriptors {
    /// Takes over the inherited descriptors. Called once, first thing in `main`.
    pub fn take(has_disk: bool, has_saved: bool) -> Result<Self, Fault> {
        Ok(Self {
            control: UnixDatagram::from(take(fds::CONTROL, "control socket")?),
            kvm: take(fds::KVM, "/dev/kvm")?,
            tap: Tap::new(take(fds::TAP, "tap")?.into())?,
            mstrap: take(fds::MSTRAP, "mstrap image")?.into(),
            console: take(fds::CONSOLE, "console ring")?.into(),
            info: take(fds::INFO, "info page")?.into(),
            disk: take_file(has_disk, fds::DISK, "disk")?,
            saved: take_file(has_saved, fds::SAVED, "file for the machine")?,
        })
    }
}

/// One that not every machine has.
fn take_file(is_there: bool, number: i32, name: &str) -> Result<Option<File>, Fault> {
    is_there.then(|| take(number, name).map(File::from)).transpose()
}

fn take(number: i32, name: &str) -> Result<OwnedFd, Fault> {
    // SAFETY: borrowed for one call only, which answers EBADF where nothing is open.
    let claim = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(claim, rustix::io::FdFlags::CLOEXEC)
        .fault(Part::Descriptors, &format!("descriptor {number} ({name})"))?;
    // SAFETY: it is open, was inherited through exec, and `Descriptors::take` takes each number
    // once, before this process opens any descriptor of its own.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A tap with `IFF_VNET_HDR`, not blocking.
pub struct Tap {
    file: File,
}

impl Tap {
    fn new(file: File) -> Result<Self, Fault> {
        let size = VNET_HEADER_SIZE as i32;
        // SAFETY: the kernel reads one int from a live reference; a descriptor that is no tap
        // answers with an error.
        let result = unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ, &size) };
        os_result(result).fault(Part::Descriptors, "set the tap's header size")?;
        let flags = rustix::fs::fcntl_getfl(&file).fault(Part::Descriptors, "tap flags")?;
        rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK)
            .fault(Part::Descriptors, "make the tap non-blocking")?;
        Ok(Self { file })
    }

    /// Tells the host which offloads (`TUN_F_*`) the guest can take.
    pub fn set_offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: the argument is a plain number, no memory is involved.
        os_result(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD, flags.into()) })
    }

    /// The descriptor, to read and write frames and to poll.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn os_result(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
