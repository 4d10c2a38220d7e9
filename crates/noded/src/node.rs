//! The node as pure state: who lives here, what each job paid, what has to happen next. [`Node::step`] takes
//! an event and returns what the world is to do; [`crate::world`] does it, or a simulation pretends to.
//! Never looks at a clock, a descriptor or a random number. [`keeping`] has the way to disk and back,
//! [`clones`] what is shared.

mod clones;
mod keeping;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use onde_wire::handover::COOKIE_SIZE;
use onde_wire::key::{self, Key};
use onde_wire::machine::{Identity, Meter, Space, VmmCommand, VmmEvent, fits_mib};
use onde_wire::packet::{
    Booted, CONSOLE_SLICE_MAX, ConsoleSlice, EndReason, Hello, Op, Packet, Paid, Party, Reply,
    Request, Status,
};
use onde_wire::plan::{self, Plan, SLOTS_MAX, VMS_MAX};
use onde_wire::token::{BootToken, Incarnation, JobId, NodeId, Origin};

use crate::admission;
use crate::job::{Job, Verdict};
use crate::meter::{Reading, Terms};

/// Most records kept: with 1.3 KiB each and the console's last words, 40 MiB at most. A node that ends more jobs
/// than this in an hour forgets the oldest whose boot token has expired, so none can be replayed.
pub const JOBS_MAX: usize = 16_384;
/// How long the record of an ended job is kept at least: time for its customer to come for the certificate.
const KEPT_MS: u64 = 3_600_000;
/// How often old records are looked for.
const SWEEP_MS: u64 = 60_000;

/// What a node is told at its start.
#[derive(Clone, Copy)]
pub struct Config {
    /// Number in the address plan.
    pub number: u32,
    /// MAC of its network card, which its id comes from.
    pub mac: [u8; 6],
    /// Its id.
    pub node: NodeId,
    /// Random for this life of the node.
    pub incarnation: Incarnation,
    /// The node key.
    pub node_key: [u8; 32],
    /// The address plan.
    pub plan: Plan,
    /// What it charges, and promises for that.
    pub terms: Terms,
    /// Processors.
    pub cpus: u16,
    /// Memory for VMs, MiB.
    pub mem_mib: u32,
    /// Disk for VMs, MiB.
    pub disk_mib: u32,
}

/// `packetd`'s note of whom to answer.
pub type Cookie = [u8; COOKIE_SIZE];

/// Whom to answer, and about what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    cookie: Cookie,
    nonce: u64,
    job: JobId,
    party: Party,
}

/// The end of a VM's console, kept when the rest of the VM is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// Bytes the guest ever wrote.
    pub total: u64,
    /// The last of them, at most [`CONSOLE_SLICE_MAX`].
    pub bytes: Vec<u8>,
}

/// A VM to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Its info page; the seed is for the world to fill in.
    pub identity: Identity,
    /// RAM, MiB.
    pub mem_mib: u32,
    /// All the memory it may take with its VMM, MiB.
    pub held_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Most KiB a second that it may send; 0 for no limit.
    pub net_kib_s: u32,
    /// Its own disk, MiB; 0 for none.
    pub disk_mib: u32,
    /// Size of the file for its machine, MiB; 0 where it cannot be saved.
    pub saved_mib: u32,
    /// What it starts from.
    pub start: Start,
}

/// What a VM starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A loader, over the network.
    Loader,
    /// Its files, which are there since before: its machine is in one of them.
    Saved,
    /// The file of this job, a template.
    Template(JobId),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "an event is one packet on the stack, never stored")]
pub enum Event {
    /// A request that `packetd` checked.
    Packet(Cookie, Packet),
    /// The VM of a slot is made, or could not be made and has left nothing behind.
    Created(u32, bool),
    /// A VMM spoke.
    Vmm(u32, VmmEvent),
    /// A VM wanted more memory than it may hold, so the kernel ended it: it will be gone.
    OutOfMemory(u32),
    /// The counters asked for.
    Read(u32, Reading),
    /// The console bytes asked for.
    Console(Caller, ConsoleSlice),
    /// The VM's process is dead and all that it held is free, but for its files; its machine takes so many MiB of them.
    Gone(u32, Tail, u32),
    /// It is time ([`Node::wake_ms`]).
    Timer,
}

/// What the world is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "effects are few and done at once")]
pub enum Effect {
    /// Answer through `packetd`.
    Reply(Cookie, Packet),
    /// Make a VM and say [`Event::Created`].
    Create(u32, Spec),
    /// Kill a VM, free all that it held but its files, and then say [`Event::Gone`].
    Kill(u32),
    /// Free the files of a job that has no VM any more.
    Forget(JobId),
    /// Empty the file that a VM's machine was saved to: it runs.
    Empty(u32),
    /// Read a VM's counters and say [`Event::Read`].
    Read(u32),
    /// Read a VM's console from this offset and say [`Event::Console`].
    ReadConsole(u32, u64, Caller),
    /// Write a VM's meter into its info page.
    Publish(u32, Meter),
    /// Tell a VMM.
    Command(u32, VmmCommand),
    /// Leave a line in the node's log.
    Note(JobId, Note),
}

/// What the log says about a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// Its VM was made in this slot.
    Started(u32),
    /// Its VM is gone, and it was charged so many micro-tokens in all.
    Ended(EndReason, u64),
    /// Its machine is on disk and takes so many MiB there.
    Saved(u32),
    /// Its machine is read back, in this slot.
    Wakes(u32),
    /// It did not wake up, and is on disk still.
    StaysSaved,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::Started(slot) => write!(f, "starts in slot {slot}"),
            Note::Ended(reason, spent) => write!(f, "ended ({reason:?}), spent {spent}"),
            Note::Saved(mib) => write!(f, "is on disk, {mib} MiB"),
            Note::Wakes(slot) => write!(f, "wakes up in slot {slot}"),
            Note::StaysSaved => write!(f, "does not wake up and stays on disk"),
        }
    }
}

struct Record {
    job: Job,
    /// Where the job is in the agenda.
    planned_ms: Option<u64>,
    tail: Tail,
    /// Memory of the node that it takes, MiB.
    reserved_mib: u32,
    /// How much of that are pages which clones share: a template's, or those that this clone answers for since the
    /// template is gone.
    shared_mib: u32,
    /// Who waits for the VM to be made, or for a clone to run.
    boot: Option<Caller>,
    /// Who waits for the certificate: the last that asked.
    stop: Option<Caller>,
}

/// A node.
pub struct Node {
    config: Config,
    key: Key,
    certificate_key: Key,
    jobs: BTreeMap<JobId, Record>,
    slots: Vec<Option<JobId>>,
    /// The slot to try first: a slot's address rests as long as it can.
    next_slot: u32,
    mem_mib_free: u32,
    disk_mib_free: u32,
    /// Jobs whose machine is on disk.
    saved: BTreeSet<JobId>,
    /// When which job has to be looked at next. A walk over all of them at each look would grow with the square of their number.
    agenda: BTreeSet<(u64, JobId)>,
    sweep_ms: u64,
}

impl Node {
    /// A node where nobody lives yet.
    pub fn new(config: Config) -> Self {
        let key = Key::new(&config.node_key);
        Self {
            certificate_key: Key::new(&key::certificate_key(&key)),
            key,
            jobs: BTreeMap::new(),
            slots: vec![None; VMS_MAX as usize],
            next_slot: 0,
            mem_mib_free: config.mem_mib,
            disk_mib_free: config.disk_mib,
            saved: BTreeSet::new(),
            agenda: BTreeSet::new(),
            sweep_ms: 0,
            config,
        }
    }

    /// The answer to HELLO, as a template for `packetd`.
    pub fn hello(&self, now_ms: u64) -> Packet {
        let free = self.slots[..SLOTS_MAX as usize].iter().filter(|slot| slot.is_none()).count();
        let hello = Hello {
            node: self.config.node,
            incarnation: self.config.incarnation,
            number: self.config.number,
            uptime_ms: now_ms,
            mem_mib: self.config.mem_mib,
            mem_mib_free: fits_mib(self.mem_mib_free),
            disk_mib: self.config.disk_mib,
            disk_mib_free: self.disk_mib_free,
            cpus: self.config.cpus,
            slots_free: free as u16,
            prices: self.config.terms.prices,
        };
        Reply::Hello(hello).emit(0, &[0; 16], &self.key)
    }

    /// When [`Event::Timer`] is due; `None` while nobody lives here.
    pub fn wake_ms(&self) -> Option<u64> {
        self.agenda.first().map(|(at_ms, _)| *at_ms)
    }

    /// Takes in an event and returns what is to be done, in this order. `now_ms` is the uptime and never
    /// goes back.
    pub fn step(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        let slot = match &event {
            Event::Created(slot, _) | Event::Vmm(slot, _) | Event::OutOfMemory(slot) => Some(*slot),
            Event::Read(slot, _) | Event::Gone(slot, ..) => Some(*slot),
            // These see to their jobs' times themselves, or change none.
            Event::Packet(..) | Event::Console(..) | Event::Timer => None,
        };
        // Nobody else has to be looked at sooner or later for it. Afterwards the slot may be free.
        let tenant = slot.and_then(|slot| *self.slots.get(slot as usize)?);
        let effects = self.take_in(now_ms, event);
        if let Some(id) = tenant {
            self.plan(id);
        }
        effects
    }

    /// Notes when a job has to be looked at next.
    fn plan(&mut self, id: JobId) {
        let Some(record) = self.jobs.get_mut(&id) else { return };
        let due_ms = record.job.is_going().then(|| record.job.due_ms());
        let planned_ms = std::mem::replace(&mut record.planned_ms, due_ms);
        if due_ms != planned_ms {
            if let Some(at_ms) = planned_ms {
                self.agenda.remove(&(at_ms, id));
            }
            self.agenda.extend(due_ms.map(|at_ms| (at_ms, id)));
        }
    }

    fn take_in(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        match event {
            Event::Packet(cookie, packet) => self.packet(now_ms, cookie, &packet),
            Event::Created(slot, done) => self.created(now_ms, slot, done),
            Event::Vmm(slot, event) => self.vmm(now_ms, slot, event),
            Event::OutOfMemory(slot) => {
                if let Some(record) = self.tenant(slot) {
                    record.job.end(now_ms, EndReason::OutOfMemory);
                }
                vec![]
            }
            Event::Read(slot, reading) => self.charge(now_ms, slot, reading),
            Event::Console(caller, slice) => vec![self.reply(&caller, &Reply::Console(slice))],
            Event::Gone(slot, tail, saved_mib) => self.gone(now_ms, slot, tail, saved_mib),
            Event::Timer => self.timer(now_ms),
        }
    }

    fn reply(&self, caller: &Caller, reply: &Reply) -> Effect {
        let key = caller.party.key(&self.key, &caller.job);
        Effect::Reply(caller.cookie, reply.emit(caller.nonce, &caller.job, &key))
    }

    fn packet(&mut self, now_ms: u64, cookie: Cookie, packet: &Packet) -> Vec<Effect> {
        let Some((request, nonce, job)) = Request::parse(packet) else { return vec![] };
        let caller = Caller { cookie, nonce, job, party: Party::of(packet) };
        let effects = self.request(now_ms, caller, request);
        self.plan(job);
        effects
    }

    fn request(&mut self, now_ms: u64, caller: Caller, request: Request) -> Vec<Effect> {
        let job = caller.job;
        let refused = |status| Reply::Refused(request.op(), status);
        if let Request::Boot(token, _) = request {
            // The reply goes under the key of the job in the header: it has to be the token's.
            return if token.job == job { self.boot(now_ms, caller, token) } else { vec![] };
        }
        let Some(record) = self.jobs.get_mut(&job) else {
            return vec![self.reply(&caller, &refused(Status::NoJob))];
        };
        match request {
            // `packetd` answers HELLO itself.
            Request::Hello | Request::Boot(..) => vec![],
            Request::Pay(token) => match record.job.pay(now_ms, &token) {
                Ok(()) => self.paid(now_ms, &caller),
                Err(status) => vec![self.reply(&caller, &refused(status))],
            },
            Request::Renew(renewal, tag) => {
                let is_brokers = renewal.verify(&self.key, &job, &self.config.incarnation, &tag);
                let done = match is_brokers {
                    true => record.job.renew(&renewal),
                    false => Err(Status::BadPayment),
                };
                let reply = done.map_or_else(refused, |()| Reply::Renew(paid(&record.job)));
                vec![self.reply(&caller, &reply)]
            }
            Request::Status => {
                let status = record.job.status(now_ms);
                vec![self.reply(&caller, &Reply::Status(status))]
            }
            Request::Console(offset) => self.console(caller, offset),
            Request::Stop(true) if record.job.has_resumed() => {
                vec![self.reply(&caller, &refused(Status::Resumed))]
            }
            Request::Stop(_) => self.stop(now_ms, caller),
            // Overheard and sent again, or a second time because the answer was lost.
            Request::Suspend(turn) | Request::Wake(turn) if !record.job.take_turn(turn) => {
                let status = record.job.status(now_ms);
                let reply = match request {
                    Request::Suspend(_) => Reply::Suspend(status),
                    _ => Reply::Wake(status),
                };
                vec![self.reply(&caller, &reply)]
            }
            Request::Suspend(_) => self.suspend(now_ms, &caller),
            Request::Wake(_) => self.wake(now_ms, &caller),
        }
    }

    fn boot(&mut self, now_ms: u64, caller: Caller, token: BootToken) -> Vec<Effect> {
        let known = self.jobs.get_mut(&caller.job);
        match known.map(|record| (&record.job, &mut record.boot)) {
            Some((job, _)) if !job.is_going() => self.refuse_boot(&caller, Status::Ended),
            Some((job, _)) if *job.token() != token => self.refuse_boot(&caller, Status::BadLimits),
            Some((_, Some(waiting))) => {
                *waiting = caller;
                vec![]
            }
            Some((job, None)) => match job.slot().filter(|_| !job.is_saved()) {
                Some(slot) => {
                    let reply = self.booted(&self.jobs[&caller.job].job, slot);
                    vec![self.reply(&caller, &reply)]
                }
                // Where mstrap was there is nobody to talk to any more.
                None => self.refuse_boot(&caller, Status::Ended),
            },
            None => match self.admit(now_ms, &token) {
                Ok((slot, start)) => self.create(now_ms, caller, token, slot, start),
                Err(status) => self.refuse_boot(&caller, status),
            },
        }
    }

    fn refuse_boot(&self, caller: &Caller, status: Status) -> Vec<Effect> {
        vec![self.reply(caller, &Reply::Refused(Op::Boot, status))]
    }

    fn booted(&self, job: &Job, slot: u32) -> Reply {
        let ipv4 = self.boot_ipv4(job.token(), slot);
        Reply::Boot(Booted { mac: plan::mac(ipv4), ipv4, balance_micro: job.balance_micro() })
    }

    /// The slot that this token's VM gets, and what it starts from.
    fn admit(&mut self, now_ms: u64, token: &BootToken) -> Result<(u32, Start), Status> {
        admission::check(&self.config, token, now_ms)?;
        let start = self.start_of(token)?;
        let there = self.slots.iter().flatten().chain(&self.saved);
        let mut living = there.map(|id| self.jobs[id].job.token());
        if living.any(|other| other.ipv4 == token.ipv4 || other.mac == token.mac) {
            return Err(Status::BadLimits);
        }
        if token.disk_mib > self.disk_mib_free {
            return Err(Status::NoDisk);
        }
        let slot = self.free_slot(token)?;
        if self.jobs.len() >= JOBS_MAX && !self.forget_oldest(now_ms) {
            return Err(Status::NoRoom);
        }
        Ok((slot, start))
    }

    /// Gives a slot and its memory to a job.
    fn occupy(&mut self, slot: u32, job: JobId, held_mib: u32) {
        self.slots[slot as usize] = Some(job);
        if slot < SLOTS_MAX {
            self.next_slot = (slot + 1) % SLOTS_MAX;
        }
        self.mem_mib_free -= held_mib;
        if let Some(record) = self.jobs.get_mut(&job) {
            record.reserved_mib = held_mib;
        }
    }

    fn create(
        &mut self,
        now_ms: u64,
        caller: Caller,
        token: BootToken,
        slot: u32,
        start: Start,
    ) -> Vec<Effect> {
        // Room to be saved on is set aside as long as there is any: who gets none is told by STATUS. A clone would hold
        // more memory after that than it bought, and a template is not woken up.
        let saved_mib = admission::saved_mib(token.mem_mib);
        let fits = token.disk_mib.saturating_add(saved_mib) <= self.disk_mib_free;
        let room_mib = if fits && token.origin == Origin::Loader { saved_mib } else { 0 };
        let file_mib = if token.origin == Origin::Template { saved_mib } else { room_mib };
        let spec = self.spec(&token, slot, file_mib, start);
        let record = Record {
            job: Job::new(token, slot, now_ms, &self.config.terms, room_mib),
            planned_ms: None,
            tail: Tail::default(),
            reserved_mib: 0,
            shared_mib: 0,
            boot: Some(caller),
            stop: None,
        };
        self.disk_mib_free -= token.disk_mib + room_mib;
        self.jobs.insert(caller.job, record);
        self.occupy(slot, caller.job, spec.held_mib);
        vec![Effect::Create(slot, spec)]
    }

    fn spec(&self, token: &BootToken, slot: u32, saved_mib: u32, start: Start) -> Spec {
        let boot_ipv4 = self.boot_ipv4(token, slot);
        let identity = Identity {
            job: token.job,
            node: self.config.node,
            job_key: key::job_key(&self.key, &token.job),
            loader_sha256: token.loader_sha256,
            seed: [0; 32],
            space: Space::of_mib(token.mem_mib, token.disk_mib),
            vcpus: token.vcpus.into(),
            tsc_khz: 0,
            boot_mac: if boot_ipv4 == token.ipv4 { token.mac } else { plan::mac(boot_ipv4) },
            boot_ipv4,
            mac: token.mac,
            ipv4: token.ipv4,
            gateway: token.gateway,
            prefix_len: token.prefix_len,
        };
        Spec {
            identity,
            mem_mib: token.mem_mib,
            held_mib: admission::reserve_mib(token),
            vcpus: token.vcpus,
            net_kib_s: token.net_kib_s,
            disk_mib: token.disk_mib,
            saved_mib,
            start,
        }
    }

    /// The record of the job that lives in a slot.
    fn tenant(&mut self, slot: u32) -> Option<&mut Record> {
        let id = (*self.slots.get(slot as usize)?)?;
        self.jobs.get_mut(&id)
    }

    fn created(&mut self, now_ms: u64, slot: u32, done: bool) -> Vec<Effect> {
        let Some(record) = self.tenant(slot) else { return vec![] };
        if !done {
            if !record.job.is_waking() {
                record.job.end(now_ms, EndReason::Fault);
            }
            return self.gone(now_ms, slot, Tail::default(), 0);
        }
        let shown = Effect::Publish(slot, record.job.meter());
        let (id, is_new) = (record.job.token().job, record.boot.is_some());
        // A clone is there when its guest runs.
        let is_clone = matches!(record.job.token().origin, Origin::Clone(_));
        let reply = if is_clone { None } else { self.answer_boot(slot) };
        let note = is_new.then_some(Effect::Note(id, Note::Started(slot)));
        [shown].into_iter().chain(reply).chain(note).collect()
    }

    /// Answers a payment, shows the guest its new balance, and wakes it up where that was what it waited for.
    fn paid(&mut self, now_ms: u64, caller: &Caller) -> Vec<Effect> {
        let job = &self.jobs[&caller.job].job;
        let shown = job.slot().map(|slot| Effect::Publish(slot, job.meter()));
        let reply = self.reply(caller, &Reply::Pay(paid(job)));
        let woken = self.wake_by_itself(now_ms, caller.job);
        shown.into_iter().chain([reply]).chain(woken).collect()
    }

    fn console(&self, caller: Caller, offset: u64) -> Vec<Effect> {
        let record = &self.jobs[&caller.job];
        if let Some(slot) = record.job.slot() {
            return vec![Effect::ReadConsole(slot, offset, caller)];
        }
        vec![self.reply(&caller, &Reply::Console(record.tail.slice(offset)))]
    }

    fn stop(&mut self, now_ms: u64, caller: Caller) -> Vec<Effect> {
        let Some(record) = self.jobs.get_mut(&caller.job) else { return vec![] };
        if record.job.is_over() {
            return vec![self.certificate(&caller)];
        }
        record.stop = Some(caller);
        match record.job.slot() {
            Some(slot) => self.end(now_ms, slot, EndReason::Stopped),
            None => self.end_saved(now_ms, caller.job, EndReason::Stopped),
        }
    }

    fn certificate(&self, caller: &Caller) -> Effect {
        let job = &self.jobs[&caller.job].job;
        let certificate = job.certificate(self.config.node, self.config.incarnation);
        self.reply(caller, &Reply::Stop(certificate.sign(&self.certificate_key)))
    }

    /// Charges a VM a last time and takes it down, unless that is under way.
    fn end(&mut self, now_ms: u64, slot: u32, reason: EndReason) -> Vec<Effect> {
        match self.tenant(slot) {
            Some(record) if record.job.is_going() => {
                record.job.end(now_ms, reason);
                vec![Effect::Read(slot), Effect::Kill(slot)]
            }
            _ => vec![],
        }
    }

    fn vmm(&mut self, now_ms: u64, slot: u32, event: VmmEvent) -> Vec<Effect> {
        let Some(record) = self.tenant(slot) else { return vec![] };
        match event {
            VmmEvent::Started => vec![],
            VmmEvent::Resumed => self.resumed(now_ms, slot),
            VmmEvent::Pay(token) => {
                let accepted = record.job.pay(now_ms, &token).is_ok();
                vec![
                    Effect::Publish(slot, record.job.meter()),
                    Effect::Command(slot, VmmCommand::PayDone(accepted)),
                ]
            }
            VmmEvent::Saved => {
                record.job.saved();
                vec![Effect::Kill(slot)]
            }
            VmmEvent::NotSaved => self.not_saved(now_ms, slot),
            // It never ran: its machine is on disk as it was.
            _ if record.job.is_waking() => vec![Effect::Kill(slot)],
            VmmEvent::PowerOff => self.end(now_ms, slot, EndReason::PowerOff),
            VmmEvent::Reset => self.end(now_ms, slot, EndReason::Reset),
            VmmEvent::Fault(_) => self.end(now_ms, slot, EndReason::Fault),
        }
    }

    fn charge(&mut self, now_ms: u64, slot: u32, reading: Reading) -> Vec<Effect> {
        let Some(record) = self.tenant(slot) else { return vec![] };
        let verdict = record.job.charge(now_ms, reading);
        if !record.job.is_going() {
            return vec![];
        }
        match verdict {
            Verdict::Goes => vec![Effect::Publish(slot, record.job.meter())],
            Verdict::Save => self.save(now_ms, slot),
            Verdict::Purge => {
                record.job.end(now_ms, EndReason::OutOfTokens);
                vec![Effect::Kill(slot)]
            }
        }
    }

    /// A VM's process is gone: the slot is free, and the job over unless its machine is on disk.
    fn gone(&mut self, now_ms: u64, slot: u32, tail: Tail, saved_mib: u32) -> Vec<Effect> {
        let Some(Some(id)) = self.slots.get(slot as usize).copied() else { return vec![] };
        let Some(record) = self.jobs.get_mut(&id) else { return vec![] };
        let was_saved = record.job.is_saved();
        record.job.gone(now_ms, saved_mib);
        if !was_saved {
            // What did not wake up wrote nothing.
            record.tail = tail;
        }
        let is_saved = record.job.is_saved();
        self.slots[slot as usize] = None;
        match is_saved {
            true => {
                self.keep_memory(id);
                self.saved.insert(id);
                let note = if was_saved { Note::StaysSaved } else { Note::Saved(saved_mib) };
                vec![Effect::Note(id, note)]
            }
            false => self.over(now_ms, id),
        }
    }

    /// A job that is over: nothing of it stays but its record.
    fn over(&mut self, now_ms: u64, id: JobId) -> Vec<Effect> {
        self.saved.remove(&id);
        self.free_memory(id);
        let Some(record) = self.jobs.get_mut(&id) else { return vec![] };
        let caller = record.stop.take();
        let ended = record.job.status(now_ms);
        self.disk_mib_free += record.job.disk_mib();
        let note = Effect::Note(id, Note::Ended(ended.end, ended.spent_micro));
        let refusal = self.never_there(id, ended.end);
        let answer = caller.map(|caller| self.certificate(&caller));
        [Effect::Forget(id)].into_iter().chain(refusal).chain(answer).chain([note]).collect()
    }

    fn timer(&mut self, now_ms: u64) -> Vec<Effect> {
        if now_ms >= self.sweep_ms {
            self.sweep_ms = now_ms + SWEEP_MS;
            self.jobs.retain(|_, record| !record.is_old(now_ms, KEPT_MS));
        }
        let due = self.agenda.iter().take_while(|(at_ms, _)| *at_ms <= now_ms);
        let due: Vec<JobId> = due.map(|(_, id)| *id).collect();
        let mut effects = Vec::new();
        for id in due {
            effects.extend(self.look(now_ms, id));
            self.plan(id);
        }
        effects
    }

    /// Looks at a job whose time has come.
    fn look(&mut self, now_ms: u64, id: JobId) -> Vec<Effect> {
        let job = &self.jobs[&id].job;
        match job.slot() {
            Some(slot) if job.is_late(now_ms) => self.late(now_ms, slot),
            Some(slot) if !job.is_saved() => vec![Effect::Read(slot)],
            _ => self.charge_saved(now_ms, id),
        }
    }

    /// Drops the record that ended first among those whose token nobody can show again.
    fn forget_oldest(&mut self, now_ms: u64) -> bool {
        let old = self.jobs.iter().filter(|(_, record)| record.is_old(now_ms, 0));
        let oldest = old.min_by_key(|(_, record)| record.job.ended_ms()).map(|(id, _)| *id);
        oldest.is_some_and(|id| self.jobs.remove(&id).is_some())
    }
}

fn paid(job: &Job) -> Paid {
    Paid { last_index: job.last_index(), balance_micro: job.balance_micro() }
}

impl Record {
    /// Whether the job is over for `kept_ms` and its boot token has expired.
    fn is_old(&self, now_ms: u64, kept_ms: u64) -> bool {
        let over = self.job.is_over() && now_ms >= self.job.ended_ms() + kept_ms;
        over && now_ms > self.job.token().expiry_ms
    }
}

impl Tail {
    /// What is kept of the console from this offset on.
    fn slice(&self, offset: u64) -> ConsoleSlice {
        let first = self.total.saturating_sub(self.bytes.len() as u64);
        let offset = offset.clamp(first, self.total);
        let bytes = &self.bytes[(offset - first) as usize..];
        let mut data = [0; CONSOLE_SLICE_MAX];
        data[..bytes.len()].copy_from_slice(bytes);
        ConsoleSlice { offset, total: self.total, len: bytes.len() as u16, data }
    }
}

#[cfg(test)]
mod tests;
