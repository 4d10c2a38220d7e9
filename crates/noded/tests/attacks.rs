//! Attacks on a node, each with its verdict: packets go through the check that `packetd` makes and then to the real state
//! machine, as on a node. Tokens are forged here with the cluster's secret, so that exactly one thing is wrong with each.

use noded::meter::{Reading, Terms};
use noded::node::{Config, Effect, Event, Node, Tail};
use onde_wire::chain::{self, STEPS_MAX};
use onde_wire::key::{self, Key};
use onde_wire::packet::{Packet, Prices, Reply, Request, RequestUnchecked, Status};
use onde_wire::plan::{self, Plan};
use onde_wire::token::{BOOT_TOKEN_SIZE, BootToken, PaymentToken, Renewal};

const SECRET: [u8; 32] = [0x5e; 32];
const SEED: [u8; 32] = [7; 32];
/// Tokens in the chain, those of the boot token included.
const CHAIN: u32 = 6000;
/// Tokens that the boot token pays.
const FIRST: u32 = 3;
const JOB: [u8; 16] = [1; 16];
const HEAD_SIZE: usize = 32;
const TAG_SIZE: usize = 32;

/// A node that somebody attacks: what it answers, in a word.
struct Attacked {
    node: Node,
    config: Config,
    now_ms: u64,
}

fn config(secret: &[u8; 32], mac: [u8; 6], incarnation: [u8; 16]) -> Config {
    let node = key::node_id(&mac);
    Config {
        number: 3,
        mac,
        node,
        incarnation,
        node_key: key::node_key(secret, &node),
        plan: Plan::new([198, 18, 0, 0], 15).expect("a /15"),
        terms: Terms {
            prices: Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 0, disk_gib_s: 0 },
            keep_s: 0,
        },
        disk_mib: 0,
        cpus: 2,
        mem_mib: 1024,
    }
}

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 3];

fn value(index: u32) -> chain::Value {
    chain::walk(&SEED, CHAIN - index)
}

impl Attacked {
    fn new() -> Self {
        Self::of(config(&SECRET, MAC, [5; 16]))
    }

    fn of(config: Config) -> Self {
        Self { node: Node::new(config), config, now_ms: 1000 }
    }

    fn token(&self) -> BootToken {
        let ipv4 = self.config.plan.guest(1);
        BootToken {
            broker_key: [0; 8],
            node: self.config.node,
            incarnation: self.config.incarnation,
            job: JOB,
            expiry_ms: 60_000,
            anchor: value(FIRST),
            value_micro: 1_000_000,
            first_count: FIRST,
            loader_sha256: [8; 32],
            mem_mib: 128,
            held_mib: 128,
            origin: onde_wire::token::Origin::Loader,
            vcpus: 1,
            disk_mib: 0,
            net_kib_s: 0,
            mac: plan::mac(ipv4),
            ipv4,
            gateway: [0; 4],
            prefix_len: 15,
            prices: self.config.terms.prices,
        }
    }

    fn job_key(&self) -> Key {
        Key::new(&key::job_key(&Key::new(&self.config.node_key), &JOB))
    }

    fn boot(&self) -> Packet {
        let token = self.token();
        let tag = token.sign(&Key::new(&self.config.node_key));
        Request::Boot(token, tag).emit(7, &JOB, &self.job_key())
    }

    /// What becomes of a payload that arrives: nothing, or the node's answer.
    fn receive(&mut self, payload: &[u8]) -> String {
        let key = Key::new(&self.config.node_key);
        let Some(request) = RequestUnchecked::parse(payload) else { return "dropped".into() };
        if !request.verify(&key) {
            return "dropped".into();
        }
        let packet = payload.try_into().expect("it was parsed");
        let mut said = String::from("silent");
        let mut events = vec![Event::Packet([0; 32], packet)];
        while let Some(event) = events.pop() {
            for effect in self.node.step(self.now_ms, event) {
                match effect {
                    Effect::Create(slot, _) => events.push(Event::Created(slot, true)),
                    Effect::Read(slot) => events.push(Event::Read(slot, Reading::default())),
                    Effect::Kill(slot) => events.insert(0, Event::Gone(slot, Tail::default(), 0)),
                    Effect::Reply(_, reply) => {
                        let reply = Reply::parse(&reply, request.op(), 7, Some(&self.job_key()));
                        said = word(&reply.expect("a reply with a right tag"));
                    }
                    _ => {}
                }
            }
        }
        // Past the pause that a wrong payment costs.
        self.now_ms += 60;
        said
    }

    fn pay(&mut self, index: u32, value: chain::Value) -> String {
        let payment = Request::Pay(PaymentToken { index, value });
        let packet = payment.emit(7, &JOB, &self.job_key());
        self.receive(&packet)
    }

    /// Shows a renewal that is signed with this node's key for this job and life.
    fn renew(&mut self, renewal: Renewal, node_key: &Key, job: [u8; 16], life: [u8; 16]) -> String {
        let tag = renewal.sign(node_key, &job, &life);
        let packet = Request::Renew(renewal, tag).emit(7, &JOB, &self.job_key());
        self.receive(&packet)
    }

    fn stop(&mut self) -> String {
        let packet = Request::Stop(false).emit(7, &JOB, &self.job_key());
        self.receive(&packet)
    }
}

fn word(reply: &Reply) -> String {
    match reply {
        Reply::Boot(booted) => format!("booted with {}", booted.balance_micro / 1_000_000),
        Reply::Pay(paid) => format!("paid {}", paid.last_index),
        Reply::Stop(_) => "certificate".into(),
        Reply::Renew(paid) => format!("renewed at {}", paid.last_index),
        Reply::Refused(_, status) => format!("{status:?}"),
        other => panic!("{other:?} was not asked for"),
    }
}

fn refused(status: Status) -> String {
    format!("{status:?}")
}

#[test]
fn a_boot_token_with_any_bit_flipped_or_cut_anywhere_is_dropped() {
    let mut node = Attacked::new();
    let boot = node.boot();
    for bit in HEAD_SIZE * 8..(HEAD_SIZE + TAG_SIZE + BOOT_TOKEN_SIZE) * 8 {
        let mut packet = boot;
        packet[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(node.receive(&packet), "dropped", "bit {bit}");
    }
    (0..boot.len()).for_each(|size| assert_eq!(node.receive(&boot[..size]), "dropped", "{size}"));
    assert_eq!(node.receive(&boot), "booted with 3", "and unaltered it counts");
}

#[test]
fn a_boot_token_counts_once_wherever_it_is_replayed() {
    let mut node = Attacked::new();
    let boot = node.boot();
    assert_eq!(node.receive(&boot), "booted with 3");
    assert_eq!(node.receive(&boot), "booted with 3", "at once: the same VM, the same balance");
    assert_eq!(node.stop(), "certificate");
    assert_eq!(node.receive(&boot), refused(Status::Ended), "after the VM's death");
    let mut rebooted = Attacked::of(config(&SECRET, MAC, [6; 16]));
    assert_eq!(rebooted.receive(&boot), refused(Status::OtherIncarnation), "after a reboot");
    let other = [0x52, 0x54, 0, 0, 0, 4];
    let mut other_node = Attacked::of(config(&SECRET, other, [5; 16]));
    assert_eq!(other_node.receive(&boot), "dropped", "at another node");
    let mut other_cluster = Attacked::of(config(&[1; 32], MAC, [5; 16]));
    assert_eq!(other_cluster.receive(&boot), "dropped", "in another cluster");
}

#[test]
fn payments_count_once_and_only_from_the_jobs_own_chain() {
    let foreign = chain::walk(&[9; 32], CHAIN - 10);
    let moves = [
        ("index 0", 0, [1; 32], refused(Status::BadPayment)),
        ("index 0 of its own chain", 0, value(0), "paid 3".into()),
        ("a negative index", u32::MAX, value(10), refused(Status::TooManySteps)),
        (
            "over the cap",
            FIRST + STEPS_MAX + 1,
            value(FIRST + STEPS_MAX + 1),
            refused(Status::TooManySteps),
        ),
        ("from another chain", 10, foreign, refused(Status::BadPayment)),
        ("another index than its own", 11, value(10), refused(Status::BadPayment)),
        ("the right one", 10, value(10), "paid 10".into()),
        ("replayed", 10, value(10), "paid 10".into()),
        ("skipped, then shown", 8, value(8), "paid 10".into()),
        ("the anchor", FIRST, value(FIRST), "paid 10".into()),
        ("the largest step", 4106, value(4106), "paid 4106".into()),
        ("the end of the chain", CHAIN, SEED, "paid 6000".into()),
        ("behind the end", CHAIN + 1, SEED, refused(Status::BadPayment)),
    ];
    let mut node = Attacked::new();
    let boot = node.boot();
    assert_eq!(node.receive(&boot), "booted with 3");
    for (attack, index, value, verdict) in moves {
        assert_eq!(node.pay(index, value), verdict, "{attack}");
    }
    assert_eq!(node.stop(), "certificate");
    assert_eq!(node.pay(CHAIN, SEED), refused(Status::Ended), "refund, then pay");
}

/// Tokens in the job's second chain.
const NEXT: u32 = 100;

/// Tokens behind the end of the first chain.
fn next_value(index: u32) -> chain::Value {
    chain::walk(&[0x17; 32], CHAIN + NEXT - index)
}

#[test]
fn a_new_chain_counts_where_the_old_one_ends_and_only_from_the_broker() {
    let mut node = Attacked::new();
    let (key, life) = (Key::new(&node.config.node_key), node.config.incarnation);
    let right = Renewal { index: CHAIN, anchor: next_value(CHAIN) };
    let own = Renewal { index: CHAIN, anchor: chain::walk(&[0x66; 32], NEXT) };
    let bad = refused(Status::BadPayment);
    assert_eq!(node.renew(right, &key, JOB, life), refused(Status::NoJob), "before BOOT");
    assert_eq!(node.receive(&node.boot()), "booted with 3");
    assert_eq!(node.renew(right, &key, JOB, life), bad, "while tokens of the old are unpaid");
    for index in [4000, CHAIN - 1] {
        assert_eq!(node.pay(index, value(index)), format!("paid {index}"));
        assert_eq!(node.renew(right, &key, JOB, life), bad, "at {index}");
    }
    assert_eq!(node.pay(CHAIN, SEED), "paid 6000", "all of the old");
    let job_key = node.job_key();
    for (attack, renewal, key, job, life) in [
        ("a chain of the customer's own", own, &job_key, JOB, life),
        ("another job's", right, &key, [2; 16], life),
        ("another life's", right, &key, JOB, [6; 16]),
        ("another node's", right, &Key::new(&[9; 32]), JOB, life),
        ("another index", Renewal { index: CHAIN + 1, ..right }, &key, JOB, life),
    ] {
        assert_eq!(node.renew(renewal, key, job, life), bad, "{attack}");
    }
    assert_eq!(node.pay(CHAIN + 5, next_value(CHAIN + 5)), bad, "a token of the new before it");
    let packet = Request::Renew(right, right.sign(&key, &JOB, &life)).emit(7, &JOB, &job_key);
    for bit in HEAD_SIZE * 8..(HEAD_SIZE + TAG_SIZE + 68) * 8 {
        let mut packet = packet;
        packet[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(node.receive(&packet), "dropped", "bit {bit}");
    }
    for _ in 0..2 {
        assert_eq!(node.renew(right, &key, JOB, life), "renewed at 6000", "it pays nothing");
    }
    let moves = [
        ("the old chain's last again", CHAIN, SEED, "paid 6000".to_owned()),
        ("an older one", CHAIN - 7, value(CHAIN - 7), "paid 6000".into()),
        ("the old chain's last as the next", CHAIN + 1, SEED, bad.clone()),
        ("the next", CHAIN + 1, next_value(CHAIN + 1), "paid 6001".into()),
        ("one that skips", CHAIN + 60, next_value(CHAIN + 60), "paid 6060".into()),
        ("skipped, then shown", CHAIN + 30, next_value(CHAIN + 30), "paid 6060".into()),
        ("the old one's last", CHAIN, SEED, "paid 6060".into()),
    ];
    for (attack, index, value, verdict) in moves {
        assert_eq!(node.pay(index, value), verdict, "{attack}");
    }
    assert_eq!(node.renew(right, &key, JOB, life), "renewed at 6060", "replayed: nothing counts");
    assert_eq!(node.pay(CHAIN + 61, next_value(CHAIN + 61)), "paid 6061", "and nothing is lost");
    assert_eq!(node.stop(), "certificate");
    assert_eq!(node.renew(right, &key, JOB, life), refused(Status::Ended), "after the refund");
}
