//! Streams into a machine of vectors: right ones, and every way to be wrong.

use super::*;
use onde_wire::machine::{STATE_SIZE_MAX, Space};
use onde_wire::stream::Sender;

const MIB: usize = 1 << 20;
const PAGE: u64 = 4096;
const START: Start =
    Start { job: [7; 16], space: Space { mem_bytes: 64 << 20, disk_bytes: 0 }, vcpus: 2 };

struct Bytes<'a>(&'a [u8]);

impl Source for Bytes<'_> {
    fn recv(&mut self, buffer: &mut [u8]) -> Result<(), Failed> {
        let (now, later) = self.0.split_at_checked(buffer.len()).ok_or(Failed::Connection)?;
        buffer.copy_from_slice(now);
        self.0 = later;
        Ok(())
    }
}

/// 64 MiB of RAM, and how much of it was zeroed by hand.
struct Vector {
    ram: Vec<u8>,
    zeroed: u64,
}

impl Memory for Vector {
    fn with<R>(&mut self, address: u64, size: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(size <= CHUNK_MAX as usize);
        fill(&mut self.ram[address as usize..][..size])
    }

    fn zero(&mut self, address: u64, size: u64) {
        self.zeroed += size;
        self.ram[address as usize..][..size as usize].fill(0);
    }
}

/// A stream being written.
struct Stream {
    bytes: Vec<u8>,
    sender: Sender,
}

impl Stream {
    fn new() -> Self {
        let mut stream = Self { bytes: Vec::new(), sender: Sender::default() };
        stream.record(Kind::Start, 0, 0, &START.emit());
        stream
    }

    fn record(&mut self, kind: Kind, address: u64, mem_size: u64, payload: &[u8]) -> &mut Self {
        let head = Head { kind, payload_size: payload.len() as u32, address, mem_size };
        self.bytes.extend(self.sender.record(&head, payload));
        self.bytes.extend(payload);
        self
    }

    fn raw(&mut self, address: u64, bytes: &[u8]) -> &mut Self {
        self.record(Kind::Raw, address, bytes.len() as u64, bytes)
    }

    fn lz4(&mut self, address: u64, bytes: &[u8]) -> &mut Self {
        self.record(Kind::Lz4, address, bytes.len() as u64, &pack(bytes))
    }

    fn zero(&mut self, address: u64, size: u64) -> &mut Self {
        self.record(Kind::Zero, address, size, &[])
    }

    fn end(&mut self) -> Vec<u8> {
        self.end_with(Kind::Machine)
    }

    fn end_with(&mut self, kind: Kind) -> Vec<u8> {
        self.record(kind, 0, 0, b"state");
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.extend(std::mem::take(&mut self.sender).end());
        bytes
    }
}

fn pack(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; lz4_flex::block::get_maximum_output_size(bytes.len())];
    let size = lz4_flex::block::compress_into(bytes, &mut packed).unwrap();
    packed.truncate(size);
    packed
}

fn run(stream: &[u8]) -> (Result<Restored, Failed>, Vector, Vec<u8>) {
    let mut memory = Vector { ram: vec![0; 64 * MIB], zeroed: 0 };
    let mut state = vec![0; MIB];
    let result = Restore {
        source: &mut Bytes(stream),
        memory: &mut memory,
        touched: &mut Touched::new(),
        chunk: &mut [0; CHUNK_MAX as usize],
        state: &mut state,
    }
    .run(START);
    (result, memory, state)
}

/// A right stream leaves this memory: the byte at each address; and zeroes no more than `zeroed` bytes.
fn check(stream: &mut Stream, expect: &[(usize, u8)], zeroed: u64) {
    let bytes = stream.end();
    let (result, memory, state) = run(&bytes);
    assert_eq!(result, Ok(Restored { state_size: 5, is_awaited: true }));
    assert_eq!(&state[..5], b"state");
    assert_eq!(memory.zeroed, zeroed);
    for (address, byte) in expect {
        assert_eq!(memory.ram[*address], *byte, "at {address:#x}");
    }
}

#[test]
fn nobody_waits_to_hear_of_a_machine_that_moved() {
    let (result, _, state) = run(&Stream::new().end_with(Kind::Moved));
    assert_eq!(result, Ok(Restored { state_size: 5, is_awaited: false }));
    assert_eq!(&state[..5], b"state");
}

#[test]
fn memory_is_what_the_last_record_says() {
    let (page, chunk) = ([0xAA; PAGE as usize], vec![0xBB; CHUNK_MAX as usize]);
    let last = (64 * MIB - CHUNK_MAX as usize) as u64;
    check(Stream::new().raw(0, &page), &[(0, 0xAA), (4095, 0xAA), (4096, 0)], 0);
    check(Stream::new().lz4(last, &chunk), &[(64 * MIB - 1, 0xBB)], 0);
    // Zeros over memory that nobody wrote cost nothing; over the rest they count.
    check(Stream::new().zero(0, 64 << 20).raw(PAGE, &page), &[(0, 0), (4096, 0xAA)], 0);
    check(Stream::new().raw(PAGE, &page).zero(0, 64 << 20), &[(4096, 0)], 2 << 20);
    check(
        Stream::new().raw(0, &page).raw(PAGE, &page).zero(PAGE, PAGE),
        &[(4095, 0xAA), (4096, 0), (8191, 0)],
        PAGE,
    );
    // A chunk over the edge of two blocks touches both.
    let edge = 4 * MIB as u64 - PAGE;
    check(
        Stream::new().lz4(edge, &chunk).zero(edge, 2 * PAGE),
        &[(edge as usize, 0), (edge as usize + 4096, 0), (edge as usize + 8192, 0xBB)],
        2 * PAGE,
    );
    check(Stream::new().raw(0, &page).lz4(0, &chunk).raw(0, &page), &[(0, 0xAA), (4096, 0xBB)], 0);
}

/// `stream`, after `spoil`, is refused for this reason.
fn refuse(stream: &mut Stream, spoil: impl FnOnce(&mut Vec<u8>), expect: Failed) {
    let mut bytes = stream.end();
    spoil(&mut bytes);
    assert_eq!(run(&bytes).0, Err(expect));
}

#[test]
fn wrong_streams_are_refused() {
    use StreamError::*;
    let page = [0xAA; PAGE as usize];
    let wrong = |stream: &mut Stream, error| refuse(stream, |_| (), Failed::Stream(error));
    wrong(Stream::new().raw(64 << 20, &page), Address);
    wrong(Stream::new().zero(64 << 20, PAGE), Address);
    wrong(Stream::new().zero(0, (64 << 20) + PAGE), Address);
    wrong(Stream::new().zero(u64::MAX - 4095, PAGE), Address);
    wrong(Stream::new().raw(1, &page), Address);
    wrong(Stream::new().raw(0, &vec![0; CHUNK_MAX as usize + 4096]), TooLarge);
    wrong(Stream::new().record(Kind::Raw, 0, 2 * PAGE, &page), TooLarge);
    wrong(Stream::new().record(Kind::Lz4, 0, PAGE, &page), Lz4);
    wrong(Stream::new().record(Kind::Lz4, 0, 2 * PAGE, &pack(&page)), Lz4);
    wrong(Stream::new().record(Kind::Lz4, 0, PAGE, &[]), Lz4);
    wrong(Stream::new().record(Kind::Machine, 0, 0, &vec![0; MIB + 1]), TooLarge);
    wrong(
        Stream::new().record(Kind::Machine, 0, 0, &vec![0; STATE_SIZE_MAX as usize + 1]),
        TooLarge,
    );
    wrong(Stream::new().record(Kind::Machine, 0, 0, b"first state"), OutOfOrder);
    wrong(Stream::new().record(Kind::Start, 0, 0, &START.emit()), OutOfOrder);

    let spoiled = |spoil: fn(&mut Vec<u8>), expect| {
        refuse(Stream::new().raw(0, &page), spoil, expect);
    };
    spoiled(|bytes| *bytes.last_mut().unwrap() ^= 1, Failed::Stream(Digest));
    spoiled(|bytes| bytes[24 + 48 + 24] ^= 1, Failed::Stream(Digest));
    spoiled(|bytes| bytes[0] = 99, Failed::Stream(Malformed));
    spoiled(|bytes| bytes[24 + 8] = 99, Failed::Stream(Version));
    spoiled(|bytes| bytes[24 + 24] ^= 1, Failed::Stream(OtherMachine));
    spoiled(|bytes| bytes.truncate(bytes.len() - 1), Failed::Connection);
    spoiled(|bytes| bytes.clear(), Failed::Connection);
}
