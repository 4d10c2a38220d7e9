//! The home node of a detached job: a process of its own that pays, keeps the program's output in a file beside
//! the job's, and settles when the VM is over. It ends by itself, also when `onde stop` ended the VM.

use anyhow::{Context, Result};
use onde_client::bootstrap;
use onde_client::echo::Echo;
use onde_client::home::Home;
use onde_client::job::Job;
use onde_client::session::{Session, Streams};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::report::Report;
use crate::{payer, settle};

/// How long a packed guest may take from its first instruction to its agent, under emulation.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(90);
/// Output that is kept of a detached program, bytes; what comes after is dropped.
const OUTPUT_MAX: u64 = 64 << 20;

/// Starts the home node of `job` in the background.
pub fn spawn(cluster: &Cluster, job: &Job) -> Result<()> {
    let log = cluster.jobs.log_file(&job.id.0);
    let log = open(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let onde = std::env::current_exe().context("cannot tell where this program is")?;
    Command::new(onde)
        .arg("home")
        .arg(job.id.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/")
        .spawn()
        .context("cannot start the home node")?;
    Ok(())
}

/// The file that a detached program's output is kept in.
pub fn output_file(cluster: &Cluster, job: &Job) -> PathBuf {
    cluster.jobs.log_file(&job.id.0).with_extension("out")
}

fn open(file: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(file)
}

/// Is the home node of `name`.
pub fn run(name: &str) -> Result<()> {
    // A terminal that closes takes its own session along, and this is none of it any more.
    let _ = rustix::process::setsid();
    let (cluster, job) = Cluster::open_for(name)?;
    let report = Report::new(false);
    let mut home = Home::new(Echo::open()?, cluster.broker.clone(), cluster.jobs.clone(), &job);
    if job.has_agent {
        follow(&cluster, &job)?;
    }
    let (_dismiss, dismissed) = channel();
    payer::run(&mut home, &report, dismissed);
    let now = cluster.jobs.find(&job.id.to_string())?;
    if now.settled.is_none() {
        settle::tell(&cluster, &job, &report);
    }
    Ok(())
}

/// Keeps what the program writes, and how it ends, in a thread that ends with the process.
fn follow(cluster: &Cluster, job: &Job) -> Result<()> {
    let file = output_file(cluster, job);
    let out = || open(&file).with_context(|| format!("cannot write {}", file.display()));
    let kept = [Kept { file: out()? }, Kept { file: out()? }];
    let (jobs, id, handle, guest) = (cluster.jobs.clone(), job.id.0, job.handle(), job.guest_ipv4);
    std::thread::spawn(move || {
        let [output, errors] = kept;
        let dial = || bootstrap::connect(&handle, guest, Duration::ZERO);
        let streams = Streams { input: None, output: Box::new(output), errors: Box::new(errors) };
        let ended = Session::new(dial, BOOT_PATIENCE).attach(0, false, streams);
        if let Ok(exit) = ended.map(|ended| ended.exit) {
            // A full disk: the status is lost, and the payer goes on.
            let _ = jobs.update(&id, |job| job.exit = exit.map(|exit| exit.shell_status()));
        }
        // Nothing is left to pay for: the job is stopped and settled.
        if let Ok(mut echo) = Echo::open() {
            let _ = handle.stop(&mut echo);
        }
    });
    Ok(())
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
