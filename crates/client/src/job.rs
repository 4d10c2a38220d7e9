//! Job files: what a customer keeps of each VM, one JSON file each, readable by its owner only, since it holds
//! the job's key. `onde` and the home node share them: every change is a [`Jobs::update`], which reads the file
//! anew under a lock, and a file is always whole, as it is written aside and renamed.

pub mod budget;

use crate::api::{Hex, JobOpened, Payment, Prices, Renewal, SettledBy};
use crate::home::judge::Deal;
use crate::node::Handle;
use budget::Lent;
use onde_wire::key::Key;
use onde_wire::token::JobId;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Job files that are kept: of more, those settled longest ago go.
pub const JOBS_MAX: usize = 1000;
/// Longest name of a job.
pub const NAME_MAX: usize = 63;

/// How a job ended, as told by the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// On whose word.
    pub by: SettledBy,
    /// Micro-tokens paid for it in all.
    pub paid_micro: u64,
    /// Micro-tokens of them that came back.
    pub refund_micro: u64,
    /// Seconds since 1970.
    pub at: u64,
}

/// A purchase of tokens under way: written before the broker is asked, so that a crash cannot lose it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purchase {
    /// Its idempotency key.
    pub key: String,
    /// Number of tokens.
    pub count: u32,
}

/// What shows that a job makes progress. Without any, it always does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// A command for `/bin/sh` that succeeds while it does.
    pub command: Option<String>,
    /// The folder that the command runs in.
    pub dir: PathBuf,
    /// A file on this machine that changes while it does.
    pub file: Option<PathBuf>,
    /// How long the file may stay as it is, seconds.
    pub within_s: u32,
}

/// A job file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its id.
    pub id: Hex<16>,
    /// Its key.
    pub key: Hex<32>,
    /// Its name, where the customer gave one.
    pub name: Option<String>,
    /// What it runs, for people.
    pub title: String,
    /// The context it was bought in.
    pub context: String,
    /// Number of its node.
    pub node: u32,
    /// Where its node answers.
    pub node_ipv4: Ipv4Addr,
    /// The guest's address.
    pub guest_ipv4: Ipv4Addr,
    /// Memory, MiB.
    pub mem_mib: u32,
    /// Memory that a clone may have for itself, MiB; 0 for any other VM.
    #[serde(default)]
    pub held_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Disk, MiB.
    #[serde(default)]
    pub disk_mib: u32,
    /// The node's price list when the job was bought; a node that charges more is not paid.
    #[serde(default)]
    pub prices: Option<Prices>,
    /// How long its node promises to keep it on disk when it runs dry, seconds.
    #[serde(default)]
    pub keep_s: u32,
    /// Micro-tokens that a payment token is worth.
    pub value_micro: u64,
    /// Payment tokens bought, those of the boot token included.
    pub sold: u32,
    /// Payment tokens that the node may have seen, those of the boot token included: written before they are shown.
    #[serde(default)]
    pub released: u32,
    /// Most payment tokens that the home node buys and releases in all.
    pub budget: u32,
    /// The part of it that the job which its VM is to move to has.
    #[serde(default)]
    pub lent: Option<Lent>,
    /// Whether what the old job of its VM leaves of the budget is still to come.
    #[serde(default)]
    pub inherits: bool,
    /// Seconds since 1970 at which it was bought.
    pub opened_at: u64,
    /// Whether an agent runs in it (`onde run`), or only what the customer booted (`onde boot`).
    pub has_agent: bool,
    /// Exit status of its program, where it is known.
    #[serde(default)]
    pub exit: Option<u8>,
    /// Whether `onde wallet serve` pays for it, and nobody else.
    #[serde(default)]
    pub kept: bool,
    /// What shows that it makes progress.
    #[serde(default)]
    pub watch: Option<Watch>,
    /// Payment tokens beyond the released ones that the guest has, to pay by itself.
    #[serde(default)]
    pub purse: u32,
    /// Index of the last token that the guest was given.
    #[serde(default)]
    pub purse_last: u32,
    /// Why its node is not paid any more, where it was found cheating.
    #[serde(default)]
    pub distrust: Option<String>,
    /// A purchase that the broker has not answered.
    pub purchase: Option<Purchase>,
    /// Payment tokens bought and not all released: the newest of each purchase, which gives those before it.
    pub payments: Vec<Payment>,
    /// New chains that its node may not have seen.
    #[serde(default)]
    pub renewals: Vec<Renewal>,
    /// How it ended.
    pub settled: Option<Settled>,
    /// The job whose VM moves here, or moved here.
    #[serde(default)]
    pub moves: Option<Hex<16>>,
    /// The job that its VM moved to.
    #[serde(default)]
    pub moved_to: Option<Hex<16>>,
}

impl Job {
    /// The file of a job just bought.
    pub fn new(opened: &JobOpened, title: &str, context: &str, budget: u32) -> Self {
        let job = &opened.job;
        Self {
            id: job.id,
            key: opened.job_key,
            name: None,
            title: title.to_owned(),
            context: context.to_owned(),
            node: job.node,
            node_ipv4: job.node_ipv4,
            guest_ipv4: job.guest_ipv4,
            mem_mib: job.mem_mib,
            held_mib: 0,
            vcpus: job.vcpus,
            disk_mib: job.disk_mib,
            prices: opened.prices,
            keep_s: opened.keep_s,
            value_micro: job.value_micro,
            sold: job.first_count,
            released: job.first_count,
            budget,
            lent: None,
            inherits: false,
            opened_at: now_s(),
            has_agent: false,
            exit: None,
            kept: false,
            watch: None,
            purse: 0,
            purse_last: 0,
            distrust: None,
            purchase: None,
            payments: Vec::new(),
            renewals: Vec::new(),
            settled: None,
            moves: None,
            moved_to: None,
        }
    }

    /// What was bought; `None` where the price list is not known. A clone may come to pay for its template's memory, too.
    pub fn deal(&self) -> Option<Deal> {
        let &Self { vcpus, disk_mib, value_micro, keep_s, .. } = self;
        let mem_mib = self.mem_mib.saturating_add(self.held_mib);
        let prices = self.prices?.into();
        Some(Deal { mem_mib, vcpus, disk_mib, value_micro, prices, keep_s })
    }

    /// Index of the newest payment token at hand, released or not.
    pub fn bought(&self) -> u32 {
        let newest = self.payments.iter().map(|payment| payment.index).max();
        newest.unwrap_or(0).max(self.released)
    }

    /// The node is about to see all tokens up to `index`: those before are of no use any more.
    pub fn release(&mut self, index: u32) {
        self.released = self.released.max(index);
        let released = self.released;
        self.payments.retain(|payment| payment.index >= released);
    }

    /// The end of the chain that the token behind `index` is of, where it has an end: nobody can show that and a later
    /// one at once.
    pub fn chain_end(&self, index: u32) -> Option<u32> {
        self.renewals.iter().map(|renewal| renewal.index).filter(|end| *end > index).min()
    }

    /// The chain that the token behind `index` is the first of, where the node may not have seen it.
    pub fn renewal_at(&self, index: u32) -> Option<Renewal> {
        self.renewals.iter().find(|renewal| renewal.index == index).copied()
    }

    /// What its node is asked with.
    pub fn handle(&self) -> Handle {
        Handle { job: self.id.0, key: Key::new(&self.key.0), node: self.node_ipv4 }
    }

    /// First digits of its id: enough to name it among a customer's jobs.
    pub fn short_id(&self) -> String {
        self.id.to_string()[..8].to_owned()
    }

    /// Notes what the broker says of the settled job.
    pub fn settle(&mut self, told: &crate::api::Job) {
        self.sold = told.sold;
        self.settled = told.settled_by.map(|by| Settled {
            by,
            paid_micro: u64::from(told.sold) * told.value_micro,
            refund_micro: told.refund_micro,
            at: now_s(),
        });
    }
}

/// Seconds since 1970.
fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Why a job file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum JobsError {
    /// The folder or a file in it.
    #[error("job file {}", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No job has this name or id.
    #[error("no job `{0}`")]
    None(String),
    /// Several jobs have an id that starts so.
    #[error("several jobs start with `{0}`")]
    Several(String),
    /// An open job has the name already.
    #[error("job {0} has that name already")]
    NameTaken(String),
    /// Not a name.
    #[error("`{0}` is no name for a job: letters, digits, `.`, `_` and `-`, at most {NAME_MAX}")]
    BadName(String),
}

impl JobsError {
    /// What to do about it, one line.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            JobsError::None(_) => Some("onde ps --all lists them"),
            JobsError::Several(_) => Some("give more digits of the id: onde ps --json"),
            JobsError::NameTaken(_) => Some("take another --name, or stop that job"),
            JobsError::File { .. } | JobsError::BadName(_) => None,
        }
    }
}

/// The folder of job files.
#[derive(Clone, Debug)]
pub struct Jobs {
    dir: PathBuf,
}

impl Jobs {
    /// The job files in `dir`, which is created where missing.
    pub fn open(dir: &Path) -> Result<Self, JobsError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| JobsError::File { file: dir.to_owned(), source })?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Adds a job file.
    pub fn add(&self, job: &Job) -> Result<(), JobsError> {
        let _lock = self.lock()?;
        self.add_locked(job)
    }

    fn add_locked(&self, job: &Job) -> Result<(), JobsError> {
        let jobs = self.list()?;
        if let Some(name) = &job.name {
            check_name(name)?;
            let open = jobs.iter().find(|other| other.settled.is_none() && other.name == job.name);
            if let Some(open) = open {
                return Err(JobsError::NameTaken(open.short_id()));
            }
        }
        let mut old: Vec<_> = jobs.iter().filter(|job| job.settled.is_some()).collect();
        old.sort_by_key(|job| job.settled.map(|settled| settled.at));
        let surplus = (jobs.len() + 1).saturating_sub(JOBS_MAX);
        for job in old.into_iter().take(surplus) {
            let file = self.file(&job.id.0);
            for beside in ["turn", "out"] {
                // Most have none.
                let _ = fs::remove_file(file.with_extension(beside));
            }
            fs::remove_file(&file).map_err(|source| JobsError::File { file, source })?;
        }
        self.write(job)
    }

    /// Changes a job's file and returns the job as it is then.
    pub fn update(&self, id: &JobId, change: impl FnOnce(&mut Job)) -> Result<Job, JobsError> {
        let _lock = self.lock()?;
        let before = self.get(id)?;
        let mut job = before.clone();
        change(&mut job);
        if job != before {
            self.write(&job)?;
        }
        Ok(job)
    }

    /// A job's file as it is now.
    pub fn get(&self, id: &JobId) -> Result<Job, JobsError> {
        self.read(&self.file(id))
    }

    /// Waits until nobody else spends for this job, and keeps others from it until the file is closed.
    pub fn turn(&self, id: &JobId) -> Result<File, JobsError> {
        self.lock_file(&format!("{}.turn", Hex(*id)), FlockOperation::LockExclusive)
    }

    /// Makes the caller the one wallet of a context, until the file is closed; `None` where there is one. The file has
    /// the process's id, for people.
    pub fn wallet(&self, context: &str) -> Result<Option<File>, JobsError> {
        let digest = onde_wire::key::sha256(context.as_bytes());
        let name = format!("wallet-{}", &Hex(digest).to_string()[..16]);
        match self.lock_file(&name, FlockOperation::NonBlockingLockExclusive) {
            Err(JobsError::File { source, .. }) if source.kind() == ErrorKind::WouldBlock => {
                Ok(None)
            }
            locked => {
                let mut file = locked?;
                let noted = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                let failed = |source| JobsError::File { file: self.dir.join(name), source };
                noted.map(|()| Some(file)).map_err(failed)
            }
        }
    }

    /// The folder that they are in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All jobs, newest first.
    pub fn list(&self) -> Result<Vec<Job>, JobsError> {
        let failed = |source| JobsError::File { file: self.dir.clone(), source };
        let mut jobs = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let file = entry.map_err(failed)?.path();
            if file.extension().is_some_and(|extension| extension == "json") {
                jobs.push(self.read(&file)?);
            }
        }
        jobs.sort_by_key(|job| (std::cmp::Reverse(job.opened_at), job.id));
        Ok(jobs)
    }

    /// The job with this name, or whose id starts so, or the one that it moved to. Of several with the name, the open
    /// one or else the newest.
    pub fn find(&self, text: &str) -> Result<Job, JobsError> {
        self.find_own(text).and_then(|job| self.current(&job.id.0))
    }

    /// The job that this one's VM has moved to by now: itself, where it did not.
    pub fn current(&self, id: &JobId) -> Result<Job, JobsError> {
        let mut job = self.read(&self.file(id))?;
        // No chain is longer than there are files.
        for _ in 0..JOBS_MAX {
            let Some(next) = job.moved_to else { break };
            job = self.read(&self.file(&next.0))?;
        }
        Ok(job)
    }

    /// The job that this one's VM was started as. Its files bear that job's id.
    pub fn first(&self, job: &Job) -> JobId {
        let (mut first, mut from) = (job.id.0, job.moves);
        for _ in 0..JOBS_MAX {
            let Some(id) = from else { break };
            // An old job's file may be gone.
            let Ok(job) = self.read(&self.file(&id.0)) else { break };
            (first, from) = (job.id.0, job.moves);
        }
        first
    }

    fn find_own(&self, text: &str) -> Result<Job, JobsError> {
        let mut jobs = self.list()?;
        jobs.sort_by_key(|job| job.settled.is_some());
        if let Some(job) = jobs.iter().find(|job| job.name.as_deref() == Some(text)) {
            return Ok(job.clone());
        }
        jobs.retain(|job| !text.is_empty() && job.id.to_string().starts_with(text));
        match &jobs[..] {
            [] => Err(JobsError::None(text.to_owned())),
            [job] => Ok(job.clone()),
            _ => Err(JobsError::Several(text.to_owned())),
        }
    }

    /// The file that a detached program's output is kept in, wherever its VM moves.
    pub fn output_file(&self, id: &JobId) -> PathBuf {
        let first = self.read(&self.file(id)).map_or(*id, |job| self.first(&job));
        self.dir.join(format!("{}.out", Hex(first)))
    }

    fn file(&self, id: &JobId) -> PathBuf {
        self.dir.join(format!("{}.json", Hex(*id)))
    }

    fn lock(&self) -> Result<File, JobsError> {
        self.lock_file("lock", FlockOperation::LockExclusive)
    }

    fn lock_file(&self, name: &str, how: FlockOperation) -> Result<File, JobsError> {
        let file = self.dir.join(name);
        let lock = || -> io::Result<File> {
            let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(&file)?;
            flock(&lock, how)?;
            Ok(lock)
        };
        lock().map_err(|source| JobsError::File { file, source })
    }

    fn read(&self, file: &Path) -> Result<Job, JobsError> {
        let failed = |source| JobsError::File { file: file.to_owned(), source };
        let bytes = fs::read(file).map_err(failed)?;
        serde_json::from_slice(&bytes).map_err(|_| failed(ErrorKind::InvalidData.into()))
    }

    fn write(&self, job: &Job) -> Result<(), JobsError> {
        let (file, aside) = (self.file(&job.id.0), self.dir.join("new"));
        let bytes = serde_json::to_vec_pretty(job).expect("a job is JSON");
        let write = || -> io::Result<()> {
            // Under the lock nobody else writes aside; a leftover is from a crash.
            match fs::remove_file(&aside) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut out =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
            out.write_all(&bytes)?;
            out.sync_all()?;
            fs::rename(&aside, &file)
        };
        write().map_err(|source| JobsError::File { file: file.clone(), source })
    }
}

fn check_name(name: &str) -> Result<(), JobsError> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match (1..=NAME_MAX).contains(&name.len()) && name.chars().all(is_good) {
        true => Ok(()),
        false => Err(JobsError::BadName(name.to_owned())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A folder of its own for a test, gone with it.
    pub(crate) struct Folder(pub PathBuf);

    impl Folder {
        pub(crate) fn new(name: &str) -> Self {
            let name = format!("onde-client-{name}-{}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A job's file.
    pub(crate) fn sample(id: [u8; 16], name: Option<&str>, opened_at: u64) -> Job {
        Job {
            id: Hex(id),
            key: Hex([1; 32]),
            name: name.map(str::to_owned),
            title: "ls".to_owned(),
            context: "lab".to_owned(),
            node: 1,
            node_ipv4: Ipv4Addr::LOCALHOST,
            guest_ipv4: Ipv4Addr::LOCALHOST,
            mem_mib: 256,
            held_mib: 0,
            vcpus: 1,
            disk_mib: 0,
            prices: None,
            keep_s: 0,
            value_micro: 1_000_000,
            sold: 10,
            released: 10,
            budget: 100,
            lent: None,
            inherits: false,
            opened_at,
            has_agent: true,
            exit: None,
            kept: false,
            watch: None,
            purse: 0,
            purse_last: 0,
            distrust: None,
            purchase: None,
            payments: vec![Payment { index: 20, value: Hex([2; 32]), renewal: None }],
            renewals: Vec::new(),
            settled: None,
            moves: None,
            moved_to: None,
        }
    }

    #[test]
    fn finds_jobs_by_name_and_by_the_first_digits_of_their_id() {
        let folder = Folder::new("find");
        let jobs = Jobs::open(&folder.0).unwrap();
        let (a, b) = (sample([0xA1; 16], Some("solve"), 5), sample([0xA2; 16], None, 9));
        jobs.add(&a).unwrap();
        jobs.add(&b).unwrap();
        assert_eq!(jobs.list().unwrap(), [b.clone(), a.clone()]);
        assert_eq!(jobs.find("solve").unwrap(), a);
        assert_eq!(jobs.find("a2").unwrap(), b);
        assert!(matches!(jobs.find("a"), Err(JobsError::Several(_))));
        assert!(matches!(jobs.find(""), Err(JobsError::None(_))));
        jobs.update(&b.id.0, |job| job.moved_to = Some(a.id)).unwrap();
        jobs.update(&a.id.0, |job| job.moves = Some(b.id)).unwrap();
        assert_eq!(jobs.find("a2").unwrap().id, a.id);
        assert_eq!(jobs.first(&jobs.find("a1").unwrap()), b.id.0);
        let again = sample([0xB0; 16], Some("solve"), 10);
        assert!(matches!(jobs.add(&again), Err(JobsError::NameTaken(_))));
        assert!(matches!(jobs.add(&sample([0; 16], Some("a/b"), 1)), Err(JobsError::BadName(_))));
        let settled = Settled { by: SettledBy::Certificate, paid_micro: 1, refund_micro: 1, at: 1 };
        jobs.update(&a.id.0, |job| job.settled = Some(settled)).unwrap();
        jobs.add(&again).unwrap();
        assert_eq!(jobs.find("solve").unwrap(), again);
    }

    #[test]
    fn keeps_secrets_and_concurrent_changes() {
        let folder = Folder::new("update");
        let jobs = Jobs::open(&folder.0).unwrap();
        jobs.add(&sample([7; 16], None, 1)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    (0..25).for_each(|_| {
                        jobs.update(&[7; 16], |job| job.sold += 1).unwrap();
                    })
                });
            }
        });
        assert_eq!(jobs.find("0707").unwrap().sold, 110);
        for (file, mode) in [(folder.0.clone(), 0o700), (jobs.file(&[7; 16]), 0o600)] {
            assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, mode);
        }
    }
}
