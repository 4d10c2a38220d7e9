//! `onde exec`, `onde attach` and `onde logs`: sessions with the agent of a VM that runs already.

use anyhow::{Context, Result};
use onde_client::bootstrap;
use onde_client::channel::{Channel, ChannelError};
use onde_client::echo::{Echo, Policy};
use onde_client::job::{Job, Jobs};
use onde_client::node::NodeError;
use onde_client::session::{Ended, FROM_END, Session, SessionError, Streams};
use onde_wire::machine::Stage;
use onde_wire::session::{Launch, Refusal};
use std::ffi::OsString;
use std::io::{ErrorKind, stderr, stdin, stdout};
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::failure::{self, hinted};
use crate::interrupt::Interrupt;
use crate::report::Report;
use crate::terminal;
use crate::wallet::BOOT_PATIENCE;

/// How long a program that was left may take to hear of it.
const FAREWELL: Duration = Duration::from_secs(2);

/// What dials the agent of a job's guest, wherever it has moved.
pub fn dial(jobs: &Jobs, job: &Job) -> impl FnMut() -> Result<Channel, ChannelError> + use<> {
    let (jobs, mut job) = (jobs.clone(), job.clone());
    move || {
        // Without its file the job is where it was.
        job = jobs.current(&job.id.0).unwrap_or_else(|_| job.clone());
        bootstrap::connect(&job.handle(), job.guest_ipv4, Duration::ZERO)
    }
}

/// Whether a job's VM cannot answer and may yet: it is on its node's disk at present, or its node is silent. Who pays
/// for it finds out when it is over.
pub fn is_away(jobs: &Jobs, job: &Job) -> impl FnMut() -> bool + Send + use<> {
    let (jobs, job) = (jobs.clone(), job.clone());
    move || {
        // Without its file the job is where it was.
        let job = jobs.current(&job.id.0).unwrap_or_else(|_| job.clone());
        let asked = Echo::open().map_err(NodeError::from);
        let status = asked.and_then(|mut echo| job.handle().status(&mut echo, Policy::default()));
        job.settled.is_none()
            && match status {
                Ok(status) => status.stage == Stage::Suspended,
                Err(error) => matches!(error, NodeError::Echo(_)),
            }
    }
}

/// This process's own streams.
pub fn streams() -> Streams {
    Streams {
        input: Some(Box::new(stdin())),
        output: Box::new(stdout()),
        errors: Box::new(stderr()),
    }
}

/// The exit status to leave with.
pub fn exit_code(ended: &Ended, report: &Report) -> ExitCode {
    if ended.lost_bytes > 0 {
        report.warn(&format!("{} bytes of output came too late and are lost", ended.lost_bytes));
    }
    ended.exit.map_or(ExitCode::SUCCESS, |exit| exit.shell_status().into())
}

/// Strings as [`Launch`] wants them.
pub fn list<'a>(strings: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    strings.into_iter().flat_map(|string| [string, b"\0"].concat()).collect()
}

/// A running job with an agent in it.
pub fn open(name: &str) -> Result<(Cluster, Job)> {
    let (cluster, job) = Cluster::open_for(name)?;
    if job.settled.is_some() {
        return Err(hinted(format!("job {} is over", job.short_id()), "onde ps lists open ones"));
    }
    if !job.has_agent {
        let text = format!("job {} has no agent: it runs a kernel of your own", job.short_id());
        return Err(hinted(text, "onde console JOB"));
    }
    Ok((cluster, job))
}

pub fn exec(name: &str, tty: bool, command: &[OsString]) -> Result<ExitCode> {
    let (cluster, job) = open(name)?;
    let interrupt = Interrupt::watch()?;
    let term = std::env::var_os("TERM").unwrap_or("dumb".into());
    let path = &b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"[..];
    let env = list([path, b"HOME=/root", &[b"TERM=", term.as_bytes()].concat()]);
    let argv = list(command.iter().map(|word| word.as_bytes()));
    let window = if tty { terminal::window() } else { None };
    let launch = Launch { window, uid: 0, gid: 0, cwd: b"/", argv: &argv, env: &env };
    let session = Session::new(dial(&cluster.jobs, &job), BOOT_PATIENCE);
    // The agent ends the program with the connection: there is nothing to clean up.
    interrupt.hold(|| ());
    interrupt.run_program(session.remote());
    if window.is_some() {
        terminal::make_raw().context("no terminal to give")?;
    }
    match session.exec(&launch, streams()) {
        Ok(ended) => Ok(exit_code(&ended, &Report::new(false))),
        Err(error) => Ok(failed(error)),
    }
}

/// The exit status that shells and container tools give to a program that does not start, or whose reader went.
pub fn failed(error: SessionError) -> ExitCode {
    let code = match &error {
        SessionError::Output(error) if error.kind() == ErrorKind::BrokenPipe => {
            return ExitCode::from(141);
        }
        SessionError::Refused { refusal: Refusal::NotFound, .. } => 127,
        SessionError::Refused { refusal: Refusal::NotExecutable, .. } => 126,
        _ => super::FAILED,
    };
    terminal::restore();
    eprintln!("{}", failure::lines(&error.into()));
    code.into()
}

pub fn attach(name: &str, report: &Report) -> Result<ExitCode> {
    let (cluster, job) = open(name)?;
    let interrupt = Interrupt::watch()?;
    let session = Session::new(dial(&cluster.jobs, &job), BOOT_PATIENCE);
    let (remote, (leave, left)) = (session.remote(), channel::<()>());
    let left = Mutex::new(left);
    interrupt.hold(move || {
        remote.detach();
        if let Ok(left) = left.lock() {
            // Either way this process ends.
            let _ = left.recv_timeout(FAREWELL);
        }
    });
    let ended = session.attach(FROM_END, true, streams());
    drop(leave);
    Ok(exit_code(&ended?, report))
}

pub fn logs(name: &str, follow: bool, report: &Report) -> Result<()> {
    let (cluster, job) = Cluster::open_for(name)?;
    if job.settled.is_some() {
        let file = cluster.jobs.output_file(&job.id.0);
        let kept = std::fs::read(&file);
        let none = || hinted("no output was kept", "only detached jobs' output is (onde run -d)");
        return super::print_bytes(&kept.map_err(|_| none())?);
    }
    open(name)?;
    let session = Session::new(dial(&cluster.jobs, &job), BOOT_PATIENCE);
    let streams = Streams { input: None, ..streams() };
    let ended = match follow {
        true => session.attach(0, false, streams)?,
        false => session.logs(0, streams)?,
    };
    exit_code(&ended, report);
    Ok(())
}
