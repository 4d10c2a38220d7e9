//! Settling: what comes back to a customer when a job is over. Once for each job, whatever happens twice.
//! A certificate is the node's word, under a key that no customer has. Without one the broker goes by the last
//! STATUS it saw, in the customer's favour: what was not seen spent is given back.

use crate::Broker;
use crate::jobs::{self, Frozen, JobRow, settled_word};
use crate::journal::{self, Act, Book, Reason, settle_key, signed};
use crate::ledger::note;
use crate::refusal::Refusal;
use crate::sale::skip_guests;
use crate::store::{Store, StoreError, Tx, params};
use crate::usage::{End, note_end, note_sample};
use onde_client::api::{Job, SettledBy};
use onde_wire::key::{Key, certificate_key};
use onde_wire::packet::JobStatus;
use onde_wire::token::{CERTIFICATE_SIZE, Certificate, JobId};
use std::time::Instant;

/// Ends an open job with a refund; a settled one stays as it is.
/// A job given up for its node's silence stays watched: if the node comes back, the VM is stopped there.
fn settle(tx: &Tx<'_>, job: &JobRow, by: SettledBy, refund: u64, end: End) -> Result<(), Refusal> {
    if !job.is_open() {
        return Ok(());
    }
    if by != SettledBy::Unused {
        note_end(tx, &job.id, end)?;
    }
    let watched = by == SettledBy::NodeSilent;
    tx.execute(
        "UPDATE jobs SET settled_by = ?2, settled_at = ?3, refund_micro = ?4, watched = ?5, chain = NULL WHERE id = ?1",
        params![job.id, settled_word(by), tx.unix_s(), refund, watched],
    )?;
    let (paid, back) = (signed(job.paid_micro()), signed(refund));
    let lines = [
        (Book::Job(&job.id), -paid),
        (Book::Customer(&job.account), back),
        (Book::Income, paid - back),
    ];
    let (reason, key, at) = (Reason::Refund, settle_key(&job.id), tx.unix_s());
    journal::post(tx, &Act { reason, key, job: Some(&job.id), tokens: None, at, lines: &lines })?;
    let text = format!("{}: {refund} of {} micro-tokens back", settled_word(by), job.paid_micro());
    note(tx, "job_settled", Some(&job.node_id), Some(&job.id), &text)?;
    Ok(())
}

/// Ends a job whose node can no longer certify anything.
pub fn settle_lost(tx: &Tx<'_>, job: &JobRow, by: SettledBy) -> Result<(), Refusal> {
    let spent_micro = job.spent_micro.min(job.paid_micro());
    let end = End { spent_micro, last_index: None };
    settle(tx, job, by, job.paid_micro() - spent_micro, end)
}

/// The node's answer to STATUS says no such job. `expired`: asked after the boot token's end, so that
/// it can never start a VM any more.
pub fn heard_gone(tx: &Tx<'_>, id: &JobId, expired: bool) -> Result<(), Refusal> {
    let job = jobs::find(tx, id)?;
    if job.booted {
        settle_lost(tx, &job, SettledBy::NodeRestarted)?;
    } else if expired {
        let end = End { spent_micro: 0, last_index: None };
        settle(tx, &job, SettledBy::Unused, job.paid_micro(), end)?;
    } else {
        return Ok(());
    }
    unwatch(tx, id)
}

/// A node says that it was paid tokens that this ledger never sold: the ledger is an old copy, put in place of a newer one,
/// or the node lies. Either way its own jobs sell no more, whose chains' next tokens may be out; those of other nodes go on,
/// for their nodes' word counts there. A job that was thawed is free when its node's word fits the ledger.
fn freeze_if_old(tx: &Tx<'_>, job: &JobRow, status: &JobStatus) -> Result<(), Refusal> {
    let is_ahead = status.last_index > job.sold;
    match job.frozen {
        Frozen::Thawing if !is_ahead => {
            tx.execute("UPDATE jobs SET frozen = 0 WHERE id = ?1", params![job.id])?;
            return Ok(());
        }
        Frozen::No | Frozen::Thawing if is_ahead => {}
        _ => return Ok(()),
    }
    let frozen = tx.execute(
        "UPDATE jobs SET frozen = 2 WHERE settled_at IS NULL AND node_id = ?1 AND frozen IN (0, 3)",
        params![job.node_id],
    )?;
    // What an old ledger does not know of may have addresses, too.
    skip_guests(tx)?;
    let (node, last, sold) = (job.node, status.last_index, job.sold);
    let text = format!(
        "node {node} was shown token {last} of a job that sold {sold}: the ledger is old, or the node lies; its \
         {frozen} open jobs sell no more until `broker thaw --node {node}`"
    );
    tracing::error!("{text}");
    Ok(note(tx, "ledger_is_old", Some(&job.node_id), Some(&job.id), &text)?)
}

/// Takes back that jobs are frozen by their node's word: the operator knows that it lied, or which ledger is right. Each
/// sells again once its node has said what fits the ledger; if it says the same as before, they freeze again. Jobs that a
/// restored backup froze stay so. How many there are.
pub fn thaw(store: &Store, node: u32) -> Result<u64, StoreError> {
    store.write(|tx| {
        let sql =
            "UPDATE jobs SET frozen = 3 WHERE settled_at IS NULL AND frozen = 2 AND node = ?1";
        let thawing = tx.execute(sql, params![node])?;
        note(tx, "thawed", None, None, &format!("{thawing} open jobs of node {node}"))?;
        Ok(thawing)
    })
}

/// How many open jobs are frozen, for whatever reason.
pub fn frozen(tx: &Tx<'_>) -> Result<i64, StoreError> {
    tx.value("SELECT count(*) FROM jobs WHERE settled_at IS NULL AND frozen <> 0", &[])
}

/// The node's answer to STATUS. What it charged never goes down, whatever order answers come in; a settled job's end stays
/// the last that is known of it.
pub fn heard_status(tx: &Tx<'_>, id: &JobId, status: &JobStatus) -> Result<(), Refusal> {
    use onde_wire::machine::Stage::{Ended, Purged, Stopped};
    let ended_at = matches!(status.stage, Ended | Stopped | Purged).then(|| tx.unix_s());
    let job = jobs::find(tx, id)?;
    if !job.is_open() {
        return Ok(());
    }
    freeze_if_old(tx, &job, status)?;
    note_sample(tx, id, status)?;
    let spent = i64::try_from(status.spent_micro).unwrap_or(i64::MAX);
    tx.execute(
        "UPDATE jobs SET booted = 1, ended_at = coalesce(ended_at, ?3), \
         spent_micro = CASE WHEN spent_micro < ?2 THEN ?2 ELSE spent_micro END \
         WHERE id = ?1 AND settled_at IS NULL",
        params![id, spent, ended_at],
    )?;
    Ok(())
}

fn unwatch(tx: &Tx<'_>, id: &JobId) -> Result<(), Refusal> {
    tx.execute(
        "UPDATE jobs SET watched = 0 WHERE id = ?1 AND settled_at IS NOT NULL",
        params![id],
    )?;
    Ok(())
}

impl Broker {
    /// Redeems a certificate for the job's owner. Again: the same outcome, and no money.
    pub fn redeem(
        &self,
        account: &str,
        id: &JobId,
        bytes: &[u8; CERTIFICATE_SIZE],
    ) -> Result<Job, Refusal> {
        self.ledger.act(|tx| {
            jobs::find_own(tx, account, id)?;
            self.settle_certified(tx, id, bytes)?;
            Ok(jobs::find(tx, id)?.show(&self.cluster.plan))
        })
    }

    /// Settles a job by its certificate, whoever brought it.
    pub fn settle_certified(
        &self,
        tx: &Tx<'_>,
        id: &JobId,
        bytes: &[u8; CERTIFICATE_SIZE],
    ) -> Result<(), Refusal> {
        let job = jobs::find(tx, id)?;
        let key = Key::new(&certificate_key(&self.node_key(&job.node_id)));
        let certificate =
            Certificate::verify(bytes, &key).ok_or(Refusal::BadCertificate("is not the node's"))?;
        let refund = refund(&job, &certificate)?;
        let (spent_micro, last_index) = (certificate.spent_micro, Some(certificate.last_index));
        settle(tx, &job, SettledBy::Certificate, refund, End { spent_micro, last_index })?;
        tx.execute(
            "UPDATE jobs SET booted = 1, spent_micro = ?2 WHERE id = ?1",
            params![id, certificate.spent_micro],
        )?;
        unwatch(tx, id)
    }

    /// Gives a boot token back that was never shown. Its node has to confirm that, once the token is expired;
    /// the broker asks by itself, so this tells how it stands.
    pub fn cancel(&self, account: &str, id: &JobId, now: Instant) -> Result<Job, Refusal> {
        let job = self.ledger.read(|tx| jobs::find_own(tx, account, id))?;
        match (job.is_open(), job.booted) {
            (false, _) => Ok(job.show(&self.cluster.plan)),
            (true, true) => Err(Refusal::JobBooted),
            (true, false) => {
                let uptime_ms =
                    self.nodes().get(&job.node_id).map_or(0, |seen| seen.uptime_ms(now));
                Err(Refusal::TokenLive(job.expiry_ms.saturating_sub(uptime_ms).div_ceil(1000)))
            }
        }
    }
}

/// What a certificate gives back: what the node took in and did not use, and what was bought and never shown.
fn refund(job: &JobRow, certificate: &Certificate) -> Result<u64, Refusal> {
    let is_this_job = certificate.job == job.id
        && certificate.node == job.node_id
        && certificate.incarnation == job.incarnation;
    if !is_this_job {
        return Err(Refusal::BadCertificate("is another job's"));
    }
    let taken = u64::from(certificate.last_index) * job.value_micro;
    let adds_up = certificate.spent_micro.checked_add(certificate.unused_micro) == Some(taken);
    // An old ledger knows less than its node, and has taken less.
    if !adds_up || (certificate.last_index > job.sold && job.frozen == Frozen::No) {
        return Err(Refusal::BadCertificate("does not add up"));
    }
    Ok(job.paid_micro().saturating_sub(certificate.spent_micro))
}
