//! The argument for why a copy is right, as a model that runs. Its sets are those of the self-migration papers:
//!
//! | | | here |
//! |---|---|---|
//! | S | the source's pages | [`Source`]: a version a page, counted up by every write |
//! | D | the pages written since they were last asked for | [`Dirty`] |
//! | B | the snapshot buffer: D's pages at the instant of FREEZE, the cut | [`Buffer`] |
//! | C | the checkpoint that comes of the stream | [`Checkpoint`] |
//!
//! Lemma: at the cut, each page that is not in D was last sent in its present version. So C, which is what was sent with
//! D's pages from B, is S at the cut: no page is older or newer. The real [`take`] is what sends; the guest writes
//! between any two things that it does, and inside of its reads. Machines that break the contract show that this can fail.

use super::tests::{Kept, PAGES, START, STATE, blank_identity, copy, restore};
use super::*;
use onde_wire::machine::Identity;
use std::collections::{BTreeMap, BTreeSet};

type Version = u32;

/// S.
#[derive(Clone)]
struct Source(Vec<Version>);
/// D.
#[derive(Clone, Default)]
struct Dirty(BTreeSet<u64>);
/// B.
#[derive(Default)]
struct Buffer(BTreeMap<u64, Version>);
/// C.
struct Checkpoint(Vec<Version>);

/// How a machine breaks the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// HARVEST tells D before the pages are copied and empties it only afterwards.
    DirtyReadTwice,
    /// Writes are noted only from the first HARVEST on.
    LateTrack,
    /// FREEZE keeps a list of D, and the pages are read when they are asked for.
    LazyBuffer,
    /// A page that was free and is taken is not in D.
    FreePageForgotten,
    /// The snapshot buffer is of the instant before the vCPUs stand still.
    EarlyBuffer,
}

struct Model {
    flaw: Flaw,
    seed: u64,
    source: Source,
    free: Vec<bool>,
    dirty: Dirty,
    buffer: Buffer,
    bitmap: Vec<u8>,
    /// The version of each page that last went out.
    sent: Vec<Version>,
    /// S and the free pages at the cut.
    cut: Option<(Source, Vec<bool>)>,
    is_tracking: bool,
    late: Dirty,
}

impl Model {
    fn new(seed: u64, flaw: Flaw) -> Self {
        let pages = PAGES as usize;
        let mut model = Self {
            flaw,
            seed,
            source: Source(vec![0; pages]),
            free: vec![false; pages],
            dirty: Dirty::default(),
            buffer: Buffer::default(),
            bitmap: vec![0; pages.div_ceil(64) * 8],
            sent: vec![0; pages],
            cut: None,
            is_tracking: false,
            late: Dirty::default(),
        };
        for page in 0..PAGES {
            match model.random(4) {
                0 => model.free[page as usize] = true,
                1 => {}
                _ => model.write(page),
            }
        }
        model
    }

    /// SplitMix64: below `end`.
    fn random(&mut self, end: u64) -> u64 {
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        ((z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 31) % end
    }

    /// The guest writes a page.
    fn write(&mut self, page: u64) {
        let was_free = std::mem::replace(&mut self.free[page as usize], false);
        self.source.0[page as usize] += 1;
        let is_forgotten = was_free && self.flaw == Flaw::FreePageForgotten;
        if self.is_tracking && !is_forgotten {
            self.dirty.0.insert(page);
        }
    }

    /// The guest runs for a while: it writes some hot pages and some others, and frees one now and then.
    fn live(&mut self) {
        for _ in 0..self.random(4) {
            let hot = self.random(3) > 0;
            let page = self.random(if hot { PAGES / 16 } else { PAGES });
            match self.random(10) {
                0 => self.free[page as usize] = true,
                _ => self.write(page),
            }
        }
    }

    /// The flaw's second look at D, if it is due.
    fn empty_late(&mut self) {
        for page in std::mem::take(&mut self.late.0) {
            self.dirty.0.remove(&page);
        }
    }

    fn harvest(&mut self) {
        self.is_tracking = true;
        self.bitmap.fill(0);
        let dirty = match self.flaw {
            Flaw::DirtyReadTwice => self.dirty.clone(),
            _ => std::mem::take(&mut self.dirty),
        };
        for page in &dirty.0 {
            self.bitmap[(page / 8) as usize] |= 1 << (page % 8);
        }
        if self.flaw == Flaw::DirtyReadTwice {
            self.late = dirty;
        }
    }

    /// The cut.
    fn freeze(&mut self) {
        let early = self.source.clone();
        if self.flaw == Flaw::EarlyBuffer {
            (0..3).for_each(|_| self.live());
        }
        let buffered = if self.flaw == Flaw::EarlyBuffer { &early } else { &self.source };
        let dirty = std::mem::take(&mut self.dirty);
        self.buffer =
            Buffer(dirty.0.iter().map(|&page| (page, buffered.0[page as usize])).collect());
        self.cut = Some((self.source.clone(), self.free.clone()));
        if self.flaw == Flaw::None {
            self.check_lemma();
        }
    }

    fn check_lemma(&self) {
        for page in (0..PAGES as usize).filter(|page| !self.free[*page]) {
            let is_dirty = self.buffer.0.contains_key(&(page as u64));
            let (sent, now) = (self.sent[page], self.source.0[page]);
            assert!(is_dirty || sent == now, "page {page}: {sent} sent, {now} at the cut");
        }
    }

    fn frozen(&self) -> Vec<u8> {
        let page_count = self.buffer.0.len() as u64;
        let frozen = Frozen { state_size: STATE.len() as u64, page_count };
        let mut out = vec![0; (frozen.pages_at() + page_count * PAGE_SIZE) as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            out[at as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        put(0, &frozen.emit());
        put(frozen.state_at(), &STATE);
        for (index, (&page, &version)) in (0..).zip(&self.buffer.0) {
            let version = match self.flaw {
                Flaw::LazyBuffer => self.source.0[page as usize],
                _ => version,
            };
            put(frozen.addresses_at() + 8 * index, &(page * PAGE_SIZE).to_le_bytes());
            put(frozen.pages_at() + PAGE_SIZE * index, &version.to_le_bytes());
        }
        out
    }

    /// Pages are read one by one, and the guest writes in between.
    fn read_pages(&mut self, first: u64, out: &mut [u8]) {
        for (page, out) in (first..).zip(out.chunks_mut(PAGE_SIZE as usize)) {
            self.live();
            let version = self.source.0[page as usize];
            self.sent[page as usize] = version;
            out.fill(0);
            out[..4].copy_from_slice(&version.to_le_bytes());
        }
    }
}

impl Machine for Model {
    fn command(&mut self, register: u64, value: u32) -> u32 {
        self.live();
        match (register, value) {
            (REG_TRACK, on) => self.is_tracking = on == 1 && self.flaw != Flaw::LateTrack,
            (REG_HARVEST, _) => {
                self.empty_late();
                self.harvest();
            }
            (REG_FREEZE, _) => {
                self.empty_late();
                self.freeze();
            }
            (REG_ABORT, _) => {}
            other => panic!("{other:?}"),
        }
        RESULT_OK
    }

    fn read(&mut self, address: u64, out: &mut [u8]) -> io::Result<()> {
        self.live();
        match address {
            FROZEN_START.. if address < BITMAP_START => {
                let (frozen, start) = (self.frozen(), (address - FROZEN_START) as usize);
                let count = out.len().min(frozen.len() - start);
                out[..count].copy_from_slice(&frozen[start..][..count]);
            }
            BITMAP_START.. => out.copy_from_slice(&self.bitmap[..out.len()]),
            _ => self.read_pages((address - MIRROR_START) / PAGE_SIZE, out),
        }
        Ok(())
    }

    fn let_go(&mut self) {}

    fn are_free(&mut self, first_page: u64, out: &mut [bool]) {
        self.live();
        out.copy_from_slice(&self.free[first_page as usize..][..out.len()]);
    }

    fn identity(&mut self) -> io::Result<Identity> {
        Ok(Identity { job: START.job, ..blank_identity() })
    }

    /// The kernel writes on, so nothing changes.
    fn stop_programs(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn start_programs(&mut self) {}
}

/// Takes a copy while the guest runs on, and compares C with S at the cut: the first page that is older or newer.
fn check(seed: u64, flaw: Flaw) -> Result<(), String> {
    let (mut model, mut kept) = (Model::new(seed, flaw), Kept::new(usize::MAX));
    let role = if seed.is_multiple_of(2) { Role::Forked } else { Role::Moved };
    let outcome = copy(&mut model, &mut kept, role).expect("nothing fails here");
    assert!(matches!(outcome, Outcome::Source(..)), "{outcome:?}");
    let (memory, state) = restore(&kept.bytes);
    assert_eq!(state, STATE);
    let version = |page: &[u8]| Version::from_le_bytes([page[0], page[1], page[2], page[3]]);
    let checkpoint = Checkpoint(memory.chunks(PAGE_SIZE as usize).map(version).collect());
    let (Source(source), free) = model.cut.expect("there was a cut");
    for page in (0..PAGES as usize).filter(|page| !free[*page]) {
        let (have, want) = (checkpoint.0[page], source[page]);
        let word = if have < want { "older" } else { "newer" };
        if have != want {
            return Err(format!(
                "seed {seed}: page {page} is {word} than the cut: {have}, not {want}"
            ));
        }
    }
    Ok(())
}

#[test]
fn no_page_is_older_or_newer_than_the_cut() {
    for seed in 0..600 {
        check(seed, Flaw::None).unwrap();
    }
}

#[test]
fn every_flaw_is_seen() {
    let flaws = [
        (Flaw::DirtyReadTwice, "older"),
        (Flaw::LateTrack, "older"),
        (Flaw::LazyBuffer, "newer"),
        (Flaw::FreePageForgotten, "older"),
        (Flaw::EarlyBuffer, "older"),
    ];
    for (flaw, expect) in flaws {
        let seen = (0..100).find_map(|seed| check(seed, flaw).err()).expect("a flaw to be seen");
        assert!(seen.contains(expect), "{flaw:?}: {seen}");
    }
}
