//! Both ends of a migration from one seed: the source's real state machine (`onde_client::migration`), the real nodes of
//! source and copy, and between them a network that loses, doubles, delays and cuts every message, a connection that
//! breaks anywhere, and power that fails. Held against it all: never two alive, never none.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::Range;

use noded::node::{Event as NodeEvent, Tail};
use onde_client::migration::{Act, Event, Source, Word};
use onde_client::node::NodeError;
use onde_wire::chain;
use onde_wire::key::{Key, job_key, node_key};
use onde_wire::machine::VmmEvent;
use onde_wire::packet::{Op, Packet, Reply, Request};
use onde_wire::plan;
use onde_wire::token::{BootToken, JobId};

use crate::checks::Checks;
use crate::metal::{Later, Metal, SECRET};
use crate::random::Random;

/// Tokens that each of the two jobs has: most live longer than a schedule, a few run dry in the middle.
const TOKENS: u32 = 200;
/// The troubles end after this, and so long afterwards everything is decided.
const TROUBLED_MS: u64 = 30_000;
const PATIENCE_MS: u64 = 15_000;
/// Numbers of the nodes, which are their places in the world, too.
const HERE: u32 = 0;
const THERE: u32 = 1;
const SOURCE: JobId = [1; 16];
const COPY: JobId = [2; 16];

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    None,
    /// The source goes on without asking the judge to stop the copy.
    JudgeSkipped,
    /// The source ends as soon as the stream is handed over.
    Hasty,
    /// The copy runs without its node's leave.
    LeaveSkipped,
    /// The copy is stopped whether it ran or not.
    StopAnyway,
}

enum Happening {
    ToNode(u32, Packet),
    /// An answer of the judge arrives at the source.
    Answer(Packet),
    Gone(u32, u64, u32),
    Says(u32, u64, JobId, VmmEvent),
    /// Something happens to the source's program.
    Source(Event),
    /// The last byte of the stream arrives in this life of the copy's node.
    End(u64),
    /// The source's machine is frozen.
    Freeze,
    Reboot(u32),
    Cut(u32),
}

/// How the source's machine stands, whoever asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    Running,
    Frozen,
    /// It goes on, for good.
    Aborted,
    /// It ended, for good.
    Committed,
}

struct Move {
    now_ms: u64,
    random: Random,
    sabotage: Sabotage,
    loss: u64,
    double: u64,
    delay_ms_max: u64,
    nodes: [Metal; 2],
    checks: Checks,
    source: Source,
    machine: Machine,
    /// Whether the source's program wrote the last byte of the stream.
    is_given: bool,
    /// The question that was asked last: its nonce and its op.
    asked: Option<(u64, Op)>,
    /// Until when the source waits.
    tick_ms: Option<u64>,
    /// Whether the copy was ever allowed to run, and in which life of its node.
    ran_in: Option<u64>,
    queue: BTreeMap<(u64, u64), Happening>,
    serial: u64,
    log: Vec<String>,
}

/// A token of a job that nobody sold: the broker is not in this.
fn token(node: &Metal, job: JobId, count: u32) -> BootToken {
    let ipv4 = crate::metal::plan().guest(u32::from(job[0]));
    BootToken {
        broker_key: [0; 8],
        node: node.id(),
        incarnation: node.incarnation,
        job,
        expiry_ms: 120_000,
        anchor: chain::walk(&[7; 32], 10),
        value_micro: 1_000_000,
        first_count: count,
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
        prices: crate::metal::PRICES,
    }
}

fn key_of(node: &Metal, job: &JobId) -> Key {
    Key::new(&job_key(&Key::new(&node_key(&SECRET, &node.id())), job))
}

impl Move {
    fn new(seed: u64, sabotage: Sabotage) -> Self {
        let mut random = Random::new(seed);
        let incarnations = [(); 2].map(|()| u128::from(random.next()).to_le_bytes());
        let nodes =
            [HERE, THERE].map(|number| Metal::new(number, seed, 0, incarnations[number as usize]));
        let mut world = Self {
            now_ms: 0,
            sabotage,
            loss: [0, 20, 5, 2][random.index(4)],
            double: [0, 10, 3][random.index(3)],
            delay_ms_max: [2, 30, 700][random.index(3)],
            nodes,
            checks: Checks::default(),
            source: Source::Sending,
            machine: Machine::Running,
            is_given: false,
            asked: None,
            tick_ms: None,
            ran_in: None,
            queue: BTreeMap::new(),
            serial: 0,
            log: Vec::new(),
            random,
        };
        world.plan();
        world
    }

    /// What will happen, whatever comes of it.
    fn plan(&mut self) {
        let few = |random: &mut Random| match random.one_in(10) {
            true => random.between(1, 12) as u32,
            false => TOKENS,
        };
        for (number, job) in [(HERE, SOURCE), (THERE, COPY)] {
            let count = few(&mut self.random);
            self.boot(number, job, count);
        }
        let freeze_ms = self.random.between(200, 3000);
        let given_ms = freeze_ms + self.random.between(1, 400);
        self.put(freeze_ms, Happening::Freeze);
        self.put(given_ms, Happening::Source(Event::Given));
        // A connection that is cut or stalls hands its last bytes over late, or never.
        let late_ms = [5, 300, 25_000][self.random.index(3)];
        if !self.random.one_in(5) {
            let at_ms = given_ms + self.random.between(0, late_ms);
            self.put(at_ms, Happening::End(0));
        }
        if self.random.one_in(3) {
            let event = [Event::Failed, Event::Broken][self.random.index(2)];
            let at_ms = self.random.between(freeze_ms, given_ms + 500);
            self.put(at_ms, Happening::Source(event));
        }
        for number in [HERE, THERE] {
            if self.random.one_in(3) {
                let at_ms = freeze_ms + self.random.between(0, 2000);
                self.put(at_ms, Happening::Cut(number));
            }
            if self.random.one_in(6) {
                let at_ms = self.random.between(freeze_ms, TROUBLED_MS);
                self.put(at_ms, Happening::Reboot(number));
            }
        }
    }

    /// Both VMs are there before the source freezes; their BOOT is not what is tried here.
    fn boot(&mut self, number: u32, job: JobId, count: u32) {
        let node = &self.nodes[number as usize];
        let token = token(node, job, count);
        self.checks.sold(job, count, None);
        let tag = token.sign(&Key::new(&node_key(&SECRET, &node.id())));
        let packet = Request::Boot(token, tag).emit(1, &job, &key_of(node, &job));
        self.arrive(number, &packet);
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        self.log.push(format!("{:>7} ms  {}", self.now_ms, text()));
    }

    fn put(&mut self, at_ms: u64, happening: Happening) {
        self.serial += 1;
        self.queue.insert((at_ms, self.serial), happening);
    }

    /// Puts what the network makes of a message.
    fn send(&mut self, happening: impl Fn() -> Happening) {
        if self.random.one_in(self.loss) {
            return;
        }
        for _ in 0..1 + u32::from(self.random.one_in(self.double)) {
            let at_ms = self.now_ms + self.random.between(1, self.delay_ms_max);
            self.put(at_ms, happening());
        }
    }

    fn run_until(&mut self, until_ms: u64) {
        loop {
            let due = self.queue.first_key_value().map(|((at_ms, _), _)| (*at_ms, 0));
            let wake = |number: usize| Some((self.nodes[number].wake_ms()?, 1 + number as u32));
            let tick = self.tick_ms.map(|at_ms| (at_ms, 3));
            let next = [due, wake(0), wake(1), tick].into_iter().flatten().min();
            let Some((at_ms, what)) = next.filter(|(at_ms, _)| *at_ms <= until_ms) else { break };
            self.now_ms = self.now_ms.max(at_ms);
            match what {
                0 => {
                    let (_, happening) = self.queue.pop_first().expect("it is the next");
                    self.happen(happening);
                }
                3 => self.tell(Event::Tick),
                number => self.step(number - 1, NodeEvent::Timer),
            }
            self.check();
        }
        self.now_ms = until_ms;
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::ToNode(number, packet) => {
                if self.is_up(number) {
                    self.arrive(number, &packet);
                }
            }
            Happening::Answer(packet) => {
                if self.is_up(THERE) && self.is_up(HERE) {
                    self.answer(&packet);
                }
            }
            Happening::Gone(number, life, slot) => {
                if self.nodes[number as usize].life == life {
                    self.step(number, NodeEvent::Gone(slot, Tail::default(), 0));
                }
            }
            Happening::Says(number, life, job, event) => self.says(number, life, job, event),
            Happening::Source(event) => self.tell(event),
            Happening::End(life) => self.end(life),
            Happening::Freeze => self.freeze(),
            Happening::Reboot(number) => self.reboot(number),
            Happening::Cut(number) => {
                let for_ms = self.random.between(100, 20_000);
                self.note(|| format!("node {number} is cut off for {for_ms} ms"));
                self.nodes[number as usize].cut_until_ms = self.now_ms + for_ms;
            }
        }
    }

    fn is_up(&self, number: u32) -> bool {
        self.now_ms >= self.nodes[number as usize].cut_until_ms
    }

    /// Whether the machine of a job has a VM that was not killed.
    fn has_vm(&self, number: u32, job: &JobId) -> bool {
        self.nodes[number as usize].slot(job).is_some()
    }

    fn says(&mut self, number: u32, life: u64, job: JobId, event: VmmEvent) {
        let node = &self.nodes[number as usize];
        // The copy resumes when its stream is whole; the source ran before.
        let is_copys = job == COPY && event == VmmEvent::Resumed;
        if node.life != life || is_copys {
            return;
        }
        if let Some(slot) = node.slot(&job) {
            self.note(|| format!("the VM of job {} says {event:?}", job[0]));
            self.step(number, NodeEvent::Vmm(slot, event));
        }
    }

    /// The whole stream is there, and the loader asks to resume.
    fn end(&mut self, life: u64) {
        let node = &self.nodes[THERE as usize];
        if !self.is_up(THERE) {
            // TCP sends again.
            let at_ms = node.cut_until_ms + 200;
            return self.put(at_ms, Happening::End(life));
        }
        // A VM that is being killed may still come to this.
        let Some(slot) = node.place(&COPY).filter(|_| node.life == life && self.is_given) else {
            return;
        };
        self.note(|| "the copy asks to resume".into());
        self.step(THERE, NodeEvent::Vmm(slot, VmmEvent::Resumed));
        if self.sabotage == Sabotage::LeaveSkipped {
            self.ran_in = Some(life);
            self.nodes[THERE as usize].let_run(slot);
        }
    }

    fn freeze(&mut self) {
        if self.has_vm(HERE, &SOURCE) {
            self.note(|| "FREEZE".into());
            self.machine = Machine::Frozen;
            self.tell(Event::Tick);
        }
    }

    fn reboot(&mut self, number: u32) {
        self.note(|| format!("node {number} restarts"));
        let incarnation = u128::from(self.random.next()).to_le_bytes();
        self.nodes[number as usize].reboot(self.now_ms, incarnation);
    }

    /// Tells the source's program something, and does what it says, as the agent does.
    fn tell(&mut self, event: Event) {
        self.tick_ms = None;
        if self.machine != Machine::Frozen || !self.has_vm(HERE, &SOURCE) {
            return;
        }
        self.is_given |= self.source == Source::Sending && event == Event::Given;
        let act = self.source.step(self.now_ms, event);
        if !matches!((event, act), (Event::Tick, _) | (_, Act::Wait(_))) {
            self.note(|| format!("the source hears {event:?}: {act:?}"));
        }
        match self.sabotaged(act) {
            Act::Wait(until_ms) => self.tick_ms = Some(until_ms.max(self.now_ms + 1)),
            Act::Ask => self.ask(&Request::Status),
            Act::Stop => self.ask(&Request::Stop(self.sabotage != Sabotage::StopAnyway)),
            Act::Commit => self.machine = Machine::Committed,
            Act::Abort => self.machine = Machine::Aborted,
        }
    }

    fn sabotaged(&self, act: Act) -> Act {
        match (self.sabotage, act) {
            (Sabotage::JudgeSkipped, Act::Stop) => Act::Abort,
            (Sabotage::Hasty, Act::Ask) => Act::Commit,
            (_, act) => act,
        }
    }

    fn ask(&mut self, request: &Request) {
        let nonce = self.random.next();
        let packet = request.emit(nonce, &COPY, &key_of(&self.nodes[THERE as usize], &COPY));
        self.asked = Some((nonce, request.op()));
        self.tick_ms = Some(self.now_ms + self.random.between(1, 200));
        if self.is_up(HERE) {
            self.send(|| Happening::ToNode(THERE, packet));
        }
    }

    /// An answer of the judge: late ones, and those to other questions, are dropped by their nonce.
    fn answer(&mut self, packet: &Packet) {
        let Some((nonce, op)) = self.asked else { return };
        let key = key_of(&self.nodes[THERE as usize], &COPY);
        let Some(reply) = Reply::parse(packet, op, nonce, Some(&key)) else { return };
        let refused = |status| NodeError::Refused { node: Ipv4Addr::UNSPECIFIED, status };
        let word = match reply {
            Reply::Status(status) => Word::of_status(&Ok(status)),
            Reply::Stop(certificate) => Word::of_stop(&Ok(certificate)),
            Reply::Refused(Op::Stop, status) => Word::of_stop(&Err(refused(status))),
            Reply::Refused(_, status) => Word::of_status(&Err(refused(status))),
            _ => None,
        };
        self.asked = None;
        self.tell(word.map_or(Event::Tick, Event::Heard));
    }

    fn arrive(&mut self, number: u32, packet: &Packet) {
        let node = &mut self.nodes[number as usize];
        let later = node.packet(self.now_ms, 0, packet, &mut self.checks, &mut self.random);
        self.later(number, later);
    }

    fn step(&mut self, number: u32, event: NodeEvent) {
        let node = &mut self.nodes[number as usize];
        let later = node.step(self.now_ms, event, &mut self.checks, &mut self.random);
        self.later(number, later);
    }

    fn later(&mut self, number: u32, later: Vec<Later>) {
        let life = self.nodes[number as usize].life;
        for later in later {
            match later {
                Later::Gone(in_ms, slot) => {
                    self.put(self.now_ms + in_ms, Happening::Gone(number, life, slot));
                }
                Later::Says(in_ms, job, event) => {
                    self.put(self.now_ms + in_ms, Happening::Says(number, life, job, event));
                }
                Later::Reply(_, packet) => self.send(|| Happening::Answer(packet)),
            }
        }
    }

    fn copy_runs(&self) -> bool {
        self.nodes[THERE as usize].runs(&COPY)
    }

    /// Never two alive: a source that goes on has no copy that runs, and none that ran, unless its whole node died.
    fn check(&mut self) {
        let life = self.nodes[THERE as usize].life;
        if self.copy_runs() && self.ran_in.is_none() {
            self.log.push(format!("{:>7} ms  the copy runs", self.now_ms));
            self.ran_in = Some(life);
        }
        if self.machine == Machine::Aborted && self.has_vm(HERE, &SOURCE) {
            assert!(!self.copy_runs(), "two are alive");
            assert!(self.ran_in != Some(life), "the source goes on, and its copy has run");
        }
        if self.machine == Machine::Committed {
            assert!(
                self.ran_in.is_some(),
                "none is alive: the source ended, and its copy never ran"
            );
        }
    }

    /// When nothing goes wrong any more, everything is decided soon.
    fn check_end(&self) {
        if self.machine == Machine::Frozen && self.has_vm(HERE, &SOURCE) {
            panic!("the source is frozen for ever");
        }
    }

    fn live(&mut self) {
        self.run_until(TROUBLED_MS);
        (self.loss, self.double, self.delay_ms_max) = (0, 0, 2);
        self.nodes.iter_mut().for_each(|node| node.cut_until_ms = 0);
        self.run_until(TROUBLED_MS + PATIENCE_MS);
        self.check_end();
    }
}

/// The promise that a schedule breaks, if it does, and what happened in it.
pub fn play(seed: u64, sabotage: Sabotage) -> (Option<String>, Vec<String>) {
    let mut world = Move::new(seed, sabotage);
    let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.live()));
    (lived.err().map(|panic| crate::words(&*panic)), world.log)
}

/// The first schedule that breaks a promise.
pub fn first_broken(seeds: Range<u64>, sabotage: Sabotage) -> Option<(u64, String)> {
    seeds.into_iter().find_map(|seed| Some((seed, play(seed, sabotage).0?)))
}
