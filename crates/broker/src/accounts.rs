//! Accounts and their keys: opening, crediting, charging, and the journal as the customer sees it.
//! Keys are random and kept as digests only; a key has 256 bits, so a plain digest is enough.

use crate::Broker;
use crate::ledger::unix_s;
use crate::refusal::Refusal;
use onde_client::api::{
    ACCOUNT_NAME_MAX, Account, AccountOpened, AccountRequest, CreditRequest, Credited, Entry, Hex,
};
use onde_wire::key::sha256;
use onde_wire::token::JobId;
use rusqlite::{Connection, OptionalExtension, params};

/// Most micro-tokens in one credit: 10^9 tokens. Nine thousand of them still fit a balance of 63 bits.
const CREDIT_MICRO_MAX: u64 = 1_000_000_000_000_000;

/// Digest of an API key.
pub type KeyDigest = [u8; 32];

/// A new random API key.
pub fn new_key() -> String {
    format!("onde_{}", Hex(crate::random::<32>()))
}

/// Why money moves.
#[derive(Clone, Copy, Debug)]
pub enum Reason {
    /// The operator put it in.
    Credit,
    /// A boot token was bought.
    Boot,
    /// Payment tokens were bought.
    Tokens,
    /// A job was settled.
    Refund,
}

impl Reason {
    fn word(self) -> &'static str {
        match self {
            Reason::Credit => "credit",
            Reason::Boot => "boot",
            Reason::Tokens => "tokens",
            Reason::Refund => "refund",
        }
    }
}

/// Micro-tokens in an account.
pub fn balance(tx: &Connection, account: &str) -> Result<u64, Refusal> {
    tx.query_row("SELECT balance_micro FROM accounts WHERE name = ?1", [account], |row| row.get(0))
        .optional()?
        .ok_or(Refusal::NotFound("account"))
}

/// Takes money out of an account.
pub fn charge(
    tx: &Connection,
    account: &str,
    micro: u64,
    reason: Reason,
    job: &JobId,
) -> Result<(), Refusal> {
    let have = balance(tx, account)?;
    if have < micro {
        return Err(Refusal::NoMoney { need: micro, have });
    }
    post(tx, account, -signed(micro), reason, Some(job))
}

/// Puts money into an account; nothing for nothing.
pub fn credit(
    tx: &Connection,
    account: &str,
    micro: u64,
    reason: Reason,
    job: Option<&JobId>,
) -> Result<(), Refusal> {
    match micro {
        0 => Ok(()),
        _ => post(tx, account, signed(micro), reason, job),
    }
}

fn signed(micro: u64) -> i64 {
    i64::try_from(micro).expect("all amounts are bounded far below 2^63")
}

fn post(
    tx: &Connection,
    account: &str,
    delta_micro: i64,
    reason: Reason,
    job: Option<&JobId>,
) -> Result<(), Refusal> {
    tx.execute(
        "INSERT INTO entries (account, delta_micro, reason, job, at) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![account, delta_micro, reason.word(), job, unix_s()],
    )?;
    Ok(())
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    (1..=ACCOUNT_NAME_MAX).contains(&name.len()) && name.chars().all(allowed)
}

fn issue_key(tx: &Connection, name: &str) -> Result<AccountOpened, Refusal> {
    let key = new_key();
    tx.execute(
        "INSERT INTO keys (digest, account, issued_at) VALUES (?1, ?2, ?3)",
        params![sha256(key.as_bytes()), name, unix_s()],
    )?;
    Ok(AccountOpened { name: name.into(), key })
}

impl Broker {
    /// Whose key this is.
    pub fn customer(&self, key: &KeyDigest) -> Result<String, Refusal> {
        self.ledger.act(|tx| {
            tx.query_row("SELECT account FROM keys WHERE digest = ?1", [key], |row| row.get(0))
                .optional()?
                .ok_or(Refusal::Unauthorized)
        })
    }

    /// Opens an account, empty, with its first key.
    pub fn open_account(&self, request: &AccountRequest) -> Result<AccountOpened, Refusal> {
        let name = &request.name;
        if !is_name(name) {
            return Err(Refusal::Invalid(
                "a name has 1 to 64 letters, digits, `.`, `_`, `@` and `-`",
            ));
        }
        self.ledger.act(|tx| {
            let made = tx.execute(
                "INSERT INTO accounts (name, opened_at) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                params![name, unix_s()],
            )?;
            match made {
                0 => Err(Refusal::AccountExists),
                _ => issue_key(tx, name),
            }
        })
    }

    /// One more key for an account.
    pub fn add_key(&self, name: &str) -> Result<AccountOpened, Refusal> {
        self.ledger.act(|tx| {
            balance(tx, name)?;
            issue_key(tx, name)
        })
    }

    /// Puts the operator's money into an account.
    pub fn credit_account(&self, name: &str, request: &CreditRequest) -> Result<Credited, Refusal> {
        if !(1..=CREDIT_MICRO_MAX).contains(&request.micro) {
            return Err(Refusal::Invalid("a credit is 1 to 10^15 micro-tokens"));
        }
        // Scope "": no account has this name, so no customer can use up the operator's keys.
        self.ledger.act_once("", &request.idempotency_key, &("credit", name, request), |tx| {
            balance(tx, name)?;
            credit(tx, name, request.micro, Reason::Credit, None)?;
            Ok(Credited { name: name.into(), balance_micro: balance(tx, name)? })
        })
    }

    /// An account and a page of its journal.
    pub fn account(&self, name: &str, before: i64, limit: u32) -> Result<Account, Refusal> {
        self.ledger.act(|tx| {
            let entries = journal(tx, name, before, limit)?;
            let next =
                entries.last().filter(|_| entries.len() == limit as usize).map(|entry| entry.id);
            Ok(Account { name: name.into(), balance_micro: balance(tx, name)?, entries, next })
        })
    }
}

fn journal(
    tx: &Connection,
    name: &str,
    before: i64,
    limit: u32,
) -> Result<Vec<Entry>, rusqlite::Error> {
    let mut query = tx.prepare_cached(
        "SELECT id, at, delta_micro, reason, job FROM entries \
         WHERE account = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3",
    )?;
    let rows = query.query_map(params![name, before, limit], |row| {
        Ok(Entry {
            id: row.get(0)?,
            at: row.get(1)?,
            delta_micro: row.get(2)?,
            reason: row.get(3)?,
            job: row.get::<_, Option<_>>(4)?.map(Hex),
        })
    })?;
    rows.collect()
}
