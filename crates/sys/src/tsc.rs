//! The frequency of the processor's time stamp counter. The lab tells it to emulated nodes, whose counter is the
//! host's and who misjudge it on a busy host. Nothing on a node needs it.

use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

/// Time between two readings: makes an error of a microsecond one in twenty thousand.
const WINDOW: Duration = Duration::from_millis(20);
/// A reading during which more time than this went by was interrupted, and is worth nothing.
const READING_MAX: Duration = Duration::from_micros(2);
/// Readings at most: on a host so busy that a thousand were interrupted, the last one has to do.
const READINGS_MAX: u32 = 1000;

/// Measures the frequency, in kHz.
pub fn khz() -> u64 {
    let (begin, first) = reading();
    std::thread::sleep(WINDOW);
    let (end, last) = reading();
    let micros = end.duration_since(begin).as_micros().max(1) as u64;
    last.wrapping_sub(first) * 1000 / micros
}

/// The time, and the counter at that time.
fn reading() -> (Instant, u64) {
    let mut tries = 0;
    loop {
        tries += 1;
        let before = Instant::now();
        // SAFETY: every x86-64 processor has RDTSC, and Linux lets programs use it (PR_SET_TSC is never set here).
        let count = unsafe { _rdtsc() };
        if before.elapsed() <= READING_MAX || tries == READINGS_MAX {
            return (before, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (one, other) = (khz(), khz());
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(other) < one / 100, "{one} and {other} kHz");
    }
}
