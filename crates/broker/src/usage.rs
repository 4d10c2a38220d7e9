//! What a job used and what that cost: the prices it was sold at, what its node said of its meters each time it was asked,
//! and the signed receipt once it is settled. Money is moved elsewhere; nothing here decides about any.

use crate::Broker;
use crate::jobs;
use crate::ledger::{mark, set_mark};
use crate::refusal::Refusal;
use crate::store::{Row, StoreError, Tx, params};
use ed25519_dalek::{Signer, SigningKey};
use onde_client::api::{Hex, Prices, Receipt, Sample, SignedReceipt, Usage};
use onde_client::receipt::RECEIPT_VERSION;
use onde_wire::packet::JobStatus;
use onde_wire::token::JobId;

/// How long all samples are kept: a day of a thousand jobs is some 8 GB. A job's first and last stay as long as the job.
const FINE_AGE_MAX_S: u64 = 24 * 3600;
/// How long those of one moment a minute are kept.
const COARSE_AGE_MAX_S: u64 = 90 * 24 * 3600;
/// Seconds of each minute whose samples stay: nodes are asked every second.
const KEPT_OF_MINUTE_S: u64 = 2;

/// Seconds of samples that are looked at in one act: those that stay take time, too.
const STRETCH_S: u64 = 3600;

/// Writes down what the node charges, for good.
pub fn note_prices(
    tx: &Tx<'_>,
    job: &JobId,
    prices: &onde_wire::packet::Prices,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO job_prices (job, vcpu_s, gib_s, gib_sent, disk_gib_s) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![job, prices.vcpu_s, prices.gib_s, prices.gib_sent, prices.disk_gib_s],
    )?;
    Ok(())
}

/// Writes down what the node said, unless it said the same before.
pub fn note_sample(tx: &Tx<'_>, job: &JobId, status: &JobStatus) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO samples (job, age_ms, at, spent_micro, last_index, cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT DO NOTHING",
        params![
            job,
            status.age_ms,
            tx.unix_s(),
            status.spent_micro,
            status.last_index,
            status.cpu_us,
            status.mem_mib_ms,
            status.sent_bytes,
            status.disk_mib_ms
        ],
    )?;
    Ok(())
}

/// Writes down what a job cost in the end, where its last sample says something else: what it used between its node's last
/// word and its end. How that splits into meters nobody told, so they stay as they were heard.
pub fn note_end(tx: &Tx<'_>, job: &JobId, end: End) -> Result<(), StoreError> {
    let last = last(tx, job)?;
    let index = end.last_index.or(last.map(|last| last.last_index)).unwrap_or_default();
    if last.is_some_and(|last| (last.spent_micro, last.last_index) == (end.spent_micro, index)) {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO samples (job, age_ms, at, spent_micro, last_index, cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        params![
            job,
            last.map_or(0, |last| last.age_ms + 1),
            tx.unix_s(),
            end.spent_micro,
            index,
            last.map_or(0, |last| last.cpu_us),
            last.map_or(0, |last| last.mem_mib_ms),
            last.map_or(0, |last| last.sent_bytes),
            last.map_or(0, |last| last.disk_mib_ms)
        ],
    )?;
    Ok(())
}

/// How a job ended.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// Micro-tokens that it cost.
    pub spent_micro: u64,
    /// Tokens that its node took, where that told.
    pub last_index: Option<u32>,
}

/// Forgets samples that are too old to be asked for second by second, or at all: `limit` of either kind at most. Whether
/// there may be more.
pub fn prune(tx: &Tx<'_>, limit: u32) -> Result<bool, StoreError> {
    let fine = thin(tx, "samples/fine", FINE_AGE_MAX_S, KEPT_OF_MINUTE_S, limit)?;
    let coarse = thin(tx, "samples/coarse", COARSE_AGE_MAX_S, 0, limit)?;
    Ok(fine || coarse)
}

/// Forgets samples older than `age_s`, but for the first `kept_s` seconds of each minute and each job's first and last.
/// The mark says how far it came, so that what stays is not looked at each time. Whether there may be more.
fn thin(tx: &Tx<'_>, name: &str, age_s: u64, kept_s: u64, limit: u32) -> Result<bool, StoreError> {
    let to = tx.unix_s().saturating_sub(age_s);
    // A clock that jumped back takes the mark along: what is heard by it comes behind.
    let from = mark(tx, name)?.unwrap_or_default().min(to);
    let oldest = "SELECT min(at) FROM samples WHERE at >= ?1 AND at < ?2";
    let first: Option<u64> = tx.value(oldest, params![from, to])?;
    let end = first.map_or(to, |first| to.min(first + STRETCH_S));
    let sql = "DELETE FROM samples WHERE (job, age_ms) IN ( \
           SELECT job, age_ms FROM samples old WHERE at >= ?1 AND at < ?2 AND at % 60 >= ?3 \
           AND age_ms > (SELECT min(age_ms) FROM samples WHERE job = old.job) \
           AND age_ms < (SELECT max(age_ms) FROM samples WHERE job = old.job) \
           ORDER BY at LIMIT ?4) RETURNING at";
    let gone: Vec<u64> = tx.rows(sql, params![from, end, kept_s, limit], |row| row.get(0))?;
    let is_whole = gone.len() < limit as usize;
    let done = if is_whole { Some(end) } else { gone.into_iter().max() };
    set_mark(tx, name, done)?;
    Ok(!is_whole || end < to)
}

const COLUMNS: &str =
    "at, age_ms, spent_micro, last_index, cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms";

/// The last of a job's samples.
fn last(tx: &Tx<'_>, job: &JobId) -> Result<Option<Sample>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM samples WHERE job = ?1 ORDER BY age_ms DESC LIMIT 1");
    tx.row(&sql, params![job], read)
}

fn read(row: &Row) -> Result<Sample, StoreError> {
    Ok(Sample {
        at: row.get(0)?,
        age_ms: row.get(1)?,
        spent_micro: row.get(2)?,
        last_index: row.get(3)?,
        cpu_us: row.get(4)?,
        mem_mib_ms: row.get(5)?,
        sent_bytes: row.get(6)?,
        disk_mib_ms: row.get(7)?,
    })
}

fn prices(tx: &Tx<'_>, job: &JobId) -> Result<Option<Prices>, StoreError> {
    let sql = "SELECT vcpu_s, gib_s, gib_sent, disk_gib_s FROM job_prices WHERE job = ?1";
    tx.row(sql, params![job], |row| {
        Ok(Prices {
            vcpu_s: row.get(0)?,
            gib_s: row.get(1)?,
            gib_sent: row.get(2)?,
            disk_gib_s: row.get(3)?,
        })
    })
}

impl Broker {
    /// A page of what a job's node said of its meters after `after_ms` of the VM's life, oldest first.
    pub fn usage(
        &self,
        account: &str,
        id: &JobId,
        after_ms: Option<u64>,
        limit: u32,
    ) -> Result<Usage, Refusal> {
        let after = after_ms.map_or(-1, |after| i64::try_from(after).unwrap_or(i64::MAX));
        self.ledger.read(|tx| {
            let job = jobs::find_own(tx, account, id)?;
            let sql = format!(
                "SELECT {COLUMNS} FROM samples WHERE job = ?1 AND age_ms > ?2 ORDER BY age_ms LIMIT ?3"
            );
            let samples = tx.rows(&sql, params![id, after, limit], read)?;
            let next =
                samples.last().filter(|_| samples.len() == limit as usize).map(|last| last.age_ms);
            let (prices, value_micro) = (prices(tx, id)?, job.value_micro);
            Ok(Usage { job: Hex(*id), node: job.node, value_micro, prices, samples, next })
        })
    }

    /// The receipt of a settled job.
    pub fn receipt(&self, account: &str, id: &JobId) -> Result<SignedReceipt, Refusal> {
        let receipt = self.ledger.read(|tx| {
            let job = jobs::find_own(tx, account, id)?;
            let shown = job.show(&self.cluster.plan);
            let (Some(settled_by), Some(settled_at)) = (shown.settled_by, shown.settled_at) else {
                return Err(Refusal::JobOpen);
            };
            Ok(Receipt {
                version: RECEIPT_VERSION,
                job: shown.id,
                account: job.account.clone(),
                node: shown.node,
                node_id: shown.node_id,
                incarnation: shown.incarnation,
                mem_mib: shown.mem_mib,
                vcpus: shown.vcpus,
                disk_mib: shown.disk_mib,
                prices: prices(tx, id)?,
                opened_at: shown.opened_at,
                settled_at,
                settled_by,
                value_micro: shown.value_micro,
                sold: shown.sold,
                paid_micro: job.paid_micro(),
                refund_micro: shown.refund_micro,
                last: last(tx, id)?,
            })
        })?;
        let signature = Hex(self.signer.sign(&receipt.signed_text()).to_bytes());
        Ok(SignedReceipt { receipt, key: Hex(self.receipt_key()), signature })
    }

    /// What receipts are verified with.
    pub fn receipt_key(&self) -> [u8; 32] {
        self.signer.verifying_key().to_bytes()
    }

    /// Signs receipts with this key from now on, and not with one that ends with this process.
    pub fn signing_with(mut self, key: &[u8; 32]) -> Self {
        self.signer = SigningKey::from_bytes(key);
        self
    }
}
