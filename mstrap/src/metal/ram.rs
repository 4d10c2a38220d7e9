//! The VM's RAM and disk, one to one at their physical addresses, as the loader fills them.

use crate::restore::Memory;
use core::arch::asm;
use onde_wire::stream::CHUNK_MAX;

/// All RAM outside BOOT. `bounce` stands in for memory at address zero, where no Rust reference may point.
pub struct Ram {
    bounce: &'static mut [u8; CHUNK_MAX as usize],
}

impl Ram {
    /// Takes the RAM over.
    ///
    /// # Safety
    /// Nothing else of this program lies in RAM outside BOOT, or refers to it.
    pub unsafe fn new(bounce: &'static mut [u8; CHUNK_MAX as usize]) -> Self {
        Self { bounce }
    }
}

/// Copies to a physical address, zero included.
fn copy(target: u64, source: &[u8]) {
    // SAFETY: `Ram` owns all of RAM; this is `memcpy` where the compiler may not reason about the address.
    unsafe {
        asm!(
            "rep movsb",
            inout("rdi") target => _, inout("rsi") source.as_ptr() => _, inout("rcx") source.len() => _,
            options(nostack, preserves_flags)
        );
    }
}

impl Memory for Ram {
    fn with<R>(&mut self, address: u64, size: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        if address == 0 {
            let result = fill(&mut self.bounce[..size]);
            copy(0, &self.bounce[..size]);
            return result;
        }
        // SAFETY: the stream's judge let only RAM and disk through, which is ours alone, and address zero is excluded.
        fill(unsafe { core::slice::from_raw_parts_mut(address as *mut u8, size) })
    }

    fn zero(&mut self, address: u64, size: u64) {
        // SAFETY: as `copy`; whole words, since memory comes in whole pages.
        unsafe {
            asm!(
                "rep stosq",
                inout("rdi") address => _, inout("rcx") size / 8 => _, in("rax") 0,
                options(nostack, preserves_flags)
            );
        }
    }
}
