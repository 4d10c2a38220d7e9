//! `packetd` as seen from here: started, fed, and started again when it dies. Called by [`crate::run`]. Jobs
//! live on without it: only requests that were under way are lost, and senders repeat those.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use onde_sys::spawn::{Program, spawn};
use onde_wire::handover::{HANDOVER_SIZE, Handover, Setup};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, Signal};

/// Least time between two starts: a `packetd` that dies at once must not keep the node busy.
const RESTART_MS: u64 = 1000;
/// The descriptor that `packetd` finds its socket at.
const SOCKET: i32 = 3;

/// The supervisor of `packetd`.
pub struct Packetd {
    file: File,
    setup: Setup,
    life: Option<Life>,
    start_from_ms: u64,
}

struct Life {
    pid: Pid,
    socket: OwnedFd,
}

impl Packetd {
    /// Takes what `packetd` is started from and with.
    pub fn new(file: File, setup: Setup) -> Self {
        Self { file, setup, life: None, start_from_ms: 0 }
    }

    /// When to call [`Self::start`]; `None` while it runs.
    pub fn wake_ms(&self) -> Option<u64> {
        self.life.is_none().then_some(self.start_from_ms)
    }

    /// Starts it and hands it its setup. Errors of the kernel's; it is tried again later.
    pub fn start(&mut self, now_ms: u64) -> io::Result<()> {
        self.start_from_ms = now_ms + RESTART_MS;
        let (socket, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::send(&socket, &self.setup.emit(), SendFlags::DONTWAIT)?;
        let null = onde_sys::spawn::dev_null()?;
        // Its words go where ours go.
        let (out, log) = (io::stdout(), io::stderr());
        let pid = spawn(&Program {
            file: self.file.as_fd(),
            args: &[CString::from(c"packetd")],
            fds: &[(null.as_fd(), 0), (out.as_fd(), 1), (log.as_fd(), 2), (theirs.as_fd(), SOCKET)],
            jail: None,
        })?;
        self.life = Some(Life { pid, socket });
        Ok(())
    }

    /// Its process.
    pub fn pid(&self) -> Option<Pid> {
        self.life.as_ref().map(|life| life.pid)
    }

    /// Its socket, for polling.
    pub fn socket(&self) -> Option<&OwnedFd> {
        self.life.as_ref().map(|life| &life.socket)
    }

    /// Its process was waited for.
    pub fn died(&mut self) {
        self.life = None;
    }

    /// Ends it.
    pub fn kill(&self) {
        if let Some(life) = &self.life {
            let _ = rustix::process::kill_process(life.pid, Signal::KILL);
        }
    }

    /// The next checked request; `Ok(None)` where none waits, `Err` when it has closed its end.
    pub fn hear(&self) -> io::Result<Option<Handover>> {
        let Some(life) = &self.life else { return Ok(None) };
        let mut message = [0u8; HANDOVER_SIZE + 1];
        match rustix::net::recv(&life.socket, &mut message[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            // What it should not say is no reason to stop listening.
            Ok((size, _)) => Ok(Handover::parse(&message[..size])),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sends it a message; one that does not keep up loses it, as on any network.
    pub fn tell(&self, message: &Handover) {
        if let Some(life) = &self.life {
            let _ = rustix::net::send(&life.socket, &message.emit(), SendFlags::DONTWAIT);
        }
    }
}
