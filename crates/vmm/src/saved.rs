//! A machine in a file: the checkpoint stream (`wire::stream`), written when `noded` has the machine saved. It is read back
//! when that machine wakes up, and mapped by the clones of one that was saved as a template. The file is one that `noded`
//! opened and bounded. The machine stands still, or does not run yet.
//!
//! ```text
//!  START | PAD RAW payload | ZERO | PAD RAW payload | ... | MACHINE | END
//!                  ^ at a page: a clone maps it
//! ```

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;

use onde_wire::machine::PAGE_SIZE;
use onde_wire::stream::{
    CHUNK_MAX, Checker, HEAD_SIZE, Head, Kind, START_SIZE, Sender, Start, StreamError,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::fault::{Context, Fault, Part};
use crate::machine::Shape;
use crate::memory::View;

/// Zeros between two runs of other pages are written like these, where they are fewer bytes or less than this part of
/// the RAM: each gap costs a clone two mappings, and a process has 65 530 at most.
const GAP_MIN: u64 = 64 << 10;
const GAPS_MAX: u64 = 16 << 10;
/// Most bytes of a record's memory: its size is a 32-bit number.
const RUN_MAX: u64 = 1 << 30;

/// A piece of RAM, from this address on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    address: u64,
    size: u64,
    is_zero: bool,
}

/// A file as it is written.
struct Writer<'a> {
    file: &'a File,
    at: u64,
    sender: Sender,
}

/// Writes a machine: RAM, then its state. Returns the bytes written.
///
/// # Errors
/// The file has no room for it, or cannot be written.
pub fn write(file: &File, start: &Start, ram: &View, state: &[u8]) -> io::Result<u64> {
    let mut out = Writer { file, at: 0, sender: Sender::default() };
    out.record(Kind::Start, 0, 0, &start.emit())?;
    for run in runs(ram, GAP_MIN.max(start.space.mem_bytes / GAPS_MAX))? {
        match run.is_zero {
            true => out.record(Kind::Zero, run.address, run.size, &[])?,
            false => out.memory(ram, run)?,
        }
    }
    out.record(Kind::Machine, 0, 0, state)?;
    let Writer { at, sender, .. } = out;
    let end = sender.end();
    file.write_all_at(&end, at)?;
    Ok(at + end.len() as u64)
}

/// All of RAM, in pieces of either kind; zeros of less than `gap_min` bytes count as the other.
fn runs(ram: &View, gap_min: u64) -> io::Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    for region in ram.iter() {
        let first = runs.len();
        for offset in (0..region.len()).step_by(PAGE_SIZE as usize) {
            let address = region.start_addr().0 + offset;
            let page = Run { address, size: PAGE_SIZE, is_zero: is_zero(ram, address)? };
            add(&mut runs, first, page, gap_min);
        }
    }
    Ok(runs)
}

/// Adds a page to the runs of its region, which begin with number `first`.
fn add(runs: &mut Vec<Run>, first: usize, page: Run, gap_min: u64) {
    let [.., before, last] = &mut runs[first..] else { return extend(runs, first, page) };
    let is_gap = last.is_zero && !page.is_zero && last.size < gap_min;
    if is_gap && before.size + last.size < RUN_MAX {
        before.size += last.size + page.size;
        runs.pop();
    } else {
        extend(runs, first, page);
    }
}

fn extend(runs: &mut Vec<Run>, first: usize, page: Run) {
    match runs[first..].last_mut() {
        Some(last) if last.is_zero == page.is_zero && last.size < RUN_MAX => last.size += page.size,
        _ => runs.push(page),
    }
}

fn is_zero(ram: &View, address: u64) -> io::Result<bool> {
    // Most pages that hold something do so at their start.
    let mut page = [0; PAGE_SIZE as usize];
    for part in [0..64, 64..page.len()] {
        let at = GuestAddress(address + part.start as u64);
        ram.read_slice(&mut page[part.clone()], at).map_err(io::Error::other)?;
        if page[part].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn record(
        &mut self,
        kind: Kind,
        address: u64,
        mem_size: u64,
        payload: &[u8],
    ) -> io::Result<()> {
        let head = Head { kind, payload_size: payload.len() as u32, address, mem_size };
        let head = self.sender.record(&head, payload);
        self.put(&head)?;
        self.put(payload)
    }

    /// Writes a run so that its bytes begin at a page of the file.
    fn memory(&mut self, ram: &View, run: Run) -> io::Result<()> {
        let heads = 2 * HEAD_SIZE as u64;
        let pad = (self.at + heads).next_multiple_of(PAGE_SIZE) - (self.at + heads);
        self.record(Kind::Pad, 0, 0, &vec![0; pad as usize])?;
        let (address, mem_size) = (run.address, run.size);
        let head = Head { kind: Kind::Raw, payload_size: run.size as u32, address, mem_size };
        let head = self.sender.record(&head, &[]);
        self.put(&head)?;
        let mut chunk = vec![0; CHUNK_MAX as usize];
        for offset in (0..run.size).step_by(CHUNK_MAX as usize) {
            let chunk = &mut chunk[..(run.size - offset).min(CHUNK_MAX.into()) as usize];
            let address = GuestAddress(run.address + offset);
            ram.read_slice(chunk, address).map_err(io::Error::other)?;
            self.sender.part(chunk);
            self.put(chunk)?;
        }
        Ok(())
    }
}

/// Reads the machine that [`write`] wrote into RAM, which is all zero; returns its state. Only what is
/// whole and for this very machine is taken.
pub fn read(mut file: &File, start: &Start, ram: &View) -> Result<Vec<u8>, Fault> {
    file.rewind().fault(Part::Saved, "find the file's start")?;
    let mut file = BufReader::with_capacity(CHUNK_MAX as usize, file);
    let (mut checker, mut payload, mut state) = (Checker::of_file(*start), Vec::new(), Vec::new());
    while !checker.is_done() {
        let mut head = [0; HEAD_SIZE];
        file.read_exact(&mut head).fault(Part::Saved, "read a record")?;
        let head = checker.head(&head).map_err(flaw)?;
        if head.kind == Kind::Raw {
            read_memory(&mut file, &mut checker, &head, ram)?;
            continue;
        }
        payload.resize(head.payload_size as usize, 0);
        file.read_exact(&mut payload).fault(Part::Saved, "read a record")?;
        checker.payload(&payload).map_err(flaw)?;
        match head.kind {
            Kind::Machine | Kind::Moved => state.clone_from(&payload),
            // Nothing here packs memory.
            Kind::Lz4 => return Err(flaw(StreamError::Lz4)),
            Kind::Start | Kind::Raw | Kind::Zero | Kind::Pad | Kind::End => {}
        }
    }
    Ok(state)
}

fn read_memory(
    file: &mut impl Read,
    checker: &mut Checker,
    head: &Head,
    ram: &View,
) -> Result<(), Fault> {
    let mut chunk = vec![0; CHUNK_MAX as usize];
    for offset in (0..head.mem_size).step_by(CHUNK_MAX as usize) {
        let chunk = &mut chunk[..(head.mem_size - offset).min(CHUNK_MAX.into()) as usize];
        file.read_exact(chunk).fault(Part::Saved, "read memory")?;
        checker.payload(chunk).map_err(flaw)?;
        let address = GuestAddress(head.address + offset);
        ram.write_slice(chunk, address).fault(Part::Saved, "write RAM")?;
    }
    Ok(())
}

/// A template as a clone finds it in its file.
#[derive(Debug)]
pub struct Template {
    /// Where RAM is that is not zero.
    pub pieces: Vec<Piece>,
    /// The machine state.
    pub state: Vec<u8>,
}

/// Bytes of RAM in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file: at a page, and before its end.
    pub offset: u64,
    /// Where in the machine: in its RAM.
    pub address: u64,
    /// How many.
    pub size: u64,
}

/// Finds the parts of the template that [`write`] wrote of a machine of this shape. Its memory is not looked at, so neither is
/// its digest: the file has been out of reach of all VMs since its only writer, which read a whole stream, was done.
pub fn find(file: &File, shape: &Shape) -> Result<Template, Fault> {
    let length = file.metadata().fault(Part::Saved, "read the file's size")?.len();
    let start: [u8; START_SIZE] = read_at(file, HEAD_SIZE as u64)?;
    let job = Start::parse(&start).map_err(flaw)?.job;
    let expect = Start { job, space: shape.space, vcpus: shape.vcpus };
    let (mut checker, mut pieces, mut at) = (Checker::of_file(expect), Vec::new(), 0);
    loop {
        let head = checker.head(&read_at(file, at)?).map_err(flaw)?;
        let offset = at + HEAD_SIZE as u64;
        at = offset + u64::from(head.payload_size);
        match head.kind {
            Kind::Start => checker.payload(&start).map_err(flaw)?,
            Kind::Zero | Kind::Pad => {}
            Kind::Raw if offset.is_multiple_of(PAGE_SIZE) && at <= length => {
                pieces.push(Piece { offset, address: head.address, size: head.mem_size });
            }
            Kind::Machine => {
                let mut state = vec![0; head.payload_size as usize];
                file.read_exact_at(&mut state, offset).fault(Part::Saved, "read the state")?;
                return Ok(Template { pieces, state });
            }
            Kind::Raw | Kind::Lz4 | Kind::Moved | Kind::End => {
                return Err(flaw(StreamError::Malformed));
            }
        }
    }
}

fn read_at<const N: usize>(file: &File, at: u64) -> Result<[u8; N], Fault> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at).fault(Part::Saved, "read a record")?;
    Ok(bytes)
}

fn flaw(error: StreamError) -> Fault {
    Fault::new(Part::Saved, format!("the saved machine cannot be read: {error:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_wire::machine::Space;

    const MEM: u64 = 64 << 20;

    fn view() -> View {
        View::from_ranges(&[(GuestAddress(0), MEM as usize)]).unwrap()
    }

    fn start() -> Start {
        Start { job: [7; 16], space: Space { mem_bytes: MEM, disk_bytes: 0 }, vcpus: 1 }
    }

    fn file() -> File {
        vmm_sys_util::tempfile::TempFile::new().unwrap().into_file()
    }

    /// Pages with something in them: alone, in a row, at both ends and round a chunk's border.
    const PAGES: [u64; 8] = [0, 1, 9, 31, 32, 33, 700, MEM / PAGE_SIZE - 1];

    fn saved() -> (File, u64) {
        let (file, ram) = (file(), view());
        for page in PAGES {
            ram.write_slice(&[page as u8 | 1; 100], GuestAddress(page * PAGE_SIZE + 50)).unwrap();
        }
        let size = write(&file, &start(), &ram, b"the state").unwrap();
        (file, size)
    }

    #[test]
    fn a_machine_comes_back_as_it_was() {
        let (file, size) = saved();
        assert_eq!(file.metadata().unwrap().len(), size);
        // A gap of 22 pages is left out, one of 8 is not.
        assert!(size < 50 * PAGE_SIZE, "zeros take no room: {size}");
        let ram = view();
        assert_eq!(read(&file, &start(), &ram).unwrap(), b"the state");
        let mut page = vec![0; PAGE_SIZE as usize];
        for number in 0..MEM / PAGE_SIZE {
            ram.read_slice(&mut page, GuestAddress(number * PAGE_SIZE)).unwrap();
            let expect = if PAGES.contains(&number) { number as u8 | 1 } else { 0 };
            assert!((page[50], page[49], page[149]) == (expect, 0, expect), "page {number}");
        }
    }

    #[test]
    fn what_is_cut_altered_or_another_machines_is_refused() {
        let (file, size) = saved();
        let other = Start { job: [8; 16], ..start() };
        assert!(read(&file, &other, &view()).is_err());
        let ram = view();
        for at in (0..size).step_by(1999).chain([size - 1]) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
            assert!(read(&file, &start(), &ram).is_err(), "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        file.set_len(size - 1).unwrap();
        assert!(read(&file, &start(), &ram).is_err());
    }

    #[test]
    fn a_clone_finds_what_is_not_zero() {
        let (file, _) = saved();
        let shape = Shape { space: start().space, vcpus: 1 };
        let template = find(&file, &shape).unwrap();
        assert_eq!(template.state, b"the state");
        let pages = template.pieces.iter().map(|piece| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, piece.offset + 50).unwrap();
            assert_eq!(byte[0], (piece.address / PAGE_SIZE) as u8 | 1);
            (piece.offset % PAGE_SIZE, piece.address / PAGE_SIZE, piece.size / PAGE_SIZE)
        });
        let last = MEM / PAGE_SIZE - 1;
        assert_eq!(pages.collect::<Vec<_>>(), [(0, 0, 10), (0, 31, 3), (0, 700, 1), (0, last, 1)]);
        assert!(find(&file, &Shape { vcpus: 2, ..shape }).is_err());
        file.set_len(3 * PAGE_SIZE).unwrap();
        assert!(find(&file, &shape).is_err(), "a mapping behind its end would kill");
    }

    #[test]
    fn no_file_is_larger_than_its_machine_by_much() {
        let (file, ram) = (file(), view());
        for page in (0..MEM / PAGE_SIZE).step_by(17) {
            ram.write_obj(1u8, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        assert!(write(&file, &start(), &ram, b"").unwrap() < MEM + PAGE_SIZE);
    }

    #[test]
    fn a_file_without_room_is_an_error() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(write(&full, &start(), &view(), b"").is_err());
    }
}
