//! A lab as its users hold it: brought up, entered, and taken down. Talks to
//! the keeper over the socket in the lab's folder; starts no process but it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::keeper::BROKER_PORT;
use crate::kernel::KernelCache;
use crate::status::{NODES_MAX, Reply, Request, Shape, State, Status};
use crate::{cluster, image, network, programs};

/// The keeper's socket in the lab's folder.
pub(crate) const SOCKET: &str = "keeper.sock";
/// What was asked for.
pub(crate) const SHAPE: &str = "shape.json";
/// The node image.
pub(crate) const IMAGE: &str = "node.cpio";
/// The cluster file.
pub(crate) const CLUSTER: &str = "cluster";
/// Marks the folder as a lab's, and is locked while its keeper lives.
const MARK: &str = ".onde-lab";
/// What the keeper and QEMU complain to.
const KEEPER_LOG: &str = "keeper.log";

/// A node needs 2-4 s under emulation on an idle machine; a loaded one is ten times slower.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// Lines of each log that an error shows.
const TAIL_LINES: usize = 5;
/// The kernel takes 107 bytes for a Unix socket's path.
const SOCKET_PATH_MAX: usize = 107;

/// Name of a node's console log in the lab's folder.
pub(crate) fn console(node: u8) -> String {
    format!("console-{node}.log")
}

/// Name of the file behind a node's scratch device.
pub(crate) fn scratch(node: u8) -> String {
    format!("scratch-{node}")
}

/// The folder of the default lab: `$ONDE_LAB_DIR`, else `$XDG_STATE_HOME/onde/lab`, else
/// `~/.local/state/onde/lab`.
pub fn default_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("ONDE_LAB_DIR") {
        return Ok(dir.into());
    }
    if let Some(dir) = std::env::var_os("XDG_STATE_HOME") {
        return Ok(PathBuf::from(dir).join("onde/lab"));
    }
    let home = std::env::var_os("HOME").context("neither ONDE_LAB_DIR nor HOME is set")?;
    Ok(PathBuf::from(home).join(".local/state/onde/lab"))
}

/// A lab that runs.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    /// Where the lab ends with this value: the keeper minds that it closes.
    _guard: Option<UnixStream>,
}

impl Lab {
    /// Brings up the lab in `dir` and waits until all of it is ready; `on_change` sees each state
    /// on the way. Where a lab of this shape runs in `dir` already, it is that one. On error, and
    /// when this process dies on the way, nothing is left running.
    pub fn up(dir: &Path, shape: &Shape, mut on_change: impl FnMut(&Status)) -> Result<Self> {
        check(shape)?;
        let dir = std::path::absolute(dir)?;
        if let Some(lab) = Self::find(&dir)? {
            let status = lab.status()?;
            if status.shape != *shape {
                bail!(
                    "another lab runs in {}: {:?}\nhint: onde-lab down",
                    dir.display(),
                    status.shape
                );
            }
            lab.revive(&status)?;
            on_change(&lab.status()?);
            return Ok(lab);
        }
        start(&dir, shape, &[], on_change, Request::Keep)?;
        Ok(Self { dir, _guard: None })
    }

    /// Brings up a lab in `dir` with more files in the node image. It ends with this value, and with this process,
    /// however that ends: for tests and benchmarks. No lab runs there yet.
    pub fn up_for_now(dir: &Path, shape: &Shape, extra: &[image::Extra]) -> Result<Self> {
        check(shape)?;
        let dir = std::path::absolute(dir)?;
        let guard = start(&dir, shape, extra, |_| {}, Request::Hold)?;
        Ok(Self { dir, _guard: Some(guard.stream) })
    }

    /// Powers on what is down.
    fn revive(&self, status: &Status) -> Result<()> {
        for node in 1..=status.shape.nodes {
            if status.members[usize::from(node) - 1].state == State::Down {
                self.boot_node(node)?;
            }
        }
        Ok(())
    }

    /// The lab that runs in `dir`, if one does.
    pub fn find(dir: &Path) -> Result<Option<Self>> {
        let dir = std::path::absolute(dir)?;
        match UnixStream::connect(dir.join(SOCKET)) {
            Ok(_) => Ok(Some(Self { dir, _guard: None })),
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => Ok(None),
                _ => {
                    Err(error).with_context(|| format!("cannot reach the lab in {}", dir.display()))
                }
            },
        }
    }

    /// The lab that runs in `dir`; an error with a hint where none does.
    pub fn attach(dir: &Path) -> Result<Self> {
        Self::find(dir)?
            .with_context(|| format!("no lab runs in {}\nhint: onde-lab up", dir.display()))
    }

    /// The lab's folder: `cluster`, `admin.key`, `tls.pin`, `broker.db`, logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The address of the lab's broker, with the pin of the certificate that it made at its first start.
    pub fn broker_url(&self) -> Result<String> {
        let pin = fs::read_to_string(self.dir.join("tls.pin")).context("the lab has no broker")?;
        Ok(format!("https://{}:{BROKER_PORT}#{}", network::owner_ipv4(), pin.trim()))
    }

    /// How the lab is.
    pub fn status(&self) -> Result<Status> {
        Connection::open(&self.dir)?.ask(Request::Status)
    }

    /// Cuts the power of node `node`.
    pub fn kill_node(&self, node: u8) -> Result<()> {
        Connection::open(&self.dir)?.ask(Request::Kill(node)).map(drop)
    }

    /// Powers node `node` on and waits until it is ready.
    pub fn boot_node(&self, node: u8) -> Result<()> {
        let mut connection = Connection::open(&self.dir)?;
        connection.ask(Request::Boot(node))?;
        connection.send(Request::Watch)?;
        wait_until(&mut connection, |_| {}, Some(usize::from(node) - 1))
    }

    /// What node `node` wrote to its serial console.
    pub fn console(&self, node: u8) -> Result<String> {
        let file = self.console_file(node);
        let bytes = fs::read(&file).with_context(|| format!("no node {node} in this lab"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The file that node `node`'s serial console is written to.
    pub fn console_file(&self, node: u8) -> PathBuf {
        self.dir.join(console(node))
    }

    /// Process id of the keeper, as this process sees it.
    pub fn keeper(&self) -> Result<Pid> {
        let connection = Connection::open(&self.dir)?;
        Ok(rustix::net::sockopt::socket_peercred(&connection.stream)?.pid)
    }

    /// Moves this process into the lab's network (and user) namespace for good. Only sockets made
    /// afterwards are in the lab. The process has one thread only at this time.
    pub fn enter(&self) -> Result<()> {
        let pid = self.keeper()?;
        let keeper = pidfd_open(pid, PidfdFlags::empty())?;
        // An answer now means that the keeper lives, so the number was still its own.
        self.status()?;
        let mut spaces = ThreadNameSpaceType::NETWORK;
        let theirs = fs::read_link(format!("/proc/{}/ns/user", pid.as_raw_nonzero()))?;
        if theirs != fs::read_link("/proc/self/ns/user")? {
            spaces |= ThreadNameSpaceType::USER;
        }
        move_into_thread_name_spaces(keeper.as_fd(), spaces)
            .context("cannot enter the lab's network")
    }

    /// Ends the lab: its keeper, nodes, broker and network. The folder goes, too.
    pub fn down(self) -> Result<()> {
        let mut connection = Connection::open(&self.dir)?;
        connection.ask(Request::Down)?;
        // The keeper's last act is to close this.
        connection.close();
        Ok(())
    }
}

/// Removes what a lab that crashed left in `dir`. No lab runs there.
pub fn clean(dir: &Path) -> Result<()> {
    if dir.join(MARK).exists() {
        let _lock = lock(dir)?;
        remove(dir, false)?;
    }
    Ok(())
}

/// Starts the keeper and waits until all of its lab is ready; then tells it `last`.
fn start(
    dir: &Path,
    shape: &Shape,
    extra: &[image::Extra],
    on_change: impl FnMut(&Status),
    last: Request,
) -> Result<Connection> {
    prepare(dir, shape, extra)?;
    let mut guard = start_keeper(dir)?;
    let ready = wait_until(&mut guard, on_change, None).and_then(|()| guard.ask(last).map(drop));
    match ready {
        Ok(()) => Ok(guard),
        Err(error) => {
            let error = explain(error, dir);
            guard.close();
            Err(error)
        }
    }
}

fn check(shape: &Shape) -> Result<()> {
    if !(1..=NODES_MAX).contains(&shape.nodes) {
        bail!("a lab has 1 to {NODES_MAX} nodes");
    }
    if shape.memory_mib < 256 || shape.vcpus == 0 {
        bail!("a node needs at least 256 MiB of memory and one processor");
    }
    Ok(())
}

/// Makes `dir` a lab's folder with all that the keeper needs in it.
fn prepare(dir: &Path, shape: &Shape, extra: &[image::Extra]) -> Result<()> {
    if dir.join(SOCKET).as_os_str().len() > SOCKET_PATH_MAX {
        bail!("{} is too long a path for a lab\nhint: set ONDE_LAB_DIR", dir.display());
    }
    clean(dir)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot create {}", dir.display()))?;
    let foreign = fs::read_dir(dir)?.next().is_some() && !dir.join(MARK).exists();
    if foreign {
        bail!("{} has files in it and is no lab's folder", dir.display());
    }
    let _lock = lock(dir)?;
    fs::write(dir.join(SHAPE), serde_json::to_vec(shape)?)?;
    cluster::create(&dir.join(CLUSTER))?;
    let secrets = cluster::read(&dir.join(CLUSTER))?;
    image::build(&dir.join(IMAGE), &KernelCache::find()?, &secrets, extra)
}

/// Locks the lab's folder for the life of the result.
pub(crate) fn lock(dir: &Path) -> Result<File> {
    let mark = OpenOptions::new().create(true).append(true).open(dir.join(MARK))?;
    rustix::fs::flock(&mark, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("another `onde-lab up` is at work in {}", dir.display()))?;
    Ok(mark)
}

/// Removes the lab's folder, or all of it but the consoles.
pub(crate) fn remove(dir: &Path, keep_console: bool) -> Result<()> {
    if !keep_console {
        return fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()));
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let kept = name.to_string_lossy().starts_with("console-") || name == MARK;
        if !kept {
            fs::remove_file(dir.join(name))?;
        }
    }
    Ok(())
}

/// Starts the keeper in namespaces of its own; the lab ends when the connection is dropped
/// before [`Request::Keep`].
fn start_keeper(dir: &Path) -> Result<Connection> {
    let (guard, theirs) = UnixStream::pair()?;
    let log = File::create(dir.join(KEEPER_LOG))?;
    let mut unshare = Command::new(programs::required("unshare")?);
    unshare.arg("--net");
    if !rustix::process::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let mut keeper = unshare
        .arg(programs::find("onde-lab")?)
        .arg("keeper")
        .arg(dir)
        .current_dir("/")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("cannot start the keeper")?;
    // Reaps the keeper, should this process live longer.
    std::thread::spawn(move || keeper.wait());
    Connection::new(guard)
}

/// Waits until the process with this index, or every process, is ready.
fn wait_until(
    connection: &mut Connection,
    mut on_change: impl FnMut(&Status),
    index: Option<usize>,
) -> Result<()> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Zero would mean for ever.
        let left = left.max(Duration::from_millis(1));
        connection.stream.set_read_timeout(Some(left))?;
        let status = connection.receive()?;
        on_change(&status);
        let members = match index {
            Some(index) => &status.members[index..=index],
            None => &status.members[..],
        };
        if let Some(member) = members.iter().find(|member| member.state == State::Down) {
            bail!("{} {}", member.name, member.note);
        }
        if members.iter().all(|member| member.state == State::Ready) {
            return Ok(());
        }
    }
}

/// Adds to `error` what the keeper and the others said last.
fn explain(error: anyhow::Error, dir: &Path) -> anyhow::Error {
    let mut text = format!("{error:#}");
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let log = entry.path();
        if log.extension().is_some_and(|ext| ext == "log") {
            let said = fs::read(&log).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            let lines: Vec<_> = said.trim().lines().collect();
            let name = entry.file_name();
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                text.push_str(&format!("\n  {}: {line}", name.to_string_lossy()));
            }
        }
    }
    anyhow!(text)
}

/// A connection to the keeper.
struct Connection {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Connection {
    fn new(stream: UnixStream) -> Result<Self> {
        let reader = BufReader::new(stream.try_clone()?);
        Ok(Self { stream, reader })
    }

    fn open(dir: &Path) -> Result<Self> {
        let stream = UnixStream::connect(dir.join(SOCKET))
            .with_context(|| format!("no lab runs in {}\nhint: onde-lab up", dir.display()))?;
        Self::new(stream)
    }

    fn send(&mut self, request: Request) -> Result<()> {
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        Ok(self.stream.write_all(&line)?)
    }

    fn receive(&mut self) -> Result<Status> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => bail!("the lab's keeper ended"),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("not ready in time"),
            Err(error) => return Err(error.into()),
        }
        match serde_json::from_str(&line)? {
            Reply::Status(status) => Ok(status),
            Reply::Error(text) => bail!(text),
        }
    }

    /// Says that nothing more is wanted, and waits until the keeper is done with what follows.
    fn close(mut self) {
        // Where this fails, the keeper is gone already.
        self.stream.shutdown(Shutdown::Write).ok();
        while self.receive().is_ok() {}
    }

    fn ask(&mut self, request: Request) -> Result<Status> {
        self.send(request)?;
        self.receive()
    }
}
