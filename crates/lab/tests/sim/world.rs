//! The world that everybody meets in: time, a network that loses, doubles, delays and cuts, power that fails, and
//! somebody who repeats and alters what he overhears. All of it from one seed.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use noded::node::{Event, Tail};
use onde_broker::Broker;
use onde_broker::refusal::Refusal;
use onde_wire::machine::VmmEvent;
use onde_wire::packet::{Packet, Request};
use onde_wire::token::{BOOT_TOKEN_SIZE, JobId};
use std::time::Instant;

use crate::checks::Checks;
use crate::clerk::{ANSWER_MS, Clerk, ROUND_MS};
use crate::metal::{Later, Metal, plan};
use crate::random::Random;

/// Who gets no replies: overheard packets are sent by nobody.
const NOBODY: u8 = 255;
const BROKER: u8 = 254;
/// Bytes of a packet that mean something in the largest of requests: head, tag and boot token.
const ALTERED_SIZE: usize = 32 + 32 + BOOT_TOKEN_SIZE;
/// A node that stands still for longer than five looks charges nothing for it.
const STALL_MIN_MS: u64 = 5001;
/// Packets that the eavesdropper remembers.
const OVERHEARD_MAX: usize = 64;

/// How bad it is. Each is once in so many times; 0 for never.
#[derive(Clone, Copy, Default)]
pub struct Weather {
    pub loss: u64,
    pub double: u64,
    pub delay_ms_max: u64,
    /// Seconds between cuts, reboots and kills of the broker.
    pub cut_s: u64,
    pub reboot_s: u64,
    pub kill_s: u64,
    pub attack_s: u64,
    /// And jumps of the broker's wall clock, and nodes that stand still.
    pub jump_s: u64,
    pub stall_s: u64,
}

/// What is broken on purpose, to see that the checks see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    None,
    /// A node that restarts takes the same incarnation again.
    SameIncarnation,
    /// A node looks at its VMs late.
    LateTimer,
    /// `packetd` lets wrong tags pass.
    Tags,
}

enum Happening {
    ToNode(u32, u8, Packet),
    FromNode(u32, u8, Packet),
    Gone(u32, u64, u32),
    Says(u32, u64, JobId, VmmEvent),
    Round,
    Listen,
    Start,
    Cut,
    Reboot,
    Kill,
    Attack,
    Jump,
    Stall,
    GoesOn(u32, u64),
}

pub struct World {
    pub now_ms: u64,
    pub random: Random,
    pub weather: Weather,
    pub sabotage: Sabotage,
    pub checks: Checks,
    pub nodes: Vec<Metal>,
    pub clerk: Clerk,
    /// What arrived at each customer.
    pub inboxes: BTreeMap<u8, VecDeque<(Ipv4Addr, Packet)>>,
    queue: BTreeMap<(u64, u64), Happening>,
    serial: u64,
    overheard: VecDeque<(u32, Packet)>,
    /// What happened, where somebody wants to read it.
    pub log: Option<Vec<String>>,
}

/// The answer of an HTTP call did not come.
pub struct Lost;

impl World {
    pub fn new(seed: u64, store: PathBuf, sabotage: Sabotage, keeps_log: bool) -> Self {
        let mut random = Random::new(seed);
        let weather = Weather {
            loss: [0, 50, 10, 4][random.index(4)],
            double: [0, 20, 5][random.index(3)],
            delay_ms_max: [2, 30, 400][random.index(3)],
            cut_s: [0, 0, 20][random.index(3)],
            reboot_s: [0, 0, 30][random.index(3)],
            kill_s: [0, 0, 20][random.index(3)],
            attack_s: [0, 2][random.index(2)],
            jump_s: [0, 0, 10][random.index(3)],
            stall_s: [0, 0, 15][random.index(3)],
        };
        let count = random.between(1, 2) as u32;
        let mut node = |number| {
            let disk_mib = [0, 600][random.index(2)];
            Metal::new(number, seed, disk_mib, incarnation(&mut random))
        };
        let nodes = (0..count).map(&mut node).collect();
        let mut world = Self {
            now_ms: 0,
            weather,
            sabotage,
            checks: Checks::default(),
            nodes,
            clerk: Clerk::new(store, 0),
            inboxes: BTreeMap::new(),
            queue: BTreeMap::new(),
            serial: 0,
            overheard: VecDeque::new(),
            log: keeps_log.then(Vec::new),
            random,
        };
        world.put(0, Happening::Round);
        let troubles = [
            (weather.cut_s, Happening::Cut),
            (weather.reboot_s, Happening::Reboot),
            (weather.kill_s, Happening::Kill),
            (weather.attack_s, Happening::Attack),
            (weather.jump_s, Happening::Jump),
            (weather.stall_s, Happening::Stall),
        ];
        for (every_s, trouble) in troubles {
            world.put_trouble(every_s, trouble);
        }
        world
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:>7} ms  {}", self.now_ms, text()));
        }
    }

    fn put(&mut self, in_ms: u64, happening: Happening) {
        self.serial += 1;
        self.queue.insert((self.now_ms + in_ms, self.serial), happening);
    }

    fn put_trouble(&mut self, every_s: u64, trouble: Happening) {
        if every_s > 0 {
            let in_ms = self.random.between(100, every_s * 2000);
            self.put(in_ms, trouble);
        }
    }

    /// From now on nothing goes wrong any more.
    pub fn calm(&mut self) {
        self.note(|| "calm".into());
        self.weather = Weather { delay_ms_max: 2, ..Weather::default() };
        self.nodes.iter_mut().for_each(|node| node.cut_until_ms = 0);
        if self.clerk.broker.is_none() {
            self.clerk.start(self.now_ms);
        }
    }

    /// Lets the world go on until this time, or until `is_done`.
    pub fn run_until(&mut self, until_ms: u64, mut is_done: impl FnMut(&mut Self) -> bool) {
        while !is_done(self) {
            let due = self.queue.first_key_value().map(|((at_ms, _), _)| *at_ms);
            let wake = self.nodes.iter().filter_map(|node| Some((node.wake_ms()?, node.number)));
            let wake = wake.min().map(|(at_ms, number)| (at_ms + self.late_ms(), number));
            let next = [due, wake.map(|(at_ms, _)| at_ms)].into_iter().flatten().min();
            let Some(next) = next.filter(|next| *next <= until_ms) else {
                self.now_ms = self.now_ms.max(until_ms);
                return;
            };
            self.now_ms = self.now_ms.max(next);
            match wake {
                Some((at_ms, number)) if at_ms == next => self.step(number, Event::Timer),
                _ => {
                    let (_, happening) = self.queue.pop_first().expect("it is the next");
                    self.happen(happening);
                }
            }
        }
    }

    fn late_ms(&self) -> u64 {
        if self.sabotage == Sabotage::LateTimer { 700 } else { 0 }
    }

    /// The node to which this happens, where it waits until a node that stands still goes on.
    fn waits(&self, happening: &Happening) -> Option<u64> {
        let (Happening::ToNode(number, ..)
        | Happening::Gone(number, ..)
        | Happening::Says(number, ..)) = happening
        else {
            return None;
        };
        let until_ms = self.nodes[*number as usize].stalled_until_ms;
        (until_ms > 0).then(|| until_ms - self.now_ms)
    }

    fn happen(&mut self, happening: Happening) {
        if let Some(in_ms) = self.waits(&happening) {
            return self.put(in_ms, happening);
        }
        match happening {
            Happening::ToNode(number, from, packet) => self.arrive(number, from, &packet),
            Happening::FromNode(number, to, packet) => self.come_back(number, to, packet),
            Happening::Gone(number, life, slot) => {
                if self.nodes[number as usize].life == life {
                    let mib = self.nodes[number as usize].saved_mib(slot);
                    self.step(number, Event::Gone(slot, Tail::default(), mib));
                }
            }
            Happening::Says(number, life, job, event) => {
                let node = &self.nodes[number as usize];
                if node.life == life
                    && let Some(slot) = node.slot(&job)
                {
                    self.note(|| format!("node {number} slot {slot}: {event:?}"));
                    self.step(number, Event::Vmm(slot, event));
                }
            }
            Happening::Round => {
                self.put(ROUND_MS, Happening::Round);
                self.put(ANSWER_MS, Happening::Listen);
                let count = self.nodes.len() as u32;
                for (number, packet) in self.clerk.round(self.now_ms, count, &mut self.random) {
                    self.send(number, BROKER, packet);
                }
            }
            Happening::Listen => self.clerk.listen(self.now_ms),
            Happening::Start => {
                if self.clerk.broker.is_none() {
                    self.note(|| "broker starts".into());
                    self.clerk.start(self.now_ms);
                }
            }
            Happening::Cut => self.cut(),
            Happening::Reboot => self.reboot_one(),
            Happening::Kill => self.kill_broker(),
            Happening::Attack => self.attack(),
            Happening::Jump => self.jump(),
            Happening::Stall => self.stall(),
            Happening::GoesOn(number, life) => {
                let node = &mut self.nodes[number as usize];
                if node.life == life {
                    node.stalled(self.now_ms);
                }
            }
        }
    }

    /// Somebody sends a packet to a node.
    pub fn send(&mut self, number: u32, from: u8, packet: Packet) {
        if from < BROKER && self.weather.attack_s > 0 {
            self.overheard.push_back((number, packet));
            if self.overheard.len() > OVERHEARD_MAX {
                self.overheard.pop_front();
            }
            if self.random.one_in(3) {
                self.front_run(number, packet);
            }
        }
        for _ in 0..self.copies() {
            let delay_ms = self.random.between(1, self.weather.delay_ms_max);
            self.put(delay_ms, Happening::ToNode(number, from, packet));
        }
    }

    /// An altered packet arrives before the one that it was made from.
    fn front_run(&mut self, number: u32, mut packet: Packet) {
        self.alter(&mut packet);
        self.put(0, Happening::ToNode(number, NOBODY, packet));
    }

    fn alter(&mut self, packet: &mut Packet) {
        let bit = self.random.index(ALTERED_SIZE * 8);
        packet[bit / 8] ^= 1 << (bit % 8);
    }

    /// How many copies of a packet arrive.
    fn copies(&mut self) -> u32 {
        if self.random.one_in(self.weather.loss) {
            return 0;
        }
        1 + u32::from(self.random.one_in(self.weather.double))
    }

    fn arrive(&mut self, number: u32, from: u8, packet: &Packet) {
        let node = &mut self.nodes[number as usize];
        if self.now_ms < node.cut_until_ms {
            return;
        }
        let mut packet = *packet;
        if self.sabotage == Sabotage::Tags {
            node.forge(&mut packet);
        }
        let later = node.packet(self.now_ms, from, &packet, &mut self.checks, &mut self.random);
        self.later(number, later);
    }

    fn come_back(&mut self, number: u32, to: u8, packet: Packet) {
        if self.now_ms < self.nodes[number as usize].cut_until_ms {
            return;
        }
        match to {
            BROKER => self.clerk.answer(number, &packet),
            NOBODY => {}
            customer => {
                let from = Ipv4Addr::from(plan().node(number));
                self.inboxes.entry(customer).or_default().push_back((from, packet));
            }
        }
    }

    fn step(&mut self, number: u32, event: Event) {
        let node = &mut self.nodes[number as usize];
        let later = node.step(self.now_ms, event, &mut self.checks, &mut self.random);
        self.later(number, later);
    }

    fn later(&mut self, number: u32, later: Vec<Later>) {
        let life = self.nodes[number as usize].life;
        for later in later {
            match later {
                Later::Gone(in_ms, slot) => self.put(in_ms, Happening::Gone(number, life, slot)),
                Later::Says(in_ms, job, event) => {
                    self.put(in_ms, Happening::Says(number, life, job, event));
                }
                Later::Reply(cookie, packet) => {
                    for _ in 0..self.copies() {
                        let delay_ms = self.random.between(1, self.weather.delay_ms_max);
                        self.put(delay_ms, Happening::FromNode(number, cookie[0], packet));
                    }
                }
            }
        }
    }

    fn cut(&mut self) {
        self.put_trouble(self.weather.cut_s, Happening::Cut);
        if self.weather.cut_s > 0 {
            let (index, for_ms) =
                (self.random.index(self.nodes.len()), self.random.between(500, 30_000));
            self.note(|| format!("node {index} is cut off for {for_ms} ms"));
            self.nodes[index].cut_until_ms = self.now_ms + for_ms;
        }
    }

    fn jump(&mut self) {
        self.put_trouble(self.weather.jump_s, Happening::Jump);
        if self.weather.jump_s > 0 {
            let jump_s = self.clerk.jump(&mut self.random);
            self.note(|| format!("the broker's wall clock jumps by {jump_s} s"));
        }
    }

    /// A node stands still for longer than anybody pays for, and its VMs with it.
    fn stall(&mut self) {
        self.put_trouble(self.weather.stall_s, Happening::Stall);
        let index = self.random.index(self.nodes.len());
        let node = &mut self.nodes[index];
        if self.weather.stall_s > 0 && node.can_stall() && node.stalled_until_ms == 0 {
            let for_ms = self.random.between(STALL_MIN_MS, 20_000);
            node.stalled_until_ms = self.now_ms + for_ms;
            let (number, life) = (node.number, node.life);
            self.note(|| format!("node {index} stands still for {for_ms} ms"));
            self.put(for_ms, Happening::GoesOn(number, life));
        }
    }

    fn reboot_one(&mut self) {
        self.put_trouble(self.weather.reboot_s, Happening::Reboot);
        if self.weather.reboot_s > 0 {
            let index = self.random.index(self.nodes.len());
            self.reboot(index);
        }
    }

    pub fn reboot(&mut self, index: usize) {
        self.note(|| format!("node {index} restarts"));
        let incarnation = match self.sabotage {
            Sabotage::SameIncarnation => self.nodes[index].incarnation,
            _ => incarnation(&mut self.random),
        };
        self.nodes[index].reboot(self.now_ms, incarnation);
    }

    pub fn kill_broker(&mut self) {
        self.put_trouble(self.weather.kill_s, Happening::Kill);
        if self.weather.kill_s > 0 && self.clerk.broker.is_some() {
            self.note(|| "the broker dies".into());
            self.clerk.kill();
            let in_ms = self.random.between(10, 8000);
            self.put(in_ms, Happening::Start);
        }
    }

    /// The eavesdropper sends something that he overheard: as it was, altered, to another node, or through a guest.
    fn attack(&mut self) {
        self.put_trouble(self.weather.attack_s, Happening::Attack);
        if self.overheard.is_empty() || self.weather.attack_s == 0 {
            return;
        }
        let index = self.random.index(self.overheard.len());
        let (mut number, mut packet) = self.overheard[index];
        match self.random.index(4) {
            0 => {}
            1 => number = self.random.index(self.nodes.len()) as u32,
            2 => self.alter(&mut packet),
            _ => return self.pay_from_inside(number, &packet),
        }
        self.send(number, NOBODY, packet);
    }

    /// The same payment on its second path: the guest hands it in through its control device.
    fn pay_from_inside(&mut self, number: u32, packet: &Packet) {
        let node = &self.nodes[number as usize];
        if let Some((Request::Pay(token), _, job)) = Request::parse(packet)
            && let Some(slot) = node.slot(&job)
            && node.stalled_until_ms == 0
        {
            self.step(number, Event::Vmm(slot, VmmEvent::Pay(token)));
        }
    }

    /// An HTTP call to the broker. Lost: it may or may not have been done.
    pub fn call<T: PartialEq>(
        &mut self,
        act: impl Fn(&Broker, Instant) -> Result<T, Refusal>,
        mut done: impl FnMut(&mut Checks, &T),
    ) -> Result<Result<T, Refusal>, Lost> {
        let arrives_ms = self.now_ms + self.random.between(1, self.weather.delay_ms_max);
        self.run_until(arrives_ms, |_| false);
        if self.random.one_in(self.weather.loss) {
            return Err(Lost);
        }
        let now = self.clerk.instant(self.now_ms);
        let broker = self.clerk.broker.as_ref().ok_or(Lost)?;
        let answer = act(broker, now);
        if self.random.one_in(self.weather.double)
            && let (Ok(first), Ok(again)) = (&answer, act(broker, now))
        {
            assert!(*first == again, "a call made twice was answered otherwise");
        }
        if let Ok(answer) = &answer {
            done(&mut self.checks, answer);
        }
        if self.weather.kill_s > 0 && self.random.one_in(40) {
            self.kill_broker();
            return Err(Lost);
        }
        if self.random.one_in(self.weather.loss) { Err(Lost) } else { Ok(answer) }
    }
}

fn incarnation(random: &mut Random) -> [u8; 16] {
    (u128::from(random.next()) << 64 | u128::from(random.next())).to_le_bytes()
}
