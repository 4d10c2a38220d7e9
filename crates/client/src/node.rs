//! What a customer asks a node: hello, boot, pay, status, console, stop. One function each, on top of
//! [`crate::echo`]. All are idempotent at the node, so each is sent until it is answered.

use crate::echo::{EchoError, Exchange, Policy};
use onde_wire::key::{Key, Tag};
use onde_wire::packet::{Booted, ConsoleSlice, Hello, JobStatus, Op, Paid, Reply, Request, Status};
use onde_wire::token::{BootToken, CERTIFICATE_SIZE, JobId, PaymentToken, Renewal};
use std::net::Ipv4Addr;

/// All that is needed to speak of a job to its node.
#[derive(Clone, Debug)]
pub struct Handle {
    /// The job.
    pub job: JobId,
    /// Its key.
    pub key: Key,
    /// Where its node answers.
    pub node: Ipv4Addr,
}

/// Why a node did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// No answer.
    #[error(transparent)]
    Echo(#[from] EchoError),
    /// The node answered that it does not.
    #[error("node {node} refused: {}", words(*.status))]
    Refused {
        /// Who was asked.
        node: Ipv4Addr,
        /// Why it refused.
        status: Status,
    },
    /// No randomness for a nonce.
    #[error("no randomness: {0}")]
    Randomness(#[from] getrandom::Error),
}

impl NodeError {
    /// What to do about it, one line.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            NodeError::Echo(error) => error.hint(),
            NodeError::Randomness(_) => None,
            NodeError::Refused { status, .. } => match status {
                Status::NoMemory | Status::NoRoom => {
                    Some("try again, or another node: onde node ls")
                }
                Status::OtherIncarnation => {
                    Some("the node was restarted since the sale; buy again")
                }
                Status::Expired => {
                    Some("boot tokens are shown within minutes of the sale; buy again")
                }
                Status::NodeFault => Some("nothing was charged; try another node"),
                Status::Unpaid => Some("pay first: onde pay JOB N"),
                Status::NoTemplate => Some("a clone needs a template that lives on the same node"),
                _ => None,
            },
        }
    }

    /// The node's refusal, where it is one.
    pub fn refusal(&self) -> Option<Status> {
        match self {
            NodeError::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether the node gave no sign of life.
    pub fn is_silence(&self) -> bool {
        matches!(self, NodeError::Echo(EchoError::Silent { .. }))
    }
}

fn words(status: Status) -> &'static str {
    match status {
        Status::Ok => "nothing",
        Status::NoJob => "it knows no such job",
        Status::Expired => "the boot token was shown too late",
        Status::OtherIncarnation => "the boot token is for another life of this node",
        Status::NoMemory => "not enough free memory",
        Status::NoRoom => "no free slot, or not that many vCPUs",
        Status::BadLimits => "the token's limits make no sense to it",
        Status::Ended => "the job has ended",
        Status::BadPayment => "the payment token does not belong to the job",
        Status::TooManySteps => "the payment token skips too many others",
        Status::NodeFault => "it failed at its own work",
        Status::Resumed => "the VM runs",
        Status::NoDisk => "it has no disk to keep this VM on",
        Status::Unpaid => "the job's balance does not cover that",
        Status::NotYet => "the VM is still being booted",
        Status::NoTemplate => "the template is not there",
    }
}

/// Asks `node` who it is and what it has. Its answer is not authenticated: only the broker has node keys.
pub fn hello(echo: &mut impl Exchange, node: Ipv4Addr, policy: Policy) -> Result<Hello, NodeError> {
    let nonce = getrandom::u64()?;
    // HELLO has no tag, so this key is never used.
    let packet = Request::Hello.emit(nonce, &[0; 16], &Key::new(&[0; 32]));
    match echo.exchange(node, &packet, Op::Hello, nonce, None, policy)? {
        Reply::Hello(hello) => Ok(hello),
        other => Err(refused(node, &other)),
    }
}

impl Handle {
    /// Shows the boot token: the node makes the VM and tells where mstrap listens.
    pub fn boot(
        &self,
        echo: &mut impl Exchange,
        token: BootToken,
        tag: Tag,
    ) -> Result<Booted, NodeError> {
        match self.ask(echo, &Request::Boot(token, tag), Policy::default())? {
            Reply::Boot(booted) => Ok(booted),
            other => Err(refused(self.node, &other)),
        }
    }

    /// Pays.
    pub fn pay(&self, echo: &mut impl Exchange, token: PaymentToken) -> Result<Paid, NodeError> {
        match self.ask(echo, &Request::Pay(token), Policy::default())? {
            Reply::Pay(paid) => Ok(paid),
            other => Err(refused(self.node, &other)),
        }
    }

    /// Shows the job's next chain, once the one before is used up. Again: no harm.
    pub fn renew(
        &self,
        echo: &mut impl Exchange,
        renewal: Renewal,
        tag: Tag,
    ) -> Result<Paid, NodeError> {
        match self.ask(echo, &Request::Renew(renewal, tag), Policy::default())? {
            Reply::Renew(paid) => Ok(paid),
            other => Err(refused(self.node, &other)),
        }
    }

    /// Asks how the job stands.
    pub fn status(&self, echo: &mut impl Exchange, policy: Policy) -> Result<JobStatus, NodeError> {
        match self.ask(echo, &Request::Status, policy)? {
            Reply::Status(status) => Ok(status),
            other => Err(refused(self.node, &other)),
        }
    }

    /// Reads the console from byte `offset` of all that the guest ever wrote.
    pub fn console(
        &self,
        echo: &mut impl Exchange,
        offset: u64,
    ) -> Result<ConsoleSlice, NodeError> {
        match self.ask(echo, &Request::Console(offset), Policy::default())? {
            Reply::Console(slice) => Ok(slice),
            other => Err(refused(self.node, &other)),
        }
    }

    /// Ends the VM; returns the redemption certificate. Again: the same certificate.
    pub fn stop(&self, echo: &mut impl Exchange) -> Result<[u8; CERTIFICATE_SIZE], NodeError> {
        self.stop_if(echo, &Request::Stop(false), Policy::default())
    }

    /// Ends the VM unless its guest ever ran. Refused with [`Status::Resumed`] if it did: then nothing changes.
    pub fn stop_unless_resumed(
        &self,
        echo: &mut impl Exchange,
        policy: Policy,
    ) -> Result<[u8; CERTIFICATE_SIZE], NodeError> {
        self.stop_if(echo, &Request::Stop(true), policy)
    }

    fn stop_if(
        &self,
        echo: &mut impl Exchange,
        request: &Request,
        policy: Policy,
    ) -> Result<[u8; CERTIFICATE_SIZE], NodeError> {
        match self.ask(echo, request, policy)? {
            Reply::Stop(certificate) => Ok(certificate),
            other => Err(refused(self.node, &other)),
        }
    }

    /// Has the VM saved to the node's disk. Under way when this returns, and done when the stage says so; again: no
    /// harm.
    pub fn suspend(&self, echo: &mut impl Exchange) -> Result<JobStatus, NodeError> {
        let turn = self.status(echo, Policy::default())?.turn;
        match self.ask(echo, &Request::Suspend(turn), Policy::default())? {
            Reply::Suspend(status) => Ok(status),
            other => Err(refused(self.node, &other)),
        }
    }

    /// Wakes a saved VM up. Under way when this returns, and done when the stage says so; again: no harm.
    pub fn wake(&self, echo: &mut impl Exchange) -> Result<JobStatus, NodeError> {
        let turn = self.status(echo, Policy::default())?.turn;
        match self.ask(echo, &Request::Wake(turn), Policy::default())? {
            Reply::Wake(status) => Ok(status),
            other => Err(refused(self.node, &other)),
        }
    }

    fn ask(
        &self,
        echo: &mut impl Exchange,
        request: &Request,
        policy: Policy,
    ) -> Result<Reply, NodeError> {
        let nonce = getrandom::u64()?;
        let packet = request.emit(nonce, &self.job, &self.key);
        Ok(echo.exchange(self.node, &packet, request.op(), nonce, Some(&self.key), policy)?)
    }
}

fn refused(node: Ipv4Addr, reply: &Reply) -> NodeError {
    match reply {
        Reply::Refused(_, status) => NodeError::Refused { node, status: *status },
        // `Reply::parse` gives a reply to the op asked for, or a refusal.
        other => unreachable!("another op's reply: {other:?}"),
    }
}
