//! The broker in the simulation: the real one, over a real ledger in memory. Only its poller is re-made, from the same
//! asks and answers, because the network is made up.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use onde_broker::Broker;
use onde_broker::ledger::Ledger;
use onde_broker::watch::{Ask, Heard};
use onde_wire::cluster::Cluster;
use onde_wire::key::{Key, node_key};
use onde_wire::packet::{Op, Packet, Party, Reply, Request, Status};

use crate::metal::SECRET;
use crate::random::Random;

/// Chains of 16 tokens: some jobs come to the end of theirs.
const CHAIN_LEVELS: u32 = 4;
/// Time between two rounds, as the poller's.
pub const ROUND_MS: u64 = 1000;
/// How long a round waits for answers, as the poller's.
pub const ANSWER_MS: u64 = 700;

/// When the schedules begin: 2027.
const WALL_S: u64 = 1_800_000_000;
/// How far a wall clock may jump, seconds: a time server's correction, a wrong time zone, a dead battery.
const JUMPS_S: [i64; 6] = [2, -2, 7200, -7200, 40 * 86_400, -800_000_000];

enum Asked {
    Hello,
    Job(Ask),
}

pub struct Clerk {
    store: PathBuf,
    epoch: Instant,
    /// The broker's wall clock: seconds since 1970, wherever it jumped.
    wall: Arc<AtomicU64>,
    /// None while it is down.
    pub broker: Option<Broker>,
    waiting: HashMap<u64, (u32, Asked)>,
    heard: Vec<Heard>,
    after: i64,
}

impl Clerk {
    pub fn new(store: PathBuf, now_ms: u64) -> Self {
        let mut clerk = Self {
            store,
            epoch: Instant::now(),
            wall: Arc::new(AtomicU64::new(WALL_S)),
            broker: None,
            waiting: HashMap::new(),
            heard: Vec::new(),
            after: 0,
        };
        clerk.start(now_ms);
        clerk
    }

    /// The broker starts, knowing nothing but its ledger.
    pub fn start(&mut self, now_ms: u64) {
        let text = format!("secret={}\nnetwork=198.18.0.0/15\n", "5e".repeat(32));
        let cluster = Cluster::parse(&text).expect("a cluster file");
        let ledger = Ledger::open(self.store.to_str().expect("UTF-8")).expect("a ledger");
        let wall = Arc::clone(&self.wall);
        let ledger = ledger.with_clock(Box::new(move || wall.load(Relaxed)));
        let broker = Broker::new(cluster, ledger, "operator", self.instant(now_ms));
        self.broker = Some(broker.with_chains(CHAIN_LEVELS));
    }

    /// Its wall clock jumps, forward or back; and it forgets what it then takes for old.
    pub fn jump(&mut self, random: &mut Random) -> i64 {
        let jump_s = JUMPS_S[random.index(JUMPS_S.len())];
        self.wall.store(self.wall.load(Relaxed).saturating_add_signed(jump_s), Relaxed);
        if let Some(broker) = &self.broker {
            broker.prune().expect("the ledger works");
        }
        jump_s
    }

    /// The broker dies between two acts.
    pub fn kill(&mut self) {
        self.broker = None;
        self.waiting.clear();
        self.heard.clear();
    }

    pub fn instant(&self, now_ms: u64) -> Instant {
        self.epoch + Duration::from_millis(now_ms)
    }

    /// What is to be asked in a round, and whom.
    pub fn round(&mut self, now_ms: u64, nodes: u32, random: &mut Random) -> Vec<(u32, Packet)> {
        let now = self.instant(now_ms);
        self.wall.fetch_add(ROUND_MS / 1000, Relaxed);
        let Some(broker) = &self.broker else { return vec![] };
        let mut out = Vec::new();
        for number in 0..nodes {
            let nonce = random.next();
            self.waiting.insert(nonce, (number, Asked::Hello));
            out.push((number, Request::Hello.emit(nonce, &[0; 16], &Key::new(&[0; 32]))));
        }
        let (asks, after) = broker.asks(self.after, now).expect("the ledger works");
        self.after = after;
        for ask in asks {
            let key = Party::Owner.key(&broker.node_key(&ask.node), &ask.job);
            let nonce = random.next();
            let request = if ask.op == Op::Stop { Request::Stop(false) } else { Request::Status };
            let number = u32::from(ask.ipv4.octets()[2]);
            out.push((number, request.emit_as(Party::Owner, nonce, &ask.job, &key)));
            self.waiting.insert(nonce, (number, Asked::Job(ask)));
        }
        out
    }

    /// An answer arrives.
    pub fn answer(&mut self, number: u32, packet: &Packet) {
        let nonce = u64::from_le_bytes(packet[8..16].try_into().expect("8 bytes"));
        let Some((_, asked)) = self.waiting.get(&nonce).filter(|(to, _)| *to == number) else {
            return;
        };
        let heard = match asked {
            Asked::Hello => match Reply::parse(packet, Op::Hello, nonce, None) {
                Some(Reply::Hello(claim)) => {
                    let key = Key::new(&node_key(&SECRET, &claim.node));
                    Reply::parse(packet, Op::Hello, nonce, Some(&key)).map(|_| Heard::Hello(claim))
                }
                _ => None,
            },
            Asked::Job(ask) => about(ask, packet, nonce),
        };
        if let Some(heard) = heard {
            self.heard.push(heard);
            self.waiting.remove(&nonce);
        }
    }

    /// The end of a round.
    pub fn listen(&mut self, now_ms: u64) {
        let now = self.instant(now_ms);
        self.waiting.clear();
        let heard = std::mem::take(&mut self.heard);
        if let Some(broker) = &self.broker {
            broker.hear(&heard, now).expect("the ledger works");
            broker.tick(now).expect("the ledger works");
        }
    }
}

fn about(ask: &Ask, packet: &Packet, nonce: u64) -> Option<Heard> {
    let node_key = Key::new(&node_key(&SECRET, &ask.node));
    let key = Party::Owner.key(&node_key, &ask.job);
    match Reply::parse(packet, ask.op, nonce, Some(&key))? {
        Reply::Status(status) => Some(Heard::Status(ask.job, status)),
        Reply::Stop(certificate) => Some(Heard::Certificate(ask.job, certificate)),
        Reply::Refused(_, Status::NoJob) => Some(Heard::Gone(ask.job, ask.expired)),
        _ => None,
    }
}
