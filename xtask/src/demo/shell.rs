//! Commands as the demo gives them: printed, run, their output shown, their time told. Each is a process group of
//! its own, so that Ctrl-C comes here first: the command is ended, and then the demo cleans up.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use onde_lab::progress::Step;
use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The slowest command boots two nodes, which the lab itself gives two minutes.
const COMMAND_MAX: Duration = Duration::from_secs(180);
/// Longest wait for something that a command started.
const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks at it.
const LOOK_PERIOD: Duration = Duration::from_millis(250);
/// Lines of a command's output that are shown.
const LINES_MAX: usize = 16;

/// What a command said.
pub struct Told {
    /// Its standard output.
    pub output: Vec<u8>,
    /// Its standard error.
    pub errors: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Told {
    /// Its standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }
}

/// Whether to show what a command writes to its standard output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// Its first lines.
    Output,
    /// Its size: it is for a program to read.
    Size,
}

/// The command that runs, and whether the user wants no more.
#[derive(Default)]
struct Running {
    group: Mutex<Option<Pid>>,
    is_interrupted: AtomicBool,
}

impl Running {
    fn set(&self, group: Option<Pid>) {
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = group;
    }

    fn end(&self, signal: Signal) {
        let group = *self.group.lock().unwrap_or_else(PoisonError::into_inner);
        // Where this fails it has just ended.
        let _ = group.map(|group| kill_process_group(group, signal));
    }

    /// Asks the first time, and does not ask again.
    fn interrupt(&self) {
        let is_second = self.is_interrupted.swap(true, Ordering::SeqCst);
        self.end(if is_second { Signal::KILL } else { Signal::TERM });
    }
}

/// A user's shell, as far as a demo needs one.
pub struct Shell {
    env: Vec<(&'static str, OsString)>,
    running: Arc<Running>,
}

impl Shell {
    /// A shell with these variables, which takes INT, TERM and HUP from here on.
    pub fn open(env: Vec<(&'static str, OsString)>) -> Result<Self> {
        let running = Arc::new(Running::default());
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot take signals")?;
        let ours = running.clone();
        thread::spawn(move || signals.forever().for_each(|_| ours.interrupt()));
        env.iter().for_each(|(name, value)| eprintln!("$ export {name}={}", value.display()));
        let env = env.into_iter().chain([("PATH", path()?)]).collect();
        Ok(Self { env, running })
    }

    /// Says what comes, prints the command, and runs it: its words, or one line for `sh`. A command that fails
    /// is an error.
    pub fn run(&self, comment: &str, words: &[&str], show: Show) -> Result<Told> {
        self.check()?;
        eprintln!("\n# {comment}\n$ {}", line(words));
        let step = std::io::stderr().is_terminal().then(|| Step::new("running"));
        let say = |text: &str| match &step {
            Some(step) => step.line(text),
            None => eprintln!("{text}"),
        };
        let told = self.follow(words, &say);
        if let Ok(told) = &told {
            shown(told, show).iter().for_each(|line| say(line));
        }
        let seconds = |told: &Told| format!("  ({:.1} s)", told.took.as_secs_f64());
        match (step, &told) {
            (Some(step), Ok(_)) => step.done(" "),
            (Some(step), Err(_)) => step.done("  failed"),
            (None, Ok(told)) => eprintln!("{}", seconds(told)),
            (None, Err(_)) => {}
        }
        told
    }

    /// [`Shell::run`] without a word.
    pub fn ask(&self, words: &[&str]) -> Result<Told> {
        self.check()?;
        self.follow(words, &|_| {})
    }

    /// Runs a command without a word, also after an interruption; whether it succeeds is no matter any more.
    pub fn clean_up(&self, words: &[&str]) {
        let _ = self.follow(words, &|_| {});
    }

    /// Waits until `look` finds what it looks for.
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let begun = Instant::now();
        loop {
            self.check()?;
            if let Some(found) = look()? {
                return Ok(found);
            }
            ensure!(begun.elapsed() < PATIENCE, "waited {} s for {what}", PATIENCE.as_secs());
            // Nobody tells when it is there: it is asked for by commands.
            thread::sleep(LOOK_PERIOD);
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.running.is_interrupted.load(Ordering::SeqCst), "interrupted");
        Ok(())
    }

    fn follow(&self, words: &[&str], say: &dyn Fn(&str)) -> Result<Told> {
        let (name, args) = match words {
            [line] => ("sh", &["-c", *line][..]),
            [name, args @ ..] => (*name, args),
            [] => bail!("no command"),
        };
        let begun = Instant::now();
        let mut child = Command::new(name)
            .args(args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env_remove("ONDE_CONTEXT")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        self.running.set(Some(Pid::from_child(&child)));
        let watchdog = self.watch();
        let mut output = child.stdout.take().context("no pipe")?;
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            output.read_to_end(&mut bytes).map(|_| bytes)
        });
        let mut errors = String::new();
        for line in BufReader::new(child.stderr.take().context("no pipe")?).lines() {
            let line = line?;
            say(&line);
            errors += &(line + "\n");
        }
        let output = reader.join().ok().context("a reader died")??;
        let status = child.wait()?;
        self.running.set(None);
        drop(watchdog);
        self.check()?;
        if !status.success() {
            bail!("{} failed: {status}\n{}", line(words), errors.trim());
        }
        ensure!(status.signal().is_none(), "{} took too long", line(words));
        Ok(Told { output, errors, took: begun.elapsed() })
    }

    /// Ends the command that runs, should the result live too long.
    fn watch(&self) -> std::sync::mpsc::Sender<()> {
        let (alive, is_alive) = channel();
        let running = self.running.clone();
        thread::spawn(move || {
            if is_alive.recv_timeout(COMMAND_MAX) == Err(RecvTimeoutError::Timeout) {
                running.end(Signal::KILL);
            }
        });
        alive
    }
}

/// `PATH` with our programs before all others.
fn path() -> Result<OsString> {
    let ours = crate::step::release_dir();
    eprintln!("$ export PATH={}:$PATH", ours.display());
    let others = std::env::var_os("PATH").unwrap_or_default();
    Ok(std::env::join_paths([ours].into_iter().chain(std::env::split_paths(&others)))?)
}

/// The lines of a command's output that people get to see.
fn shown(told: &Told, show: Show) -> Vec<String> {
    if show == Show::Size {
        return vec![format!("  ({} bytes)", told.output.len())];
    }
    let text = told.text();
    let mut lines: Vec<_> = text.lines().take(LINES_MAX).map(str::to_owned).collect();
    let count = text.lines().count();
    if count > LINES_MAX {
        lines.push(format!("  (and {} lines more)", count - LINES_MAX));
    }
    lines
}

/// The command as it is typed.
fn line(words: &[&str]) -> String {
    if let [line] = words {
        return (*line).to_owned();
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    let quoted = words.iter().map(|word| match !word.is_empty() && word.chars().all(is_plain) {
        true => (*word).to_owned(),
        false => format!("'{word}'"),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &[&str], expect: &str) {
        assert_eq!(line(words), expect);
    }

    #[test]
    fn a_printed_command_can_be_typed() {
        check(&["onde", "run", "--", "gzip", "-9nc", "/a/b-1.x"], "onde run -- gzip -9nc /a/b-1.x");
        check(&["sh", "-c", "a b", ""], "sh -c 'a b' ''");
        check(&["a | b"], "a | b");
    }

    #[test]
    fn commands_succeed_fail_and_are_interrupted() {
        let shell = Shell { env: vec![("WORD", "deed".into())], running: Arc::default() };
        let told = shell.ask(&["sh", "-c", "echo $WORD; echo trouble >&2"]).unwrap();
        assert_eq!((told.text().as_str(), told.errors.as_str()), ("deed\n", "trouble\n"));
        let failed = shell.ask(&["echo why >&2; exit 3"]).err().unwrap();
        assert!(failed.to_string().contains("why"), "{failed}");
        let running = shell.running.clone();
        let begun = Instant::now();
        let user = thread::spawn(move || {
            while running.group.lock().unwrap().is_none() {
                thread::yield_now();
            }
            running.interrupt();
        });
        assert_eq!(shell.ask(&["sleep", "60"]).err().unwrap().to_string(), "interrupted");
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert_eq!(shell.ask(&["true | false"]).err().unwrap().to_string(), "interrupted");
        user.join().unwrap();
    }
}
