//! The store: SQL tables that survive `kill -9` at any moment, in an embedded SQLite file or in PostgreSQL. Both read
//! the same statements and the same migrations; what differs between them stays in this folder. `ledger` is the
//! only caller of [`Store`]; the rest of the broker sees a [`Tx`]. It knows nothing of money, nodes or HTTP.
//!
//! All acts that write run one after the other, under SQLite's write lock or one advisory lock of PostgreSQL's:
//! the journal is one chain of hashes, so they could not run side by side anyhow, and no act ever sees another
//! half done, be it of this broker or of a second one on the same database.
//!
//! PostgreSQL is spoken to by the blocking `postgres` client (tokio-postgres within): acts run on blocking threads
//! as it is, and one way to call both stores is half the code of two.

mod catalog;
mod error;
mod migrate;
mod postgres;
mod sqlite;
mod tls;
mod value;

pub use error::StoreError;
pub(crate) use value::params;
pub use value::{FromValue, Row, ToValue, Value};

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often an act is tried when the store says that trying again may help.
const TRIES_MAX: u32 = 9;
/// Pause before the second try; it doubles with each: 5 s in all, as long as a database server's restart takes.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// A store's place as it may be shown: without the password that a URL can have.
pub fn shown(place: &str) -> &str {
    place.rsplit_once('@').map_or(place, |(_, behind)| behind)
}

/// Tells the seconds since 1970, for people who read the journal. Little is decided by it: the age of what is pruned, the
/// end of keys, prices by the time of day. It may jump.
pub type Clock = Box<dyn Fn() -> u64 + Send + Sync>;

/// This machine's.
fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// How long acts took, from the first try to the end of the last: from 0.1 ms to 13 s.
pub struct Latency {
    /// Of those that only read.
    pub read: Histogram,
    /// Of those that may write.
    pub write: Histogram,
}

impl Default for Latency {
    fn default() -> Self {
        let new = || Histogram::new(exponential_buckets(0.0001, 2.0, 18));
        Self { read: new(), write: new() }
    }
}

/// What a transaction may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Reads one state of the store, and waits for nobody.
    Read,
    /// Reads and writes, while no other does.
    Write,
}

/// One connection to a store.
trait Session {
    /// Whether statements go to PostgreSQL.
    fn is_postgres(&self) -> bool;
    /// Starts a transaction.
    fn begin(&mut self, access: Access) -> Result<(), StoreError>;
    /// Makes all of it last. After an error, [`StoreError::is_unsure`] tells whether it may have happened.
    fn commit(&mut self) -> Result<(), StoreError>;
    /// Undoes all of it.
    fn roll_back(&mut self);
    /// Runs a statement; rows changed.
    fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, StoreError>;
    /// Runs a query.
    fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Row>, StoreError>;
    /// Runs many statements without parameters.
    fn batch(&mut self, sql: &str) -> Result<(), StoreError>;
}

/// Where a process is to die, for tests of what survives that.
#[derive(Debug, Default)]
struct Faults(AtomicU64);

impl Faults {
    /// Before each statement and each commit, and after the latter.
    fn step(&self) {
        let left = self.0.load(Ordering::Relaxed);
        if left == 1 {
            std::process::abort();
        }
        self.0.store(left.saturating_sub(1), Ordering::Relaxed);
    }
}

/// An open transaction. Statements are written as SQLite has them, with parameters `?1`, `?2`, ...
pub struct Tx<'a> {
    session: RefCell<&'a mut dyn Session>,
    store: &'a Store,
}

impl Tx<'_> {
    /// Seconds since 1970.
    pub fn unix_s(&self) -> u64 {
        self.store.unix_s()
    }

    /// Runs a statement; gives the number of rows it changed.
    pub fn execute(&self, sql: &str, params: &[Value]) -> Result<u64, StoreError> {
        self.store.faults.step();
        self.session.borrow_mut().execute(sql, params)
    }

    /// All rows of a query: callers bound them by LIMIT.
    pub fn rows<T>(
        &self,
        sql: &str,
        params: &[Value],
        read: impl Fn(&Row) -> Result<T, StoreError>,
    ) -> Result<Vec<T>, StoreError> {
        self.store.faults.step();
        let rows = self.session.borrow_mut().query(sql, params)?;
        rows.iter().map(read).collect()
    }

    /// The first row of a query.
    pub fn row<T>(
        &self,
        sql: &str,
        params: &[Value],
        read: impl Fn(&Row) -> Result<T, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        Ok(self.rows(sql, params, read)?.into_iter().next())
    }

    /// The first column of a query's only row.
    pub fn value<T: FromValue>(&self, sql: &str, params: &[Value]) -> Result<T, StoreError> {
        self.row(sql, params, |row| row.get(0))?.ok_or(StoreError::Shape("no row"))
    }

    fn is_postgres(&self) -> bool {
        self.session.borrow().is_postgres()
    }

    fn batch(&self, sql: &str) -> Result<(), StoreError> {
        self.store.faults.step();
        self.session.borrow_mut().batch(sql)
    }
}

/// The two kinds of store.
enum Kind {
    Sqlite(sqlite::File),
    Postgres(Box<postgres::Pool>),
}

/// A store, its tables up to date.
pub struct Store {
    kind: Kind,
    faults: Faults,
    clock: Clock,
    latency: Latency,
}

impl Store {
    /// Opens `postgres://...`, or else a file by its path, and brings its tables up to date.
    pub fn open(place: &str) -> Result<Self, StoreError> {
        let is_url = ["postgres://", "postgresql://"].iter().any(|start| place.starts_with(start));
        let kind = match is_url {
            true => Kind::Postgres(Box::new(postgres::Pool::new(place)?)),
            false => Kind::Sqlite(sqlite::File::open(Path::new(place))?),
        };
        let (faults, latency, clock) = (Faults::default(), Latency::default(), Box::new(unix_s));
        let store = Self { kind, faults, clock, latency };
        store.act(Access::Write, &mut migrate::run)?;
        Ok(store)
    }

    /// Runs `act` as one transaction that may write.
    pub fn write<T, E: From<StoreError> + AsStoreError>(
        &self,
        mut act: impl FnMut(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.act(Access::Write, &mut act)
    }

    /// Runs `act` on one state of the store; it cannot write.
    pub fn read<T, E: From<StoreError> + AsStoreError>(
        &self,
        mut act: impl FnMut(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.act(Access::Read, &mut act)
    }

    /// The same with another clock.
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }

    /// Seconds since 1970.
    pub fn unix_s(&self) -> u64 {
        (self.clock)()
    }

    /// How long acts take.
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// For tests of what survives: the process dies at the `step`-th statement or commit from now on.
    pub fn die_at(&self, step: u64) {
        self.faults.0.store(step, Ordering::Relaxed);
    }

    fn act<T, E: From<StoreError> + AsStoreError>(
        &self,
        access: Access,
        act: &mut dyn FnMut(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let begun = Instant::now();
        let done = self.insist(access, act);
        let took = match access {
            Access::Read => &self.latency.read,
            Access::Write => &self.latency.write,
        };
        took.observe(begun.elapsed().as_secs_f64());
        done
    }

    fn insist<T, E: From<StoreError> + AsStoreError>(
        &self,
        access: Access,
        act: &mut dyn FnMut(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut pause = PAUSE_MIN;
        for _ in 1..TRIES_MAX {
            match self.try_act(access, act) {
                Err(error) if error.as_store_error().is_some_and(StoreError::is_passing) => {
                    tracing::warn!(error = %error.as_store_error().expect("seen"), "trying again");
                    // Nothing tells when a server is back or a lock is free but another try.
                    std::thread::sleep(pause);
                    pause *= 2;
                }
                done => return done,
            }
        }
        self.try_act(access, act)
    }

    fn try_act<T, E: From<StoreError>>(
        &self,
        access: Access,
        act: &mut dyn FnMut(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        match &self.kind {
            Kind::Sqlite(file) => transact(&mut *file.session(), self, access, act),
            Kind::Postgres(pool) => transact(&mut *pool.session()?, self, access, act),
        }
    }
}

/// Errors that may come from the store.
pub trait AsStoreError {
    /// The store's error, if it is one.
    fn as_store_error(&self) -> Option<&StoreError>;
}

impl AsStoreError for StoreError {
    fn as_store_error(&self) -> Option<&StoreError> {
        Some(self)
    }
}

/// Rolls back what was not committed, even when an act panics.
struct Open<'a>(&'a mut dyn Session, bool);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if self.1 {
            self.0.roll_back();
        }
    }
}

fn transact<T, E: From<StoreError>>(
    session: &mut dyn Session,
    store: &Store,
    access: Access,
    act: &mut dyn FnMut(&Tx<'_>) -> Result<T, E>,
) -> Result<T, E> {
    store.faults.step();
    let mut open = Open(session, true);
    open.0.begin(access)?;
    let done = act(&Tx { session: RefCell::new(&mut *open.0), store })?;
    store.faults.step();
    open.0.commit()?;
    open.1 = false;
    store.faults.step();
    Ok(done)
}
