//! Descriptors that a program is started with at a number both sides know.
//! Called by `packetd` first thing in `main`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers already taken: a bit each, so that no descriptor gets two owners.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// Takes over descriptor `number` (3 to 63). Fails where it is not open or was taken before.
pub fn take(number: i32) -> io::Result<OwnedFd> {
    assert!((3..64).contains(&number), "descriptor {number} is nobody's to hand over");
    // SAFETY: F_SETFD changes a flag of the descriptor table only.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let bit = 1 << number;
    if TAKEN.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: the descriptor is open, and the bit above makes this its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
