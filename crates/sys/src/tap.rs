//! Taps: the network card of a VM, as a descriptor (tun(4), Documentation/networking/tuntap.rst).
//! `noded` makes them and hands them to `vmm`. Never reads or writes a frame.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::link::request;
use crate::packet::{self, Instruction};

/// `TUNATTACHFILTER` of linux/if_tun.h, which libc does not have.
const TUNATTACHFILTER: libc::Ioctl = 0x4010_54D5;

/// A new tap that goes away with its last descriptor: whole frames with a virtio-net header before them.
/// Errors: those of opening `/dev/net/tun`; `EBUSY` where the name is taken.
pub fn open(name: &CStr) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut ifreq = request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    ifreq.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives over the call.
    match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut ifreq) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(tun.into()),
    }
}

/// Lets only those frames through to whoever reads the tap that `filter` lets pass.
pub fn attach(tap: impl AsFd, filter: &[Instruction]) -> io::Result<()> {
    let program = packet::program(filter)?;
    // SAFETY: TUNATTACHFILTER reads one sock_fprog and the instructions that it names, which live over the call.
    match unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), TUNATTACHFILTER, &program) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Makes sure that the tap goes away with its last descriptor, whatever a program that had one asked for.
pub fn forget(tap: impl AsFd) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes a number, not a pointer.
    match unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETPERSIST, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
