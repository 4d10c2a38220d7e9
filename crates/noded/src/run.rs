//! The loop: one thread, one poll. Joins [`crate::node`] (what shall be) and [`crate::world`] (what is), keeps the
//! clock, reaps children. Called by `main`; returns when a signal says so and all VMs are gone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use onde_sys::signals::Signals;
use onde_wire::handover::Handover;
use onde_wire::machine::VmmEvent;
use rustix::event::{Timespec, epoll};
use rustix::process::{Pid, WaitOptions, WaitStatus};
use rustix::time::ClockId;

use crate::inventory::Inventory;
use crate::node::{Event, Node};
use crate::world::{Source, World};

/// How often `packetd` gets a fresh answer to HELLO.
const HELLO_MS: u64 = 1000;
/// Requests taken in one turn of the loop; the rest wait, so that charges are never late.
const REQUESTS_PER_TURN: usize = 64;
/// How long the end waits for VMs to die.
const END_MS: u64 = 5000;

// Numbers that are the same on every architecture (signal(7)).
const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const SIGCHLD: i32 = 17;

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Told to stop: SIGTERM.
    Stop,
    /// Told to start again: SIGINT, which Ctrl-Alt-Del sends to a first process.
    Restart,
}

/// Milliseconds since this machine booted.
pub fn uptime_ms() -> u64 {
    let time = rustix::time::clock_gettime(ClockId::Boottime);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Blocks the signals that the loop reads. Call it before the first child is started.
pub fn block_signals() -> io::Result<Signals> {
    Signals::block(&[SIGINT, SIGTERM, SIGCHLD])
}

/// A node and its world.
pub struct Loop {
    node: Node,
    world: World,
    signals: Signals,
    inventory: Inventory,
    hello_ms: u64,
    is_ready: bool,
    /// Why it ends, and when it ends even if VMs are left.
    ending: Option<(Outcome, u64)>,
}

impl Loop {
    /// Joins them.
    pub fn new(node: Node, world: World, signals: Signals) -> io::Result<Self> {
        world.watch(signals.as_fd(), Source::Signals)?;
        let inventory = Inventory::new(world.cgroups());
        Ok(Self { node, world, signals, inventory, hello_ms: 0, is_ready: false, ending: None })
    }

    /// Runs until a signal ends it.
    pub fn run(&mut self) -> io::Result<Outcome> {
        let mut ready = Vec::with_capacity(64);
        loop {
            let now_ms = uptime_ms();
            if let Some((outcome, until_ms)) = self.ending
                && (self.world.is_empty() || now_ms >= until_ms)
            {
                self.world.packetd.kill();
                return Ok(outcome);
            }
            self.keep_time(now_ms);
            let timeout = timespec(self.wake_ms().saturating_sub(uptime_ms()));
            ready.clear();
            let buffer = rustix::buffer::spare_capacity(&mut ready);
            match epoll::wait(self.world.poll(), buffer, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            for event in &ready {
                self.serve(Source::parse(event.data.u64()))?;
            }
        }
    }

    /// The next moment that something is due.
    fn wake_ms(&self) -> u64 {
        let times = [
            self.node.wake_ms(),
            self.world.packetd.wake_ms().filter(|_| self.ending.is_none()),
            self.ending.map(|(_, until_ms)| until_ms),
        ];
        times.into_iter().flatten().fold(self.hello_ms, u64::min)
    }

    fn keep_time(&mut self, now_ms: u64) {
        let is_restart_due = self.world.packetd.wake_ms().is_some_and(|due| due <= now_ms);
        if is_restart_due && self.ending.is_none() {
            self.start_packetd(now_ms);
        }
        if now_ms >= self.hello_ms {
            self.hello_ms = now_ms + HELLO_MS;
            self.world.sweep();
            self.step(Event::Timer);
            self.world.packetd.tell(&Handover::Hello(self.node.hello(now_ms)));
            if self.is_ready && self.world.holds_nothing() {
                self.inventory.look();
            }
        } else if self.node.wake_ms().is_some_and(|due| due <= now_ms) {
            self.step(Event::Timer);
        }
    }

    fn start_packetd(&mut self, now_ms: u64) {
        let started = self.world.packetd.start(now_ms).and_then(|()| {
            let socket = self.world.packetd.socket().expect("it was started");
            self.world.watch(socket.as_fd(), Source::Packetd)
        });
        if let Err(error) = started {
            println!("onde: cannot start packetd: {error}");
            return;
        }
        self.world.packetd.tell(&Handover::Hello(self.node.hello(now_ms)));
        if !self.is_ready {
            self.is_ready = true;
            println!("onde: node ready");
        }
    }

    fn serve(&mut self, source: Source) -> io::Result<()> {
        match source {
            Source::Signals => self.serve_signals()?,
            Source::Packetd => self.serve_packetd(),
            Source::Control(slot) => {
                for event in self.world.hear(slot) {
                    if let VmmEvent::Fault(code) = event {
                        println!("onde: slot {slot}: vmm cannot go on: fault {code}");
                    }
                    self.step(Event::Vmm(slot, event));
                }
            }
            Source::Log(slot) => {
                self.world.print_log(slot);
            }
        }
        Ok(())
    }

    fn serve_packetd(&mut self) {
        for _ in 0..REQUESTS_PER_TURN {
            match self.world.packetd.hear() {
                Ok(Some(Handover::Up(cookie, packet))) => self.step(Event::Packet(cookie, packet)),
                Ok(_) => return,
                Err(_) => {
                    // Its end is closed: whatever is left of it goes, and it is started again.
                    self.world.packetd.kill();
                    return;
                }
            }
        }
    }

    fn serve_signals(&mut self) -> io::Result<()> {
        // Ends: at most one signal of each number waits.
        while let Some(number) = self.signals.next()? {
            match number {
                SIGCHLD => self.reap(),
                SIGINT => self.end(Outcome::Restart),
                _ => self.end(Outcome::Stop),
            }
        }
        Ok(())
    }

    fn end(&mut self, outcome: Outcome) {
        if self.ending.is_none() {
            println!("onde: ending, and all VMs with it");
            self.ending = Some((outcome, uptime_ms() + END_MS));
            self.world.kill_all();
        }
    }

    /// Waits for every dead child: VMMs, `packetd`, and as first process whatever was left to us.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if self.world.packetd.pid() == Some(pid) {
                self.world.packetd.died();
                if self.ending.is_none() {
                    println!("onde: packetd ended ({}) and is started again", words(status));
                }
                continue;
            }
            let events = self.world.buried(pid);
            if !events.is_empty() {
                self.report(pid, status);
                self.inventory.disturb();
            }
            events.into_iter().for_each(|event| self.step(event));
        }
    }

    fn report(&self, pid: Pid, status: WaitStatus) {
        // 9 is how we end VMs.
        if status.exit_status() != Some(0) && status.terminating_signal() != Some(9) {
            println!("onde: vmm {} ended ({})", pid.as_raw_nonzero(), words(status));
        }
    }

    /// Tells the node, and does all that follows from it. Ends: only effects give rise to events here, and no
    /// event that an effect has at once leads to that effect again.
    fn step(&mut self, event: Event) {
        let mut effects: VecDeque<_> = self.node.step(uptime_ms(), event).into();
        while let Some(effect) = effects.pop_front() {
            if let Some(event) = self.world.apply(effect) {
                effects.extend(self.node.step(uptime_ms(), event));
            }
        }
    }
}

fn words(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => "unknown".into(),
    }
}

fn timespec(time_ms: u64) -> Timespec {
    Timespec { tv_sec: (time_ms / 1000) as i64, tv_nsec: (time_ms % 1000 * 1_000_000) as i64 }
}
