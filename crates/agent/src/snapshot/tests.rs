//! Copies of a machine that goes on writing: what the stream restores is its memory at the instant of FREEZE, byte for
//! byte. The machine is a vector, its writes come from a seed.

use super::*;
use onde_client::stream::StreamWriter;
use onde_wire::machine::control::ROLE_SOURCE;
use onde_wire::machine::{COLD_SIZE, Identity, RAM_LOW_END, Space};
use onde_wire::stream::{Checker, HEAD_SIZE, Kind};
use std::collections::BTreeSet;
use std::io::Write;

pub const PAGES: u64 = 600;
pub const START: Start =
    Start { job: [1; 16], space: Space { mem_bytes: PAGES * PAGE_SIZE, disk_bytes: 0 }, vcpus: 1 };
pub const STATE: [u8; COLD_SIZE] = [0xA5; COLD_SIZE];

/// How a machine behaves.
#[derive(Clone, Copy, Debug)]
struct Habits {
    seed: u64,
    /// Pages written between any two commands or reads.
    writes: u64,
    /// The same while its programs stand still.
    unstopped: u64,
    /// Pages that are written at all: the first ones.
    hot: u64,
    /// Most pages that FREEZE takes.
    frozen_max: usize,
    /// FREEZE returns in the copy.
    is_copy: bool,
    /// What every command but TRACK 0 and ABORT results in.
    result: u32,
}

const QUIET: Habits = Habits {
    seed: 1,
    writes: 2,
    unstopped: 2,
    hot: PAGES,
    frozen_max: 4096,
    is_copy: false,
    result: RESULT_OK,
};

/// A machine in a vector.
struct Fake {
    habits: Habits,
    /// What its copy is to be.
    role: Role,
    memory: Vec<u8>,
    free: Vec<bool>,
    dirty: BTreeSet<u64>,
    bitmap: Vec<u8>,
    frozen: Vec<u8>,
    /// Memory and free pages at the instant of FREEZE.
    instant: Option<(Vec<u8>, Vec<bool>)>,
    job: [u8; 16],
    is_tracking: bool,
    is_held: bool,
    /// Its programs stand still.
    is_stopped: bool,
    freezes: u32,
}

impl Fake {
    fn new(habits: Habits, role: Role) -> Self {
        let mut fake = Self {
            habits,
            role,
            memory: vec![0; START.space.mem_bytes as usize],
            free: vec![false; PAGES as usize],
            dirty: BTreeSet::new(),
            bitmap: vec![0; PAGES.div_ceil(64) as usize * 8],
            frozen: Vec::new(),
            instant: None,
            job: START.job,
            is_tracking: false,
            is_held: false,
            is_stopped: false,
            freezes: 0,
        };
        for page in 0..PAGES {
            match fake.random(3) {
                0 => fake.free[page as usize] = true,
                1 => fake.write(page),
                _ => {}
            }
        }
        fake
    }

    /// Whether nothing is left of a copy.
    fn is_as_before(&self) -> bool {
        !self.is_held && !self.is_tracking && !self.is_stopped
    }

    /// xorshift64*: below `end`.
    fn random(&mut self, end: u64) -> u64 {
        let seed = &mut self.habits.seed;
        *seed ^= *seed >> 12;
        *seed ^= *seed << 25;
        *seed ^= *seed >> 27;
        (seed.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end
    }

    /// Writes somewhere in a page, or zeroes all of it.
    fn write(&mut self, page: u64) {
        self.free[page as usize] = false;
        let start = (page * PAGE_SIZE) as usize;
        match self.random(4) {
            0 => self.memory[start..start + 4096].fill(0),
            _ => {
                let (at, value) = (self.random(4096) as usize, self.random(256) as u8);
                self.memory[start + at] = value;
            }
        }
        if self.is_tracking {
            self.dirty.insert(page);
        }
    }

    /// The rest of the guest runs.
    fn live(&mut self) {
        let Habits { writes, unstopped, .. } = self.habits;
        for _ in 0..if self.is_stopped { unstopped } else { writes } {
            let page = self.random(self.habits.hot);
            match self.random(8) {
                0 => self.free[page as usize] = true,
                _ => self.write(page),
            }
        }
    }

    fn freeze(&mut self, role: u32) -> u32 {
        let expect = if self.role == Role::Moved { ROLE_MOVED } else { ROLE_FORKED };
        assert_eq!(role, expect);
        assert!(self.is_stopped || self.role == Role::Moved, "a program runs in the copy");
        self.freezes += 1;
        if self.dirty.len() > self.habits.frozen_max {
            return RESULT_TOO_MANY;
        }
        if self.habits.is_copy {
            self.job = [9; 16];
            return RESULT_OK;
        }
        let pages = std::mem::take(&mut self.dirty);
        let frozen = Frozen { state_size: STATE.len() as u64, page_count: pages.len() as u64 };
        self.frozen = vec![0; (frozen.pages_at() + frozen.page_count * PAGE_SIZE) as usize];
        let mut put = |offset: u64, bytes: &[u8]| {
            self.frozen[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        put(0, &frozen.emit());
        put(frozen.state_at(), &STATE);
        for (index, page) in (0..).zip(pages) {
            let start = (page * PAGE_SIZE) as usize;
            put(frozen.addresses_at() + 8 * index, &(page * PAGE_SIZE).to_le_bytes());
            put(frozen.pages_at() + PAGE_SIZE * index, &self.memory[start..start + 4096]);
        }
        self.instant = Some((self.memory.clone(), self.free.clone()));
        self.is_held = true;
        RESULT_OK
    }
}

impl Machine for Fake {
    fn command(&mut self, register: u64, value: u32) -> u32 {
        self.live();
        let result = self.habits.result;
        match (register, value) {
            (REG_TRACK, 0) => self.is_tracking = false,
            (REG_ABORT, _) => assert!(std::mem::take(&mut self.is_held), "nothing is frozen"),
            _ if result != RESULT_OK => return result,
            (REG_TRACK, 1) => self.is_tracking = true,
            (REG_HARVEST, _) => {
                assert!(self.is_tracking);
                self.bitmap.fill(0);
                for page in std::mem::take(&mut self.dirty) {
                    self.bitmap[(page / 8) as usize] |= 1 << (page % 8);
                }
            }
            (REG_FREEZE, role) => return self.freeze(role),
            other => panic!("{other:?}"),
        }
        RESULT_OK
    }

    fn read(&mut self, address: u64, out: &mut [u8]) -> io::Result<()> {
        self.live();
        let (window, start) = match address {
            FROZEN_START.. if address < BITMAP_START => (&self.frozen, address - FROZEN_START),
            BITMAP_START.. => (&self.bitmap, address - BITMAP_START),
            _ => (&self.memory, address - MIRROR_START),
        };
        // A window that nothing was put into yet is zero.
        let bytes = window.get(start as usize..).unwrap_or_default();
        let count = bytes.len().min(out.len());
        out[..count].copy_from_slice(&bytes[..count]);
        Ok(())
    }

    fn stop_programs(&mut self) -> io::Result<()> {
        assert!(!std::mem::replace(&mut self.is_stopped, true));
        Ok(())
    }

    fn start_programs(&mut self) {
        // One that did not get to move starts them, stopped or not.
        let was_stopped = std::mem::take(&mut self.is_stopped);
        assert!(was_stopped || self.role == Role::Moved);
    }

    fn let_go(&mut self) {}

    fn are_free(&mut self, first_page: u64, out: &mut [bool]) {
        self.live();
        out.copy_from_slice(&self.free[first_page as usize..][..out.len()]);
    }

    fn identity(&mut self) -> io::Result<Identity> {
        Ok(Identity { job: self.job, ..blank_identity() })
    }
}

/// Nobody's identity.
pub fn blank_identity() -> Identity {
    let mut blank = [0; onde_wire::machine::INFO_SIZE];
    blank[..12].copy_from_slice(b"ONDEINFO\x01\0\0\0");
    Identity::parse(&blank).expect("a page of zeros is an identity")
}

/// A sink that breaks after so many bytes.
pub struct Kept {
    pub bytes: Vec<u8>,
    room: usize,
    rounds: Vec<Round>,
}

impl Kept {
    pub fn new(room: usize) -> Self {
        Self { bytes: Vec::new(), room, rounds: Vec::new() }
    }
}

impl Write for &mut Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.room = self.room.checked_sub(bytes.len()).ok_or(io::ErrorKind::BrokenPipe)?;
        self.bytes.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for StreamWriter<&mut Kept> {
    fn round(&mut self, round: Round) -> io::Result<()> {
        self.out().rounds.push(round);
        Ok(())
    }

    fn memory(&mut self, address: u64, bytes: &[u8]) -> io::Result<()> {
        StreamWriter::memory(self, address, bytes)
    }
}

/// Copies a machine as a stream.
pub fn copy<M: Machine>(fake: &mut M, kept: &mut Kept, role: Role) -> Result<Outcome, Failed> {
    let mut stream = StreamWriter::start(kept, &START)?;
    let outcome = take(fake, &START, &mut stream, role)?;
    if let Outcome::Source(_, state) = &outcome
        && let Err(error) = stream.machine(state)
    {
        // As whoever moves does when the copy cannot live.
        if role == Role::Moved {
            undo(fake);
        }
        return Err(error.into());
    }
    Ok(outcome)
}

/// The memory and the state that a loader makes of a stream.
pub fn restore(mut stream: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut checker, mut state) = (Checker::new(START), Vec::new());
    let mut memory = vec![0; START.space.mem_bytes as usize];
    while !checker.is_done() {
        let (bytes, behind) = stream.split_first_chunk::<HEAD_SIZE>().unwrap();
        let head = checker.head(bytes).unwrap();
        let (payload, behind) = behind.split_at(head.payload_size as usize);
        checker.payload(payload).unwrap();
        let size = head.mem_size as usize;
        let bytes = match head.kind {
            Kind::Raw => payload.to_vec(),
            Kind::Lz4 => lz4_flex::block::decompress(payload, size).unwrap(),
            _ => vec![0; size],
        };
        memory[head.address as usize..][..size].copy_from_slice(&bytes);
        if head.kind == Kind::Machine {
            state = payload.to_vec();
        }
        stream = behind;
    }
    assert!(stream.is_empty());
    (memory, state)
}

/// Copies a machine with these habits in both roles and compares page by page; what became of the fork.
fn check(habits: Habits) -> (Fake, Kept) {
    let (mut source, _) = check_role(habits, Role::Moved);
    assert!(source.is_held, "a machine that moves waits for its verdict");
    undo(&mut source);
    assert!(source.is_as_before());
    let (fake, kept) = check_role(habits, Role::Forked);
    assert!(fake.is_as_before());
    (fake, kept)
}

fn check_role(habits: Habits, role: Role) -> (Fake, Kept) {
    let (mut fake, mut kept) = (Fake::new(habits, role), Kept::new(usize::MAX));
    let outcome = copy(&mut fake, &mut kept, role).unwrap();
    let Outcome::Source(taken, _) = outcome else { panic!("{outcome:?}") };
    let (memory, state) = restore(&kept.bytes);
    let (expect, free) = fake.instant.as_ref().unwrap();
    assert_eq!(state, STATE);
    for page in (0..PAGES as usize).filter(|page| !free[*page]) {
        let range = page * 4096..(page + 1) * 4096;
        assert!(memory[range.clone()] == expect[range], "page {page} of {habits:?}, {role:?}");
    }
    assert_eq!(kept.rounds.last().map(|round| round.pages), Some(taken.frozen_pages));
    (fake, kept)
}

#[test]
fn a_copy_is_the_machine_at_the_instant_of_freeze() {
    for seed in 1..=40 {
        check(Habits { seed, writes: seed % 9, ..QUIET });
        check(Habits { seed, writes: 3, hot: 40, ..QUIET });
    }
}

#[test]
fn with_more_dirty_pages_than_freeze_takes_another_round_follows() {
    let (fake, kept) = check(Habits { seed: 5, writes: 2, hot: 30, frozen_max: 12, ..QUIET });
    assert!(fake.freezes >= 1 && kept.rounds.len() >= 3);
    // Programs that write faster than they can be copied are stopped, a kernel is not.
    let hot = Habits { seed: 5, writes: 200, unstopped: 0, frozen_max: 12, ..QUIET };
    check(hot);
    let endless = Habits { unstopped: 200, frozen_max: 1, ..hot };
    for role in [Role::Forked, Role::Moved] {
        let mut fake = Fake::new(endless, role);
        let failed = copy(&mut fake, &mut Kept::new(usize::MAX), role).unwrap_err();
        assert!(matches!(&failed, Failed::Machine(text) if text.contains("faster")), "{failed:?}");
        assert!(fake.is_as_before());
    }
}

#[test]
fn whatever_fails_leaves_the_machine_as_it_was() {
    for role in [Role::Forked, Role::Moved] {
        let whole = check_role(QUIET, role).1.bytes.len();
        for room in (0..whole).step_by(4099) {
            let mut fake = Fake::new(QUIET, role);
            let failed = copy(&mut fake, &mut Kept::new(room), role).unwrap_err();
            assert!(matches!(failed, Failed::Sink(_)), "{failed:?}");
            assert!(fake.is_as_before(), "cut at {room}");
        }
        let mut fake = Fake::new(Habits { result: 1, ..QUIET }, role);
        let failed = copy(&mut fake, &mut Kept::new(usize::MAX), role).unwrap_err();
        assert!(matches!(failed, Failed::Machine(_)), "{failed:?}");
    }
}

#[test]
fn the_copy_knows_itself_by_its_job() {
    let (mut fake, mut kept) =
        (Fake::new(Habits { is_copy: true, ..QUIET }, Role::Forked), Kept::new(usize::MAX));
    assert_eq!(copy(&mut fake, &mut kept, Role::Forked).unwrap(), Outcome::Copy);
    assert!(fake.is_stopped, "programs run before the copy is itself");
    assert_ne!(ROLE_SOURCE, ROLE_FORKED);
}

#[test]
fn runs_are_no_longer_than_what_is_read_at_once_and_of_one_piece() {
    let space = Space::of_mib(3073, 1);
    let (hole, disk) = (RAM_LOW_END / PAGE_SIZE, space.ram_pages());
    let pages = (0..40).chain([50]).chain(hole - 1..hole + 1).chain(disk - 1..disk + 2);
    let expect =
        [0..30, 30..40, 50..51, hole - 1..hole, hole..hole + 1, disk - 1..disk, disk..disk + 2];
    assert_eq!(runs(space, pages, PAGES_MAX).collect::<Vec<_>>(), expect);
}
