//! `onde boot --from` and `--clone`: new VMs of a snapshot's file, or of a template on its node. The whole file is judged
//! before anything is bought. Several VMs are made by template start: one upload, then clones.

use anyhow::{Context, Result, bail};
use onde_client::snapshot::SnapshotFile;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use super::print;
use crate::cli::{Boot, Order};
use crate::cluster::Cluster;
use crate::failure::hinted;
use crate::interrupt::Interrupt;
use crate::launch::{Content, Machine, launch};
use crate::report::Report;
use crate::template::{self, Wanted};
use crate::{settle, wallet};

const UNDONE: &str = "the VM may still run, and its change was not collected";

pub fn run(context: Option<&str>, file: &Path, boot: &Boot, report: &Report) -> Result<ExitCode> {
    one_name(boot)?;
    let saved = SnapshotFile::open(file)?;
    let cluster = Arc::new(Cluster::open(context)?);
    let start = saved.start();
    let mib = |bytes: u64| u32::try_from(bytes >> 20).context("the snapshot is too large");
    let order = Order {
        memory: mib(start.space.mem_bytes)?,
        disk: mib(start.space.disk_bytes)?,
        vcpus: u16::try_from(start.vcpus).context("the snapshot has too many processors")?,
        ..boot.order.clone()
    };
    let is_template = boot.template || boot.count > 1;
    if is_template && order.disk > 0 {
        bail!(
            "a VM with a disk cannot be a template: clones share memory only\nhint: boot it several times"
        );
    }
    let interrupt = Interrupt::watch()?;
    let machine = Machine {
        content: Content::Saved(&saved),
        title: format!("from {}", file.display()),
        has_agent: !is_template,
        is_template,
    };
    if !is_template {
        return one(&cluster, &order, &machine, &interrupt, report);
    }
    let template = template::make(&cluster, &order, &machine, &interrupt, report)?;
    wallet::leave(&cluster, &template)?;
    if boot.template {
        print(&format!("{}\n", template.short_id()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let wanted =
        Wanted { template: &template, order: &order, held_mib: boot.held, is_temporary: true };
    let made = template::clones(&cluster, &wanted, boot.count.into(), &interrupt, report);
    // The clones go on: they keep what they share of it.
    settle::tell(&cluster, &template, report);
    made.map(|()| ExitCode::SUCCESS)
}

/// `--clone`.
pub fn clones(name: &str, boot: &Boot, report: &Report) -> Result<ExitCode> {
    one_name(boot)?;
    let (cluster, template) = Cluster::open_for(name)?;
    let interrupt = Interrupt::watch()?;
    let wanted = Wanted {
        template: &template,
        order: &boot.order,
        held_mib: boot.held,
        is_temporary: false,
    };
    template::clones(&Arc::new(cluster), &wanted, boot.count.into(), &interrupt, report)?;
    Ok(ExitCode::SUCCESS)
}

fn one_name(boot: &Boot) -> Result<()> {
    match &boot.order.name {
        Some(_) if boot.count > 1 => {
            Err(hinted("one name for several jobs", "leave --name out, or -n"))
        }
        _ => Ok(()),
    }
}

/// One VM, filled over the network.
fn one(
    cluster: &Arc<Cluster>,
    order: &Order,
    machine: &Machine<'_>,
    interrupt: &Interrupt,
    report: &Report,
) -> Result<ExitCode> {
    let job = launch(cluster, order, machine, interrupt, report)?;
    let begun = Instant::now();
    template::wake(&job).inspect_err(|_| {
        interrupt.leave(UNDONE);
        settle::tell(cluster, &job, report);
    })?;
    let ms = begun.elapsed().as_millis();
    let (id, ipv4) = (job.short_id(), job.guest_ipv4);
    report.line(&format!("job {id} is awake at {ipv4}, {ms} ms later"));
    wallet::leave(cluster, &job)?;
    print(&format!("{id}\n"))?;
    Ok(ExitCode::SUCCESS)
}
