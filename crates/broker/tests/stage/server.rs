//! A real PostgreSQL server for the tests of one program: Debian's, as an unprivileged user, in a directory of its
//! own, on a Unix socket. It ends with the test program, whatever happens to that. No server, no test passes.

use super::{Dir, fresh_key};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

/// The server of this program.
static SERVER: LazyLock<Server> = LazyLock::new(Server::start);
/// Longest wait for a server to start, on a machine that is busy with other tests.
const START_MAX: Duration = Duration::from_secs(120);
/// Ends the server when standard input does, which the test program holds; then nothing of it stays.
const KEEP: &str = r#"trap '' INT TERM; run() { exec "$0" -D "$1/data" -k "$1" \
    -c max_connections=200 -c logging_collector=off </dev/null >>"$1/log" 2>&1; }
    run "$@" & pid=$!; cat >/dev/null; kill -QUIT $pid; wait $pid; rm -rf "$1""#;

/// A running server.
pub struct Server {
    dir: PathBuf,
    owner: Option<(u32, u32)>,
    bin: PathBuf,
    keeper: Mutex<(Child, ChildStdin)>,
}

/// URL of a new, empty database.
pub fn database() -> String {
    SERVER.new_database()
}

impl Server {
    /// A server of its own, for tests that end it.
    pub fn start() -> Self {
        let bin = bin();
        let dir = Dir::new();
        let path = dir.0.clone();
        // It is the keeper that removes it.
        std::mem::forget(dir);
        let owner = rustix::process::geteuid().is_root().then(unprivileged);
        if let Some((uid, gid)) = owner {
            chown(&path, Some(uid), Some(gid)).expect("root may give a directory away");
        }
        let init = command(&bin.join("initdb"), owner)
            .args([
                "--auth=trust",
                "--username=onde",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "-D",
            ])
            .arg(path.join("data"))
            .output()
            .expect("initdb runs");
        assert!(init.status.success(), "initdb: {}", String::from_utf8_lossy(&init.stderr));
        set(&path, "listen_addresses = ''");
        let keeper = Mutex::new(keep(&bin, &path, owner));
        let server = Self { dir: path, owner, bin, keeper };
        server.wait();
        server
    }

    fn wait(&self) {
        let deadline = Instant::now() + START_MAX;
        while let Err(error) = postgres::Client::connect(&self.url("postgres"), postgres::NoTls) {
            assert!(Instant::now() < deadline, "PostgreSQL does not start: {error}");
            // It tells nobody that it is ready but who connects.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// URL of one of its databases.
    pub fn url(&self, database: &str) -> String {
        let dir = self.dir.to_str().expect("UTF-8").replace('/', "%2F");
        format!("postgres://onde@{dir}/{database}")
    }

    /// URL of a new, empty database.
    pub fn new_database(&self) -> String {
        let name = format!("t{}", fresh_key());
        let mut client = postgres::Client::connect(&self.url("postgres"), postgres::NoTls);
        let client = client.as_mut().expect("a server");
        client.batch_execute(&format!("CREATE DATABASE {name}")).expect("a database");
        self.url(&name)
    }

    /// From now on it listens on `host`, one of this machine's own addresses, and proves itself there by this certificate
    /// (PEM); it was started again for that.
    pub fn listen_with_tls(&self, host: &str, certificate: &str, key: &str) {
        for (name, text) in [("server.crt", certificate), ("server.key", key)] {
            let file = self.dir.join("data").join(name);
            std::fs::write(&file, text).expect("written");
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).expect("a mode");
            if let Some((uid, gid)) = self.owner {
                chown(&file, Some(uid), Some(gid)).expect("root may give a file away");
            }
        }
        set(&self.dir, &format!("listen_addresses = '{host}'\nssl = on"));
        self.crash();
    }

    /// Kills all of the server's processes at once and starts it again over what they left.
    pub fn crash(&self) {
        let note = self.dir.join("data/postmaster.pid");
        let first = std::fs::read_to_string(&note).expect("it runs");
        let first = first.lines().next().expect("a line").to_owned();
        let mut all = vec![first.clone()];
        all.extend(children(&first));
        let killed = Command::new("kill").arg("-KILL").args(&all).stderr(Stdio::null()).status();
        // One that ended by itself meanwhile is no failure.
        killed.expect("kill");
        let deadline = Instant::now() + START_MAX;
        while all.iter().any(|pid| is_alive(pid)) {
            assert!(Instant::now() < deadline, "killed, and still there");
            // Not our children: nothing tells of their end.
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut keeper = self.keeper.lock().expect("no panic");
        let _ = keeper.0.kill();
        let _ = keeper.0.wait();
        // Names the killed one, whose number something else may have by now.
        std::fs::remove_file(note).expect("left behind");
        *keeper = keep(&self.bin, &self.dir, self.owner);
        drop(keeper);
        self.wait();
    }
}

/// Adds a line to a server's settings.
fn set(dir: &Path, line: &str) {
    let settings = std::fs::OpenOptions::new().append(true).open(dir.join("data/postgresql.conf"));
    writeln!(settings.expect("initdb made it"), "{line}").expect("written");
}

/// A field of /proc/PID/stat behind the name: 0 is the state, 1 the parent.
fn stat(pid: &str, field: usize) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.split(' ').nth(field)?.to_owned())
}

fn children(parent: &str) -> Vec<String> {
    let all = std::fs::read_dir("/proc").expect("Linux").flatten();
    let names = all.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|pid| stat(pid, 1).as_deref() == Some(parent)).collect()
}

fn is_alive(pid: &str) -> bool {
    stat(pid, 0).is_some_and(|state| state != "Z")
}

fn keep(bin: &Path, dir: &Path, owner: Option<(u32, u32)>) -> (Child, ChildStdin) {
    let mut keeper = command(Path::new("sh"), owner)
        .args(["-c", KEEP])
        .arg(bin.join("postgres"))
        .arg(dir)
        .stdin(Stdio::piped())
        .spawn()
        .expect("sh");
    let stdin = keeper.stdin.take().expect("piped");
    (keeper, stdin)
}

/// PostgreSQL refuses to run as root, as do its tools.
fn command(program: &Path, owner: Option<(u32, u32)>) -> Command {
    let Some((uid, gid)) = owner else { return Command::new(program) };
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".into()]);
    command.arg(program).current_dir("/");
    command
}

/// The user that Debian's package makes.
fn unprivileged() -> (u32, u32) {
    let users = std::fs::read_to_string("/etc/passwd").expect("users");
    let user = users.lines().find(|line| line.starts_with("postgres:"));
    let user = user.expect("user postgres: `cargo xtask setup` installs PostgreSQL");
    let mut ids = user.split(':').skip(2).map(|id| id.parse().expect("a number"));
    (ids.next().expect("uid"), ids.next().expect("gid"))
}

/// The newest version's programs: Debian keeps them out of the PATH.
fn bin() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).max();
    let newest = newest.expect("no PostgreSQL here: `cargo xtask setup` installs it");
    PathBuf::from(format!("/usr/lib/postgresql/{newest}/bin"))
}
