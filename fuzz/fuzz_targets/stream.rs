//! A checkpoint stream of any bytes, received as a loader does: no panic, and no memory outside the RAM.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::bytes::Reader;
use onde_wire::machine::{ColdStart, STATE_SIZE_MAX};
use onde_wire::machine::Space;
use onde_wire::stream::{Checker, Kind, Start};

const START: Start = Start { job: [9; 16], space: Space { mem_bytes: 4 << 30, disk_bytes: 1 << 30 }, vcpus: 2 };

fuzz_target!(|bytes: &[u8]| {
    // Half of the inputs go on behind a right START.
    let (skip, bytes) = bytes.split_first().map_or((false, bytes), |(b, rest)| (b % 2 == 0, rest));
    let mut checker = Checker::new(START);
    if skip {
        let head = onde_wire::stream::Head {
            kind: Kind::Start,
            payload_size: START.emit().len() as u32,
            address: 0,
            mem_size: 0,
        };
        checker.head(&head.emit()).expect("a right START");
        checker.payload(&START.emit()).expect("a right START");
    }
    let mut r = Reader::new(bytes);
    while let Some(head) = r.array() {
        let Ok(head) = checker.head(&head) else { return };
        assert!(head.payload_size <= STATE_SIZE_MAX);
        if matches!(head.kind, Kind::Raw | Kind::Zero | Kind::Lz4) {
            assert!(START.space.holds(head.address, head.mem_size));
        }
        let Some(payload) = r.take(head.payload_size as usize) else { return };
        ColdStart::parse(payload);
        if checker.payload(payload).is_err() {
            return;
        }
    }
    assert!(!checker.is_done() || !bytes.is_empty());
});
