//! `onde console`: what a VM wrote to its serial port, from the ring that its node keeps.

use anyhow::Result;
use onde_client::echo::{Echo, Policy};
use onde_client::job::Job;
use onde_client::node::{Handle, NodeError};
use onde_wire::machine::Stage;
use std::io::Write;
use std::time::Duration;

use crate::cluster::Cluster;

/// Enough for a dozen long lines.
const TAIL_BYTES: u64 = 4096;
/// How often a console that is followed is asked for more: a node tells nobody by itself.
const PERIOD: Duration = Duration::from_millis(250);

pub fn run(name: &str, follow: bool) -> Result<()> {
    let (_cluster, job) = Cluster::open_for(name)?;
    print(&job, |error| follow && error.is_silence(), follow)
}

/// Prints the console; with `follow` until the VM is over. What the node does not say is asked for again while `endures`.
pub fn print(job: &Job, endures: impl Fn(&NodeError) -> bool, follow: bool) -> Result<()> {
    let (handle, mut echo) = (job.handle(), Echo::open()?);
    let mut offset = 0;
    loop {
        match print_new(&handle, &mut echo, &mut offset) {
            Ok(stage) if follow && (stage.is_alive() || stage == Stage::Suspended) => {}
            Ok(_) => return Ok(()),
            Err(error) if error.downcast_ref().is_some_and(&endures) => {}
            Err(error) => return Err(error),
        }
        std::thread::sleep(PERIOD);
    }
}

/// Prints what is behind `offset`; the stage from before that.
fn print_new(handle: &Handle, echo: &mut Echo, offset: &mut u64) -> Result<Stage> {
    // Asked before the last bytes are read, so that none is missed.
    let stage = handle.status(echo, Policy::default())?.stage;
    loop {
        let slice = handle.console(echo, *offset)?;
        let mut out = std::io::stdout().lock();
        out.write_all(&slice.data[..usize::from(slice.len)])?;
        out.flush()?;
        *offset = slice.offset + u64::from(slice.len);
        if *offset >= slice.total || slice.len == 0 {
            return Ok(stage);
        }
    }
}

/// The last lines of the console; `None` where there is nothing to read.
pub fn tail(job: &Job, lines: usize) -> Option<String> {
    let (handle, mut echo) = (job.handle(), Echo::open().ok()?);
    let total = handle.console(&mut echo, u64::MAX).ok()?.total;
    let mut bytes = Vec::new();
    let mut offset = total.saturating_sub(TAIL_BYTES);
    // Ends: every slice but an empty one leads on, and `total` is a number of before.
    while offset < total {
        let slice = handle.console(&mut echo, offset).ok()?;
        bytes.extend_from_slice(&slice.data[..usize::from(slice.len)]);
        offset = slice.offset + u64::from(slice.len);
        if slice.len == 0 {
            break;
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let tail = &all[all.len().saturating_sub(lines)..];
    (!tail.is_empty()).then(|| tail.join("\n"))
}
