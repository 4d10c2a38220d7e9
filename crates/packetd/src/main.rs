//! `packetd`: the only program on a node that a stranger's packet can reach. Started by `noded` with no
//! arguments and a SEQPACKET socket as descriptor 3, whose first message says what to serve. Opens one
//! packet socket, gives up every privilege, and from then on allocates nothing and calls the kernel for
//! `poll`, `send`, `recv` and the time only. Ends when `noded` hangs up or the interface goes away.
#![forbid(unsafe_code)]

use onde_sys::heap::SealableHeap;
use onde_sys::packet::{Instruction, PacketSocket, Sent};
use onde_sys::seccomp::{Allowed, allow_only, drop_privileges, exit_now};
use onde_wire::handover::{HANDOVER_SIZE, SETUP_SIZE, Setup};
use packetd::frame::Host;
use packetd::{Input, Output, Packetd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::fmt::Write;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

#[global_allocator]
static HEAP: SealableHeap = SealableHeap::new();

/// Where `noded`'s socket is.
const NODED: i32 = 3;
/// An id that owns no file and no other process of a node.
const NOBODY: u32 = 65533;
/// Inputs of one kind before the other kind has its turn: a flood delays a reply by 0.2 ms at most.
const BATCH: usize = 64;

/// All that the loop does; anything else kills the process.
const ALLOWED: [Allowed; 9] = [
    Allowed::any(libc::SYS_ppoll),
    Allowed::any(libc::SYS_recvfrom),
    // Without an address: only to the interface the socket is bound to.
    Allowed::with(libc::SYS_sendto, 4, 0),
    Allowed::any(libc::SYS_getsockopt),
    // Where the kernel has no clock to show to processes.
    Allowed::any(libc::SYS_clock_gettime),
    Allowed::with(libc::SYS_write, 0, 2),
    Allowed::any(libc::SYS_rt_sigreturn),
    Allowed::any(libc::SYS_restart_syscall),
    Allowed::any(libc::SYS_exit_group),
];

/// Why it ends, and what it was doing.
struct Failure(&'static str, io::Error);

fn main() {
    match start() {
        Ok(mut program) => {
            HEAP.seal();
            exit_now(program.finish());
        }
        Err(Failure(what, error)) => {
            eprintln!("packetd: cannot {what}: {error}");
            eprintln!("hint: noded starts packetd, as root, on an interface that is up");
            exit_now(1)
        }
    }
}

struct Program {
    noded: OwnedFd,
    socket: PacketSocket,
    packetd: Packetd,
    started: Instant,
    lost: Lost,
}

/// What could not be passed on because a queue was full.
#[derive(Default)]
struct Lost {
    up: u64,
    frames: u64,
}

fn start() -> Result<Program, Failure> {
    let doing = |what| move |error: io::Error| Failure(what, error);
    let noded =
        onde_sys::inherited::take_only(NODED).map_err(doing("take descriptor 3 from noded"))?;
    let setup = receive_setup(&noded).map_err(doing("read noded's setup message"))?;
    let name = std::str::from_utf8(&setup.interface).unwrap_or_default().trim_end_matches('\0');
    let open = doing("open a packet socket on the interface");
    let mut socket = PacketSocket::open(name).map_err(open)?;
    let node = Host { mac: socket.mac(), ipv4: setup.ipv4 };
    let filter = packetd::filter::program(&node);
    socket.start(&filter.map(instruction)).map_err(doing("receive from the interface"))?;
    drop_privileges(NOBODY).map_err(doing("become an ordinary process"))?;
    let packetd = Packetd::new(node, &setup.node_key);
    let started = Instant::now();
    allow_only(&ALLOWED).map_err(doing("restrict its system calls"))?;
    Ok(Program { noded, socket, packetd, started, lost: Lost::default() })
}

fn receive_setup(noded: &OwnedFd) -> io::Result<Setup> {
    let mut message = [0; SETUP_SIZE];
    let (size, _) = recv(noded, &mut message[..], RecvFlags::empty())?;
    Setup::parse(&message[..size]).ok_or_else(|| Errno::INVAL.into())
}

fn instruction((code, jt, jf, k): packetd::filter::Instruction) -> Instruction {
    Instruction { code, jt, jf, k }
}

impl Program {
    /// Runs until `noded` hangs up.
    fn run(&mut self) -> Result<(), Failure> {
        loop {
            self.wait().map_err(|error| Failure("wait", error))?;
            self.socket.check().map_err(|error| Failure("receive", error))?;
            self.serve_network().map_err(|error| Failure("send", error))?;
            if self.serve_noded().map_err(|error| Failure("hear noded", error))? {
                return Ok(());
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut sources =
            [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.noded, PollFlags::IN)];
        match poll(&mut sources, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    // tcb:stranger-begin
    fn serve_network(&mut self) -> io::Result<()> {
        let now_ms = self.started.elapsed().as_millis() as u64;
        let mut result = Ok(());
        self.socket.receive(BATCH, |socket, frame| {
            let output = self.packetd.step(now_ms, Input::Frame(frame));
            if let Err(error) = carry_out(output, socket, &self.noded, &mut self.lost) {
                result = Err(error);
            }
        });
        result
    }
    // tcb:stranger-end

    /// Takes what `noded` sent; true when it has hung up.
    fn serve_noded(&mut self) -> io::Result<bool> {
        let now_ms = self.started.elapsed().as_millis() as u64;
        let mut message = [0; HANDOVER_SIZE];
        for _ in 0..BATCH {
            let size = match recv(&self.noded, &mut message[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(true),
                Ok((size, _)) => size,
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let output = self.packetd.step(now_ms, Input::Message(&message[..size]));
            carry_out(output, &self.socket, &self.noded, &mut self.lost)?;
        }
        Ok(false)
    }

    /// Runs, says on `noded`'s log what happened, and returns the exit code.
    fn finish(&mut self) -> i32 {
        let result = self.run();
        let Lost { up, frames } = self.lost;
        say(format_args!("packetd: {:?}, lost up {up}, frames {frames}\n", self.packetd.counts()));
        let Err(Failure(what, error)) = result else { return 0 };
        // The text of an error would need the heap.
        let code = error.raw_os_error().unwrap_or_default();
        say(format_args!("packetd: cannot {what}: os error {code}\n"));
        1
    }
}

// tcb:stranger-begin
/// Sends an output where it belongs. What finds a full queue is lost, as on any network.
fn carry_out(
    output: Output<'_>,
    socket: &PacketSocket,
    noded: &OwnedFd,
    lost: &mut Lost,
) -> io::Result<()> {
    match output {
        Output::Nothing => {}
        Output::Frame(frame) => {
            if socket.send(frame)? == Sent::Full {
                lost.frames += 1;
            }
        }
        Output::Message(message) => {
            match send(noded, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => {} // `recv` says that it hung up
                Err(_) => lost.up += 1,
            }
        }
    }
    Ok(())
}
// tcb:stranger-end

/// Prints a line to standard error in one piece and without the heap.
fn say(text: std::fmt::Arguments<'_>) {
    struct Line([u8; 512], usize);
    impl Write for Line {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            let room = &mut self.0[self.1..];
            let count = text.len().min(room.len());
            room[..count].copy_from_slice(&text.as_bytes()[..count]);
            self.1 += count;
            Ok(())
        }
    }
    let mut line = Line([0; 512], 0);
    let _ = line.write_fmt(text);
    let _ = rustix::io::write(io::stderr(), &line.0[..line.1]);
}
