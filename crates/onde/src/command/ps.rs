//! `onde ps`: the user's jobs. Open ones are asked for at their nodes; what the broker has settled meanwhile is
//! noted in their files.

use anyhow::Result;
use onde_client::echo::{Echo, Policy};
use onde_client::job::Job;
use onde_wire::machine::Stage;
use onde_wire::packet::JobStatus;
use serde::Serialize;
use std::time::Duration;

use super::{print, print_json};
use crate::cluster::{Cluster, jobs};
use crate::moving;
use crate::report::Report;
use crate::table::{cost, rate, render, span};

/// One lost packet must not make a node look silent, and a silent one not hold the list up.
const POLICY: Policy = Policy { tries: 2, first: Duration::from_millis(300) };

#[derive(Serialize)]
struct Row {
    id: String,
    name: Option<String>,
    program: String,
    context: String,
    node: u32,
    guest: std::net::Ipv4Addr,
    /// The stage; `settled`, `silent` for no answer, or `elsewhere` for a job of another context.
    state: String,
    exit: Option<u8>,
    opened_at: u64,
    spent_micro: Option<u64>,
    balance_micro: Option<u64>,
    burn_micro_per_s: Option<u64>,
    /// Payment tokens bought, and the most that will be.
    sold: u32,
    budget: u32,
    seconds_left: Option<u64>,
    /// Seconds until balance and budget are used up at the present rate.
    dry_s: Option<u64>,
    /// Why its node is not paid any more, where it was found cheating.
    distrust: Option<String>,
}

/// A job that runs dry within this time is worth a warning, seconds.
const DRY_S: u64 = 60;

pub fn run(context: Option<&str>, all: bool, with_cost: bool, json: bool) -> Result<()> {
    let mut list = jobs()?.list()?;
    list.retain(|job| all || job.settled.is_none());
    let has_open = list.iter().any(|job| job.settled.is_none());
    let cluster = if has_open { Some(Cluster::open(context)?) } else { None };
    let mut echo = if has_open { Some(Echo::open()?) } else { None };
    let mut rows = Vec::new();
    for job in list {
        let row = look(cluster.as_ref(), echo.as_mut(), job)?;
        rows.extend(Some(row).filter(|row| all || row.state != "settled"));
    }
    if json {
        return print_json(&rows);
    }
    print(&if with_cost { cost_table(&rows) } else { table(&rows) })?;
    rows.iter().filter_map(warning).for_each(|text| Report::new(false).warn(&text));
    Ok(())
}

/// What the customer has to know of a job now.
fn warning(row: &Row) -> Option<String> {
    let id = &row.id[..8];
    if let Some(why) = &row.distrust {
        return Some(format!("job {id} is not paid any more, its node cheats: {why}"));
    }
    let dry = span(row.dry_s.filter(|dry_s| *dry_s < DRY_S)?);
    Some(format!("job {id} runs dry in {dry}, its budget spent; onde pay {id} N lifts it"))
}

/// How a job stands now.
fn look(cluster: Option<&Cluster>, echo: Option<&mut Echo>, mut job: Job) -> Result<Row> {
    let (Some(cluster), Some(echo)) = (cluster, echo) else {
        return Ok(row(&job, "settled", None));
    };
    if job.settled.is_some() {
        return Ok(row(&job, "settled", None));
    }
    if job.context != cluster.name {
        return Ok(row(&job, "elsewhere", None));
    }
    let status = job.handle().status(echo, POLICY);
    // A move whose command did not live to see its end.
    if let Ok(Some(moved)) = moving::finish(cluster, &job, &status) {
        job = moved;
        if job.settled.is_some() {
            return Ok(row(&job, "settled", None));
        }
    }
    if let Ok(status) = status
        && status.stage != Stage::Stopped
    {
        return Ok(row(&job, status.stage.name(), Some(&status)));
    }
    // The broker may be away, too; then the node's silence is all there is to tell.
    if let Ok(told) = cluster.broker.job(&job.id.0)
        && told.settled_by.is_some()
    {
        job = cluster.jobs.update(&job.id.0, |job| job.settle(&told))?;
        return Ok(row(&job, "settled", None));
    }
    Ok(row(&job, "silent", None))
}

fn row(job: &Job, state: &str, status: Option<&JobStatus>) -> Row {
    let settled = job.settled.map(|settled| settled.paid_micro - settled.refund_micro);
    Row {
        id: job.id.to_string(),
        name: job.name.clone(),
        program: job.title.clone(),
        context: job.context.clone(),
        node: job.node,
        guest: job.guest_ipv4,
        state: state.to_owned(),
        exit: job.exit,
        opened_at: job.opened_at,
        spent_micro: status.map(|status| status.spent_micro).or(settled),
        balance_micro: status.map(|status| status.balance_micro),
        burn_micro_per_s: status.map(|status| status.burn_micro_per_s),
        sold: job.sold,
        budget: job.budget,
        // What is over has nothing left to wait for.
        seconds_left: status.filter(|status| lives(status)).map(|status| status.seconds_left),
        dry_s: status.and_then(|status| dry_s(job, status)),
        distrust: job.distrust.clone().filter(|_| status.is_some()),
    }
}

fn lives(status: &JobStatus) -> bool {
    status.stage.is_alive() || status.stage == Stage::Suspended
}

/// Seconds that balance and budget last at the present rate; `None` where nothing burns.
fn dry_s(job: &Job, status: &JobStatus) -> Option<u64> {
    let tokens = u64::from(job.budget.max(job.sold).saturating_sub(status.last_index));
    let micro = tokens.saturating_mul(job.value_micro).saturating_add(status.balance_micro);
    micro.checked_div(status.burn_micro_per_s)
}

/// The stage, and how the program ended where it did.
fn state(row: &Row) -> String {
    match row.exit {
        Some(exit) => format!("{}, exit {exit}", row.state),
        None => row.state.clone(),
    }
}

fn cost_table(rows: &[Row]) -> String {
    let cells = |row: &Row| {
        let text = |value: Option<String>| value.unwrap_or_default();
        vec![
            row.id[..8].to_owned(),
            text(row.name.clone()),
            state(row),
            text(row.burn_micro_per_s.map(rate)),
            text(row.spent_micro.map(cost)),
            row.sold.to_string(),
            row.budget.to_string(),
            text(row.dry_s.map(span)),
            row.program.clone(),
        ]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    let head =
        ["JOB", "NAME", "STATE", "A SECOND", "SPENT", "BOUGHT", "BUDGET", "DRY IN", "PROGRAM"];
    render(&head, &cells)
}

fn table(rows: &[Row]) -> String {
    let cells = |row: &Row| {
        let text = |value: Option<String>| value.unwrap_or_default();
        vec![
            row.id[..8].to_owned(),
            text(row.name.clone()),
            row.node.to_string(),
            row.guest.to_string(),
            state(row),
            text(row.spent_micro.map(cost)),
            text(row.seconds_left.map(span)),
            row.program.clone(),
        ]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    render(&["JOB", "NAME", "NODE", "GUEST", "STATE", "SPENT", "LEFT", "PROGRAM"], &cells)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{job, status};

    /// A running VM that burns a token a second, with so many tokens left, of which so many may still be bought.
    fn check(balance: u64, unbought: u32, expect: Option<&str>) {
        let job = Job { budget: 30 + unbought, ..job() };
        let status = JobStatus {
            last_index: 30,
            balance_micro: balance * 1_000_000,
            burn_micro_per_s: 1_000_000,
            ..status(Stage::Running)
        };
        assert_eq!(warning(&row(&job, "running", Some(&status))).as_deref(), expect);
    }

    #[test]
    fn warns_before_a_job_runs_dry() {
        check(
            59,
            0,
            Some("job a1a1a1a1 runs dry in 59s, its budget spent; onde pay a1a1a1a1 N lifts it"),
        );
        check(60, 0, None);
        check(20, 40, None);
        check(
            20,
            39,
            Some("job a1a1a1a1 runs dry in 59s, its budget spent; onde pay a1a1a1a1 N lifts it"),
        );
        check(
            0,
            0,
            Some("job a1a1a1a1 runs dry in 0s, its budget spent; onde pay a1a1a1a1 N lifts it"),
        );
    }

    #[test]
    fn an_idle_job_never_runs_dry_and_a_cheat_is_named() {
        let idle = row(&job(), "running", Some(&status(Stage::Running)));
        assert_eq!((idle.dry_s, warning(&idle)), (None, None));
        assert_eq!(warning(&row(&job(), "silent", None)), None);
        let robbed = Job { distrust: Some("it took 7".to_owned()), ..job() };
        let told = warning(&row(&robbed, "running", Some(&status(Stage::Running))));
        assert_eq!(
            told.as_deref(),
            Some("job a1a1a1a1 is not paid any more, its node cheats: it took 7")
        );
    }
}
