//! The store in PostgreSQL: a few connections, made when wanted, dropped when broken. Statements are SQLite's with
//! other parameter signs.

use super::tls::Tls;
use super::{Access, Row, Session, StoreError, Value};
use postgres::config::SslMode;
use postgres::types::{ToSql, Type};
use postgres::{Client, Config, NoTls, Statement};
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Most connections: acts that write wait for each other anyhow, so these are for readers.
const CONNECTIONS_MAX: usize = 8;
/// Longest wait for the server to take a connection.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long unacknowledged data may be under way before the connection counts as lost.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// The advisory lock of all acts that write: "onde" in ASCII, so that other programs' locks differ.
const WRITE_LOCK: i64 = 0x6f6e_6465;
/// What each connection is told first. The time limits end what a frozen broker would block for its peer.
const SETTINGS: &str = "SET lock_timeout = '10s'; SET statement_timeout = '30s'; \
    SET idle_in_transaction_session_timeout = '30s'; SET synchronous_commit = on; \
    SET client_min_messages = warning";

/// One connection and the statements it knows.
pub struct Connected {
    client: Client,
    statements: HashMap<String, Statement>,
    /// Since the transaction's begin. PostgreSQL answers COMMIT of a failed one with success.
    has_failed: bool,
}

/// Connections to one database.
pub struct Pool {
    config: Config,
    /// Where the URL asks for it.
    tls: Option<Tls>,
    idle: Mutex<Idle>,
    returned: Condvar,
}

#[derive(Default)]
struct Idle {
    connections: Vec<Connected>,
    /// Connections lent out.
    lent: usize,
}

/// A connection that goes back to its pool.
pub struct Lent<'a> {
    pool: &'a Pool,
    connected: Option<Connected>,
}

impl Pool {
    /// Nothing is connected yet.
    pub fn new(url: &str) -> Result<Self, StoreError> {
        let (url, tls) = encryption(url)?;
        let mut config: Config = url.parse()?;
        config.ssl_mode(if tls.is_some() { SslMode::Require } else { SslMode::Disable });
        config.application_name("onde-broker").connect_timeout(CONNECT_TIME_MAX);
        config.tcp_user_timeout(SILENCE_MAX);
        Ok(Self { config, tls, idle: Mutex::default(), returned: Condvar::new() })
    }

    /// A connection: an idle one, a new one, or the first that comes back.
    pub fn session(&self) -> Result<Lent<'_>, StoreError> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while idle.lent >= CONNECTIONS_MAX {
            idle = self.returned.wait(idle).unwrap_or_else(PoisonError::into_inner);
        }
        idle.lent += 1;
        let connected = idle.connections.pop();
        drop(idle);
        let mut lent = Lent { pool: self, connected };
        if lent.connected.is_none() {
            lent.connected = Some(self.connect()?);
        }
        Ok(lent)
    }

    fn connect(&self) -> Result<Connected, StoreError> {
        let mut client = match &self.tls {
            Some(tls) => self.config.connect(tls.clone())?,
            None => self.config.connect(NoTls)?,
        };
        client.batch_execute(SETTINGS)?;
        Ok(Connected { client, statements: HashMap::new(), has_failed: false })
    }
}

/// A URL without what it says of TLS, and the TLS that it asks for: `sslmode=require`, `verify-ca` and `verify-full` all
/// mean that the server has to prove who it is, by the authorities in `sslrootcert=FILE` or this machine's.
fn encryption(url: &str) -> Result<(String, Option<Tls>), StoreError> {
    let (place, query) = url.split_once('?').unwrap_or((url, ""));
    let (mut rest, mut is_wanted, mut file) = (Vec::new(), false, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("sslmode", "disable" | "allow" | "prefer")) => is_wanted = false,
            Some(("sslmode", "require" | "verify-ca" | "verify-full")) => is_wanted = true,
            Some(("sslmode", _)) => {
                return Err(StoreError::Url("sslmode is disable, require or verify-full"));
            }
            Some(("sslrootcert", path)) => file = Some(Path::new(path)),
            _ => rest.push(pair),
        }
    }
    let mark = if rest.is_empty() { "" } else { "?" };
    let tls = is_wanted.then(|| Tls::new(file)).transpose()?;
    Ok((format!("{place}{mark}{}", rest.join("&")), tls))
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut idle = self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.lent -= 1;
        let connected = self.connected.take();
        idle.connections.extend(connected.filter(|connected| !connected.client.is_closed()));
        self.pool.returned.notify_one();
    }
}

impl Deref for Lent<'_> {
    type Target = Connected;

    fn deref(&self) -> &Connected {
        self.connected.as_ref().expect("there until it is dropped")
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Connected {
        self.connected.as_mut().expect("there until it is dropped")
    }
}

impl Connected {
    /// The statement ready to run. The broker's statements are constants, so this stays small.
    fn statement(&mut self, sql: &str) -> Result<Statement, postgres::Error> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare(&sql.replace('?', "$"))?;
        self.statements.insert(sql.into(), statement.clone());
        Ok(statement)
    }

    fn note<T>(&mut self, done: Result<T, postgres::Error>) -> Result<T, StoreError> {
        self.has_failed |= done.is_err();
        Ok(done?)
    }

    fn try_query(
        &mut self,
        sql: &str,
        params: &[Value],
    ) -> Result<Vec<postgres::Row>, postgres::Error> {
        let statement = self.statement(sql)?;
        let bound = bind(&statement, params);
        let bound: Vec<_> = bound.iter().map(|param| &**param as &(dyn ToSql + Sync)).collect();
        self.client.query(&statement, &bound)
    }

    fn try_execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, postgres::Error> {
        let statement = self.statement(sql)?;
        let bound = bind(&statement, params);
        let bound: Vec<_> = bound.iter().map(|param| &**param as &(dyn ToSql + Sync)).collect();
        self.client.execute(&statement, &bound)
    }
}

impl Session for Connected {
    fn is_postgres(&self) -> bool {
        true
    }

    fn begin(&mut self, access: Access) -> Result<(), StoreError> {
        self.has_failed = false;
        let sql = match access {
            Access::Read => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY".into(),
            // Each statement behind the lock sees all that was committed before it was had.
            Access::Write => format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock({WRITE_LOCK})"
            ),
        };
        let done = self.client.batch_execute(&sql);
        self.note(done)
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        if self.has_failed {
            return Err(StoreError::Shape("a commit after an error"));
        }
        self.client.batch_execute("COMMIT").map_err(StoreError::of_commit)
    }

    fn roll_back(&mut self) {
        if !self.client.is_closed() {
            let _ = self.client.batch_execute("ROLLBACK");
        }
    }

    fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, StoreError> {
        let done = self.try_execute(sql, params);
        self.note(done)
    }

    fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Row>, StoreError> {
        let done = self.try_query(sql, params);
        let rows = self.note(done)?;
        rows.iter().map(read).collect()
    }

    fn batch(&mut self, sql: &str) -> Result<(), StoreError> {
        let done = self.client.batch_execute(sql);
        self.note(done)
    }
}

/// Parameters in the types that the server expects. One of a wrong type is the server's to refuse.
fn bind(statement: &Statement, params: &[Value]) -> Vec<Box<dyn ToSql + Sync>> {
    let types = statement.params().iter();
    types.zip(params).map(|(kind, param)| bind_one(kind, param)).collect()
}

fn bind_one(kind: &Type, param: &Value) -> Box<dyn ToSql + Sync> {
    match (param, kind) {
        // A bare number beside a parameter makes it one of 32 bits.
        (Value::Int(number), &Type::INT4) => Box::new(i32::try_from(*number).ok()),
        (Value::Int(number), _) => Box::new(*number),
        (Value::Text(text), _) => Box::new(text.clone()),
        (Value::Bytes(bytes), _) => Box::new(bytes.clone()),
        (Value::Null, &Type::TEXT) => Box::new(None::<String>),
        (Value::Null, &Type::BYTEA) => Box::new(None::<Vec<u8>>),
        (Value::Null, &Type::INT4) => Box::new(None::<i32>),
        (Value::Null, _) => Box::new(None::<i64>),
    }
}

fn read(row: &postgres::Row) -> Result<Row, StoreError> {
    let columns = row.columns().iter().enumerate();
    let values: Result<_, StoreError> =
        columns.map(|(i, column)| read_one(row, i, column.type_())).collect();
    Ok(Row(values?))
}

fn read_one(row: &postgres::Row, index: usize, kind: &Type) -> Result<Value, StoreError> {
    let value = match *kind {
        Type::INT8 => row.try_get::<_, Option<i64>>(index)?.map(Value::Int),
        Type::INT4 => row.try_get::<_, Option<i32>>(index)?.map(|number| Value::Int(number.into())),
        Type::TEXT => row.try_get::<_, Option<String>>(index)?.map(Value::Text),
        Type::BYTEA => row.try_get::<_, Option<Vec<u8>>>(index)?.map(Value::Bytes),
        _ => return Err(StoreError::Shape("a column of a type that no table has")),
    };
    Ok(value.unwrap_or(Value::Null))
}
