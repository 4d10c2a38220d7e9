//! Jobs as the store keeps them, and as customers read them. A job goes from open to settled, once:
//!
//! ```text
//!   sale --> open --------------------------------------> settled
//!              |  certificate redeemed                       ^
//!              |  boot token expired unshown                 |
//!              |  node restarted, or silent for a minute ----+
//! ```

use crate::Broker;
use crate::refusal::Refusal;
use crate::store::{Row, StoreError, Tx, params};
use onde_client::api::{Hex, Job, JobList, SettledBy};
use onde_wire::chain::Value;
use onde_wire::plan::Plan;
use onde_wire::token::{Incarnation, JobId, NodeId};

/// A job's row. Its columns say more about it than this names: see the schema.
#[derive(Clone, Debug)]
pub struct JobRow {
    /// Position among all jobs.
    pub seq: i64,
    /// The job.
    pub id: JobId,
    /// Whose it is.
    pub account: String,
    /// Number of its node.
    pub node: u32,
    /// Id of its node.
    pub node_id: NodeId,
    /// Incarnation of its node that the boot token is for.
    pub incarnation: Incarnation,
    /// Its guest address' index in the plan.
    pub guest: u32,
    /// Memory, MiB.
    pub mem_mib: u32,
    /// Memory that its VM takes from its node, MiB: about, but for a clone.
    pub reserved_mib: u32,
    /// vCPUs.
    pub vcpus: u16,
    /// Disk, MiB.
    pub disk_mib: u32,
    /// Micro-tokens a payment token.
    pub value_micro: u64,
    /// Payment tokens in the boot token.
    pub first_count: u32,
    /// Payment tokens sold in all.
    pub sold: u32,
    /// s_0 of its chain if a broker of version 1 sold it: secret.
    pub seed: Value,
    /// Index of the token before the first of its present chain.
    pub chain_from: u32,
    /// What is left of its chain: as secret.
    pub chain: Option<Vec<u8>>,
    /// Uptime of the node up to which the boot token can be shown.
    pub expiry_ms: u64,
    /// Whether its VM was ever seen.
    pub booted: bool,
    /// Most micro-tokens that the node ever said it charged.
    pub spent_micro: u64,
    /// When it was opened.
    pub opened_at: u64,
    /// When its VM was first seen at its end.
    pub ended_at: Option<u64>,
    /// How it was settled.
    pub settled_by: Option<String>,
    /// When it was settled.
    pub settled_at: Option<u64>,
    /// What was given back.
    pub refund_micro: u64,
    /// Whether it sells no more for now.
    pub frozen: Frozen,
}

/// Whether a job sells tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frozen {
    /// It does.
    No,
    /// It was open in a backup that was restored: never again.
    Restored,
    /// Its node was shown tokens of some job that this ledger did not sell.
    Ahead,
    /// The operator took that back; its node has not said since that all is right.
    Thawing,
}

fn frozen(number: u32) -> Result<Frozen, StoreError> {
    match number {
        0 => Ok(Frozen::No),
        1 => Ok(Frozen::Restored),
        2 => Ok(Frozen::Ahead),
        3 => Ok(Frozen::Thawing),
        _ => Err(StoreError::Shape("a job frozen in another way")),
    }
}

/// The columns that [`read`] wants, in its order.
const COLUMNS: &str = "seq, id, account, node, node_id, incarnation, guest, mem_mib, vcpus, disk_mib, \
    value_micro, first_count, sold, seed, expiry_ms, booted, spent_micro, opened_at, ended_at, \
    settled_by, settled_at, refund_micro, frozen, chain, chain_from, \
    reserved_mib";

fn read(row: &Row) -> Result<JobRow, StoreError> {
    Ok(JobRow {
        seq: row.get(0)?,
        id: row.get(1)?,
        account: row.get(2)?,
        node: row.get(3)?,
        node_id: row.get(4)?,
        incarnation: row.get(5)?,
        guest: row.get(6)?,
        mem_mib: row.get(7)?,
        vcpus: row.get(8)?,
        disk_mib: row.get(9)?,
        value_micro: row.get(10)?,
        first_count: row.get(11)?,
        sold: row.get(12)?,
        seed: row.get(13)?,
        expiry_ms: row.get(14)?,
        booted: row.get(15)?,
        spent_micro: row.get(16)?,
        opened_at: row.get(17)?,
        ended_at: row.get(18)?,
        settled_by: row.get(19)?,
        settled_at: row.get(20)?,
        refund_micro: row.get(21)?,
        frozen: frozen(row.get(22)?)?,
        chain: row.get(23)?,
        chain_from: row.get(24)?,
        reserved_mib: row.get(25)?,
    })
}

/// The word for it in the store.
pub fn settled_word(by: SettledBy) -> &'static str {
    match by {
        SettledBy::Certificate => "certificate",
        SettledBy::Unused => "unused",
        SettledBy::NodeRestarted => "node_restarted",
        SettledBy::NodeSilent => "node_silent",
    }
}

fn settled_by(word: &str) -> Option<SettledBy> {
    use SettledBy::*;
    [Certificate, Unused, NodeRestarted, NodeSilent]
        .into_iter()
        .find(|by| settled_word(*by) == word)
}

impl JobRow {
    /// Micro-tokens that the customer paid for it.
    pub fn paid_micro(&self) -> u64 {
        u64::from(self.sold) * self.value_micro
    }

    /// Whether it is still open.
    pub fn is_open(&self) -> bool {
        self.settled_at.is_none()
    }

    /// As its customer reads it.
    pub fn show(&self, plan: &Plan) -> Job {
        Job {
            id: Hex(self.id),
            seq: self.seq,
            node: self.node,
            node_id: Hex(self.node_id),
            incarnation: Hex(self.incarnation),
            node_ipv4: plan.node(self.node).into(),
            guest_ipv4: plan.guest(self.guest).into(),
            mem_mib: self.mem_mib,
            vcpus: self.vcpus,
            disk_mib: self.disk_mib,
            value_micro: self.value_micro,
            first_count: self.first_count,
            sold: self.sold,
            booted: self.booted,
            spent_micro: self.spent_micro,
            opened_at: self.opened_at,
            settled_by: self.settled_by.as_deref().and_then(settled_by),
            settled_at: self.settled_at,
            refund_micro: self.refund_micro,
        }
    }

    /// Writes a new job down and gives it its position.
    pub fn insert(&mut self, tx: &Tx<'_>) -> Result<(), Refusal> {
        let sql = "INSERT INTO jobs (id, account, node, node_id, incarnation, guest, mem_mib, vcpus, disk_mib, \
             value_micro, first_count, sold, seed, expiry_ms, opened_at, chain, chain_from, reserved_mib) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18) RETURNING seq";
        let seq = tx.value(
            sql,
            params![
                self.id,
                self.account,
                self.node,
                self.node_id,
                self.incarnation,
                self.guest,
                self.mem_mib,
                self.vcpus,
                self.disk_mib,
                self.value_micro,
                self.first_count,
                self.sold,
                self.seed,
                self.expiry_ms,
                self.opened_at,
                self.chain,
                self.chain_from,
                self.reserved_mib,
            ],
        )?;
        self.seq = seq;
        Ok(())
    }
}

/// The job with this id.
pub fn find(tx: &Tx<'_>, id: &JobId) -> Result<JobRow, Refusal> {
    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1");
    tx.row(&sql, params![id], read)?.ok_or(Refusal::NotFound("job"))
}

/// The job with this id, if it is this account's.
pub fn find_own(tx: &Tx<'_>, account: &str, id: &JobId) -> Result<JobRow, Refusal> {
    let job = find(tx, id)?;
    if job.account == account { Ok(job) } else { Err(Refusal::NotFound("job")) }
}

/// Open jobs of one life of a node, at most `limit`.
pub fn open_on(
    tx: &Tx<'_>,
    node: &NodeId,
    incarnation: &Incarnation,
    limit: u32,
) -> Result<Vec<JobRow>, Refusal> {
    let sql = format!(
        "SELECT {COLUMNS} FROM jobs WHERE settled_at IS NULL AND node_id = ?1 AND incarnation = ?2 LIMIT ?3"
    );
    Ok(tx.rows(&sql, params![node, incarnation, limit], read)?)
}

/// Jobs to ask nodes about, from position `after` on, at most `limit`.
pub fn watched(tx: &Tx<'_>, after: i64, limit: u32) -> Result<Vec<JobRow>, Refusal> {
    let sql =
        format!("SELECT {COLUMNS} FROM jobs WHERE watched = 1 AND seq > ?1 ORDER BY seq LIMIT ?2");
    Ok(tx.rows(&sql, params![after, limit], read)?)
}

impl Broker {
    /// One job of an account.
    pub fn job(&self, account: &str, id: &JobId) -> Result<Job, Refusal> {
        self.ledger.read(|tx| Ok(find_own(tx, account, id)?.show(&self.cluster.plan)))
    }

    /// A page of an account's jobs before `before`, newest first; `open`: only those not settled.
    pub fn jobs(
        &self,
        account: &str,
        open: bool,
        before: i64,
        limit: u32,
    ) -> Result<JobList, Refusal> {
        let sql = format!(
            "SELECT {COLUMNS} FROM jobs WHERE account = ?1 AND seq < ?2 \
             AND (settled_at IS NULL OR ?3 = 0) ORDER BY seq DESC LIMIT ?4"
        );
        self.ledger.read(|tx| {
            let rows = tx.rows(&sql, params![account, before, open, limit], read)?;
            let jobs: Vec<_> = rows.iter().map(|job| job.show(&self.cluster.plan)).collect();
            let next = jobs.last().filter(|_| jobs.len() == limit as usize).map(|job| job.seq);
            Ok(JobList { jobs, next })
        })
    }
}
