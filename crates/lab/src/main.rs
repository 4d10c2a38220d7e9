//! `onde-lab`: brings virtual metal up and down. `onde lab` runs this program;
//! all that it does is in the library.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};
use onde_lab::progress::Step;
use onde_lab::{Lab, Shape, State, Status};

/// Boots diskless Onde nodes as virtual machines on a network of their own.
#[derive(Parser)]
#[command(name = "onde-lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
    /// The lab's folder [default: ~/.local/state/onde/lab]
    #[arg(long, env = "ONDE_LAB_DIR", global = true)]
    dir: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Cmd {
    /// Bring the lab up and wait until every node answers
    Up(Up),
    /// End the lab; leaves nothing behind
    Down,
    /// Show how the lab is
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what a node wrote to its serial console
    Console {
        /// Number of the node, from 1
        node: u8,
    },
    /// Cut a node's power
    Kill {
        /// Number of the node, from 1
        node: u8,
    },
    /// Power a node on again and wait until it answers
    Boot {
        /// Number of the node, from 1
        node: u8,
    },
    /// Run a program in the lab's network
    Exec {
        /// The program and its arguments
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// What `up` starts in the background
    #[command(hide = true)]
    Keeper {
        /// The lab's folder
        folder: PathBuf,
    },
}

#[derive(Args)]
struct Up {
    /// Number of nodes
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// Memory of each node, MiB
    #[arg(long, value_name = "MiB", default_value_t = 1536)]
    memory: u32,
    /// Processors of each node; guests can have as many
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Leave out the broker
    #[arg(long)]
    no_broker: bool,
    /// Leave the nodes' console logs behind on `down`
    #[arg(long)]
    keep_console: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let dir = match cli.dir {
        Some(dir) => dir,
        None => onde_lab::default_dir()?,
    };
    match cli.command {
        Cmd::Up(up) => return self::up(dir, up),
        Cmd::Down => match Lab::find(&dir)? {
            Some(lab) => lab.down()?,
            None => onde_lab::clean(&dir)?,
        },
        Cmd::Status { json } => print_status(&Lab::attach(&dir)?.status()?, json)?,
        Cmd::Console { node } => print!("{}", Lab::attach(&dir)?.console(node)?),
        Cmd::Kill { node } => Lab::attach(&dir)?.kill_node(node)?,
        Cmd::Boot { node } => {
            let step = Step::new(&format!("node {node} boots"));
            Lab::attach(&dir)?.boot_node(node)?;
            step.done(&format!("node {node} is ready"));
        }
        Cmd::Exec { command } => return exec(dir, &command),
        Cmd::Keeper { folder } => onde_lab::keeper::run(&folder)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(dir: PathBuf, up: Up) -> Result<ExitCode> {
    let shape = Shape {
        nodes: up.nodes,
        memory_mib: up.memory,
        vcpus: up.vcpus,
        broker: !up.no_broker,
        keep_console: up.keep_console,
    };
    let step = Step::new(&match shape.nodes {
        1 => "1 node boots".to_owned(),
        count => format!("{count} nodes boot"),
    });
    let mut told = BTreeSet::new();
    let lab = Lab::up(&dir, &shape, |status| {
        if told.insert("processors".to_owned()) {
            step.line(&format!("processors: {}", status.accelerator));
        }
        for member in status.members.iter().filter(|member| member.state == State::Ready) {
            if told.insert(member.name.clone()) {
                let seconds = member.ready_ms as f64 / 1e3;
                step.line(&format!("{} {} ready in {seconds:.1} s", member.name, member.ipv4));
            }
        }
    })?;
    step.done(&format!("the lab is up: {}", lab.dir().display()));
    Ok(ExitCode::SUCCESS)
}

fn print_status(status: &Status, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(status)?);
        return Ok(());
    }
    for member in &status.members {
        let (name, state) = (&member.name, member.state.name());
        let seconds = member.ready_ms as f64 / 1e3;
        println!("{name:8} {:<14} {state:9} {seconds:5.1} s  {}", member.ipv4, member.note);
    }
    println!("processors: {}", status.accelerator);
    Ok(())
}

fn exec(dir: PathBuf, command: &[String]) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    Lab::attach(&dir)?.enter()?;
    let error = std::process::Command::new(&command[0]).args(&command[1..]).exec();
    bail!("cannot run {}: {error}", command[0])
}
