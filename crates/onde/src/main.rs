//! `onde`: the customer's command line, and the home node that pays for running VMs. Parses, acts, and says
//! what went wrong; all else is in `onde_client`. It runs as a plain user and never touches a node but by
//! packets.
#![forbid(unsafe_code)]

mod cli;
mod cluster;
mod command;
mod config;
mod failure;
mod interrupt;
mod launch;
mod moving;
mod pack;
mod payer;
mod progress;
mod report;
mod settle;
mod table;
mod template;
mod terminal;
mod wallet;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let result = command::run(cli::Cli::parse());
    terminal::restore();
    match result {
        Ok(code) => code,
        Err(error) if failure::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", failure::lines(&error));
            ExitCode::FAILURE
        }
    }
}
