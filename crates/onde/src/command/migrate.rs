//! `onde migrate`: has a running VM move itself to another node. This process buys the new VM, pays for it meanwhile,
//! watches, and collects the old one's change. The VM needs nothing of it once it has the ticket.
//!
//! ```text
//!   buy -> file of the new job -> MIGRATE -> rounds ... -> MOVED ----------> file of the old job -> STOP the old VM
//!                                    |            '------> ERROR ----------> STOP the new VM
//!                                    '--> connection lost --> the new node is asked until it knows
//! ```

mod drain;
mod watch;

use anyhow::{Context, Result};
use onde_client::api::{Hex, JobOpened, JobRequest, NodeChoice};
use onde_client::bootstrap;
use onde_client::broker::new_key;
use onde_client::echo::{Echo, Policy};
use onde_client::fork::ticket;
use onde_client::home::{Home, STEP_PERIOD};
use onde_client::job::Job;
use onde_client::job::budget::PART_MIN;
use onde_client::migration::Word;
use onde_client::mover::{self, Ended};
use onde_client::snapshot::tell_time;
use onde_wire::key::sha256;
use onde_wire::packet::Status;
use serde::Serialize;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::{print, session, sleep};
use crate::cli::Migrate;
use crate::cluster::Cluster;
use crate::failure::hinted;
use crate::launch::{buy, loader, payment};
use crate::report::Report;
use crate::{moving, settle};
use watch::Watch;

/// How long a running guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the new node is asked when the guest says nothing any more: a new VM that gets nothing is given up by its
/// node after 90 s, and one that may live after the source's own patience.
const DOUBT: Duration = Duration::from_secs(150);
const DOUBT_PERIOD: Duration = Duration::from_millis(500);
/// How long a ticket is good for, seconds: the time in which a boot token has to be shown.
const TICKET_S: u64 = 120;

#[derive(Serialize)]
struct Told {
    event: &'static str,
    job: String,
    from: String,
    node: u32,
    seconds: f64,
    /// The longest time in which the VM can have been silent; unknown where the connection broke.
    silence_ms: Option<f64>,
    rounds: u32,
    sent_bytes: u64,
}

pub fn run(context: Option<&str>, order: &Migrate, report: &Report) -> Result<()> {
    let Some(drained) = order.drain else {
        let name = order.job.as_deref().unwrap_or_default();
        let (cluster, job) = session::open(name)?;
        let node = order.node.context("no node to move to")?;
        return tell(&one(&cluster, &job, node, order.json, report)?, order.json);
    };
    drain::run(context, drained, order, report)
}

fn tell(told: &Told, is_json: bool) -> Result<()> {
    if is_json { print_line(told) } else { print(&text(told)) }
}

fn one(cluster: &Cluster, old: &Job, node: u32, is_json: bool, report: &Report) -> Result<Told> {
    if old.node == node {
        return Err(hinted(
            format!("job {} is on node {node} already", old.short_id()),
            "onde node ls lists others",
        ));
    }
    settle_earlier(cluster, old)?;
    let begun = Instant::now();
    let (opened, new) = buy_for(cluster, old, node, None, 0)?;
    report.line(&format!("job {} goes to node {node} as {}", old.short_id(), new.short_id()));
    let (dismiss, dismissed) = channel();
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| pay(cluster, &new, dismissed));
        let watch = Watch::new(report, old, is_json);
        let ended = go(old, &ticket(&opened), watch);
        drop(dismiss);
        ended
    });
    let (ended, watch) = ended;
    let silence = match ended {
        Ended::Moved(silence) => Some(silence),
        Ended::Stayed(why) => {
            stayed(cluster, old, &new, report)?;
            return Err(hinted(
                format!("job {} stays on node {}: {why}", old.short_id(), old.node),
                "nothing is lost but a few tokens; try again, or another node",
            ));
        }
        Ended::Unknown(error) => {
            report.line(&format!("the guest says nothing any more ({error}); asking node {node}"));
            judge(cluster, old, &new)?;
            None
        }
    };
    let new = moving::moved(cluster, old, &new)?;
    if let Ok(channel) = bootstrap::connect(&new.handle(), new.guest_ipv4, PATIENCE) {
        // A clock that is behind by the silence is no reason to fail.
        let _ = tell_time(channel);
    }
    Ok(Told {
        event: "moved",
        job: new.short_id(),
        from: old.short_id(),
        node,
        seconds: begun.elapsed().as_secs_f64(),
        silence_ms: silence.map(|silence| silence.as_secs_f64() * 1e3),
        rounds: watch.rounds(),
        sent_bytes: watch.sent_bytes(),
    })
}

/// The VM goes on where it was: the new job gives change, and its part of the budget comes back.
fn stayed(cluster: &Cluster, old: &Job, new: &Job, report: &Report) -> Result<()> {
    settle::tell(cluster, new, report);
    if cluster.jobs.get(&new.id.0)?.settled.is_none() {
        let answer = new.handle().status(&mut Echo::open()?, Policy::default());
        // Its boot token was not taken, and the guest has given it up; the broker settles it when it has expired.
        if answer.is_err_and(|error| error.refusal() == Some(Status::NoJob)) {
            cluster.jobs.forgo(&old.id.0, &new.id.0)?;
        }
    }
    cluster.jobs.reckon(&old.id.0)?;
    Ok(())
}

/// `onde resume JOB --node NODE`: wakes the VM up where it sleeps, and moves it.
pub fn wake_on(name: &str, node: u32, report: &Report) -> Result<()> {
    let (cluster, job) = session::open(name)?;
    sleep::wake(&job)?;
    if job.node == node {
        return print(&format!("job {} runs on node {node}\n", job.short_id()));
    }
    report.line(&format!("job {} is awake on node {}", job.short_id(), job.node));
    let there = || format!("job {} is awake, and runs on node {}", job.short_id(), job.node);
    tell(&one(&cluster, &job, node, false, report).with_context(there)?, false)
}

/// Buys the VM to move to, and notes it in a file before anything is sent: whatever happens, the job is found again.
fn buy_for(
    cluster: &Cluster,
    old: &Job,
    node: u32,
    tokens: Option<u32>,
    wait_s: u64,
) -> Result<(JobOpened, Job)> {
    let old = &cluster.jobs.reckon(&old.id.0)?;
    let status = old.handle().status(&mut Echo::open()?, Policy::default())?;
    let part = |old: &Job| old.part(&status, tokens.unwrap_or(PART_MIN), wait_s);
    let spent = |left| {
        let id = old.short_id();
        let text =
            format!("job {id} has {left} tokens of its budget left, a move takes {PART_MIN}");
        hinted(text, "onde pay JOB N adds to the budget")
    };
    let (first, budget) = payment(tokens, Some(part(old).map_err(spent)?));
    let request = JobRequest {
        idempotency_key: new_key()?,
        node: Some(NodeChoice::Number(node)),
        mem_mib: old.mem_mib,
        vcpus: old.vcpus,
        disk_mib: old.disk_mib,
        net_kib_s: 0,
        loader_sha256: Hex(sha256(&loader()?)),
        tokens: first,
        moves: Some(old.id),
        template: false,
        clones: None,
    };
    let opened = buy(&cluster.broker, &request)?;
    let mut new = Job::new(&opened, &old.title, &cluster.name, budget);
    new.has_agent = true;
    // Its boot token is shown to nobody where this fails: the broker gives all of it back.
    let _turn = cluster.jobs.turn(&old.id.0)?;
    let new = cluster.jobs.split(&old.id.0, &new, part)?;
    let new = new.ok_or_else(|| {
        let text = format!("job {} used up its budget meanwhile", old.short_id());
        hinted(text, "onde pay JOB N adds to the budget")
    })?;
    Ok((opened, new))
}

/// Prints a ticket with which a VM moves itself, when it wants to: `onde-agent migrate --token TICKET`, inside.
pub fn print_ticket(name: &str, node: u32, tokens: u32) -> Result<()> {
    let (cluster, old) = session::open(name)?;
    settle_earlier(&cluster, &old)?;
    let (opened, _) = buy_for(&cluster, &old, node, Some(tokens), TICKET_S)?;
    let bytes = ticket(&opened).emit();
    print(&(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n"))
}

/// A move of this job that nobody saw the end of.
fn settle_earlier(cluster: &Cluster, old: &Job) -> Result<()> {
    let jobs = cluster.jobs.list()?;
    let earlier = jobs.iter().filter(|job| job.moves == Some(old.id) && job.settled.is_none());
    for job in earlier {
        let answer = job.handle().status(&mut Echo::open()?, Policy::default());
        let (id, now) = (old.short_id(), moving::finish(cluster, job, &answer)?);
        if now.is_none_or(|job| job.settled.is_none()) {
            return Err(hinted(
                format!("job {id} moves already, as {}", job.short_id()),
                "onde ps tells how it stands; one that got stuck ends within two minutes",
            ));
        }
    }
    Ok(())
}

/// Pays for the new VM while it is filled.
fn pay(cluster: &Cluster, new: &Job, dismissed: Receiver<()>) {
    let Ok(echo) = Echo::open() else { return };
    let mut home = Home::new(echo, cluster.broker.clone(), cluster.jobs.clone(), new);
    while let Err(RecvTimeoutError::Timeout) = dismissed.recv_timeout(STEP_PERIOD) {
        // Before BOOT there is nothing to pay for; a later failure shows in the move itself.
        let _ = home.step(true);
    }
}

fn go(old: &Job, ticket: &onde_wire::session::Ticket, mut watch: Watch) -> (Ended, Watch) {
    match bootstrap::connect(&old.handle(), old.guest_ipv4, PATIENCE) {
        Ok(channel) => (mover::migrate(channel, ticket, |event| watch.hear(event)), watch),
        Err(error) => (Ended::Stayed(format!("its agent does not answer: {error}")), watch),
    }
}

/// Asks the new node until it is sure that the new VM lives. Errors: it never will, or nobody knows yet.
fn judge(cluster: &Cluster, old: &Job, new: &Job) -> Result<()> {
    let (begun, mut echo) = (Instant::now(), Echo::open()?);
    while begun.elapsed() < DOUBT {
        match Word::of_status(&new.handle().status(&mut echo, Policy::default())) {
            Some(Word::Lived) => return Ok(()),
            Some(Word::Never) => {
                settle::settle(cluster, new, |_| {})?;
                let text = format!("job {} did not move to node {}", old.short_id(), new.node);
                return Err(hinted(text, "onde ps tells how it stands"));
            }
            // Nothing else would tell.
            _ => std::thread::sleep(DOUBT_PERIOD),
        }
    }
    Err(hinted(
        format!(
            "nobody knows yet whether job {} moved: node {} is silent",
            old.short_id(),
            new.node
        ),
        "onde ps finds out as soon as it answers; the VM lives on one of the two, or waits",
    ))
}

/// One line of JSON.
fn print_line(told: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string(told)? + "\n"))
}

fn text(told: &Told) -> String {
    let silence =
        told.silence_ms.map_or(String::new(), |ms| format!("; silent for {ms:.0} ms at most"));
    format!(
        "job {} moved to node {} as {} in {:.1} s, {} rounds, {:.1} MiB{silence}\n",
        told.from,
        told.node,
        told.job,
        told.seconds,
        told.rounds,
        told.sent_bytes as f64 / f64::from(1 << 20),
    )
}
