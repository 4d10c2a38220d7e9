//! `onde node`: the nodes for sale, and making this machine one.

use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::{print, print_json};
use crate::cluster::Cluster;
use crate::table::{cost, render, span};

pub fn list(context: Option<&str>, json: bool) -> Result<()> {
    let nodes = Cluster::open(context)?.broker.nodes()?;
    if json {
        return print_json(&nodes);
    }
    let row = |node: &onde_client::api::Node| {
        let state = if node.alive { "up" } else { "silent" };
        vec![
            node.number.to_string(),
            node.ipv4.to_string(),
            state.to_owned(),
            span(node.uptime_ms / 1000),
            format!("{}/{}", node.mem_mib_free, node.mem_mib),
            node.cpus.to_string(),
            node.slots_free.to_string(),
            cost(node.prices.vcpu_s),
            cost(node.prices.gib_s),
        ]
    };
    let rows: Vec<_> = nodes.iter().map(row).collect();
    let head = ["NODE", "ADDRESS", "STATE", "UP", "MIB FREE", "CPUS", "SLOTS", "VCPU-S", "GIB-S"];
    print(&render(&head, &rows))
}

/// Becomes `noded`.
pub fn run(interface: &str, cluster: &Path, node: Option<u32>) -> Result<ExitCode> {
    let program = onde_lab::programs::find("noded")?;
    let mut command = Command::new(&program);
    command.arg("--interface").arg(interface).arg("--cluster").arg(cluster);
    if let Some(node) = node {
        command.arg("--node").arg(node.to_string());
    }
    Err(command.exec()).with_context(|| format!("cannot run {}", program.display()))
}
