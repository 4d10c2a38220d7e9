//! Why the broker does not do what a request asks. Every part of the broker returns it; `http` turns it into a
//! status and a [`Failure`]. It never tells a customer anything about other customers or about the broker's inside.

use onde_client::api::Failure;

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No key, or one that nobody has.
    #[error("no valid API key")]
    Unauthorized,
    /// A customer's key where the operator's is wanted.
    #[error("only the operator may do this")]
    NotOperator,
    /// The account does not cover it.
    #[error("{need} micro-tokens needed, {have} in the account")]
    NoMoney {
        /// Micro-tokens asked for.
        need: u64,
        /// Micro-tokens there.
        have: u64,
    },
    /// There is none, or it belongs to somebody else: a stranger cannot tell which.
    #[error("no such {0}")]
    NotFound(&'static str),
    /// A value outside its limits.
    #[error("{0}")]
    Invalid(&'static str),
    /// The idempotency key came before, with another request.
    #[error("this idempotency key was used for another request")]
    KeyReused,
    /// There is an account of this name.
    #[error("there is an account of this name")]
    AccountExists,
    /// The key may only read.
    #[error("this key may only read")]
    ReadOnly,
    /// The key is for figures only.
    #[error("this key reads the broker's figures, and nothing else")]
    OnlyMetrics,
    /// Not signed by who is to sign it.
    #[error("the signature {0}")]
    BadSignature(&'static str),
    /// It has no receipt yet.
    #[error("the job is not settled")]
    JobOpen,
    /// Nothing can be bought for it any more.
    #[error("the job is settled")]
    JobSettled,
    /// Its VM was started, so only a certificate tells what is left.
    #[error("the job's VM was started")]
    JobBooted,
    /// The boot token may still start a VM.
    #[error("the boot token can still be shown, for {0} s")]
    TokenLive(u64),
    /// The job may have sold more than the ledger knows.
    #[error("the job sells no more: the broker's ledger is older than what was sold")]
    JobFrozen,
    /// Not known since the broker started: an old ledger may be in place.
    #[error("the broker has not heard the job's node yet since it started")]
    NotHeard,
    /// Within the broker: a chain is wanted where none is ready; it is made, and the sale is tried again.
    #[error("no chain is ready")]
    NoChain,
    /// The chain has no tokens left.
    #[error("the job cannot buy that many more tokens")]
    ChainSpent,
    /// No node, or not the one asked for, has room.
    #[error("{0}")]
    NoFittingNode(&'static str),
    /// The certificate is forged or of another job.
    #[error("the certificate {0}")]
    BadCertificate(&'static str),
    /// All guest addresses are in use.
    #[error("no guest address is free")]
    NoAddress,
    /// More requests at once than the broker takes, or one that took too long.
    #[error("the broker is busy")]
    Busy,
    /// More requests a second than its key or its address may make.
    #[error("too many requests")]
    TooMany,
    /// The broker runs and cannot do its work.
    #[error("{0}")]
    NotReady(&'static str),
    /// The store failed; nothing was changed.
    #[error("the ledger failed")]
    Ledger(#[from] crate::store::StoreError),
}

impl Refusal {
    /// HTTP status, word for programs, and what to do about it.
    pub fn parts(&self) -> (u16, &'static str, &'static str) {
        match self {
            Refusal::Unauthorized => (
                401,
                "unauthorized",
                "send `Authorization: Bearer KEY` with the key the operator gave you",
            ),
            Refusal::NotOperator => {
                (403, "not_operator", "use the key in the broker's admin key file")
            }
            Refusal::OnlyMetrics => {
                (403, "only_metrics", "GET /metrics; for the rest use another key of the account")
            }
            Refusal::ReadOnly => (403, "read_only", "use a key of the account with scope customer"),
            Refusal::BadSignature(_) => (
                401,
                "bad_signature",
                "Onde-Signature is t=SECONDS,v1=HEX, of HMAC-SHA256(secret, SECONDS + `.` + body)",
            ),
            Refusal::JobOpen => (409, "job_open", "stop it first"),
            Refusal::NoMoney { .. } => (402, "no_money", "ask the operator to credit your account"),
            Refusal::NotFound(_) => (404, "not_found", ""),
            Refusal::Invalid(_) => (422, "invalid", "see /openapi.json for the limits"),
            Refusal::KeyReused => {
                (409, "key_reused", "draw a new idempotency key for each purchase")
            }
            Refusal::AccountExists => {
                (409, "account_exists", "POST /v1/accounts/NAME/keys gives one more key")
            }
            Refusal::JobSettled => (409, "job_settled", "buy a new job"),
            Refusal::JobBooted => {
                (409, "job_booted", "stop it at its node and redeem the certificate")
            }
            Refusal::TokenLive(_) => {
                (409, "token_live", "if it is not, all of its price comes back by itself then")
            }
            Refusal::JobFrozen => {
                (409, "job_frozen", "move to a new job; this one is settled by its certificate")
            }
            Refusal::ChainSpent => (
                409,
                "chain_spent",
                "move to a new job: this one took all the tokens that can be counted",
            ),
            Refusal::NoFittingNode(_) => {
                (422, "no_fitting_node", "see GET /v1/nodes for what is free, or try later")
            }
            Refusal::BadCertificate(_) => {
                (422, "bad_certificate", "ask the job's node again with STOP")
            }
            Refusal::NoAddress => (503, "no_address", "try again when other VMs have ended"),
            Refusal::TooMany => (429, "too_many", "make fewer requests a second"),
            Refusal::NotReady(_) => (503, "not_ready", "see the broker's log"),
            Refusal::Busy | Refusal::NotHeard | Refusal::NoChain => {
                (503, "busy", "try again in a second")
            }
            Refusal::Ledger(_) => {
                (500, "ledger", "nothing was changed; repeat with the same idempotency key")
            }
        }
    }

    /// What the customer reads.
    pub fn failure(&self) -> Failure {
        let (_, error, hint) = self.parts();
        Failure { error: error.into(), message: self.to_string(), hint: hint.into() }
    }
}
