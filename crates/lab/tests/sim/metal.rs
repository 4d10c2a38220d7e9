//! A node: the real state machine of `noded` behind `packetd`'s check of tags, in a world of made-up VMs.

use std::collections::{BTreeMap, VecDeque};

use noded::meter::Terms;
use noded::node::{Config, Cookie, Effect, Event, Node, Note, Start};
use onde_wire::key::{self, Key};
use onde_wire::machine::{VmmCommand, VmmEvent};
use onde_wire::packet::{
    CONSOLE_SLICE_MAX, ConsoleSlice, Op, Packet, Party, Prices, Reply, Request, RequestUnchecked,
    hello_reply,
};
use onde_wire::plan::Plan;
use onde_wire::token::{BootToken, JobId};

use crate::checks::Checks;
use crate::random::Random;
use crate::vm::{Machine, Vm};

/// What a node's cluster file says.
pub const PRICES: Prices =
    Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 200_000 };
pub const SECRET: [u8; 32] = [0x5e; 32];
/// How long a VM is kept on disk when it ran dry: short enough to be over before the schedule is.
const KEEP_S: u32 = 6;

/// What a node does that takes time, or that others see.
#[allow(clippy::large_enum_variant, reason = "done at once, never stored")]
pub enum Later {
    /// A reply.
    Reply(Cookie, Packet),
    /// The VM in this slot is gone, in so many milliseconds.
    Gone(u64, u32),
    /// This job's VMM says this, in so many milliseconds.
    Says(u64, JobId, VmmEvent),
}

/// A node and its VMs.
pub struct Metal {
    pub number: u32,
    pub life: u64,
    pub incarnation: [u8; 16],
    booted_ms: u64,
    mac: [u8; 6],
    node: Node,
    key: Key,
    pub vms: BTreeMap<u32, Vm>,
    /// Machines on its disk.
    files: BTreeMap<JobId, Machine>,
    disk_mib: u32,
    /// Boot tokens whose tag was right, by job.
    shown: BTreeMap<JobId, BootToken>,
    /// Nothing arrives and nothing leaves until then.
    pub cut_until_ms: u64,
    /// All of it stands still until then; 0 while it goes.
    pub stalled_until_ms: u64,
}

pub fn plan() -> Plan {
    Plan::new([198, 18, 0, 0], 15).expect("a /15")
}

impl Metal {
    pub fn new(number: u32, seed: u64, disk_mib: u32, incarnation: [u8; 16]) -> Self {
        let [a, b, c, ..] = seed.to_be_bytes();
        let mac = [
            0x52,
            a ^ b,
            c,
            (seed >> 16) as u8,
            (seed >> 8) as u8,
            (seed << 2) as u8 | number as u8,
        ];
        Self::boot(number, mac, disk_mib, (0, 0), incarnation)
    }

    fn boot(
        number: u32,
        mac: [u8; 6],
        disk_mib: u32,
        (life, now_ms): (u64, u64),
        incarnation: [u8; 16],
    ) -> Self {
        let node = key::node_id(&mac);
        let node_key = key::node_key(&SECRET, &node);
        let config = Config {
            number,
            mac,
            node,
            incarnation,
            node_key,
            plan: plan(),
            terms: Terms { prices: PRICES, keep_s: KEEP_S },
            cpus: 2,
            mem_mib: 700,
            disk_mib,
        };
        Self {
            number,
            life,
            incarnation,
            booted_ms: now_ms,
            mac,
            node: Node::new(config),
            key: Key::new(&node_key),
            vms: BTreeMap::new(),
            files: BTreeMap::new(),
            disk_mib,
            shown: BTreeMap::new(),
            cut_until_ms: 0,
            stalled_until_ms: 0,
        }
    }

    /// Power fails and comes back: all VMs are gone, and all that the node knew.
    pub fn reboot(&mut self, now_ms: u64, incarnation: [u8; 16]) {
        let life = (self.life + 1, now_ms);
        *self = Self::boot(self.number, self.mac, self.disk_mib, life, incarnation);
    }

    pub fn id(&self) -> [u8; 16] {
        key::node_id(&self.mac)
    }

    /// The guest in this slot may run.
    pub fn let_run(&mut self, slot: u32) {
        self.vms.get_mut(&slot).expect("only the living run").runs = true;
    }

    /// Whether a job's guest runs at this moment.
    pub fn runs(&self, job: &JobId) -> bool {
        self.slot(job).is_some_and(|slot| self.vms[&slot].runs)
    }

    /// When it wants to be woken.
    pub fn wake_ms(&self) -> Option<u64> {
        let goes = self.stalled_until_ms == 0;
        Some(self.booted_ms + self.node.wake_ms().filter(|_| goes)?)
    }

    /// Makes a packet's tag right, whatever it says: what a broken `packetd` would come to.
    pub fn forge(&self, packet: &mut Packet) {
        let Some((request, nonce, job)) = Request::parse(packet) else { return };
        let request = match request {
            Request::Boot(token, _) => Request::Boot(token, token.sign(&self.key)),
            other => other,
        };
        let party = Party::of(packet);
        *packet = request.emit_as(party, nonce, &job, &party.key(&self.key, &job));
    }

    /// The slot of a job's VM, even if it was killed and is not gone yet.
    pub fn place(&self, job: &JobId) -> Option<u32> {
        self.vms.iter().find(|(_, vm)| vm.job == *job).map(|(slot, _)| *slot)
    }

    /// The slot of a job's VM that runs.
    pub fn slot(&self, job: &JobId) -> Option<u32> {
        let (slot, _) = self.vms.iter().find(|(_, vm)| vm.job == *job && vm.killed_ms.is_none())?;
        Some(*slot)
    }

    /// A packet arrives: what `packetd` does with it.
    pub fn packet(
        &mut self,
        now_ms: u64,
        from: u8,
        packet: &Packet,
        checks: &mut Checks,
        random: &mut Random,
    ) -> Vec<Later> {
        let Some(request) = RequestUnchecked::parse(packet) else { return vec![] };
        let mut cookie = [0; 32];
        cookie[..3].copy_from_slice(&[from, packet[5], packet[7]]);
        if request.op() == Op::Hello {
            let template = self.node.hello(now_ms - self.booted_ms);
            return vec![Later::Reply(cookie, hello_reply(&template, request.nonce(), &self.key))];
        }
        if !request.verify(&self.key) {
            return vec![];
        }
        if let Some((Request::Boot(token, _), _, _)) = Request::parse(packet) {
            self.shown.insert(token.job, token);
        }
        self.step(now_ms, Event::Packet(cookie, *packet), checks, random)
    }

    /// Something happens at the node.
    pub fn step(
        &mut self,
        now_ms: u64,
        event: Event,
        checks: &mut Checks,
        random: &mut Random,
    ) -> Vec<Later> {
        let uptime_ms = now_ms - self.booted_ms;
        for vm in self.vms.values().filter(|vm| vm.killed_ms.is_none() && vm.reads.is_none()) {
            checks.runs(&PRICES, &vm.job, vm.used(uptime_ms).cost_micro());
        }
        let read = self.vms.values().filter_map(|vm| Some((&vm.job, vm.reads.as_ref()?)));
        for (job, machine) in self.files.iter().chain(read) {
            checks.is_kept(&PRICES, job, machine.used(uptime_ms).cost_micro());
        }
        if let Event::Vmm(slot, VmmEvent::Pay(token)) = &event
            && let Some(vm) = self.vms.get_mut(slot)
        {
            vm.paying = Some(token.index);
        }
        if let Event::Vmm(slot, VmmEvent::Saved) = &event
            && let Some(vm) = self.vms.get_mut(slot)
        {
            vm.saved();
        }
        if let Event::Gone(slot, _, mib) = &event {
            let vm = self.vms.remove(slot).expect("a VM to be gone");
            self.files.extend(vm.leaves(uptime_ms, *mib).map(|machine| (vm.job, machine)));
        }
        let mut later = Vec::new();
        let mut effects = VecDeque::from(self.node.step(uptime_ms, event));
        while let Some(effect) = effects.pop_front() {
            if let Some(event) = self.apply(now_ms, effect, checks, random, &mut later) {
                effects.extend(self.node.step(uptime_ms, event));
            }
        }
        later
    }

    fn apply(
        &mut self,
        now_ms: u64,
        effect: Effect,
        checks: &mut Checks,
        random: &mut Random,
        later: &mut Vec<Later>,
    ) -> Option<Event> {
        let uptime_ms = now_ms - self.booted_ms;
        let life = (self.number, self.life);
        match effect {
            Effect::Reply(cookie, packet) => {
                self.watch(now_ms, &cookie, &packet, checks);
                later.push(Later::Reply(cookie, packet));
                None
            }
            Effect::Create(slot, spec) => {
                let token = self.shown[&spec.identity.job];
                if spec.start != Start::Saved {
                    checks.started(life, &token);
                }
                let done = !random.one_in(25);
                if done {
                    self.create(slot, token, uptime_ms, random, later);
                }
                Some(Event::Created(slot, done))
            }
            Effect::Kill(slot) => {
                let vm = self.vms.get_mut(&slot).expect("only what lives is killed");
                if vm.killed_ms.is_none() {
                    vm.kill(uptime_ms);
                    later.push(Later::Gone(random.between(1, 40), slot));
                }
                None
            }
            Effect::Read(slot) => {
                let vm = self.vms.get_mut(&slot).expect("only what is there is read");
                checks.story(&vm.job).cost_micro = vm.look(uptime_ms).cost_micro();
                Some(Event::Read(slot, vm.reading(uptime_ms)))
            }
            Effect::ReadConsole(_, offset, caller) => {
                let slice = ConsoleSlice { offset, total: 0, len: 0, data: [0; CONSOLE_SLICE_MAX] };
                Some(Event::Console(caller, slice))
            }
            Effect::Publish(slot, meter) => {
                let vm = &self.vms[&slot];
                checks.announced(now_ms, &vm.job, vm.used(uptime_ms).cost_micro(), &meter);
                None
            }
            Effect::Command(slot, VmmCommand::PayDone(accepted)) => {
                let vm = self.vms.get_mut(&slot).expect("only the living pay");
                let index = vm.paying.take().expect("a payment to answer");
                if accepted {
                    checks.guest_paid(life, &vm.job, index);
                }
                None
            }
            Effect::Command(slot, VmmCommand::Go) => {
                self.let_run(slot);
                None
            }
            Effect::Command(slot, VmmCommand::Save) => {
                self.save(slot, uptime_ms, random, later);
                None
            }
            Effect::Empty(slot) => {
                let vm = self.vms.get_mut(&slot).expect("only what runs empties its file");
                vm.go_on(uptime_ms);
                checks.woke(&vm.job);
                None
            }
            Effect::Forget(job) => {
                if let Some(machine) = self.files.remove(&job) {
                    checks.story(&job).cost_micro = machine.used(uptime_ms).cost_micro();
                }
                None
            }
            Effect::Note(job, Note::Saved(_)) => {
                checks.slept(now_ms, &job, self.files[&job].used(uptime_ms).cost_micro());
                None
            }
            Effect::Note(job, Note::Ended(reason, spent_micro)) => {
                checks.ended(now_ms, &job, reason, spent_micro);
                None
            }
            Effect::Note(_, Note::Started(_) | Note::Wakes(_) | Note::StaysSaved) => None,
            other => panic!("the simulated node cannot do {other:?} yet"),
        }
    }

    fn create(
        &mut self,
        slot: u32,
        token: BootToken,
        uptime_ms: u64,
        random: &mut Random,
        later: &mut Vec<Later>,
    ) {
        let vm = Vm::new(token, uptime_ms, self.files.remove(&token.job), random);
        assert!(self.vms.insert(slot, vm).is_none(), "a slot was given out twice");
        let mut tell = |time_ms, event| later.push(Later::Says(time_ms, token.job, event));
        if !random.one_in(20) {
            tell(random.between(5, 3000), VmmEvent::Resumed);
        }
        if random.one_in(3) {
            let ends = [VmmEvent::PowerOff, VmmEvent::Reset, VmmEvent::Fault(1)];
            tell(random.between(3000, 40_000), ends[random.index(3)]);
        }
    }

    /// A VMM writes its machine: most do, some fail, some die.
    fn save(&mut self, slot: u32, uptime_ms: u64, random: &mut Random, later: &mut Vec<Later>) {
        let vm = self.vms.get_mut(&slot).expect("only what lives is saved");
        vm.save(uptime_ms);
        let ends = [VmmEvent::NotSaved, VmmEvent::Fault(2)];
        let said = match random.index(12) {
            rare @ 0..2 => ends[rare],
            _ => VmmEvent::Saved,
        };
        later.push(Later::Says(random.between(20, 2500), vm.job, said));
    }

    /// Disk that the machine of this slot's VM takes, MiB.
    pub fn saved_mib(&self, slot: u32) -> u32 {
        self.vms.get(&slot).map_or(0, |vm| vm.token.mem_mib / 2)
    }

    /// The node goes on after it stood still for longer than anybody pays for.
    pub fn stalled(&mut self, now_ms: u64) {
        let uptime_ms = now_ms - self.booted_ms;
        self.stalled_until_ms = 0;
        self.vms.values_mut().for_each(|vm| vm.forgive(uptime_ms));
    }

    /// Whether what it charges while it stands still can be told from outside: a machine on disk is looked at unseen.
    pub fn can_stall(&self) -> bool {
        self.disk_mib == 0
    }

    /// Shows a reply to the checks.
    fn watch(&self, now_ms: u64, cookie: &Cookie, packet: &Packet, checks: &mut Checks) {
        let job: JobId = packet[16..32].try_into().expect("16 bytes");
        let nonce = u64::from_le_bytes(packet[8..16].try_into().expect("8 bytes"));
        let party = if cookie[2] == Party::Owner as u8 { Party::Owner } else { Party::Customer };
        let key = party.key(&self.key, &job);
        let known = [
            Op::Boot,
            Op::Pay,
            Op::Status,
            Op::Console,
            Op::Stop,
            Op::Suspend,
            Op::Wake,
            Op::Renew,
        ];
        let op = known.into_iter().find(|op| *op as u8 == cookie[1]).expect("a request's op");
        let reply = Reply::parse(packet, op, nonce, Some(&key)).expect("a reply with a right tag");
        checks.reply(now_ms, (self.number, self.life), &job, &reply);
    }
}
