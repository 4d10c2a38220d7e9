//! virtio-blk (virtio 1.2, 5.2) on one raw file. Requests are bounded by the disk's size as it
//! was at start; the file never grows. What is written is noted, as writes to memory are. Work is done on the I/O
//! thread, one request at a time.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, Reader, Writer};
use vm_memory::GuestMemoryRegion;
use vm_memory::bitmap::{AtomicBitmap, BS};

use super::ring::{self, Served};
use super::{Broken, Device};
use crate::memory::{Disk, View};

/// Guest memory whose writes are noted.
type Noted<'a> = BS<'a, AtomicBitmap>;

const SECTOR_SIZE: u64 = 512;
/// Copied at once between file and guest.
const CHUNK_SIZE: usize = 64 << 10;
/// Longest request: three times what Linux sends (1 280 KiB).
const REQUEST_SIZE_MAX: usize = 4 << 20;
/// Segments of a request: the ring's size less header and status.
const SEGMENTS_MAX: u32 = 126;

/// Feature bits (virtio 1.2, 5.2.3).
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_FLUSH: u64 = 1 << 9;

/// Request types (virtio 1.2, 5.2.6).
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
/// What GET_ID answers, padded with zeros.
const ID: [u8; 20] = *b"onde\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const STATUS_OK: u8 = 0;
const STATUS_FAILED: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// The disk.
pub struct Blk {
    disk: Arc<Disk>,
    size: u64,
    chunk: Box<[u8]>,
}

impl Blk {
    /// A device with this disk, rounded down to whole sectors.
    pub fn new(disk: Arc<Disk>) -> Self {
        let size = disk.region.len() / SECTOR_SIZE * SECTOR_SIZE;
        Self { disk, size, chunk: vec![0; CHUNK_SIZE].into() }
    }

    /// Carries out one request; the bytes written to the guest, status included.
    fn serve(&mut self, chain: DescriptorChain<&View>, view: &View) -> Result<u32, Broken> {
        let mut reader = chain.clone().reader(view).map_err(|_| Broken)?;
        let mut writer = chain.writer(view).map_err(|_| Broken)?;
        let mut header = [0; 16];
        reader.read_exact(&mut header).map_err(|_| Broken)?;
        let data_size = writer.available_bytes().checked_sub(1).ok_or(Broken)?;
        let mut status = writer.split_at(data_size).map_err(|_| Broken)?;
        let result = self.carry_out(header, &mut reader, &mut writer);
        let code = match result {
            Ok(()) => STATUS_OK,
            Err(Refusal::Failed) => STATUS_FAILED,
            Err(Refusal::Unsupported) => STATUS_UNSUPPORTED,
        };
        status.write_all(&[code]).map_err(|_| Broken)?;
        Ok(writer.bytes_written() as u32 + 1)
    }

    fn carry_out(
        &mut self,
        header: [u8; 16],
        reader: &mut Reader<'_, Noted<'_>>,
        writer: &mut Writer<'_, Noted<'_>>,
    ) -> Result<(), Refusal> {
        let [kind, _, low, high] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte])));
        let sector = u64::from(low) | u64::from(high) << 32;
        match kind {
            TYPE_IN => {
                let at = self.bounds(sector, writer.available_bytes())?;
                self.read(at, writer)
            }
            TYPE_OUT => {
                let at = self.bounds(sector, reader.available_bytes())?;
                self.write(at, reader)
            }
            TYPE_FLUSH => self.disk.file.sync_data().map_err(Refusal::from),
            TYPE_GET_ID => {
                let size = writer.available_bytes().min(ID.len());
                writer.write_all(&ID[..size]).map_err(Refusal::from)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Byte offset of a request that lies in the disk.
    fn bounds(&self, sector: u64, size: usize) -> Result<u64, Refusal> {
        let start = sector.checked_mul(SECTOR_SIZE).ok_or(Refusal::Failed)?;
        let end = start.checked_add(size as u64).ok_or(Refusal::Failed)?;
        let whole = (size as u64).is_multiple_of(SECTOR_SIZE);
        (whole && size <= REQUEST_SIZE_MAX && end <= self.size)
            .then_some(start)
            .ok_or(Refusal::Failed)
    }

    fn read(&mut self, mut at: u64, writer: &mut Writer<'_, Noted<'_>>) -> Result<(), Refusal> {
        while writer.available_bytes() > 0 {
            let size = writer.available_bytes().min(CHUNK_SIZE);
            self.disk.file.read_exact_at(&mut self.chunk[..size], at)?;
            writer.write_all(&self.chunk[..size])?;
            at += size as u64;
        }
        Ok(())
    }

    fn write(&mut self, mut at: u64, reader: &mut Reader<'_, Noted<'_>>) -> Result<(), Refusal> {
        while reader.available_bytes() > 0 {
            let size = reader.available_bytes().min(CHUNK_SIZE);
            reader.read_exact(&mut self.chunk[..size])?;
            // Noted before: what fails half way may have been written.
            self.disk.mark(at, size);
            self.disk.file.write_all_at(&self.chunk[..size], at)?;
            at += size as u64;
        }
        Ok(())
    }
}

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    Failed,
    Unsupported,
}

impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Refusal::Failed
    }
}

impl Device for Blk {
    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        FEATURE_SEG_MAX | FEATURE_FLUSH
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128]
    }

    fn config(&self) -> Vec<u8> {
        let capacity = (self.size / SECTOR_SIZE).to_le_bytes();
        let size_max = 0u32.to_le_bytes();
        [&capacity[..], &size_max, &SEGMENTS_MAX.to_le_bytes()].concat()
    }

    fn activate(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn process(&mut self, queues: &mut [Queue], _: usize, view: &View) -> Result<Served, Broken> {
        ring::drain(&mut queues[0], view, |chain| self.serve(chain, view))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// Sends one request with `size` bytes of data to a disk of 8 sectors, each full of its
    /// number; returns the data, the status, and the disk afterwards.
    fn request(kind: u32, sector: u64, size: u32) -> (Vec<u8>, u8, Vec<u8>) {
        let view = View::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap();
        let mock = MockSplitQueue::new(&view, 16);
        view.write_obj(kind, GuestAddress(0x8000)).unwrap();
        view.write_obj(sector, GuestAddress(0x8008)).unwrap();
        view.write_slice(&vec![0xEE; size as usize], GuestAddress(0x9000)).unwrap();
        let data = if kind == TYPE_OUT { NEXT } else { NEXT | WRITE };
        let chain = [
            Descriptor::new(0x8000, 16, NEXT, 1),
            Descriptor::new(0x9000, size, data, 2),
            Descriptor::new(0x8100, 1, WRITE, 0),
        ];
        mock.add_desc_chains(&chain.map(RawDescriptor::from), 0).unwrap();
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let content: Vec<u8> = (0..8u8).flat_map(|sector| [sector; 512]).collect();
        file.write_all_at(&content, 0).unwrap();
        let mut blk = Blk::new(Arc::new(Disk::new(&file, 4096).unwrap()));
        blk.process(&mut [mock.create_queue().unwrap()], 0, &view).unwrap();
        let mut bytes = vec![0; size as usize];
        view.read_slice(&mut bytes, GuestAddress(0x9000)).unwrap();
        let mut disk = vec![0; 4096];
        file.read_exact_at(&mut disk, 0).unwrap();
        (bytes, view.read_obj(GuestAddress(0x8100)).unwrap(), disk)
    }

    #[test]
    fn reads_and_writes_sectors() {
        let (bytes, status, _) = request(TYPE_IN, 3, 1024);
        assert_eq!((bytes[0], bytes[1023], status), (3, 4, STATUS_OK));
        let (_, status, disk) = request(TYPE_OUT, 7, 512);
        assert_eq!((disk[3583], disk[3584], status), (6, 0xEE, STATUS_OK));
        assert_eq!(request(TYPE_FLUSH, 0, 512).1, STATUS_OK);
        assert_eq!(request(TYPE_GET_ID, 0, 20).0, ID);
    }

    #[test]
    fn stays_inside_the_disk() {
        for (kind, sector, size, expect) in [
            (TYPE_IN, 8, 512, STATUS_FAILED),
            (TYPE_IN, 7, 1024, STATUS_FAILED),
            (TYPE_OUT, u64::MAX, 512, STATUS_FAILED),
            (TYPE_OUT, 1 << 55, 512, STATUS_FAILED),
            (TYPE_OUT, 0, 100, STATUS_FAILED),
            (99, 0, 512, STATUS_UNSUPPORTED),
        ] {
            let (_, status, disk) = request(kind, sector, size);
            assert_eq!((status, disk[0], disk[3584]), (expect, 0, 7), "{kind} {sector} {size}");
        }
    }
}
