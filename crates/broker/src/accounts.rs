//! Accounts and their keys: opening, crediting, charging, and the journal as the customer sees it.
//! Keys are random and kept as digests only; a key has 256 bits, so a plain digest is enough.

use crate::Broker;
use crate::journal::{self, Act, Book, Reason, request_key, signed};
use crate::ledger::unix_s;
use crate::refusal::Refusal;
use crate::store::{StoreError, Tx, params};
use onde_client::api::{
    ACCOUNT_NAME_MAX, Account, AccountOpened, AccountRequest, CreditRequest, Credited, Entry, Hex,
};
use onde_wire::key::sha256;

/// Most micro-tokens in one credit: 10^9 tokens. Nine thousand of them still fit a balance of 63 bits.
const CREDIT_MICRO_MAX: u64 = 1_000_000_000_000_000;

/// Digest of an API key.
pub type KeyDigest = [u8; 32];

/// A new random API key.
pub fn new_key() -> String {
    format!("onde_{}", Hex(crate::random::<32>()))
}

/// Micro-tokens in an account.
pub fn balance(tx: &Tx<'_>, account: &str) -> Result<u64, Refusal> {
    let found = journal::balance(tx, Book::Customer(account))?;
    found.map(i64::unsigned_abs).ok_or(Refusal::NotFound("account"))
}

/// Puts money into an account that came in through `from`; `key` is an act's, see [`journal::request_key`].
pub fn credit(
    tx: &Tx<'_>,
    account: &str,
    micro: u64,
    from: &str,
    key: String,
) -> Result<(), Refusal> {
    let micro = signed(micro);
    let lines = [(Book::Cash(from), -micro), (Book::Customer(account), micro)];
    let (reason, at) = (Reason::Credit, unix_s());
    journal::post(tx, &Act { reason, key, job: None, tokens: None, at, lines: &lines })
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    (1..=ACCOUNT_NAME_MAX).contains(&name.len()) && name.chars().all(allowed)
}

fn issue_key(tx: &Tx<'_>, name: &str) -> Result<AccountOpened, Refusal> {
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
        self.ledger.read(|tx| {
            let sql = "SELECT account FROM keys WHERE digest = ?1";
            tx.row(sql, params![key], |row| row.get(0))?.ok_or(Refusal::Unauthorized)
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
                _ => {
                    journal::open(tx, Book::Customer(name))?;
                    issue_key(tx, name)
                }
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
            credit(tx, name, request.micro, "operator", request_key("", &request.idempotency_key))?;
            Ok(Credited { name: name.into(), balance_micro: balance(tx, name)? })
        })
    }

    /// An account and a page of its journal.
    pub fn account(&self, name: &str, before: i64, limit: u32) -> Result<Account, Refusal> {
        self.ledger.read(|tx| {
            let entries = entries(tx, name, before, limit)?;
            let next =
                entries.last().filter(|_| entries.len() == limit as usize).map(|entry| entry.id);
            Ok(Account { name: name.into(), balance_micro: balance(tx, name)?, entries, next })
        })
    }
}

/// An account's lines of the journal before act `before`, newest first.
fn entries(tx: &Tx<'_>, name: &str, before: i64, limit: u32) -> Result<Vec<Entry>, StoreError> {
    let sql = "SELECT acts.seq, at, delta_micro, kind, job FROM lines JOIN acts ON acts.seq = lines.act \
         WHERE book = ?1 AND act < ?2 ORDER BY act DESC LIMIT ?3";
    let book = Book::Customer(name).to_string();
    tx.rows(sql, params![book, before, limit], |row| {
        Ok(Entry {
            id: row.get(0)?,
            at: row.get(1)?,
            delta_micro: row.get(2)?,
            reason: row.get(3)?,
            job: row.get::<Option<_>>(4)?.map(Hex),
        })
    })
}
