//! What the cases share: a lab of two nodes, a customer with money, the `onde` program, and, for forgers,
//! the cluster's secret.

use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use onde_client::api::{CreditRequest, Job};
use onde_client::broker::{Broker, new_key};
use onde_client::echo::{Echo, Policy};
use onde_client::job::Jobs;
use onde_client::node::{self, Handle};
use onde_lab::{Lab, Shape, programs};
use onde_wire::cluster::{Cluster, TOKEN_MICRO};
use onde_wire::key::{self, Key, Tag, sha256};
use onde_wire::packet::Hello;
use onde_wire::plan;
use onde_wire::token::{BootToken, Origin};

/// Longest wait for anything here: emulated nodes on a loaded machine are slow, never this slow.
const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks at something that changes within seconds.
const LOOK_PERIOD: Duration = Duration::from_millis(100);
/// Memory of the VMs that forged tokens ask for, MiB.
pub const MEM_MIB: u32 = 128;
/// One try and a short wait, for packets that must not be answered.
pub const ONCE: Policy = Policy { tries: 2, first: Duration::from_millis(700) };

/// The world that cases live in.
pub struct World {
    /// The lab.
    pub lab: Lab,
    /// The customer's account.
    pub broker: Broker,
    /// The operator's.
    pub operator: Broker,
    /// The cluster file, secret and all.
    pub cluster: Cluster,
    /// What the nodes said before anything ran on them.
    pub new_nodes: Vec<Hello>,
    /// The loader.
    pub loader: Vec<u8>,
    dir: PathBuf,
}

impl World {
    /// Brings up the lab, enters its network, and opens an account.
    pub fn up() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("onde-market-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let usual = Shape::default();
        let memory_mib =
            std::env::var("ONDE_NODE_MIB").map_or(Ok(usual.memory_mib), |mib| mib.parse())?;
        let lab = Lab::up_for_now(&dir.join("lab"), &Shape { memory_mib, ..usual }, &[])?;
        lab.enter()?;
        let admin = fs::read_to_string(lab.dir().join("admin.key"))?;
        let url = lab.broker_url()?;
        let operator = Broker::new(&url, admin.trim())?;
        let opened = operator.open_account("customer")?;
        let micro = 100_000 * TOKEN_MICRO;
        operator.credit("customer", &CreditRequest { idempotency_key: new_key()?, micro })?;
        let text = fs::read_to_string(lab.dir().join("cluster"))?;
        let mut world = Self {
            new_nodes: Vec::new(),
            broker: Broker::new(&url, &opened.key)?,
            operator,
            cluster: Cluster::parse(&text)?,
            loader: fs::read(programs::find("loader")?)?,
            lab,
            dir,
        };
        world.onde(["account", "use", &opened.key, "--broker", &url])?;
        let both = || Ok(world.broker.nodes()?.iter().filter(|node| node.alive).count() == 2);
        wait("the broker to see both nodes", both)?;
        world.new_nodes = vec![world.hello(1)?, world.hello(2)?];
        Ok(world)
    }

    /// Takes the lab down and removes all files.
    pub fn down(self) -> Result<()> {
        let Self { lab, dir, .. } = self;
        lab.down()?;
        fs::remove_dir_all(dir)?;
        Ok(())
    }

    /// A file name that is this case's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The `onde` program as this customer calls it.
    pub fn command(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Command> {
        let mut command = Command::new(programs::find("onde")?);
        command
            .args(args)
            .env("ONDE_CONFIG", self.dir.join("config.toml"))
            .env("XDG_STATE_HOME", self.dir.join("state"))
            .env("LC_ALL", "C")
            .env_remove("ONDE_CONTEXT");
        Ok(command)
    }

    /// Runs `onde`, which must succeed; what it printed.
    pub fn onde(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String> {
        let mut command = self.command(args)?;
        let done = command.output()?;
        ensure!(done.status.success(), "{command:?}: {}", complaint(&done));
        Ok(String::from_utf8(done.stdout)?)
    }

    /// Runs `onde`, which must fail with status `status` and say `word` on standard error.
    pub fn onde_fails<const N: usize>(
        &self,
        args: [&str; N],
        status: i32,
        word: &str,
    ) -> Result<()> {
        let done = self.command(args)?.output()?;
        let told = complaint(&done);
        ensure!(done.status.code() == Some(status), "onde {args:?} ended otherwise: {told}");
        ensure!(told.contains(word), "onde {args:?} does not say {word:?}: {told}");
        Ok(())
    }

    /// The customer's job files.
    pub fn jobs(&self) -> Result<Jobs> {
        Ok(Jobs::open(&self.dir.join("state/onde/jobs"))?)
    }

    /// Stops what a failed case has left running, so that the next ones start from nothing; what it was.
    pub fn stop_all(&self) -> Vec<String> {
        let jobs = self.jobs().and_then(|jobs| Ok(jobs.list()?)).unwrap_or_default();
        let open = jobs.into_iter().filter(|job| job.settled.is_none());
        open.map(|job| {
            let stopped = self.onde(["stop", &job.id.to_string()]);
            let outcome = stopped.map_or_else(|error| format!("{error:#}"), |_| "stopped".into());
            format!("{} {:?}: {outcome}", job.id, job.name)
        })
        .collect()
    }

    /// Micro-tokens in the customer's account.
    pub fn balance(&self) -> Result<u64> {
        Ok(self.broker.account(1)?.balance_micro)
    }

    /// The customer's newest job.
    pub fn newest_job(&self) -> Result<Job> {
        self.broker.jobs(false, 1)?.jobs.pop().context("no job")
    }

    /// Micro-tokens that a settled job cost, as the broker's own numbers say.
    pub fn cost(&self, job: &Job) -> Result<u64> {
        ensure!(job.settled_by.is_some(), "job {} is not settled", job.id);
        Ok(u64::from(job.sold) * job.value_micro - job.refund_micro)
    }

    /// Address of a node.
    pub fn node(&self, number: u32) -> Ipv4Addr {
        self.cluster.plan.node(number).into()
    }

    /// What a node says of itself.
    pub fn hello(&self, number: u32) -> Result<Hello> {
        Ok(node::hello(&mut Echo::open()?, self.node(number), Policy::default())?)
    }

    /// A boot token for a node as the broker would make it, but for `change`.
    pub fn forge(&self, number: u32, change: impl FnOnce(&mut BootToken)) -> Result<Forged> {
        let hello = self.hello(number)?;
        let mut job = [0; 16];
        getrandom::fill(&mut job)?;
        let anchor = sha256(&job);
        // At the far end of the guests' addresses, where the broker has not got to.
        let guest = self.cluster.plan.guest(self.cluster.plan.guests_max() - 1 - u32::from(job[0]));
        let mut token = BootToken {
            broker_key: [0; 8],
            node: hello.node,
            incarnation: hello.incarnation,
            job,
            expiry_ms: hello.uptime_ms + 120_000,
            anchor: onde_wire::chain::walk(&anchor, CHAIN),
            value_micro: TOKEN_MICRO,
            first_count: 100,
            loader_sha256: sha256(&self.loader),
            mem_mib: MEM_MIB,
            held_mib: MEM_MIB,
            origin: Origin::Loader,
            vcpus: 1,
            disk_mib: 0,
            net_kib_s: 0,
            mac: plan::mac(guest),
            ipv4: guest,
            gateway: [0; 4],
            prefix_len: self.cluster.plan.prefix_len(),
            prices: self.cluster.prices,
        };
        change(&mut token);
        let node_key = Key::new(&key::node_key(&self.cluster.secret, &hello.node));
        let handle = Handle {
            job: token.job,
            key: Key::new(&key::job_key(&node_key, &token.job)),
            node: self.node(number),
        };
        Ok(Forged { handle, token, tag: token.sign(&node_key), chain: anchor })
    }
}

/// Tokens in a forged chain.
const CHAIN: u32 = 1000;

/// A boot token made here, and all that goes with it.
pub struct Forged {
    pub handle: Handle,
    pub token: BootToken,
    pub tag: Tag,
    chain: onde_wire::chain::Value,
}

impl Forged {
    /// The payment token with this index.
    pub fn payment(&self, index: u32) -> onde_wire::token::PaymentToken {
        let steps = CHAIN - (index - self.token.first_count);
        onde_wire::token::PaymentToken { index, value: onde_wire::chain::walk(&self.chain, steps) }
    }
}

fn complaint(done: &Output) -> String {
    format!("{}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim())
}

/// Waits for `what` to become true.
pub fn wait(what: &str, mut is_true: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is_true()? {
        if begun.elapsed() > PATIENCE {
            bail!("waited {} s for {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(LOOK_PERIOD);
    }
    Ok(())
}

/// The last lines of a node's console, for whoever reads why a case failed.
pub fn console_tail(lab: &Lab, node: u8) -> String {
    let console = lab.console(node).unwrap_or_default();
    let tail: Vec<_> = console.lines().rev().take(16).collect();
    tail.iter().rev().map(|line| format!("  node {node}: {line}\n")).collect()
}
