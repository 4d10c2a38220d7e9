//! TCP connections of a machine's source, in its copy: they are the source's, so the copy's ends of them are closed
//! before its programs run. A program finds its connection reset. Called while the network device is down, so
//! that nothing of it reaches the peers. Connections within the machine were copied with both their ends and stay.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, SocketAddrAny, SocketType, accept, shutdown, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

/// Connections that wait in one listener: Linux takes no more by itself (net.core.somaxconn).
const WAITING_MAX: usize = 4096;

/// Closes all connections from `own`, the source's address, in all processes. Those of processes that end
/// meanwhile close by themselves.
pub fn reset_all(own: Ipv4Addr) {
    for pid in numbers("/proc") {
        let Some(pid) = Pid::from_raw(pid) else { continue };
        // A kernel's thread has no descriptors.
        let descriptors = numbers(&format!("/proc/{}/fd", pid.as_raw_nonzero()));
        if descriptors.is_empty() {
            continue;
        }
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let is_agent = pid == rustix::process::getpid();
        for number in descriptors {
            if let Ok(fd) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
                reset(&fd, own, is_agent);
            }
        }
    }
}

/// The entries of a folder that are numbers.
fn numbers(folder: &str) -> Vec<i32> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn reset(fd: &OwnedFd, own: Ipv4Addr, is_agent: bool) {
    if sockopt::socket_type(fd) != Ok(SocketType::STREAM) {
        return;
    }
    match sockopt::socket_acceptconn(fd) {
        // The agent takes its own, and finds them dead.
        Ok(true) if !is_agent => drop_waiting(fd, own),
        Ok(false) if is_from(fd, own) && !is_to(fd, own) => close(fd),
        _ => {}
    }
}

fn ip(address: Result<SocketAddrAny, rustix::io::Errno>) -> Option<IpAddr> {
    Some(SocketAddr::try_from(address.ok()?).ok()?.ip().to_canonical())
}

fn is_from(fd: impl AsFd, own: Ipv4Addr) -> bool {
    ip(rustix::net::getsockname(fd)) == Some(IpAddr::V4(own))
}

fn is_to(fd: impl AsFd, own: Ipv4Addr) -> bool {
    let peer = rustix::net::getpeername(fd).ok().flatten();
    peer.is_some_and(|peer| ip(Ok(peer)) == Some(IpAddr::V4(own)))
}

/// Disconnects as connect(2) does with AF_UNSPEC: the next call on it returns ECONNRESET.
fn close(fd: impl AsFd) {
    if rustix::net::connect_unspec(&fd).is_err() {
        // Some kernels refuse while a thread waits on it: it wakes up from this.
        let _ = shutdown(&fd, Shutdown::Both);
        let _ = rustix::net::connect_unspec(&fd);
    }
}

/// Takes out the connections that the program has not accepted.
fn drop_waiting(listener: &OwnedFd, own: Ipv4Addr) {
    for _ in 0..WAITING_MAX {
        let mut ready = [PollFd::new(listener, PollFlags::IN)];
        if poll(&mut ready, Some(&Timespec::default())) != Ok(1) {
            return;
        }
        let Ok(waiting) = accept(listener) else { return };
        if is_from(&waiting, own) {
            close(&waiting);
        }
    }
}
