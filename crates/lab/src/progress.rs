//! Progress for a person: spinners on a terminal, a plain line per step
//! elsewhere. Used by `onde-lab` and `xtask`; writes to standard error only.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One step under way.
pub struct Step {
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Step {
    /// Shows that `text` has begun.
    pub fn new(text: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(text.to_owned());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        if bar.is_none() {
            eprintln!("{text}");
        }
        Self { bar, started: Instant::now() }
    }

    /// A line that stays, while the step goes on.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// Ends the step with a line that tells its time.
    pub fn done(self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{text} ({:.1} s)", self.started.elapsed().as_secs_f64());
    }
}
