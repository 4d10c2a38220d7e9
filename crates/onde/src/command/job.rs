//! `onde status`, `onde pay` and `onde stop`: one job's meters and money.

use anyhow::Result;
use onde_client::echo::{Echo, Policy};
use onde_client::home::Home;
use onde_client::job::Job;
use onde_wire::packet::{EndReason, JobStatus};
use onde_wire::token::Certificate;
use serde::Serialize;

use super::{print, print_json};
use crate::cluster::Cluster;
use crate::failure::hinted;
use crate::report::Report;
use crate::settle;
use crate::table::{cost, span, tokens};

#[derive(Serialize)]
struct Told {
    id: String,
    name: Option<String>,
    program: String,
    node: u32,
    guest: std::net::Ipv4Addr,
    stage: &'static str,
    end: Option<&'static str>,
    tokens_paid: u32,
    budget: u32,
    balance_micro: u64,
    spent_micro: u64,
    burn_micro_per_s: u64,
    /// Until it goes to disk, or is purged where it cannot; on disk: until it is purged.
    seconds_left: u64,
    /// Until it is purged.
    purge_s: u64,
    /// What to pay before it wakes up by itself.
    wake_micro: u64,
    age_ms: u64,
    cpu_us: u64,
    mem_mib_ms: u64,
    sent_bytes: u64,
    disk_mib_ms: u64,
}

pub fn status(name: &str, json: bool) -> Result<()> {
    let (_cluster, job) = Cluster::open_for(name)?;
    if let Some(settled) = &job.settled {
        return match json {
            true => print_json(settled),
            false => print(&(settle::words(&job, settled) + "\n")),
        };
    }
    let status = job.handle().status(&mut Echo::open()?, Policy::default())?;
    let told = told(&job, &status);
    if json { print_json(&told) } else { print(&text(&told)) }
}

fn told(job: &Job, status: &JobStatus) -> Told {
    Told {
        id: job.id.to_string(),
        name: job.name.clone(),
        program: job.title.clone(),
        node: job.node,
        guest: job.guest_ipv4,
        stage: status.stage.name(),
        end: end_words(status.end),
        tokens_paid: status.last_index,
        budget: job.budget,
        balance_micro: status.balance_micro,
        spent_micro: status.spent_micro,
        burn_micro_per_s: status.burn_micro_per_s,
        seconds_left: status.seconds_left,
        purge_s: status.purge_s,
        wake_micro: status.wake_micro,
        age_ms: status.age_ms,
        cpu_us: status.cpu_us,
        mem_mib_ms: status.mem_mib_ms,
        sent_bytes: status.sent_bytes,
        disk_mib_ms: status.disk_mib_ms,
    }
}

/// Why a VM is over, in words.
pub fn end_words(end: EndReason) -> Option<&'static str> {
    match end {
        EndReason::None => None,
        EndReason::PowerOff => Some("the guest powered off"),
        EndReason::Reset => Some("the guest reset itself or crashed"),
        EndReason::BootTimeout => Some("nothing valid was sent to it in time"),
        EndReason::Fault => Some("its VMM failed"),
        EndReason::Stopped => Some("it was stopped"),
        EndReason::OutOfTokens => Some("its balance reached zero"),
        EndReason::OutOfMemory => Some("it wrote more memory than it had bought"),
    }
}

fn text(told: &Told) -> String {
    let name = told.name.as_deref().map_or(String::new(), |name| format!(" ({name})"));
    let end = told.end.map_or(String::new(), |end| format!(": {end}"));
    let seconds = |micro: u64| micro as f64 / 1e6;
    format!(
        "job      {}{name}\nprogram  {}\nguest    {} on node {}\nstage    {}{end}\n\
         balance  {} tokens, {}\nspent    {} of {} paid, budget {}\n\
         meters   {:.1} s alive, {:.2} s of processor, {:.3} GiB-s of memory, {} KiB sent, \
         {:.3} GiB-s of disk\n",
        told.id,
        told.program,
        told.guest,
        told.node,
        told.stage,
        tokens(told.balance_micro),
        left(told),
        cost(told.spent_micro),
        told.tokens_paid,
        told.budget,
        told.age_ms as f64 / 1e3,
        seconds(told.cpu_us),
        told.mem_mib_ms as f64 / 1024.0 / 1e3,
        told.sent_bytes >> 10,
        told.disk_mib_ms as f64 / 1024.0 / 1e3,
    )
}

/// How long the balance lasts, and what comes then.
fn left(told: &Told) -> String {
    let (left, rate) = (span(told.seconds_left), cost(told.burn_micro_per_s));
    let text = format!("{left} left at {rate} a second");
    match told.stage {
        "suspended" if told.wake_micro > 0 => {
            format!("{left} on disk left; {} more wake it up", cost(told.wake_micro))
        }
        "suspended" => format!("{left} on disk left; onde resume wakes it up"),
        "booting" | "running" | "low" if told.purge_s > told.seconds_left => {
            format!("{text}, then {} on disk", span(told.purge_s.saturating_sub(told.seconds_left)))
        }
        "booting" | "running" | "low" => format!("{text}, then it is purged"),
        _ => "nothing is charged any more".to_owned(),
    }
}

pub fn pay(name: &str, count: u32, report: &Report) -> Result<()> {
    let (cluster, job) = Cluster::open_for(name)?;
    if job.settled.is_some() {
        return Err(hinted(
            format!("job {} is settled", job.short_id()),
            "onde ps lists open ones",
        ));
    }
    let mut home = Home::new(Echo::open()?, cluster.broker, cluster.jobs, &job);
    let balance = tokens(home.pay(count)?.balance_micro);
    report.line(&format!("job {} has {balance} tokens left", job.short_id()));
    Ok(())
}

fn certified(certificate: &Certificate) -> String {
    let Certificate { last_index, spent_micro, unused_micro, .. } = *certificate;
    let (spent, unused) = (cost(spent_micro), tokens(unused_micro));
    format!("{last_index} tokens taken, {spent} spent, {unused} unused")
}

pub fn stop(name: &str, report: &Report) -> Result<()> {
    let (cluster, job) = Cluster::open_for(name)?;
    let settled = match job.settled {
        Some(settled) => Some(settled),
        None => settle::settle(&cluster, &job, |certificate| {
            report.line(&format!("node {} certifies: {}", job.node, certified(certificate)));
        })?,
    };
    match settled {
        Some(settled) => print(&(settle::words(&job, &settled) + "\n")),
        None => Err(hinted(
            format!("job {} has no certificate: its node is silent or restarted", job.short_id()),
            "the broker credits what was not spent within minutes; see onde ps",
        )),
    }
}
