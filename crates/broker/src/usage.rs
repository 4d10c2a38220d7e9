//! What a job used and what that cost: the prices it was sold at, what its node said of its meters each time it was asked,
//! and the signed receipt once it is settled. Money is moved elsewhere; nothing here decides about any.

use crate::Broker;
use crate::jobs;
use crate::refusal::Refusal;
use crate::store::{Row, StoreError, Tx, params};
use ed25519_dalek::{Signer, SigningKey};
use onde_client::api::{Hex, Prices, Receipt, Sample, SignedReceipt, Usage};
use onde_client::receipt::RECEIPT_VERSION;
use onde_wire::packet::JobStatus;
use onde_wire::token::JobId;

/// How long all samples are kept: a day of a thousand jobs is some 8 GB.
const FINE_AGE_MAX_S: u64 = 24 * 3600;
/// How long one sample a minute is kept.
const COARSE_AGE_MAX_S: u64 = 90 * 24 * 3600;
/// Seconds of each minute whose samples stay: nodes are asked every second.
const KEPT_OF_MINUTE_S: u64 = 2;

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

/// Forgets samples that are too old to be asked for second by second, or at all.
pub fn prune(tx: &Tx<'_>) -> Result<(), StoreError> {
    let before = |age_s| tx.unix_s().saturating_sub(age_s);
    tx.execute(
        "DELETE FROM samples WHERE at < ?1 AND (at < ?2 OR at % 60 >= ?3)",
        params![before(FINE_AGE_MAX_S), before(COARSE_AGE_MAX_S), KEPT_OF_MINUTE_S],
    )?;
    Ok(())
}

const COLUMNS: &str =
    "at, age_ms, spent_micro, last_index, cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms";

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
            let sql = format!(
                "SELECT {COLUMNS} FROM samples WHERE job = ?1 ORDER BY age_ms DESC LIMIT 1"
            );
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
                last: tx.row(&sql, params![id], read)?,
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
