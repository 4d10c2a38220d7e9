//! Network interfaces by the classic ioctls (netdevice(7)) on an AF_UNIX socket: no IP socket is ever made,
//! and twelve requests need no netlink library. Used by `noded`, `lab` and `agent`. Never sets an IP address.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

// include/uapi/linux/sockios.h; libc has no names for these.
const SIOCBRADDBR: libc::Ioctl = 0x89a0;
const SIOCBRDELBR: libc::Ioctl = 0x89a1;
const SIOCBRADDIF: libc::Ioctl = 0x89a2;
const SIOCBRDELIF: libc::Ioctl = 0x89a3;

/// An ifreq for the interface of this name. Errors: `ENAMETOOLONG` for more than 15 bytes.
pub(crate) fn request(name: &CStr) -> io::Result<libc::ifreq> {
    let bytes = name.to_bytes_with_nul();
    // SAFETY: all zeros is a valid ifreq.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if bytes.len() > ifreq.ifr_name.len() {
        return Err(rustix::io::Errno::NAMETOOLONG.into());
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(ifreq)
}

/// The interfaces of this network namespace.
pub struct Links {
    socket: OwnedFd,
}

impl Links {
    /// Opens the socket that carries the ioctls.
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Self { socket })
    }

    fn ioctl(&self, op: libc::Ioctl, ifreq: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every request below reads and writes at most one ifreq, which lives over the call.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), op, ifreq) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// The kernel's number for an interface.
    pub fn index(&self, name: &CStr) -> io::Result<u32> {
        let mut ifreq = request(name)?;
        self.ioctl(libc::SIOCGIFINDEX, &mut ifreq)?;
        // SAFETY: SIOCGIFINDEX filled this member.
        Ok(unsafe { ifreq.ifr_ifru.ifru_ifindex } as u32)
    }

    /// Switches an interface on or off.
    pub fn set_up(&self, name: &CStr, up: bool) -> io::Result<()> {
        let mut ifreq = request(name)?;
        self.ioctl(libc::SIOCGIFFLAGS, &mut ifreq)?;
        // SAFETY: SIOCGIFFLAGS filled this member.
        let flags = unsafe { ifreq.ifr_ifru.ifru_flags } & !(libc::IFF_UP as libc::c_short);
        ifreq.ifr_ifru.ifru_flags = flags | if up { libc::IFF_UP as libc::c_short } else { 0 };
        self.ioctl(libc::SIOCSIFFLAGS, &mut ifreq)
    }

    /// The Ethernet address of an interface.
    pub fn mac(&self, name: &CStr) -> io::Result<[u8; 6]> {
        let mut ifreq = request(name)?;
        self.ioctl(libc::SIOCGIFHWADDR, &mut ifreq)?;
        // SAFETY: SIOCGIFHWADDR filled this member.
        let address = unsafe { ifreq.ifr_ifru.ifru_hwaddr };
        Ok(std::array::from_fn(|i| address.sa_data[i] as u8))
    }

    /// Gives an interface an Ethernet address.
    pub fn set_mac(&self, name: &CStr, mac: [u8; 6]) -> io::Result<()> {
        let mut ifreq = request(name)?;
        // SAFETY: all zeros is a valid sockaddr.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        ifreq.ifr_ifru.ifru_hwaddr = address;
        self.ioctl(libc::SIOCSIFHWADDR, &mut ifreq)
    }

    /// Makes a bridge, without ports and down.
    pub fn add_bridge(&self, name: &CStr) -> io::Result<()> {
        self.ioctl(SIOCBRADDBR, &mut request(name)?)
    }

    /// Removes a bridge, which must be down.
    pub fn remove_bridge(&self, name: &CStr) -> io::Result<()> {
        self.ioctl(SIOCBRDELBR, &mut request(name)?)
    }

    /// Makes an interface a port of a bridge. Errors: `EXFULL` where it has 1 023 ports.
    pub fn add_port(&self, bridge: &CStr, port: &CStr) -> io::Result<()> {
        self.port(SIOCBRADDIF, bridge, port)
    }

    /// Takes a port off a bridge.
    pub fn remove_port(&self, bridge: &CStr, port: &CStr) -> io::Result<()> {
        self.port(SIOCBRDELIF, bridge, port)
    }

    fn port(&self, op: libc::Ioctl, bridge: &CStr, port: &CStr) -> io::Result<()> {
        let mut ifreq = request(bridge)?;
        ifreq.ifr_ifru.ifru_ifindex = self.index(port)? as libc::c_int;
        self.ioctl(op, &mut ifreq)
    }
}

/// Whether an interface has an IP address, version 4 or a version 6 that is more than link-local.
pub fn is_addressed(name: &CStr) -> io::Result<bool> {
    let mut list = std::ptr::null_mut();
    // SAFETY: getifaddrs(3) writes a pointer to a list that stays ours until freeifaddrs.
    if unsafe { libc::getifaddrs(&mut list) } == -1 {
        return Err(io::Error::last_os_error());
    }
    let mut found = false;
    let mut entry = list;
    while !entry.is_null() {
        // SAFETY: entries of the list are valid until it is freed; ifa_name is a string, ifa_addr null or a
        // sockaddr of its family's size.
        unsafe {
            found |= CStr::from_ptr((*entry).ifa_name) == name && is_global((*entry).ifa_addr);
            entry = (*entry).ifa_next;
        }
    }
    // SAFETY: the list came from getifaddrs and nothing points into it any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// # Safety
/// `address` is null or points to a sockaddr of the size that its family has.
unsafe fn is_global(address: *const libc::sockaddr) -> bool {
    if address.is_null() {
        return false;
    }
    // SAFETY: not null, and of its family's size by this function's contract.
    unsafe {
        match i32::from((*address).sa_family) {
            libc::AF_INET => true,
            libc::AF_INET6 => {
                let v6 = &*address.cast::<libc::sockaddr_in6>();
                v6.sin6_addr.s6_addr[..2] != [0xFE, 0x80]
            }
            _ => false,
        }
    }
}

/// News of interfaces: becomes readable when one appears, goes or changes its state (rtnetlink(7)).
/// The messages themselves are thrown away: look at `/sys/class/net` again.
pub struct LinkNews {
    socket: OwnedFd,
}

impl LinkNews {
    /// Listens from now on.
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let groups = libc::RTMGRP_LINK as u32;
        rustix::net::bind(&socket, &rustix::net::netlink::SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket })
    }

    /// Waits for news, at most `timeout_ms`; whether there was any.
    pub fn wait(&self, timeout_ms: i64) -> io::Result<bool> {
        let timeout = rustix::event::Timespec {
            tv_sec: timeout_ms / 1000,
            tv_nsec: timeout_ms % 1000 * 1_000_000,
        };
        let mut poll = [rustix::event::PollFd::new(&self.socket, rustix::event::PollFlags::IN)];
        let news = rustix::event::poll(&mut poll, Some(&timeout))? > 0;
        let mut scratch = [0u8; 8192];
        // Ends: the socket does not block, and each turn takes one message off its bounded queue.
        while rustix::net::recv(self.socket.as_fd(), &mut scratch[..], RecvFlags::empty()).is_ok() {
        }
        Ok(news)
    }
}
