//! From an order to a running VM: buy, show the boot token, upload the loader, send the stream. `run`, `boot` and
//! `wake` use it. Everything that can fail without money comes first; whatever fails after the purchase, or a signal
//! that ends it, gives the VM back.

use anyhow::{Context, Result};
use onde_client::api::{Hex, JobOpened, JobRequest, NodeChoice};
use onde_client::bootstrap;
use onde_client::broker::{Broker, BrokerError, new_key};
use onde_client::channel::Writer;
use onde_client::echo::Echo;
use onde_client::home::Home;
use onde_client::job::{Job, Watch};
use onde_client::layout::{self, Layout};
use onde_client::snapshot::SnapshotFile;
use onde_client::stream::{Progress, write_cold};
use onde_wire::key::sha256;
use onde_wire::machine::Space;
use onde_wire::stream::Start;
use onde_wire::token::BootToken;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::cli::Order;
use crate::cluster::Cluster;
use crate::interrupt::Interrupt;
use crate::report::Report;
use crate::{payer, progress, settle};

/// First payment, tokens, where nothing else is said: half a minute of one busy vCPU at the lab's prices.
const TOKENS_DEFAULT: u32 = 30;
/// Budget, tokens, where nothing else is said: ten minutes and more of one busy vCPU.
const BUDGET_DEFAULT: u32 = 600;
/// The broker's word where no node has room.
const FULL: &str = "no_fitting_node";
/// The broker looks at its nodes every two seconds.
const ROOM_PATIENCE: Duration = Duration::from_secs(4);
const ROOM_PERIOD: Duration = Duration::from_millis(500);

/// What is booted.
pub struct Machine<'a> {
    pub content: Content<'a>,
    /// What it runs, for people.
    pub title: String,
    pub has_agent: bool,
    /// Whether it is kept for clones instead of running.
    pub is_template: bool,
}

/// What its memory holds.
pub enum Content<'a> {
    /// A kernel that is about to start.
    Cold { kernel: &'a [u8], initrd: &'a [u8], cmdline: &'a str },
    /// A machine of the order's shape as it once was.
    Saved(&'a SnapshotFile),
}

/// What is sent.
enum Load<'a> {
    Cold(Layout),
    Saved(&'a SnapshotFile),
}

impl Load<'_> {
    /// Bytes of memory.
    fn size(&self) -> u64 {
        match self {
            Load::Cold(layout) => layout.size(),
            Load::Saved(file) => file.mem_total(),
        }
    }

    fn write(
        &self,
        out: &mut Writer,
        start: &Start,
        on_progress: impl FnMut(Progress),
    ) -> io::Result<Progress> {
        match self {
            Load::Cold(layout) => write_cold(out, start, layout, on_progress),
            Load::Saved(file) => file.write(out, start, on_progress),
        }
    }
}

/// Makes a VM of `machine`; when this returns, its guest is about to run.
pub fn launch(
    cluster: &Arc<Cluster>,
    order: &Order,
    machine: &Machine<'_>,
    interrupt: &Interrupt,
    report: &Report,
) -> Result<Job> {
    let mem_bytes = u64::from(order.memory) << 20;
    let load = match machine.content {
        Content::Cold { kernel, initrd, cmdline } => {
            Load::Cold(layout::cold(kernel, initrd, cmdline, mem_bytes)?)
        }
        Content::Saved(file) => Load::Saved(file),
    };
    let loader = loader()?;
    let echo = Echo::open()?;
    let (first, budget) = payment(order.tokens, order.budget);
    let watch = watch(order)?;
    let request = JobRequest {
        idempotency_key: new_key()?,
        node: order.node.map(NodeChoice::Number),
        mem_mib: order.memory,
        vcpus: order.vcpus,
        disk_mib: order.disk,
        net_kib_s: 0,
        loader_sha256: Hex(sha256(&loader)),
        tokens: first,
        moves: None,
        template: machine.is_template,
        clones: None,
    };
    let opened = buy(&cluster.broker, &request)?;
    let mut job = Job::new(&opened, &machine.title, &cluster.name, budget);
    job.name = order.name.clone();
    job.has_agent = machine.has_agent;
    job.watch = watch;
    keep(cluster, &job, interrupt, report)?;
    let started = start(cluster, &opened, &job, echo, &loader, &load, report);
    started.map(|()| job.clone()).inspect_err(|_| {
        interrupt.leave("the VM may still run, and its change was not collected");
        settle::tell(cluster, &job, report);
    })
}

/// Buys the job. What another VM has just given back is for sale again once the broker has looked.
pub fn buy(broker: &Broker, request: &JobRequest) -> Result<JobOpened, BrokerError> {
    let deadline = Instant::now() + ROOM_PATIENCE;
    loop {
        match broker.open_job(request) {
            Err(error) if error.word() == Some(FULL) && Instant::now() < deadline => {}
            done => return done,
        }
        std::thread::sleep(ROOM_PERIOD);
    }
}

/// The first payment and the budget, tokens, of what the customer said of them.
pub fn payment(tokens: Option<u32>, budget: Option<u32>) -> (u32, u32) {
    let budget = budget.or(tokens).unwrap_or(BUDGET_DEFAULT);
    (tokens.unwrap_or(TOKENS_DEFAULT).min(budget), budget)
}

/// Our loader's image.
pub fn loader() -> Result<Vec<u8>> {
    let file = onde_lab::programs::find("loader")?;
    std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))
}

/// From here on, whatever happens, the job is known on disk and given back by Ctrl-C.
fn keep(cluster: &Arc<Cluster>, job: &Job, interrupt: &Interrupt, report: &Report) -> Result<()> {
    let (owner, held, told) = (cluster.clone(), job.clone(), report.clone());
    interrupt.hold(move || {
        let job = owner.jobs.current(&held.id.0).unwrap_or_else(|_| held.clone());
        settle::tell(&owner, &job, &told);
    });
    // A taken name is no reason to keep what was bought.
    cluster.jobs.add(job).inspect_err(|_| {
        let nameless = Job { name: None, ..job.clone() };
        let _ = cluster.jobs.add(&nameless);
        settle::tell(cluster, &nameless, report);
    })?;
    Ok(())
}

/// What shows progress, as the order says.
pub fn watch(order: &Order) -> Result<Option<Watch>> {
    if order.while_command.is_none() && order.progress_file.is_none() {
        return Ok(None);
    }
    let dir = std::env::current_dir().context("cannot tell which folder this is")?;
    Ok(Some(Watch {
        command: order.while_command.clone(),
        file: order.progress_file.as_ref().map(|file| dir.join(file)),
        dir,
        within_s: order.progress_within,
    }))
}

fn start(
    cluster: &Cluster,
    opened: &JobOpened,
    job: &Job,
    mut echo: Echo,
    loader: &[u8],
    load: &Load<'_>,
    report: &Report,
) -> Result<()> {
    let handle = job.handle();
    let token = BootToken::parse(&opened.boot_token.0)
        .context("the broker sells boot tokens of another version than this program knows")?;
    let booted = handle.boot(&mut echo, token, opened.boot_tag.0)?;
    report.line(&format!("job {} on node {}, {} MiB", job.short_id(), job.node, job.mem_mib));
    let shape = Start {
        job: job.id.0,
        space: Space::of_mib(job.mem_mib, job.disk_mib),
        vcpus: job.vcpus.into(),
    };
    let bar = report.upload(load.size());
    let on_progress = |progress: Progress| bar.at(progress.mem_done);
    // A large machine on a slow line takes longer than a first payment lasts.
    let mut home = Home::new(echo, cluster.broker.clone(), cluster.jobs.clone(), job);
    let (dismiss, dismissed) = channel();
    let sent = std::thread::scope(|scope| {
        scope
            .spawn(move || payer::run(&mut home, progress::Progress::always(), report, &dismissed));
        let sent = bootstrap::boot_stream(&handle, booted.ipv4.into(), loader, |out| {
            load.write(out, &shape, on_progress)
        });
        drop(dismiss);
        sent
    })?;
    bar.done(sent.sent);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn check(line: &str, expect: (u32, u32)) {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            order: Order,
        }
        let order = Line::parse_from(line.split(' ')).order;
        assert_eq!(payment(order.tokens, order.budget), expect);
    }

    #[test]
    fn a_budget_is_never_exceeded_and_a_first_payment_alone_is_one() {
        check("onde", (TOKENS_DEFAULT, BUDGET_DEFAULT));
        check("onde --tokens 5", (5, 5));
        check("onde --budget 5", (5, 5));
        check("onde --budget 100", (TOKENS_DEFAULT, 100));
        check("onde --tokens 50 --budget 20", (20, 20));
    }
}
