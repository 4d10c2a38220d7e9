//! What each step down has to pay before: how much of a balance is kept back for the disk, how long the rest lasts, what
//! it takes to wake up. Arithmetic on a [`Job`]; it changes nothing.
//!
//! ```text
//!  balance  |------------- left -------------|-- reserve: time on disk, and one tick --|
//!                        ^ Low: seconds left  ^ saved                                   ^ purged
//! ```

use onde_wire::machine::Stage;

use super::{Job, TICK_MIN_MS};
use crate::meter::{Held, burn_held, burn_max};

/// With so little left a VM is Low: time for whoever pays to ask the broker and to hand tokens in, twice.
const LOW_S: u64 = 15;
/// A VM wakes up with no less than this to run on, seconds: half of what a home node releases at once. Shorter, and it would
/// be on disk again before it did anything.
const WAKE_S: u64 = 10;
/// At most one in so many micro-tokens paid is kept back for the disk: who pays little is kept for a shorter time.
const RESERVE_SHARE: u64 = 8;

impl Job {
    /// Micro-tokens a second on disk, at most.
    fn storage_rate(&self) -> u64 {
        burn_held(&self.terms.prices, Held { mem_mib: 0, disk_mib: self.disk_mib() })
    }

    /// Micro-tokens for the time on disk.
    fn keep_micro(&self) -> u64 {
        let wanted = self.storage_rate().saturating_mul(self.terms.keep_s.into());
        wanted.min(self.paid_micro() / RESERVE_SHARE)
    }

    /// Whether something is kept back for the disk. Not while it boots: it has nothing yet to be saved.
    fn keeps_back(&self) -> bool {
        self.can_save && self.stage != Stage::Booting
    }

    /// Micro-tokens that a VM which runs must not use: the time on disk that it was promised, and what it uses
    /// between two looks.
    fn reserve_micro(&self) -> u64 {
        if !self.keeps_back() {
            return 0;
        }
        self.keep_micro().saturating_add(self.tick_micro())
    }

    /// Micro-tokens that a VM which runs may use between two looks at the end of its balance.
    fn tick_micro(&self) -> u64 {
        if self.is_saving() {
            return 0;
        }
        let burn = burn_max(&self.terms.prices, &self.shape());
        burn.saturating_mul(TICK_MIN_MS).div_ceil(1000)
    }

    /// Micro-tokens that it may use as a VM that runs.
    pub(super) fn left_micro(&self) -> u64 {
        self.balance_micro().saturating_sub(self.reserve_micro())
    }

    /// Whether the balance is nearly gone.
    pub(super) fn is_low(&self) -> bool {
        self.left_micro() < self.burn.micro_per_s.saturating_mul(LOW_S)
    }

    /// Time until the next charge: no longer than the balance lasts if the VM uses all it can.
    pub(super) fn tick_ms(&self) -> u64 {
        if self.is_saved() || self.is_saving() {
            return super::TICK_MAX_MS;
        }
        let burn = u128::from(burn_max(&self.terms.prices, &self.shape())).max(1);
        let lasts_ms = u128::from(self.left_micro()) * 1000 / burn;
        (lasts_ms.min(super::TICK_MAX_MS.into()) as u64).max(TICK_MIN_MS)
    }

    /// Micro-tokens a second at the present rate.
    pub(super) fn rate(&self) -> u64 {
        match self.stage {
            Stage::Suspended | Stage::Template => burn_held(&self.terms.prices, self.held()),
            _ => self.burn.micro_per_s,
        }
    }

    /// Seconds until the next step down, and until all is gone, at the present rate. The second is a promise as far as it
    /// is about the disk: it was paid for and nothing else may use it up.
    pub(super) fn times(&self) -> (u64, u64) {
        if self.is_over() {
            return (0, 0);
        }
        let lasts = |micro: u64, rate: u64| micro.checked_div(rate).unwrap_or(u64::MAX);
        if self.is_saved() {
            let left = lasts(self.balance_micro(), self.rate());
            return (left, left);
        }
        let left = lasts(self.left_micro(), self.rate());
        if !self.keeps_back() {
            return (left, left);
        }
        // It may have used up a part of what is for the disk before it ran.
        let kept = self.keep_micro().min(self.balance_micro().saturating_sub(self.tick_micro()));
        let on_disk = lasts(kept, self.storage_rate());
        (left, left.saturating_add(on_disk))
    }

    /// Micro-tokens of balance that waking up takes.
    fn wake_from_micro(&self) -> u64 {
        let rate = self
            .burn
            .micro_per_s
            .max(burn_held(&self.terms.prices, crate::meter::held_running(&self.token)));
        self.reserve_micro().saturating_add(rate.saturating_mul(WAKE_S))
    }

    /// Whether the balance covers that.
    pub fn can_wake(&self) -> bool {
        self.balance_micro() >= self.wake_from_micro()
    }

    /// Whether it is on disk, has no VM and would wake up by itself.
    pub fn wants_to_wake(&self) -> bool {
        self.is_saved() && self.slot.is_none() && self.wakes_by_itself && self.can_wake()
    }

    /// Micro-tokens to pay before it wakes up by itself; 0 where it will not.
    pub(super) fn wake_micro(&self) -> u64 {
        if !self.is_saved() || !self.wakes_by_itself {
            return 0;
        }
        self.wake_from_micro().saturating_sub(self.balance_micro())
    }
}
