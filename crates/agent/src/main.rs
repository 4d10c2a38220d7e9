//! `agent` is `/init` of a packed guest: it readies the guest, starts the packed program, and serves sessions
//! with the customer over the job's secure channel. The guest is the customer's own, so the agent guards
//! nothing inside of it; it never answers anyone who does not know the job key.
//!
//! The guest outlives its program: output and status wait for the customer, who then stops the VM by packet. If
//! nobody ever asks, the VM lives until its balance is gone.
#![forbid(unsafe_code)]

mod by_itself;
mod children;
mod connections;
mod copied;
mod door;
mod follower;
mod fork;
mod freezer;
mod guest;
mod hooks;
mod input;
mod machine;
mod moving;
mod network;
mod pocket;
mod program;
mod pump;
mod server;
mod session;
mod snapshot;
mod start;
mod tail;
mod target;
#[cfg(test)]
mod tests;

use anyhow::{Context, Result};
use onde_wire::session::{LAUNCH_PATH, Launch};
use std::process::ExitCode;

use children::Children;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        let args: Vec<_> = std::env::args().skip(1).collect();
        if let [verb, option, ticket] = &args[..]
            && (&verb[..], &option[..]) == ("migrate", "--token")
        {
            return by_itself::run(ticket);
        }
        eprintln!("onde-agent: this is /init of a packed guest");
        eprintln!(
            "hint: onde run packs it and starts it; inside, onde-agent migrate --token TICKET moves the VM"
        );
        return ExitCode::from(2);
    }
    // A panic is a bug of ours: the guest ends where the customer sees it, instead of burning tokens.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        guest::power_off();
    }));
    if let Err(error) = run() {
        eprintln!("onde-agent: {error:#}");
    }
    guest::power_off();
    ExitCode::FAILURE
}

/// Does not return while the guest lives.
fn run() -> Result<()> {
    guest::mount_all()?;
    guest::set_limits()?;
    guest::quiet_kernel();
    let mut modules = guest::Modules::read()?;
    modules.load_until(network::has_device)?;
    let identity = guest::identity()?;
    guest::set_host_name(&identity)?;
    // Listens before the network is up: the first packet of a waiting customer finds the port open.
    let server = server::Server::listen(&identity)?;
    network::bring_up(&identity)?;
    let children =
        Children::start(freezer::Freezer::of_guest()).context("cannot watch for children")?;
    let launch =
        std::fs::read(LAUNCH_PATH).with_context(|| format!("cannot read {LAUNCH_PATH}"))?;
    let launch = Launch::parse(&launch).with_context(|| format!("{LAUNCH_PATH} is malformed"))?;
    let program = start::start(&children, &launch).inspect(|program| program.expect_client());
    // What else there is comes while the customer connects.
    children::spawn_thread("modules", move || {
        if let Err(error) = modules.load_until(|| false) {
            eprintln!("onde-agent: {error:#}");
        }
    })?;
    let address = std::net::Ipv4Addr::from(identity.ipv4);
    println!("onde-agent: ready {address}");
    server.run(children, program)
}
