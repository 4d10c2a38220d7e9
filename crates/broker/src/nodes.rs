//! What the broker knows of the nodes: the last verified answer of each to HELLO, and when it came. The poller
//! feeds it, sales choose from it. In memory only: after a restart the sweep fills it in seconds.

use crate::policy::Policy;
use crate::refusal::Refusal;
use onde_client::api::{Hex, JobRequest, Node, NodeChoice, Prices};
use onde_wire::packet::Hello;
use onde_wire::plan::Plan;
use onde_wire::token::NodeId;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// A node that answered within this is alive: it lost at most four HELLOs in a row.
pub const ALIVE: Duration = Duration::from_secs(5);
/// A node that did not answer for so long has lost its jobs.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// The same where no other node answers either, so that the broker's own network may be what is broken.
const SILENCE_OF_ALL_MAX: Duration = Duration::from_secs(3600);
/// A pause between two looks at the clock after which the broker blames itself for any silence.
const LAG_MAX: Duration = Duration::from_secs(10);

/// A node's last answer.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// What it said.
    pub hello: Hello,
    /// When.
    pub at: Instant,
}

impl Seen {
    /// The node's uptime now, as far as the broker's clock can tell.
    pub fn uptime_ms(&self, now: Instant) -> u64 {
        self.hello.uptime_ms.saturating_add(since(self.at, now).as_millis() as u64)
    }

    /// Whether it answered lately.
    pub fn is_alive(&self, now: Instant) -> bool {
        since(self.at, now) <= ALIVE
    }
}

fn since(then: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(then)
}

/// What is sold on a node and does not show in its HELLO yet: boot tokens that were not seen used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reserved {
    /// Memory, MiB.
    pub mem_mib: u64,
    /// VMs.
    pub slots: u64,
    /// Disk, MiB.
    pub disk_mib: u64,
}

/// What is asked of the owner's rules: at what time.
#[derive(Clone, Copy)]
pub struct Market<'a> {
    /// The rules.
    pub policy: &'a Policy,
    /// Seconds since 1970.
    pub unix_s: u64,
    /// The same on the clock that never jumps.
    pub now: Instant,
}

impl Market<'_> {
    /// A node with what the owner charges there now.
    fn priced(&self, seen: &Seen) -> Seen {
        let prices = self.policy.prices(seen.hello.number, &seen.hello.prices, self.unix_s);
        Seen { hello: Hello { prices, ..seen.hello }, at: seen.at }
    }
}

/// What changed with a HELLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing of note.
    None,
    /// A node came up, or came back.
    Up,
    /// A node booted anew: all that it knew is gone.
    Restarted,
}

/// All nodes.
#[derive(Debug)]
pub struct Nodes {
    seen: BTreeMap<NodeId, Seen>,
    /// Since when the broker runs without a pause: before, it was not listening.
    awake_since: Instant,
    /// Since when some node or other answers without a pause: before, the broker may have been cut off.
    connected_since: Instant,
    last_tick: Instant,
}

impl Nodes {
    /// Knows no node yet.
    pub fn new(now: Instant) -> Self {
        Self { seen: BTreeMap::new(), awake_since: now, connected_since: now, last_tick: now }
    }

    /// Takes in a verified answer. `nodes_max` bounds what is kept: the longest silent one makes room.
    pub fn hear(&mut self, hello: Hello, now: Instant, nodes_max: u32) -> Change {
        let change = match self.seen.get(&hello.node) {
            Some(old) if old.hello.incarnation != hello.incarnation => Change::Restarted,
            Some(old) if old.is_alive(now) => Change::None,
            _ => Change::Up,
        };
        self.seen.insert(hello.node, Seen { hello, at: now });
        if self.seen.len() > nodes_max as usize
            && let Some(oldest) =
                self.seen.iter().min_by_key(|(_, seen)| seen.at).map(|(id, _)| *id)
        {
            self.seen.remove(&oldest);
        }
        change
    }

    /// Once a second. Forgives all silence if the broker itself was stopped meanwhile, and blames no single node
    /// while none answers.
    pub fn tick(&mut self, now: Instant) {
        if since(self.last_tick, now) > LAG_MAX {
            self.awake_since = now;
            self.connected_since = now;
        }
        if self.alive(now).next().is_none() {
            self.connected_since = now;
        }
        self.last_tick = now;
    }

    /// When the nodes were last looked after.
    pub fn last_tick(&self) -> Instant {
        self.last_tick
    }

    /// The last answer of a node.
    pub fn get(&self, node: &NodeId) -> Option<&Seen> {
        self.seen.get(node)
    }

    /// Whether a node has not answered for so long that its jobs are lost: a minute in which others did, or an
    /// hour.
    pub fn is_lost(&self, node: &NodeId, now: Instant) -> bool {
        let heard = self.seen.get(node).map_or(self.awake_since, |seen| seen.at);
        since(heard.max(self.connected_since), now) > SILENCE_MAX
            || since(heard.max(self.awake_since), now) > SILENCE_OF_ALL_MAX
    }

    /// Numbers of the nodes that are alive.
    pub fn alive(&self, now: Instant) -> impl Iterator<Item = u32> {
        self.seen.values().filter(move |seen| seen.is_alive(now)).map(|seen| seen.hello.number)
    }

    /// The node asked for, or the cheapest with room; among equals, the one with most free memory.
    pub fn choose(
        &self,
        request: &JobRequest,
        reserved: &HashMap<NodeId, Reserved>,
        market: Market<'_>,
    ) -> Result<Seen, Refusal> {
        let now = market.now;
        let room = |seen: &Seen| {
            let reserved = reserved.get(&seen.hello.node).copied().unwrap_or_default();
            why_not(seen, request, reserved, now)
        };
        if let Some(choice) = request.node {
            let asked = |seen: &&Seen| match choice {
                NodeChoice::Number(number) => seen.hello.number == number,
                NodeChoice::Id(id) => seen.hello.node == id.0,
            };
            let newest = self.seen.values().filter(asked).max_by_key(|seen| seen.at);
            let seen = newest.ok_or(Refusal::NotFound("node"))?;
            return room(seen)
                .map_or(Ok(market.priced(seen)), |why| Err(Refusal::NoFittingNode(why)));
        }
        let fitting = self.seen.values().filter(|seen| room(seen).is_none());
        let fitting = fitting.map(|seen| market.priced(seen));
        let free = |seen: &Seen| {
            let reserved = reserved.get(&seen.hello.node).map_or(0, |reserved| reserved.mem_mib);
            u64::from(seen.hello.mem_mib_free).saturating_sub(reserved)
        };
        let only_disk = || self.seen.values().any(|seen| room(seen) == Some(NO_DISK));
        let why = || match only_disk() {
            true => "no node that has room for this otherwise has that much free disk",
            false => "no node that answers has room for this",
        };
        fitting
            .min_by_key(|seen| (rate(seen, request), std::cmp::Reverse(free(seen))))
            .ok_or_else(|| Refusal::NoFittingNode(why()))
    }

    /// The page of nodes with numbers above `after`, as customers see them.
    pub fn page(
        &self,
        plan: &Plan,
        reserved: &HashMap<NodeId, Reserved>,
        after: Option<u32>,
        limit: usize,
        market: Market<'_>,
    ) -> Vec<Node> {
        let is_behind = |seen: &&Seen| after.is_none_or(|after| seen.hello.number > after);
        let mut nodes: Vec<_> = self.seen.values().filter(is_behind).collect();
        nodes.sort_by_key(|seen| (seen.hello.number, seen.hello.node));
        let shown = |seen: &Seen| {
            let reserved = reserved.get(&seen.hello.node).copied().unwrap_or_default();
            show(plan, &market.priced(seen), reserved, market.now)
        };
        nodes.into_iter().take(limit).map(shown).collect()
    }
}

/// Said of a node that would take the VM but for its disk.
const NO_DISK: &str = "the node has not that much free disk";

/// Why a node cannot take the VM; `None` if it can. Room to be saved on is no reason: a VM without it is told so.
fn why_not(
    seen: &Seen,
    request: &JobRequest,
    reserved: Reserved,
    now: Instant,
) -> Option<&'static str> {
    let hello = &seen.hello;
    let mem_mib = request.clones.map_or(request.mem_mib, |clones| clones.held_mib);
    if !seen.is_alive(now) {
        Some("the node does not answer")
    } else if u64::from(mem_mib) + reserved.mem_mib > u64::from(hello.mem_mib_free) {
        Some("the node has not that much free memory")
    } else if request.vcpus > hello.cpus {
        Some("the node has not that many processors")
    } else if request.clones.is_none() && reserved.slots >= u64::from(hello.slots_free) {
        Some("the node has no free slot")
    } else if request.disk_mib > 0
        && u64::from(request.disk_mib) + reserved.disk_mib > u64::from(hello.disk_mib_free)
    {
        Some(NO_DISK)
    } else {
        None
    }
}

/// What the VM costs when it computes all the time: micro-tokens in 1024 seconds.
fn rate(seen: &Seen, request: &JobRequest) -> u128 {
    let prices = &seen.hello.prices;
    u128::from(prices.vcpu_s) * u128::from(request.vcpus) * 1024
        + u128::from(prices.gib_s) * u128::from(request.mem_mib)
        + u128::from(prices.disk_gib_s) * u128::from(request.disk_mib)
}

fn show(plan: &Plan, seen: &Seen, reserved: Reserved, now: Instant) -> Node {
    let hello = &seen.hello;
    let prices = &hello.prices;
    Node {
        number: hello.number,
        id: Hex(hello.node),
        incarnation: Hex(hello.incarnation),
        ipv4: plan.node(hello.number).into(),
        alive: seen.is_alive(now),
        seen_ms_ago: since(seen.at, now).as_millis() as u64,
        uptime_ms: seen.uptime_ms(now),
        mem_mib: hello.mem_mib,
        mem_mib_free: u64::from(hello.mem_mib_free).saturating_sub(reserved.mem_mib) as u32,
        cpus: hello.cpus,
        slots_free: u64::from(hello.slots_free).saturating_sub(reserved.slots) as u16,
        prices: Prices {
            vcpu_s: prices.vcpu_s,
            gib_s: prices.gib_s,
            gib_sent: prices.gib_sent,
            disk_gib_s: prices.disk_gib_s,
        },
    }
}
