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
use crate::table::{cost, render, span};

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
    seconds_left: Option<u64>,
}

pub fn run(context: Option<&str>, all: bool, json: bool) -> Result<()> {
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
    print(&table(&rows))
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
    if let Ok(status) = job.handle().status(echo, POLICY)
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
        seconds_left: status.map(|status| status.seconds_left),
    }
}

fn table(rows: &[Row]) -> String {
    let cells = |row: &Row| {
        let text = |value: Option<String>| value.unwrap_or_default();
        vec![
            row.id[..8].to_owned(),
            text(row.name.clone()),
            row.node.to_string(),
            row.guest.to_string(),
            match row.exit {
                Some(exit) => format!("{}, exit {exit}", row.state),
                None => row.state.clone(),
            },
            text(row.spent_micro.map(cost)),
            text(row.seconds_left.map(span)),
            row.program.clone(),
        ]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    render(&["JOB", "NAME", "NODE", "GUEST", "STATE", "SPENT", "LEFT", "PROGRAM"], &cells)
}
