//! Writes a checkpoint stream: a machine's pieces of memory as records, packed while earlier ones are on
//! their way. `launch`ers send it to a loader through `bootstrap`, `agent` sends its own machine. `snapshot` reads it back.

use crate::layout::Layout;
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use onde_wire::machine::PAGE_SIZE;
use onde_wire::stream::{HEAD_SIZE, Head, Kind, Sender, Start};
use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, sync_channel};

/// Bytes of memory in a record, unless they are zeros. LZ4 blocks below 64 KiB are packed with a table of half the size, in
/// an emulated guest in less than half the time, and hardly larger.
pub const RUN_MAX: u64 = 60 << 10;
/// Packed records that may wait for the wire: half a megabyte.
const QUEUE: usize = 8;

/// How far a stream is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of memory that went out.
    pub mem_done: u64,
    /// Bytes of memory in all.
    pub mem_total: u64,
    /// Bytes of stream that they took.
    pub sent: u64,
}

/// A record on its way to the wire.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its head.
    pub head: Head,
    /// What follows the head.
    pub payload: Vec<u8>,
}

/// Packs memory. It keeps its tables and its room from one run of pages to the next: in a guest that is being copied,
/// fresh memory is memory that has to be copied again.
pub struct Packer {
    table: CompressTable,
    room: Box<[u8]>,
    /// Bytes of `room` that may not be zero.
    used: usize,
}

impl Default for Packer {
    fn default() -> Self {
        let room = vec![0; get_maximum_output_size(RUN_MAX as usize)].into();
        Self { table: CompressTable::small(), room, used: 0 }
    }
}

impl Packer {
    /// The packed records of memory from `address` on, whole pages.
    pub fn records(&mut self, address: u64, bytes: &[u8]) -> impl Iterator<Item = Record> {
        runs(address, bytes).map(|(address, run)| {
            let (head, payload) = self.pack(address, run);
            Record { head, payload: payload.to_vec() }
        })
    }

    /// The record of one run of pages, at most [`RUN_MAX`] unless all are zero.
    fn pack<'a>(&'a mut self, address: u64, run: &'a [u8]) -> (Head, &'a [u8]) {
        let (kind, payload) = match is_zero(run) {
            true => (Kind::Zero, &[][..]),
            false => {
                // Not all of it counts in the end.
                self.used = self.used.max(get_maximum_output_size(run.len()));
                match compress_into_with_table(run, &mut self.room, &mut self.table) {
                    Ok(size) if size < run.len() => (Kind::Lz4, &self.room[..size]),
                    _ => (Kind::Raw, run),
                }
            }
        };
        let payload_size = payload.len() as u32;
        (Head { kind, payload_size, address, mem_size: run.len() as u64 }, payload)
    }
}

/// A stream under way to `out`: START is written, memory comes, then [`Self::machine`] ends it.
pub struct StreamWriter<W> {
    out: W,
    sender: Sender,
    sent: u64,
    /// Made when memory comes: what goes to many is packed before.
    packer: Option<Packer>,
}

impl<W: Write> StreamWriter<W> {
    /// Begins a stream for this machine.
    pub fn start(out: W, start: &Start) -> io::Result<Self> {
        let mut stream = Self { out, sender: Sender::default(), sent: 0, packer: None };
        stream.put(&plain(Kind::Start, start.emit().to_vec()))?;
        Ok(stream)
    }

    /// Where it goes.
    pub fn out(&mut self) -> &mut W {
        &mut self.out
    }

    /// Leaves nothing of earlier records in memory: a machine that is about to be copied has less to copy.
    pub fn wipe(&mut self) {
        if let Some(packer) = &mut self.packer {
            // Packing begins with an empty table, so packing nothing leaves one.
            let _ = compress_into_with_table(&[], &mut packer.room, &mut packer.table);
            packer.room[..std::mem::take(&mut packer.used)].fill(0);
        }
    }

    /// Bytes written so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Writes memory from `address` on, whole pages, packed.
    pub fn memory(&mut self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let mut packer = self.packer.take().unwrap_or_default();
        let done = runs(address, bytes).try_for_each(|(address, run)| {
            let (head, payload) = packer.pack(address, run);
            self.record(&head, payload)
        });
        self.packer = Some(packer);
        done
    }

    /// Writes a record as it is.
    pub fn record(&mut self, head: &Head, payload: &[u8]) -> io::Result<()> {
        self.out.write_all(&self.sender.record(head, payload))?;
        self.out.write_all(payload)?;
        self.sent += (HEAD_SIZE + payload.len()) as u64;
        Ok(())
    }

    /// Writes a record that is packed.
    pub fn put(&mut self, record: &Record) -> io::Result<()> {
        self.record(&record.head, &record.payload)
    }

    /// Writes the machine state and the digest, and flushes. Returns where it went, and the bytes of the stream.
    pub fn machine(mut self, state: &[u8]) -> io::Result<(W, u64)> {
        self.put(&plain(Kind::Machine, state.to_vec()))?;
        self.end()
    }

    /// Writes the machine state of one that moves. Nobody makes a machine of it before [`Self::end`].
    pub fn moved(&mut self, state: &[u8]) -> io::Result<()> {
        self.put(&plain(Kind::Moved, state.to_vec()))
    }

    /// Writes the digest behind the machine state, and flushes. Returns as [`Self::machine`].
    pub fn end(mut self) -> io::Result<(W, u64)> {
        let end = self.sender.end();
        self.out.write_all(&end)?;
        self.out.flush()?;
        Ok((self.out, self.sent + end.len() as u64))
    }
}

/// Writes the stream of a cold machine to `out` and flushes it. `on_progress` sees every record go.
pub fn write_cold(
    out: &mut impl Write,
    start: &Start,
    layout: &Layout,
    mut on_progress: impl FnMut(Progress),
) -> io::Result<Progress> {
    let mut progress = Progress { mem_total: layout.size(), ..Progress::default() };
    let mut stream = StreamWriter::start(out, start)?;
    std::thread::scope(|scope| {
        let (packer, packed) = sync_channel(QUEUE);
        scope.spawn(move || pack(layout, &packer));
        // Where sending fails, the queue closes and the packer ends.
        packed.into_iter().try_for_each(|record| {
            stream.put(&record)?;
            progress.mem_done += record.head.mem_size;
            progress.sent = stream.sent();
            on_progress(progress);
            Ok::<_, io::Error>(())
        })
    })?;
    progress.sent = stream.machine(&layout.start.emit())?.1;
    Ok(progress)
}

fn plain(kind: Kind, payload: Vec<u8>) -> Record {
    let payload_size = payload.len() as u32;
    Record { head: Head { kind, payload_size, address: 0, mem_size: 0 }, payload }
}

/// Packs all memory, until done or nobody takes it any more.
fn pack(layout: &Layout, out: &SyncSender<Record>) {
    let mut packer = Packer::default();
    for piece in &layout.pieces {
        for record in packer.records(piece.address, &piece.bytes) {
            if out.send(record).is_err() {
                return;
            }
        }
    }
}

/// Cuts memory into runs of pages that are all zero, of any size, and others, of [`RUN_MAX`] at most.
fn runs(mut address: u64, mut bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    std::iter::from_fn(move || {
        let is_zero = is_zero(bytes.chunks(PAGE_SIZE as usize).next()?);
        let pages_max = if is_zero { usize::MAX } else { (RUN_MAX / PAGE_SIZE) as usize };
        let same = bytes
            .chunks(PAGE_SIZE as usize)
            .take(pages_max)
            .take_while(|page| self::is_zero(page) == is_zero);
        let (run, rest) = bytes.split_at(same.map(<[u8]>::len).sum());
        let at = address;
        address += run.len() as u64;
        bytes = rest;
        Some((at, run))
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    // In pieces that a compiler makes a few instructions of.
    let (pieces, rest) = bytes.as_chunks::<64>();
    let is_zero = |piece: &[u8]| piece.iter().fold(0, |all, byte| all | byte) == 0;
    pieces.iter().all(|piece| is_zero(piece)) && is_zero(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Piece;
    use onde_wire::machine::ColdStart;
    use onde_wire::stream::Checker;

    use onde_wire::machine::Space;

    const START: Start =
        Start { job: [9; 16], space: Space { mem_bytes: 64 << 20, disk_bytes: 0 }, vcpus: 1 };

    /// Reads a stream as a loader does: the checker judges, memory is what the records say.
    fn receive(stream: &[u8]) -> (Vec<Piece>, Vec<Kind>, Vec<u8>) {
        let (mut checker, mut rest) = (Checker::new(START), stream);
        let (mut pieces, mut kinds, mut state) = (Vec::new(), Vec::new(), Vec::new());
        while !checker.is_done() {
            let (bytes, behind) = rest.split_first_chunk::<HEAD_SIZE>().unwrap();
            let head = checker.head(bytes).unwrap();
            let (payload, behind) = behind.split_at(head.payload_size as usize);
            checker.payload(payload).unwrap();
            let mem_size = head.mem_size as usize;
            let bytes = match head.kind {
                Kind::Raw => payload.to_vec(),
                Kind::Lz4 => lz4_flex::block::decompress(payload, mem_size).unwrap(),
                _ => vec![0; mem_size],
            };
            if head.kind == Kind::Machine {
                state = payload.to_vec();
            }
            pieces.push(Piece { address: head.address, bytes });
            kinds.push(head.kind);
            rest = behind;
        }
        assert!(rest.is_empty());
        (pieces, kinds, state)
    }

    #[test]
    fn wiping_leaves_nothing_of_what_was_packed() {
        let noise: Vec<u8> = (0..8 * 4096u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        let mut stream = StreamWriter::start(Vec::new(), &START).unwrap();
        for bytes in [&noise[..], &[7; 4096], &noise[..4096]] {
            stream.memory(0x1000, bytes).unwrap();
            assert!(!is_zero(&stream.packer.as_ref().unwrap().room));
            stream.wipe();
            assert!(is_zero(&stream.packer.as_ref().unwrap().room));
        }
    }

    #[test]
    fn a_page_is_zero_if_all_of_it_is() {
        assert!(is_zero(&[]) && is_zero(&[0; 4096]) && is_zero(&[0; 100]));
        for at in [0, 63, 64, 127, 128, 149] {
            let mut bytes = [0; 150];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }

    #[test]
    fn a_loader_gets_the_memory_that_was_laid_out() {
        let mut seed = 1u32;
        let mut random = || {
            // Numerical Recipes' generator: its high bits do not repeat within this size.
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        };
        let noise: Vec<u8> = (0..1_600_000).map(|_| random()).collect();
        let mut bytes = [vec![1; 3 * 4096], vec![0; 50 * 4096], noise].concat();
        bytes.resize(bytes.len().next_multiple_of(4096), 7);
        let layout = Layout {
            pieces: vec![
                Piece { address: 0x1000, bytes: vec![5; 4096] },
                Piece { address: 0x10_0000, bytes },
            ],
            start: ColdStart::Pvh { entry: 1, start_info: 2 },
        };
        let (mut stream, mut last) = (Vec::new(), Progress::default());
        let done = write_cold(&mut stream, &START, &layout, |progress| last = progress).unwrap();
        assert_eq!((done.sent, done.mem_done), (stream.len() as u64, layout.size()));
        assert_eq!(last.mem_done, last.mem_total);
        let (pieces, kinds, state) = receive(&stream);
        assert_eq!(state, layout.start.emit());
        assert_eq!(kinds[..5], [Kind::Start, Kind::Lz4, Kind::Lz4, Kind::Zero, Kind::Raw]);
        let mut got = vec![0; 64 << 20];
        for piece in pieces {
            got[piece.address as usize..][..piece.bytes.len()].copy_from_slice(&piece.bytes);
        }
        for piece in &layout.pieces {
            assert!(got[piece.address as usize..][..piece.bytes.len()] == piece.bytes);
        }
    }

    #[test]
    fn a_peer_that_goes_away_ends_the_stream() {
        struct Broken(usize);
        impl Write for Broken {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::BrokenPipe)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let layout = Layout {
            pieces: vec![Piece {
                address: 0,
                bytes: (0..1 << 22).map(|i| (i / 3) as u8).collect(),
            }],
            start: ColdStart::Pvh { entry: 1, start_info: 2 },
        };
        let error = write_cold(&mut Broken(1000), &START, &layout, |_| {}).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
