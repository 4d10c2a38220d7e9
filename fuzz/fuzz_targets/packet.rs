//! Onde packets and handover messages of any bytes: no panic; what is read is written back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::handover::{Handover, Setup};
use onde_wire::key::Key;
use onde_wire::packet::{Op, PACKET_SIZE, Packet, Reply, Request, RequestUnchecked};

fuzz_target!(|bytes: &[u8]| {
    let key = Key::new(&[7; 32]);
    if let Some(request) = RequestUnchecked::parse(bytes) {
        assert!(!request.verify(&key), "a tag was guessed");
    }
    if let Some(message) = Handover::parse(bytes) {
        assert!(Handover::parse(&message.emit()) == Some(message));
    }
    if let Some(setup) = Setup::parse(bytes) {
        assert!(Setup::parse(&setup.emit()) == Some(setup));
    }
    let mut packet = [0; PACKET_SIZE];
    let size = bytes.len().min(PACKET_SIZE);
    packet[..size].copy_from_slice(&bytes[..size]);
    request(&packet, &key);
    reply(&packet, &key);
});

fn request(packet: &Packet, key: &Key) {
    if let Some((request, nonce, job)) = Request::parse(packet) {
        let again = request.emit(nonce, &job, key);
        assert_eq!(Request::parse(&again), Some((request, nonce, job)));
    }
}

fn reply(packet: &Packet, key: &Key) {
    let nonce = u64::from_le_bytes(packet[8..16].try_into().unwrap());
    for op in [Op::Hello, Op::Boot, Op::Pay, Op::Status, Op::Console, Op::Stop, Op::Renew] {
        if let Some(reply) = Reply::parse(packet, op, nonce, None) {
            let again = reply.emit(nonce, &[0; 16], key);
            assert_eq!(Reply::parse(&again, op, nonce, Some(key)), Some(reply));
        }
    }
}
