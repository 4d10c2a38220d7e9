//! Template start: one upload to a node, and any number of VMs there that share its pages until they write them.
//! `boot` uses it; whoever has a template's job can make clones of it. A clone is awake when it is handed out, and the
//! wallet pays for it.

use anyhow::{Context, Result, anyhow};
use onde_client::api::{Clones, Hex, JobRequest};
use onde_client::bootstrap;
use onde_client::broker::new_key;
use onde_client::echo::{Echo, Policy};
use onde_client::job::Job;
use onde_client::snapshot::tell_time;
use onde_wire::machine::{self, Stage};
use onde_wire::token::BootToken;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cli::Order;
use crate::cluster::Cluster;
use crate::command::{console, print};
use crate::interrupt::Interrupt;
use crate::launch::{self, Machine, launch};
use crate::report::Report;
use crate::{settle, wallet};

/// Clones started at once beside one for each processor of the node: those wait for the broker, or for an answer. More on a
/// node with few processors and each would wake up so slowly that it seems not to.
const AT_ONCE_BESIDE: u32 = 1;
/// And at most.
const AT_ONCE_MAX: u32 = 16;
/// How long a template may take from its last byte to being one: its VMM fills small holes.
const KEEP_PATIENCE: Duration = Duration::from_secs(60);
const KEEP_PERIOD: Duration = Duration::from_millis(50);
/// How long a copy may take from its start to its agent's first answer: on an emulated node with ninety others it may be half a
/// minute.
const WAKE_PATIENCE: Duration = Duration::from_secs(90);
/// Lines of the console that are shown of a copy that does not wake up.
const CONSOLE_LINES: usize = 12;
const UNDONE: &str = "the VM may still run, and its change was not collected";

/// What clones are made of, and with what.
pub struct Wanted<'a> {
    /// The template.
    pub template: &'a Job,
    /// What each is paid with; its shape is the template's.
    pub order: &'a Order,
    /// Most memory that each may have for itself, MiB; as much as any VM where nothing is said.
    pub held_mib: Option<u32>,
    /// Whether the template goes, too, when a signal ends this.
    pub is_temporary: bool,
}

/// Uploads `machine` as a template; it is one when this returns. Nothing pays for it yet but its first tokens.
pub fn make(
    cluster: &Arc<Cluster>,
    order: &Order,
    machine: &Machine<'_>,
    interrupt: &Interrupt,
    report: &Report,
) -> Result<Job> {
    let job = launch(cluster, order, machine, interrupt, report)?;
    await_kept(&job).inspect_err(|_| {
        interrupt.leave(UNDONE);
        settle::tell(cluster, &job, report);
    })?;
    report.line(&format!("job {} is a template on node {}", job.short_id(), job.node));
    Ok(job)
}

fn await_kept(job: &Job) -> Result<()> {
    let (mut echo, begun) = (Echo::open()?, Instant::now());
    loop {
        let stage = job.handle().status(&mut echo, Policy::default())?.stage;
        match stage {
            Stage::Template => return Ok(()),
            Stage::Booting if begun.elapsed() < KEEP_PATIENCE => {}
            stage => {
                return Err(anyhow!("job {} is {}", job.short_id(), stage.name()))
                    .context("the template did not come to be");
            }
        }
        std::thread::sleep(KEEP_PERIOD);
    }
}

/// The clones under way: bought, and not yet their wallet's.
type Open = Arc<Mutex<Vec<Job>>>;

fn lock(open: &Open) -> MutexGuard<'_, Vec<Job>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes `count` clones, several at once, and prints the id of each that is awake. After a failure no more are begun;
/// those that are awake stay.
pub fn clones(
    cluster: &Arc<Cluster>,
    wanted: &Wanted<'_>,
    count: u32,
    interrupt: &Interrupt,
    report: &Report,
) -> Result<()> {
    let open = Open::default();
    lock(&open).extend(wanted.is_temporary.then(|| wanted.template.clone()));
    let (owner, held, told) = (cluster.clone(), open.clone(), report.clone());
    interrupt.hold(move || {
        let left = std::mem::take(&mut *lock(&held));
        left.iter().for_each(|job| settle::tell(&owner, job, &told));
    });
    let cpus = cluster.broker.node(wanted.template.node)?.map_or(1, |node| node.cpus);
    let at_once = (u32::from(cpus) + AT_ONCE_BESIDE).min(AT_ONCE_MAX);
    let (begun, next, awake) = (Instant::now(), AtomicU32::new(0), AtomicU32::new(0));
    let work = || -> Result<()> {
        while next.fetch_add(1, Ordering::Relaxed) < count {
            let made = one(cluster, wanted, &open, report);
            let made = made.inspect_err(|_| next.store(count, Ordering::Relaxed));
            print(&format!("{}\n", made?.short_id()))?;
            awake.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let done: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once.min(count)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no clone panics")).collect()
    });
    interrupt.hold(|| ());
    let (awake, seconds) = (awake.into_inner(), begun.elapsed().as_secs_f64());
    report.line(&format!("{awake} clones awake in {seconds:.1} s"));
    done.into_iter().collect()
}

/// One clone: bought, started, awake, and its wallet's.
fn one(cluster: &Arc<Cluster>, wanted: &Wanted<'_>, open: &Open, report: &Report) -> Result<Job> {
    let template = wanted.template;
    let (tokens, budget) = launch::payment(wanted.order.tokens, wanted.order.budget);
    let held_mib = wanted.held_mib.unwrap_or_else(|| machine::held_mib(template.mem_mib));
    let opened = launch::buy(
        &cluster.broker,
        &JobRequest {
            idempotency_key: new_key()?,
            node: None,
            mem_mib: template.mem_mib,
            vcpus: template.vcpus,
            disk_mib: template.disk_mib,
            net_kib_s: 0,
            // Nothing is uploaded, so no loader is right.
            loader_sha256: Hex([0; 32]),
            tokens,
            moves: None,
            template: false,
            clones: Some(Clones { template: template.id, held_mib }),
        },
    )?;
    let title = format!("clone of {}", template.short_id());
    let mut job = Job::new(&opened, &title, &cluster.name, budget);
    (job.has_agent, job.held_mib) = (true, held_mib);
    job.name = wanted.order.name.clone();
    job.watch = launch::watch(wanted.order)?;
    lock(open).push(job.clone());
    let awake = cluster.jobs.add(&job).map_err(anyhow::Error::from).and_then(|()| {
        let token = BootToken::parse(&opened.boot_token.0).context("the broker's boot token")?;
        job.handle().boot(&mut Echo::open()?, token, opened.boot_tag.0)?;
        wake(&job)
    });
    let Err(error) = awake else {
        wallet::leave(cluster, &job)?;
        lock(open).retain(|other| other.id != job.id);
        return Ok(job);
    };
    let is_ours = lock(open).iter().any(|other| other.id == job.id);
    if is_ours {
        settle::tell(cluster, &job, report);
    }
    Err(error)
}

/// Waits until a copy answers as itself.
pub fn wake(job: &Job) -> Result<()> {
    match bootstrap::connect(&job.handle(), job.guest_ipv4, WAKE_PATIENCE) {
        Ok(channel) => {
            // A guest whose clock is wrong serves all the same.
            let _ = tell_time(channel);
            Ok(())
        }
        Err(error) => {
            let tail = console::tail(job, CONSOLE_LINES);
            let tail =
                tail.map_or(String::new(), |tail| format!("; the end of its console:\n{tail}"));
            Err(error).with_context(|| format!("job {} did not wake up{tail}", job.short_id()))
        }
    }
}
