//! A heap that can be closed for good: `packetd` allocates while it starts and never after, and
//! this makes a slip of ours end the process instead of letting packets grow its memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};

/// The system's heap until [`Self::seal`].
pub struct SealableHeap {
    sealed: AtomicBool,
}

impl SealableHeap {
    /// An open heap, for `#[global_allocator]`.
    #[allow(clippy::new_without_default, reason = "a static needs a const constructor")]
    pub const fn new() -> Self {
        Self { sealed: AtomicBool::new(false) }
    }

    /// From now on every allocation fails, which aborts the process.
    pub fn seal(&self) {
        self.sealed.store(true, Ordering::Relaxed);
    }
}

// SAFETY: `alloc` gives what the system's heap gives or null, which the contract allows; `realloc` and
// `alloc_zeroed` are the default ones, made of `alloc` and `dealloc`.
unsafe impl GlobalAlloc for SealableHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if self.sealed.load(Ordering::Relaxed) {
            return null_mut();
        }
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block came from `System.alloc` with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}
