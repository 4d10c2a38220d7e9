//! The real broker program and its poller against a node that answers ICMP echo: found by the sweep, asked about its
//! job, lost by a restart; an impostor without the cluster secret is not believed; its log is JSON. Runs in a network namespace of
//! its own, so it needs root: the test starts itself there as `--inside DIR`.

mod stage;

use onde_broker::audit::audit;
use onde_broker::store::Store;
use onde_client::api::*;
use onde_wire::key::{Key, job_key, node_key};
use onde_wire::machine::Stage as VmStage;
use onde_wire::packet::*;
use onde_wire::token::JobId;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketType, bind, ipproto, recvfrom, sendto, socket,
};
use stage::*;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub fn main() {
    let args: Vec<_> = std::env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "--inside") {
        return inside(Path::new(&args[at + 1]));
    }
    let dir = Dir::new();
    let this = std::env::current_exe().expect("this file");
    let run = Command::new("unshare").arg("-n").arg(this).arg("--inside").arg(&dir.0).status();
    assert!(run.expect("unshare").success(), "the test inside the namespace failed");
}

fn sh(command: &str) {
    let done = Command::new("sh").args(["-ec", command]).status().expect("sh");
    assert!(done.success(), "{command}");
}

/// What the invented node knows.
struct FakeNode {
    secret: [u8; 32],
    hello: Hello,
    /// Its one job, and what it has spent.
    job: Option<(JobId, u64)>,
}

impl FakeNode {
    /// What comes back: before an answer about a job, one that its customer forged with the key it has.
    fn answers(&self, packet: &Packet) -> Vec<Packet> {
        let forged = Request::parse(packet).filter(|(request, ..)| *request == Request::Status);
        let forged = forged.map(|(_, nonce, job)| {
            let key = Key::new(&node_key(&self.secret, &self.hello.node));
            let job_key = Key::new(&job_key(&key, &job));
            Reply::Refused(Op::Status, Status::NoJob).emit(nonce, &job, &job_key)
        });
        forged.into_iter().chain(self.answer(packet)).collect()
    }

    fn answer(&self, packet: &Packet) -> Option<Packet> {
        let key = Key::new(&node_key(&self.secret, &self.hello.node));
        let (request, nonce, job) = Request::parse(packet)?;
        let party_key = Party::of(packet).key(&key, &job);
        Some(match request {
            Request::Hello => Reply::Hello(self.hello).emit(nonce, &job, &key),
            Request::Status => {
                assert!(RequestUnchecked::parse(packet)?.verify(&key), "the broker's tag");
                let reply = match self.job {
                    Some((known, spent)) if known == job => {
                        Reply::Status(status(VmStage::Running, spent))
                    }
                    _ => Reply::Refused(Op::Status, Status::NoJob),
                };
                reply.emit(nonce, &job, &party_key)
            }
            _ => return None,
        })
    }
}

/// Answers echo requests at one address, in the kernel's stead, until the process ends.
fn answer_at(ipv4: Ipv4Addr, node: Arc<Mutex<FakeNode>>) {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).expect("root");
    bind(&socket, &SocketAddrV4::new(ipv4, 0)).expect("the node's address");
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            let (size, _, from) =
                recvfrom(&socket, &mut buffer, RecvFlags::empty()).expect("a packet");
            let icmp = &buffer[20..size];
            let Ok(packet) = <&Packet>::try_from(&icmp[8..]) else { continue };
            let (Some(from), 8) = (from, icmp[0]) else { continue };
            for answer in node.lock().expect("no panic").answers(packet) {
                let mut reply = [&icmp[..8], &answer].concat();
                reply[..4].fill(0);
                let sum = checksum(&reply);
                reply[2..4].copy_from_slice(&sum.to_be_bytes());
                let to = SocketAddrV4::try_from(from.clone()).expect("IPv4");
                sendto(&socket, &reply, SendFlags::empty(), &to).expect("sent");
            }
        }
    });
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
    let sum = (sum & 0xFFFF) + (sum >> 16);
    !((sum + (sum >> 16)) as u16)
}

/// Asks until the answer is as wanted: over HTTP there is nothing to wait on, and a step takes a second or three.
fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within 15 s: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Each line is an object with what programs look for, and what happened is there.
fn check_log(file: &Path) {
    let text = std::fs::read_to_string(file).expect("the log");
    let read = |line: &str| -> serde_json::Value {
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
    };
    let lines: Vec<_> = text.lines().map(read).collect();
    for line in &lines {
        let has = |field: &str| line[field].is_string();
        assert!(has("timestamp") && has("level") && has("target") && has("message"), "{line}");
    }
    for kind in ["node_up", "node_restarted", "job_settled"] {
        let is_there = |line: &serde_json::Value| {
            line["kind"] == kind && line["node"] == Hex([1_u8; 16]).to_string()
        };
        assert!(lines.iter().any(is_there), "no {kind} in {text}");
    }
}

fn inside(dir: &Path) {
    sh("ip link set lo up; ip addr add 198.18.1.1/32 dev lo; ip addr add 198.18.2.1/32 dev lo
        echo 1 > /proc/sys/net/ipv4/icmp_echo_ignore_all
        echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range");
    let honest = FakeNode { secret: SECRET, hello: hello(1, 1), job: None };
    let node = Arc::new(Mutex::new(honest));
    answer_at([198, 18, 1, 1].into(), node.clone());
    let impostor = FakeNode { secret: [0; 32], hello: hello(2, 1), job: None };
    answer_at([198, 18, 2, 1].into(), Arc::new(Mutex::new(impostor)));

    std::fs::write(
        dir.join("cluster"),
        format!("secret={}\nnetwork=198.18.0.0/15\n", "5e".repeat(32)),
    )
    .expect("a file");
    let path = |name: &str| dir.join(name);
    let ledger = place(dir);
    let mut broker = Command::new(env!("CARGO_BIN_EXE_broker"));
    match ON_POSTGRES {
        true => broker.env("DATABASE_URL", &ledger),
        false => broker.env_remove("DATABASE_URL").args(["--db", &ledger]),
    };
    let mut broker = broker
        .args(["--listen", "127.0.0.1:8180", "--log", "json", "--cluster"])
        .arg(path("cluster"))
        .arg("--admin-key-file")
        .arg(path("admin"))
        .stdout(Stdio::piped())
        .stderr(File::create(path("log")).expect("a file"))
        .spawn()
        .expect("the broker program");
    let mut lines = BufReader::new(broker.stdout.take().expect("piped")).lines();
    let ready = lines.next().expect("a broker that starts").expect("a line");
    assert_eq!(ready, "onde: broker ready 127.0.0.1:8180");

    let admin = std::fs::read_to_string(path("admin")).expect("the key it made");
    let pin = std::fs::read_to_string(path("tls.pin")).expect("the pin it made");
    let url = format!("https://127.0.0.1:8180#{}", pin.trim());
    let operator = Caller::new(&url, admin.trim());
    let customer = operator.customer("a", 100);
    let nodes = until("node found", || {
        Some(customer.get::<NodeList>("/v1/nodes").nodes).filter(|nodes| !nodes.is_empty())
    });
    assert_eq!(nodes.iter().map(|node| node.number).collect::<Vec<_>>(), [1], "and no impostor");

    let job = customer.post::<JobOpened>("/v1/jobs", &purchase(10)).job;
    let look = || customer.get::<Job>(&format!("/v1/jobs/{}", job.id));
    node.lock().expect("no panic").job = Some((job.id.0, 3 * TOKEN));
    until("its spending seen", || {
        Some(look()).filter(|job| job.booted && job.spent_micro == 3 * TOKEN)
    });
    node.lock().expect("no panic").hello.incarnation = [2; 16];
    until("its restart seen", || look().settled_by.filter(|by| *by == SettledBy::NodeRestarted));
    assert_eq!(customer.balance(), 97 * TOKEN);

    sh(&format!("kill -TERM {}", broker.id()));
    assert!(broker.wait().expect("ended").success(), "a graceful end");
    let books = audit(&Store::open(&ledger).expect("its ledger"), None).expect("sound books");
    assert_eq!(books.acts, 3, "a credit, a sale, a refund");
    check_log(&path("log"));
    println!("poll: found, asked, lost and credited a node by ICMP echo");
}
