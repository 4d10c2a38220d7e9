//! The serial console, for a few lines. Every byte is an exit to the VMM, so keep the lines few and short.

use super::cpu;
use core::fmt;
use onde_wire::machine::SERIAL_PORT;

/// Bytes that the transmitter takes after it said that it is empty.
const FIFO: usize = 16;
/// Line status register, and its bit that says so.
const STATUS: u16 = SERIAL_PORT + 5;
const EMPTY: u8 = 1 << 5;
/// Times to ask before writing anyway: a console that is stuck must not stop a boot.
const ASK_MAX: usize = 1000;

/// Writes to the serial port.
pub struct Console;

/// Writes bytes as they are.
pub fn write(bytes: &[u8]) {
    for part in bytes.chunks(FIFO) {
        (0..ASK_MAX).find(|_| cpu::in8(STATUS) & EMPTY != 0);
        part.iter().for_each(|byte| cpu::out8(SERIAL_PORT, *byte));
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

/// Writes a line to the console.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::metal::console::Console, $($arg)*);
    }};
}
