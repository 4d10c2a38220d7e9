//! The kernel's random number generator, as its owner sees it (random(4)). Used by `agent` in a copy of a machine,
//! which would else draw the same numbers as its source. Needs root.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// include/uapi/linux/random.h: `_IOW('R', 0x03, int[2])`; libc has no name for it.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// Bytes of a seed: what the generator's key takes.
pub const SEED_SIZE: usize = 32;

/// `struct rand_pool_info` with room for one seed.
#[repr(C)]
struct Pool {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    seed: [u8; SEED_SIZE],
}

/// Mixes a secret seed in, and makes all numbers from here on depend on it.
pub fn reseed(seed: &[u8; SEED_SIZE]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom")?;
    let size = SEED_SIZE as libc::c_int;
    let pool = Pool { entropy_bits: 8 * size, size, seed: *seed };
    // SAFETY: RNDADDENTROPY reads a rand_pool_info and `size` bytes behind it, all of them in `pool`.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &pool) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
