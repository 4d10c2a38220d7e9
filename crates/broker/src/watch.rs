//! What the nodes' answers mean for jobs: the broker's state machine towards nodes. `poller` feeds it with answers
//! that it checked and with the time; tests feed it directly. No socket and no clock in here.

use crate::Broker;
use crate::jobs::{self, JobRow};
use crate::ledger::note;
use crate::nodes::Change;
use crate::refusal::Refusal;
use crate::settle::{heard_gone, heard_status, settle_lost};
use crate::store::{Tx, params};
use onde_client::api::SettledBy;
use onde_wire::packet::{Hello, JobStatus, Op};
use onde_wire::token::{CERTIFICATE_SIZE, Incarnation, JobId, NodeId};
use std::net::Ipv4Addr;
use std::time::Instant;

/// Seconds that a customer has to redeem after a VM's end before the broker fetches the certificate itself.
const REDEEM_GRACE_S: u64 = 60;
/// Most jobs settled in one act for a lost node: the rest come a second later.
const SETTLE_MAX: u32 = 1000;
/// Most jobs asked about in one round.
pub const ASKS_MAX: u32 = 2000;

/// An answer whose tag was right.
#[derive(Clone, Copy, Debug)]
pub enum Heard {
    /// To HELLO.
    Hello(Hello),
    /// To STATUS.
    Status(JobId, JobStatus),
    /// To STATUS or STOP: no such job. The flag is that of the [`Ask`].
    Gone(JobId, bool),
    /// To STOP.
    Certificate(JobId, [u8; CERTIFICATE_SIZE]),
}

/// A job to ask its node about.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// The job.
    pub job: JobId,
    /// Its node.
    pub node: NodeId,
    /// Where that is.
    pub ipv4: Ipv4Addr,
    /// STATUS or STOP.
    pub op: Op,
    /// Whether its boot token was expired already when the node last said HELLO.
    pub expired: bool,
}

impl Broker {
    /// Takes in checked answers, all in one act.
    pub fn hear(&self, heard: &[Heard], now: Instant) -> Result<(), Refusal> {
        let changes = self.hear_hellos(heard, now);
        let about_jobs = heard.iter().any(|heard| !matches!(heard, Heard::Hello(_)));
        if changes.is_empty() && !about_jobs {
            return Ok(());
        }
        self.ledger.act(|tx| {
            for (kind, hello) in &changes {
                let text = format!("node {}, {} MiB free", hello.number, hello.mem_mib_free);
                note(tx, kind, Some(&hello.node), None, &text)?;
            }
            heard.iter().try_for_each(|heard| self.hear_job(tx, heard))
        })?;
        for heard in heard {
            if let Heard::Status(job, _) | Heard::Gone(job, _) = heard {
                self.ledger.heard(job);
            }
        }
        Ok(())
    }

    fn hear_hellos(&self, heard: &[Heard], now: Instant) -> Vec<(&'static str, Hello)> {
        let nodes_max = self.cluster.plan.nodes_max();
        let mut nodes = self.nodes();
        let change = |heard: &Heard| match heard {
            Heard::Hello(hello) => match nodes.hear(*hello, now, nodes_max) {
                Change::None => None,
                Change::Up => Some(("node_up", *hello)),
                Change::Restarted => Some(("node_restarted", *hello)),
            },
            _ => None,
        };
        heard.iter().filter_map(change).collect()
    }

    fn hear_job(&self, tx: &Tx<'_>, heard: &Heard) -> Result<(), Refusal> {
        let done = match heard {
            Heard::Hello(_) => Ok(()),
            Heard::Status(job, status) => heard_status(tx, job, status),
            Heard::Gone(job, expired) => heard_gone(tx, job, *expired),
            Heard::Certificate(job, bytes) => self.settle_certified(tx, job, bytes),
        };
        match done {
            Err(Refusal::BadCertificate(what)) => {
                tracing::error!(?heard, "a node's certificate {what}");
                Ok(())
            }
            done => done,
        }
    }

    /// Once a second: settles what lost nodes can no longer settle. Goes by the present state, not by events,
    /// so it catches up after any crash.
    pub fn tick(&self, now: Instant) -> Result<(), Refusal> {
        self.nodes().tick(now);
        self.stock.add();
        self.ledger.act(|tx| {
            for (node, incarnation) in lives_with_open_jobs(tx)? {
                if let Some(by) = self.is_lost(&node, &incarnation, now) {
                    settle_life(tx, &node, &incarnation, by)?;
                }
            }
            Ok(())
        })
    }

    fn is_lost(&self, node: &NodeId, incarnation: &Incarnation, now: Instant) -> Option<SettledBy> {
        let nodes = self.nodes();
        if nodes.get(node).is_some_and(|seen| seen.hello.incarnation != *incarnation) {
            Some(SettledBy::NodeRestarted)
        } else if nodes.is_lost(node, now) {
            Some(SettledBy::NodeSilent)
        } else {
            None
        }
    }

    /// The next jobs to ask about behind position `after`, and the position to go on from (0: all were asked).
    pub fn asks(&self, after: i64, now: Instant) -> Result<(Vec<Ask>, i64), Refusal> {
        let jobs = self.ledger.read(|tx| jobs::watched(tx, after, ASKS_MAX))?;
        let next = match jobs.last() {
            Some(last) if jobs.len() == ASKS_MAX as usize => last.seq,
            _ => 0,
        };
        Ok((jobs.iter().filter_map(|job| self.ask(job, now)).collect(), next))
    }

    /// What to ask about a job; nothing while its node does not answer or is another by now.
    fn ask(&self, job: &JobRow, now: Instant) -> Option<Ask> {
        let nodes = self.nodes();
        let seen = nodes.get(&job.node_id).filter(|seen| seen.is_alive(now))?;
        let is_same_life = seen.hello.incarnation == job.incarnation;
        let is_over =
            job.ended_at.is_some_and(|at| self.ledger.store().unix_s() >= at + REDEEM_GRACE_S);
        is_same_life.then(|| Ask {
            job: job.id,
            node: job.node_id,
            ipv4: self.cluster.plan.node(seen.hello.number).into(),
            op: if is_over || !job.is_open() { Op::Stop } else { Op::Status },
            expired: seen.hello.uptime_ms > job.expiry_ms,
        })
    }
}

fn lives_with_open_jobs(tx: &Tx<'_>) -> Result<Vec<(NodeId, Incarnation)>, Refusal> {
    let sql = "SELECT DISTINCT node_id, incarnation FROM jobs WHERE settled_at IS NULL";
    Ok(tx.rows(sql, params![], |row| Ok((row.get(0)?, row.get(1)?)))?)
}

fn settle_life(
    tx: &Tx<'_>,
    node: &NodeId,
    incarnation: &Incarnation,
    by: SettledBy,
) -> Result<(), Refusal> {
    if by == SettledBy::NodeSilent {
        note(tx, "node_silent", Some(node), None, "no answer for too long: its jobs are credited")?;
    }
    for job in jobs::open_on(tx, node, incarnation, SETTLE_MAX)? {
        settle_lost(tx, &job, by)?;
    }
    Ok(())
}
