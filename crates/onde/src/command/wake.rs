//! `onde boot --from`: new VMs of a snapshot's file. Each is bought, filled and awake before the next is. The whole
//! file is judged before anything is bought.

use anyhow::{Context, Result};
use onde_client::bootstrap;
use onde_client::job::Job;
use onde_client::snapshot::{SnapshotFile, tell_time};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{console, print};
use crate::cli::Order;
use crate::cluster::Cluster;
use crate::failure::hinted;
use crate::interrupt::Interrupt;
use crate::launch::{Content, Machine, launch};
use crate::report::Report;
use crate::{settle, wallet};

/// How long a copy may take from its memory's last byte to its agent's first answer, on a busy emulated node.
const WAKE_PATIENCE: Duration = Duration::from_secs(30);
/// Lines of the console that are shown of a copy that does not wake up.
const CONSOLE_LINES: usize = 12;
const UNDONE: &str = "the VM may still run, and its change was not collected";

pub fn run(
    context: Option<&str>,
    file: &Path,
    count: u16,
    order: &Order,
    report: &Report,
) -> Result<ExitCode> {
    if count > 1 && order.name.is_some() {
        return Err(hinted("one name for several jobs", "leave --name out, or -n"));
    }
    let saved = SnapshotFile::open(file)?;
    let cluster = Arc::new(Cluster::open(context)?);
    let start = saved.start();
    let order = Order {
        memory: u32::try_from(start.mem_bytes >> 20).context("the snapshot is too large")?,
        vcpus: u16::try_from(start.vcpus).context("the snapshot has too many processors")?,
        node: order.node,
        tokens: order.tokens,
        budget: order.budget,
        name: order.name.clone(),
        while_command: order.while_command.clone(),
        progress_file: order.progress_file.clone(),
        progress_within: order.progress_within,
    };
    let interrupt = Interrupt::watch()?;
    for _ in 0..count {
        let machine = Machine {
            content: Content::Saved(&saved),
            title: format!("from {}", file.display()),
            has_agent: true,
        };
        let job = launch(&cluster, &order, &machine, &interrupt, report)?;
        wake(&cluster, &job, &interrupt, report)?;
        wallet::leave(&cluster, &job)?;
        // It is the wallet's now; what a signal ends is the next one.
        interrupt.hold(|| ());
        print(&format!("{}\n", job.short_id()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until the copy answers as itself; gives it back if it does not.
fn wake(cluster: &Cluster, job: &Job, interrupt: &Interrupt, report: &Report) -> Result<()> {
    let begun = Instant::now();
    let awake = bootstrap::connect(&job.handle(), job.guest_ipv4, WAKE_PATIENCE);
    let awake = awake.map(|channel| {
        // A guest whose clock is wrong serves all the same.
        let _ = tell_time(channel);
    });
    let Err(error) = awake else {
        let ms = begun.elapsed().as_millis();
        report.line(&format!(
            "job {} is awake at {}, {ms} ms later",
            job.short_id(),
            job.guest_ipv4
        ));
        return Ok(());
    };
    let tail = console::tail(job, CONSOLE_LINES);
    interrupt.leave(UNDONE);
    settle::tell(cluster, job, report);
    let tail = tail.map_or(String::new(), |tail| format!("; the end of its console:\n{tail}"));
    Err(error).with_context(|| format!("job {} did not wake up{tail}", job.short_id()))
}
