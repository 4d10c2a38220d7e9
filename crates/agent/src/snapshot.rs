//! Copies the whole running machine into a checkpoint stream: all memory, then, round by round, what was written
//! meanwhile and what there is on its disk, and at last, from the instant at which the VMM froze it, the rest and the machine state. The guest
//! goes on all the time but for that instant, and whatever fails leaves it as it was.
//!
//! ```text
//!  TRACK -> all memory -> HARVEST -> what was written -> ... -> FREEZE -> the rest, the state
//!               ^ written again later: sent again later, and the later record wins
//! ```
//! FREEZE returns twice, as fork() does: here, and in every machine that is made of the stream.

use onde_client::stream::RUN_MAX;
use onde_wire::machine::control::{
    REG_ABORT, REG_FREEZE, REG_HARVEST, REG_TRACK, RESULT_OK, RESULT_TOO_MANY, ROLE_FORKED,
    ROLE_MOVED,
};
use onde_wire::machine::{
    BITMAP_START, FROZEN_PAGES_MAX, FROZEN_START, Frozen, MIRROR_START, PAGE_SIZE, Space,
};
use onde_wire::session::{Round, Taken};
use onde_wire::stream::Start;
use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::machine::Machine;

/// So few pages that another round would hardly make them fewer: the copying itself writes some.
const FEWEST: u64 = 64;
/// Few enough pages to stand still for where another round does not make them fewer: such a round may be the last one.
pub const FEW: u64 = 1024;
/// Pages that are frozen if rounds do not get smaller: FREEZE takes a third more.
const MANY: u64 = FROZEN_PAGES_MAX / 4 * 3;
/// Rounds without progress before that is accepted.
const PATIENCE: u32 = 3;
/// Rounds in all: with a quarter less in each, the largest machine is down to few long before.
const ROUNDS_MAX: u32 = 64;
/// Pages that are read at once: what makes two records.
const PAGES_MAX: u64 = 2 * RUN_MAX / PAGE_SIZE;
/// The same in a round that may be the last one: what they are read into and packed into has to be copied again.
const RUN_OF_FEW: u64 = 4;

/// Where a copy's memory goes. An error ends the copy.
pub trait Sink {
    /// Says that a round begins.
    fn round(&mut self, round: Round) -> io::Result<()>;
    /// Takes memory from `address` on, whole pages.
    fn memory(&mut self, address: u64, bytes: &[u8]) -> io::Result<()>;
    /// Says that the machine's programs stand still from here on, though it is not frozen yet.
    fn stopping(&mut self) {}
    /// Says that the machine is about to be frozen: nothing else leaves it from here on.
    fn freezing(&mut self) {}
    /// Says that it is frozen and stays so: what goes on in it nobody hears of. Not said in the copy.
    fn frozen(&mut self) {}
}

/// In which machine [`take`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// In the one that was copied; all memory is sent, and this state is the rest.
    Source(Taken, Vec<u8>),
    /// In the copy. The programs of one that was forked stand still.
    Copy,
}

/// Why there is no copy.
#[derive(Debug)]
pub enum Failed {
    /// Whoever it was for is gone.
    Sink(io::Error),
    /// The machine, in words.
    Machine(String),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Failed::Sink(error)
    }
}

fn machine_failed(error: io::Error) -> Failed {
    Failed::Machine(format!("the guest cannot read its own memory: {error}"))
}

fn programs_run(error: io::Error) -> Failed {
    Failed::Machine(format!("the guest's programs do not stand still: {error}"))
}

/// What the copy is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Another machine: this one goes on at once.
    Forked,
    /// This machine: it stays frozen, until [`undo`] or COMMIT. Its programs go on in both, and only the copy's are heard.
    Moved,
}

/// Copies `machine`, which is `start`, to `sink`.
pub fn take<M: Machine>(
    machine: &mut M,
    start: &Start,
    sink: &mut impl Sink,
    role: Role,
) -> Result<Outcome, Failed> {
    match machine.command(REG_TRACK, 1) {
        RESULT_OK => {}
        result => return Err(refused("track its memory", result)),
    }
    let mut copy = Copy {
        machine,
        sink,
        start,
        role,
        buffer: Vec::new(),
        round: 0,
        stopped: None,
        is_frozen: false,
    };
    let result = copy.all().and_then(|()| copy.until_few()).and_then(|()| copy.freeze());
    match &result {
        // A copy has time for nothing, and its VMM never tracked anything.
        Ok(Outcome::Copy) => {}
        Ok(Outcome::Source(..)) if copy.is_frozen => {}
        Err(_) if copy.is_frozen => undo(copy.machine),
        _ => {
            // Nothing to be done about a machine that refuses this.
            copy.machine.command(REG_TRACK, 0);
            if result.is_err() {
                copy.start_programs();
            }
        }
    }
    result
}

/// Goes on as if nothing had been copied.
pub fn undo(machine: &mut impl Machine) {
    // Nothing to be done about a machine that refuses these.
    machine.command(REG_ABORT, 1);
    machine.command(REG_TRACK, 0);
    machine.start_programs();
}

fn refused(what: &str, result: u32) -> Failed {
    Failed::Machine(format!("this guest's VMM does not {what} (result {result})"))
}

/// A copy under way.
struct Copy<'a, M, S> {
    machine: &'a mut M,
    sink: &'a mut S,
    start: &'a Start,
    role: Role,
    buffer: Vec<u8>,
    round: u32,
    /// Since when its programs stand still.
    stopped: Option<Instant>,
    /// Whether this machine stays frozen.
    is_frozen: bool,
}

impl<M: Machine, S: Sink> Copy<'_, M, S> {
    fn begin_round(&mut self, pages: u64) -> Result<(), Failed> {
        let round = Round { number: self.round, pages };
        self.round += 1;
        Ok(self.sink.round(round)?)
    }

    /// Sends all memory but what is free: if it is taken later, it is written then.
    fn all(&mut self) -> Result<(), Failed> {
        let pages = self.start.space.ram_pages();
        self.begin_round(pages)?;
        let mut are_free = [false; PAGES_MAX as usize];
        for first in (0..pages).step_by(PAGES_MAX as usize) {
            let chunk = first..pages.min(first + PAGES_MAX);
            let are_free = &mut are_free[..(chunk.end - first) as usize];
            self.machine.are_free(self.start.space.address(first) / PAGE_SIZE, are_free);
            let used = chunk.zip(are_free).filter(|(_, is_free)| !**is_free).map(|(page, _)| page);
            for run in runs(self.start.space, used, PAGES_MAX) {
                self.send(run)?;
            }
        }
        Ok(())
    }

    /// Sends pages, counted as in the bitmap, as they are now.
    fn send(&mut self, run: Range<u64>) -> Result<(), Failed> {
        let at = self.start.space.address(run.start);
        let size = (run.end - run.start) * PAGE_SIZE;
        self.pass_on(at, MIRROR_START + at, size as usize)
    }

    /// Sends what a window has at `from` as memory from `at` on.
    fn pass_on(&mut self, at: u64, from: u64, size: usize) -> Result<(), Failed> {
        self.buffer.resize(self.buffer.len().max(size), 0);
        let bytes = &mut self.buffer[..size];
        self.machine.read(from, bytes).map_err(machine_failed)?;
        Ok(self.sink.memory(at, bytes)?)
    }

    /// Leaves nothing of what was read in memory, where it would be copied, too.
    fn wipe(&mut self) {
        self.buffer.fill(0);
        self.buffer.clear();
    }

    /// Sends what was written until that is little enough to freeze.
    fn until_few(&mut self) -> Result<(), Failed> {
        let (mut least, mut stuck) = (u64::MAX, 0);
        while self.round < ROUNDS_MAX {
            let pages = self.again()?;
            // Less by a quarter is progress.
            stuck = if pages < least / 4 * 3 { 0 } else { stuck + 1 };
            least = least.min(pages);
            let enough = match stuck {
                0 => FEWEST,
                1..PATIENCE => FEW,
                PATIENCE.. => MANY,
            };
            if pages <= enough {
                return Ok(());
            }
            if stuck == PATIENCE {
                // A longer pause, but an end: nothing but the kernel writes any more.
                self.stop_programs()?;
            }
            if stuck >= 2 * PATIENCE {
                break;
            }
        }
        Err(self.too_busy(least))
    }

    fn stop_programs(&mut self) -> Result<(), Failed> {
        if self.stopped.is_none() {
            self.sink.stopping();
            self.stopped = Some(Instant::now());
            self.machine.stop_programs().map_err(programs_run)?;
        }
        Ok(())
    }

    fn start_programs(&mut self) {
        if self.stopped.take().is_some() {
            self.machine.start_programs();
        }
    }

    fn too_busy(&self, pages: u64) -> Failed {
        let mib = pages.saturating_mul(PAGE_SIZE) >> 20;
        Failed::Machine(format!(
            "the guest writes its memory faster than it can be copied: {mib} MiB and more in each of {} rounds",
            self.round
        ))
    }

    /// A round: sends what was written since the one before; how many pages that was.
    fn again(&mut self) -> Result<u64, Failed> {
        match self.machine.command(REG_HARVEST, 1) {
            RESULT_OK => {}
            result => return Err(refused("say what was written", result)),
        }
        let pages = self.start.space.pages();
        let mut bitmap = vec![0; self.start.space.bitmap_size() as usize];
        self.machine.read(BITMAP_START, &mut bitmap).map_err(machine_failed)?;
        let is_set = |page: &u64| bitmap[(page / 8) as usize] >> (page % 8) & 1 == 1;
        let count = (0..pages).filter(is_set).count() as u64;
        self.wipe();
        self.begin_round(count)?;
        let longest = if count <= FEW { RUN_OF_FEW } else { PAGES_MAX };
        for run in runs(self.start.space, (0..pages).filter(is_set), longest) {
            self.send(run)?;
        }
        Ok(count)
    }

    /// Stops the machine for an instant, and sends what is left of it.
    fn freeze(&mut self) -> Result<Outcome, Failed> {
        while self.round < ROUNDS_MAX {
            self.machine.let_go();
            // Mapped now, and not while the network stands still.
            self.machine.read(FROZEN_START, &mut [0; 8]).map_err(machine_failed)?;
            self.sink.freezing();
            self.wipe();
            let role = match self.role {
                Role::Forked => {
                    // None of them runs in the copy until the copy is somebody else and lets it.
                    self.stop_programs()?;
                    ROLE_FORKED
                }
                // The copy is this machine: whatever runs goes on there, at once.
                Role::Moved => ROLE_MOVED,
            };
            let begun = self.stopped.unwrap_or_else(Instant::now);
            let result = self.machine.command(REG_FREEZE, role);
            // A copy of a copy has its source's role too; only the job tells them apart.
            let identity = self.machine.identity().map_err(machine_failed);
            if identity.as_ref().is_ok_and(|identity| identity.job != self.start.job) {
                return Ok(Outcome::Copy);
            }
            if self.role == Role::Forked && result == RESULT_OK {
                self.start_programs();
            }
            let pause_us = begun.elapsed().as_micros() as u64;
            match result {
                RESULT_OK => {
                    self.is_frozen = self.role == Role::Moved;
                    if self.is_frozen {
                        self.sink.frozen();
                    }
                    let saved = self.saved();
                    if !self.is_frozen {
                        self.machine.command(REG_ABORT, 1);
                    }
                    identity?;
                    return self.finish(saved?, pause_us);
                }
                RESULT_TOO_MANY => {
                    self.stop_programs()?;
                    self.again()?;
                }
                result => return Err(refused("freeze", result)),
            }
        }
        Err(self.too_busy(FROZEN_PAGES_MAX))
    }

    /// What FREEZE saved.
    fn saved(&mut self) -> Result<Saved, Failed> {
        let malformed = || Failed::Machine("this guest's VMM saved what makes no sense".to_owned());
        let mut head = [0; Frozen::SIZE];
        self.machine.read(FROZEN_START, &mut head).map_err(machine_failed)?;
        let frozen = Frozen::parse(&head).ok_or_else(malformed)?;
        let mut read = |offset, size| {
            let mut bytes = vec![0; size as usize];
            let read = self.machine.read(FROZEN_START + offset, &mut bytes);
            read.map(|()| bytes).map_err(machine_failed)
        };
        let state = read(frozen.state_at(), frozen.state_size)?;
        let list = read(frozen.addresses_at(), 8 * frozen.page_count)?;
        let addresses: Vec<_> =
            list.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let are_good = addresses.iter().all(|&address| {
            address.is_multiple_of(PAGE_SIZE) && self.start.space.holds(address, PAGE_SIZE)
        });
        if !are_good {
            return Err(malformed());
        }
        // One that goes on at once keeps them; one that stands still has the window for as long as it does, and no time.
        let pages = match self.role {
            Role::Forked => read(frozen.pages_at(), PAGE_SIZE * frozen.page_count)?,
            Role::Moved => Vec::new(),
        };
        Ok(Saved { frozen, state, addresses, pages })
    }

    /// Sends what FREEZE saved.
    fn finish(&mut self, saved: Saved, pause_us: u64) -> Result<Outcome, Failed> {
        let Saved { frozen, state, addresses, pages } = saved;
        let frozen_pages = frozen.page_count;
        self.begin_round(frozen_pages)?;
        let mut at = 0;
        for run in addresses.chunk_by(|one, next| one + PAGE_SIZE == *next) {
            for part in run.chunks(PAGES_MAX as usize) {
                let bytes = at..at + part.len() * PAGE_SIZE as usize;
                at = bytes.end;
                match self.role {
                    Role::Forked => self.sink.memory(part[0], &pages[bytes])?,
                    Role::Moved => {
                        let window = FROZEN_START + frozen.pages_at() + bytes.start as u64;
                        self.pass_on(part[0], window, bytes.len())?;
                    }
                }
            }
        }
        Ok(Outcome::Source(Taken { pause_us, frozen_pages }, state))
    }
}

/// What FREEZE saved: the rest of the machine.
struct Saved {
    frozen: Frozen,
    state: Vec<u8>,
    addresses: Vec<u64>,
    /// Those of a machine that went on already.
    pages: Vec<u8>,
}

/// Pages in rising order as runs, each of one piece of `space` and none longer than `longest`.
fn runs(
    space: Space,
    pages: impl Iterator<Item = u64>,
    longest: u64,
) -> impl Iterator<Item = Range<u64>> {
    let mut pages = pages.peekable();
    std::iter::from_fn(move || {
        let start = pages.next()?;
        let mut run = start..start + 1;
        let first = space.address(start);
        let goes_on = |run: &Range<u64>, page: u64| {
            let size = (page - start) * PAGE_SIZE;
            page == run.end && page - start < longest && space.address(page) == first + size
        };
        while pages.next_if(|&page| goes_on(&run, page)).is_some() {
            run.end += 1;
        }
        Some(run)
    })
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
