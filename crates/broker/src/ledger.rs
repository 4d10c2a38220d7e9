//! The store: one SQLite file that survives `kill -9` at any moment. Every act on money is one transaction, and
//! the journal (`entries`) is the only way to change a balance: a trigger does it, and lines are never changed.
//! All of the broker's parts come here through [`Ledger::act`]. It knows nothing of nodes, prices or HTTP.

use crate::refusal::Refusal;
use onde_client::api::{Event, EventList, Hex, IDEMPOTENCY_KEY_MAX};
use onde_wire::key::sha256;
use onde_wire::token::{JobId, NodeId};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of the tables below, in the file's `user_version`.
const SCHEMA_VERSION: i64 = 1;
/// How long an idempotency key is remembered: longer than any client repeats a request.
const REPLY_AGE_MAX_S: u64 = 7 * 24 * 3600;
/// How long events are kept: a flapping node must not fill the disk.
const EVENT_AGE_MAX_S: u64 = 90 * 24 * 3600;
/// How long a job of a silent node is watched for after it was settled.
const WATCH_AGE_MAX_S: u64 = 24 * 3600;

const SCHEMA: &str = "
CREATE TABLE accounts (
    name TEXT PRIMARY KEY,
    balance_micro INTEGER NOT NULL DEFAULT 0 CHECK (balance_micro >= 0),
    opened_at INTEGER NOT NULL
) STRICT;
CREATE TABLE keys (
    digest BLOB PRIMARY KEY,
    account TEXT NOT NULL REFERENCES accounts (name),
    issued_at INTEGER NOT NULL
) STRICT;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    account TEXT NOT NULL REFERENCES accounts (name),
    delta_micro INTEGER NOT NULL CHECK (delta_micro <> 0),
    reason TEXT NOT NULL,
    job BLOB,
    at INTEGER NOT NULL
) STRICT;
CREATE INDEX entries_of ON entries (account, id);
CREATE TRIGGER entries_move_money AFTER INSERT ON entries BEGIN
    UPDATE accounts SET balance_micro = balance_micro + NEW.delta_micro WHERE name = NEW.account;
END;
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id BLOB NOT NULL UNIQUE,
    account TEXT NOT NULL REFERENCES accounts (name),
    node INTEGER NOT NULL,
    node_id BLOB NOT NULL,
    incarnation BLOB NOT NULL,
    guest INTEGER NOT NULL,
    mem_mib INTEGER NOT NULL,
    vcpus INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    value_micro INTEGER NOT NULL CHECK (value_micro > 0),
    first_count INTEGER NOT NULL,
    sold INTEGER NOT NULL CHECK (sold >= first_count),
    seed BLOB NOT NULL,
    expiry_ms INTEGER NOT NULL,
    booted INTEGER NOT NULL DEFAULT 0,
    spent_micro INTEGER NOT NULL DEFAULT 0,
    opened_at INTEGER NOT NULL,
    ended_at INTEGER,
    watched INTEGER NOT NULL DEFAULT 1,
    settled_by TEXT,
    settled_at INTEGER,
    refund_micro INTEGER NOT NULL DEFAULT 0 CHECK (refund_micro BETWEEN 0 AND sold * value_micro)
) STRICT;
CREATE INDEX jobs_of ON jobs (account, seq);
CREATE INDEX jobs_watched ON jobs (seq) WHERE watched = 1;
CREATE INDEX jobs_open ON jobs (node_id, incarnation) WHERE settled_at IS NULL;
CREATE INDEX jobs_unbooted ON jobs (node_id, mem_mib) WHERE settled_at IS NULL AND booted = 0;
CREATE INDEX guests_taken ON jobs (guest) WHERE settled_at IS NULL;
CREATE TABLE replies (
    scope TEXT NOT NULL,
    key TEXT NOT NULL,
    request BLOB NOT NULL,
    reply TEXT NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (scope, key)
) STRICT;
CREATE INDEX replies_by_age ON replies (at);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    node BLOB,
    job BLOB,
    text TEXT NOT NULL
) STRICT;
";

/// Seconds since 1970: for people who read the journal. Nothing is decided by it but the age of what is pruned.
pub fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The store.
#[derive(Debug)]
pub struct Ledger {
    /// One connection: acts come one after the other, so none meets another half done.
    connection: Mutex<Connection>,
}

impl Ledger {
    /// Opens the store, or makes it, readable by this user alone: it holds the seeds of all chains.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // FULL: a sale that was answered survives a power cut, too.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        match tx.pragma_query_value(None, "user_version", |row| row.get(0))? {
            SCHEMA_VERSION => {}
            0 => {
                tx.execute_batch(SCHEMA)?;
                tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            }
            other => anyhow::bail!("tables of version {other}; this broker knows {SCHEMA_VERSION}"),
        }
        tx.commit()?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    /// Runs `act` as one transaction: all of it is on disk when this returns `Ok`, none of it otherwise.
    pub fn act<T>(
        &self,
        act: impl FnOnce(&Connection) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        // A panic in an act rolled its transaction back: the connection is as good as before.
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let done = act(&tx)?;
        tx.commit()?;
        Ok(done)
    }

    /// As [`Self::act`], once for each `key` of a `scope` (an account): the same request under the same key gets
    /// the first answer again. Refusals are not kept, so a repeated request may succeed later.
    pub fn act_once<T: Serialize + DeserializeOwned>(
        &self,
        scope: &str,
        key: &str,
        request: &impl Serialize,
        act: impl FnOnce(&Connection) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        if key.is_empty() || key.len() > IDEMPOTENCY_KEY_MAX {
            return Err(Refusal::Invalid("an idempotency key has 1 to 64 characters"));
        }
        let digest = sha256(&serde_json::to_vec(request).expect("requests are plain structs"));
        self.act(|tx| {
            if let Some((request, reply)) = find_reply(tx, scope, key)? {
                let same = request == digest;
                return same.then(|| read_reply(&reply)).ok_or(Refusal::KeyReused);
            }
            let done = act(tx)?;
            let reply = serde_json::to_string(&done).expect("replies are plain structs");
            tx.execute(
                "INSERT INTO replies (scope, key, request, reply, at) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![scope, key, digest, reply, unix_s()],
            )?;
            Ok(done)
        })
    }

    /// Forgets idempotency keys, events and silent nodes' jobs that are too old to matter.
    pub fn prune(&self) -> Result<(), Refusal> {
        let before = |age_s| unix_s().saturating_sub(age_s);
        self.act(|tx| {
            tx.execute("DELETE FROM replies WHERE at < ?1", [before(REPLY_AGE_MAX_S)])?;
            tx.execute("DELETE FROM events WHERE at < ?1", [before(EVENT_AGE_MAX_S)])?;
            tx.execute(
                "UPDATE jobs SET watched = 0 WHERE watched = 1 AND settled_at < ?1",
                [before(WATCH_AGE_MAX_S)],
            )?;
            Ok(())
        })
    }
}

fn find_reply(
    tx: &Connection,
    scope: &str,
    key: &str,
) -> rusqlite::Result<Option<([u8; 32], String)>> {
    tx.query_row(
        "SELECT request, reply FROM replies WHERE scope = ?1 AND key = ?2",
        [scope, key],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )
    .optional()
}

fn read_reply<T: DeserializeOwned>(reply: &str) -> T {
    serde_json::from_str(reply).expect("the digest of the request fixes the type of its reply")
}

/// Writes down what happened, for people and for the log.
pub fn note(
    tx: &Connection,
    kind: &str,
    node: Option<&NodeId>,
    job: Option<&JobId>,
    text: &str,
) -> rusqlite::Result<()> {
    let hex = |id: Option<&[u8; 16]>| id.map(|id| Hex(*id).to_string()).unwrap_or_default();
    tracing::info!(kind, node = hex(node), job = hex(job), "{text}");
    tx.execute(
        "INSERT INTO events (at, kind, node, job, text) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![unix_s(), kind, node, job, text],
    )?;
    Ok(())
}

/// One page of events before `before`, newest first.
pub fn events(tx: &Connection, before: i64, limit: u32) -> Result<EventList, Refusal> {
    let mut query = tx.prepare_cached(
        "SELECT id, at, kind, node, job, text FROM events WHERE id < ?1 ORDER BY id DESC LIMIT ?2",
    )?;
    let rows = query.query_map(params![before, limit], |row| {
        Ok(Event {
            id: row.get(0)?,
            at: row.get(1)?,
            kind: row.get(2)?,
            node: row.get::<_, Option<_>>(3)?.map(Hex),
            job: row.get::<_, Option<_>>(4)?.map(Hex),
            text: row.get(5)?,
        })
    })?;
    let events = rows.collect::<Result<Vec<_>, _>>()?;
    let next = events.last().filter(|_| events.len() == limit as usize).map(|event| event.id);
    Ok(EventList { events, next })
}
