//! The command line's words. Only definitions: `command` acts on them; `completions` and `man` print them.

use clap::{Args, Parser, Subcommand};
use onde_client::api::TOKENS_PER_BOOT_MAX;
use std::path::PathBuf;

/// Drop a token in, get a virtual machine, take your change when you are done.
#[derive(Debug, Parser)]
#[command(name = "onde", version, max_term_width = 100, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Global {
    /// Use this context instead of the current one
    #[arg(long, value_name = "NAME", env = "ONDE_CONTEXT", global = true)]
    pub context: Option<String>,
    /// Say nothing but errors and the program's own output
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program in a virtual machine of its own
    ///
    /// Packs PROGRAM with the libraries it needs, buys a VM, boots it, and connects your terminal or pipes.
    /// The exit status is the program's; 125 if onde itself fails. INT, TERM and HUP go to the program; a
    /// second INT within two seconds stops the VM. Whatever ends it, unused tokens come back.
    Run(Run),
    /// Boot a kernel of your own in a virtual machine, or wake up what a snapshot holds
    ///
    /// With --from, the VM goes on where its snapshot was taken, with the snapshot's memory size and processors, but
    /// with addresses, a name and random numbers of its own. One file wakes up any number of times; with -n, it goes to one
    /// node once, and the VMs there share what none of them has written.
    Boot(Boot),
    /// Copy a job's running VM into a file
    ///
    /// The VM goes on; it stands still for a moment only. `onde boot --from FILE` makes VMs of the file. The file holds all
    /// of the VM's memory, secrets and all.
    Snapshot {
        #[command(flatten)]
        job: JobName,
        /// The file
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make more VMs that are a job's running VM at one instant
    ///
    /// The VM goes on. Each of the others is a job of its own, with addresses, a name, random numbers and tokens of its own
    /// before any of its programs goes on; a home node in the background pays for it. Prints their ids. One that fails is
    /// given back and does not harm the others.
    Fork(Fork),
    /// Move a job's running VM to another node
    ///
    /// The VM moves itself: its program keeps its connections, its output and its exit status. The old node gives
    /// change. If anything fails, the VM goes on where it was.
    Migrate(Migrate),
    /// Buy a VM for a job to move to, and print the ticket
    ///
    /// Whoever has the ticket inside the job's VM moves it there with `onde-agent migrate --token TICKET`, within two minutes
    /// of the sale. What pays for the job goes on with it there.
    Ticket {
        #[command(flatten)]
        job: JobName,
        /// Number of the node
        #[arg(value_name = "NODE")]
        node: u32,
        /// First payment: what the new VM has until it is paid for as the old one was, on its way
        #[arg(long, value_name = "N", default_value_t = 100)]
        tokens: u32,
    },
    /// List jobs
    Ps {
        /// Settled jobs, too
        #[arg(long)]
        all: bool,
        /// What they cost: a second, so far, and how long budget and balance last
        #[arg(long)]
        cost: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show how a job stands: its stage, meters and money
    Status {
        #[command(flatten)]
        job: JobName,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the serial console of a job's VM
    Console {
        #[command(flatten)]
        job: JobName,
        /// Go on until the VM ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Run one more program in a job's VM
    Exec {
        #[command(flatten)]
        job: JobName,
        /// Give it a terminal
        #[arg(short, long)]
        tty: bool,
        /// The program and its arguments, as they are called in the VM
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<std::ffi::OsString>,
    },
    /// Connect to a job's program; Ctrl-C leaves it running
    Attach {
        #[command(flatten)]
        job: JobName,
    },
    /// Print what a job's program wrote
    Logs {
        #[command(flatten)]
        job: JobName,
        /// Go on until the program ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Buy tokens for a job, beyond its budget, and hand them to its node
    Pay {
        #[command(flatten)]
        job: JobName,
        /// How many
        #[arg(value_parser = clap::value_parser!(u32).range(1..=4096))]
        tokens: u32,
    },
    /// Put a job's VM on its node's disk, where only storage is paid for
    ///
    /// The VM stands still and gives its memory back. It stays there until `onde resume`, for as long as its tokens last.
    Suspend {
        #[command(flatten)]
        job: JobName,
    },
    /// Go on with a job's VM that is on its node's disk
    ///
    /// With --node it wakes up where it is and then moves, as by `onde migrate`. If the move fails, it runs on where it slept.
    Resume {
        #[command(flatten)]
        job: JobName,
        /// Number of the node to move it to
        #[arg(long, value_name = "NODE")]
        node: Option<u32>,
    },
    /// End a job's VM, and get the change
    Stop {
        #[command(flatten)]
        job: JobName,
    },
    /// Compare what the nodes charge for a VM, the cheapest first
    Price {
        /// Memory, MiB
        #[arg(short, long, value_name = "MiB", default_value_t = 256)]
        #[arg(value_parser = clap::value_parser!(u32).range(64..=65536))]
        memory: u32,
        /// Number of virtual processors
        #[arg(long, value_name = "N", default_value_t = 1)]
        #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
        vcpus: u16,
        /// A disk of its own, MiB
        #[arg(long, value_name = "MiB", default_value_t = 0, hide_default_value = true)]
        #[arg(value_parser = clap::value_parser!(u32).range(..=32768))]
        disk: u32,
        /// Hours that it runs
        #[arg(long, value_name = "N", default_value_t = 1)]
        #[arg(value_parser = clap::value_parser!(u32).range(1..=87600))]
        hours: u32,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a job used, and what each meter charged
    Usage {
        #[command(flatten)]
        job: JobName,
        /// One line for each time that the broker looked, as CSV
        #[arg(long)]
        csv: bool,
        /// The same as JSON
        #[arg(long, conflicts_with = "csv")]
        json: bool,
    },
    /// Receipts of settled jobs
    #[command(subcommand)]
    Receipt(Receipt),
    /// Nodes
    #[command(subcommand)]
    Node(Node),
    /// Your account with the broker
    #[command(subcommand)]
    Account(Account),
    /// Clusters this machine knows
    #[command(subcommand)]
    Context(Context),
    /// The owner's broker: run it, or audit, back up and restore its ledger (see `onde broker audit --help`)
    #[command(disable_help_flag = true)]
    Broker {
        /// What `broker` is to do
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Virtual metal: a whole cluster on this machine (see `onde lab --help`)
    #[command(disable_help_flag = true)]
    Lab {
        /// What `onde-lab` is to do: up, down, status, console, kill, boot, exec
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all of them to a folder
    Man {
        /// The folder
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// What pays for detached jobs, and what was paid
    #[command(subcommand)]
    Wallet(Wallet),
}

#[derive(Debug, Subcommand)]
pub enum Wallet {
    /// Pay for all detached jobs of a context while they make progress
    ///
    /// `onde run -d` and `onde boot` start one in the background that ends with the last job. Of several only one
    /// serves. What it needs to know is in the job files: a wallet that died goes on where it was.
    Serve {
        /// End when no job is left
        #[arg(long, hide = true)]
        until_idle: bool,
    },
    /// Show what each job cost, by day
    Statement {
        /// Days back, today included
        #[arg(long, value_name = "N", default_value_t = 30)]
        #[arg(value_parser = clap::value_parser!(u32).range(1..=3660))]
        days: u32,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// The job's name, or the first digits of its id
    #[arg(value_name = "JOB", required_unless_present = "drain", conflicts_with = "drain")]
    pub job: Option<String>,
    /// Number of the node to move to
    #[arg(value_name = "NODE", required_unless_present = "drain", conflicts_with = "drain")]
    pub node: Option<u32>,
    /// Move all your jobs away from this node; those that sleep are woken for it, and sleep again
    #[arg(long, value_name = "N")]
    pub drain: Option<u32>,
    /// Number of the node to move them to [default: for each the cheapest that fits]
    #[arg(long, value_name = "N", requires = "drain")]
    pub to: Option<u32>,
    /// As JSON, a line each: how far it is, and what came of it
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct JobName {
    /// The job's name, or the first digits of its id
    #[arg(value_name = "JOB")]
    pub job: String,
}

/// What to buy.
#[derive(Clone, Debug, Args)]
pub struct Order {
    /// Number of the node [default: the cheapest that fits]
    #[arg(long, value_name = "N")]
    pub node: Option<u32>,
    /// Memory, MiB
    #[arg(short, long, value_name = "MiB", default_value_t = 256)]
    #[arg(value_parser = clap::value_parser!(u32).range(64..=65536))]
    pub memory: u32,
    /// Number of virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
    pub vcpus: u16,
    /// A disk of its own, MiB: /dev/vda in the VM, empty at first
    ///
    /// It moves, sleeps and is copied with the VM, and ends with it.
    #[arg(long, value_name = "MiB", default_value_t = 0, hide_default_value = true)]
    #[arg(value_parser = clap::value_parser!(u32).range(..=32768))]
    pub disk: u32,
    /// First payment, tokens [default: 30, or the budget if that is less]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub tokens: Option<u32>,
    /// Most that is ever bought, tokens [default: the first payment if that is given, else 600]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(TOKENS_PER_BOOT_MAX)))]
    pub budget: Option<u32>,
    /// A name for the job
    #[arg(long)]
    pub name: Option<String>,
    /// Pay only while this succeeds: `/bin/sh -c COMMAND` here, every few seconds, with ONDE_JOB set
    ///
    /// It runs in the present folder, on this machine. One that takes longer than 15 seconds has failed. While it
    /// fails the job gets no tokens; when it succeeds again, it does. For what is in the VM, take `onde exec $ONDE_JOB`.
    #[arg(long = "while", value_name = "COMMAND")]
    pub while_command: Option<String>,
    /// Pay only while this file on this machine changes
    #[arg(long, value_name = "FILE")]
    pub progress_file: Option<PathBuf>,
    /// How long the progress file may stay as it is, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "progress_file")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=31_536_000))]
    pub progress_within: u32,
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub order: Order,
    /// A file or folder to take along, to the same path in the VM; PATH:PATH for another one. A program brings its libraries
    #[arg(short, long, value_name = "PATH")]
    pub file: Vec<PathBuf>,
    /// An environment variable for the program: NAME=VALUE, or NAME for its value here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<std::ffi::OsString>,
    /// Give it a terminal
    #[arg(short, long, conflicts_with = "detach")]
    pub tty: bool,
    /// Leave so many tokens with the VM, which pays by itself while this machine is away
    ///
    /// They are within the budget, and renewed as they are used. A node can read what is in its VMs: one that cheats can
    /// take them.
    #[arg(long, value_name = "N", default_value_t = 0)]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub purse: u32,
    /// Print the job's id and go; a wallet in the background pays
    #[arg(short, long)]
    pub detach: bool,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub struct Boot {
    #[command(flatten)]
    pub order: Order,
    /// The kernel: bzImage, or ELF file with or without a PVH note
    #[arg(long, value_name = "FILE", required_unless_present_any = ["from", "clone"])]
    pub kernel: Option<PathBuf>,
    /// The initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1")]
    pub cmdline: String,
    /// Follow the console until the VM ends, then settle
    #[arg(long)]
    pub follow: bool,
    /// Go on where this snapshot was taken
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "cmdline", "follow", "memory", "vcpus"])]
    pub from: Option<PathBuf>,
    /// Keep the snapshot on the node as a template, for --clone; nothing runs in it
    #[arg(long, requires = "from", conflicts_with = "count")]
    pub template: bool,
    /// Go on where this template was taken, on its node
    #[arg(long, value_name = "JOB", conflicts_with_all = ["kernel", "from", "initrd", "cmdline", "follow", "memory", "vcpus", "node"])]
    pub clone: Option<String>,
    /// Most memory that each clone may have for itself, MiB, and pays for; one that wants more is ended [default: all]
    #[arg(long, value_name = "MiB")]
    pub held: Option<u32>,
    /// Number of VMs to make of the snapshot or template; each has the budget to itself
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, conflicts_with = "kernel")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub count: u16,
}

#[derive(Debug, Args)]
pub struct Fork {
    #[command(flatten)]
    pub job: JobName,
    /// Number of VMs to make
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    pub count: u16,
    /// Numbers of the nodes to make them on, in turn [default: the cheapest that fits, for each]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    pub nodes: Vec<u32>,
    /// First payment of each, tokens [default: 30, or the budget if that is less]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub tokens: Option<u32>,
    /// Most that may be spent on each, tokens [default: the first payment if that is given, else 600]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub budget: Option<u32>,
    /// Names for the jobs: NAME-1, NAME-2, ...
    #[arg(long)]
    pub name: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// List nodes, what they have free and what they charge
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make this machine a node (root)
    Run {
        /// The network interface that the node's own VMs share
        #[arg(long, value_name = "IF")]
        interface: String,
        /// The cluster file
        #[arg(long, value_name = "FILE")]
        cluster: PathBuf,
        /// Number of this node [default: from its MAC]
        #[arg(long, value_name = "N")]
        node: Option<u32>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Receipt {
    /// Print a settled job's receipt, signed by the broker
    Get {
        #[command(flatten)]
        job: JobName,
    },
    /// Check a receipt, without asking anybody
    Verify {
        /// The receipt
        file: PathBuf,
        /// The broker's key [default: any that a context of yours knows]
        #[arg(long, value_name = "ed25519:HEX")]
        key: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Account {
    /// Show your balance and what moved it
    Show {
        /// Lines of the journal
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: u32,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Take an account's key into a context
    Use {
        /// The API key that the operator gave you
        key: String,
        /// The broker, https://HOST:PORT [default: the current context's]
        #[arg(long, value_name = "URL")]
        broker: Option<String>,
        /// The digest of the broker's certificate, where no authority known here signed that
        #[arg(long, value_name = "sha256:DIGEST", requires = "broker")]
        pin: Option<String>,
        /// Take an http:// address: whoever is on the way can read the key and spend the money
        #[arg(long)]
        plain_http: bool,
    },
    /// Open an account and print its API key (operator)
    Open {
        /// Its name
        name: String,
        #[command(flatten)]
        operator: Operator,
    },
    /// Make one more key of an account, and print it (operator)
    Key {
        /// The account's name
        name: String,
        /// It can look, and neither buy nor stop
        #[arg(long)]
        read_only: bool,
        /// It reads the broker's figures (GET /metrics), and nothing else
        #[arg(long, conflicts_with = "read_only")]
        metrics: bool,
        /// It ends after so many days [default: never]
        #[arg(long, value_name = "N")]
        #[arg(value_parser = clap::value_parser!(u64).range(1..=3650))]
        days: Option<u64>,
        #[command(flatten)]
        operator: Operator,
    },
    /// Make a key worthless (operator)
    Revoke {
        /// The key's id, as it was told when the key was made
        id: String,
        #[command(flatten)]
        operator: Operator,
    },
    /// Put tokens into an account (operator)
    Credit {
        /// Its name
        name: String,
        /// How many
        tokens: u64,
        #[command(flatten)]
        operator: Operator,
    },
}

#[derive(Debug, Args)]
pub struct Operator {
    /// File with the operator's key [default: the lab's, in a lab's context]
    #[arg(long, value_name = "FILE", env = "ONDE_OPERATOR_KEY_FILE")]
    pub operator_key: Option<PathBuf>,
    /// The broker [default: the context's]
    #[arg(long, value_name = "URL")]
    pub broker: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Context {
    /// List contexts
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a context the current one
    Use {
        /// Its name
        name: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn is_well_formed() {
        Cli::command().debug_assert();
    }

    fn check(line: &str, accepted: bool) {
        let parsed = Cli::try_parse_from(line.split(' '));
        assert_eq!(parsed.is_ok(), accepted, "{line}: {:?}", parsed.err().map(|e| e.to_string()));
    }

    #[test]
    fn takes_what_the_manual_says_and_nothing_else() {
        check("onde run -- ls -l /", true);
        check("onde run --memory 512 --vcpus 2 --budget 9 -d --name a -- ./solve", true);
        check("onde run", false);
        check("onde run --memory 1 -- ls", false);
        check("onde run --tokens 5000 -- ls", false);
        check("onde run -d -t -- sh", false);
        check("onde boot --kernel vmlinuz --initrd i --cmdline quiet", true);
        check("onde boot", false);
        check("onde boot --from f -n 3 --budget 9", true);
        check("onde boot --from f -n 0", false);
        check("onde boot --from f --kernel k", false);
        check("onde boot --from f --memory 512", false);
        check("onde boot --kernel k -n 2", false);
        check("onde snapshot a1 -o f --json", true);
        check("onde snapshot a1", false);
        check("onde fork a1 -n 8 --nodes 1,2 --budget 9 --name w", true);
        check("onde fork a1 -n 0", false);
        check("onde fork", false);
        check("onde exec a1 -- ps -e", true);
        check("onde exec a1", false);
        check("onde pay a1 10", true);
        check("onde pay a1 0", false);
        check("onde suspend a1", true);
        check("onde suspend", false);
        check("onde resume a1", true);
        check("onde resume a1 --node 2", true);
        check("onde lab up --nodes 3", true);
        check("onde lab --help", true);
        check("onde node run --interface eth0 --cluster c", true);
        check("onde account use K --broker https://b:1 --pin sha256:00 --context prod", true);
        check("onde account key a --read-only --days 30", true);
        check("onde account key a --metrics", true);
        check("onde account key a --metrics --read-only", false);
        check("onde usage a1 --csv", true);
        check("onde usage a1 --csv --json", false);
        check("onde receipt verify f --key ed25519:00", true);
        check("onde account use K", true);
        check("onde account use K --pin sha256:00", false);
        check("onde ps --all --json -q", true);
        check("onde price --memory 512 --vcpus 2 --hours 3 --json", true);
        check("onde price --disk 1024", true);
        check("onde price --disk 40000", false);
        check("onde price --hours 0", false);
        check("onde ps --cost", true);
        check("onde wallet serve", true);
        check("onde wallet statement --days 7 --json", true);
        check("onde run --while true --progress-file f --progress-within 9 -- ls", true);
        check("onde run --progress-within 9 -- ls", false);
        check("onde run --purse 60 -d -- ls", true);
    }

    #[test]
    fn every_command_has_help() {
        fn walk(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{} has no help", command.get_name());
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }
}
