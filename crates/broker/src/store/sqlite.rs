//! The embedded store: one file, readable by its user alone since it holds the secrets of all chains.

use super::{Access, Row, Session, StoreError, Value};
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ToSql, params_from_iter};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long to wait for another process that has the file locked, such as an audit or a backup.
const BUSY_TIME_MAX: Duration = Duration::from_secs(5);
/// Statements kept ready: more than the broker has.
const STATEMENTS_MAX: usize = 100;

/// The file and the one connection to it.
pub struct File(Mutex<Connection>);

impl File {
    /// Opens it, or makes it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIME_MAX)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // FULL: a sale that was answered survives a power cut, too.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        Ok(Self(Mutex::new(connection)))
    }

    /// The connection, when nobody else has it.
    pub fn session(&self) -> MutexGuard<'_, Connection> {
        // A panic in an act rolled its transaction back: the connection is as good as before.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session for Connection {
    fn is_postgres(&self) -> bool {
        false
    }

    fn begin(&mut self, access: Access) -> Result<(), StoreError> {
        let sql = match access {
            Access::Read => "BEGIN",
            Access::Write => "BEGIN IMMEDIATE",
        };
        Ok(self.execute_batch(sql)?)
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        Ok(self.execute_batch("COMMIT")?)
    }

    fn roll_back(&mut self) {
        // Some errors have rolled back already.
        if !self.is_autocommit() {
            let _ = self.execute_batch("ROLLBACK");
        }
    }

    fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, StoreError> {
        let mut statement = self.prepare_cached(sql)?;
        Ok(statement.execute(params_from_iter(params))? as u64)
    }

    fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Row>, StoreError> {
        let mut statement = self.prepare_cached(sql)?;
        let columns = statement.column_count();
        let mut rows = statement.query(params_from_iter(params))?;
        let mut all = Vec::new();
        while let Some(row) = rows.next()? {
            let values: Result<_, StoreError> =
                (0..columns).map(|i| read(row.get_ref(i)?)).collect();
            all.push(Row(values?));
        }
        Ok(all)
    }

    fn batch(&mut self, sql: &str) -> Result<(), StoreError> {
        Ok(self.execute_batch(sql)?)
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Value::Null => ValueRef::Null,
            Value::Int(number) => ValueRef::Integer(*number),
            Value::Text(text) => ValueRef::Text(text.as_bytes()),
            Value::Bytes(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

fn read(value: ValueRef<'_>) -> Result<Value, StoreError> {
    Ok(match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Int(number),
        ValueRef::Blob(bytes) => Value::Bytes(bytes.into()),
        ValueRef::Text(text) => {
            let text =
                std::str::from_utf8(text).map_err(|_| StoreError::Shape("text that is none"))?;
            Value::Text(text.into())
        }
        ValueRef::Real(_) => return Err(StoreError::Shape("a fraction")),
    })
}
