//! Which command does what: one file each below.

mod account;
mod boot;
mod broker;
pub mod console;
mod context;
mod docs;
mod fork;
mod job;
mod lab;
mod migrate;
mod node;
mod price;
mod ps;
mod receipt;
mod run;
pub mod session;
mod sleep;
mod snapshot;
mod statement;
mod usage;
mod wake;

use anyhow::Result;
use serde::Serialize;
use std::io::Write;
use std::process::ExitCode;

use crate::cli::{Cli, Command, Node, Wallet};
use crate::report::Report;

/// Exit status of `run` where onde itself failed, as `env`, `timeout` and container tools have it.
const FAILED: u8 = 125;

/// Does what was asked.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let report = Report::new(cli.global.quiet);
    let context = cli.global.context.as_deref();
    match cli.command {
        Command::Run(run) => Ok(run::run(context, &run, &report).unwrap_or_else(|error| {
            crate::terminal::restore();
            eprintln!("{}", crate::failure::lines(&error));
            ExitCode::from(FAILED)
        })),
        Command::Boot(boot) => match (&boot.from, &boot.clone) {
            (Some(file), _) => wake::run(context, file, &boot, &report),
            (None, Some(template)) => wake::clones(template, &boot, &report),
            (None, None) => boot::run(context, &boot, &report),
        },
        Command::Snapshot { job, output, json } => {
            done(snapshot::run(&job.job, &output, json, &report))
        }
        Command::Fork(order) => fork::run(order, &report),
        Command::Ticket { job, node, tokens } => {
            done(migrate::print_ticket(&job.job, node, tokens))
        }
        Command::Migrate(order) => done(migrate::run(context, &order, &report)),
        Command::Ps { all, cost, json } => done(ps::run(context, all, cost, json)),
        Command::Status { job, json } => done(job::status(&job.job, json)),
        Command::Console { job, follow } => done(console::run(&job.job, follow)),
        Command::Exec { job, tty, command } => session::exec(&job.job, tty, &command),
        Command::Attach { job } => session::attach(&job.job, &report),
        Command::Logs { job, follow } => done(session::logs(&job.job, follow, &report)),
        Command::Pay { job, tokens } => done(job::pay(&job.job, tokens, &report)),
        Command::Suspend { job } => done(sleep::suspend(&job.job)),
        Command::Resume { job, node: None } => done(sleep::resume(&job.job)),
        Command::Resume { job, node: Some(node) } => {
            done(migrate::wake_on(&job.job, node, &report))
        }
        Command::Stop { job } => done(job::stop(&job.job, &report)),
        Command::Price { memory, vcpus, disk, hours, json } => {
            let shape = price::Shape { mem_mib: memory, vcpus, disk_mib: disk };
            done(price::run(context, &shape, hours, json))
        }
        Command::Node(Node::Ls { json }) => done(node::list(context, json)),
        Command::Node(Node::Run { interface, cluster, node }) => {
            node::run(&interface, &cluster, node)
        }
        Command::Usage { job, csv, json } => done(usage::run(&job.job, csv, json)),
        Command::Receipt(receipt) => done(receipt::run(receipt, &report)),
        Command::Account(account) => done(account::run(context, account, &report)),
        Command::Context(command) => done(context::run(command, &report)),
        Command::Broker { args } => broker::run(&args),
        Command::Lab { args } => lab::run(&args, &report),
        Command::Completions { shell } => done(docs::completions(shell)),
        Command::Man { out } => done(docs::man(out.as_deref())),
        Command::Wallet(Wallet::Serve { until_idle }) => {
            done(crate::wallet::serve(context, until_idle, &report))
        }
        Command::Wallet(Wallet::Statement { days, json }) => {
            done(statement::run(context, days, json))
        }
    }
}

fn done(result: Result<()>) -> Result<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}

/// Writes to standard output; unlike `print!` it fails where the reader is gone.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// Writes JSON for programs.
fn print_json(value: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// What tests of several commands need.
#[cfg(test)]
pub mod tests {
    use onde_client::api::Hex;
    use onde_client::job::Job;
    use onde_wire::machine::Stage;
    use onde_wire::packet::JobStatus;
    use serde_json::json;

    /// A VM in this stage, that has used nothing.
    pub fn status(stage: Stage) -> JobStatus {
        JobStatus { stage, has_resumed: true, ..JobStatus::default() }
    }

    /// An open job of a packed program, as a file has it that names no more than it must.
    pub fn job() -> Job {
        let file = json!({
            "id": Hex([0xA1; 16]), "key": Hex([1; 32]), "title": "ls", "context": "lab",
            "node": 1, "node_ipv4": "127.0.0.1", "guest_ipv4": "127.0.0.1",
            "mem_mib": 256, "vcpus": 1, "value_micro": 1_000_000,
            "sold": 30, "released": 30, "budget": 100, "opened_at": 0, "has_agent": true,
            "payments": [],
        });
        serde_json::from_value(file).expect("a job's file")
    }
}
