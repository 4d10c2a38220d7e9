//! Cluster files of any text: no panic, and every address of an accepted plan can be computed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::cluster::Cluster;
use onde_wire::plan::{Plan, SLOTS_MAX};

fuzz_target!(|text: &str| {
    Plan::parse(text);
    if let Ok(cluster) = Cluster::parse(text) {
        let plan = cluster.plan;
        plan.mstrap(plan.nodes_max(), SLOTS_MAX - 1);
        plan.guest(plan.guests_max() - 1);
    }
});
