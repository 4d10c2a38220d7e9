//! `onde snapshot`: has the agent of a running VM copy its machine into a file, while the VM goes on.

use anyhow::{Context, Result};
use onde_client::bootstrap;
use onde_client::snapshot::{Event, Snapshot, aside, take};
use onde_wire::machine::Space;
use onde_wire::session::Round;
use onde_wire::stream::Start;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{print, print_json, session};
use crate::interrupt::Interrupt;
use crate::report::Report;

/// How long a running guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Serialize)]
struct Told {
    job: String,
    file: String,
    size: u64,
    seconds: f64,
    pause_ms: f64,
    rounds: u32,
    frozen_pages: u64,
}

pub fn run(name: &str, file: &Path, json: bool, report: &Report) -> Result<()> {
    let (_cluster, job) = session::open(name)?;
    let interrupt = Interrupt::watch()?;
    let part = aside(file);
    interrupt.hold(move || {
        // Where it was not written yet, there is nothing to remove.
        let _ = std::fs::remove_file(&part);
    });
    let begun = Instant::now();
    let channel = bootstrap::connect(&job.handle(), job.guest_ipv4, PATIENCE)
        .with_context(|| format!("the agent of job {} does not answer", job.short_id()))?;
    let start = Start {
        job: job.id.0,
        space: Space::of_mib(job.mem_mib, job.disk_mib),
        vcpus: job.vcpus.into(),
    };
    let (mut round, spinner) = (Round { number: 0, pages: 0 }, report.spinner());
    let taken = take(channel, start, file, |event| match event {
        Event::Round(begins) => round = begins,
        Event::Received(size) => spinner.say(|| progress(round, size, begun.elapsed())),
    });
    drop(spinner);
    let Snapshot { size, taken } = taken.context("no snapshot was taken")?;
    let told = Told {
        job: job.id.to_string(),
        file: file.display().to_string(),
        size,
        seconds: begun.elapsed().as_secs_f64(),
        pause_ms: taken.pause_us as f64 / 1e3,
        rounds: round.number + 1,
        frozen_pages: taken.frozen_pages,
    };
    if json { print_json(&told) } else { print(&text(&told)) }
}

fn progress(round: Round, size: u64, elapsed: Duration) -> String {
    let mib = size as f64 / f64::from(1 << 20);
    let rate = mib / elapsed.as_secs_f64().max(0.001);
    format!("round {} of {} pages, {mib:.1} MiB, {rate:.1} MiB/s", round.number, round.pages)
}

fn text(told: &Told) -> String {
    format!(
        "{}: {:.1} MiB in {:.1} s, {} rounds; the VM stood still for {:.1} ms\n",
        told.file,
        told.size as f64 / f64::from(1 << 20),
        told.seconds,
        told.rounds,
        told.pause_ms,
    )
}
