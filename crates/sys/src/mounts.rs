//! A mount namespace of one's own, so that what a program mounts goes away with it. Used by `noded` as a service.

use std::io;

use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

/// Gives the calling thread (of a program that has only this one) its own mounts, which nobody else sees.
/// Errors: `EPERM` without CAP_SYS_ADMIN.
pub fn separate() -> io::Result<()> {
    // SAFETY: NEWNS unshares no memory and no descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change(c"/", private)?)
}
