//! The console ring: what the guest writes to its serial port, in memory shared with `noded`,
//! which shows it to the customer. The oldest bytes are overwritten; nothing ever blocks.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use onde_wire::machine::{CONSOLE_RING_SIZE, PAGE_SIZE};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

/// Writer of the ring. Its clones take turns: each serial port that follows another goes on where that one stopped.
#[derive(Clone)]
pub struct Console {
    mapping: Arc<MmapRegion>,
    /// Bytes ever written; kept here as the mapping can be written by others.
    count: Arc<AtomicU64>,
}

impl Console {
    /// Takes over the ring in `mapping`, which has a page and `CONSOLE_RING_SIZE` bytes: a new one is all zero, that of a
    /// machine which wakes up goes on.
    pub fn new(mapping: MmapRegion) -> Self {
        let count = mapping.as_volatile_slice().load(0, Ordering::Acquire).unwrap_or(0);
        Self { mapping: Arc::new(mapping), count: Arc::new(AtomicU64::new(count)) }
    }
}

impl io::Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let ring = self.mapping.as_volatile_slice();
        let mut count = self.count.load(Ordering::Relaxed);
        for &byte in bytes {
            let at = PAGE_SIZE + count % CONSOLE_RING_SIZE;
            ring.write_obj(byte, at as usize).map_err(io::Error::other)?;
            count = count.wrapping_add(1);
        }
        self.count.store(count, Ordering::Relaxed);
        // Release: a reader that sees the count sees the bytes.
        ring.store(count, 0, Ordering::Release).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn wraps_and_counts() {
        let mapping = MmapRegion::new((PAGE_SIZE + CONSOLE_RING_SIZE) as usize).unwrap();
        let mut console = Console::new(mapping);
        console.write_all(&vec![b'.'; CONSOLE_RING_SIZE as usize]).unwrap();
        console.write_all(b"new").unwrap();
        let ring = console.mapping.as_volatile_slice();
        let mut start = [0; 4];
        ring.read_slice(&mut start, PAGE_SIZE as usize).unwrap();
        assert_eq!(&start, b"new.");
        let count: u64 = ring.read_obj(0).unwrap();
        assert_eq!(count, CONSOLE_RING_SIZE + 3);
    }
}
