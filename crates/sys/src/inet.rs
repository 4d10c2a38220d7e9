//! IPv4 address and default route of an interface by the classic ioctls (netdevice(7), ip(7)). Used by
//! `agent` inside a guest; never by a program of a node, which has no IP address.

use std::ffi::CStr;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::link::request;

/// The IPv4 settings of this network namespace.
pub struct Inet {
    socket: OwnedFd,
}

impl Inet {
    /// Opens the socket that carries the ioctls.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        Ok(Self { socket })
    }

    /// Gives an interface its address and the length of its network's prefix, 0 to 32.
    pub fn set_address(&self, name: &CStr, address: Ipv4Addr, prefix_len: u8) -> io::Result<()> {
        let ones = u32::MAX.checked_shl(32 - u32::from(prefix_len.min(32))).unwrap_or(0);
        self.set(libc::SIOCSIFADDR, name, address)?;
        self.set(libc::SIOCSIFNETMASK, name, Ipv4Addr::from_bits(ones))
    }

    fn set(&self, op: libc::Ioctl, name: &CStr, address: Ipv4Addr) -> io::Result<()> {
        let mut ifreq = request(name)?;
        ifreq.ifr_ifru.ifru_addr = sockaddr(address);
        // SAFETY: both requests read one ifreq, which lives over the call.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), op, &mut ifreq) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Sends all that is not for an interface's own network to `gateway`, which must be in one.
    pub fn set_gateway(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: all zeros is a valid rtentry; its device pointer stays null.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = sockaddr(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = sockaddr(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = sockaddr(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: SIOCADDRT reads one rtentry, which lives over the call and has no pointers set.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT, &mut route) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// Bytes sent on a TCP connection that its peer has not acknowledged (tcp(7), SIOCOUTQ).
pub fn unacknowledged(socket: impl AsFd) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, writes one int, which lives over the call.
    match unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut count) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(usize::try_from(count).unwrap_or(0)),
    }
}

/// A sockaddr_in in the form of the general sockaddr: two bytes of port, then the address.
fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all zeros is a valid sockaddr.
    let mut general: libc::sockaddr = unsafe { std::mem::zeroed() };
    general.sa_family = libc::AF_INET as libc::sa_family_t;
    for (to, from) in general.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    general
}
