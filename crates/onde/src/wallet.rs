//! The wallet: one process that is the home node of all jobs that were left to it. For each it pays, keeps the program's
//! output in a file beside the job's, and settles when the VM is over. All it knows is in the job files, so that it may
//! die at any time, and the next one goes on. `onde wallet serve` is nothing else; `run -d` and `boot` start one where
//! there is none.

use anyhow::{Context, Result};
use onde_client::echo::Echo;
use onde_client::home::Home;
use onde_client::job::{Job, Jobs, JobsError};
use onde_client::session::{Remote, Session, Streams};
use onde_sys::signals;
use onde_wire::token::JobId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::command::session;
use crate::failure::hinted;
use crate::payer::Outcome;
use crate::report::Report;
use crate::{moving, settle};

/// How long a packed guest may take from its first instruction to its agent, under emulation.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(90);
/// Output that is kept of a detached program, bytes; what comes after is dropped.
const OUTPUT_MAX: u64 = 64 << 20;
/// Changes of job files are told at once; this is for those that are not, as on a network's file system.
const LOOK_PERIOD: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// Between two tries to settle a job that is over: the broker may be away.
const SETTLE_PERIOD: Duration = Duration::from_secs(10);

/// Leaves `job` to the wallet, and starts one where there is none.
pub fn leave(cluster: &Cluster, job: &Job) -> Result<()> {
    cluster.jobs.update(&job.id.0, |job| job.kept = true)?;
    let log = cluster.jobs.dir().join("wallet.log");
    let log = open(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let onde = std::env::current_exe().context("cannot tell where this program is")?;
    // It finds out by itself whether it is the only one.
    let mut wallet = Command::new(onde);
    wallet
        .args(["wallet", "serve", "--until-idle", "--context", &cluster.name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/");
    signals::unblock(&mut wallet);
    wallet.spawn().context("cannot start the wallet")?;
    Ok(())
}

fn open(file: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(file)
}

/// Serves all jobs of a context; with `until_idle` until there is none.
pub fn serve(context: Option<&str>, until_idle: bool, report: &Report) -> Result<()> {
    if until_idle {
        // A terminal that closes takes its own session along, and this is none of it any more.
        let _ = rustix::process::setsid();
    }
    let cluster = Arc::new(Cluster::open(context)?);
    let changes = watch(cluster.jobs.dir()).context("cannot watch the job files")?;
    raise_file_limit();
    loop {
        let Some(lock) = cluster.jobs.wallet(&cluster.name)? else {
            let busy =
                || hinted("a wallet serves this context already", "onde ps --cost shows its jobs");
            return if until_idle { Ok(()) } else { Err(busy()) };
        };
        let mut wallet =
            Wallet { cluster: cluster.clone(), report: report.clone(), tended: HashMap::new() };
        wallet.run(&changes, until_idle)?;
        // A name of nobody is worth nothing; nor is it worth a failure.
        let _ = lock.set_len(0);
        drop(lock);
        // What was left meanwhile counted on the wallet that just let go.
        if wallet.due()?.is_empty() {
            return Ok(());
        }
    }
}

/// Each job takes some: sockets to its node and its guest, and its output.
fn raise_file_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // With fewer, some jobs wait until others are over.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Tells when a job file was written: a new one is renamed to its name.
fn watch(dir: &Path) -> io::Result<OwnedFd> {
    let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&changes, dir, inotify::WatchFlags::MOVED_TO)?;
    Ok(changes)
}

/// A job in hand, until `dismiss` is dropped or it is over.
struct Tended {
    dismiss: Option<Sender<()>>,
    thread: JoinHandle<()>,
}

struct Wallet {
    cluster: Arc<Cluster>,
    report: Report,
    tended: HashMap<JobId, Tended>,
}

impl Wallet {
    fn run(&mut self, changes: &OwnedFd, until_idle: bool) -> Result<()> {
        loop {
            let due = self.due()?;
            for (id, tended) in &mut self.tended {
                if !due.iter().any(|job| job.id.0 == *id) {
                    tended.dismiss = None;
                }
            }
            self.tended.retain(|_, tended| !tended.thread.is_finished());
            for job in due {
                // What follows the VM that moved here lets go of its output first.
                let is_elsewhere = job.moves.is_some_and(|old| self.tended.contains_key(&old.0));
                if !self.tended.contains_key(&job.id.0) && !is_elsewhere {
                    self.tend(job)?;
                }
            }
            if until_idle && self.tended.is_empty() {
                return Ok(());
            }
            wait(changes);
        }
    }

    /// Jobs that were left to the wallet and are not over.
    fn due(&self) -> Result<Vec<Job>, JobsError> {
        let mut jobs = self.cluster.jobs.list()?;
        jobs.retain(|job| job.kept && job.settled.is_none() && job.context == self.cluster.name);
        Ok(jobs)
    }

    fn tend(&mut self, job: Job) -> Result<()> {
        let (cluster, report) = (self.cluster.clone(), self.report.about(&job.short_id()));
        let (dismiss, dismissed) = channel();
        let id = job.id.0;
        let thread = std::thread::Builder::new()
            .name(job.short_id())
            .spawn(move || {
                if let Err(error) = tend(&cluster, &job, &report, &dismissed) {
                    report.warn(&format!("not paid: {error:#}"));
                    // Not at once again.
                    let _ = dismissed.recv_timeout(SETTLE_PERIOD);
                }
            })
            .context("cannot start a thread")?;
        self.tended.insert(id, Tended { dismiss: Some(dismiss), thread });
        Ok(())
    }
}

/// Waits until job files were written, or for [`LOOK_PERIOD`].
fn wait(changes: &OwnedFd) {
    // An error ends the wait, which is all that a time-out does.
    let _ = poll(&mut [PollFd::new(changes, PollFlags::IN)], Some(&LOOK_PERIOD));
    let mut buffer = [0; 4096];
    while rustix::io::read(changes, &mut buffer).is_ok_and(|size| size > 0) {}
}

/// Pays for a job until it is over, and settles it.
fn tend(cluster: &Cluster, job: &Job, report: &Report, dismissed: &Receiver<()>) -> Result<()> {
    let mut home = Home::new(Echo::open()?, cluster.broker.clone(), cluster.jobs.clone(), job);
    let followed =
        if job.has_agent && job.exit.is_none() { Some(follow(cluster, job)?) } else { None };
    let outcome = moving::pay(cluster, &mut home, job, report, dismissed);
    if let Some(remote) = followed {
        remote.detach();
    }
    if !matches!(outcome, Outcome::Over(_) | Outcome::Lost) {
        return Ok(());
    }
    settle::tell(cluster, job, report);
    while cluster.jobs.get(&job.id.0)?.settled.is_none() {
        match dismissed.recv_timeout(SETTLE_PERIOD) {
            // A failure is the broker's or the node's, and passes or stays: the next try tells.
            Err(RecvTimeoutError::Timeout) => drop(settle::settle(cluster, job, |_| {})),
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// Keeps what the program writes, and how it ends, in a thread that ends with the VM or when it is told.
fn follow(cluster: &Cluster, job: &Job) -> Result<Remote> {
    let file = cluster.jobs.output_file(&job.id.0);
    let out = || open(&file).with_context(|| format!("cannot write {}", file.display()));
    let [output, errors] = [Kept { file: out()? }, Kept { file: out()? }];
    // What a wallet before this one kept is not asked for again.
    let offset = output.file.metadata().map_or(0, |metadata| metadata.len());
    let session = Session::new(session::dial(&cluster.jobs, job), BOOT_PATIENCE)
        .while_away(session::is_away(&cluster.jobs, job));
    let remote = session.remote();
    let (jobs, job) = (cluster.jobs.clone(), job.clone());
    std::thread::spawn(move || {
        let streams = Streams { input: None, output: Box::new(output), errors: Box::new(errors) };
        let Ok(ended) = session.attach(offset, false, streams) else { return };
        let Some(exit) = ended.exit else { return };
        // It ended where its VM has moved by now; without a file, where it began.
        let job = jobs.current(&job.id.0).unwrap_or(job);
        note_exit(&jobs, &job.id.0, exit.shell_status());
        // Nothing is left to pay for: the job is stopped and settled.
        if let Ok(mut echo) = Echo::open() {
            let _ = job.handle().stop(&mut echo);
        }
    });
    Ok(remote)
}

fn note_exit(jobs: &Jobs, id: &JobId, status: u8) {
    // A full disk: the status is lost, and the payer goes on.
    let _ = jobs.update(id, |job| job.exit = Some(status));
}

/// A file that takes so much and no more.
struct Kept {
    file: File,
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.file.metadata()?.len() < OUTPUT_MAX {
            self.file.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
