//! What can go wrong with a store, and whether trying again helps.

use postgres::error::SqlState;

/// The store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite's word.
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL's word.
    #[error("PostgreSQL: {}", told(.0))]
    Postgres(#[from] postgres::Error),
    /// The connection broke while a commit was under way: it happened, or it did not.
    #[error("PostgreSQL went away during a commit: {}", told(.0))]
    Unsure(#[source] postgres::Error),
    /// The file could not be made or opened.
    #[error(transparent)]
    File(#[from] std::io::Error),
    /// The URL asks for what there is not.
    #[error("the database's URL: {0}")]
    Url(&'static str),
    /// Rows are not as this program writes them.
    #[error("the store holds what no broker wrote: {0}")]
    Shape(&'static str),
    /// A newer program wrote the tables.
    #[error("tables of version {0}; this broker knows up to {1}")]
    Version(i64, i64),
}

/// PostgreSQL's message is its error's source.
fn told(error: &postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string)
}

impl StoreError {
    /// Whether the same act may succeed when it is tried again, and certainly did nothing yet.
    pub fn is_passing(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
        match self {
            StoreError::Sqlite(error) => {
                matches!(error.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked))
            }
            StoreError::Postgres(error) => error.code().map_or_else(|| is_away(error), is_passing),
            _ => false,
        }
    }

    /// Whether the act may have happened although there was an error.
    pub fn is_unsure(&self) -> bool {
        matches!(self, StoreError::Unsure(_))
    }

    /// The error of a commit: only a database that answered "no" is sure not to have done it.
    pub(super) fn of_commit(error: postgres::Error) -> Self {
        match error.code() {
            Some(code) if code.code().starts_with("40") || code.code().starts_with("23") => {
                StoreError::Postgres(error)
            }
            _ => StoreError::Unsure(error),
        }
    }
}

/// No answer from the server: it is down, or the connection is.
fn is_away(error: &postgres::Error) -> bool {
    let source = std::error::Error::source(error);
    error.is_closed() || source.is_some_and(|cause| cause.is::<std::io::Error>())
}

/// Serialization failures, deadlocks, lock timeouts, and a server that shuts down or starts.
fn is_passing(code: &SqlState) -> bool {
    ["40", "08", "57P", "55P03", "53300"].iter().any(|class| code.code().starts_with(class))
}
