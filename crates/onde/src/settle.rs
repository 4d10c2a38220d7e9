//! The end of a job: STOP gives the node's certificate, the broker takes it and gives the change. Where the node
//! cannot certify any more, the broker settles by what it saw, and this waits a moment to tell how.

use anyhow::Result;
use onde_client::api::{self, SettledBy};
use onde_client::echo::Echo;
use onde_client::job::{Job, Settled};
use onde_client::node::NodeError;
use onde_wire::packet::Status;
use onde_wire::token::Certificate;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::failure;
use crate::report::Report;
use crate::table::{cost, tokens};

/// The broker asks its nodes every second or so, and gives a silent one up after a minute: an answer
/// within this time is worth the wait, a minute is not.
const BROKER_PATIENCE: Duration = Duration::from_secs(8);
const BROKER_PERIOD: Duration = Duration::from_millis(500);

/// Ends the VM and collects the change; `show` sees the node's certificate. `None`: the broker has not settled
/// the job yet, and will.
pub fn settle(
    cluster: &Cluster,
    job: &Job,
    show: impl FnOnce(&Certificate),
) -> Result<Option<Settled>> {
    let mut echo = Echo::open()?;
    let told = match job.handle().stop(&mut echo) {
        Ok(certificate) => {
            Certificate::claim(&certificate).as_ref().map(show);
            cluster.broker.redeem(&job.id.0, &certificate)?
        }
        Err(error) if is_gone(&error) => ask_broker(cluster, job)?,
        Err(error) => return Err(error.into()),
    };
    Ok(cluster.jobs.update(&job.id.0, |job| job.settle(&told))?.settled)
}

/// Whether the node has nothing to certify: it never saw the boot token, came up anew, or is off.
fn is_gone(error: &NodeError) -> bool {
    error.is_silence() || error.refusal() == Some(Status::NoJob)
}

fn ask_broker(cluster: &Cluster, job: &Job) -> Result<api::Job> {
    let deadline = Instant::now() + BROKER_PATIENCE;
    loop {
        let told = cluster.broker.job(&job.id.0)?;
        if told.settled_by.is_some() || Instant::now() >= deadline {
            return Ok(told);
        }
        // Nothing to wait for but the broker's next look at its nodes.
        std::thread::sleep(BROKER_PERIOD);
    }
}

/// Settles, and says how it went. A failure is told, not returned: whoever calls this ends something else.
pub fn tell(cluster: &Cluster, job: &Job, report: &Report) {
    match settle(cluster, job, |_| {}) {
        Ok(Some(settled)) => report.line(&words(job, &settled)),
        Ok(None) => report.warn(&format!(
            "job {} is not settled yet: its node gives no certificate, so the broker will credit what was \
             not spent within minutes",
            job.short_id()
        )),
        Err(error) => {
            let id = job.short_id();
            report.warn(&format!("job {id} is not settled; try `onde stop {id}`"));
            eprintln!("{}", failure::lines(&error));
        }
    }
}

/// What a job cost.
pub fn words(job: &Job, settled: &Settled) -> String {
    let spent = cost(settled.paid_micro.saturating_sub(settled.refund_micro));
    let change = tokens(settled.refund_micro);
    let how = match settled.by {
        SettledBy::Certificate => "",
        SettledBy::Unused => " (its boot token was never shown)",
        SettledBy::NodeRestarted => " (its node restarted: by the broker's last look)",
        SettledBy::NodeSilent => " (its node is silent: by the broker's last look)",
    };
    format!("job {} cost {spent} tokens, {change} came back{how}", job.short_id())
}
