//! Settling: what comes back to a customer when a job is over. Once for each job, whatever happens twice.
//! A certificate is the node's word, under a key that no customer has. Without one the broker goes by the last
//! STATUS it saw, in the customer's favour: what was not seen spent is given back.

use crate::Broker;
use crate::accounts::{Reason, credit};
use crate::jobs::{self, JobRow, settled_word};
use crate::ledger::{note, unix_s};
use crate::refusal::Refusal;
use onde_client::api::{Job, SettledBy};
use onde_wire::key::{Key, certificate_key};
use onde_wire::packet::JobStatus;
use onde_wire::token::{CERTIFICATE_SIZE, Certificate, JobId};
use rusqlite::{Connection, params};

/// Ends an open job with a refund; a settled one stays as it is.
/// A job given up for its node's silence stays watched: if the node comes back, the VM is stopped there.
fn settle(tx: &Connection, job: &JobRow, by: SettledBy, refund: u64) -> Result<(), Refusal> {
    if !job.is_open() {
        return Ok(());
    }
    let watched = by == SettledBy::NodeSilent;
    tx.execute(
        "UPDATE jobs SET settled_by = ?2, settled_at = ?3, refund_micro = ?4, watched = ?5 WHERE id = ?1",
        params![job.id, settled_word(by), unix_s(), refund, watched],
    )?;
    credit(tx, &job.account, refund, Reason::Refund, Some(&job.id))?;
    let text = format!("{}: {refund} of {} micro-tokens back", settled_word(by), job.paid_micro());
    note(tx, "job_settled", Some(&job.node_id), Some(&job.id), &text)?;
    Ok(())
}

/// Ends a job whose node can no longer certify anything.
pub fn settle_lost(tx: &Connection, job: &JobRow, by: SettledBy) -> Result<(), Refusal> {
    settle(tx, job, by, job.paid_micro().saturating_sub(job.spent_micro))
}

/// The node's answer to STATUS says no such job. `expired`: asked after the boot token's end, so that
/// it can never start a VM any more.
pub fn heard_gone(tx: &Connection, id: &JobId, expired: bool) -> Result<(), Refusal> {
    let job = jobs::find(tx, id)?;
    if job.booted {
        settle_lost(tx, &job, SettledBy::NodeRestarted)?;
    } else if expired {
        settle(tx, &job, SettledBy::Unused, job.paid_micro())?;
    } else {
        return Ok(());
    }
    unwatch(tx, id)
}

/// The node's answer to STATUS. What it charged never goes down, whatever order answers come in.
pub fn heard_status(tx: &Connection, id: &JobId, status: &JobStatus) -> Result<(), Refusal> {
    use onde_wire::machine::Stage::{Ended, Purged, Stopped};
    let ended_at = matches!(status.stage, Ended | Stopped | Purged).then(unix_s);
    let spent = i64::try_from(status.spent_micro).unwrap_or(i64::MAX);
    tx.prepare_cached(
        "UPDATE jobs SET booted = 1, spent_micro = max(spent_micro, ?2), ended_at = coalesce(ended_at, ?3) \
         WHERE id = ?1 AND settled_at IS NULL",
    )?
    .execute(params![id, spent, ended_at])?;
    Ok(())
}

fn unwatch(tx: &Connection, id: &JobId) -> Result<(), Refusal> {
    tx.execute("UPDATE jobs SET watched = 0 WHERE id = ?1 AND settled_at IS NOT NULL", [id])?;
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
        tx: &Connection,
        id: &JobId,
        bytes: &[u8; CERTIFICATE_SIZE],
    ) -> Result<(), Refusal> {
        let job = jobs::find(tx, id)?;
        let key = Key::new(&certificate_key(&self.node_key(&job.node_id)));
        let certificate =
            Certificate::verify(bytes, &key).ok_or(Refusal::BadCertificate("is not the node's"))?;
        let refund = refund(&job, &certificate)?;
        settle(tx, &job, SettledBy::Certificate, refund)?;
        tx.execute(
            "UPDATE jobs SET booted = 1, spent_micro = ?2 WHERE id = ?1",
            params![id, certificate.spent_micro],
        )?;
        unwatch(tx, id)
    }

    /// Gives a boot token back that was never shown. Its node has to confirm that, once the token is expired;
    /// the broker asks by itself, so this tells how it stands.
    pub fn cancel(&self, account: &str, id: &JobId) -> Result<Job, Refusal> {
        let job = self.ledger.act(|tx| jobs::find_own(tx, account, id))?;
        match (job.is_open(), job.booted) {
            (false, _) => Ok(job.show(&self.cluster.plan)),
            (true, true) => Err(Refusal::JobBooted),
            (true, false) => Err(Refusal::TokenLive),
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
    if !adds_up || certificate.last_index > job.sold {
        return Err(Refusal::BadCertificate("does not add up"));
    }
    Ok(certificate.unused_micro + (job.paid_micro() - taken))
}
