//! The audit: reads the whole journal and proves that it is whole and that everything else agrees with it. `broker
//! audit` and the tests run it, beside a broker at work if need be: it sees one state and changes nothing.

use crate::journal::{Digest, GENESIS, Sealed};
use crate::store::{Store, StoreError, Tx, Value, params};
use onde_client::api::Hex;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Acts read at a time.
const PAGE: i64 = 5000;

/// What a sound journal adds up to.
#[derive(Debug, PartialEq, Eq)]
pub struct Books {
    /// Acts in it.
    pub acts: i64,
    /// Digest of the last one: noted somewhere else, it proves later that nothing before it was altered or removed.
    pub head: Digest,
    /// Micro-tokens by kind of book: cash (below zero), customers, jobs, the owner. They sum to zero.
    pub micro: BTreeMap<String, i64>,
}

/// Why there is no proof.
#[derive(Debug, thiserror::Error)]
pub enum Unsound {
    /// The first act that is wrong.
    #[error("act {seq} {what}")]
    Act {
        /// Its position.
        seq: i64,
        /// What is wrong with it.
        what: String,
    },
    /// The journal is sound, but something that follows from it is not.
    #[error("{0}")]
    Beside(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl crate::store::AsStoreError for Unsound {
    fn as_store_error(&self) -> Option<&StoreError> {
        match self {
            Unsound::Store(error) => Some(error),
            _ => None,
        }
    }
}

/// What the acts read so far come to.
struct Tally {
    seq: i64,
    head: Digest,
    books: HashMap<String, i64>,
    /// Tokens sold of each job.
    sold: HashMap<Vec<u8>, i64>,
}

/// Audits a store. `noted`: a position and digest that an earlier audit gave.
pub fn audit(store: &Store, noted: Option<(i64, Digest)>) -> Result<Books, Unsound> {
    store.read(|tx| prove(tx, noted))
}

/// Audits what a transaction sees.
pub fn prove(tx: &Tx<'_>, noted: Option<(i64, Digest)>) -> Result<Books, Unsound> {
    let mut tally = Tally { seq: 0, head: GENESIS, books: HashMap::new(), sold: HashMap::new() };
    loop {
        let page = read_page(tx, tally.seq)?;
        for (sealed, hash) in &page {
            let seq = sealed.seq;
            tally.take(sealed, hash).map_err(|what| Unsound::Act { seq, what })?;
            if noted.is_some_and(|(act, head)| act == seq && head != tally.head) {
                let what = "is not the one that was noted".into();
                return Err(Unsound::Act { seq, what });
            }
        }
        if page.is_empty() {
            break;
        }
    }
    if let Some((seq, _)) = noted.filter(|(seq, _)| *seq > tally.seq) {
        let told = format!("act {seq} was noted, the last here is {}", tally.seq);
        return Err(Unsound::Beside(told));
    }
    check_books(tx, &tally.books)?;
    check_jobs(tx, &tally)?;
    Ok(tally.books())
}

/// The next acts behind `seq`, with the digest that stands beside each.
fn read_page(tx: &Tx<'_>, seq: i64) -> Result<Vec<(Sealed, Digest)>, StoreError> {
    let sql = "SELECT kind, key, job, first_index, last_index, at, prev, hash, seq FROM acts \
         WHERE seq > ?1 ORDER BY seq LIMIT ?2";
    let mut acts = tx.rows(sql, params![seq, PAGE], |row| {
        let columns = row.values()[..6].to_vec();
        let sealed = Sealed { seq: row.get(8)?, columns, lines: Vec::new(), prev: row.get(6)? };
        Ok((sealed, row.get(7)?))
    })?;
    let last = acts.last().map_or(seq, |(sealed, _)| sealed.seq);
    let sql = "SELECT act, book, delta_micro FROM lines WHERE act > ?1 AND act <= ?2";
    let rows =
        tx.rows(sql, params![seq, last], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let mut lines: HashMap<i64, Vec<(String, i64)>> = HashMap::new();
    for (act, book, micro) in rows {
        lines.entry(act).or_default().push((book, micro));
    }
    for (sealed, _) in &mut acts {
        sealed.lines = lines.remove(&sealed.seq).unwrap_or_default();
        // Databases order text in ways of their own.
        sealed.lines.sort();
    }
    Ok(acts)
}

impl Tally {
    fn take(&mut self, act: &Sealed, hash: &Digest) -> Result<(), String> {
        if act.seq != self.seq + 1 {
            return Err(format!("follows act {}: acts were removed", self.seq));
        }
        if act.prev != self.head {
            return Err("does not continue the chain of digests".into());
        }
        if act.digest() != *hash {
            return Err("was altered: its digest is another".into());
        }
        let sum: i128 = act.lines.iter().map(|(_, micro)| i128::from(*micro)).sum();
        if sum != 0 || act.lines.len() < 2 {
            return Err(format!("does not balance: its {} lines sum to {sum}", act.lines.len()));
        }
        for (book, micro) in &act.lines {
            let balance = self.books.entry(book.clone()).or_default();
            *balance = balance.checked_add(*micro).ok_or("overflows a book")?;
            if *balance < 0 && !book.starts_with("cash:") {
                return Err(format!("takes {book} below zero"));
            }
        }
        self.take_tokens(act)?;
        (self.seq, self.head) = (act.seq, *hash);
        Ok(())
    }

    /// Tokens are sold one after the other: none twice, none left out.
    fn take_tokens(&mut self, act: &Sealed) -> Result<(), String> {
        let (job, first, last) = match &act.columns[2..5] {
            [Value::Bytes(job), Value::Int(first), Value::Int(last)] => (job, *first, *last),
            [_, Value::Null, Value::Null] => return Ok(()),
            _ => return Err("sells tokens of no job".into()),
        };
        let sold = self.sold.entry(job.clone()).or_default();
        if first != *sold + 1 || last < first {
            return Err(format!("sells tokens {first} to {last} when {sold} were sold"));
        }
        *sold = last;
        Ok(())
    }

    fn books(self) -> Books {
        let mut micro = BTreeMap::new();
        for (book, balance) in self.books {
            let kind = book.split_once(':').map_or(book.as_str(), |(kind, _)| kind);
            *micro.entry(kind.into()).or_default() += balance;
        }
        Books { acts: self.seq, head: self.head, micro }
    }
}

/// Balances, which sales go by, are what the journal adds up to.
fn check_books(tx: &Tx<'_>, books: &HashMap<String, i64>) -> Result<(), Unsound> {
    let sql = "SELECT name, balance_micro FROM books";
    let shown: HashMap<String, i64> =
        tx.rows(sql, params![], |row| Ok((row.get(0)?, row.get(1)?)))?.into_iter().collect();
    // In an order, so that the same one is named each time.
    let names: BTreeSet<_> = shown.keys().chain(books.keys()).collect();
    for name in names {
        let Some(balance) = shown.get(name).copied() else {
            return Err(Unsound::Beside(format!("book {name} was removed")));
        };
        let journal = books.get(name).copied().unwrap_or_default();
        if balance != journal {
            let told =
                format!("book {name} shows {balance} micro-tokens, the journal has {journal}");
            return Err(Unsound::Beside(told));
        }
    }
    let strays = "SELECT count(*) FROM lines WHERE act NOT IN (SELECT seq FROM acts)";
    match tx.value::<i64>(strays, params![])? {
        0 => Ok(()),
        strays => Err(Unsound::Beside(format!("{strays} lines of no act"))),
    }
}

/// What each job's row says was sold and given back is what the journal says.
fn check_jobs(tx: &Tx<'_>, tally: &Tally) -> Result<(), Unsound> {
    let sql = "SELECT id, sold, value_micro, settled_at, refund_micro, account, \
         (SELECT delta_micro FROM lines JOIN acts ON acts.seq = lines.act WHERE acts.job = jobs.id \
          AND kind = 'refund' AND book = 'customer:' || account), seq FROM jobs WHERE seq > ?1 ORDER BY seq LIMIT ?2";
    let mut after = 0_i64;
    let mut jobs = 0;
    loop {
        let rows = tx.rows(sql, params![after, PAGE], |row| {
            let id: [u8; 16] = row.get(0)?;
            let (sold, value): (i64, i64) = (row.get(1)?, row.get(2)?);
            let refund = row.get::<Option<i64>>(6)?.unwrap_or_default();
            let left = row.get::<Option<i64>>(3)?.map_or(sold * value, |_| 0);
            let book = tally.books.get(&format!("job:{}", Hex(id))).copied();
            let is_right = tally.sold.get(&id[..]) == Some(&sold)
                && refund == row.get::<i64>(4)?
                && book == Some(left);
            Ok((row.get(7)?, Hex(id), is_right))
        })?;
        if let Some((_, id, _)) = rows.iter().find(|(_, _, is_right)| !is_right) {
            return Err(Unsound::Beside(format!("job {id} is not what the journal says")));
        }
        let Some((last, ..)) = rows.last() else { break };
        after = *last;
        jobs += rows.len();
    }
    match tally.sold.len() == jobs {
        true => Ok(()),
        false => Err(Unsound::Beside("the journal has jobs that were removed".into())),
    }
}
