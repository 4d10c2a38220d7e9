//! Backups: all of a ledger's rows as lines of JSON, taken from one state while brokers go on selling, and put into
//! an empty store of either kind. `broker backup` and `broker restore` call it.
//!
//! What was sold after a backup is not in it. So a restored ledger sells no more tokens of the jobs that were open:
//! their chains' next tokens may be out already. They are frozen; certificates settle them. What their customers paid
//! after the backup is in their accounts again, and the certificates take it from there.
//!
//! ```text
//!   {"onde_backup":1,"version":2}
//!   {"table":"accounts","columns":["name","opened_at"]}
//!   ["a",1795267200]
//!   ...
//!   {"rows":1234,"sha256":"..."}        of all lines before
//! ```

use crate::audit::{Books, Unsound, prove};
use crate::ledger::note;
use crate::sale::skip_guests;
use crate::store::{Store, StoreError, Tx, Value, params};
use onde_client::api::Hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::io::{BufRead, Write};

/// The format above.
const FORMAT: u32 = 1;
/// Rows read at a time.
const PAGE: u64 = 5000;
/// Longest line of a backup: a reply of the API, twice escaped, is a few KiB.
const LINE_MAX: u64 = 1 << 20;
/// Tables that others refer to, and those that refer to all others: the lines of an act come before it.
const FIRST: [&str; 3] = ["accounts", "books", "jobs"];
const LAST: [&str; 2] = ["lines", "acts"];
/// Says itself which migrations ran.
const NOT_KEPT: &str = "migrations";

/// Why there is no backup, or nothing is restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] std::io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is cut off, altered, or no backup.
    #[error("the backup {0}")]
    Damaged(&'static str),
    /// Another version's tables.
    #[error(
        "the backup has tables of version {0}, this broker's are of {1}: restore it with its own broker first"
    )]
    Version(i64, i64),
    /// Nothing is ever overwritten.
    #[error("the store to restore into is not empty")]
    NotEmpty,
    /// The books in the backup do not balance.
    #[error("the restored ledger is unsound: {0}")]
    Unsound(#[from] Unsound),
}

impl crate::store::AsStoreError for BackupError {
    fn as_store_error(&self) -> Option<&StoreError> {
        // Half of a file is written or read by now: not to be tried again from here.
        None
    }
}

#[derive(Serialize, Deserialize)]
struct Head {
    onde_backup: u32,
    version: i64,
}

#[derive(Serialize, Deserialize)]
struct Table {
    table: String,
    columns: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Foot {
    rows: u64,
    sha256: Hex<32>,
}

/// Writes all of a store's rows to `out`; gives their number.
pub fn backup(store: &Store, out: &mut dyn Write) -> Result<u64, BackupError> {
    store.read(|tx| {
        let mut sum = Summed { out: &mut *out, hash: Sha256::new() };
        sum.line(&Head { onde_backup: FORMAT, version: tx.version()? })?;
        let mut rows = 0;
        for table in in_order(tx.tables()?) {
            rows += back_up_table(tx, &table, &mut sum)?;
        }
        let sha256 = Hex(sum.hash.clone().finalize().into());
        sum.line(&Foot { rows, sha256 })?;
        Ok(rows)
    })
}

/// Tables so that each comes behind those that its rows refer to.
fn in_order(tables: Vec<String>) -> Vec<String> {
    let place = |table: &str| match (
        FIRST.iter().position(|first| *first == table),
        LAST.iter().position(|last| *last == table),
    ) {
        (Some(at), _) => at,
        (_, Some(at)) => FIRST.len() + 1 + at,
        _ => FIRST.len(),
    };
    let mut tables: Vec<_> = tables.into_iter().filter(|table| table != NOT_KEPT).collect();
    tables.sort_by(|a, b| (place(a), a).cmp(&(place(b), b)));
    tables
}

fn back_up_table(tx: &Tx<'_>, table: &str, sum: &mut Summed<'_>) -> Result<u64, BackupError> {
    let mut columns = tx.columns(table)?;
    // Lines make balances: see the trigger.
    columns.retain(|column| column != "balance_micro");
    let list = columns.join(", ");
    sum.line(&Table { table: table.into(), columns: columns.clone() })?;
    // By the whole key: pages of an order in which rows can be equal may skip some and tell others twice.
    let key = tx.key(table)?;
    let place = |name| columns.iter().position(|column| column == name);
    let places: Vec<_> = key.iter().filter_map(place).collect();
    if places.is_empty() || places.len() != key.len() {
        return Err(StoreError::Shape("a table without a key").into());
    }
    let (order, signs) = (key.join(", "), signs(2, key.len()));
    let first = format!("SELECT {list} FROM {table} ORDER BY {order} LIMIT ?1");
    let next =
        format!("SELECT {list} FROM {table} WHERE ({order}) > ({signs}) ORDER BY {order} LIMIT ?1");
    let mut page = tx.rows(&first, params![PAGE], |row| Ok(row.values().to_vec()))?;
    let mut rows = 0;
    while let Some(last) = page.last() {
        page.iter().try_for_each(|row| sum.line(row))?;
        rows += page.len() as u64;
        let mut after = params![PAGE].to_vec();
        after.extend(places.iter().map(|place| last[*place].clone()));
        page = tx.rows(&next, &after, |row| Ok(row.values().to_vec()))?;
    }
    Ok(rows)
}

/// So many parameters, from number `first` on.
fn signs(first: usize, count: usize) -> String {
    (first..first + count).map(|i| format!("?{i}")).collect::<Vec<_>>().join(", ")
}

/// Digests what it writes.
struct Summed<'a> {
    out: &'a mut dyn Write,
    hash: Sha256,
}

impl Summed<'_> {
    fn line(&mut self, line: &impl Serialize) -> Result<(), BackupError> {
        let mut bytes = serde_json::to_vec(line).expect("plain values");
        bytes.push(b'\n');
        self.hash.update(&bytes);
        Ok(self.out.write_all(&bytes)?)
    }
}

/// Puts a backup into an empty store, all of it or nothing, freezes its open jobs and proves its books.
pub fn restore(store: &Store, input: &mut dyn BufRead) -> Result<Books, BackupError> {
    store.write(|tx| {
        let here: i64 =
            tx.value("SELECT (SELECT count(*) FROM accounts) + (SELECT count(*) FROM acts)", &[])?;
        if here > 0 {
            return Err(BackupError::NotEmpty);
        }
        read_rows(tx, input)?;
        tx.restart_sequences()?;
        let frozen = tx.execute("UPDATE jobs SET frozen = 1 WHERE settled_at IS NULL", &[])?;
        skip_guests(tx)?;
        let text = format!("from a backup: {frozen} open jobs sell no more tokens");
        note(tx, "ledger_restored", None, None, &text)?;
        Ok(prove(tx, None)?)
    })
}

fn read_rows(tx: &Tx<'_>, input: &mut dyn BufRead) -> Result<(), BackupError> {
    let mut hash = Sha256::new();
    let head: Head = parse(&read_line(input)?, &mut hash)?;
    let version = tx.version()?;
    if head.onde_backup != FORMAT || head.version != version {
        return Err(BackupError::Version(head.version, version));
    }
    let (mut insert, mut rows) = (String::new(), 0);
    loop {
        let line = read_line(input)?;
        if line.starts_with(b"[") {
            let row: Vec<Value> = parse(&line, &mut hash)?;
            tx.execute(&insert, &row)?;
            rows += 1;
        } else if line.starts_with(b"{\"rows\"") {
            let foot: Foot = parse(&line, &mut Sha256::new())?;
            let digest: [u8; 32] = hash.finalize().into();
            let is_whole = foot.rows == rows && foot.sha256.0 == digest;
            return is_whole.then_some(()).ok_or(BackupError::Damaged("was altered"));
        } else {
            insert = inserting(tx, &parse(&line, &mut hash)?)?;
        }
    }
}

fn read_line(input: &mut dyn BufRead) -> Result<Vec<u8>, BackupError> {
    use std::io::Read;
    let mut line = Vec::new();
    input.take(LINE_MAX).read_until(b'\n', &mut line)?;
    match line.last() {
        Some(b'\n') => Ok(line),
        _ => Err(BackupError::Damaged("is cut off")),
    }
}

fn parse<T: serde::de::DeserializeOwned>(line: &[u8], hash: &mut Sha256) -> Result<T, BackupError> {
    hash.update(line);
    serde_json::from_slice(line).map_err(|_| BackupError::Damaged("has a line that is none of its"))
}

/// The statement for a table's rows. Names from a file do not go into SQL: only those that the store has.
fn inserting(tx: &Tx<'_>, table: &Table) -> Result<String, BackupError> {
    let is_known = tx.tables()?.contains(&table.table) && table.table != NOT_KEPT;
    let columns = if is_known { tx.columns(&table.table)? } else { Vec::new() };
    if table.columns.is_empty() || !table.columns.iter().all(|column| columns.contains(column)) {
        return Err(BackupError::Damaged("names a table or column that there is not"));
    }
    let signs = signs(1, table.columns.len());
    let (name, columns) = (&table.table, table.columns.join(", "));
    // The owner's books are open in an empty store, too.
    Ok(format!("INSERT INTO {name} ({columns}) VALUES ({signs}) ON CONFLICT DO NOTHING"))
}
