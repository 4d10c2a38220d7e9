//! The broker's HTTP API as Rust types: what goes over HTTPS as JSON between `broker` and its customers.
//! `broker` answers with these, `client` and `onde` read them. Nothing here does I/O.
//!
//! Money is micro-tokens, whole numbers ([`onde_wire::cluster::TOKEN_MICRO`] to a token). Bytes are lower-case hex.
//! Every request carries `Authorization: Bearer KEY`; every refusal is a [`Failure`].
//!
//! | request | answer |
//! |---|---|
//! | GET /v1/nodes ?after=NUMBER&limit=N | [`NodeList`] |
//! | GET /v1/account ?before=ID&limit=N | [`Account`] |
//! | POST /v1/jobs [`JobRequest`] | [`JobOpened`] |
//! | GET /v1/jobs ?open=true&before=SEQ&limit=N | [`JobList`] |
//! | GET /v1/jobs/{id} | [`Job`] |
//! | POST /v1/jobs/{id}/tokens [`TokensRequest`] | [`Payment`] |
//! | POST /v1/jobs/{id}/redeem [`RedeemRequest`] | [`Job`], settled |
//! | POST /v1/jobs/{id}/cancel | [`Job`], settled |
//! | POST /v1/accounts [`AccountRequest`] (operator) | [`AccountOpened`] |
//! | GET /v1/jobs/{id}/usage ?after=MS&limit=N | [`Usage`] |
//! | GET /v1/jobs/{id}/receipt | [`SignedReceipt`] |
//! | POST /v1/accounts/{name}/keys [`KeyRequest`] (operator) | [`AccountOpened`] with one more key |
//! | DELETE /v1/keys/{id} | [`Revoked`] |
//! | POST /v1/webhook [`PaidRequest`] (signed, no key) | [`Credited`] |
//! | POST /v1/accounts/{name}/credit [`CreditRequest`] (operator) | [`Credited`] |
//! | GET /v1/events ?before=ID&limit=N (operator) | [`EventList`] |
//! | GET /metrics (operator, or a key for it) | figures for Prometheus |
//! | GET /healthz, /readyz, /openapi.json (no key) | |

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::net::Ipv4Addr;

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// Most payment tokens that one purchase may take: a PAY may not skip more of the chain.
pub const TOKENS_PER_SALE_MAX: u32 = onde_wire::chain::STEPS_MAX;
/// Most payment tokens in a boot token. A job can buy more as long as it lives.
pub const TOKENS_PER_BOOT_MAX: u32 = 65_536;
/// Most characters of an idempotency key: room for a UUID or a digest in hex.
pub const IDEMPOTENCY_KEY_MAX: usize = 64;
/// Most characters of an account's name.
pub const ACCOUNT_NAME_MAX: usize = 64;
/// Most rows in one page of a list.
pub const PAGE_MAX: u32 = 500;

/// `N` bytes, in JSON a string of 2 `N` hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hex<const N: usize>(pub [u8; N]);

impl<const N: usize> std::fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> std::fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The text is not as many hex digits as the bytes need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not {0} hex digits")]
pub struct NotHex(usize);

impl<const N: usize> std::str::FromStr for Hex<N> {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<Self, NotHex> {
        let digits = text.as_bytes();
        if digits.len() != 2 * N || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(NotHex(2 * N));
        }
        let digit = |digit: u8| (digit as char).to_digit(16).expect("checked above") as u8;
        Ok(Self(std::array::from_fn(|i| digit(digits[2 * i]) << 4 | digit(digits[2 * i + 1]))))
    }
}

impl<const N: usize> Serialize for Hex<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A refusal. The HTTP status says whose fault it is; `error` is for programs, the rest for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Failure {
    /// A word that stays the same: `unauthorized`, `no_money`, `no_fitting_node`, ...
    pub error: String,
    /// What went wrong, one line.
    pub message: String,
    /// What to do about it, one line; may be empty.
    pub hint: String,
}

/// Micro-tokens a unit, as the node told (see [`onde_wire::packet::Prices`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// A second of one vCPU's time, as used.
    pub vcpu_s: u64,
    /// A GiB of memory held for a second.
    pub gib_s: u64,
    /// A GiB sent.
    pub gib_sent: u64,
    /// A GiB of disk held for a second.
    pub disk_gib_s: u64,
}

impl From<Prices> for onde_wire::packet::Prices {
    fn from(prices: Prices) -> Self {
        let Prices { vcpu_s, gib_s, gib_sent, disk_gib_s } = prices;
        Self { vcpu_s, gib_s, gib_sent, disk_gib_s }
    }
}

impl From<onde_wire::packet::Prices> for Prices {
    fn from(prices: onde_wire::packet::Prices) -> Self {
        let onde_wire::packet::Prices { vcpu_s, gib_s, gib_sent, disk_gib_s } = prices;
        Self { vcpu_s, gib_s, gib_sent, disk_gib_s }
    }
}

/// A node as the broker last saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Node {
    /// Its number in the address plan.
    pub number: u32,
    /// Its id.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub id: Hex<16>,
    /// Random at each boot of the node.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub incarnation: Hex<16>,
    /// Where it answers ICMP echo.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub ipv4: Ipv4Addr,
    /// Whether it answered in the last seconds. Jobs are sold only for such nodes.
    pub alive: bool,
    /// Milliseconds since it answered.
    pub seen_ms_ago: u64,
    /// Milliseconds since it booted.
    pub uptime_ms: u64,
    /// Memory that VMs can have in all, MiB.
    pub mem_mib: u32,
    /// Memory neither given out nor sold, MiB.
    pub mem_mib_free: u32,
    /// Processors.
    pub cpus: u16,
    /// VMs that can still be sold.
    pub slots_free: u16,
    /// What it charges.
    pub prices: Prices,
}

/// One page of nodes, by number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct NodeList {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// Where there are more: the `after` of the next page.
    pub next: Option<u32>,
}

/// Which node: its number (JSON number) or its id (JSON string of hex digits).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NodeChoice {
    /// Its number in the address plan.
    Number(u32),
    /// Its id.
    Id(Hex<16>),
}

/// Buys a VM's boot token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// Any text, new for each purchase: the same key again gives the same answer and costs nothing.
    pub idempotency_key: String,
    /// The node; without it, the cheapest that fits.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<serde_json::Value>))]
    pub node: Option<NodeChoice>,
    /// Memory, MiB.
    pub mem_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Disk, MiB; 0 for none.
    #[serde(default)]
    pub disk_mib: u32,
    /// Most KiB a second that the VM may send; 0 for no limit of its own.
    #[serde(default)]
    pub net_kib_s: u32,
    /// SHA-256 of the loader that mstrap shall accept.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub loader_sha256: Hex<32>,
    /// Payment tokens that the boot token carries.
    pub tokens: u32,
    /// For a move: the caller's open job whose guest comes here and keeps its address.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub moves: Option<Hex<16>>,
    /// Whether the VM never runs, but is kept as a template for clones.
    #[serde(default)]
    pub template: bool,
    /// For a clone: what of.
    #[serde(default)]
    pub clones: Option<Clones>,
}

/// A VM that shares the pages of a template on the same node until it writes them. Its upload is the template's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Clones {
    /// The caller's open job that is the template; the clone has its shape.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub template: Hex<16>,
    /// All the memory that the clone may have for itself, MiB, and pays for. One that wants more is ended.
    pub held_mib: u32,
}

/// A boot token and all that goes with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct JobOpened {
    /// The job, and where its node and its guest are.
    pub job: Job,
    /// Secret: tags STATUS, CONSOLE and STOP, and keys the TCP channel.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub job_key: Hex<32>,
    /// The boot token ([`onde_wire::token::BootToken`]).
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub boot_token: Hex<{ onde_wire::token::BOOT_TOKEN_SIZE }>,
    /// Its tag under the node's key.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub boot_tag: Hex<32>,
    /// Milliseconds, from the sale on, in which the boot token can be shown.
    pub expires_in_ms: u64,
    /// What the node charges for this job. Absent in answers of older brokers.
    #[serde(default)]
    pub prices: Option<Prices>,
    /// How long a VM that runs dry is kept on its node's disk, seconds; it pays for that time before.
    #[serde(default)]
    pub keep_s: u32,
}

/// How a job was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum SettledBy {
    /// The node's redemption certificate.
    Certificate,
    /// The boot token was never shown; all money went back.
    Unused,
    /// The node lost the job: it came up anew, or forgot it.
    NodeRestarted,
    /// The node went silent.
    NodeSilent,
}

/// A job: one VM's account with the broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Job {
    /// The job.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub id: Hex<16>,
    /// Its position among all jobs: the `before` of the next page.
    pub seq: i64,
    /// Number of its node.
    pub node: u32,
    /// Id of its node.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub node_id: Hex<16>,
    /// Incarnation of its node.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub incarnation: Hex<16>,
    /// Where the node answers ICMP echo.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub node_ipv4: Ipv4Addr,
    /// The guest's own address (its MAC is [`onde_wire::plan::mac`] of it).
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub guest_ipv4: Ipv4Addr,
    /// Memory, MiB.
    pub mem_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Disk, MiB.
    pub disk_mib: u32,
    /// Micro-tokens that each of its payment tokens is worth.
    pub value_micro: u64,
    /// Payment tokens that the boot token carried.
    pub first_count: u32,
    /// Payment tokens sold so far, those of the boot token included.
    pub sold: u32,
    /// Whether the broker has seen its VM.
    pub booted: bool,
    /// Micro-tokens that the node said it has charged, when last asked.
    pub spent_micro: u64,
    /// Seconds since 1970 at which it was opened.
    pub opened_at: u64,
    /// How it was settled; absent while it is open.
    pub settled_by: Option<SettledBy>,
    /// Seconds since 1970 at which it was settled.
    pub settled_at: Option<u64>,
    /// Micro-tokens given back when it was settled.
    pub refund_micro: u64,
}

/// One page of the caller's jobs, newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct JobList {
    /// The jobs.
    pub jobs: Vec<Job>,
    /// Where there are more: the `before` of the next page.
    pub next: Option<i64>,
}

/// Buys payment tokens for an open job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct TokensRequest {
    /// As in [`JobRequest`].
    pub idempotency_key: String,
    /// How many; at most [`TOKENS_PER_SALE_MAX`]. Fewer are sold where the job's chain ends before: the next purchase
    /// goes on with a new chain.
    pub count: u32,
}

/// A payment token: pays for every token of the job up to `index`. A node accepts it when it skips at most
/// [`TOKENS_PER_SALE_MAX`] tokens, so whoever buys twice shows both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Payment {
    /// Tokens of the chain paid once this one is shown.
    pub index: u32,
    /// The chain value.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub value: Hex<32>,
    /// Where it is the first of a new chain: what the node has to see before, when the old one is used up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewal: Option<Renewal>,
}

/// A new chain for a job whose chain is used up ([`onde_wire::token::Renewal`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Renewal {
    /// Index of the last token of the chain before.
    pub index: u32,
    /// What the next token leads to.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub anchor: Hex<32>,
    /// Its tag under the node's key.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub tag: Hex<32>,
}

/// Redeems a job's certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RedeemRequest {
    /// The certificate that STOP gave ([`onde_wire::token::Certificate`]).
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub certificate: Hex<{ onde_wire::token::CERTIFICATE_SIZE }>,
}

/// One line of an account's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Entry {
    /// Its position in the journal: the `before` of the next page.
    pub id: i64,
    /// Seconds since 1970.
    pub at: u64,
    /// Micro-tokens: positive into the account, negative out of it.
    pub delta_micro: i64,
    /// Why: `credit`, `boot`, `tokens`, `refund`.
    pub reason: String,
    /// The job it is about.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub job: Option<Hex<16>>,
}

/// The caller's account with one page of its journal, newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Account {
    /// Its name.
    pub name: String,
    /// Micro-tokens in it.
    pub balance_micro: u64,
    /// The journal's lines.
    pub entries: Vec<Entry>,
    /// Where there are more: the `before` of the next page.
    pub next: Option<i64>,
}

/// Opens an account (operator).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct AccountRequest {
    /// Letters, digits, `.`, `_`, `@` and `-`; at most [`ACCOUNT_NAME_MAX`].
    pub name: String,
}

/// A new account, or a new key of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct AccountOpened {
    /// The account's name.
    pub name: String,
    /// Its API key. The broker keeps only a digest: this answer is the one chance to note it.
    pub key: String,
    /// What names the key where it is to be revoked.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub id: Hex<8>,
}

/// What a key is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// All that the account's owner may do.
    #[default]
    Customer,
    /// Reading: what the account has, and its jobs.
    Reader,
    /// The broker's figures (GET /metrics), and nothing else.
    Metrics,
}

/// Issues a key (operator).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct KeyRequest {
    /// What it is good for.
    #[serde(default)]
    pub scope: Scope,
    /// Seconds until it ends by itself; absent: never.
    #[serde(default)]
    pub expires_in_s: Option<u64>,
}

/// A key that is worthless now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Revoked {
    /// Which.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub id: Hex<8>,
}

/// A shop system says that somebody paid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PaidRequest {
    /// The shop's own number for the payment, at most 64 characters: credited once, however often it is sent.
    pub reference: String,
    /// The account.
    pub account: String,
    /// Micro-tokens; at least 1.
    pub micro: u64,
}

/// What a node said of a job's meters. All grow only. The last of a settled job is what it cost: where its node was not asked
/// between its last use and its end, `spent_micro` is what the end said, and the meters are still those heard before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Seconds since 1970 at which the broker heard it.
    pub at: u64,
    /// Milliseconds since the VM was started.
    pub age_ms: u64,
    /// Micro-tokens charged so far.
    pub spent_micro: u64,
    /// Payment tokens taken so far.
    pub last_index: u32,
    /// Microseconds of processor time.
    pub cpu_us: u64,
    /// MiB-milliseconds of memory held.
    pub mem_mib_ms: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// MiB-milliseconds of disk held.
    pub disk_mib_ms: u64,
}

/// A page of what a job used, oldest first. A day later one moment a minute is left of it, after 90 days the first and the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Usage {
    /// The job.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub job: Hex<16>,
    /// Number of its node.
    pub node: u32,
    /// Micro-tokens that each of its payment tokens is worth.
    pub value_micro: u64,
    /// What its node charges, fixed when the job was sold.
    pub prices: Option<Prices>,
    /// What was seen.
    pub samples: Vec<Sample>,
    /// Where there are more: the `after` of the next page.
    pub next: Option<u64>,
}

/// What a settled job was, used and cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// [`crate::receipt::RECEIPT_VERSION`].
    pub version: u32,
    /// The job.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub job: Hex<16>,
    /// Whose it was.
    pub account: String,
    /// Number of its node.
    pub node: u32,
    /// Id of its node.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub node_id: Hex<16>,
    /// Incarnation of its node.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub incarnation: Hex<16>,
    /// Memory, MiB.
    pub mem_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Disk, MiB.
    pub disk_mib: u32,
    /// What its node charged.
    pub prices: Option<Prices>,
    /// Seconds since 1970 at which it was opened.
    pub opened_at: u64,
    /// Seconds since 1970 at which it was settled.
    pub settled_at: u64,
    /// How.
    pub settled_by: SettledBy,
    /// Micro-tokens that each payment token was worth.
    pub value_micro: u64,
    /// Payment tokens sold.
    pub sold: u32,
    /// Micro-tokens paid.
    pub paid_micro: u64,
    /// Micro-tokens given back.
    pub refund_micro: u64,
    /// Its last [`Sample`]: what it cost, and the last that was heard of its meters. Absent where it never ran.
    pub last: Option<Sample>,
}

/// A receipt with the broker's signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SignedReceipt {
    /// What is signed.
    pub receipt: Receipt,
    /// The broker's public key (Ed25519).
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub key: Hex<32>,
    /// The signature: see [`crate::receipt`].
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub signature: Hex<64>,
}

/// Puts money into an account (operator).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreditRequest {
    /// As in [`JobRequest`].
    pub idempotency_key: String,
    /// Micro-tokens; at least 1.
    pub micro: u64,
}

/// An account after a credit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Credited {
    /// Its name.
    pub name: String,
    /// Micro-tokens in it right after the credit.
    pub balance_micro: u64,
}

/// Something that happened to a node or a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Event {
    /// Its position: the `before` of the next page.
    pub id: i64,
    /// Seconds since 1970.
    pub at: u64,
    /// What: `node_up`, `node_restarted`, `node_silent`, `job_settled`, `ledger_is_old`, `ledger_restored`, `thawed`.
    pub kind: String,
    /// The node.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub node: Option<Hex<16>>,
    /// The job.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub job: Option<Hex<16>>,
    /// More, for people.
    pub text: String,
}

/// One page of events, newest first (operator).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct EventList {
    /// The events.
    pub events: Vec<Event>,
    /// Where there are more: the `before` of the next page.
    pub next: Option<i64>,
}
