//! Switching swap on. Used by `noded` as first process, on a device that it has just prepared.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Uses `device` as swap. Errors: `EINVAL` without a swap header on it, `EPERM` without CAP_SYS_ADMIN.
pub fn on(device: &Path) -> io::Result<()> {
    let path = CString::new(device.as_os_str().as_bytes())?;
    // SAFETY: a string that ends with zero and lives over the call, and flags that are a plain number.
    match unsafe { libc::syscall(libc::SYS_swapon, path.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
