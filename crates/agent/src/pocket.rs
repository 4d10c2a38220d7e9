//! The guest pays by itself: tokens that its customer left with it go to the node through the control device when the
//! meter in the info page runs low, later than a home node that is there would pay. A thread of its own, asleep until there
//! are tokens.

use onde_sys::physical::{Window, read_page};
use onde_wire::chain;
use onde_wire::machine::control::{REG_PAY, REG_TOKEN};
use onde_wire::machine::{
    CONTROL_START, INFO_METER, INFO_SIZE, INFO_START, Meter, PAGE_SIZE, Stage,
};
use onde_wire::session::Purse;
use onde_wire::token::PaymentToken;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Less left is low, seconds: a home node pays when ten are left.
const LOW_S: u64 = 6;
/// Between two looks at the meter, which `noded` writes once a second.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// After a token that the node knew already it refuses others for 50 ms.
const PAY_PAUSE: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Default)]
pub struct Pocket {
    purse: Mutex<Option<Purse>>,
    filled: Condvar,
}

impl Pocket {
    /// Takes tokens in place of those that were there.
    pub fn fill(&self, purse: Purse) {
        *self.lock() = Some(purse);
        self.filled.notify_all();
    }

    /// Throws away what is there: a copy has its source's tokens, which are not its own.
    pub fn empty(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Purse>> {
        self.purse.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pays for ever. `copying` is held by whoever gives the control device other commands, whose results would mix with
    /// those of payments: meanwhile nothing is paid.
    pub fn run(&self, copying: &Mutex<()>) {
        let mut purse = self.lock();
        loop {
            while purse.is_none() {
                purse = self.filled.wait(purse).unwrap_or_else(PoisonError::into_inner);
            }
            let pause = match (meter(), copying.try_lock()) {
                (Some(meter), Ok(_alone)) => pay_due(&mut purse, &meter),
                _ => LOOK_PERIOD,
            };
            let waited = self.filled.wait_timeout(purse, pause);
            purse = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Shows the next tokens if they are due; how long to wait then. What the node refuses it has been paid, or belongs to
/// another chain, as in a copy of a guest: in both cases the next ones tell.
fn pay_due(purse: &mut Option<Purse>, meter: &Meter) -> Duration {
    let Some(held) = purse else { return LOOK_PERIOD };
    let Some(token) = next(held, meter) else { return LOOK_PERIOD };
    if let Err(error) = show(&token) {
        eprintln!("onde-agent: cannot pay: {error}");
    }
    held.shown = token.index;
    if held.shown >= held.last {
        *purse = None;
    }
    PAY_PAUSE
}

/// The token to show now, where one is due.
fn next(purse: &Purse, meter: &Meter) -> Option<PaymentToken> {
    let is_low =
        meter.stage == Stage::Low || meter.stage == Stage::Running && meter.seconds_left < LOW_S;
    if !is_low || purse.shown >= purse.last {
        return None;
    }
    let index = purse.shown.saturating_add(purse.lot.max(1)).min(purse.last);
    // No more steps than a node takes at once are ever in a purse; more would only cost time.
    let value = chain::walk(&purse.value, (purse.last - index).min(chain::STEPS_MAX));
    Some(PaymentToken { index, value })
}

fn meter() -> Option<Meter> {
    let mut page = [0; INFO_SIZE];
    read_page(INFO_START, &mut page).ok()?;
    Meter::parse(&page[INFO_METER..])
}

fn show(token: &PaymentToken) -> io::Result<()> {
    let control = Window::map_registers(CONTROL_START, PAGE_SIZE as usize)?;
    for (word, at) in token.value.as_chunks::<4>().0.iter().zip((REG_TOKEN as usize..).step_by(4)) {
        control.write_u32(at, u32::from_le_bytes(*word));
    }
    control.write_u32(REG_PAY as usize, token.index);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: chain::Value = [3; 32];

    /// A purse of tokens 31 to 50 with so many shown, looked at with so many seconds left.
    fn check(stage: Stage, seconds_left: u64, shown: u32, expect: Option<u32>) {
        let purse = Purse { shown, last: 50, lot: 9, value: SEED };
        let (balance_micro, burn_micro_per_s, purge_s) = (0, 0, seconds_left);
        let meter = Meter { stage, seconds_left, purge_s, balance_micro, burn_micro_per_s };
        let token = next(&purse, &meter);
        assert_eq!(token.map(|token| token.index), expect);
        if let Some(token) = token {
            assert_eq!(token.value, chain::walk(&SEED, 50 - token.index));
        }
    }

    #[test]
    fn pays_in_lots_when_little_is_left_and_no_more_than_there_is() {
        check(Stage::Running, LOW_S, 30, None);
        check(Stage::Running, LOW_S - 1, 30, Some(39));
        check(Stage::Low, 900, 30, Some(39));
        check(Stage::Running, 0, 45, Some(50));
        check(Stage::Running, 0, 50, None);
        check(Stage::Suspended, 0, 30, None);
    }
}
