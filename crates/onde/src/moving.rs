//! What job files say of a VM that moves: the new job's is written before anything is sent and names the old one, the old
//! one's names the new when the new VM has lived, and only then is the old VM stopped for its change. Whoever
//! finds a move half done asks the new VM's node, and goes on from there. `migrate`, `ps` and whoever pays call it.

use anyhow::Result;
use onde_client::echo::{Echo, Policy};
use onde_client::home::{Home, STEP_PERIOD};
use onde_client::job::{JOBS_MAX, Job};
use onde_client::migration::Word;
use onde_client::node::NodeError;
use onde_wire::packet::JobStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError};

use crate::cluster::Cluster;
use crate::payer::{self, Outcome};
use crate::progress::Progress;
use crate::report::Report;
use crate::settle;

/// Goes on with the move to `new`, as far as `answer`, its node's to STATUS, allows; the new job as it is then. `None`
/// where there is nothing to do, or nothing to do yet.
pub fn finish(
    cluster: &Cluster,
    new: &Job,
    answer: &Result<JobStatus, NodeError>,
) -> Result<Option<Job>> {
    let Some(old) = new.moves.filter(|_| new.settled.is_none()) else { return Ok(None) };
    let old = cluster.jobs.list()?.into_iter().find(|job| job.id == old);
    // Known to have moved, and settled: the usual case.
    let is_done = |old: &Job| old.moved_to.is_some() && old.settled.is_some() && !new.inherits;
    let Some(old) = old.filter(|old| !is_done(old)) else { return Ok(None) };
    match Word::of_status(answer) {
        Some(Word::Lived) => moved(cluster, &old, new).map(Some),
        Some(Word::Never) if old.moved_to.is_none() => {
            settle::settle(cluster, new, |_| {})?;
            cluster.jobs.reckon(&old.id.0)?;
            Ok(Some(cluster.jobs.get(&new.id.0)?))
        }
        _ => Ok(None),
    }
}

/// Pays for a VM as [`payer::run`] does, wherever it moves meanwhile, also by itself: then the payer is who notes it. A VM
/// that was to move and whose new node is silent may live there: that is asked on until somebody knows.
pub fn pay(
    cluster: &Cluster,
    home: &mut Home,
    job: &Job,
    report: &Report,
    dismissed: &Receiver<()>,
) -> Outcome {
    // No VM moves more often than there are files; an answer that is awaited counts for nothing.
    let mut moves = 1;
    while moves < JOBS_MAX {
        let outcome = payer::run(home, Progress::of(job), report, dismissed);
        if outcome == Outcome::Dismissed {
            return outcome;
        }
        // The one that the home node saw end: its file may name another by now.
        let now = home.job().map_err(anyhow::Error::from).and_then(|over| moved_to(cluster, &over));
        match now {
            Ok(Some(Moved::To(now))) => {
                moves += 1;
                payer::tell_time_to(&now);
            }
            Ok(Some(Moved::Nowhere)) => return outcome,
            // Whoever takes it for dead now would end the copy.
            Ok(None) | Err(_) => {
                if !matches!(dismissed.recv_timeout(STEP_PERIOD), Err(RecvTimeoutError::Timeout)) {
                    return Outcome::Dismissed;
                }
            }
        }
    }
    Outcome::Dismissed
}

/// Where a VM is whose job is over.
enum Moved {
    /// It lives on as this job.
    To(Box<Job>),
    /// It is over, too.
    Nowhere,
}

/// Where the VM of a job that is over is. `None` where a new node was to take it and has not said.
fn moved_to(cluster: &Cluster, over: &Job) -> Result<Option<Moved>> {
    let mut echo = Echo::open()?;
    let jobs = cluster.jobs.list()?;
    let mut is_sure = true;
    for new in jobs.iter().filter(|new| new.moves == Some(over.id) && new.settled.is_none()) {
        let answer = new.handle().status(&mut echo, Policy::default());
        is_sure &= finish(cluster, new, &answer)?.is_some()
            || (Word::of_status(&answer).is_none() && is_settled(cluster, new)?);
    }
    let now = cluster.jobs.current(&over.id.0)?;
    match now.id == over.id {
        true => Ok(is_sure.then_some(Moved::Nowhere)),
        false => Ok(Some(Moved::To(Box::new(now)))),
    }
}

/// Whether the broker has settled a job whose node says nothing; then nothing is left of it, wherever it was.
fn is_settled(cluster: &Cluster, job: &Job) -> Result<bool> {
    let told = cluster.broker.job(&job.id.0)?;
    Ok(cluster.jobs.update(&job.id.0, |job| job.settle(&told))?.settled.is_some())
}

/// The new VM has lived: it takes the old one's place, and the old one gives change.
pub fn moved(cluster: &Cluster, old: &Job, new: &Job) -> Result<Job> {
    let new = cluster.jobs.update(&new.id.0, |job| {
        // Where this was begun before, the old one's name is gone.
        job.name = old.name.clone().or(job.name.take());
        job.title = old.title.clone();
        // Before the old one is settled: a wallet without any job ends.
        job.kept = old.kept;
        job.watch = old.watch.clone();
        job.purse = old.purse;
    })?;
    cluster.jobs.update(&old.id.0, |job| {
        job.moved_to = Some(new.id);
        // Two open jobs with one name would be one too many.
        job.name = None;
    })?;
    // A silent node is settled by the broker later; the VM lives elsewhere.
    settle::settle(cluster, old, |_| {})?;
    Ok(cluster.jobs.reckon(&new.id.0)?)
}
