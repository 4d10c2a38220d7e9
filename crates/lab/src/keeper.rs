//! The keeper: the process that a lab is. It runs in the lab's own namespaces,
//! starts QEMUs and the broker, and answers requests on a Unix socket. When it
//! ends, however it ends, the kernel ends its children and drops the network.
//!
//! ```text
//!  up ──starts──> unshare ──> keeper ──> QEMU (node 1), QEMU (node 2), ... broker
//!   └──guard (socket pair): closed before "keep" = give up──┘
//! ```

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};

use crate::kernel::KernelCache;
use crate::programs;
use crate::qemu::{self, Accelerator};
use crate::service::Service;
use crate::status::{Reply, Request, Shape, Status};
use crate::{lab, network};

/// Clients served at once; more than tests of one lab ever open.
const CLIENTS_MAX: usize = 64;
/// A request is one short line.
const REQUEST_SIZE_MAX: usize = 256;

struct Keeper {
    dir: PathBuf,
    shape: Shape,
    accelerator: Accelerator,
    kernel: KernelCache,
    nodes: Vec<Service>,
    broker: Option<Service>,
    clients: Vec<Client>,
    /// Something changed that those who watch have not been told.
    changed: bool,
}

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    watches: bool,
    /// The lab ends when this client goes.
    guards: bool,
}

/// Whether the keeper goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Go,
    End,
}

/// Runs the lab in `dir` until it is told to end. Standard input is the socket of the `up` that
/// started it. The caller has put this process into a fresh network namespace.
pub fn run(dir: &Path) -> Result<()> {
    refuse_host_network()?;
    // A terminal's Ctrl-C is meant for `up`, whose guard then tells us.
    rustix::process::setsid().context("cannot leave the terminal's session")?;
    let _lock = lab::lock(dir)?;
    let guard = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let shape: Shape = serde_json::from_slice(&fs::read(dir.join(lab::SHAPE))?)?;
    network::build(shape.nodes)?;
    let mut keeper = Keeper::new(dir, shape, guard)?;
    let listener = UnixListener::bind(dir.join(lab::SOCKET)).context("cannot listen")?;
    listener.set_nonblocking(true)?;
    keeper.start()?;
    let end = keeper.serve(&listener);
    keeper.stop();
    lab::remove(dir, keeper.shape.keep_console)?;
    end
}

/// The lab's own network has no link but `lo` yet; a host's has more, and is none of our business.
fn refuse_host_network() -> Result<()> {
    let links = fs::read_to_string("/proc/self/net/dev").context("no /proc")?;
    let names = links.lines().skip(2).filter_map(|line| line.split(':').next());
    if names.into_iter().any(|name| !matches!(name.trim(), "lo" | "sit0" | "tunl0")) {
        bail!("the keeper was started outside a network namespace of its own");
    }
    Ok(())
}

impl Keeper {
    fn new(dir: &Path, shape: Shape, guard: UnixStream) -> Result<Self> {
        let node = |number: u8| {
            let log = dir.join(lab::console(number));
            let name = format!("node {number}");
            Service::new(name, network::node_ipv4(number), "onde: node ready", log)
        };
        let broker = || {
            let log = dir.join("broker.log");
            Service::new("broker".into(), network::owner_ipv4(), "onde: broker ready", log)
        };
        Ok(Self {
            dir: dir.to_owned(),
            accelerator: Accelerator::detect(),
            kernel: KernelCache::find()?,
            nodes: (1..=shape.nodes).map(node).collect(),
            broker: shape.broker.then(broker),
            clients: vec![Client::new(guard, true)?],
            shape,
            // `up` wants to hear that all has started.
            changed: true,
        })
    }

    fn start(&mut self) -> Result<()> {
        for number in 1..=self.shape.nodes {
            self.boot(number)?;
        }
        if let Some(broker) = &mut self.broker {
            broker.start(broker_command(&self.dir)?)?;
        }
        Ok(())
    }

    fn boot(&mut self, number: u8) -> Result<()> {
        let image = self.dir.join(lab::IMAGE);
        let scratch = self.dir.join(lab::scratch(number));
        let (shape, accelerator) = (&self.shape, self.accelerator);
        let qemu = qemu::command(number, shape, accelerator, &self.kernel, &image, &scratch)?;
        self.nodes[usize::from(number) - 1].start(qemu)
    }

    fn stop(&mut self) {
        // An error here means that the process is gone already.
        for node in &mut self.nodes {
            node.kill().ok();
        }
        if let Some(broker) = &mut self.broker {
            broker.stop().ok();
        }
    }

    fn serve(&mut self, listener: &UnixListener) -> Result<()> {
        loop {
            if !self.changed {
                self.wait(listener)?;
            }
            self.accept(listener)?;
            for service in self.nodes.iter_mut().chain(&mut self.broker) {
                self.changed |= service.step()?;
            }
            if self.step_clients() == Next::End {
                return Ok(());
            }
            if std::mem::take(&mut self.changed) {
                self.publish();
            }
        }
    }

    fn wait(&self, listener: &UnixListener) -> Result<()> {
        let services = self.nodes.iter().chain(&self.broker).flat_map(Service::events);
        let clients = self.clients.iter().map(|client| client.stream.as_fd());
        let fds: Vec<BorrowedFd> = services.chain(clients).chain([listener.as_fd()]).collect();
        let mut fds: Vec<PollFd> =
            fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait"),
        }
    }

    fn accept(&mut self, listener: &UnixListener) -> Result<()> {
        match listener.accept() {
            Ok((stream, _)) if self.clients.len() < CLIENTS_MAX => {
                self.clients.push(Client::new(stream, false)?);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error).context("cannot accept"),
        }
    }

    fn status(&self) -> Status {
        Status {
            shape: self.shape.clone(),
            accelerator: self.accelerator.name().to_owned(),
            members: self.nodes.iter().chain(&self.broker).map(Service::member).collect(),
        }
    }

    fn publish(&mut self) {
        let reply = Reply::Status(self.status());
        self.clients.retain_mut(|client| !client.watches || client.send(&reply).is_ok());
    }

    fn step_clients(&mut self) -> Next {
        let mut clients = std::mem::take(&mut self.clients);
        let mut next = Next::Go;
        clients.retain_mut(|client| {
            // At the end all stay: their last news is that the keeper is gone, when all of it is.
            let stays = self.step_client(client, &mut next);
            if !stays && client.guards {
                next = Next::End;
            }
            stays || next == Next::End
        });
        self.clients = clients;
        next
    }

    /// Serves one client's requests; says whether it stays.
    fn step_client(&mut self, client: &mut Client, next: &mut Next) -> bool {
        loop {
            let request = match client.receive() {
                Ok(Some(request)) => request,
                Ok(None) => return true,
                Err(_) => return false,
            };
            let reply = match self.answer(request, client, next) {
                Ok(()) => Reply::Status(self.status()),
                Err(error) => Reply::Error(format!("{error:#}")),
            };
            if client.send(&reply).is_err() {
                return false;
            }
            if *next == Next::End {
                return true;
            }
        }
    }

    fn answer(&mut self, request: Request, client: &mut Client, next: &mut Next) -> Result<()> {
        match request {
            Request::Status => {}
            Request::Watch => client.watches = true,
            Request::Keep => client.guards = false,
            Request::Hold => client.watches = false,
            Request::Kill(number) => {
                self.node(number)?.kill()?;
                self.changed = true;
            }
            Request::Boot(number) => {
                if self.node(number)?.is_running() {
                    bail!("node {number} runs already");
                }
                self.boot(number)?;
                self.changed = true;
            }
            Request::Down => {
                self.stop();
                *next = Next::End;
            }
        }
        Ok(())
    }

    fn node(&mut self, number: u8) -> Result<&mut Service> {
        let count = self.nodes.len();
        usize::from(number)
            .checked_sub(1)
            .and_then(|index| self.nodes.get_mut(index))
            .with_context(|| format!("the lab has nodes 1 to {count}, and no node {number}"))
    }
}

impl Client {
    fn new(stream: UnixStream, guards: bool) -> Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, line: Vec::new(), watches: guards, guards })
    }

    /// A whole request, if there is one. An error means that the client is gone or speaks nonsense.
    fn receive(&mut self) -> Result<Option<Request>> {
        let mut byte = [0];
        while self.line.len() < REQUEST_SIZE_MAX {
            match self.stream.read(&mut byte) {
                Ok(0) => bail!("closed"),
                Ok(_) if byte[0] == b'\n' => {
                    return Ok(Some(serde_json::from_slice(&std::mem::take(&mut self.line))?));
                }
                Ok(_) => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        bail!("a request is too long")
    }

    /// A client whose buffer is full does not listen any more: an error.
    fn send(&mut self, reply: &Reply) -> Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        Ok(self.stream.write_all(&line)?)
    }
}

/// TCP port of the broker's API.
pub const BROKER_PORT: u16 = 8400;

/// The broker's command line.
fn broker_command(dir: &Path) -> Result<std::process::Command> {
    let mut broker = qemu::tied(programs::find("broker")?.as_os_str());
    broker.arg("--listen").arg(format!("{}:{BROKER_PORT}", network::owner_ipv4()));
    broker.arg("--db").arg(dir.join("broker.db"));
    broker.arg("--cluster").arg(dir.join(lab::CLUSTER));
    broker.arg("--admin-key-file").arg(dir.join("admin.key"));
    Ok(broker)
}
