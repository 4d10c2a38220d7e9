//! Starts a program from its description: three pipes or a terminal, a session of its own, and the
//! threads that carry its output and input.

use onde_wire::session::{Launch, Refusal, Window, strings};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind, PipeReader};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use crate::children::{Children, spawn_thread};
use crate::freezer::Freezer;
use crate::input::feed;
use crate::program::Program;
use crate::pump::{Source, pump};

/// Ctrl-D, which ends input on a terminal (termios(3), VEOF).
const TERMINAL_END: &[u8] = &[4];

/// Why a program did not start, in words for the client.
#[derive(Clone, Debug)]
pub struct NotStarted {
    pub refusal: Refusal,
    pub text: String,
}

/// Starts a program, one of those that are stopped while the machine is copied.
pub fn start(children: &Children, launch: &Launch<'_>) -> Result<Arc<Program>, NotStarted> {
    start_in(children, launch, Some(&children.freezer))
}

/// Starts a program that is never stopped.
pub fn hook(children: &Children, launch: &Launch<'_>) -> Result<Arc<Program>, NotStarted> {
    start_in(children, launch, None)
}

fn start_in(
    children: &Children,
    launch: &Launch<'_>,
    freezer: Option<&Arc<Freezer>>,
) -> Result<Arc<Program>, NotStarted> {
    let name = strings(launch.argv).next().unwrap_or_default();
    let fail = |error: io::Error| NotStarted {
        refusal: refusal(&error),
        text: format!("cannot start {}: {error}", String::from_utf8_lossy(name)),
    };
    let cwd = Path::new(OsStr::from_bytes(launch.cwd));
    if !cwd.is_dir() {
        let text = format!("the guest has no folder {}", cwd.display());
        return Err(NotStarted { refusal: Refusal::NotFound, text });
    }
    let mut command = command(launch, cwd);
    let _starting = freezer.map(|freezer| freezer.enter(&mut command)).transpose().map_err(fail)?;
    match launch.window {
        Some(window) => start_on_terminal(children, &mut command, window),
        None => start_on_pipes(children, &mut command),
    }
    .map_err(fail)
}

fn refusal(error: &io::Error) -> Refusal {
    const ENOEXEC: i32 = rustix::io::Errno::NOEXEC.raw_os_error();
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Refusal::NotFound,
        ErrorKind::PermissionDenied => Refusal::NotExecutable,
        _ if error.raw_os_error() == Some(ENOEXEC) => Refusal::NotExecutable,
        _ => Refusal::Guest,
    }
}

fn command(launch: &Launch<'_>, cwd: &Path) -> Command {
    let mut argv = strings(launch.argv).map(OsStr::from_bytes);
    let mut command = Command::new(argv.next().expect("checked when parsed"));
    command.args(argv).current_dir(cwd).env_clear();
    for pair in strings(launch.env) {
        // The first byte is part of the name, whatever it is.
        let split = pair.iter().skip(1).position(|&byte| byte == b'=').map(|at| at + 1);
        let (name, value) = split.map_or((pair, &b""[..]), |at| (&pair[..at], &pair[at + 1..]));
        if !name.is_empty() {
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
    if (launch.uid, launch.gid) != (0, 0) {
        command.uid(launch.uid).gid(launch.gid);
    }
    command
}

fn start_on_pipes(children: &Children, command: &mut Command) -> io::Result<Arc<Program>> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    onde_sys::leader::lead_session(command, false);
    let (running, is_running) = io::pipe()?;
    let (child, program) =
        children.spawn(command, |pid| Arc::new(Program::new(pid, None, is_running)))?;
    let Child { stdin: Some(stdin), stdout: Some(stdout), stderr: Some(stderr), .. } = child else {
        unreachable!("three pipes were asked for");
    };
    let sources = vec![(1, stdout.into()), (2, stderr.into())];
    carry(children, &program, sources, running, File::from(OwnedFd::from(stdin)), &[])?;
    Ok(program)
}

fn start_on_terminal(
    children: &Children,
    command: &mut Command,
    window: Window,
) -> io::Result<Arc<Program>> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = openpt(flags)?;
    grantpt(&terminal)?;
    unlockpt(&terminal)?;
    let inner = File::from(ioctl_tiocgptpeer(&terminal, flags)?);
    command.stdin(inner.try_clone()?).stdout(inner.try_clone()?).stderr(inner);
    onde_sys::leader::lead_session(command, true);
    let (running, is_running) = io::pipe()?;
    let control = terminal.try_clone()?;
    let describe = |pid| Arc::new(Program::new(pid, Some(control), is_running));
    let (_, program) = children.spawn(command, describe)?;
    // The command holds our copies of the inner end: with them the terminal would never hang up.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    program.resize(window);
    let input = File::from(terminal.try_clone()?);
    carry(children, &program, vec![(1, terminal)], running, input, TERMINAL_END)?;
    Ok(program)
}

/// Starts the threads of a program. One that cannot have them is killed.
fn carry(
    children: &Children,
    program: &Arc<Program>,
    sources: Vec<Source>,
    running: PipeReader,
    input: File,
    end: &'static [u8],
) -> io::Result<()> {
    let (pumped, fed) = (program.clone(), program.clone());
    spawn_thread("pump", move || pump(&pumped, sources, running))
        .and_then(|()| spawn_thread("feed", move || feed(&fed, input, end)))
        .inspect_err(|_| children.signal(program, Signal::KILL))
}
