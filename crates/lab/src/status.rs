//! What is said about a lab: its shape as asked for, its state as the keeper
//! sees it, and the requests the keeper takes. One JSON value a line, on the
//! keeper's Unix socket; no behaviour.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// What `up` is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of nodes, 1 to [`NODES_MAX`].
    pub nodes: u8,
    /// Memory of each node, MiB.
    pub memory_mib: u32,
    /// Processors of each node.
    pub vcpus: u8,
    /// Whether the broker runs too.
    pub broker: bool,
    /// Whether `down` leaves the nodes' console logs.
    pub keep_console: bool,
}

/// Block 255 of the addresses belongs to the customer; 64 nodes are more than any laptop boots.
pub const NODES_MAX: u8 = 64;

impl Default for Shape {
    /// One processor a node: with two emulated ones (QEMU 7.2, a thread each), one VM set-up in a hundred hung its
    /// node right at VMRUN, and VMs of two processors crash. VMRUN leaves the vector of an interrupt that it injected in
    /// `exception_index`; asked to leave its loop before the guest's next exit, the emulator delivers it once more, as
    /// an exception. With one thread for both, guests with two processors crawl.
    fn default() -> Self {
        Self { nodes: 2, memory_mib: 1536, vcpus: 1, broker: true, keep_console: false }
    }
}

/// Where one process of the lab stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Started, not heard of yet.
    Starting,
    /// It said that it is ready.
    Ready,
    /// Not running: it ended or was killed.
    Down,
}

impl State {
    /// The state as commands print it.
    pub fn name(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Ready => "ready",
            State::Down => "down",
        }
    }
}

/// One process of the lab: a node or the broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// "node 1", "broker".
    pub name: String,
    /// Where it listens, or answers.
    pub ipv4: Ipv4Addr,
    /// Its state.
    pub state: State,
    /// Process id, as the keeper sees it; 0 when down.
    pub pid: u32,
    /// Milliseconds from its start until it was ready; 0 until then.
    pub ready_ms: u64,
    /// How it ended, where it did.
    pub note: String,
}

/// The whole lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What was asked for.
    pub shape: Shape,
    /// `kvm` or `tcg`: what runs the nodes' processors.
    pub accelerator: String,
    /// Nodes in order, then the broker where there is one.
    pub members: Vec<Member>,
}

impl Status {
    /// Whether every process is ready.
    pub fn is_ready(&self) -> bool {
        self.members.iter().all(|member| member.state == State::Ready)
    }
}

/// What a client asks the keeper. Each is answered by a [`Reply`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// The status now.
    Status,
    /// The status now and at each change, until the client closes.
    Watch,
    /// The client that started the lab is content: the lab outlives its connection.
    Keep,
    /// The client that started the lab is content: the lab ends with its connection.
    Hold,
    /// Cut a node's power.
    Kill(u8),
    /// Power a node on.
    Boot(u8),
    /// End everything.
    Down,
}

/// What the keeper answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// Done; the state after it.
    Status(Status),
    /// Not done, and why.
    Error(String),
}
