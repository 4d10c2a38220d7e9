//! `onde fork`: more VMs that are a running VM at one instant. The source's agent fills the first of them; these, their
//! programs still stopped, fill the next, and so on: a tree, so that time grows with its depth. This process buys each
//! VM just before it is made, pays for all until they are awake, and gives back those that fail.
//!
//! ```text
//!   source --FANOUT at a time--> VM --FANOUT--> VM ...      each: bought, filled, awake, [fills others], released
//! ```

use anyhow::{Context, Result};
use onde_client::api::{Hex, JobRequest, NodeChoice};
use onde_client::bootstrap;
use onde_client::broker::new_key;
use onde_client::echo::{Echo, Policy};
use onde_client::fork::{self, ticket};
use onde_client::home::{Home, STEP_PERIOD};
use onde_client::job::Job;
use onde_client::snapshot::tell_time;
use onde_wire::key::sha256;
use onde_wire::machine::Stage;
use onde_wire::session::{Taken, Ticket};
use serde::Serialize;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::{print, print_json, session};
use crate::cli::Fork;
use crate::cluster::Cluster;
use crate::interrupt::Interrupt;
use crate::launch::{buy, loader, payment};
use crate::report::Report;
use crate::{settle, wallet};

/// VMs that one machine fills at a time. A turn costs a fixed time (BOOT, loader, waking up) of about what filling one VM
/// costs, plus that for each VM, and leaves k + 1 machines where one was: (k + 1) / ln(k + 1) is least about two.
const FANOUT: u32 = 2;
/// How long a running guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a copy may take from its memory's last byte to its agent's first answer, on a busy emulated node.
const WAKE_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Told {
    source: String,
    seconds: f64,
    pause_ms: f64,
    made: Vec<Made>,
    failed: Vec<Failed>,
}

#[derive(Clone, Serialize)]
struct Made {
    job: String,
    name: Option<String>,
    node: u32,
    guest: Ipv4Addr,
    /// How many copies lie between it and the source.
    depth: u32,
    seconds: f64,
}

#[derive(Clone, Serialize)]
struct Failed {
    job: Option<String>,
    node: Option<u32>,
    why: String,
}

/// A VM that was bought for a fork.
struct Child {
    job: Job,
    ticket: Ticket,
}

/// What the threads of a fork share.
struct Family {
    cluster: Arc<Cluster>,
    source: Job,
    order: Fork,
    loader_sha256: [u8; 32],
    report: Report,
    begun: Instant,
    till: Mutex<Till>,
    books: Mutex<Books>,
}

/// Purchases, one after the other.
struct Till {
    /// VMs that nobody has begun.
    left: u32,
    /// VMs that were begun.
    number: u32,
    /// A node that was full a moment ago is not waited for again.
    is_full: bool,
}

/// What became of the VMs.
#[derive(Default)]
struct Books {
    /// Bought and not yet on their own.
    half: Vec<Job>,
    made: Vec<Made>,
    failed: Vec<Failed>,
    taken: Option<Taken>,
}

pub fn run(order: Fork, report: &Report) -> Result<ExitCode> {
    let (cluster, source) = session::open(&order.job.job)?;
    let json = order.json;
    let family = Arc::new(Family {
        cluster: Arc::new(cluster),
        loader_sha256: sha256(&loader()?),
        report: report.clone(),
        begun: Instant::now(),
        till: Mutex::new(Till { left: order.count.into(), number: 0, is_full: false }),
        books: Mutex::default(),
        source,
        order,
    });
    let interrupt = Interrupt::watch()?;
    let abandoned = family.clone();
    interrupt.hold(move || abandoned.give_back());
    let (dismiss, dismissed) = channel();
    std::thread::scope(|scope| {
        let family = &*family;
        scope.spawn(move || family.pay(&dismissed));
        // A scope of its own: all VMs are on their own, or gone, when it ends.
        std::thread::scope(|scope| family.serve(scope, &family.source, 0));
        drop(dismiss);
    });
    interrupt.leave("some of the VMs may still run, and their change was not collected");
    let told = family.told();
    if json {
        print_json(&told)?;
    } else {
        told.made.iter().try_for_each(|made| print(&format!("{}\n", made.job)))?;
    }
    report.line(&summary(&told));
    Ok(if told.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn summary(told: &Told) -> String {
    let (made, failed) = (told.made.len(), told.failed.len());
    let failures = if failed == 0 { String::new() } else { format!(", {failed} failed") };
    format!(
        "{made} made{failures} in {:.1} s; the source stood still for {:.1} ms",
        told.seconds, told.pause_ms
    )
}

/// Why a VM that is on its node's disk makes no others.
fn asleep(parent: &Job) -> Option<String> {
    let status = parent.handle().status(&mut Echo::open().ok()?, Policy::default()).ok()?;
    let id = parent.short_id();
    match status.wake_micro {
        _ if status.stage != Stage::Suspended => None,
        0 => Some(format!("job {id} is on its node's disk; onde resume {id} wakes it up")),
        _ => Some(format!(
            "job {id} ran out of tokens and is on its node's disk; onde pay {id} N wakes it up"
        )),
    }
}

fn lock<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Family {
    fn books(&self) -> MutexGuard<'_, Books> {
        lock(&self.books)
    }

    /// Has `parent`, which has `depth`, make VMs while there are some to make. The source does so once: after that it is
    /// another machine than its copies.
    fn serve<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        parent: &Job,
        depth: u32,
    ) {
        loop {
            let children = self.take();
            if children.is_empty() {
                return;
            }
            let faults = self.fill(parent, &children);
            for (child, fault) in children.into_iter().zip(faults) {
                match fault {
                    Some(why) => self.fail(&child.job, why),
                    None => {
                        scope.spawn(move || self.raise(scope, &child.job, depth + 1));
                    }
                }
            }
            if depth == 0 {
                return;
            }
        }
    }

    /// Buys the next VMs, as many as a machine fills at a time.
    fn take(&self) -> Vec<Child> {
        let mut till = lock(&self.till);
        let mut children = Vec::new();
        while till.left > 0 && (children.len() as u32) < FANOUT {
            till.left -= 1;
            till.number += 1;
            match self.buy(&mut till) {
                Ok(child) => children.push(child),
                Err(error) => {
                    let why = format!("{error:#}");
                    self.report.warn(&format!("VM {} was not bought: {why}", till.number));
                    let node = self.node(till.number);
                    self.books().failed.push(Failed { job: None, node, why });
                }
            }
        }
        children
    }

    /// On which node VM `number` shall be, where the customer said so.
    fn node(&self, number: u32) -> Option<u32> {
        let nodes = &self.order.nodes;
        (!nodes.is_empty()).then(|| nodes[(number as usize - 1) % nodes.len()])
    }

    fn buy(&self, till: &mut Till) -> Result<Child> {
        let (tokens, budget) = payment(self.order.tokens, self.order.budget);
        let request = JobRequest {
            idempotency_key: new_key()?,
            node: self.node(till.number).map(NodeChoice::Number),
            mem_mib: self.source.mem_mib,
            vcpus: self.source.vcpus,
            disk_mib: self.source.disk_mib,
            net_kib_s: 0,
            loader_sha256: Hex(self.loader_sha256),
            tokens,
            moves: None,
            template: false,
            clones: None,
        };
        let broker = &self.cluster.broker;
        let opened = if till.is_full { broker.open_job(&request) } else { buy(broker, &request) };
        till.is_full = opened.is_err();
        let opened = opened?;
        let title = format!("fork of {}", self.source.short_id());
        let mut job = Job::new(&opened, &title, &self.cluster.name, budget);
        job.has_agent = true;
        job.name = self.order.name.as_ref().map(|name| format!("{name}-{}", till.number));
        if let Err(error) = self.cluster.jobs.add(&job) {
            // A taken name is no reason to go without a VM.
            self.report.warn(&format!("job {} has no name: {error}", job.short_id()));
            job.name = None;
            self.cluster.jobs.add(&job).inspect_err(|_| {
                settle::tell(&self.cluster, &job, &self.report);
            })?;
        }
        self.books().half.push(job.clone());
        Ok(Child { ticket: ticket(&opened), job })
    }

    /// Has the agent of `parent` fill these VMs; what went wrong with each.
    fn fill(&self, parent: &Job, children: &[Child]) -> Vec<Option<String>> {
        let id = parent.short_id();
        let channel = match bootstrap::connect(&parent.handle(), parent.guest_ipv4, PATIENCE) {
            Ok(channel) => channel,
            Err(error) => {
                let why = asleep(parent)
                    .unwrap_or_else(|| format!("the agent of job {id} does not answer: {error}"));
                return vec![Some(why); children.len()];
            }
        };
        let tickets: Vec<_> = children.iter().map(|child| child.ticket.clone()).collect();
        let mut forked = fork::fork(channel, &tickets, |_| {});
        if parent.id == self.source.id {
            self.books().taken = forked.taken;
        }
        if forked.faults.iter().any(Option::is_some)
            && let Some(why) = asleep(parent)
        {
            // Beside its own: one may have failed before, for another reason.
            forked.faults.iter_mut().flatten().for_each(|fault| *fault += &format!("; {why}"));
        }
        forked.faults
    }

    /// Sees a VM that is filled become itself, make others, and go its own way.
    fn raise<'scope, 'env>(&'env self, scope: &'scope Scope<'scope, 'env>, job: &Job, depth: u32) {
        let connect = |patience| bootstrap::connect(&job.handle(), job.guest_ipv4, patience);
        match connect(WAKE_PATIENCE) {
            // A guest whose clock is wrong serves all the same.
            Ok(channel) => _ = tell_time(channel),
            Err(error) => return self.fail(job, format!("it did not wake up: {error}")),
        }
        let seconds = self.begun.elapsed().as_secs_f64();
        self.serve(scope, job, depth);
        let released = connect(PATIENCE)
            .map_err(anyhow::Error::from)
            .and_then(|channel| fork::release(channel).context("its programs do not go on"));
        if let Err(error) = released {
            return self.fail(job, format!("{error:#}"));
        }
        if let Err(error) = wallet::leave(&self.cluster, job) {
            self.report.warn(&format!("nothing pays for job {}: {error:#}", job.short_id()));
        }
        let (node, guest, name) = (job.node, job.guest_ipv4, job.name.clone());
        let made = Made { job: job.short_id(), name, node, guest, depth, seconds };
        let mut books = self.books();
        books.half.retain(|half| half.id != job.id);
        books.made.push(made);
    }

    fn fail(&self, job: &Job, why: String) {
        self.report.warn(&format!("job {} on node {} failed: {why}", job.short_id(), job.node));
        settle::tell(&self.cluster, job, &self.report);
        let mut books = self.books();
        books.half.retain(|half| half.id != job.id);
        books.failed.push(Failed { job: Some(job.short_id()), node: Some(job.node), why });
    }

    /// Pays for the VMs that are not on their own yet, until `dismissed`.
    fn pay(&self, dismissed: &Receiver<()>) {
        let mut homes = HashMap::new();
        while let Err(RecvTimeoutError::Timeout) = dismissed.recv_timeout(STEP_PERIOD) {
            let half = self.books().half.clone();
            homes.retain(|id, _| half.iter().any(|job| job.id == *id));
            for job in half {
                let Ok(echo) = Echo::open() else { continue };
                let (broker, jobs) = (self.cluster.broker.clone(), self.cluster.jobs.clone());
                let home =
                    homes.entry(job.id).or_insert_with(|| Home::new(echo, broker, jobs, &job));
                // One that is not there yet, or any more, needs nothing; whoever makes it says why.
                let _ = home.step(true);
            }
        }
    }

    /// Ends what is half done.
    fn give_back(&self) {
        // Held to the end: what is bought right now comes first, and nothing after it.
        let mut till = lock(&self.till);
        till.left = 0;
        let half = std::mem::take(&mut self.books().half);
        std::thread::scope(|scope| {
            for job in &half {
                scope.spawn(|| settle::tell(&self.cluster, job, &self.report));
            }
        });
    }

    fn told(&self) -> Told {
        let left = lock(&self.till).left;
        let books = self.books();
        let orphan =
            || Failed { job: None, node: None, why: "no copy was left to make it".to_owned() };
        let failed = books.failed.iter().cloned().chain((0..left).map(|_| orphan())).collect();
        Told {
            source: self.source.short_id(),
            seconds: self.begun.elapsed().as_secs_f64(),
            pause_ms: books.taken.map_or(0.0, |taken| taken.pause_us as f64 / 1e3),
            made: books.made.clone(),
            failed,
        }
    }
}
