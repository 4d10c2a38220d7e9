//! A token bucket: how often something may happen. `packetd` has one for each kind of answer
//! that costs an asker nothing, so that a flood of one kind does not silence the others.

/// A rate limit with room for bursts.
pub struct Bucket {
    per_s: u64,
    burst: u64,
    /// Thousandths of what may still happen at `last_ms`.
    level_milli: u64,
    last_ms: u64,
}

impl Bucket {
    /// `per_s` times a second in the long run, and `burst` at once after a quiet time.
    pub const fn new(per_s: u32, burst: u32) -> Self {
        let (per_s, burst) = (per_s as u64, burst as u64);
        Self { per_s, burst, level_milli: burst * 1000, last_ms: 0 }
    }

    // tcb:stranger-begin
    /// Whether it may happen once more, at `now_ms` of a clock that never goes back.
    pub fn take(&mut self, now_ms: u64) -> bool {
        let gained = now_ms.saturating_sub(self.last_ms).saturating_mul(self.per_s);
        self.last_ms = now_ms;
        self.level_milli = self.level_milli.saturating_add(gained).min(self.burst * 1000);
        let Some(rest) = self.level_milli.checked_sub(1000) else { return false };
        self.level_milli = rest;
        true
    }
    // tcb:stranger-end
}
