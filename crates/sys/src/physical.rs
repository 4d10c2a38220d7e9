//! Reads device memory of the machine through `/dev/mem` (mem(4)). Used by `agent` inside a guest for the
//! info page. It must be mapped: read(2) refuses addresses above the end of RAM. Never writes.

use std::fs::File;
use std::io;

use rustix::mm::{MapFlags, ProtFlags};

/// A page on x86-64, bytes.
const PAGE: usize = 4096;

/// Copies `out.len()` bytes that begin at physical address `start`, a multiple of the page size; at most
/// one page. Errors: `EPERM` where the kernel counts the page as RAM or as taken by a driver.
pub fn read_page(start: u64, out: &mut [u8]) -> io::Result<()> {
    assert!(start.is_multiple_of(PAGE as u64) && out.len() <= PAGE);
    let memory = File::open("/dev/mem")?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let page = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            PAGE,
            ProtFlags::READ,
            MapFlags::SHARED,
            &memory,
            start,
        )?
    };
    for (index, to) in out.iter_mut().enumerate() {
        // SAFETY: index is inside the page just mapped; volatile, since whoever owns the page may write to it.
        *to = unsafe { page.cast::<u8>().add(index).read_volatile() };
    }
    // SAFETY: the mapping is the one made above, and no reference to it is left.
    unsafe { rustix::mm::munmap(page, PAGE)? };
    Ok(())
}
