//! `onde price`: what a VM of some shape costs at each node, from idle to busy with all its processors. What it sends is
//! on top.

use anyhow::Result;
use onde_client::api::Node;
use onde_client::job::Job;
use onde_wire::packet::Prices;
use serde::Serialize;

use super::{print, print_json};
use crate::cluster::Cluster;
use crate::table::{cost, rate, render};

/// What is to be compared.
pub struct Shape {
    pub mem_mib: u32,
    pub vcpus: u16,
    pub disk_mib: u32,
}

impl Shape {
    /// The job's.
    pub fn of(job: &Job) -> Self {
        Self { mem_mib: job.mem_mib, vcpus: job.vcpus, disk_mib: job.disk_mib }
    }
}

/// What one node charges for the shape.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    pub node: u32,
    ipv4: std::net::Ipv4Addr,
    /// Whether it could be bought now; what is left of its disk only the node knows.
    pub has_room: bool,
    mem_mib_free: u32,
    idle_micro_per_s: u64,
    busy_micro_per_s: u64,
    hours: u32,
    idle_micro: u64,
    busy_micro: u64,
    gib_sent_micro: u64,
}

pub fn run(context: Option<&str>, shape: &Shape, hours: u32, json: bool) -> Result<()> {
    let nodes = Cluster::open(context)?.broker.nodes()?;
    let rows = compare(&nodes, shape, hours);
    if json {
        return print_json(&rows);
    }
    let cells = |row: &Row| {
        let room = if row.has_room { "yes" } else { "no" };
        vec![
            row.node.to_string(),
            row.ipv4.to_string(),
            room.to_owned(),
            rate(row.idle_micro_per_s),
            rate(row.busy_micro_per_s),
            cost(row.idle_micro),
            cost(row.busy_micro),
            cost(row.gib_sent_micro),
        ]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    let (idle, busy) = (format!("IDLE {hours}H"), format!("BUSY {hours}H"));
    let head = ["NODE", "ADDRESS", "ROOM", "IDLE/S", "BUSY/S", &idle, &busy, "GIB SENT"];
    print(&render(&head, &cells))
}

/// The nodes that are there, the cheapest for a busy VM first; of equals, one with room, and with more of it.
pub fn compare(nodes: &[Node], shape: &Shape, hours: u32) -> Vec<Row> {
    let &Shape { mem_mib, vcpus, disk_mib } = shape;
    let row = |node: &Node| {
        let prices = Prices::from(node.prices);
        let idle_micro_per_s = prices.held_micro_per_s(mem_mib, disk_mib);
        let busy_micro_per_s = prices.busy_micro_per_s(vcpus, mem_mib, disk_mib);
        let seconds = u64::from(hours) * 3600;
        Row {
            node: node.number,
            ipv4: node.ipv4,
            has_room: node.slots_free > 0 && node.mem_mib_free >= mem_mib && node.cpus >= vcpus,
            mem_mib_free: node.mem_mib_free,
            idle_micro_per_s,
            busy_micro_per_s,
            hours,
            idle_micro: idle_micro_per_s.saturating_mul(seconds),
            busy_micro: busy_micro_per_s.saturating_mul(seconds),
            gib_sent_micro: prices.gib_sent,
        }
    };
    let mut rows: Vec<_> = nodes.iter().filter(|node| node.alive).map(row).collect();
    rows.sort_by_key(|row| {
        let cost = (row.busy_micro_per_s, row.idle_micro_per_s, !row.has_room, row.gib_sent_micro);
        (cost, std::cmp::Reverse(row.mem_mib_free), row.node)
    });
    rows
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use onde_client::api::{self, Hex};

    /// A node with two processors.
    pub fn node(number: u32, vcpu_s: u64, gib_s: u64, mem_mib_free: u32) -> Node {
        Node {
            number,
            id: Hex([0; 16]),
            incarnation: Hex([0; 16]),
            ipv4: std::net::Ipv4Addr::LOCALHOST,
            alive: true,
            seen_ms_ago: 0,
            uptime_ms: 0,
            mem_mib: 4096,
            mem_mib_free,
            cpus: 2,
            slots_free: 1,
            prices: api::Prices { vcpu_s, gib_s, gib_sent: 0, disk_gib_s: 0 },
        }
    }

    fn check(nodes: &[Node], vcpus: u16, expect: &[(u32, u64, bool)]) {
        let rows = compare(nodes, &Shape { mem_mib: 512, vcpus, disk_mib: 0 }, 2);
        let got: Vec<_> = rows.iter().map(|row| (row.node, row.busy_micro, row.has_room)).collect();
        assert_eq!(got, expect);
    }

    #[test]
    fn a_disk_counts() {
        let disk = |number, vcpu_s, disk_gib_s| Node {
            prices: api::Prices { vcpu_s, gib_s: 0, gib_sent: 0, disk_gib_s },
            ..node(number, 0, 0, 4096)
        };
        let shape = |disk_mib| Shape { mem_mib: 512, vcpus: 1, disk_mib };
        let nodes = [disk(1, 100, 50), disk(2, 120, 10)];
        let order =
            |shape| compare(&nodes, &shape, 1).iter().map(|row| row.node).collect::<Vec<_>>();
        assert_eq!((order(shape(0)), order(shape(1024))), (vec![1, 2], vec![2, 1]));
        assert_eq!(compare(&nodes, &shape(1024), 1)[0].idle_micro_per_s, 10);
    }

    #[test]
    fn the_cheapest_for_the_shape_comes_first() {
        let silent = Node { alive: false, ..node(9, 0, 0, 4096) };
        let (cpu, mem) = (node(1, 100, 1000, 4096), node(2, 400, 600, 4096));
        let (full, cpu_too) = (node(0, 100, 1000, 511), node(3, 100, 1000, 512));
        let nodes = [silent, mem, cpu, full, cpu_too];
        let s = 2 * 3600;
        check(
            &nodes,
            1,
            &[(1, 600 * s, true), (3, 600 * s, true), (0, 600 * s, false), (2, 700 * s, true)],
        );
        check(&nodes[1..3], 4, &[(1, 900 * s, false), (2, 1900 * s, false)]);
    }
}
