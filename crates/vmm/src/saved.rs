//! A machine in a file: the checkpoint stream (`wire::stream`), written when `noded` has the machine saved and read back
//! when it wakes up. The file is one that `noded` opened and bounded. The machine stands still, or does not run yet.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;

use onde_wire::machine::PAGE_SIZE;
use onde_wire::stream::{CHUNK_MAX, Checker, HEAD_SIZE, Head, Kind, Sender, Start, StreamError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::fault::{Context, Fault, Part};
use crate::memory::View;

/// A file as it is written.
struct Writer<'a> {
    file: &'a File,
    at: u64,
    sender: Sender,
    /// Start and size of the zeros that were not written yet.
    zeros: (u64, u64),
}

/// Writes a machine: RAM, then its state. Returns the bytes written.
///
/// # Errors
/// The file has no room for it, or cannot be written.
pub fn write(file: &File, start: &Start, ram: &View, state: &[u8]) -> io::Result<u64> {
    let mut out = Writer { file, at: 0, sender: Sender::default(), zeros: (0, 0) };
    out.record(Kind::Start, 0, 0, &start.emit())?;
    let mut chunk = vec![0; CHUNK_MAX as usize];
    for region in ram.iter() {
        let (first, size) = (region.start_addr().0, region.len());
        for at in (0..size).step_by(CHUNK_MAX as usize) {
            let chunk = &mut chunk[..(size - at).min(CHUNK_MAX.into()) as usize];
            let address = GuestAddress(first + at);
            ram.read_slice(chunk, address).map_err(io::Error::other)?;
            out.memory(address.0, chunk)?;
        }
    }
    out.put_zeros()?;
    out.record(Kind::Machine, 0, 0, state)?;
    let Writer { at, sender, .. } = out;
    let end = sender.end();
    file.write_all_at(&end, at)?;
    Ok(at + end.len() as u64)
}

impl Writer<'_> {
    fn record(
        &mut self,
        kind: Kind,
        address: u64,
        mem_size: u64,
        payload: &[u8],
    ) -> io::Result<()> {
        let head = Head { kind, payload_size: payload.len() as u32, address, mem_size };
        let head = self.sender.record(&head, payload);
        self.file.write_all_at(&head, self.at)?;
        self.file.write_all_at(payload, self.at + HEAD_SIZE as u64)?;
        self.at += (HEAD_SIZE + payload.len()) as u64;
        Ok(())
    }

    /// Writes whole pages, those that are zero by their number only.
    fn memory(&mut self, mut address: u64, bytes: &[u8]) -> io::Result<()> {
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let pages = bytes.chunks_exact(PAGE_SIZE as usize).collect::<Vec<_>>();
        for run in pages.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
            let size = run.len() * PAGE_SIZE as usize;
            if is_zero(run[0]) {
                self.skip(address, size as u64)?;
            } else {
                self.put_zeros()?;
                self.record(Kind::Raw, address, size as u64, &run.concat())?;
            }
            address += size as u64;
        }
        Ok(())
    }

    fn skip(&mut self, address: u64, size: u64) -> io::Result<()> {
        let (start, before) = self.zeros;
        if before > 0 && start + before == address {
            self.zeros.1 += size;
            return Ok(());
        }
        self.put_zeros()?;
        self.zeros = (address, size);
        Ok(())
    }

    fn put_zeros(&mut self) -> io::Result<()> {
        let (address, size) = std::mem::take(&mut self.zeros);
        if size == 0 { Ok(()) } else { self.record(Kind::Zero, address, size, &[]) }
    }
}

/// Reads the machine that [`write`] wrote into RAM, which is all zero; returns its state. Only what is
/// whole and for this very machine is taken.
pub fn read(mut file: &File, start: &Start, ram: &View) -> Result<Vec<u8>, Fault> {
    file.rewind().fault(Part::Saved, "find the file's start")?;
    let mut file = BufReader::with_capacity(CHUNK_MAX as usize, file);
    let (mut checker, mut payload, mut state) = (Checker::new(*start), Vec::new(), Vec::new());
    while !checker.is_done() {
        let mut head = [0; HEAD_SIZE];
        file.read_exact(&mut head).fault(Part::Saved, "read a record")?;
        let head = checker.head(&head).map_err(flaw)?;
        payload.resize(head.payload_size as usize, 0);
        file.read_exact(&mut payload).fault(Part::Saved, "read a record")?;
        checker.payload(&payload).map_err(flaw)?;
        match head.kind {
            Kind::Raw => ram
                .write_slice(&payload, GuestAddress(head.address))
                .fault(Part::Saved, "write RAM")?,
            Kind::Machine => state.clone_from(&payload),
            // Nothing here packs memory.
            Kind::Lz4 => return Err(flaw(StreamError::Lz4)),
            Kind::Start | Kind::Zero | Kind::End => {}
        }
    }
    Ok(state)
}

fn flaw(error: StreamError) -> Fault {
    Fault::new(Part::Saved, format!("the saved machine cannot be read: {error:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEM: u64 = 64 << 20;

    fn view() -> View {
        View::from_ranges(&[(GuestAddress(0), MEM as usize)]).unwrap()
    }

    fn start() -> Start {
        Start { job: [7; 16], mem_bytes: MEM, vcpus: 1 }
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
        assert!(size < 10 * (PAGE_SIZE + 100), "zeros take no room: {size}");
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
    fn a_file_without_room_is_an_error() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(write(&full, &start(), &view(), b"").is_err());
    }
}
