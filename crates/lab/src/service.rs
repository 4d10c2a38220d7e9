//! A process that the keeper looks after: a node's QEMU or the broker. Its
//! output goes to a bounded log and is watched for the line that says it is
//! ready. One owner, the keeper's loop, which also waits for its events.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::status::{Member, State};

/// A log is renamed to `.old` at this size: a chatty node fills no disk.
const LOG_SIZE_MAX: u64 = 8 << 20;
/// Longer lines are not looked at beyond this.
const LINE_SIZE_MAX: usize = 1024;
/// Seconds that a process gets to end by itself before it is killed.
const GRACE_S: i64 = 3;

/// A process and what is known of it.
pub struct Service {
    name: String,
    ipv4: Ipv4Addr,
    /// What a line of its output contains once it is ready.
    mark: &'static str,
    log: PathBuf,
    running: Option<Running>,
    state: State,
    ready_ms: u64,
    note: String,
}

struct Running {
    child: Child,
    pidfd: OwnedFd,
    /// Gone when the process closed its output.
    output: Option<ChildStdout>,
    log: File,
    log_size: u64,
    line: Vec<u8>,
    started: Instant,
}

impl Service {
    /// A process that does not run yet.
    pub fn new(name: String, ipv4: Ipv4Addr, mark: &'static str, log: PathBuf) -> Self {
        let (state, note) = (State::Down, String::new());
        Self { name, ipv4, mark, log, running: None, state, ready_ms: 0, note }
    }

    /// Starts it. On error it is down as before.
    pub fn start(&mut self, mut command: Command) -> Result<()> {
        let log = open_log(&self.log)?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start {}", self.name))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let output = child.stdout.take();
        if let Some(output) = &output {
            rustix::io::ioctl_fionbio(output, true)?;
        }
        let log_size = log.metadata()?.len();
        let (line, started) = (Vec::new(), Instant::now());
        self.running = Some(Running { child, pidfd, output, log, log_size, line, started });
        (self.state, self.ready_ms, self.note) = (State::Starting, 0, String::new());
        Ok(())
    }

    /// What the loop waits for: readable when there is something to `step`.
    pub fn events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.running.iter().flat_map(|running| {
            let output = running.output.as_ref().map(|output| output.as_fd());
            output.into_iter().chain([running.pidfd.as_fd()])
        })
    }

    /// Takes in what happened since; never blocks. Says whether its state changed.
    pub fn step(&mut self) -> Result<bool> {
        let before = self.state;
        self.drain()?;
        if let Some(running) = &mut self.running
            && let Some(status) = running.child.try_wait()?
        {
            self.drain()?;
            self.running = None;
            self.state = State::Down;
            self.note = format!("ended by itself ({status})");
        }
        Ok(self.state != before)
    }

    fn drain(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let mut buffer = [0; 4096];
        // As much as a pipe holds: then the loop looks at the others.
        for _ in 0..16 {
            let Some(output) = &mut running.output else { break };
            let data = match output.read(&mut buffer) {
                Ok(size) => &buffer[..size],
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            };
            if data.is_empty() {
                running.output = None;
            }
            running.append(&self.log, data)?;
            if running.saw(self.mark, data) && self.state == State::Starting {
                self.state = State::Ready;
                self.ready_ms = running.started.elapsed().as_millis() as u64;
            }
        }
        Ok(())
    }

    /// Kills it at once, as a power cut does.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        running.child.kill()?;
        running.child.wait()?;
        self.state = State::Down;
        self.note = "killed".to_owned();
        Ok(())
    }

    /// Asks it to end, and kills it where it does not in time.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(running) = &self.running {
            pidfd_send_signal(&running.pidfd, Signal::TERM).ok();
            let mut ended = [PollFd::new(&running.pidfd, PollFlags::IN)];
            let grace = Timespec { tv_sec: GRACE_S, tv_nsec: 0 };
            poll(&mut ended, Some(&grace)).ok();
        }
        self.kill()
    }

    /// Whether its process is there.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// What is known of it.
    pub fn member(&self) -> Member {
        Member {
            name: self.name.clone(),
            ipv4: self.ipv4,
            state: self.state,
            pid: self.running.as_ref().map_or(0, |running| running.child.id()),
            ready_ms: self.ready_ms,
            note: self.note.clone(),
        }
    }
}

impl Running {
    fn append(&mut self, path: &Path, data: &[u8]) -> Result<()> {
        if self.log_size + data.len() as u64 > LOG_SIZE_MAX {
            std::fs::rename(path, path.with_extension("log.old"))?;
            (self.log, self.log_size) = (open_log(path)?, 0);
        }
        self.log.write_all(data)?;
        self.log_size += data.len() as u64;
        Ok(())
    }

    /// Whether a line that ends in `data` contains `mark`.
    fn saw(&mut self, mark: &str, data: &[u8]) -> bool {
        let mut seen = false;
        for &byte in data {
            if byte == b'\n' {
                seen |= String::from_utf8_lossy(&self.line).contains(mark);
                self.line.clear();
            } else if self.line.len() < LINE_SIZE_MAX {
                self.line.push(byte);
            }
        }
        seen
    }
}

fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}
