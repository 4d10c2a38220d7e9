//! What our loader does with a checkpoint stream: judges it with [`Checker`], puts its memory into RAM and
//! keeps its machine state. It runs over any source of bytes and any memory, so that the tests need no VM.

use onde_wire::machine::{DISK_MIB_MAX, DISK_START};
use onde_wire::stream::{CHUNK_MAX, Checker, HEAD_SIZE, Head, Kind, Start, StreamError};

/// Where the stream comes from.
pub trait Source {
    /// Fills all of `buffer`.
    fn recv(&mut self, buffer: &mut [u8]) -> Result<(), Failed>;
}

/// The RAM and the disk that the stream fills. All of it is zero at first.
pub trait Memory {
    /// Lets `fill` write the bytes at `address`; they are RAM or disk, at most [`CHUNK_MAX`] of them.
    fn with<R>(&mut self, address: u64, size: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R;
    /// Writes zeros.
    fn zero(&mut self, address: u64, size: u64);
}

/// Why no machine came of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The connection is over.
    Connection,
    /// The stream is wrong.
    Stream(StreamError),
}

impl From<StreamError> for Failed {
    fn from(error: StreamError) -> Self {
        Failed::Stream(error)
    }
}

/// The memory that has been written, so that a run of zeros over memory never touched costs nothing:
/// booting a large VM is mostly that. One bit for each block.
pub struct Touched {
    bits: [u64; BLOCKS / 64],
}

/// 2 MiB: small enough that little is zeroed in vain, large enough that the bits are a page or two.
const BLOCK: u64 = 2 << 20;
/// Blocks up to the end of the largest machine's disk.
const BLOCKS: usize = ((DISK_START + ((DISK_MIB_MAX as u64) << 20)) / BLOCK) as usize;

impl Touched {
    /// Nothing is touched.
    pub const fn new() -> Self {
        Self { bits: [0; BLOCKS / 64] }
    }

    fn mark(&mut self, address: u64, size: u64) {
        for block in address / BLOCK..=(address + size - 1) / BLOCK {
            self.bits[(block / 64) as usize] |= 1 << (block % 64);
        }
    }

    fn is_touched(&self, block: u64) -> bool {
        self.bits[(block / 64) as usize] >> (block % 64) & 1 == 1
    }

    /// Zeroes what is touched of a range of RAM.
    fn zero(&self, memory: &mut impl Memory, address: u64, size: u64) {
        let end = address + size;
        for block in address / BLOCK..=(end - 1) / BLOCK {
            if self.is_touched(block) {
                let start = address.max(block * BLOCK);
                memory.zero(start, end.min((block + 1) * BLOCK) - start);
            }
        }
    }
}

impl Default for Touched {
    fn default() -> Self {
        Self::new()
    }
}

/// A machine that may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Bytes of its state, at the front of the buffer given for it.
    pub state_size: usize,
    /// Whether the sender waits to hear of it.
    pub is_awaited: bool,
}

/// A stream on its way into a machine.
pub struct Restore<'a, S, M> {
    /// Where the stream comes from.
    pub source: &'a mut S,
    /// Where its memory goes.
    pub memory: &'a mut M,
    /// Which of it is written; nothing, at first.
    pub touched: &'a mut Touched,
    /// Room for one packed block.
    pub chunk: &'a mut [u8; CHUNK_MAX as usize],
    /// Room for the machine state: a stream with a larger one is refused.
    pub state: &'a mut [u8],
}

impl<S: Source, M: Memory> Restore<'_, S, M> {
    /// Takes in a whole stream, which must be for `expect`. Only `Ok` means that the machine may run:
    /// every byte was there and the digest agreed. After an error RAM holds whatever came so far.
    pub fn run(&mut self, expect: Start) -> Result<Restored, Failed> {
        let mut checker = Checker::new(expect);
        let mut restored = Restored { state_size: 0, is_awaited: true };
        while !checker.is_done() {
            let mut head = [0; HEAD_SIZE];
            self.source.recv(&mut head)?;
            let head = checker.head(&head)?;
            self.record(&mut checker, &head)?;
            if let Kind::Machine | Kind::Moved = head.kind {
                let is_awaited = head.kind == Kind::Machine;
                restored = Restored { state_size: head.payload_size as usize, is_awaited };
            }
        }
        Ok(restored)
    }

    fn record(&mut self, checker: &mut Checker, head: &Head) -> Result<(), Failed> {
        let size = head.payload_size as usize;
        match head.kind {
            Kind::Raw => self.raw(checker, head.address, size),
            Kind::Lz4 => self.lz4(checker, head),
            Kind::Zero => {
                self.touched.zero(self.memory, head.address, head.mem_size);
                Ok(checker.payload(&[])?)
            }
            Kind::Machine | Kind::Moved => {
                let state = self.state.get_mut(..size).ok_or(StreamError::TooLarge)?;
                self.source.recv(state)?;
                Ok(checker.payload(state)?)
            }
            Kind::Start | Kind::End | Kind::Pad => {
                let payload = &mut self.chunk[..size];
                self.source.recv(payload)?;
                Ok(checker.payload(payload)?)
            }
        }
    }

    fn raw(&mut self, checker: &mut Checker, address: u64, size: usize) -> Result<(), Failed> {
        self.touched.mark(address, size as u64);
        self.memory.with(address, size, |target| {
            self.source.recv(target)?;
            Ok(checker.payload(target)?)
        })
    }

    fn lz4(&mut self, checker: &mut Checker, head: &Head) -> Result<(), Failed> {
        let packed = &mut self.chunk[..head.payload_size as usize];
        self.source.recv(packed)?;
        checker.payload(packed)?;
        self.touched.mark(head.address, head.mem_size);
        let unpacked = self.memory.with(head.address, head.mem_size as usize, |target| {
            lz4_flex::block::decompress_into(packed, target)
        });
        match unpacked {
            Ok(count) if count as u64 == head.mem_size => Ok(()),
            _ => Err(StreamError::Lz4.into()),
        }
    }
}

#[cfg(test)]
mod tests;
