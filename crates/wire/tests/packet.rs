//! Onde packets and `packetd`'s messages: their bytes, and what is refused.

mod sample;

use onde_wire::handover::{HANDOVER_SIZE, Handover, Setup};
use onde_wire::key::Key;
use onde_wire::machine::Stage;
use onde_wire::packet::*;
use onde_wire::token::PaymentToken;
use sample::*;

fn requests() -> [(Request, &'static str); 9] {
    let token = token();
    let tag = token.sign(&node());
    [
        (Request::Hello, "7d4fa13209b58e1a8af3b5e3df0e305d70a68fe9ddf7f2e9e60020d97ee30b68"),
        (
            Request::Boot(token, tag),
            "ad091fe46c4720f4b493d0279ceae6531857adb025f1bab67da40a157459cb39",
        ),
        (
            Request::Pay(PaymentToken { index: 77, value: [6; 32] }),
            "4e68b360473ed7b8596cb7d225776f74d00fd57866226e6ba435c6ea1f2a1e3c",
        ),
        (Request::Status, "afaf28d6b81cb4a5f75726334a4fb511ced2720908338bf98f23702910c56159"),
        (
            Request::Console(4096),
            "2487e40ff62e06ba9e8165eb011eb98a210b4487dcec4ab08a90d1e5e8130d1e",
        ),
        (Request::Stop(false), "c680a3553e8d314effe377dc813f0862811f9a6d6e3cd7f387b2db9df094f16d"),
        (Request::Suspend(7), "6cb7869179e9c827f46e6696c9ef49b0cf778b08d8f505581d42c4e1053feedd"),
        (Request::Wake(8), "857a2d3486ebde0a9774a1471820bb3bef5ac9ba79db4842617ec9377d5c6d80"),
        (
            Request::Renew(renewal(), renewal().sign(&node(), &JOB, &[3; 16])),
            "69a7e133ce7b1dc30fd373b825bee913b35a62afd88bd43be6048f11b33278e3",
        ),
    ]
}

fn replies() -> [(Reply, Op, &'static str); 10] {
    let hello = Hello {
        node: token().node,
        incarnation: [3; 16],
        number: 1,
        uptime_ms: 5000,
        mem_mib: 2048,
        mem_mib_free: 1024,
        disk_mib: 512,
        disk_mib_free: 256,
        cpus: 4,
        slots_free: 7,
        prices: Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 },
    };
    let booted =
        Booted { mac: [2, 0x4f, 198, 18, 1, 2], ipv4: [198, 18, 1, 2], balance_micro: 10_000 };
    let status = JobStatus {
        stage: Stage::Running,
        end: EndReason::None,
        last_index: 77,
        balance_micro: 1,
        spent_micro: 2,
        burn_micro_per_s: 3,
        seconds_left: 4,
        purge_s: 10,
        wake_micro: 11,
        age_ms: 5,
        cpu_us: 6,
        mem_mib_ms: 7,
        sent_bytes: 8,
        disk_mib_ms: 9,
        has_resumed: true,
        turn: 0,
    };
    let data = std::array::from_fn(|index| index as u8);
    let slice = ConsoleSlice { offset: 4096, total: 9000, len: 936, data };
    let paid = Paid { last_index: 77, balance_micro: 67_000 };
    let refused = Reply::Refused(Op::Boot, Status::NoMemory);
    [
        (
            Reply::Hello(hello),
            Op::Hello,
            "bd8d3d54bdad6bdabab6f5a9c28a6a0d16082c97d3c407e64186ef226f3a695e",
        ),
        (
            Reply::Boot(booted),
            Op::Boot,
            "3f1dfaaf9344cbc1119ba9d55c762eb7ba7cb1b7559fd7e90475f0c8a7a4bc0a",
        ),
        (
            Reply::Pay(paid),
            Op::Pay,
            "24e4f724b517e6da729aca346eb7446429c5d877cc0b681bf3a697cf683ec651",
        ),
        (
            Reply::Status(status),
            Op::Status,
            "d8c6186e89718fb0bea0f094876d5b25fc471bba5bad0510b68e5d39b92c0a7a",
        ),
        (
            Reply::Console(slice),
            Op::Console,
            "4e2b86343bd2df2f43fb5da3ee3c70509051f116160ffa95001101dd334a4011",
        ),
        (
            Reply::Stop(certificate().sign(&certificates())),
            Op::Stop,
            "c13f14171d04cc5d788302c9471146ea319e5a0aebf5b8db175a2b30c0905af5",
        ),
        (
            Reply::Suspend(status),
            Op::Suspend,
            "c9f0e0ff70fef6d6c6d0f37e080bb60e45f7332656770f22c1bcba2acb3bf4e2",
        ),
        (
            Reply::Wake(status),
            Op::Wake,
            "9e34e1e75fcf10e3d012d11dc1197b6871005b5356d8da564266367f97cf922e",
        ),
        (
            Reply::Renew(paid),
            Op::Renew,
            "fe1201357ee78f219277708d12e917c3a0368603cc361f70cceeef7365f3381a",
        ),
        (refused, Op::Boot, "b7255506a399b5894e2122bb76bfd933fc15dd62566bc8714481d32f89bad8c0"),
    ]
}

/// The key that a reply to `op` is tagged with.
fn reply_key(op: Op) -> Key {
    if op == Op::Hello { node() } else { job() }
}

fn is_accepted(payload: &[u8]) -> bool {
    RequestUnchecked::parse(payload).is_some_and(|request| request.verify(&node()))
}

#[test]
fn requests_keep_their_bytes() {
    for (request, golden) in requests() {
        let packet = request.emit(NONCE, &JOB, &job());
        check_golden(&packet, golden);
        assert_eq!(Request::parse(&packet), Some((request, NONCE, JOB)));
        let unchecked = RequestUnchecked::parse(&packet).expect("a request");
        assert_eq!(
            (unchecked.op(), unchecked.nonce(), unchecked.job()),
            (request.op(), NONCE, JOB)
        );
        assert_eq!(unchecked.verify(&node()), request != Request::Hello);
        assert!(!unchecked.verify(&job()), "another node's key");
    }
}

#[test]
fn the_owner_asks_under_a_key_that_the_customer_does_not_have() {
    let owner = Party::Owner.key(&node(), &JOB);
    for (request, _) in requests() {
        let packet = request.emit_as(Party::Owner, NONCE, &JOB, &owner);
        let may = matches!(request, Request::Status | Request::Stop(_));
        assert_eq!(is_accepted(&packet), may, "{request:?}");
        assert!(!is_accepted(&request.emit_as(Party::Owner, NONCE, &JOB, &job())));
        let as_customer = request.emit(NONCE, &JOB, &owner);
        assert_eq!(is_accepted(&as_customer), matches!(request, Request::Boot(..)));
        assert_eq!((Party::of(&packet), Party::of(&as_customer)), (Party::Owner, Party::Customer));
    }
    let forged = Reply::Refused(Op::Status, Status::NoJob).emit(NONCE, &JOB, &job());
    assert_eq!(Reply::parse(&forged, Op::Status, NONCE, Some(&owner)), None);
}

#[test]
fn replies_keep_their_bytes() {
    for (reply, op, golden) in replies() {
        let key = reply_key(op);
        let packet = reply.emit(NONCE, &JOB, &key);
        check_golden(&packet, golden);
        assert_eq!(Reply::parse(&packet, op, NONCE, Some(&key)), Some(reply));
        assert_eq!(Reply::parse(&packet, op, NONCE, None), Some(reply));
        assert_eq!(Reply::parse(&packet, op, NONCE + 1, Some(&key)), None, "another request's");
        assert_eq!(RequestUnchecked::parse(&packet).map(|request| request.op()), None);
    }
}

/// The bytes of a boot packet that its tag does not protect: nonce and job id of the header, and the
/// zeros behind the token. `noded` takes the job from the token and only repeats the nonce.
fn is_free_in_boot(byte: usize) -> bool {
    (8..32).contains(&byte) || byte >= BODY + Op::Boot.request_size()
}

#[test]
fn every_bit_of_a_request_counts() {
    for (request, _) in requests().into_iter().skip(1) {
        let packet = request.emit(NONCE, &JOB, &job());
        each_flip(&packet, |bit, packet| {
            let byte = bit / 8;
            let free = match request {
                Request::Boot(..) => is_free_in_boot(byte),
                _ => byte >= BODY + request.op().request_size(),
            };
            assert_eq!(is_accepted(packet), free, "{:?}, bit {bit}", request.op());
        });
    }
}

#[test]
fn every_bit_of_a_reply_counts() {
    for (reply, op, _) in replies() {
        let key = reply_key(op);
        each_flip(&reply.emit(NONCE, &JOB, &key), |bit, packet| {
            assert_eq!(Reply::parse(packet, op, NONCE, Some(&key)), None, "{op:?}, bit {bit}");
        });
    }
}

#[test]
fn packets_of_another_size_are_refused() {
    for (request, _) in requests() {
        let packet = request.emit(NONCE, &JOB, &job());
        let longer = [&packet[..], &[0]].concat();
        for payload in (0..PACKET_SIZE).map(|size| &packet[..size]).chain([&longer[..]]) {
            assert!(RequestUnchecked::parse(payload).is_none(), "{} bytes", payload.len());
            assert!(Reply::parse(payload, request.op(), NONCE, None).is_none());
        }
    }
}

#[test]
fn a_hello_reply_from_a_template_is_like_one_made_for_its_nonce() {
    let (hello, op, _) = replies()[0];
    let template = hello.emit(1, &[0; 16], &node());
    let reply = hello_reply(&template, NONCE, &node());
    assert_eq!(reply, hello.emit(NONCE, &[0; 16], &node()));
    assert_eq!(Reply::parse(&reply, op, NONCE, Some(&node())), Some(hello));
}

#[test]
fn a_reply_with_a_senseless_body_is_refused() {
    let cases: [(Op, usize, u8); 3] = [
        (Op::Status, 0, 8),                  // no such stage
        (Op::Status, 4, 8),                  // no such reason
        (Op::Console, 16, 936u16 as u8 + 1), // more bytes than there is room for
    ];
    for (op, at, value) in cases {
        let (reply, ..) = replies().into_iter().find(|(_, other, _)| *other == op).unwrap();
        let mut packet = reply.emit(NONCE, &JOB, &job());
        packet[BODY + at] = value;
        assert_eq!(Reply::parse(&packet, op, NONCE, None), None, "{op:?} {at}");
    }
    let mut packet = replies()[2].0.emit(NONCE, &JOB, &job());
    packet[6] = 15;
    assert_eq!(Reply::parse(&packet, Op::Pay, NONCE, None), None, "no such status");
}

#[test]
fn handover_messages_come_back_as_they_were() {
    let cookie = std::array::from_fn(|index| index as u8);
    let packet = [7; PACKET_SIZE];
    for (message, kind) in [
        (Handover::Up(cookie, packet), b"ONDE  UP"),
        (Handover::Down(cookie, packet), b"ONDEDOWN"),
        (Handover::Hello(packet), b"ONDEHELO"),
    ] {
        let bytes = message.emit();
        assert_eq!(&bytes[..8], kind);
        assert_eq!(bytes[8 + 32..], packet);
        assert_eq!(Handover::parse(&bytes), Some(message));
        for size in 0..HANDOVER_SIZE {
            assert_eq!(Handover::parse(&bytes[..size]), None);
        }
        each_flip(&bytes[..8], |_, kind| {
            let mut bytes = bytes;
            bytes[..8].copy_from_slice(kind);
            assert_eq!(Handover::parse(&bytes), None);
        });
    }
}

#[test]
fn setup_comes_back_as_it_was() {
    let mut interface = [0; 16];
    interface[..5].copy_from_slice(b"onde0");
    let setup = Setup { interface, ipv4: [198, 18, 1, 1], node_key: secret() };
    let bytes = setup.emit();
    let golden =
        format!("6f6e646530{}c6120101{}{}", "00".repeat(11), hex(&secret()), "00".repeat(12));
    check_golden(&bytes, &golden);
    assert!(Setup::parse(&bytes) == Some(setup));
    assert!((0..bytes.len()).all(|size| Setup::parse(&bytes[..size]).is_none()));
}
