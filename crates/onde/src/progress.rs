//! Whether a job makes progress, by what its customer said shows it: a command that succeeds, a file that changes.
//! The payer asks each second; a job that makes none gets no more tokens until it does.

use onde_client::job::{Job, Watch};
use onde_sys::signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between the end of a command and its next run: half of what a release lasts when a VM is busy.
const COMMAND_PERIOD: Duration = Duration::from_secs(5);
/// A command that takes longer has failed: a customer whose check hangs does not mean to pay for ever.
const COMMAND_MAX: Duration = Duration::from_secs(15);

/// Watches one job.
pub struct Progress {
    born: Instant,
    file: Option<(Watch, FileWatch)>,
    command: Option<CommandWatch>,
}

impl Progress {
    /// Begins to watch.
    pub fn of(job: &Job) -> Self {
        let watch = job.watch.clone();
        let file = watch.clone().filter(|watch| watch.file.is_some());
        let command =
            watch.and_then(|watch| Some(CommandWatch::start(watch.command?, watch.dir, job)));
        Self {
            born: Instant::now(),
            file: file.map(|watch| (watch, FileWatch::default())),
            command,
        }
    }

    /// Takes everything for progress.
    pub fn always() -> Self {
        Self { born: Instant::now(), file: None, command: None }
    }

    /// Why the job is taken to make no progress now; `None` while it does.
    pub fn missing(&mut self) -> Option<String> {
        self.missing_at(self.born.elapsed())
    }

    /// The same so long after the watch began.
    fn missing_at(&mut self, now: Duration) -> Option<String> {
        if let Some((Watch { file: Some(file), within_s, .. }, seen)) = &mut self.file
            && !seen.look(now, stamp(file), Duration::from_secs((*within_s).into()))
        {
            return Some(format!("{} did not change for {within_s} s", file.display()));
        }
        self.command.as_ref().and_then(CommandWatch::failure)
    }
}

/// What changes with a file: its identity, its size and when it was written.
type Stamp = Option<(u64, u64, i64, i64)>;

fn stamp(file: &Path) -> Stamp {
    let metadata = fs::metadata(file).ok()?;
    Some((metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
}

/// When a file changed last, on the clock of who looks.
#[derive(Default)]
struct FileWatch {
    last: Stamp,
    changed: Duration,
}

impl FileWatch {
    /// Whether it changed in the time `within` before `now`. Time counts from zero, and a file that comes or goes changes.
    fn look(&mut self, now: Duration, stamp: Stamp, within: Duration) -> bool {
        if stamp != self.last {
            (self.last, self.changed) = (stamp, now);
        }
        now - self.changed < within
    }
}

/// A command that is run again and again by a thread, until this is dropped.
struct CommandWatch {
    failure: Arc<Mutex<Option<String>>>,
    _stop: Sender<()>,
}

impl CommandWatch {
    fn start(command: String, dir: std::path::PathBuf, job: &Job) -> Self {
        let (stop, stopped) = channel();
        let failure: Arc<Mutex<Option<String>>> = Arc::default();
        let (told, id) = (failure.clone(), job.id.to_string());
        std::thread::spawn(move || {
            let run = || run(&command, &dir, &id, COMMAND_MAX);
            repeat(run, &told, &stopped);
        });
        Self { failure, _stop: stop }
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn repeat(run: impl Fn() -> Option<String>, told: &Mutex<Option<String>>, stopped: &Receiver<()>) {
    loop {
        let failure = run();
        *told.lock().unwrap_or_else(PoisonError::into_inner) = failure;
        match stopped.recv_timeout(COMMAND_PERIOD) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return,
        }
    }
}

/// Runs a command once; why it did not succeed.
fn run(command: &str, dir: &Path, job: &str, limit: Duration) -> Option<String> {
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", command])
        .current_dir(dir)
        .env("ONDE_JOB", job)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // All that it starts goes with it when its time is over.
        .process_group(0);
    signals::unblock(&mut shell);
    match shell.spawn().and_then(|child| finish(child, limit)) {
        Ok(Some(status)) if status.success() => None,
        Ok(Some(status)) => Some(format!("`{command}` failed ({status})")),
        Ok(None) => Some(format!("`{command}` took longer than {} s", limit.as_secs())),
        Err(error) => Some(format!("`{command}` cannot run: {error}")),
    }
}

/// How a command ended; `None` if it was killed for taking too long.
fn finish(mut child: Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(&child);
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit));
    if matches!(ended, Ok(1..)) {
        return child.wait().map(Some);
    }
    // The group is the child's own; it may be gone by now.
    let _ = kill_process_group(pid, Signal::KILL);
    child.wait().map(|_| None)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::cli::{Cli, Command as Ordered};
    use clap::Parser;

    /// What watches a job that was ordered so.
    fn ordered(line: &str) -> Progress {
        let Ordered::Run(run) = Cli::parse_from(line.split(' ')).command else {
            panic!("not `run`");
        };
        let watch = crate::launch::watch(&run.order).unwrap();
        Progress::of(&Job { watch, ..crate::command::tests::job() })
    }

    #[test]
    fn a_progress_file_that_stays_as_it_is_withholds_payment_until_it_changes() {
        let file = std::env::temp_dir().join(format!("onde-progress-{}", std::process::id()));
        fs::write(&file, "1").unwrap();
        let name = file.display();
        let line = format!("onde run --progress-file {name} --progress-within 9 -- ls");
        let mut progress = ordered(&line);
        let mut missing = |seconds| progress.missing_at(Duration::from_secs(seconds));
        let why = Some(format!("{name} did not change for 9 s"));
        assert_eq!([missing(0), missing(8), missing(9)], [None, None, why.clone()]);
        fs::write(&file, "12").unwrap();
        assert_eq!([missing(20), missing(28), missing(29)], [None, None, why.clone()]);
        fs::remove_file(&file).unwrap();
        assert_eq!([missing(30), missing(39)], [None, why]);
        assert_eq!(ordered("onde run -- ls").missing_at(Duration::MAX), None);
    }

    fn check(command: &str, expect: Option<&str>) {
        let failure = run(command, Path::new("/"), "abc", Duration::from_secs(30));
        assert_eq!(failure.as_deref(), expect);
    }

    #[test]
    fn a_command_decides_by_its_status() {
        check("true", None);
        check("test $ONDE_JOB = abc && test $(pwd) = /", None);
        check("exit 3", Some("`exit 3` failed (exit status: 3)"));
        check("kill $$", Some("`kill $$` failed (signal: 15 (SIGTERM))"));
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_all_that_it_started() {
        let begun = Instant::now();
        let failure =
            run("sleep 1000 & sleep 1000", Path::new("/"), "a", Duration::from_millis(50));
        assert!(failure.is_some_and(|failure| failure.contains("took longer")));
        assert!(begun.elapsed() < Duration::from_secs(500));
    }

    #[test]
    fn a_file_shows_progress_while_it_changes() {
        let (mut seen, stamp) = (FileWatch::default(), |size| Some((1, size, 5, 0)));
        let mut look =
            |now, stamp| seen.look(Duration::from_secs(now), stamp, Duration::from_secs(60));
        // One that is not there has the time, too.
        assert!(look(0, None) && look(59, None) && !look(60, None));
        assert!(look(61, stamp(1)) && look(120, stamp(1)) && !look(121, stamp(1)));
        assert!(look(500, stamp(2)) && look(559, stamp(2)) && look(559, None) && !look(619, None));
    }
}
