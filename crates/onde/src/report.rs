//! What a command says to people while it works: lines and progress bars on standard error, none with `--quiet`,
//! bars only on a terminal. Data goes to standard output elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Instant;

/// Says things, or not.
#[derive(Clone, Debug)]
pub struct Report {
    quiet: bool,
    /// What each line begins with.
    name: String,
}

impl Report {
    /// Silent with `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, name: "onde".to_owned() }
    }

    /// Says the same of one of many jobs.
    pub fn about(&self, job: &str) -> Self {
        Self { name: format!("onde: job {job}"), ..self.clone() }
    }

    /// One line.
    pub fn line(&self, text: &str) {
        if !self.quiet {
            eprintln!("{}: {text}", self.name);
        }
    }

    /// A line that `--quiet` does not hold back: the user has to act.
    pub fn warn(&self, text: &str) {
        eprintln!("{}: warning: {text}", self.name);
    }

    /// The progress of sending `size` bytes of memory.
    pub fn upload(&self, size: u64) -> Upload {
        let is_shown = !self.quiet && std::io::stderr().is_terminal();
        let bar = is_shown.then(|| {
            let bar = ProgressBar::new(size);
            let template = "onde: sending {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        });
        Upload { bar, size, report: self.clone(), started: Instant::now() }
    }
}

impl Report {
    /// What goes on, in words that change, while a snapshot is taken.
    pub fn spinner(&self) -> Spinner {
        let is_shown = !self.quiet && std::io::stderr().is_terminal();
        let bar = is_shown.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("onde: {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Spinner(bar)
    }
}

/// Words on a terminal that change, and are gone at the end.
pub struct Spinner(Option<ProgressBar>);

impl Spinner {
    /// What goes on now.
    pub fn say(&self, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.0 {
            bar.set_message(text());
            bar.tick();
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Memory on its way.
pub struct Upload {
    bar: Option<ProgressBar>,
    size: u64,
    report: Report,
    started: Instant,
}

impl Upload {
    /// So much of it went.
    pub fn at(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    /// All of it is there; it took `sent` bytes of stream.
    pub fn done(self, sent: u64) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let (mib, sent_mib) = (self.size as f64 / 1048576.0, sent as f64 / 1048576.0);
        let rate = mib / seconds.max(0.001);
        self.report.line(&format!(
            "sent {mib:.0} MiB of memory as {sent_mib:.0} MiB in {seconds:.1} s ({rate:.0} MiB/s)"
        ));
    }
}

impl Drop for Upload {
    // An upload that failed leaves no bar behind.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
