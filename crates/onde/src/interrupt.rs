//! Ctrl-C and its kin, for commands that hold a VM. One thread reads the signals:
//!
//! ```text
//!  free     -> leaves at once: nothing was bought
//!  holding  -> cleans up (stop, redeem), then leaves
//!  running  -> hands the signal to the program; a second INT within two seconds cleans up and leaves
//!  leaving  -> leaves at once and says what was not done
//! ```

use anyhow::{Context, Result};
use onde_client::session::Remote;
use onde_sys::signals::Signals;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::terminal;

/// Two INTs within this time mean the VM, not the program.
const DOUBLE: Duration = Duration::from_secs(2);

/// Ends the VM and settles; says how it went.
type CleanUp = Arc<dyn Fn() + Send + Sync>;

enum Phase {
    Free,
    Holding(CleanUp),
    Running(CleanUp, Remote),
    Leaving(&'static str),
}

/// What the signals mean at present.
#[derive(Clone)]
pub struct Interrupt {
    phase: Arc<Mutex<Phase>>,
}

impl Interrupt {
    /// Takes INT, TERM, HUP and WINCH from here on. The process has one thread only at this time.
    pub fn watch() -> Result<Self> {
        let numbers = [Signal::INT, Signal::TERM, Signal::HUP, Signal::WINCH];
        let signals =
            Signals::block(&numbers.map(Signal::as_raw)).context("cannot take signals")?;
        let interrupt = Self { phase: Arc::new(Mutex::new(Phase::Free)) };
        let watcher = interrupt.clone();
        std::thread::spawn(move || watcher.run(&signals));
        Ok(interrupt)
    }

    /// Something was bought: `clean_up` gives it back.
    pub fn hold(&self, clean_up: impl Fn() + Send + Sync + 'static) {
        *self.lock() = Phase::Holding(Arc::new(clean_up));
    }

    /// The program runs: signals are for it.
    pub fn run_program(&self, remote: Remote) {
        let mut phase = self.lock();
        if let Phase::Holding(clean_up) = &*phase {
            *phase = Phase::Running(clean_up.clone(), remote);
        }
    }

    /// The caller cleans up itself now. Does not return if a signal made that happen already.
    pub fn leave(&self, undone: &'static str) {
        let mut phase = self.lock();
        if !matches!(*phase, Phase::Leaving(_)) {
            *phase = Phase::Leaving(undone);
            return;
        }
        drop(phase);
        loop {
            std::thread::park();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, signals: &Signals) {
        let mut last_int: Option<Instant> = None;
        loop {
            // An error shows again in the read below.
            let _ = poll(&mut [PollFd::new(signals, PollFlags::IN)], None);
            let Ok(Some(number)) = signals.next() else { continue };
            let is_int = number == Signal::INT.as_raw();
            let is_double = is_int && last_int.is_some_and(|last| last.elapsed() < DOUBLE);
            if is_int {
                last_int = Some(Instant::now());
            }
            self.act(number, is_double);
        }
    }

    fn act(&self, number: i32, is_double: bool) {
        let mut phase = self.lock();
        if number == Signal::WINCH.as_raw() {
            if let (Phase::Running(_, remote), Some(window)) = (&*phase, terminal::window()) {
                remote.resize(window);
            }
            return;
        }
        match &*phase {
            Phase::Free => leave_process(number),
            Phase::Running(_, remote) if !is_double => remote.signal(number as u8),
            Phase::Holding(clean_up) | Phase::Running(clean_up, _) => {
                let clean_up = clean_up.clone();
                *phase = Phase::Leaving("the VM may still run, and its change was not collected");
                std::thread::spawn(move || {
                    terminal::restore();
                    clean_up();
                    leave_process(number);
                });
            }
            Phase::Leaving(undone) => {
                terminal::restore();
                eprintln!("\nonde: left at once: {undone}\nhint: onde ps, then onde stop JOB");
                leave_process(number);
            }
        }
    }
}

/// Ends this process as the signal would have.
fn leave_process(number: i32) -> ! {
    terminal::restore();
    std::process::exit(128 + number)
}
