//! `noded` as a service, for real, in a network namespace of its own, with stand-ins for `packetd` and `vmm`: what
//! the kernel makes of its jails, filters and meters, and that nothing is left behind. Needs root, /dev/kvm, /dev/net/tun
//! and `ip`, and fails where they are missing. (That VMs run is the lab's test, on virtual metal.)

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use onde_wire::chain;
use onde_wire::cluster::hex;
use onde_wire::handover::{COOKIE_SIZE, HANDOVER_SIZE, Handover};
use onde_wire::key::{self, Key};
use onde_wire::machine::Stage;
use onde_wire::packet::{EndReason, Hello, JobStatus, Op, Packet, Reply, Request, Status};
use onde_wire::plan::Plan;
use onde_wire::token::{BootToken, JobId, Origin};

const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const PRICES: &str = "price.vcpu_s=800000\nprice.gib_s=200000\nprice.gib_sent=1000000\n\
                      price.disk_gib_s=10000\n";
/// Longer than anything here takes, even on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(20);
/// What `noded` may keep of 500 jobs that ended, each with the end of its console: 40 MiB are for 16 384.
const RECORDS_KIB: u64 = 4096;

/// Numbers of services in this process, for the names of what they need.
static SERVICES: AtomicU32 = AtomicU32::new(0);

/// A running `noded`.
struct Service {
    child: Child,
    namespace: String,
    folder: PathBuf,
    lines: Receiver<String>,
    stream: Option<UnixStream>,
    hello: Option<Hello>,
    jobs: u32,
}

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().expect("`ip` is installed");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

impl Service {
    /// Starts one on this interface, after `prepare` has run in its network namespace, which has a `card`.
    fn spawn(interface: &str, prepare: &str) -> Self {
        let number = SERVICES.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("onde-noded-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(&namespace);
        fs::create_dir_all(&folder).expect("a folder");
        fs::copy(env!("CARGO_BIN_EXE_fake-vmm"), folder.join("vmm")).expect("a copy");
        fs::copy(env!("CARGO_BIN_EXE_fake-packetd"), folder.join("packetd")).expect("a copy");
        fs::write(folder.join("mstrap"), b"no ELF").expect("a file");
        let cluster = format!("secret={SECRET}\nnetwork=198.18.0.0/15\n{PRICES}");
        fs::write(folder.join("cluster"), cluster).expect("a file");
        ip(&format!("netns add {namespace}"));
        let run = format!(
            "mount -t cgroup2 none /sys/fs/cgroup; ip link add card type veth peer name far; \
             ip link set far up; {prepare} exec {} --interface {interface} --cluster {dir}/cluster \
             --node 3 --libexec {dir} --disk 1000 --uncapped 2>&1",
            env!("CARGO_BIN_EXE_noded"),
            dir = folder.display()
        );
        let mut child = Command::new("ip")
            .args(["netns", "exec", &namespace, "sh", "-c", &run])
            .stdout(Stdio::piped())
            .spawn()
            .expect("`ip` is installed");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        Self { child, namespace, folder, lines, stream: None, hello: None, jobs: 0 }
    }

    /// Starts one on the card and waits until it can be talked to.
    fn start() -> Self {
        Self::start_on("card", "")
    }

    fn start_on(interface: &str, prepare: &str) -> Self {
        let mut service = Self::spawn(interface, prepare);
        service.line("onde: node ready");
        service.connect();
        service
    }

    /// Waits for a line that contains `text`.
    fn line(&self, text: &str) -> String {
        let mut all = String::new();
        let until = Instant::now() + PATIENCE;
        while let Ok(line) =
            self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            if line.contains(text) {
                return line;
            }
            all += &line;
            all.push('\n');
        }
        panic!("no line with {text:?}, but:\n{all}");
    }

    /// Connects to the stand-in for `packetd` and waits for its first HELLO.
    fn connect(&mut self) {
        let path = self.folder.join("socket");
        let stream = until("packetd's socket", || UnixStream::connect(&path).ok());
        stream.set_read_timeout(Some(PATIENCE)).expect("a time");
        self.stream = Some(stream);
        self.hello = None;
        while self.hello.is_none() {
            self.receive();
        }
    }

    /// The next reply; takes in HELLOs on the way.
    fn receive(&mut self) -> Option<Packet> {
        let mut message = [0u8; HANDOVER_SIZE];
        self.stream.as_mut().expect("connected").read_exact(&mut message).expect("a message");
        match Handover::parse(&message).expect("a message") {
            Handover::Down(_, packet) => Some(packet),
            Handover::Hello(packet) => {
                let reply = Reply::parse(&packet, Op::Hello, 0, None).expect("a HELLO");
                let Reply::Hello(hello) = reply else { panic!("{reply:?} is no HELLO") };
                self.hello = Some(hello);
                None
            }
            Handover::Up(..) => panic!("noded does not send requests"),
        }
    }

    fn job_key(&self, job: u32) -> Key {
        let node = self.hello.expect("connected").node;
        let node_key = Key::new(&key::node_key(&hex(SECRET).expect("hex"), &node));
        Key::new(&key::job_key(&node_key, &id(job)))
    }

    fn ask(&mut self, job: u32, request: Request) -> Reply {
        let key = self.job_key(job);
        let packet = request.emit(9, &id(job), &key);
        let up = Handover::Up([job as u8; COOKIE_SIZE], packet).emit();
        self.stream.as_mut().expect("connected").write_all(&up).expect("packetd listens");
        loop {
            if let Some(packet) = self.receive() {
                return Reply::parse(&packet, request.op(), 9, Some(&key)).expect("our reply");
            }
        }
    }

    /// Boots the stand-in for a VM whose part is `mem_mib`, with so many micro-tokens.
    fn boot(&mut self, mem_mib: u32, balance_micro: u64) -> u32 {
        self.jobs += 1;
        let (job, hello) = (self.jobs, self.hello.expect("connected"));
        let ipv4 = Plan::parse("198.18.0.0/15").expect("a network").guest(job);
        let token = BootToken {
            broker_key: [0; 8],
            node: hello.node,
            incarnation: hello.incarnation,
            job: id(job),
            expiry_ms: hello.uptime_ms + 60_000,
            anchor: chain::walk(&[9; 32], 100),
            value_micro: balance_micro,
            first_count: 1,
            loader_sha256: [0; 32],
            mem_mib,
            held_mib: mem_mib,
            origin: Origin::Loader,
            vcpus: 1,
            disk_mib: 0,
            net_kib_s: 0,
            mac: onde_wire::plan::mac(ipv4),
            ipv4,
            gateway: [0; 4],
            prefix_len: 15,
            prices: hello.prices,
        };
        let reply = self.ask(job, Request::Boot(token, [0; 32]));
        assert!(matches!(reply, Reply::Boot(_)), "{reply:?}");
        job
    }

    fn status(&mut self, job: u32) -> JobStatus {
        match self.ask(job, Request::Status) {
            Reply::Status(status) => status,
            other => panic!("{other:?} is no status"),
        }
    }

    fn console(&mut self, job: u32) -> String {
        match self.ask(job, Request::Console(0)) {
            Reply::Console(slice) => {
                String::from_utf8_lossy(&slice.data[..slice.len.into()]).into_owned()
            }
            other => panic!("{other:?} is no console"),
        }
    }

    /// Counts all that a VM consists of: descriptors, taps, control groups, processes.
    fn count(&self) -> [usize; 4] {
        let own = self.child.id();
        let entries = |path: String| fs::read_dir(path).expect("it runs").count();
        let taps = ip(&format!("-n {} -o link", self.namespace));
        let groups = format!("/proc/{own}/root/sys/fs/cgroup/onde-{own}");
        let groups = fs::read_dir(groups).expect("its group");
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children"));
        [
            entries(format!("/proc/{own}/fd")),
            taps.lines().filter(|line| line.contains(" onde-")).count(),
            groups.filter(|entry| entry.as_ref().is_ok_and(|it| it.path().is_dir())).count(),
            children.expect("it runs").split_whitespace().count(),
        ]
    }

    /// Does nothing where it has ended.
    fn signal(&self, name: &str) {
        let mut kill = Command::new("kill");
        let sent = kill.args(["-s", name, &self.child.id().to_string()]).stderr(Stdio::null());
        sent.status().expect("`kill` is there");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // So that it can clean up, which a killed one leaves to the next.
        self.signal("TERM");
        let _ = self.child.wait();
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).status();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Id of a job.
fn id(job: u32) -> JobId {
    std::array::from_fn(|at| job.to_le_bytes()[at % 4])
}

/// Waits until `look` sees something.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_vmm_is_jailed() {
    let mut service = Service::start();
    let job = service.boot(67, 1_000_000);
    let seen = until("the report", || Some(service.console(job)).filter(|text| !text.is_empty()));
    let expect = "\
pid 1
uid 100000
gid 100000
groups 0
caps 0
no new privs true
files Some(256)
root Ok(0)
parent Ok(0)
write Err(ReadOnlyFilesystem)
own lo true
host's card false
environment 0
descriptors [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
";
    assert_eq!(seen, expect);
}

#[test]
fn a_vm_sends_under_its_own_addresses_and_pays_for_that() {
    let mut service = Service::start();
    let job = service.boot(68, 1_000_000);
    // Three frames of 60 bytes from each of its pairs; those under other addresses neither leave nor count.
    let sent =
        until("frames", || Some(service.status(job).sent_bytes).filter(|bytes| *bytes >= 6 * 60));
    assert_eq!(sent, 6 * 60);
    let far = ip(&format!("-n {} -s -o link show far", service.namespace));
    // RX: bytes packets ... of the wire's far end.
    let packets: u32 = far
        .split("RX:")
        .nth(1)
        .and_then(|text| text.split('\\').nth(1)?.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or_else(|| panic!("{far}"));
    assert!(packets >= 6, "{far}");
}

#[test]
fn nothing_is_left_of_vms_that_ended() {
    let mut service = Service::start();
    let before = service.count();
    let idle = service.boot(64, 5_000_000);
    let off = service.boot(65, 5_000_000);
    let dies = service.boot(69, 5_000_000);
    // Lasts for half a second of one processor.
    let busy = service.boot(66, 400_000);
    assert!(service.count() > before);
    assert!(matches!(service.ask(idle, Request::Stop(false)), Reply::Stop(_)));
    for (job, stage, end) in [
        (idle, Stage::Stopped, EndReason::Stopped),
        (off, Stage::Ended, EndReason::PowerOff),
        (dies, Stage::Ended, EndReason::Fault),
        (busy, Stage::Purged, EndReason::OutOfTokens),
    ] {
        let status = until("its end", || {
            Some(service.status(job)).filter(|status| !status.stage.is_alive())
        });
        assert_eq!((status.stage, status.end), (stage, end));
    }
    let status = service.status(busy);
    assert_eq!((status.spent_micro, status.balance_micro), (400_000, 0));
    assert!(status.cpu_us > 300_000, "{status:?}");
    until("the old count", || Some(()).filter(|()| service.count() == before));
    assert_eq!(
        service.ask(
            busy,
            Request::Pay(onde_wire::token::PaymentToken {
                index: 2,
                value: chain::walk(&[9; 32], 99),
            })
        ),
        Reply::Refused(Op::Pay, Status::Ended)
    );
}

impl Service {
    fn reach(&mut self, job: u32, stage: Stage) {
        until(stage.name(), || Some(()).filter(|()| self.status(job).stage == stage));
    }

    /// Memory of `noded` itself, proc(5).
    fn memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its size");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// What is free, by HELLO.
    fn free(&mut self) -> (u32, u32, u16) {
        self.hello = None;
        while self.hello.is_none() {
            self.receive();
        }
        let hello = self.hello.expect("it came");
        (hello.mem_mib_free, hello.disk_mib_free, hello.slots_free)
    }
}

#[test]
fn a_machine_goes_to_disk_and_back() {
    let mut service = Service::start();
    let before = service.count();
    let job = service.boot(72, 90_000_000);
    service.reach(job, Stage::Running);
    for turn in [0, 2, 4] {
        assert!(matches!(service.ask(job, Request::Suspend(turn)), Reply::Suspend(_)));
        service.reach(job, Stage::Suspended);
        // Its console and its machine are two descriptors; all else is gone.
        let asleep = [before[0] + 2, before[1], before[2], before[3]];
        until("the rest to go", || Some(()).filter(|()| service.count() == asleep));
        assert!(matches!(service.ask(job, Request::Wake(turn + 1)), Reply::Wake(_)));
        service.reach(job, Stage::Running);
    }
    assert!(matches!(service.ask(job, Request::Stop(false)), Reply::Stop(_)));
    until("the old count", || Some(()).filter(|()| service.count() == before));
}

/// Jobs in a row: stopped before and after they ran, on disk and on the way back, and purged because nothing was left. What
/// the kernel has is counted, what HELLO offers is compared, and `noded` itself is no larger.
#[test]
fn nothing_piles_up_over_a_thousand_jobs() {
    let mut service = Service::start();
    let (before, free) = (service.count(), service.free());
    let mut small = 0;
    for number in 0..1000u32 {
        let kind = number % 5;
        let (mem_mib, balance_micro) = match kind {
            1 => (65, 90_000_000),
            // Uses all of one processor.
            4 => (66, 20_000),
            _ => (72, 90_000_000),
        };
        let job = service.boot(mem_mib, balance_micro);
        if kind == 4 {
            service.reach(job, Stage::Purged);
            continue;
        }
        if kind >= 2 {
            service.reach(job, Stage::Running);
            service.ask(job, Request::Suspend(0));
            service.reach(job, Stage::Suspended);
        }
        if kind == 3 {
            service.ask(job, Request::Wake(1));
        }
        assert!(matches!(service.ask(job, Request::Stop(false)), Reply::Stop(_)));
        // By then it has made room for what it keeps of jobs that ended.
        if number == 500 {
            small = service.memory_kib();
        }
    }
    until("the old count", || Some(()).filter(|()| service.count() == before));
    until("all to be free", || Some(()).filter(|()| service.free() == free));
    let large = service.memory_kib();
    assert!(large < small + RECORDS_KIB, "noded grew from {small} to {large} KiB");
}

#[test]
fn a_guest_pays_and_a_vmm_has_a_log() {
    let mut service = Service::start();
    let job = service.boot(70, 1_000_000);
    let seen = until("the answer", || Some(service.console(job)).filter(|text| !text.is_empty()));
    assert_eq!(seen, "Some(PayDone(false))");
    service.boot(71, 1_000_000);
    service.line("slot 1: vmm: a word for the log");
}

#[test]
fn jobs_outlive_packetd() {
    let mut service = Service::start();
    let job = service.boot(64, 5_000_000);
    until("the guest", || Some(()).filter(|()| service.status(job).stage == Stage::Running));
    let incarnation = service.hello.map(|hello| hello.incarnation);
    // The stand-in ends when its test hangs up.
    service.stream = None;
    service.line("packetd ended (exit status 0) and is started again");
    service.connect();
    assert_eq!(service.hello.map(|hello| hello.incarnation), incarnation);
    assert_eq!(service.status(job).stage, Stage::Running);
}

#[test]
fn the_host_is_left_as_it_was() {
    let mut service = Service::start();
    service.boot(64, 5_000_000);
    let group = format!("/proc/{0}/root/sys/fs/cgroup/onde-{0}", service.child.id());
    assert!(Path::new(&group).exists());
    service.signal("TERM");
    assert!(service.child.wait().expect("it ends").success());
    let links = ip(&format!("-n {} -o link", service.namespace));
    assert!(!links.contains("onde"), "{links}");
    assert!(!links.contains("master"), "{links}");
}

#[test]
fn a_bridge_that_is_there_is_used_and_stays() {
    let prepare = "ip link add br7 type bridge; ip address add 198.18.255.1/15 dev br7; \
                   ip link set card up master br7; ip link set br7 up;";
    let mut service = Service::start_on("br7", prepare);
    assert_eq!(fs::read_to_string(service.folder.join("interface")).expect("it runs"), "br7");
    service.boot(64, 5_000_000);
    let ports = ip(&format!("-n {} -o link show master br7", service.namespace));
    assert_eq!(ports.lines().count(), 2, "{ports}");
    service.signal("TERM");
    assert!(service.child.wait().expect("it ends").success());
    let ports = ip(&format!("-n {} -o link show master br7", service.namespace));
    assert!(ports.contains("card") && ports.lines().count() == 1, "{ports}");
}

#[test]
fn an_addressed_card_is_refused() {
    let service = Service::spawn("card", "ip address add 198.18.3.1/15 dev card;");
    service.line("noded: card has an IP address");
    service.line("hint: make a bridge");
}
