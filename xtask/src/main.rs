//! `cargo xtask`: one command for each thing that a developer or the test
//! machine does with the whole workspace. Never part of what is shipped.
#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod fuzz;
mod setup;
mod sim;
mod step;
mod tcb;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Onde's development commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Install what is missing on this machine and unpack the nodes' kernel
    Setup,
    /// Build every program, the bare-metal ones too
    Build,
    /// Show all that Onde does on a lab of two nodes, set-up and build included
    Demo,
    /// Run all checks and tests, the lab's included
    Test,
    /// Measure Onde beside its peers
    Bench {
        /// Only these groups: checks, polls, sales, boot, nodes, clones, move (default: all)
        groups: Vec<String>,
        /// Write the figures to this file, too
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Count the code that a customer or an owner has to trust
    Tcb,
    /// Play the whole market in one process, schedule by schedule, each from a seed of its own
    Sim {
        /// How many schedules
        #[arg(long, value_name = "N", default_value_t = 100_000)]
        schedules: u64,
        /// Only this one, and print what happens in it
        #[arg(long, value_name = "N", conflicts_with = "schedules")]
        seed: Option<u64>,
    },
    /// Attack the parsers of bytes from outside
    Fuzz {
        /// Only this one of fuzz/fuzz_targets
        target: Option<String>,
        /// How long each is attacked
        #[arg(long, value_name = "N", default_value_t = 30)]
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Cmd::Setup => setup::run(),
        Cmd::Build => build::run(),
        Cmd::Demo => demo::run(),
        Cmd::Test => test::run(),
        Cmd::Bench { groups, json } => bench::run(&groups, json.as_deref()),
        Cmd::Tcb => tcb::run(),
        Cmd::Sim { schedules, seed } => sim::run(schedules, seed),
        Cmd::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
    };
    report(done)
}

fn report(done: Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
