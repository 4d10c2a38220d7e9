//! The node against a made-up world: lists of moves, each with what has to come of it.

use std::collections::{BTreeMap, VecDeque};

use onde_wire::chain::STEPS_MAX;
use onde_wire::handover::COOKIE_SIZE;
use onde_wire::machine::held_mib;
use onde_wire::token::{Certificate, PaymentToken};

mod clones;
mod descent;

use super::*;
use crate::samples::{self, Dice, config};

/// Something that happens to job `.0`.
#[derive(Clone, Copy, Debug)]
enum Move {
    /// BOOT with the sample token.
    Boot(u8),
    /// BOOT with another memory size, MiB.
    BootOf(u8, u32),
    /// BOOT of a template.
    BootTemplate(u8),
    /// BOOT of a clone of job `.1` that may hold so many MiB.
    BootClone(u8, u8, u32),
    /// PAY up to this index.
    Pay(u8, u32),
    /// PAY with a value that is not of the chain.
    PayWrong(u8, u32),
    Status(u8),
    Console(u8, u64),
    Stop(u8),
    /// STOP unless resumed.
    StopUnlessResumed(u8),
    Suspend(u8),
    Wake(u8),
    /// A SUSPEND or a WAKE with this turn, sent again by somebody else.
    SuspendAgain(u8, u64),
    WakeAgain(u8, u64),
    /// Its VMM says this.
    Says(u8, VmmEvent),
    /// Its guest pays up to this index.
    GuestPays(u8, u32),
    /// Its VMM dies by itself.
    Dies(u8),
    /// From now on it uses all of its processor.
    Busy(u8),
    /// From now on it sends nothing.
    Quiet(u8),
    /// So many milliseconds pass.
    Wait(u64),
    /// So many milliseconds pass in which the node stands still.
    Stall(u64),
}

/// A VM that was made up.
struct FakeVm {
    job: u8,
    started_ms: u64,
    busy_from_ms: Option<u64>,
    quiet_from_ms: u64,
    is_killed: bool,
    meter: Meter,
}

/// What every machine takes in its file there, MiB.
const SAVED_MIB: u32 = 100;

/// A world that was made up, and the node in it.
struct Bench {
    node: Node,
    now_ms: u64,
    vms: BTreeMap<u32, FakeVm>,
    /// Jobs' files: MiB that a machine takes there.
    files: BTreeMap<JobId, u32>,
    fails_to_create: bool,
    /// What came of the last move.
    heard: String,
}

fn job_key(job: u8) -> Key {
    Key::new(&key::job_key(&Key::new(&config().node_key), &[job; 16]))
}

impl Bench {
    fn new(config: Config) -> Self {
        let heard = String::new();
        let node = Node::new(config);
        let (vms, files) = (BTreeMap::new(), BTreeMap::new());
        Self { node, now_ms: 1000, vms, files, fails_to_create: false, heard }
    }

    fn make(&mut self, the_move: Move) -> String {
        self.heard.clear();
        match the_move {
            Move::Boot(job) => self.boot(samples::token(job)),
            Move::BootOf(job, mem_mib) => {
                self.boot(BootToken { mem_mib, held_mib: mem_mib, ..samples::token(job) });
            }
            Move::BootTemplate(job) => {
                self.boot(BootToken { origin: Origin::Template, ..samples::token(job) });
            }
            Move::BootClone(job, template, held_mib) => {
                let origin = Origin::Clone([template; 16]);
                self.boot(BootToken { origin, held_mib, ..samples::token(job) });
            }
            Move::Pay(job, index) => {
                let value = samples::payment(index);
                self.ask(job, Request::Pay(PaymentToken { index, value }));
            }
            Move::PayWrong(job, index) => {
                self.ask(job, Request::Pay(PaymentToken { index, value: [1; 32] }));
            }
            Move::Status(job) => self.ask(job, Request::Status),
            Move::Console(job, offset) => self.ask(job, Request::Console(offset)),
            Move::Stop(job) => self.ask(job, Request::Stop(false)),
            Move::StopUnlessResumed(job) => self.ask(job, Request::Stop(true)),
            Move::Suspend(job) => self.ask(job, Request::Suspend(self.turn(job))),
            Move::Wake(job) => self.ask(job, Request::Wake(self.turn(job))),
            Move::SuspendAgain(job, turn) => self.ask(job, Request::Suspend(turn)),
            Move::WakeAgain(job, turn) => self.ask(job, Request::Wake(turn)),
            Move::Says(job, event) => {
                if event == VmmEvent::Saved {
                    self.files.insert([job; 16], SAVED_MIB);
                }
                self.step(Event::Vmm(self.slot(job), event));
            }
            Move::GuestPays(job, index) => {
                let token = PaymentToken { index, value: samples::payment(index) };
                self.step(Event::Vmm(self.slot(job), VmmEvent::Pay(token)));
            }
            Move::Dies(job) => self.bury(self.slot(job)),
            Move::Busy(job) => {
                let (slot, now_ms) = (self.slot(job), self.now_ms);
                self.vms.get_mut(&slot).expect("it lives").busy_from_ms = Some(now_ms);
            }
            Move::Quiet(job) => {
                let (slot, now_ms) = (self.slot(job), self.now_ms);
                self.vms.get_mut(&slot).expect("it lives").quiet_from_ms = now_ms;
            }
            Move::Wait(time_ms) => self.wait(time_ms),
            Move::Stall(time_ms) => {
                self.now_ms += time_ms;
                self.wait(0);
            }
        }
        self.heard.trim_end().to_owned()
    }

    fn slot(&self, job: u8) -> u32 {
        *self.vms.iter().find(|(_, vm)| vm.job == job).expect("the job has a VM").0
    }

    fn boot(&mut self, token: BootToken) {
        self.ask(token.job[0], Request::Boot(token, [0; 32]));
    }

    fn turn(&self, job: u8) -> u64 {
        self.node.jobs.get(&[job; 16]).map_or(0, |record| record.job.status(self.now_ms).turn)
    }

    fn ask(&mut self, job: u8, request: Request) {
        let packet = request.emit(7, &[job; 16], &job_key(job));
        let cookie = [request.op() as u8; COOKIE_SIZE];
        self.step(Event::Packet(cookie, packet));
        // Killed VMs are gone a little later.
        let killed: Vec<_> =
            self.vms.iter().filter(|(_, vm)| vm.is_killed).map(|(slot, _)| *slot).collect();
        killed.into_iter().for_each(|slot| self.bury(slot));
    }

    fn bury(&mut self, slot: u32) {
        let vm = self.vms.remove(&slot).expect("it lives");
        self.now_ms += 5;
        let saved_mib = self.files[&[vm.job; 16]];
        let tail = Tail { total: 5000, bytes: b"the end".to_vec() };
        self.step(Event::Gone(slot, tail, saved_mib));
    }

    /// Lets time pass as the loop does.
    fn wait(&mut self, time_ms: u64) {
        let until_ms = self.now_ms + time_ms;
        while let Some(wake_ms) = self.node.wake_ms().filter(|wake_ms| *wake_ms <= until_ms) {
            // A burial may have taken longer than the time until then.
            self.now_ms = self.now_ms.max(wake_ms);
            self.step(Event::Timer);
            let killed: Vec<_> =
                self.vms.iter().filter(|(_, vm)| vm.is_killed).map(|(slot, _)| *slot).collect();
            killed.into_iter().for_each(|slot| self.bury(slot));
        }
        self.now_ms = self.now_ms.max(until_ms);
        self.step(Event::Timer);
    }

    fn step(&mut self, event: Event) {
        let mut effects: VecDeque<_> = self.node.step(self.now_ms, event).into();
        while let Some(effect) = effects.pop_front() {
            if let Some(event) = self.apply(effect) {
                effects.extend(self.node.step(self.now_ms, event));
            }
        }
        self.check_promises();
    }

    fn apply(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Reply(cookie, packet) => {
                self.hear(cookie, &packet);
                None
            }
            Effect::Create(slot, spec) => {
                self.keep_files(&spec);
                if !self.fails_to_create {
                    self.create(slot, spec);
                }
                Some(Event::Created(slot, !self.fails_to_create))
            }
            Effect::Kill(slot) => {
                self.vms.get_mut(&slot).expect("only what lives is killed").is_killed = true;
                None
            }
            Effect::Forget(job) => {
                self.files.remove(&job).expect("its files are freed once");
                assert!(self.vms.values().all(|vm| vm.job != job[0]), "its VM lives");
                None
            }
            Effect::Empty(slot) => {
                self.files.insert([self.vms[&slot].job; 16], 0);
                None
            }
            Effect::Read(slot) => {
                let vm = &self.vms[&slot];
                // The last of its counters are read while it is taken down.
                let is_going = self.node.jobs[&[vm.job; 16]].job.is_going();
                self.now_ms += if is_going { 0 } else { 2 };
                let busy_ms = vm.busy_from_ms.map_or(0, |from_ms| self.now_ms - from_ms);
                let sent_bytes = (self.now_ms.min(vm.quiet_from_ms) - vm.started_ms) * 10;
                Some(Event::Read(slot, Reading { cpu_us: busy_ms * 1000, sent_bytes }))
            }
            Effect::ReadConsole(slot, offset, caller) => {
                assert!(self.vms.contains_key(&slot));
                let data = [b'x'; CONSOLE_SLICE_MAX];
                Some(Event::Console(caller, ConsoleSlice { offset, total: 9, len: 2, data }))
            }
            Effect::Publish(slot, meter) => {
                self.vms.get_mut(&slot).expect("only the living have a meter").meter = meter;
                None
            }
            Effect::Note(..) => None,
            Effect::Command(slot, command) => {
                assert!(self.vms.contains_key(&slot));
                self.heard += &format!("{command:?} ");
                None
            }
        }
    }

    fn keep_files(&mut self, spec: &Spec) {
        let files = self.files.insert(spec.identity.job, 0);
        assert_eq!(
            files.is_some(),
            spec.start == Start::Saved,
            "files are new, or those of before"
        );
        if let Start::Template(template) = spec.start {
            assert_eq!(self.files[&template], SAVED_MIB, "a template without its machine");
        }
        if let Some(saved_mib) = files {
            assert_eq!(saved_mib, SAVED_MIB, "a machine without its file");
            self.files.insert(spec.identity.job, saved_mib);
        }
    }

    fn create(&mut self, slot: u32, spec: Spec) {
        let meter = Meter {
            stage: onde_wire::machine::Stage::Booting,
            balance_micro: 0,
            burn_micro_per_s: 0,
            seconds_left: 0,
            purge_s: 0,
        };
        let vm = FakeVm {
            job: spec.identity.job[0],
            started_ms: self.now_ms,
            busy_from_ms: None,
            quiet_from_ms: u64::MAX,
            is_killed: false,
            meter,
        };
        assert!(self.vms.insert(slot, vm).is_none(), "a slot was given out twice");
    }

    fn hear(&mut self, cookie: Cookie, packet: &Packet) {
        let ops = [Op::Boot, Op::Pay, Op::Status, Op::Console, Op::Stop, Op::Suspend, Op::Wake];
        let op = ops.into_iter().find(|op| *op as u8 == cookie[0]).expect("a cookie that we gave");
        let job = packet[16];
        let reply = Reply::parse(packet, op, 7, Some(&job_key(job))).expect("a reply to us");
        self.heard += &words(&reply);
        self.heard.push(' ');
    }

    /// What has to be true at every moment.
    fn check_promises(&self) {
        let node = &self.node;
        let held = |id: &JobId| node.jobs[id].reserved_mib;
        let templates = node.saved.iter().filter(|id| node.jobs[*id].job.slot().is_none());
        let all_held: u32 = node.slots.iter().flatten().chain(templates).map(held).sum();
        assert_eq!(node.mem_mib_free + all_held, node.config.mem_mib, "memory was lost");
        for (id, record) in &node.jobs {
            let job = &record.job;
            if let Some(slot) = job.slot() {
                assert_eq!(node.slots[slot as usize], Some(*id), "one slot, one job");
            }
            assert_eq!(node.saved.contains(id), job.is_saved());
            assert_eq!(self.files.contains_key(id), !job.is_over(), "files without a job");
            // Alive in a process or in a file, and never in neither while it is to go on.
            assert!(job.is_over() || job.slot().is_some() || job.is_saved());
            let certificate = job.certificate(node.config.node, node.config.incarnation);
            let paid = u64::from(certificate.last_index) * job.token().value_micro;
            assert_eq!(certificate.spent_micro + certificate.unused_micro, paid, "change was lost");
            let status = job.status(self.now_ms);
            let mem_max = u64::from(job.token().mem_mib) * status.age_ms;
            assert!(status.mem_mib_ms <= mem_max, "it holds memory that is taken from it");
        }
        for (slot, vm) in &self.vms {
            let record = &node.jobs[&[vm.job; 16]];
            assert_eq!(record.job.slot(), Some(*slot), "a VM lives without a job");
        }
        let disk = node.jobs.values().filter(|record| !record.job.is_over());
        let disk: u32 = disk.map(|record| record.job.disk_mib()).sum();
        assert_eq!(node.disk_mib_free + disk, node.config.disk_mib, "disk was lost");
    }
}

fn words(reply: &Reply) -> String {
    match reply {
        Reply::Boot(booted) => {
            format!("booted .{} with {}", booted.ipv4[3], booted.balance_micro)
        }
        Reply::Pay(paid) => format!("paid {} left {}", paid.last_index, paid.balance_micro),
        Reply::Renew(paid) => format!("renewed at {}", paid.last_index),
        Reply::Status(status) => told(status),
        Reply::Suspend(status) | Reply::Wake(status) => status.stage.name().into(),
        Reply::Console(slice) => {
            let text = String::from_utf8_lossy(&slice.data[..slice.len.into()]).into_owned();
            format!("{text:?} at {} of {}", slice.offset, slice.total)
        }
        Reply::Stop(certificate) => {
            let key = Key::new(&key::certificate_key(&Key::new(&config().node_key)));
            let certificate = Certificate::verify(certificate, &key).expect("our signature");
            format!(
                "certificate {} spent {} unused {}",
                certificate.last_index, certificate.spent_micro, certificate.unused_micro
            )
        }
        Reply::Refused(_, status) => format!("{status:?}"),
        Reply::Hello(_) => "hello".into(),
    }
}

fn told(status: &onde_wire::packet::JobStatus) -> String {
    let mut text = format!(
        "{} {:?} spent {} left {} burn {} for {} s",
        status.stage.name(),
        status.end,
        status.spent_micro,
        status.balance_micro,
        status.burn_micro_per_s,
        status.seconds_left
    );
    if status.purge_s != status.seconds_left {
        text += &format!(", kept {} s", status.purge_s - status.seconds_left);
    }
    if status.wake_micro > 0 {
        text += &format!(", wakes for {}", status.wake_micro);
    }
    text
}

fn check(moves: &[(Move, &str)]) {
    check_in(Bench::new(config()), moves);
}

fn check_in(mut bench: Bench, moves: &[(Move, &str)]) -> Bench {
    for (the_move, expect) in moves {
        assert_eq!(bench.make(*the_move), *expect, "after {the_move:?} in {moves:?}");
    }
    bench
}

use EndReason as End;
use Move::*;
use VmmEvent as Vmm;

#[test]
fn a_job_lives_pays_and_gets_its_change() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Says(1, Vmm::Started), ""),
        (Says(1, Vmm::Resumed), "Go"),
        (Wait(2000), ""),
        // 128 MiB and 10 kB/s for 1.8 s: a tick is as short as the balance lasts if all is used to the full.
        (Status(1), "running None spent 46367 left 2953633 burn 25008 for 118 s"),
        (Pay(1, 5), "paid 5 left 4953633"),
        (Console(1, 4), "\"xx\" at 4 of 9"),
        // Charged up to the moment of STOP.
        (Stop(1), "certificate 5 spent 50018 unused 4949982"),
        (Status(1), "stopped Stopped spent 50018 left 4949982 burn 0 for 0 s"),
        (Console(1, 4995), "\"e end\" at 4995 of 5000"),
        (Console(1, 0), "\"the end\" at 4993 of 5000"),
    ]);
}

#[test]
fn a_machine_that_ran_is_not_stopped_as_one_that_did_not() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Says(1, Vmm::Resumed), "Go"),
        (StopUnlessResumed(1), "Resumed"),
        (Stop(1), "certificate 3 spent 0 unused 3000000"),
        (StopUnlessResumed(1), "Resumed"),
    ]);
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (StopUnlessResumed(1), "certificate 3 spent 0 unused 3000000"),
        (StopUnlessResumed(1), "certificate 3 spent 0 unused 3000000"),
        (StopUnlessResumed(2), "NoJob"),
    ]);
    // RESUME that was on its way when the answer was given.
    let mut bench = Bench::new(config());
    bench.make(Boot(1));
    let stop = Request::Stop(true).emit(7, &[1; 16], &job_key(1));
    bench.step(Event::Packet([Op::Stop as u8; COOKIE_SIZE], stop));
    assert_eq!(bench.make(Says(1, Vmm::Resumed)), "", "leave after the end");
}

#[test]
fn everything_repeated_gets_the_same_answer() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Boot(1), "booted .2 with 3000000"),
        (Pay(1, 4), "paid 4 left 4000000"),
        (Pay(1, 4), "paid 4 left 4000000"),
        (Boot(1), "booted .2 with 4000000"),
        (Stop(1), "certificate 4 spent 0 unused 4000000"),
        (Stop(1), "certificate 4 spent 0 unused 4000000"),
        (Boot(1), "Ended"),
        (Pay(1, 4), "Ended"),
        (Pay(1, 5), "Ended"),
        (Stop(1), "certificate 4 spent 0 unused 4000000"),
    ]);
}

#[test]
fn payments_that_do_not_fit_change_nothing() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (PayWrong(1, 4), "BadPayment"),
        // Even a right one waits until the pause for the wrong one is over.
        (Pay(1, 4), "BadPayment"),
        (Wait(60), ""),
        (Pay(1, 4 + STEPS_MAX), "TooManySteps"),
        (Pay(1, 3 + STEPS_MAX), "paid 4099 left 4099000000"),
        // An older token is paid for already; an older one that is none is not.
        (Pay(1, 9), "paid 4099 left 4099000000"),
        (Wait(60), ""),
        (PayWrong(1, 9), "BadPayment"),
        (Wait(60), ""),
        (Pay(1, 2), "TooManySteps"),
        (Pay(2, 4), "NoJob"),
        (Status(2), "NoJob"),
        (Console(2, 0), "NoJob"),
        (Stop(2), "NoJob"),
    ]);
}

#[test]
fn a_guest_can_pay_for_itself() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (GuestPays(1, 5), "PayDone(true)"),
        (GuestPays(1, 5), "PayDone(true)"),
        (GuestPays(1, 5 + STEPS_MAX + 1), "PayDone(false)"),
        // What one path has shown counts on the other one no more, whoever was first.
        (Pay(1, 5), "paid 5 left 5000000"),
        (Pay(1, 6), "paid 6 left 6000000"),
        (GuestPays(1, 6), "PayDone(true)"),
        (Pay(1, 6), "paid 6 left 6000000"),
    ]);
}

#[test]
fn a_vm_runs_as_long_as_it_paid_and_no_longer() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Says(1, Vmm::Resumed), "Go"),
        (Busy(1), ""),
        // 800 000 for the processor and 25 009 for the rest: 3 636 ms, and no more than one shortest tick.
        (Wait(3630), ""),
        (Status(1), "low None spent 2990658 left 9342 burn 825009 for 0 s"),
        (Wait(20), ""),
        (Status(1), "purged OutOfTokens spent 3000000 left 0 burn 0 for 0 s"),
        (Pay(1, 4), "Ended"),
        (Stop(1), "certificate 3 spent 3000000 unused 0"),
    ]);
}

#[test]
fn a_machine_whose_balance_ends_while_it_comes_in_never_runs() {
    // The target of a fork or a migration: its source hears that it never ran, and goes on.
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Busy(1), ""),
        (Wait(3700), ""),
        (Status(1), "purged OutOfTokens spent 3000000 left 0 burn 0 for 0 s"),
        (StopUnlessResumed(1), "certificate 3 spent 3000000 unused 0"),
        (Pay(1, 9), "Ended"),
    ]);
}

#[test]
fn what_ended_costs_nothing_more() {
    for (event, reason) in
        [(Vmm::PowerOff, End::PowerOff), (Vmm::Reset, End::Reset), (Vmm::Fault(3), End::Fault)]
    {
        let ended = format!("ended {reason:?} spent 25009 left 2974991 burn 0");
        let ended = format!("{ended} for 0 s");
        check(&[
            (Boot(1), "booted .2 with 3000000"),
            (Says(1, Vmm::Resumed), "Go"),
            (Wait(1000), ""),
            (Says(1, event), ""),
            // Said twice, and then it dies.
            (Says(1, event), ""),
            (Dies(1), ""),
            (Status(1), &ended),
            (Wait(100_000), ""),
            (Status(1), &ended),
            (Stop(1), "certificate 3 spent 25009 unused 2974991"),
        ]);
    }
}

#[test]
fn a_vmm_that_dies_ends_its_job_as_a_fault() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Dies(1), ""),
        (Status(1), "ended Fault spent 0 left 3000000 burn 0 for 0 s"),
        (Boot(1), "Ended"),
        (Stop(1), "certificate 3 spent 0 unused 3000000"),
    ]);
}

#[test]
fn nobody_holds_memory_for_a_loader_that_does_not_come() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Pay(1, 100), "paid 100 left 100000000"),
        (Quiet(1), ""),
        (Wait(89_000), ""),
        (Wait(2000), ""),
        (Stop(1), "certificate 100 spent 2250000 unused 97750000"),
        (Status(1), "ended BootTimeout spent 2250000 left 97750000 burn 0 for 0 s"),
        (Boot(2), "Expired"),
    ]);
    // As long as it acknowledges what comes in, it may take its time.
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Pay(1, 100), "paid 100 left 100000000"),
        (Wait(200_000), ""),
        (Status(1), "booting None spent 4992384 left 95007616 burn 25010 for 3798 s"),
    ]);
}

#[test]
fn memory_and_addresses_are_given_out_once() {
    let held = held_mib(128);
    let config = Config { mem_mib: 2 * held, ..config() };
    check_in(
        Bench::new(config),
        &[
            (BootOf(1, 512), "NoMemory"),
            (Boot(1), "booted .2 with 3000000"),
            (BootOf(1, 129), "BadLimits"),
            (BootOf(2, 129), "NoMemory"),
            (Boot(2), "booted .3 with 3000000"),
            (Boot(3), "NoMemory"),
            (Stop(1), "certificate 3 spent 0 unused 3000000"),
            (Boot(3), "booted .4 with 3000000"),
        ],
    );
    let mut bench = Bench::new(Config { mem_mib: u32::MAX / 2, ..self::config() });
    bench.make(Boot(1));
    bench.boot(BootToken { job: [2; 16], ..samples::token(1) });
    assert!(bench.heard.ends_with("BadLimits "), "{}", bench.heard);
}

#[test]
fn a_full_node_says_so_and_has_room_again() {
    let mut bench = Bench::new(Config { mem_mib: u32::MAX / 2, ..config() });
    for job in 0..SLOTS_MAX as u8 {
        assert!(bench.make(Boot(job)).starts_with("booted"), "job {job}");
    }
    check_in(
        bench,
        &[
            (Boot(254), "NoRoom"),
            (Stop(100), "certificate 3 spent 0 unused 3000000"),
            (Boot(254), "booted .102 with 3000000"),
        ],
    );
}

#[test]
fn a_vm_that_cannot_be_made_costs_nothing() {
    let mut bench = Bench::new(config());
    bench.fails_to_create = true;
    check_in(
        bench,
        &[
            (Boot(1), "NodeFault"),
            (Boot(1), "Ended"),
            (Stop(1), "certificate 3 spent 0 unused 3000000"),
        ],
    );
}

#[test]
fn records_are_kept_for_an_hour() {
    check(&[
        (Boot(1), "booted .2 with 3000000"),
        (Stop(1), "certificate 3 spent 0 unused 3000000"),
        (Wait(3_590_000), ""),
        (Stop(1), "certificate 3 spent 0 unused 3000000"),
        (Wait(80_000), ""),
        (Stop(1), "NoJob"),
        // Nobody can show the boot token again.
        (Boot(1), "Expired"),
    ]);
}

#[test]
fn the_guest_sees_its_meter() {
    let mut bench = Bench::new(config());
    bench.make(Boot(1));
    bench.make(Says(1, Vmm::Resumed));
    bench.make(Wait(3000));
    let seen = bench.vms[&bench.slot(1)].meter;
    assert_eq!(seen.stage, onde_wire::machine::Stage::Running);
    assert_eq!(seen.balance_micro, 2_938_328);
    bench.make(Pay(1, 4));
    assert_eq!(bench.vms[&bench.slot(1)].meter.balance_micro, 3_938_328);
}

#[test]
fn a_request_for_another_job_than_its_token_is_dropped() {
    let mut bench = Bench::new(config());
    let request = Request::Boot(samples::token(1), [0; 32]);
    let packet = request.emit(7, &[2; 16], &job_key(2));
    bench.step(Event::Packet([2; COOKIE_SIZE], packet));
    assert_eq!(bench.heard, "");
    assert!(bench.vms.is_empty());
}

#[test]
fn the_broker_is_answered_under_its_own_key() {
    let mut bench = Bench::new(config());
    bench.make(Boot(1));
    let key = Party::Owner.key(&Key::new(&config().node_key), &[1; 16]);
    let mut answered = 0;
    for request in [Request::Status, Request::Stop(false)] {
        let packet = request.emit_as(Party::Owner, 7, &[1; 16], &key);
        let event = Event::Packet([0; COOKIE_SIZE], packet);
        for effect in bench.node.step(bench.now_ms, event) {
            let Effect::Reply(_, reply) = effect else { continue };
            assert!(Reply::parse(&reply, request.op(), 7, Some(&key)).is_some());
            assert!(Reply::parse(&reply, request.op(), 7, Some(&job_key(1))).is_none());
            answered += 1;
        }
    }
    assert!(answered > 0);
}

impl Dice {
    /// Any move that makes sense to somebody.
    fn a_move(&mut self, bench: &Bench) -> Move {
        let job = self.throw(12) as u8;
        let lives = bench.vms.values().any(|vm| vm.job == job);
        match self.throw(19) {
            0 | 1 => Boot(job),
            16 => BootTemplate(job),
            17 | 18 => BootClone(job, self.throw(12) as u8, 8),
            2 => Pay(job, self.throw(40) as u32),
            3 => PayWrong(job, self.throw(40) as u32),
            4 => Status(job),
            5 => Stop(job),
            6 if lives => Says(job, Vmm::Resumed),
            7 if lives => {
                Says(job, [Vmm::PowerOff, Vmm::Reset, Vmm::Fault(1)][self.throw(3) as usize])
            }
            8 if lives => GuestPays(job, self.throw(40) as u32),
            9 if lives => Busy(job),
            10 if lives => Dies(job),
            11 => Console(job, self.throw(6000)),
            12 => Suspend(job),
            13 => Wake(job),
            14 if lives => Says(job, [Vmm::Saved, Vmm::NotSaved][self.throw(2) as usize]),
            15 => Stall(self.throw(9000)),
            _ => Wait(self.throw(3000)),
        }
    }
}

#[test]
fn whatever_happens_no_change_is_lost() {
    for seed in 0..60 {
        let disk_mib = [0, 300, 2000][seed as usize % 3];
        let config = Config { disk_mib, ..config() };
        let (mut dice, mut bench) = (Dice(seed), Bench::new(config));
        let mut certificates = BTreeMap::new();
        let mut moves = Vec::new();
        for _ in 0..150 {
            let the_move = dice.a_move(&bench);
            moves.push(the_move);
            // The promises are checked inside; a panic there shows the seed here.
            let made = std::panic::AssertUnwindSafe(|| bench.make(the_move));
            let heard = std::panic::catch_unwind(made)
                .unwrap_or_else(|_| panic!("seed {seed}, moves {moves:?}"));
            if let Some(certificate) = heard.strip_prefix("certificate").map(str::to_owned)
                && let Stop(job) = the_move
            {
                let first = certificates.entry(job).or_insert_with(|| certificate.clone());
                assert_eq!(*first, certificate, "two certificates, seed {seed}, {moves:?}");
            }
        }
    }
}
