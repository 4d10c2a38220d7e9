//! Device memory of the machine through `/dev/mem` (mem(4)). Used by `agent` inside a guest: info page, control
//! device, and the windows on its own RAM. It must be mapped: read(2) refuses addresses above the end of RAM.
//! Mapped as the kernel has it, cached where nobody asked for less: reads of a large window would crawl otherwise,
//! and what has no memory behind it is an exit to the VMM either way.

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;

use rustix::mm::{MapFlags, ProtFlags};

/// A page on x86-64, bytes.
const PAGE: usize = 4096;

/// Device memory that is mapped, until it is dropped. Others may write to it at any time, so it gives out copies and
/// no references.
pub struct Window {
    base: *mut c_void,
    size: usize,
    is_writable: bool,
}

// SAFETY: the mapping belongs to the process, not to a thread; all access is volatile and by copy.
unsafe impl Send for Window {}

impl Window {
    /// Maps `size` bytes from physical address `start` for reading, both multiples of the page size. Errors: `EPERM`
    /// where the kernel counts a page as RAM or as taken by a driver.
    pub fn map(start: u64, size: usize) -> io::Result<Self> {
        Self::open(start, size, false)
    }

    /// Maps registers, which can be written too.
    pub fn map_registers(start: u64, size: usize) -> io::Result<Self> {
        Self::open(start, size, true)
    }

    fn open(start: u64, size: usize, is_writable: bool) -> io::Result<Self> {
        assert!(start.is_multiple_of(PAGE as u64) && size.is_multiple_of(PAGE) && size > 0);
        let memory = OpenOptions::new().read(true).write(is_writable).open("/dev/mem")?;
        let prot = if is_writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let (anywhere, shared) = (std::ptr::null_mut(), MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe { rustix::mm::mmap(anywhere, size, prot, shared, &memory, start)? };
        Ok(Self { base, size, is_writable })
    }

    /// Where `size` bytes at `offset` are mapped; they are inside, and aligned to `align`.
    fn at(&self, offset: usize, size: usize, align: usize) -> *mut u8 {
        let is_inside = offset.checked_add(size).is_some_and(|end| end <= self.size);
        assert!(
            is_inside && offset.is_multiple_of(align),
            "{offset:#x}+{size} of {:#x}",
            self.size
        );
        // SAFETY: inside the mapping, as just asserted.
        unsafe { self.base.cast::<u8>().add(offset) }
    }

    /// Copies `out.len()` bytes from `offset`, a multiple of 8. Bytes that change meanwhile may come old or new.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let start = self.at(offset, out.len(), 8);
        let (words, rest) = out.as_chunks_mut::<8>();
        let read = words.len() * 8;
        for (index, to) in words.iter_mut().enumerate() {
            // SAFETY: inside the mapping and aligned (`at`); volatile, since the owner may write to it.
            *to = unsafe { start.cast::<u64>().add(index).read_volatile() }.to_ne_bytes();
        }
        for (index, to) in rest.iter_mut().enumerate() {
            // SAFETY: as above, byte by byte.
            *to = unsafe { start.add(read + index).read_volatile() };
        }
    }

    /// Reads a register of 32 bits.
    pub fn read_u32(&self, offset: usize) -> u32 {
        // SAFETY: inside the mapping and aligned (`at`).
        unsafe { self.at(offset, 4, 4).cast::<u32>().read_volatile() }
    }

    /// Writes a register of 32 bits.
    pub fn write_u32(&self, offset: usize, value: u32) {
        assert!(self.is_writable, "a window is for reading");
        // SAFETY: inside the mapping and aligned (`at`), and mapped for writing; no reference to it exists.
        unsafe { self.at(offset, 4, 4).cast::<u32>().write_volatile(value) }
    }

    /// Writes a register of 64 bits.
    pub fn write_u64(&self, offset: usize, value: u64) {
        assert!(self.is_writable, "a window is for reading");
        // SAFETY: as in `write_u32`.
        unsafe { self.at(offset, 8, 8).cast::<u64>().write_volatile(value) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference to it was ever given out. An error is of no use to anyone.
        let _ = unsafe { rustix::mm::munmap(self.base, self.size) };
    }
}

/// Copies `out.len()` bytes that begin at physical address `start`, a multiple of the page size; at most
/// one page. Errors: as [`Window::map`].
pub fn read_page(start: u64, out: &mut [u8]) -> io::Result<()> {
    assert!(out.len() <= PAGE);
    Window::map(start, PAGE)?.read(0, out);
    Ok(())
}
