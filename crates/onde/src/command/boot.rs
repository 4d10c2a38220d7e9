//! `onde boot`: a VM of the customer's own kernel. Prints the job's id; the wallet in the background pays
//! for it, or with `--follow` this process does and shows the console.

use anyhow::{Context, Result};
use onde_client::echo::Echo;
use onde_client::home::Home;
use onde_client::node::NodeError;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;

use super::{console, print};
use crate::cli::Boot;
use crate::cluster::Cluster;
use crate::interrupt::Interrupt;
use crate::launch::{Content, Machine, launch};
use crate::progress::Progress;
use crate::report::Report;
use crate::{payer, settle, wallet};

pub fn run(context: Option<&str>, boot: &Boot, report: &Report) -> Result<ExitCode> {
    let cluster = Arc::new(Cluster::open(context)?);
    let kernel_file = boot.kernel.as_deref().context("no kernel")?;
    let kernel = read(kernel_file)?;
    let initrd = boot.initrd.as_deref().map_or(Ok(Vec::new()), read)?;
    let interrupt = Interrupt::watch()?;
    let machine = Machine {
        content: Content::Cold { kernel: &kernel, initrd: &initrd, cmdline: &boot.cmdline },
        title: kernel_file.display().to_string(),
        has_agent: false,
        is_template: false,
    };
    let job = launch(&cluster, &boot.order, &machine, &interrupt, report)?;
    if !boot.follow {
        interrupt.leave("the VM runs, and nothing pays for it");
        wallet::leave(&cluster, &job)?;
        print(&format!("{}\n", job.short_id()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut home = Home::new(Echo::open()?, cluster.broker.clone(), cluster.jobs.clone(), &job);
    let (dismiss, dismissed) = channel();
    let followed = std::thread::scope(|scope| {
        let progress = Progress::of(&job);
        let payer = scope.spawn(move || payer::run(&mut home, progress, report, &dismissed));
        // The payer knows when a silent node is lost.
        let endures = |error: &NodeError| error.is_silence() && !payer.is_finished();
        let followed = console::print(&job, endures, true);
        drop(dismiss);
        followed
    });
    interrupt.leave("the VM may still run, and its change was not collected");
    settle::tell(&cluster, &job, report);
    followed.map(|()| ExitCode::SUCCESS)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}
