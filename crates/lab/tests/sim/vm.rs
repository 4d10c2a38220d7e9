//! A made-up VM: what it used up to any moment, through all of its processes and its time on disk. `metal` has them. It
//! knows nothing of what its node reckons.

use noded::meter::Reading;
use onde_wire::token::{BootToken, JobId};

use crate::metal::PRICES;
use crate::random::Random;

/// All that somebody has to pay for.
#[derive(Clone, Copy, Default)]
pub struct Use {
    cpu_us: u64,
    mem_mib_ms: u64,
    sent_bytes: u64,
    disk_mib_ms: u64,
}

impl Use {
    /// What it costs: price times meter, each part rounded down.
    pub fn cost_micro(&self) -> u64 {
        let part = |used: u64, price: u64, unit: u64| {
            (u128::from(used) * u128::from(price) / u128::from(unit)) as u64
        };
        part(self.cpu_us, PRICES.vcpu_s, 1_000_000)
            + part(self.mem_mib_ms, PRICES.gib_s, 1_024_000)
            + part(self.sent_bytes, PRICES.gib_sent, 1 << 30)
            + part(self.disk_mib_ms, PRICES.disk_gib_s, 1_024_000)
    }
}

/// How busy it is, a millisecond.
#[derive(Clone, Copy)]
struct Pace {
    cpu_us: u64,
    sent_bytes: u64,
}

/// A machine on a node's disk.
#[derive(Clone, Copy)]
pub struct Machine {
    past: Use,
    since_ms: u64,
    mib: u32,
    pace: Pace,
    /// What it came to when its node told it to end while it was being read.
    last: Option<Use>,
}

impl Machine {
    /// What it used until then.
    pub fn used(&self, uptime_ms: u64) -> Use {
        let time_ms = uptime_ms - self.since_ms;
        let disk_mib_ms = self.past.disk_mib_ms + time_ms * u64::from(self.mib);
        self.last.unwrap_or(Use { disk_mib_ms, ..self.past })
    }
}

/// A VM's process.
pub struct Vm {
    pub job: JobId,
    pub token: BootToken,
    born_ms: u64,
    pace: Pace,
    /// When it stopped running.
    pub killed_ms: Option<u64>,
    /// Whether its guest has its node's leave to run.
    pub runs: bool,
    /// The payment that its guest handed in and is not answered yet.
    pub paying: Option<u32>,
    past: Use,
    /// Since when it costs more than `past`; not while it is written or read.
    from_ms: Option<u64>,
    /// What it had used when its node looked last, and when that was.
    looked: (Use, u64),
    /// The machine that it reads.
    pub reads: Option<Machine>,
    /// Whether its VMM said that the machine is in its file.
    pub is_saved: bool,
}

impl Vm {
    /// A VM that was made just now: anew, or from what is on disk.
    pub fn new(
        token: BootToken,
        uptime_ms: u64,
        reads: Option<Machine>,
        random: &mut Random,
    ) -> Self {
        let cpu_us = random.between(0, 1000 * u64::from(token.vcpus));
        let new = Pace { cpu_us, sent_bytes: random.between(0, 50_000) };
        Self {
            job: token.job,
            token,
            born_ms: uptime_ms,
            pace: reads.map_or(new, |machine| machine.pace),
            killed_ms: None,
            runs: false,
            paying: None,
            past: Use::default(),
            from_ms: reads.is_none().then_some(uptime_ms),
            looked: (Use::default(), uptime_ms),
            reads,
            is_saved: false,
        }
    }

    fn end(&self, uptime_ms: u64) -> u64 {
        self.killed_ms.unwrap_or(uptime_ms)
    }

    /// Its kernel's counters, which count what the node does for itself, too.
    pub fn reading(&self, uptime_ms: u64) -> Reading {
        let age_ms = self.end(uptime_ms) - self.born_ms;
        Reading { cpu_us: age_ms * self.pace.cpu_us, sent_bytes: age_ms * self.pace.sent_bytes }
    }

    /// What it used until then.
    pub fn used(&self, uptime_ms: u64) -> Use {
        if let Some(machine) = &self.reads {
            return machine.used(self.end(uptime_ms));
        }
        let time_ms = self.from_ms.map_or(0, |from_ms| self.end(uptime_ms) - from_ms);
        Use {
            cpu_us: self.past.cpu_us + time_ms * self.pace.cpu_us,
            mem_mib_ms: self.past.mem_mib_ms + time_ms * u64::from(self.token.mem_mib),
            sent_bytes: self.past.sent_bytes + time_ms * self.pace.sent_bytes,
            ..self.past
        }
    }

    /// Its node looks at it.
    pub fn look(&mut self, uptime_ms: u64) -> Use {
        self.looked = (self.used(uptime_ms), uptime_ms);
        self.looked.0
    }

    /// Its node stood still since longer than it may: what was used since the last look is the node's affair.
    pub fn forgive(&mut self, uptime_ms: u64) {
        if self.from_ms.is_some() && self.killed_ms.is_none() {
            (self.past, self.from_ms) = (self.looked.0, Some(uptime_ms));
        }
    }

    /// Its VMM is told to write it to disk: it stands still.
    pub fn save(&mut self, uptime_ms: u64) {
        (self.past, self.from_ms) = (self.used(uptime_ms), None);
    }

    /// Its VMM says that its file holds it.
    pub fn saved(&mut self) {
        self.is_saved = self.from_ms.is_none() && self.reads.is_none();
    }

    /// Its file counts no more: it goes on.
    pub fn go_on(&mut self, uptime_ms: u64) {
        self.past = self.used(uptime_ms);
        (self.from_ms, self.reads, self.is_saved) = (Some(uptime_ms), None, false);
    }

    /// It is killed.
    pub fn kill(&mut self, uptime_ms: u64) {
        self.killed_ms = Some(uptime_ms);
        let (last, looked_ms) = self.looked;
        if let Some(machine) = &mut self.reads
            && looked_ms == uptime_ms
        {
            machine.last = Some(last);
        }
    }

    /// The machine that it leaves on disk, where it leaves one there that takes `mib` MiB.
    pub fn leaves(&self, uptime_ms: u64, mib: u32) -> Option<Machine> {
        let (past, pace) = (self.past, self.pace);
        let new = Machine { past, since_ms: uptime_ms, mib, pace, last: None };
        self.reads.or(self.is_saved.then_some(new))
    }
}
