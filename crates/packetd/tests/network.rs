//! The real `packetd` on a real link: a veth pair in a network namespace of the test's own, the test at
//! both other ends, as a stranger's network card and as `noded`. Needs root, `unshare` and `ip`, and
//! fails where they are missing.

mod stranger;

use onde_sys::packet::{Instruction, PacketSocket};
use onde_wire::handover::{HANDOVER_SIZE, Handover, Setup};
use onde_wire::packet::PACKET_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrV4, SocketFlags, SocketType, connect, ipproto,
    recv, send, socket, socketpair,
};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use stranger::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `test`, the body of the test of this name, in a network namespace of its own: by running
/// this program again, because entering one takes all threads of a process or none.
fn in_own_network(name: &str, test: fn()) {
    if std::env::var_os("ONDE_TEST_NETWORK").is_some() {
        return test();
    }
    let status = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("ONDE_TEST_NETWORK", "1")
        .status()
        .expect("unshare of util-linux");
    assert!(status.success(), "{name} in its own network: {status} (root is needed)");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip of iproute2");
    assert!(status.success(), "ip {arguments}: {status}");
}

/// A link with `packetd` at one end.
struct Link {
    packetd: Child,
    noded: OwnedFd,
    card: PacketSocket,
    seq: u16,
}

impl Link {
    fn new() -> Self {
        let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let (node, stranger) = (mac(NODE_MAC), mac(STRANGER_MAC));
        ip(&format!(
            "link add node address {node} type veth peer name stranger address {stranger}"
        ));
        for end in ["node", "stranger"] {
            ip(&format!("link set {end} addrgenmode none up"));
        }
        ip("address add 198.18.255.9/15 dev stranger");
        let mut card = PacketSocket::open("stranger").unwrap();
        card.start(&[Instruction { code: 6, jt: 0, jf: 0, k: 2000 }]).unwrap();
        let (packetd, noded) = spawn();
        let mut link = Self { packetd, noded, card, seq: 0 };
        link.wait_for_packetd();
        link
    }

    fn send(&self, frame: &[u8]) {
        self.card.send(frame).unwrap();
    }

    /// The next frame from the node's MAC, if one comes in time.
    fn receive(&mut self, patience: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + patience;
        let mut found = None;
        while found.is_none() {
            let left = Timespec::try_from(end.checked_duration_since(Instant::now())?).unwrap();
            poll(&mut [PollFd::new(&self.card, PollFlags::IN)], Some(&left)).unwrap();
            self.card.receive(1, |_, frame| {
                if frame[6..12] == NODE_MAC {
                    found = Some(frame.to_vec());
                }
            });
        }
        found
    }

    /// Pings until the first answer: what is sent before `packetd` is ready is lost.
    fn wait_for_packetd(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.send(&echo(0, b"are you there?"));
            if self.receive(Duration::from_millis(50)).is_some() {
                break;
            }
            assert!(Instant::now() < end, "packetd does not answer");
        }
        // Answers to pings sent meanwhile end before the first one that is ours.
        self.expect_silence("starting");
    }

    /// Proves that nothing sent so far is answered any more: a ping's answer is the next to come.
    fn expect_silence(&mut self, what: &str) {
        self.seq += 1;
        self.send(&echo(self.seq, b"are you still there?"));
        loop {
            let reply = self.receive(PATIENCE).unwrap_or_else(|| panic!("dead after {what}"));
            if reply[40..42] == self.seq.to_be_bytes() {
                return;
            }
            assert_eq!(what, "starting", "answered: {reply:02x?}");
        }
    }

    fn receive_up(&self) -> Option<([u8; 32], [u8; PACKET_SIZE])> {
        let mut message = [0; HANDOVER_SIZE];
        let (size, _) = recv(&self.noded, &mut message[..], RecvFlags::DONTWAIT).ok()?;
        match Handover::parse(&message[..size]) {
            Some(Handover::Up(cookie, packet)) => Some((cookie, packet)),
            other => panic!("{other:?}"),
        }
    }

    /// The next request, which must have come before the answer to a ping that was sent after it.
    fn expect_up(&mut self) -> ([u8; 32], [u8; PACKET_SIZE]) {
        self.expect_silence("a request");
        self.receive_up().expect("a request")
    }

    /// Hangs up and returns what `packetd` said at its end.
    fn hang_up(self) -> String {
        let Self { mut packetd, noded, .. } = self;
        drop(noded);
        let status = packetd.wait().unwrap();
        let mut log = String::new();
        packetd.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        assert!(status.success(), "{status}: {log}");
        log
    }
}

fn spawn() -> (Child, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let mut interface = [0; 16];
    interface[..4].copy_from_slice(b"node");
    let setup = Setup { interface, ipv4: NODE_IPV4, node_key: NODE_KEY };
    send(&ours, &setup.emit(), SendFlags::empty()).unwrap();
    let packetd = Command::new("sh")
        .args(["-c", "exec \"$0\" 3<&0 0</dev/null", env!("CARGO_BIN_EXE_packetd")])
        .stdin(theirs)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (packetd, ours)
}

#[test]
fn a_hosts_own_ping_is_answered() {
    in_own_network("a_hosts_own_ping_is_answered", || {
        let link = Link::new();
        // The customer's way: a ping socket, and the kernel's ARP and IP.
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 65535").unwrap();
        let ping = socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP)).unwrap();
        set_socket_timeout(&ping, Timeout::Recv, Some(PATIENCE)).unwrap();
        connect(&ping, &SocketAddrV4::new(NODE_IPV4.into(), 0)).unwrap();
        for payload in [&b"hello"[..], &[0x5a; 1472]] {
            let request = [&[8, 0, 0, 0, 0, 0, 0, 1][..], payload].concat();
            send(&ping, &request, SendFlags::empty()).unwrap();
            let mut reply = [0; 2000];
            let (size, _) = recv(&ping, &mut reply[..], RecvFlags::empty()).expect("a reply");
            assert_eq!((reply[0], &reply[8..size]), (0, payload));
        }
        let log = link.hang_up();
        assert!(log.contains("arp: 1,"), "{log}");
    });
}

#[test]
fn a_boot_packet_reaches_noded_and_its_reply_the_sender() {
    in_own_network("a_boot_packet_reaches_noded_and_its_reply_the_sender", || {
        let mut link = Link::new();
        for (seq, packet) in [(500, boot(1)), (501, status(2))] {
            let request = echo(seq, &packet);
            link.send(&request);
            let (cookie, inside) = link.expect_up();
            assert_eq!(inside, packet);
            let down = Handover::Down(cookie, [0xa5; PACKET_SIZE]).emit();
            send(&link.noded, &down, SendFlags::empty()).unwrap();
            let reply = link.receive(PATIENCE).expect("a reply");
            assert_eq!(reply.len(), request.len(), "a reply is as large as its request");
            assert_eq!(reply[40..42], seq.to_be_bytes());
            assert_eq!(reply[PAYLOAD..], [0xa5; PACKET_SIZE]);
            assert_eq!(internet_sum(&reply[14..34]), 0);
            assert_eq!(internet_sum(&reply[34..]), 0);
        }
        link.hang_up();
    });
}

#[test]
fn nothing_hostile_is_answered_or_reaches_noded() {
    in_own_network("nothing_hostile_is_answered_or_reaches_noded", || {
        let mut link = Link::new();
        for (name, frame) in hostile() {
            link.send(&frame);
            link.expect_silence(name);
            assert!(link.receive_up().is_none(), "{name} reached noded");
        }
        link.send(&echo(0, &boot(1)));
        link.expect_up();
        let log = link.hang_up();
        // The kernel's filter drops 14 of the 41 before `packetd` sees them.
        for count in ["up: 1,", "wrong_tag: 5,", "malformed: 6,", "ignored: 16,"] {
            assert!(log.contains(count), "{count} {log}");
        }
    });
}

#[test]
fn a_noded_that_does_not_read_stops_nothing() {
    in_own_network("a_noded_that_does_not_read_stops_nothing", || {
        let mut link = Link::new();
        let sent = 1000;
        for nonce in 0..sent {
            link.send(&echo(0, &status(nonce)));
        }
        link.expect_silence("a flood");
        let read = std::iter::from_fn(|| link.receive_up()).count() as u64;
        assert!((1..sent).contains(&read), "{read} of {sent} kept");
        link.send(&echo(0, &boot(1)));
        assert_eq!(link.expect_up().1, boot(1));
        let log = link.hang_up();
        assert!(log.contains(&format!("lost up {}", sent - read)), "{log}");
    });
}

#[test]
fn no_privilege_is_left() {
    in_own_network("no_privilege_is_left", || {
        let link = Link::new();
        let process = format!("/proc/{}", link.packetd.id());
        let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
        let fields: Vec<Vec<&str>> =
            status.lines().map(|line| line.split_whitespace().collect()).collect();
        let id = ["65533"; 4];
        let none = ["0000000000000000"];
        for (name, expected) in [
            ("Uid:", &id[..]),
            ("Gid:", &id),
            ("Groups:", &[]),
            ("CapInh:", &none),
            ("CapPrm:", &none),
            ("CapEff:", &none),
            ("CapAmb:", &none),
            ("NoNewPrivs:", &["1"]),
            ("Seccomp:", &["2"]),
            ("Threads:", &["1"]),
        ] {
            let field = fields.iter().find(|field| field[0] == name).expect(name);
            assert_eq!(field[1..], *expected, "{name}");
        }
        let root = std::fs::read_link(format!("{process}/root")).unwrap();
        assert!(root.to_string_lossy().ends_with(" (deleted)"), "{root:?}");
        assert_eq!(std::fs::read_dir(format!("{process}/root")).unwrap().count(), 0);
        let descriptors = std::fs::read_dir(format!("{process}/fd")).unwrap().count();
        assert_eq!(descriptors, 5, "three standard ones, noded and the network");
        link.hang_up();
    });
}
