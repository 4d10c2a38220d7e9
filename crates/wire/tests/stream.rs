//! The checkpoint stream: its bytes, and each reason to refuse one.

mod sample;

use onde_wire::machine::{
    ColdStart, PAGE_SIZE, RAM_HIGH_START, RAM_LOW_END, STATE_SIZE_MAX, Space,
};
use onde_wire::stream::StreamError::*;
use onde_wire::stream::*;
use sample::*;

const MIB: u64 = 1 << 20;
const START: Start =
    Start { job: JOB, space: Space { mem_bytes: 256 * MIB, disk_bytes: MIB }, vcpus: 2 };
const COLD: ColdStart = ColdStart::Linux64 { entry: 0x100_0200, boot_params: 0x7000, cr3: 0x9000 };

type Record = (Head, Vec<u8>);

fn record(kind: Kind, address: u64, mem_size: u64, payload: &[u8]) -> Record {
    let payload_size = payload.len() as u32;
    (Head { kind, payload_size, address, mem_size }, payload.to_vec())
}

fn start() -> Record {
    record(Kind::Start, 0, 0, &START.emit())
}

fn raw(address: u64) -> Record {
    record(Kind::Raw, address, PAGE_SIZE, &[7; PAGE_SIZE as usize])
}

fn zero(address: u64, mem_size: u64) -> Record {
    record(Kind::Zero, address, mem_size, &[])
}

fn moved() -> Record {
    record(Kind::Moved, 0, 0, &COLD.emit())
}

fn machine() -> Record {
    record(Kind::Machine, 0, 0, &COLD.emit())
}

/// The records and their END.
fn with_end(records: &[Record]) -> Vec<Record> {
    let mut sender = Sender::default();
    records.iter().for_each(|(head, payload)| {
        sender.record(head, payload);
    });
    let end = sender.end();
    let head = Head::parse(end.first_chunk().unwrap()).unwrap();
    [records, &[(head, end[HEAD_SIZE..].to_vec())]].concat()
}

fn good() -> Vec<Record> {
    with_end(&[start(), raw(0x1000), zero(0x2000, MIB), machine()])
}

/// Receives a stream for a machine like `expect`; whether it is complete, or why it is refused.
fn receive_for(expect: Start, records: &[Record]) -> Result<bool, StreamError> {
    let mut checker = Checker::new(expect);
    for (head, payload) in records {
        checker.head(&head.emit())?;
        checker.payload(payload)?;
    }
    Ok(checker.is_done())
}

fn receive(records: &[Record]) -> Result<bool, StreamError> {
    receive_for(START, records)
}

#[test]
fn a_stream_keeps_its_bytes() {
    let records = good();
    let bytes: Vec<u8> =
        records.iter().flat_map(|(head, payload)| [&head.emit()[..], payload].concat()).collect();
    check_golden(&bytes, "c442497271ad007812d7e089ea356ec5cc89f663b2cd7ef7d65cdf2d84c85330");
    check_golden(&raw(0x1000).0.emit(), "020000000010000000100000000000000010000000000000");
    check_golden(
        &START.emit(),
        "4f4e44455354524d01000000020000000000001000000000090909090909090909090909090909090000100000000000",
    );
    assert_eq!(Start::parse(&START.emit()), Ok(START));
    for (head, _) in records {
        assert_eq!(Head::parse(&head.emit()), Some(head));
    }
}

#[test]
fn right_streams_are_accepted() {
    let lz4 = record(Kind::Lz4, 0x3000, CHUNK_MAX.into(), &[0; 100]);
    let chunk = record(Kind::Raw, 0, CHUNK_MAX.into(), &[1; CHUNK_MAX as usize]);
    let state = record(Kind::Machine, 0, 0, &vec![1; STATE_SIZE_MAX as usize]);
    for records in [
        good(),
        with_end(&[start(), machine()]),
        with_end(&[start(), lz4, chunk, zero(0, START.space.mem_bytes), machine()]),
        with_end(&[start(), raw(START.space.mem_bytes - PAGE_SIZE), state]),
        with_end(&[start(), raw(0x1000), raw(0x1000), machine()]),
        with_end(&[start(), raw(0x1000), moved()]),
    ] {
        assert_eq!(receive(&records), Ok(true));
    }
}

#[test]
fn only_a_file_has_pads_and_large_chunks_and_it_does_not_move() {
    let size = CHUNK_MAX as usize + PAGE_SIZE as usize;
    let large = record(Kind::Raw, 0, size as u64, &vec![1; size]);
    let pad = record(Kind::Pad, 0, 0, &[0; 100]);
    assert_eq!(receive(&with_end(&[start(), pad.clone(), machine()])), Err(OutOfOrder));
    let records = with_end(&[start(), pad, large, machine()]);
    // In parts, of which the last one counts as much as the first.
    let receive = |records: &[Record], part: usize| {
        let mut checker = Checker::of_file(START);
        for (head, payload) in records {
            checker.head(&head.emit())?;
            let parts = if head.kind == Kind::Raw { part } else { payload.len() };
            payload.chunks(parts).try_for_each(|part| checker.payload(part))?;
        }
        Ok(checker.is_done())
    };
    for part in [1000, size] {
        assert_eq!(receive(&records, part), Ok(true), "{part}");
    }
    let mut altered = records.clone();
    altered[2].1[size - 1] ^= 1;
    assert_eq!(receive(&altered, 1000), Err(Digest));
    assert_eq!(receive(&with_end(&[start(), moved()]), 1000), Err(OutOfOrder));
    let mut wide = records;
    wide[1] = record(Kind::Pad, 0, 0, &[0; PAGE_SIZE as usize]);
    assert_eq!(receive(&wide, 1000), Err(TooLarge));
}

#[test]
fn a_stream_cut_anywhere_is_not_done() {
    let records = good();
    for count in 0..records.len() {
        assert_eq!(receive(&records[..count]), Ok(false), "{count} records");
    }
}

#[test]
fn streams_are_refused_for_the_right_reason() {
    let edited = |edit: fn(&mut Vec<Record>)| {
        let mut records = good();
        edit(&mut records);
        receive(&records)
    };
    type Edit = fn(&mut Vec<Record>);
    let cases: [(&str, StreamError, Edit); 24] = [
        ("payload shorter than said", Malformed, |r| r[1].1.truncate(100)),
        ("no start", Malformed, |r| r[0].1[0] ^= 1),
        ("another version", Version, |r| r[0].1[8] = 2),
        ("no START", OutOfOrder, |r| drop(r.remove(0))),
        ("two STARTs", OutOfOrder, |r| r.insert(1, start())),
        ("no MACHINE", OutOfOrder, |r| drop(r.remove(3))),
        ("two MACHINEs", OutOfOrder, |r| r.insert(3, machine())),
        ("memory behind MACHINE", OutOfOrder, |r| r.insert(4, raw(0))),
        ("something behind END", OutOfOrder, |r| r.push(raw(0))),
        ("half a page", Address, |r| r[2].0.mem_size = PAGE_SIZE / 2),
        ("off a page", Address, |r| r[2].0.address = 1),
        ("nothing", Address, |r| r[2].0.mem_size = 0),
        ("across the end", Address, |r| r[1].0.address = START.space.mem_bytes),
        ("more than all", Address, |r| r[2].0.mem_size = START.space.mem_bytes),
        ("round the end of addresses", Address, |r| r[2].0.address = u64::MAX - PAGE_SIZE + 1),
        ("the bootstrap window", Address, |r| r[1].0.address = RAM_LOW_END),
        ("high memory where there is none", Address, |r| r[1].0.address = RAM_HIGH_START),
        ("zeros with a payload", TooLarge, |r| {
            r[2] = record(Kind::Zero, 0, PAGE_SIZE, &[0]);
        }),
        ("memory that is not its payload", TooLarge, |r| r[1].0.mem_size = 2 * PAGE_SIZE),
        ("a large chunk", TooLarge, |r| {
            let size = CHUNK_MAX + PAGE_SIZE as u32;
            r[1] = record(Kind::Raw, 0, size.into(), &vec![0; size as usize]);
        }),
        ("a large block", TooLarge, |r| {
            r[1] = record(Kind::Lz4, 0, PAGE_SIZE, &vec![0; CHUNK_MAX as usize + 1]);
        }),
        ("a large state", TooLarge, |r| r[3].0.payload_size = STATE_SIZE_MAX + 1),
        ("other memory than was sent", Digest, |r| r[1].1[9] ^= 1),
        ("a record lost", Digest, |r| drop(r.remove(2))),
    ];
    for (name, error, edit) in cases {
        assert_eq!(edited(edit), Err(error), "{name}");
    }
}

#[test]
fn a_stream_for_another_machine_is_refused() {
    for expect in [
        Start { job: [1; 16], ..START },
        Start { space: Space { disk_bytes: 0, ..START.space }, ..START },
        Start { space: Space { mem_bytes: 512 * MIB, ..START.space }, ..START },
        Start { vcpus: 1, ..START },
    ] {
        assert_eq!(receive_for(expect, &good()), Err(OtherMachine));
    }
}

#[test]
fn every_bit_of_a_stream_counts() {
    let records = with_end(&[start(), zero(0x2000, MIB), machine()]);
    for (index, (head, payload)) in records.iter().enumerate() {
        let bytes = [&head.emit()[..], payload].concat();
        each_flip(&bytes, |bit, bytes| {
            let (head, payload) = bytes.split_first_chunk::<HEAD_SIZE>().unwrap();
            let mut checker = Checker::new(START);
            let mut give = |head: &[u8; HEAD_SIZE], payload: &[u8]| {
                checker.head(head).and_then(|_| checker.payload(payload))
            };
            let (before, after) = (&records[..index], &records[index + 1..]);
            let result = before
                .iter()
                .try_for_each(|(head, payload)| give(&head.emit(), payload))
                .and_then(|()| give(head, payload))
                .and_then(|()| after.iter().try_for_each(|(h, payload)| give(&h.emit(), payload)));
            assert!(result.is_err(), "record {index}, bit {bit}");
        });
    }
}

#[test]
fn heads_of_no_kind_are_refused() {
    for (byte, value) in [(0, 0), (0, 9), (1, 1), (2, 1), (3, 1)] {
        let mut bytes = raw(0).0.emit();
        bytes[byte] = value;
        assert_eq!(Head::parse(&bytes), None);
        assert_eq!(Checker::new(START).head(&bytes), Err(Malformed));
    }
}

#[test]
fn a_payload_without_a_head_is_refused() {
    assert_eq!(Checker::new(START).payload(&[]), Err(OutOfOrder));
}
