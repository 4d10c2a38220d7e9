//! The ledger: the store as the rest of the broker uses it. Every act on money is one transaction and one entry of
//! the journal; what is asked for twice under one idempotency key happens once. All of the broker's parts come here
//! through [`Ledger::act`] and [`Ledger::read`]. It knows nothing of nodes, prices or HTTP.

use crate::refusal::Refusal;
use crate::store::{AsStoreError, Clock, Store, StoreError, Tx, params};
use onde_client::api::{Event, EventList, Hex, IDEMPOTENCY_KEY_MAX};
use onde_wire::key::sha256;
use onde_wire::token::{JobId, NodeId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How long the answer to an idempotency key is remembered: longer than any client repeats a request. The key itself
/// stays in the journal for good. The answer to a job's last sale is kept as long as the job is open: it is the only
/// word of the tokens that were paid for, and of the chain that they are on.
const REPLY_AGE_MAX_S: u64 = 7 * 24 * 3600;
/// How long events are kept: a flapping node must not fill the disk.
const EVENT_AGE_MAX_S: u64 = 90 * 24 * 3600;
/// How long a job of a silent node is watched for after it was settled.
const WATCH_AGE_MAX_S: u64 = 24 * 3600;
/// Most rows of a kind that are forgotten in one act: sales wait for it, some 20 ms. A thousand jobs are asked about once
/// a second, so this keeps up with twice as many.
const PRUNE_MAX: u32 = 2000;

/// The ledger.
pub struct Ledger {
    store: Store,
    /// Jobs that were open when it was opened, and whose nodes said nothing of them since. The ledger may be an old copy that
    /// somebody put in place: only their nodes know how many of their tokens were sold.
    unheard: Mutex<HashSet<JobId>>,
}

impl AsStoreError for Refusal {
    fn as_store_error(&self) -> Option<&StoreError> {
        match self {
            Refusal::Ledger(error) => Some(error),
            _ => None,
        }
    }
}

impl Ledger {
    /// Opens the ledger in a file, or at a `postgres://` URL; makes it if it is not there.
    pub fn open(place: &str) -> Result<Self, StoreError> {
        let store = Store::open(place)?;
        // No more than there are guest addresses.
        let open = "SELECT id FROM jobs WHERE settled_at IS NULL";
        let open: Vec<JobId> = store.read(|tx| tx.rows(open, params![], |row| row.get(0)))?;
        Ok(Self { store, unheard: Mutex::new(open.into_iter().collect()) })
    }

    /// A job's node said something of it, and that was taken in.
    pub fn heard(&self, job: &JobId) {
        self.unheard().remove(job);
    }

    /// Whether nobody can tell yet that all the job's sales are in this ledger.
    pub fn is_unheard(&self, job: &JobId) -> bool {
        self.unheard().contains(job)
    }

    fn unheard(&self) -> MutexGuard<'_, HashSet<JobId>> {
        self.unheard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same with another clock.
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { store: self.store.with_clock(clock), ..self }
    }

    /// Runs `act` as one transaction: all of it is on disk when this returns `Ok`, none of it otherwise. It is run
    /// again where the store says that this helps, so it does nothing but through its [`Tx`].
    pub fn act<T>(&self, act: impl FnMut(&Tx<'_>) -> Result<T, Refusal>) -> Result<T, Refusal> {
        self.store.write(act)
    }

    /// Runs `act` on one state of the ledger, which it cannot change.
    pub fn read<T>(&self, act: impl FnMut(&Tx<'_>) -> Result<T, Refusal>) -> Result<T, Refusal> {
        self.store.read(act)
    }

    /// The store itself, for audits, backups and tests.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// As [`Self::act`], once for each `key` of a `scope` (an account): the same request under the same key gets
    /// the first answer again. Refusals are not kept, so a repeated request may succeed later.
    pub fn act_once<T: Serialize + DeserializeOwned>(
        &self,
        scope: &str,
        key: &str,
        request: &impl Serialize,
        mut act: impl FnMut(&Tx<'_>) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        if key.is_empty() || key.len() > IDEMPOTENCY_KEY_MAX {
            return Err(Refusal::Invalid("an idempotency key has 1 to 64 characters"));
        }
        let digest = sha256(&serde_json::to_vec(request).expect("requests are plain structs"));
        let mut once = |tx: &Tx<'_>| {
            if let Some((request, reply)) = find_reply(tx, scope, key)? {
                let same = request == digest;
                return same.then(|| read_reply(&reply)).ok_or(Refusal::KeyReused);
            }
            let done = act(tx)?;
            let reply = serde_json::to_string(&done).expect("replies are plain structs");
            tx.execute(
                "INSERT INTO replies (scope, key, request, reply, at) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![scope, key, digest, reply, tx.unix_s()],
            )?;
            Ok(done)
        };
        match self.act(&mut once) {
            // It happened or it did not: with the key, asking again tells.
            Err(Refusal::Ledger(error)) if error.is_unsure() => self.act(&mut once),
            done => done,
        }
    }

    /// Forgets some answers, events, samples and silent nodes' jobs that are too old to matter, in one short act. Whether
    /// there may be more.
    pub fn prune_some(&self) -> Result<bool, Refusal> {
        self.act(|tx| {
            let before = |age_s| tx.unix_s().saturating_sub(age_s);
            let replies = tx.execute(
                "DELETE FROM replies WHERE (scope, key) IN (SELECT scope, key FROM replies WHERE at < ?1 AND NOT EXISTS ( \
                   SELECT 1 FROM acts JOIN jobs ON jobs.id = acts.job AND jobs.sold = acts.last_index \
                   WHERE acts.key = 'request/' || replies.scope || '/' || replies.key \
                   AND jobs.settled_at IS NULL) LIMIT ?2)",
                params![before(REPLY_AGE_MAX_S), PRUNE_MAX],
            )?;
            let events = tx.execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE at < ?1 LIMIT ?2)",
                params![before(EVENT_AGE_MAX_S), PRUNE_MAX],
            )?;
            let watched = tx.execute(
                "UPDATE jobs SET watched = 0 WHERE seq IN ( \
                   SELECT seq FROM jobs WHERE watched = 1 AND settled_at < ?1 LIMIT ?2)",
                params![before(WATCH_AGE_MAX_S), PRUNE_MAX],
            )?;
            let more = [replies, events, watched].iter().any(|gone| *gone >= PRUNE_MAX.into());
            Ok(crate::usage::prune(tx, PRUNE_MAX)? || more)
        })
    }

    /// Forgets all that is too old to matter, in many short acts, between which sales come.
    pub fn prune(&self) -> Result<(), Refusal> {
        // Ends: each act but the last forgets some.
        while self.prune_some()? {}
        Ok(())
    }
}

fn find_reply(
    tx: &Tx<'_>,
    scope: &str,
    key: &str,
) -> Result<Option<([u8; 32], String)>, StoreError> {
    tx.row(
        "SELECT request, reply FROM replies WHERE scope = ?1 AND key = ?2",
        params![scope, key],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )
}

fn read_reply<T: DeserializeOwned>(reply: &str) -> T {
    serde_json::from_str(reply).expect("the digest of the request fixes the type of its reply")
}

/// A number that was noted under this name.
pub fn mark(tx: &Tx<'_>, name: &str) -> Result<Option<u64>, StoreError> {
    tx.row("SELECT value FROM marks WHERE name = ?1", params![name], |row| row.get(0))
}

/// Notes a number under a name; `None`: forgets it.
pub fn set_mark(tx: &Tx<'_>, name: &str, value: Option<u64>) -> Result<(), StoreError> {
    match value {
        None => tx.execute("DELETE FROM marks WHERE name = ?1", params![name])?,
        Some(value) => tx.execute(
            "INSERT INTO marks (name, value) VALUES (?1, ?2) \
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            params![name, value],
        )?,
    };
    Ok(())
}

/// Writes down what happened, for people and for the log.
pub fn note(
    tx: &Tx<'_>,
    kind: &str,
    node: Option<&NodeId>,
    job: Option<&JobId>,
    text: &str,
) -> Result<(), StoreError> {
    let hex = |id: Option<&[u8; 16]>| id.map(|id| Hex(*id).to_string()).unwrap_or_default();
    tracing::info!(kind, node = hex(node), job = hex(job), "{text}");
    tx.execute(
        "INSERT INTO events (at, kind, node, job, text) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![tx.unix_s(), kind, node, job, text],
    )?;
    Ok(())
}

/// One page of events before `before`, newest first.
pub fn events(tx: &Tx<'_>, before: i64, limit: u32) -> Result<EventList, Refusal> {
    let sql =
        "SELECT id, at, kind, node, job, text FROM events WHERE id < ?1 ORDER BY id DESC LIMIT ?2";
    let events = tx.rows(sql, params![before, limit], |row| {
        Ok(Event {
            id: row.get(0)?,
            at: row.get(1)?,
            kind: row.get(2)?,
            node: row.get::<Option<_>>(3)?.map(Hex),
            job: row.get::<Option<_>>(4)?.map(Hex),
            text: row.get(5)?,
        })
    })?;
    let next = events.last().filter(|_| events.len() == limit as usize).map(|event| event.id);
    Ok(EventList { events, next })
}
