//! The kernel's side of the node: does what [`crate::node`] wants done and says what came of it. Called by
//! [`crate::run`]. Holds VMs as things, and jobs as names of their files: no payment and no price is known here.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use onde_wire::handover::Handover;
use onde_wire::machine::{VmmCommand, VmmEvent};
use onde_wire::plan::VMS_MAX;
use onde_wire::token::JobId;
use rustix::event::epoll;
use rustix::process::Pid;

use crate::cgroup::Cgroup;
use crate::files::Files;
use crate::node::{Effect, Event, Spec, Start, Tail};
use crate::packetd::Packetd;
use crate::vm::{Network, Place, Vm, VmError};

/// Words of one VMM taken in one turn of the loop; the rest wait, so that no VM keeps others from being heard.
const WORDS_PER_TURN: usize = 4;

/// Words taken of a VMM that is dead: more than one that is right leaves behind.
const LAST_WORDS_MAX: usize = 64;

/// Numbers of VMs before they start again: with `onde-` before it the last one still is an interface's name.
const SERIALS: u32 = 1_000_000_000;

/// A thread that closes taps: each close waits for some grace periods of the kernel (tens of milliseconds in an
/// emulated node), and the loop has better things to do.
struct Undertaker {
    queue: Option<Sender<Network>>,
    thread: Option<JoinHandle<()>>,
}

impl Undertaker {
    fn start() -> io::Result<Self> {
        let (queue, taps) = std::sync::mpsc::channel();
        let bury = move || taps.into_iter().for_each(drop);
        // The queue is as long as the VMs that die at once, and there are only so many slots.
        let thread = std::thread::Builder::new().name("undertaker".into()).spawn(bury)?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    fn take(&self, network: Network) {
        // Without the thread, which only a bug could end, it is closed here.
        let _ = self.queue.as_ref().map(|queue| queue.send(network));
    }
}

impl Drop for Undertaker {
    fn drop(&mut self) {
        // The thread ends when its queue does; all taps are gone then.
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a poll event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Signals wait.
    Signals,
    /// `packetd` spoke.
    Packetd,
    /// The VMM of this slot spoke.
    Control(u32),
    /// The VMM of this slot logged something.
    Log(u32),
}

impl Source {
    fn emit(self) -> u64 {
        match self {
            Source::Signals => 0,
            Source::Packetd => 1,
            Source::Control(slot) => 2 | u64::from(slot) << 32,
            Source::Log(slot) => 3 | u64::from(slot) << 32,
        }
    }

    /// Reads what [`epoll::wait`] gives back.
    pub fn parse(data: u64) -> Self {
        let slot = (data >> 32) as u32;
        match data as u32 {
            0 => Source::Signals,
            1 => Source::Packetd,
            2 => Source::Control(slot),
            _ => Source::Log(slot),
        }
    }
}

/// The kernel objects of a node.
pub struct World {
    place: Place,
    vms: Vec<Option<Vm>>,
    /// What VMs write to, those that are not there at present, too.
    files: BTreeMap<JobId, Files>,
    /// Number of the next VM: names of taps and cgroups are not used again while the kernel may know the old ones.
    serial: u32,
    /// Cgroups of VMs that are gone, while the kernel still holds on to them.
    dying: Vec<Cgroup>,
    undertaker: Undertaker,
    poll: OwnedFd,
    /// The program that speaks with the network.
    pub packetd: Packetd,
}

impl World {
    /// A world without VMs.
    pub fn new(place: Place, packetd: Packetd) -> io::Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let vms = (0..VMS_MAX).map(|_| None).collect();
        let undertaker = Undertaker::start()?;
        let (files, dying) = (BTreeMap::new(), Vec::new());
        Ok(Self { place, vms, files, serial: 0, dying, undertaker, poll, packetd })
    }

    /// Has the loop told when there is something to read.
    pub fn watch(&self, fd: BorrowedFd<'_>, source: Source) -> io::Result<()> {
        let data = epoll::EventData::new_u64(source.emit());
        Ok(epoll::add(&self.poll, fd, data, epoll::EventFlags::IN)?)
    }

    /// What to poll.
    pub fn poll(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }

    /// The folder of VMs' cgroups.
    pub fn cgroups(&self) -> &std::path::Path {
        self.place.cgroups.folder()
    }

    /// Whether no VM's process is left.
    pub fn is_empty(&self) -> bool {
        self.vms.iter().all(Option::is_none)
    }

    /// Whether nothing at all is held for anybody.
    pub fn holds_nothing(&self) -> bool {
        self.is_empty() && self.files.is_empty()
    }

    /// Kills every VM.
    pub fn kill_all(&self) {
        self.vms.iter().flatten().for_each(Vm::kill);
    }

    /// Does one thing, and returns the event that it has at once.
    pub fn apply(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Reply(cookie, packet) => {
                self.packetd.tell(&Handover::Down(cookie, packet));
                None
            }
            Effect::Create(slot, spec) => {
                let made = self.create(slot, &spec).map(|vm| self.add(slot, vm));
                if let Err(VmError(what, error)) = &made {
                    println!("onde: slot {slot}: cannot make its {what}: {error}");
                }
                Some(Event::Created(slot, made.is_ok()))
            }
            Effect::Kill(slot) => {
                self.vm(slot)?.kill();
                None
            }
            Effect::Forget(job) => {
                self.files.remove(&job);
                None
            }
            Effect::Empty(slot) => {
                self.empty(slot);
                None
            }
            Effect::Read(slot) => match self.vm(slot)?.read() {
                Ok(reading) => Some(Event::Read(slot, reading)),
                Err(error) => {
                    // The node's fault: what was used since the last charge is not charged.
                    println!("onde: slot {slot}: cannot read its counters: {error}");
                    Some(Event::Read(slot, crate::meter::Reading::default()))
                }
            },
            Effect::ReadConsole(slot, offset, caller) => {
                let slice = self.vm(slot)?.console(offset).ok()?;
                Some(Event::Console(caller, slice))
            }
            Effect::Publish(slot, meter) => {
                let _ = self.vm(slot)?.publish(&meter);
                None
            }
            Effect::Command(slot, command) => {
                let vm = self.vm(slot)?;
                if command == VmmCommand::Save {
                    say(slot, "swap", vm.swap(true));
                }
                vm.tell(command);
                None
            }
            Effect::Note(job, note) => {
                let [a, b, c, d, ..] = job;
                println!("onde: job {a:02x}{b:02x}{c:02x}{d:02x}: {note}");
                None
            }
        }
    }

    fn vm(&mut self, slot: u32) -> Option<&mut Vm> {
        self.vms.get_mut(slot as usize)?.as_mut()
    }

    /// Makes a VM with new files, with those that it had before, or with its template's.
    fn create(&mut self, slot: u32, spec: &Spec) -> Result<Vm, VmError> {
        let job = spec.identity.job;
        let none = || VmError("files", io::ErrorKind::NotFound.into());
        let files = match spec.start {
            Start::Loader => Some(Files::new(spec)),
            Start::Template(template) => {
                Some(self.files.get(&template).ok_or_else(none)?.of_clone())
            }
            Start::Saved => None,
        };
        if let Some(files) = files {
            self.files.insert(job, files.map_err(|error| VmError("files", error))?);
        }
        let files = self.files.get(&job).ok_or_else(none)?;
        self.serial = (self.serial + 1) % SERIALS;
        Vm::create(&self.place, self.serial, slot, spec, files)
    }

    /// A VM's machine is in memory only.
    fn empty(&mut self, slot: u32) {
        let Some(vm) = self.vms.get(slot as usize).and_then(Option::as_ref) else { return };
        say(slot, "swap", vm.swap(false));
        if let Some(files) = self.files.get(&vm.job) {
            say(slot, "saved machine", files.empty());
        }
    }

    fn add(&mut self, slot: u32, vm: Vm) {
        let watched = self
            .watch(vm.control.as_fd(), Source::Control(slot))
            .and_then(|()| self.watch(vm.log.as_fd(), Source::Log(slot)));
        if let Err(error) = watched {
            // It goes the way of every VM whose process dies: we have to wait for that in any case.
            println!("onde: slot {slot}: cannot listen to its vmm: {error}");
            vm.kill();
        }
        self.vms[slot as usize] = Some(vm);
    }

    /// The events that a VMM has for us, a few at a time.
    pub fn hear(&mut self, slot: u32) -> Vec<VmmEvent> {
        let mut events = Vec::new();
        let Some(Some(vm)) = self.vms.get(slot as usize) else { return events };
        for _ in 0..WORDS_PER_TURN {
            match vm.hear() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(_) => {
                    // Closed, or nonsense: it is not listened to any more. If it lives on, its guest keeps on
                    // paying by packets; if not, we are told of its death.
                    let _ = epoll::delete(&self.poll, &vm.control);
                    break;
                }
            }
        }
        events
    }

    /// Prints what a VMM logged since the last time; whether there can be more now.
    pub fn print_log(&mut self, slot: u32) -> bool {
        let Some(Some(vm)) = self.vms.get_mut(slot as usize) else { return false };
        match vm.log_text() {
            Ok(Some(text)) => {
                text.lines().for_each(|line| println!("onde: slot {slot}: vmm: {line}"));
                true
            }
            Ok(None) => {
                let _ = epoll::delete(&self.poll, &vm.log);
                false
            }
            // News of a VM that had this slot before.
            Err(_) => false,
        }
    }

    /// A child was waited for: frees all that a VM held if it was one's process. Its last words come first: they say
    /// whether its machine is on disk.
    pub fn buried(&mut self, pid: Pid) -> Vec<Event> {
        let is_its = |vm: &Option<Vm>| vm.as_ref().is_some_and(|vm| vm.pid == pid);
        let Some(slot) = self.vms.iter().position(is_its) else { return vec![] };
        // Ends: the only writer is dead, and a pipe holds 64 KiB.
        while self.print_log(slot as u32) {}
        let mut events = Vec::new();
        // Ends: as above, and nobody hears of more than so many.
        while events.len() < LAST_WORDS_MAX {
            let heard = self.hear(slot as u32);
            if heard.is_empty() {
                break;
            }
            events.extend(heard.into_iter().map(|event| Event::Vmm(slot as u32, event)));
        }
        let Some(vm) = self.vms[slot].take() else { return vec![] };
        if vm.is_out_of_memory() {
            events.insert(0, Event::OutOfMemory(slot as u32));
        }
        let tail = vm.console_end().map_or(Tail::default(), |slice| Tail {
            total: slice.total,
            bytes: slice.data[..slice.len.into()].to_vec(),
        });
        let saved_mib = self.files.get(&vm.job).map_or(0, Files::saved_mib);
        let (network, cgroup) = vm.free();
        self.dying.extend(cgroup);
        self.undertaker.take(network);
        events.push(Event::Gone(slot as u32, tail, saved_mib));
        events
    }

    /// Removes cgroups that the kernel has let go of by now.
    pub fn sweep(&mut self) {
        self.dying.retain(|cgroup| !cgroup.remove());
    }
}

/// A part that could not be done, and that a VM can live without.
fn say(slot: u32, what: &str, done: io::Result<()>) {
    if let Err(error) = done {
        println!("onde: slot {slot}: {what}: {error}");
    }
}
