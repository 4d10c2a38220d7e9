//! `onde suspend` and `onde resume`: a job's VM goes to its node's disk, where only storage is paid for, and goes on.

use anyhow::Result;
use onde_client::bootstrap;
use onde_client::echo::{Echo, Policy};
use onde_client::job::Job;
use onde_client::node::NodeError;
use onde_client::snapshot::tell_time;
use onde_wire::machine::Stage;
use onde_wire::packet::JobStatus;
use std::time::{Duration, Instant};

use super::print;
use crate::cluster::Cluster;
use crate::failure::hinted;
use crate::table::{cost, span, tokens};

/// The node gives up what takes it longer; a large VM on a slow disk is told of before.
const PATIENCE: Duration = Duration::from_secs(150);
const PERIOD: Duration = Duration::from_millis(300);
/// How long a guest that wakes up may take to answer.
const CLOCK_PATIENCE: Duration = Duration::from_secs(15);

pub fn suspend(name: &str) -> Result<()> {
    let (job, mut echo) = open(name)?;
    job.handle().suspend(&mut echo)?;
    let is_there = |status: &JobStatus| status.stage == Stage::Suspended;
    let status = until(&job, &mut echo, is_there, "is not on disk yet")?;
    print(&format!(
        "job {} is on the disk of node {}: {} tokens, {} a second, keep it there for {}\n",
        job.short_id(),
        job.node,
        tokens(status.balance_micro),
        cost(status.burn_micro_per_s),
        span(status.purge_s),
    ))
}

pub fn resume(name: &str) -> Result<()> {
    let (job, _) = open(name)?;
    let status = wake(&job)?;
    let left = span(status.seconds_left);
    print(&format!("job {} runs on node {}, {left} left\n", job.short_id(), job.node))
}

/// Wakes a VM up, and waits until it is awake. One that is awake goes on.
pub fn wake(job: &Job) -> Result<JobStatus> {
    let mut echo = Echo::open()?;
    job.handle().wake(&mut echo)?;
    let status = until(job, &mut echo, |status| status.stage.is_alive(), "is not awake yet")?;
    if job.has_agent {
        // Its clock stood still. A guest whose clock is wrong serves all the same.
        let awake = bootstrap::connect(&job.handle(), job.guest_ipv4, CLOCK_PATIENCE);
        let _ = awake.map(tell_time);
    }
    Ok(status)
}

fn open(name: &str) -> Result<(Job, Echo)> {
    let (_cluster, job) = Cluster::open_for(name)?;
    if job.settled.is_some() {
        let text = format!("job {} is settled", job.short_id());
        return Err(hinted(text, "onde ps lists open ones"));
    }
    Ok((job, Echo::open()?))
}

/// Asks until the job stands as it shall.
fn until(
    job: &Job,
    echo: &mut Echo,
    is_there: impl Fn(&JobStatus) -> bool,
    otherwise: &str,
) -> Result<JobStatus> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = job.handle().status(echo, Policy::default());
        match status {
            Ok(status) if is_there(&status) => return Ok(status),
            Ok(status) if !status.stage.is_alive() && status.stage != Stage::Suspended => {
                let why = super::job::end_words(status.end).unwrap_or("nobody knows why");
                let text = format!("job {} is over: {why}", job.short_id());
                return Err(hinted(text, "onde stop gives the change"));
            }
            Err(error) if !NodeError::is_silence(&error) => return Err(error.into()),
            _ if Instant::now() >= deadline => {
                let text = format!("job {} {otherwise}", job.short_id());
                return Err(hinted(text, "onde status tells how it stands"));
            }
            _ => std::thread::sleep(PERIOD),
        }
    }
}
