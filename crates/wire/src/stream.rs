//! The checkpoint stream: memory and machine state of a VM as records. Booting, moving,
//! forking and waking up are all this stream, sent to a loader or kept in a file.
//!
//! ```text
//!  record  kind u8 | 0 0 0 | payload size u32 | address u64 | memory size u64 | payload
//!  stream  START  (RAW | ZERO | LZ4)*  (MACHINE | MOVED)  END
//!  file    START  (PAD RAW | ZERO)*    MACHINE            END
//! ```
//! START says for what machine, END carries the SHA-256 of all bytes before it. [`Checker`] is the
//! receiver's judge: it accepts records in this order only, and memory only where the machine has RAM or disk. In a file that a
//! VMM writes and others map, RAW may be of any size, and what PAD holds puts its payload at the start of a page.

use crate::bytes::{Reader, Writer};
use crate::machine::{self, Space};
use crate::token::JobId;
use sha2::{Digest, Sha256};

/// Bytes of a record's head.
pub const HEAD_SIZE: usize = 24;
/// Most bytes of memory in a RAW or LZ4 record: what a receiver buffers.
pub const CHUNK_MAX: u32 = 128 << 10;
/// Bytes of START's payload.
pub const START_SIZE: usize = 48;
/// Version of the stream.
pub const VERSION: u32 = 1;

const START_MAGIC: [u8; 8] = *b"ONDESTRM";

/// Kinds of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First: what machine this is for.
    Start = 1,
    /// Memory as it is.
    Raw = 2,
    /// Memory that is all zero; no payload.
    Zero = 3,
    /// Memory as one LZ4 block.
    Lz4 = 4,
    /// The machine state.
    Machine = 5,
    /// Last: the digest.
    End = 6,
    /// Nothing, in files only.
    Pad = 7,
    /// The machine state of one that stands still until this one lives, and asks the node whether it does: it runs at
    /// once, and nobody is told but of a refusal.
    Moved = 8,
}

/// A record's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Kind.
    pub kind: Kind,
    /// Bytes of payload that follow.
    pub payload_size: u32,
    /// Guest-physical address, for memory.
    pub address: u64,
    /// Bytes of memory described.
    pub mem_size: u64,
}

/// Why a stream is refused. The numbers go into loader reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamError {
    /// Not a record.
    Malformed = 1,
    /// A record where the order does not allow it.
    OutOfOrder = 2,
    /// Memory outside the machine's RAM and disk, or not in whole pages.
    Address = 3,
    /// A payload larger than its kind allows.
    TooLarge = 4,
    /// The stream is for another job, memory size or number of vCPUs.
    OtherMachine = 5,
    /// A block that does not unpack to the size stated.
    Lz4 = 6,
    /// The digest differs.
    Digest = 7,
    /// A version that this receiver does not know.
    Version = 8,
}

impl Head {
    /// The head's bytes.
    pub fn emit(&self) -> [u8; HEAD_SIZE] {
        let mut out = [0; HEAD_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&[self.kind as u8, 0, 0, 0]);
        w.put(&self.payload_size.to_le_bytes());
        w.put(&self.address.to_le_bytes());
        w.put(&self.mem_size.to_le_bytes());
        out
    }

    /// Reads a head; only its form is checked.
    pub fn parse(bytes: &[u8; HEAD_SIZE]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        use Kind::*;
        let kind = r.u8()?;
        if r.array()? != [0; 3] {
            return None;
        }
        Some(Self {
            kind: [Start, Raw, Zero, Lz4, Machine, End, Pad, Moved]
                .into_iter()
                .find(|k| *k as u8 == kind)?,
            payload_size: r.u32()?,
            address: r.u64()?,
            mem_size: r.u64()?,
        })
    }
}

/// START's payload: the machine a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The job whose machine this becomes.
    pub job: JobId,
    /// RAM and disk.
    pub space: Space,
    /// Number of vCPUs.
    pub vcpus: u32,
}

impl Start {
    /// The payload's bytes.
    pub fn emit(&self) -> [u8; START_SIZE] {
        let mut out = [0; START_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&START_MAGIC);
        w.put(&VERSION.to_le_bytes());
        w.put(&self.vcpus.to_le_bytes());
        w.put(&self.space.mem_bytes.to_le_bytes());
        w.put(&self.job);
        w.put(&self.space.disk_bytes.to_le_bytes());
        out
    }

    /// Reads the payload.
    pub fn parse(bytes: &[u8]) -> Result<Self, StreamError> {
        let mut r = Reader::new(bytes);
        if r.array() != Some(START_MAGIC) {
            return Err(StreamError::Malformed);
        }
        if r.u32() != Some(VERSION) {
            return Err(StreamError::Version);
        }
        let fields = || Some((r.u32()?, r.u64()?, r.array()?, r.u64()?));
        let (vcpus, mem_bytes, job, disk_bytes) = { fields }().ok_or(StreamError::Malformed)?;
        Ok(Self { job, space: Space { mem_bytes, disk_bytes }, vcpus })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Start,
    Memory,
    End,
    Done,
}

/// Judges a stream as it comes in: `head` for each record's head, then `payload` for its payload.
pub struct Checker {
    expect: Start,
    is_file: bool,
    phase: Phase,
    head: Option<Head>,
    digest: Sha256,
}

impl Checker {
    /// Starts a stream that must be for this machine.
    pub fn new(expect: Start) -> Self {
        Self { expect, is_file: false, phase: Phase::Start, head: None, digest: Sha256::new() }
    }

    /// The same for a file.
    pub fn of_file(expect: Start) -> Self {
        Self { is_file: true, ..Self::new(expect) }
    }

    /// Judges a record's head. On success the caller reads `payload_size` bytes (at most
    /// [`CHUNK_MAX`], or [`machine::STATE_SIZE_MAX`] for a machine state) and calls [`Self::payload`]. In a file RAW has no bound, and its
    /// payload may come in parts.
    pub fn head(&mut self, bytes: &[u8; HEAD_SIZE]) -> Result<Head, StreamError> {
        let head = Head::parse(bytes).ok_or(StreamError::Malformed)?;
        match (self.phase, head.kind) {
            (Phase::Start, Kind::Start) => exact(&head, START_SIZE)?,
            (Phase::Memory, Kind::Raw | Kind::Zero | Kind::Lz4) => self.memory(&head)?,
            (Phase::Memory, Kind::Pad) if self.is_file => pad(&head)?,
            (Phase::Memory, Kind::Moved) if self.is_file => return Err(StreamError::OutOfOrder),
            (Phase::Memory, Kind::Machine | Kind::Moved) => {
                if head.payload_size > machine::STATE_SIZE_MAX {
                    return Err(StreamError::TooLarge);
                }
            }
            // Not in the digest, so nothing else is taken for it.
            (Phase::End, Kind::End) if (head.address, head.mem_size) != (0, 0) => {
                return Err(StreamError::Malformed);
            }
            (Phase::End, Kind::End) => exact(&head, 32)?,
            _ => return Err(StreamError::OutOfOrder),
        }
        if head.kind != Kind::End {
            self.digest.update(bytes);
        }
        self.head = Some(head);
        Ok(head)
    }

    fn memory(&self, head: &Head) -> Result<(), StreamError> {
        let pages = head.address.is_multiple_of(machine::PAGE_SIZE)
            && head.mem_size.is_multiple_of(machine::PAGE_SIZE)
            && head.mem_size > 0;
        if !pages || !self.expect.space.holds(head.address, head.mem_size) {
            return Err(StreamError::Address);
        }
        let fits = match head.kind {
            Kind::Zero => head.payload_size == 0,
            Kind::Raw => {
                let is_small = self.is_file || head.mem_size <= CHUNK_MAX.into();
                is_small && head.mem_size == head.payload_size.into()
            }
            _ => head.mem_size <= CHUNK_MAX.into() && head.payload_size <= CHUNK_MAX,
        };
        if fits { Ok(()) } else { Err(StreamError::TooLarge) }
    }

    /// Judges the payload of the record whose head came last, or a part of it; a digest is checked here.
    pub fn payload(&mut self, payload: &[u8]) -> Result<(), StreamError> {
        let head = self.head.take().ok_or(StreamError::OutOfOrder)?;
        let left = u64::from(head.payload_size).checked_sub(payload.len() as u64);
        let left = left.ok_or(StreamError::Malformed)? as u32;
        let is_part = self.is_file && head.kind == Kind::Raw && !payload.is_empty();
        if left > 0 && !is_part {
            return Err(StreamError::Malformed);
        }
        self.head = (left > 0).then_some(Head { payload_size: left, ..head });
        match head.kind {
            Kind::Start => {
                if Start::parse(payload)? != self.expect {
                    return Err(StreamError::OtherMachine);
                }
                self.phase = Phase::Memory;
            }
            Kind::Machine | Kind::Moved => self.phase = Phase::End,
            Kind::End => {
                let digest: [u8; 32] = self.digest.clone().finalize().into();
                if payload != digest {
                    return Err(StreamError::Digest);
                }
                self.phase = Phase::Done;
                return Ok(());
            }
            Kind::Raw | Kind::Zero | Kind::Lz4 | Kind::Pad => {}
        }
        self.digest.update(payload);
        Ok(())
    }

    /// Whether END came and its digest agreed: only then may the machine run.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }
}

/// A pad is less than a page: no file is larger than its machine by much.
fn pad(head: &Head) -> Result<(), StreamError> {
    let is_pad = (head.address, head.mem_size) == (0, 0);
    if !is_pad {
        return Err(StreamError::Address);
    }
    if u64::from(head.payload_size) < machine::PAGE_SIZE {
        Ok(())
    } else {
        Err(StreamError::TooLarge)
    }
}

fn exact(head: &Head, size: usize) -> Result<(), StreamError> {
    if head.payload_size as usize == size { Ok(()) } else { Err(StreamError::TooLarge) }
}

/// The sender's digest: every record goes through it, and [`Self::end`] gives the END record.
#[derive(Default)]
pub struct Sender {
    digest: Sha256,
}

impl Sender {
    /// Counts a record in and returns its head's bytes.
    pub fn record(&mut self, head: &Head, payload: &[u8]) -> [u8; HEAD_SIZE] {
        let bytes = head.emit();
        self.digest.update(bytes);
        self.part(payload);
        bytes
    }

    /// Counts the next part of the last record's payload in.
    pub fn part(&mut self, payload: &[u8]) {
        self.digest.update(payload);
    }

    /// The END record.
    pub fn end(self) -> [u8; HEAD_SIZE + 32] {
        let head = Head { kind: Kind::End, payload_size: 32, address: 0, mem_size: 0 };
        let mut out = [0; HEAD_SIZE + 32];
        let mut w = Writer::new(&mut out);
        w.put(&head.emit());
        w.put(&self.digest.finalize());
        out
    }
}
