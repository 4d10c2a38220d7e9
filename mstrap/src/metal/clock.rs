//! Time since the program started, from the time stamp counter at the frequency that the VMM states.

use super::cpu;
use smoltcp::time::Instant;

/// A clock that started at zero when it was made.
#[derive(Clone, Copy)]
pub struct Clock {
    start: u64,
    khz: u64,
}

impl Clock {
    /// Starts the clock; `None` for a frequency of zero, which says that the VMM did not fill it in.
    pub fn start(tsc_khz: u32) -> Option<Self> {
        (tsc_khz > 0).then(|| Self { start: cpu::tsc(), khz: tsc_khz.into() })
    }

    /// Time since the start.
    pub fn now(&self) -> Instant {
        let ticks = cpu::tsc().wrapping_sub(self.start);
        // Whole seconds first: ticks * 1000 alone would overflow after some weeks.
        let per_s = self.khz * 1000;
        let micros = ticks / per_s * 1_000_000 + ticks % per_s * 1000 / self.khz;
        Instant::from_micros(micros as i64)
    }
}
