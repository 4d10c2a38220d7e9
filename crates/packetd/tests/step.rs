//! `packetd`'s state machine on the host: what it answers, what it hands on, and what it does not.

mod stranger;

use onde_wire::handover::Handover;
use onde_wire::key::Key;
use onde_wire::packet::{Hello, Op, Packet, Prices, Reply};
use packetd::frame::Host;
use packetd::{Counts, Input, Output, Packetd};
use stranger::*;

fn packetd() -> Packetd {
    Packetd::new(Host { mac: NODE_MAC, ipv4: NODE_IPV4 }, &NODE_KEY)
}

/// The frame that answers `frame`, if one does.
fn answer(packetd: &mut Packetd, frame: &[u8]) -> Option<Vec<u8>> {
    match packetd.step(0, Input::Frame(frame)) {
        Output::Nothing => None,
        Output::Frame(reply) => Some(reply.to_vec()),
        Output::Message(_) => panic!("handed to noded"),
    }
}

/// The message that `frame` becomes.
fn handed_up(packetd: &mut Packetd, frame: &[u8]) -> Handover {
    match packetd.step(0, Input::Frame(frame)) {
        Output::Message(message) => Handover::parse(message).expect("a message"),
        other => panic!("{other:?}"),
    }
}

/// What the reply to `request` with this payload must be, byte for byte.
fn expected_reply(request: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut reply = request.to_vec();
    reply[..6].copy_from_slice(&STRANGER_MAC);
    reply[6..12].copy_from_slice(&NODE_MAC);
    reply[18..20].fill(0); // identification
    reply[22] = 64; // time to live
    reply[26..30].copy_from_slice(&NODE_IPV4);
    reply[30..34].copy_from_slice(&STRANGER_IPV4);
    reply[34] = 0; // echo reply
    reply[PAYLOAD..].copy_from_slice(payload);
    seal(&mut reply);
    reply
}

fn template() -> Packet {
    let hello = Hello {
        node: [2; 16],
        incarnation: [3; 16],
        number: 1,
        uptime_ms: 5,
        mem_mib: 1024,
        mem_mib_free: 512,
        disk_mib: 256,
        disk_mib_free: 128,
        cpus: 2,
        slots_free: 3,
        prices: Prices::default(),
    };
    Reply::Hello(hello).emit(0, &[0; 16], &Key::new(&NODE_KEY))
}

#[test]
fn echo_of_every_size_is_answered_as_icmp_says() {
    let mut packetd = packetd();
    for size in (0..=64).chain([1023, 1024, 1471, 1472]) {
        let payload: Vec<u8> = (0..size).map(|byte| byte as u8).collect();
        let request = echo(size as u16, &payload);
        assert_eq!(answer(&mut packetd, &request), Some(expected_reply(&request, &payload)));
    }
    assert_eq!(answer(&mut packetd, &echo(0, &[0; 1473])), None, "more than a frame");
}

#[test]
fn padding_behind_an_echo_is_not_sent_back() {
    let request = echo(1, b"x");
    let padded = [&request[..], &[0xaa; 17]].concat();
    assert_eq!(answer(&mut packetd(), &padded), Some(expected_reply(&request, b"x")));
}

#[test]
fn arp_tells_the_nodes_mac() {
    let mut expected = [&STRANGER_MAC[..], &NODE_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]].concat();
    expected.extend([&NODE_MAC[..], &NODE_IPV4, &STRANGER_MAC, &STRANGER_IPV4].concat());
    assert_eq!(answer(&mut packetd(), &arp()), Some(expected.clone()));
    let mut probe = arp();
    probe[28..32].fill(0);
    expected[38..42].fill(0);
    assert_eq!(answer(&mut packetd(), &probe), Some(expected));
}

#[test]
fn nothing_hostile_is_answered() {
    let mut packetd = packetd();
    packetd.step(0, Input::Message(&Handover::Hello(template()).emit()));
    for (name, frame) in hostile() {
        assert_eq!(answer(&mut packetd, &frame), None, "{name}");
    }
}

#[test]
fn a_frame_cut_anywhere_is_not_answered() {
    let mut packetd = packetd();
    for frame in [echo(0, b"hello, node"), echo(0, &boot(1)), arp()[..42].to_vec()] {
        for size in 0..frame.len() {
            assert_eq!(answer(&mut packetd, &frame[..size]), None, "cut to {size}");
        }
    }
}

#[test]
fn a_right_tag_reaches_noded_and_its_reply_finds_back() {
    let mut packetd = packetd();
    for packet in [boot(1), status(2)] {
        let request = echo(0x1234, &packet);
        let Handover::Up(cookie, inside) = handed_up(&mut packetd, &request) else { panic!() };
        assert_eq!(inside, packet);
        let reply = [0x55; 1024];
        let message = Handover::Down(cookie, reply).emit();
        let expected = expected_reply(&request, &reply);
        assert_eq!(packetd.step(0, Input::Message(&message)), Output::Frame(&expected));
    }
}

#[test]
fn hello_is_answered_from_nodeds_template_only() {
    let mut packetd = packetd();
    let request = echo(3, &hello(77));
    assert_eq!(answer(&mut packetd, &request), None, "no template yet");
    packetd.step(0, Input::Message(&Handover::Hello(template()).emit()));
    let reply = answer(&mut packetd, &request).expect("an answer");
    assert_eq!(reply.len(), request.len());
    let key = Key::new(&NODE_KEY);
    let parsed = Reply::parse(&reply[PAYLOAD..], Op::Hello, 77, Some(&key));
    assert_eq!(parsed, Reply::parse(&template(), Op::Hello, 0, Some(&key)));
    assert!(parsed.is_some());
}

#[test]
fn floods_are_limited_each_kind_by_itself() {
    let mut packetd = packetd();
    packetd.step(0, Input::Message(&Handover::Hello(template()).emit()));
    let answered = |packetd: &mut Packetd, now_ms, frame: &[u8]| {
        (0..10_000).filter(|_| packetd.step(now_ms, Input::Frame(frame)) != Output::Nothing).count()
    };
    let (ping, arp, hello) = (echo(1, b"ping"), arp(), echo(2, &hello(1)));
    assert_eq!(answered(&mut packetd, 0, &ping), 1000);
    assert_eq!(answered(&mut packetd, 0, &arp), 1000);
    assert_eq!(answered(&mut packetd, 0, &hello), 3000);
    assert_eq!(answered(&mut packetd, 10, &ping), 10, "a thousand a second");
    assert_eq!(answered(&mut packetd, u64::MAX, &ping), 1000, "never more than a burst");
    assert_eq!(answered(&mut packetd, u64::MAX, &echo(3, &boot(1))), 10_000, "paid for");
}

#[test]
fn senseless_messages_are_counted() {
    let mut packetd = packetd();
    let up = Handover::Up([0; 32], [0; 1024]).emit();
    for message in [&[][..], &[0; 1064], &up, &up[..1063]] {
        assert_eq!(packetd.step(0, Input::Message(message)), Output::Nothing);
    }
    assert_eq!(*packetd.counts(), Counts { unreadable: 4, ..Counts::default() });
}
