//! Instructions that Rust has no words for: I/O ports, the time stamp counter, halting, and the switch
//! that lets the ciphers use the wide registers.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc};

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC touches nothing.
    unsafe { _rdtsc() }
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the only ports used are the serial port's, which touch no memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Stops for good: interrupts are off, so nothing wakes this CPU.
pub fn halt() -> ! {
    loop {
        // SAFETY: HLT touches nothing.
        unsafe { asm!("hlt", options(nomem, nostack)) }
    }
}

/// Lets programs use AVX and the SHA instructions where the processor has them: the crates ask for them
/// by CPUID and XGETBV, and the VMM starts us with plain SSE.
pub fn enable_wide_registers() {
    const XSAVE: u32 = 1 << 26;
    const AVX: u32 = 1 << 28;
    let features = __cpuid(1).ecx;
    if features & XSAVE == 0 {
        return;
    }
    let xcr0: u32 = if features & AVX != 0 { 0b111 } else { 0b11 };
    // SAFETY: CPUID says that CR4.OSXSAVE (bit 18) and these bits of XCR0 exist; we own this CPU.
    unsafe {
        asm!(
            "mov {cr4}, cr4",
            "bts {cr4}, 18",
            "mov cr4, {cr4}",
            "xsetbv",
            cr4 = out(reg) _, in("ecx") 0, in("eax") xcr0, in("edx") 0,
            options(nomem, nostack)
        );
    }
}
