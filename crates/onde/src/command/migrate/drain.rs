//! `onde migrate --drain NODE`: all of a customer's VMs leave a node, one after the other. Each goes where it fits, the
//! cheapest node first; where that refuses, the next one is tried.

use anyhow::Result;
use onde_client::api::Node;
use onde_client::echo::{Echo, Policy};
use onde_client::job::Job;
use onde_wire::machine::Stage;
use onde_wire::packet::JobStatus;

use super::{Told, one, tell};
use crate::cli::Migrate;
use crate::cluster::Cluster;
use crate::command::{price, sleep};
use crate::failure::{self, hinted};
use crate::report::Report;

/// Nodes that are tried for one VM: each that fails costs a few tokens.
const TRIES_MAX: usize = 3;

pub fn run(context: Option<&str>, from: u32, order: &Migrate, report: &Report) -> Result<()> {
    let cluster = Cluster::open(context)?;
    let mut jobs = cluster.jobs.list()?;
    jobs.retain(|job| {
        job.settled.is_none() && job.moved_to.is_none() && job.context == cluster.name
    });
    jobs.retain(|job| job.node == from);
    let mut failed = 0;
    for job in jobs {
        let left = leave(&cluster, &job, order, report);
        if let Err(error) = left.and_then(|told| tell(&told, order.json)) {
            failed += 1;
            report.warn(&format!("job {} stays on node {from}", job.short_id()));
            eprintln!("{}", failure::lines(&error));
        }
    }
    match failed {
        0 => Ok(()),
        _ => Err(hinted(
            format!("{failed} jobs are still on node {from}"),
            "onde ps lists them; onde stop ends one",
        )),
    }
}

/// Moves one job away. A VM that sleeps is woken up for it, and goes to sleep again where it is then.
fn leave(cluster: &Cluster, job: &Job, order: &Migrate, report: &Report) -> Result<Told> {
    let status = job.handle().status(&mut Echo::open()?, Policy::default())?;
    if let Some((why, hint)) = obstacle(job, &status) {
        return Err(hinted(format!("job {} {why}", job.short_id()), hint));
    }
    if status.stage != Stage::Suspended {
        return away(cluster, job, order, report);
    }
    sleep::wake(job)?;
    let told = away(cluster, job, order, report);
    let now = cluster.jobs.current(&job.id.0)?;
    if now.handle().suspend(&mut Echo::open()?).is_err() {
        let (id, node) = (now.short_id(), now.node);
        report.warn(&format!(
            "job {id} is awake on node {node}, which did not put it to sleep again"
        ));
    }
    told
}

/// Why a job cannot leave its node, and what to do.
fn obstacle(job: &Job, status: &JobStatus) -> Option<(&'static str, &'static str)> {
    match status.stage {
        Stage::Template => Some((
            "is a template, which stays where it is",
            "onde stop JOB; its clones live on; onde boot --from FILE --template makes one elsewhere",
        )),
        _ if !job.has_agent => {
            Some(("has no agent: it runs a kernel of your own", "onde stop JOB"))
        }
        Stage::Suspended if status.wake_micro > 0 => {
            Some(("is out of tokens, and on its node's disk", "onde pay JOB N wakes it up"))
        }
        Stage::Stopped => Some(("is over", "onde stop JOB gives the change")),
        _ => None,
    }
}

/// To the node asked for, or to the first that takes it.
fn away(cluster: &Cluster, job: &Job, order: &Migrate, report: &Report) -> Result<Told> {
    if let Some(to) = order.to {
        return one(cluster, job, to, order.json, report);
    }
    let mut failure = hinted("no other node has room for it", "onde node ls");
    for node in candidates(&cluster.broker.nodes()?, job).into_iter().take(TRIES_MAX) {
        match one(cluster, job, node, order.json, report) {
            Ok(told) => return Ok(told),
            Err(error) => {
                report.line(&format!("node {node} did not take it: {error:#}"));
                failure = error;
            }
        }
        // One whose end nobody saw may live elsewhere by now.
        if cluster.jobs.current(&job.id.0)?.id != job.id {
            break;
        }
    }
    Err(failure)
}

/// Nodes that the job fits on, in the order in which a broker would choose. What they have left of their disks only they
/// know.
fn candidates(nodes: &[Node], job: &Job) -> Vec<u32> {
    let rows = price::compare(nodes, &price::Shape::of(job), 1).into_iter();
    rows.filter(|row| row.has_room && row.node != job.node).map(|row| row.node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::price::tests::node;
    use crate::command::tests::{job, status};

    #[test]
    fn a_vm_goes_to_the_cheapest_node_that_it_fits_on() {
        let here = node(1, 100, 100, 4096);
        let (dear, cheap) = (node(2, 900, 100, 4096), node(3, 200, 100, 512));
        let (roomy, small) = (node(4, 200, 100, 1024), node(5, 100, 100, 511));
        let gone = Node { alive: false, ..node(6, 1, 1, 4096) };
        let slow = Node { cpus: 1, ..node(7, 1, 1, 4096) };
        let full = Node { slots_free: 0, ..node(8, 1, 1, 4096) };
        let nodes = [here, dear, cheap, roomy, small, gone, slow, full];
        let job = Job { node: 1, mem_mib: 512, vcpus: 2, ..job() };
        assert_eq!(candidates(&nodes, &job), [4, 3, 2]);
        assert!(candidates(&nodes[..1], &job).is_empty());
    }

    /// What keeps a job on its node, in this stage and with so much to pay before it wakes up.
    fn check(job: &Job, stage: Stage, wake_micro: u64, expect: Option<&str>) {
        let status = JobStatus { wake_micro, ..status(stage) };
        let why = obstacle(job, &status).map(|(why, _)| why);
        assert!(why.zip(expect).map_or(why == expect, |(a, b)| a.contains(b)), "{why:?}");
    }

    #[test]
    fn what_cannot_leave_is_named_for_what_it_is() {
        let (packed, own) = (job(), Job { has_agent: false, ..job() });
        check(&packed, Stage::Running, 0, None);
        check(&packed, Stage::Low, 0, None);
        check(&packed, Stage::Suspended, 0, None);
        check(&packed, Stage::Suspended, 1, Some("out of tokens"));
        check(&packed, Stage::Stopped, 0, Some("is over"));
        check(&own, Stage::Template, 0, Some("template"));
        check(&own, Stage::Running, 0, Some("kernel of your own"));
    }
}
