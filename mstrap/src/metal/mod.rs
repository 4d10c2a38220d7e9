//! The machine under the two programs: memory that is lent out once, the clock, the console, the control
//! device, the network. All unsafe code of the package is here, and each program's few lines at its entry.

pub mod clock;
pub mod console;
pub mod control;
pub mod cpu;
pub mod net;
pub mod queue;
pub mod ram;

core::arch::global_asm!(include_str!("memory.s"));

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A static of which somebody gets the only reference, once.
pub struct Lent<T> {
    value: UnsafeCell<T>,
    taken: AtomicBool,
}

// SAFETY: `take` gives the value out at most once, so no two users ever share it.
unsafe impl<T> Sync for Lent<T> {}

impl<T> Lent<T> {
    /// A value to lend.
    pub const fn new(value: T) -> Self {
        Self { value: UnsafeCell::new(value), taken: AtomicBool::new(false) }
    }

    /// The value. To ask twice is our bug.
    #[expect(clippy::mut_from_ref, reason = "the flag makes sure of what the signature cannot")]
    pub fn take(&'static self) -> &'static mut T {
        assert!(!self.taken.swap(true, Ordering::Relaxed), "lent already");
        // SAFETY: the flag makes this the only reference there ever is.
        unsafe { &mut *self.value.get() }
    }
}

/// The info page, which the VMM maps before the first instruction.
pub fn info_page() -> &'static [u8; onde_wire::machine::INFO_SIZE] {
    // SAFETY: read-only memory at a fixed address of the machine contract. The meter in it changes
    // underneath, but the programs read only the identity, which was written once before the start.
    unsafe { &*(onde_wire::machine::INFO_START as *const _) }
}
