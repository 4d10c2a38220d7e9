//! The journal: double entry, append-only. Whatever moves money or tokens is one [`Act`]: lines that sum to zero,
//! written before it in the same transaction, an idempotency key that no second act can have, and the digest of the
//! act before it. `accounts`, `sale` and `settle` post acts, `audit` checks all of them; constraints and triggers
//! refuse what does not balance, whoever writes.
//!
//! ```text
//!               credit                 boot, tokens                 refund
//!   cash:FROM ---------> customer:NAME -------------> job:ID ----------------> customer:NAME   (the change)
//!   (below zero: what                                 (what is out as tokens)
//!    came in so far)                                         `----------------> owner:income   (what was used)
//! ```

use crate::refusal::Refusal;
use crate::store::{StoreError, Tx, Value, params};
use onde_client::api::Hex;
use onde_wire::key::sha256;
use onde_wire::token::JobId;

/// A digest of acts.
pub type Digest = [u8; 32];

/// What the first act follows.
pub const GENESIS: Digest = [0; 32];

/// Where money can be.
#[derive(Clone, Copy, Debug)]
pub enum Book<'a> {
    /// Came in from outside; the word says through whom. Below zero by all that is inside.
    Cash(&'a str),
    /// A customer can spend it.
    Customer(&'a str),
    /// Paid for a job's tokens: the node's certificate will say whose it is.
    Job(&'a JobId),
    /// The owner earned it.
    Income,
}

impl std::fmt::Display for Book<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Book::Cash(from) => write!(f, "cash:{from}"),
            Book::Customer(name) => write!(f, "customer:{name}"),
            Book::Job(id) => write!(f, "job:{}", Hex(**id)),
            Book::Income => f.write_str("owner:income"),
        }
    }
}

/// Why money moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Somebody put it in.
    Credit,
    /// A boot token was bought.
    Boot,
    /// Payment tokens were bought.
    Tokens,
    /// A job was settled.
    Refund,
}

impl Reason {
    /// The word for it in the journal.
    pub fn word(self) -> &'static str {
        match self {
            Reason::Credit => "credit",
            Reason::Boot => "boot",
            Reason::Tokens => "tokens",
            Reason::Refund => "refund",
        }
    }
}

/// One movement.
#[derive(Debug)]
pub struct Act<'a> {
    /// Why.
    pub reason: Reason,
    /// What no other act ever has: see [`request_key`].
    pub key: String,
    /// The job that it is about.
    pub job: Option<&'a JobId>,
    /// First and last index of the tokens sold.
    pub tokens: Option<(u32, u32)>,
    /// Seconds since 1970, for people.
    pub at: u64,
    /// Micro-tokens into each book; lines of nothing are left out.
    pub lines: &'a [(Book<'a>, i64)],
}

/// Key of what a customer, or the operator as "", asked for under an idempotency key of theirs; a webhook's references are
/// under "/webhook". `Ledger::prune_some` spells it too, for sales.
pub fn request_key(scope: &str, key: &str) -> String {
    match (scope, key.starts_with("webhook/")) {
        // Would be the key of the shop's reference behind it. Only this is spelled otherwise: the journal keeps its keys for good.
        ("", true) => format!("operator/{key}"),
        _ => format!("request/{scope}/{key}"),
    }
}

/// An amount as a line has it.
pub fn signed(micro: u64) -> i64 {
    i64::try_from(micro).expect("all amounts are bounded far below 2^63")
}

/// An act as it is digested: everything about it but the digest itself.
pub struct Sealed {
    /// Position in the journal, from 1.
    pub seq: i64,
    /// Columns as stored: kind, key, job, first and last index, time.
    pub columns: Vec<Value>,
    /// Book and amount, by the books' names.
    pub lines: Vec<(String, i64)>,
    /// Digest of the act before.
    pub prev: Digest,
}

impl Sealed {
    /// The digest that binds this act to all before it. JSON of a tuple says each thing in one way only.
    pub fn digest(&self) -> Digest {
        let text = serde_json::to_vec(&(self.seq, &self.columns, &self.lines, &self.prev));
        sha256(&text.expect("plain values"))
    }
}

/// Opens a book, empty; nothing if it is there.
pub fn open(tx: &Tx<'_>, book: Book<'_>) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO books (name) VALUES (?1) ON CONFLICT DO NOTHING",
        params![book.to_string()],
    )?;
    Ok(())
}

/// Micro-tokens in a book; `None`: there is no such book.
pub fn balance(tx: &Tx<'_>, book: Book<'_>) -> Result<Option<i64>, StoreError> {
    let sql = "SELECT balance_micro FROM books WHERE name = ?1";
    tx.row(sql, params![book.to_string()], |row| row.get(0))
}

/// Position and digest of the last act.
pub fn head(tx: &Tx<'_>) -> Result<(i64, Digest), StoreError> {
    let sql = "SELECT seq, hash FROM acts ORDER BY seq DESC LIMIT 1";
    let last = tx.row(sql, params![], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(last.unwrap_or((0, GENESIS)))
}

/// Writes an act down. Its books are open, and the one that pays holds enough.
pub fn post(tx: &Tx<'_>, act: &Act<'_>) -> Result<(), Refusal> {
    let taken =
        tx.row("SELECT seq FROM acts WHERE key = ?1", params![act.key], |row| row.get::<i64>(0))?;
    if taken.is_some() {
        return Err(Refusal::KeyReused);
    }
    Ok(append(tx, act)?)
}

fn append(tx: &Tx<'_>, act: &Act<'_>) -> Result<(), StoreError> {
    let (last, prev) = head(tx)?;
    let lines = act.lines.iter().filter(|(_, micro)| *micro != 0);
    let mut lines: Vec<_> = lines.map(|(book, micro)| (book.to_string(), *micro)).collect();
    lines.sort();
    let (first_index, last_index) =
        (act.tokens.map(|(first, _)| first), act.tokens.map(|(_, last)| last));
    let columns = params![act.reason.word(), act.key, act.job, first_index, last_index, act.at];
    let sealed = Sealed { seq: last + 1, columns: columns.to_vec(), lines, prev };
    for (book, micro) in &sealed.lines {
        tx.execute(
            "INSERT INTO lines (act, book, delta_micro) VALUES (?1, ?2, ?3)",
            params![sealed.seq, book, micro],
        )?;
    }
    let mut row = vec![Value::Int(sealed.seq)];
    row.extend(sealed.columns.iter().cloned());
    row.extend_from_slice(params![sealed.prev, sealed.digest()]);
    tx.execute(
        "INSERT INTO acts (seq, kind, key, job, first_index, last_index, at, prev, hash) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        &row,
    )?;
    Ok(())
}

/// A line of the journal of version 1, and what its job was.
struct Old {
    id: i64,
    account: String,
    micro: i64,
    reason: String,
    job: Option<JobId>,
    at: u64,
}

/// Turns the journal of version 1 into acts. Its jobs' ends that gave nothing back left no line there.
pub fn adopt(tx: &Tx<'_>) -> Result<(), StoreError> {
    open(tx, Book::Cash("operator"))?;
    open(tx, Book::Cash("webhook"))?;
    open(tx, Book::Income)?;
    for name in tx.rows("SELECT name FROM accounts", params![], |row| row.get::<String>(0))? {
        open(tx, Book::Customer(&name))?;
    }
    let sql = "SELECT id, account, delta_micro, reason, job, at FROM entries ORDER BY id";
    let old = tx.rows(sql, params![], |row| {
        Ok(Old {
            id: row.get(0)?,
            account: row.get(1)?,
            micro: row.get(2)?,
            reason: row.get(3)?,
            job: row.get(4)?,
            at: row.get(5)?,
        })
    })?;
    old.iter().try_for_each(|old| adopt_line(tx, old))?;
    let sql = "SELECT id, account FROM jobs WHERE settled_at IS NOT NULL AND refund_micro = 0";
    let unpaid: Vec<(JobId, String)> =
        tx.rows(sql, params![], |row| Ok((row.get(0)?, row.get(1)?)))?;
    for (job, account) in &unpaid {
        adopt_refund(tx, job, account, 0, tx.unix_s())?;
    }
    tx.execute("DROP TABLE entries", params![])?;
    tx.execute("ALTER TABLE accounts DROP COLUMN balance_micro", params![])?;
    Ok(())
}

fn adopt_line(tx: &Tx<'_>, old: &Old) -> Result<(), StoreError> {
    let (key, at) = (format!("v1/{}", old.id), old.at);
    let customer = Book::Customer(&old.account);
    let Some(job) = &old.job else {
        let lines = [(Book::Cash("operator"), -old.micro), (customer, old.micro)];
        let act = Act { reason: Reason::Credit, key, job: None, tokens: None, at, lines: &lines };
        return append(tx, &act);
    };
    if old.reason == "refund" {
        return adopt_refund(tx, job, &old.account, old.micro, at);
    }
    open(tx, Book::Job(job))?;
    let sold = "SELECT coalesce(max(last_index), 0) FROM acts WHERE job = ?1";
    let sold: u32 = tx.value(sold, params![job])?;
    let value: i64 = tx.value("SELECT value_micro FROM jobs WHERE id = ?1", params![job])?;
    let count = u32::try_from(-old.micro / value).map_err(|_| StoreError::Shape("a sale"))?;
    let reason = if sold == 0 { Reason::Boot } else { Reason::Tokens };
    let lines = [(customer, old.micro), (Book::Job(job), -old.micro)];
    let tokens = Some((sold + 1, sold + count));
    append(tx, &Act { reason, key, job: Some(job), tokens, at, lines: &lines })
}

fn adopt_refund(
    tx: &Tx<'_>,
    job: &JobId,
    account: &str,
    refund: i64,
    at: u64,
) -> Result<(), StoreError> {
    let paid = balance(tx, Book::Job(job))?.ok_or(StoreError::Shape("a job without a sale"))?;
    let lines =
        [(Book::Job(job), -paid), (Book::Customer(account), refund), (Book::Income, paid - refund)];
    let (reason, key) = (Reason::Refund, settle_key(job));
    append(tx, &Act { reason, key, job: Some(job), tokens: None, at, lines: &lines })
}

/// Key of a job's end: there is one.
pub fn settle_key(job: &JobId) -> String {
    format!("settle/{}", Hex(*job))
}
