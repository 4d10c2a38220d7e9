//! The descriptor that a program is started with at a number both sides know.
//! Called by `packetd` first thing in `main`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Set once the inherited descriptors are dealt with, so that none gets two owners.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes over descriptor `number` (3 or more) and closes all with higher numbers that were inherited by
/// accident. To be called once, before anything is opened; fails later, or where `number` is not open.
pub fn take_only(number: i32) -> io::Result<OwnedFd> {
    assert!(number >= 3, "the standard descriptors are std's");
    // SAFETY: F_SETFD changes a flag of the descriptor table only.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: nothing in this process owns these descriptors yet: it has opened none.
    unsafe { libc::close_range(number as u32 + 1, u32::MAX, 0) };
    // SAFETY: the descriptor is open, and `TAKEN` makes this its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
