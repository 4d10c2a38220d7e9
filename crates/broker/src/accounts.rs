//! Accounts and their keys: opening, crediting, charging, and the journal as the customer sees it.
//! Keys are random and kept as digests only; a key has 256 bits, so a plain digest is enough.

use crate::Broker;
use crate::journal::{self, Act, Book, Reason, signed};
use crate::payments::Paid;
use crate::refusal::Refusal;
use crate::store::{Row, StoreError, Tx, params};
use onde_client::api::{
    ACCOUNT_NAME_MAX, Account, AccountOpened, AccountRequest, CreditRequest, Credited, Entry, Hex,
    KeyRequest, Revoked, Scope,
};
use onde_wire::key::sha256;

/// Longest life of a key that ends, seconds: ten years.
const KEY_LIFE_MAX_S: u64 = 10 * 366 * 24 * 3600;

/// The word for keys that read figures.
const METRICS: &str = "metrics";

/// Digest of an API key.
pub type KeyDigest = [u8; 32];

/// A new random API key.
pub fn new_key() -> String {
    format!("onde_{}", Hex(crate::random::<32>()))
}

/// 32 random bytes.
pub fn random_key() -> [u8; 32] {
    crate::random()
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
    let (reason, at) = (Reason::Credit, tx.unix_s());
    journal::post(tx, &Act { reason, key, job: None, tokens: None, at, lines: &lines })
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    (1..=ACCOUNT_NAME_MAX).contains(&name.len()) && name.chars().all(allowed)
}

fn issue_key(tx: &Tx<'_>, name: &str, request: KeyRequest) -> Result<AccountOpened, Refusal> {
    let (key, now) = (new_key(), tx.unix_s());
    let digest = sha256(key.as_bytes());
    let scope = scope_word(request.scope);
    let expires_at = request.expires_in_s.map(|life| now + life);
    tx.execute(
        "INSERT INTO keys (digest, account, issued_at, scope, expires_at) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![digest, name, now, scope, expires_at],
    )?;
    Ok(AccountOpened { name: name.into(), key, id: key_id(&digest) })
}

/// What names a key to whoever may not know it.
fn key_id(digest: &KeyDigest) -> Hex<8> {
    Hex(*digest.first_chunk().expect("a digest is longer"))
}

fn scope_word(scope: Scope) -> &'static str {
    match scope {
        Scope::Customer => "customer",
        Scope::Reader => "reader",
        Scope::Metrics => METRICS,
    }
}

impl Broker {
    /// Whose key this is, if it is still good, and good for acts that change something where this one `writes`.
    pub fn customer(&self, key: &KeyDigest, writes: bool) -> Result<String, Refusal> {
        match self.key(key)? {
            None => Err(Refusal::Unauthorized),
            Some((_, scope)) if scope == METRICS => Err(Refusal::OnlyMetrics),
            Some((_, scope)) if writes && scope != "customer" => Err(Refusal::ReadOnly),
            Some((account, _)) => Ok(account),
        }
    }

    /// Whether this is a key for the broker's figures.
    pub fn is_for_metrics(&self, key: &KeyDigest) -> Result<bool, Refusal> {
        Ok(self.key(key)?.is_some_and(|(_, scope)| scope == METRICS))
    }

    /// Account and scope of a key that is still good.
    fn key(&self, key: &KeyDigest) -> Result<Option<(String, String)>, Refusal> {
        self.ledger.read(|tx| {
            let sql = "SELECT account, scope FROM keys \
                 WHERE digest = ?1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > ?2)";
            let read = |row: &Row| Ok((row.get::<String>(0)?, row.get::<String>(1)?));
            Ok(tx.row(sql, params![key, tx.unix_s()], read)?)
        })
    }

    /// Makes a key of the account, or any key if it is the operator who asks (`None`), worthless. Again: the same.
    pub fn revoke_key(&self, account: Option<&str>, id: &Hex<8>) -> Result<Revoked, Refusal> {
        self.ledger.act(|tx| {
            let found = tx.execute(
                "UPDATE keys SET revoked_at = coalesce(revoked_at, ?2) \
                 WHERE substr(digest, 1, 8) = ?1 AND account = coalesce(?3, account)",
                params![id.0, tx.unix_s(), account],
            )?;
            if found == 0 { Err(Refusal::NotFound("key")) } else { Ok(Revoked { id: *id }) }
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
                params![name, tx.unix_s()],
            )?;
            match made {
                0 => Err(Refusal::AccountExists),
                _ => {
                    journal::open(tx, Book::Customer(name))?;
                    issue_key(tx, name, KeyRequest::default())
                }
            }
        })
    }

    /// One more key for an account.
    pub fn add_key(&self, name: &str, request: KeyRequest) -> Result<AccountOpened, Refusal> {
        if !(1..=KEY_LIFE_MAX_S).contains(&request.expires_in_s.unwrap_or(1)) {
            return Err(Refusal::Invalid("expires_in_s is 1 to 316224000"));
        }
        self.ledger.act(|tx| {
            balance(tx, name)?;
            issue_key(tx, name, request)
        })
    }

    /// Puts money into an account that the operator was given.
    pub fn credit_account(&self, name: &str, request: &CreditRequest) -> Result<Credited, Refusal> {
        self.paid(&Paid {
            through: "operator",
            // No account has this name, so no customer can use up the operator's keys.
            scope: "",
            reference: &request.idempotency_key,
            account: name,
            micro: request.micro,
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
