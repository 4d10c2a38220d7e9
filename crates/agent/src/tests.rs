//! Sessions over loopback between the client's code and the agent's, with real programs of the host: what
//! comes out is compared byte by byte, also where connections are cut.

use onde_client::channel::{Channel, ChannelError};
use onde_client::session::{Ended, FROM_END, Session, SessionError, Streams};
use onde_wire::key::Key;
use onde_wire::session::{Exit, Launch, Refusal, TAIL_MAX, Window};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use crate::children::Children;
use crate::server::Server;
use crate::start::start;

const JOB: [u8; 16] = [1; 16];
const JOB_KEY: [u8; 32] = [2; 32];
const PATIENCE: Duration = Duration::from_secs(20);

/// One reaper for this process, as in a guest.
static CHILDREN: LazyLock<Arc<Children>> =
    LazyLock::new(|| Children::start(Arc::default()).unwrap());

/// A sink that the test can look into.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

fn list(strings: &[&str]) -> Vec<u8> {
    strings.iter().flat_map(|string| [string.as_bytes(), b"\0"].concat()).collect()
}

fn launch<'a>(argv: &'a [u8], env: &'a [u8]) -> Launch<'a> {
    Launch { window: None, uid: 0, gid: 0, cwd: b"/", argv, env }
}

/// A guest whose main program is `sh -c script`; where it listens.
fn guest(script: &str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let argv = list(&["/bin/sh", "-c", script]);
    let program = start(&CHILDREN, &launch(&argv, b"PATH=/bin:/usr/bin\0"));
    let program = program.inspect(|program| program.expect_client());
    let server = Server::on(listener, JOB, &JOB_KEY);
    std::thread::spawn(move || server.run(CHILDREN.clone(), program));
    address
}

fn dial(address: SocketAddr) -> impl FnMut() -> Result<Channel, ChannelError> {
    move || Channel::connect(address, &JOB, &Key::new(&JOB_KEY), Duration::from_secs(5))
}

fn session(address: SocketAddr) -> Session<impl FnMut() -> Result<Channel, ChannelError>> {
    Session::new(dial(address), PATIENCE)
}

fn streams(input: Option<&[u8]>) -> (Streams, Sink, Sink) {
    let (output, errors) = (Sink::default(), Sink::default());
    let input = input.map(|bytes| Box::new(io::Cursor::new(bytes.to_vec())) as _);
    let (out, err) = (Box::new(output.clone()), Box::new(errors.clone()));
    (Streams { input, output: out, errors: err }, output, errors)
}

/// Passes connections on to `target`, cutting the first ones after so many bytes to the client and so many to
/// the guest.
fn cutting_relay(target: SocketAddr, cuts: &'static [(u64, u64)]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let cuts = cuts.iter().copied().chain(std::iter::repeat((u64::MAX, u64::MAX)));
        for ((to_client, to_guest), client) in cuts.zip(listener.incoming()) {
            let (client, guest) = (client.unwrap(), TcpStream::connect(target).unwrap());
            let (client_2, guest_2) = (client.try_clone().unwrap(), guest.try_clone().unwrap());
            std::thread::spawn(move || pass(guest_2, client_2, to_client));
            std::thread::spawn(move || pass(client, guest, to_guest));
        }
    });
    address
}

fn pass(from: TcpStream, mut to: TcpStream, count: u64) {
    let _ = io::copy(&mut (&from).take(count), &mut to);
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// 54 MB that no two places have in common.
fn numbers() -> Vec<u8> {
    (1..=7_000_000u32).flat_map(|i| format!("{i}\n").into_bytes()).collect()
}

fn check(script: &str, input: Option<&[u8]>, output: &str, errors: &str, exit: Exit) {
    let (streams, out, err) = streams(input);
    let ended = session(guest(script)).attach(0, true, streams).unwrap();
    assert_eq!(String::from_utf8_lossy(&out.take()), output, "{script}");
    assert_eq!(String::from_utf8_lossy(&err.take()), errors, "{script}");
    assert_eq!((ended.exit, ended.lost_bytes), (Some(exit), 0), "{script}");
}

#[test]
fn main_program_streams_and_status() {
    check("echo out; echo err >&2; exit 7", None, "out\n", "err\n", Exit::Status(7));
    check("cat; echo end", Some(b"in\n"), "in\nend\n", "", Exit::Status(0));
    check("head -c 2", Some(&[b'x'; 1 << 20]), "xx", "", Exit::Status(0));
    check("kill -9 $$", None, "", "", Exit::Signal(9));
    check("sleep 1000 & echo started", None, "started\n", "", Exit::Status(0));
    check("printf a; printf b >&2; printf c", None, "ac", "b", Exit::Status(0));
}

#[test]
fn a_signal_reaches_the_whole_group() {
    let session = session(guest("sleep 1000 | sleep 1000"));
    let (remote, (streams, ..)) = (session.remote(), streams(None));
    remote.signal(15);
    let ended = session.attach(0, true, streams).unwrap();
    assert_eq!(ended.exit, Some(Exit::Signal(15)));
}

#[test]
fn output_arrives_exactly_once_over_connections_that_break() {
    static CUTS: [(u64, u64); 5] =
        [(100, 9000), (1 << 20, 9000), (300_000, 200_000), (20 << 20, 1 << 20), (7777, 500)];
    let address = cutting_relay(guest("seq 1 7000000; exit 3"), &CUTS);
    let (streams, out, _) = streams(None);
    let ended = session(address).attach(0, true, streams).unwrap();
    assert_eq!((ended.exit, ended.lost_bytes), (Some(Exit::Status(3)), 0));
    assert!(out.take() == numbers());
}

#[test]
fn input_arrives_exactly_once_over_connections_that_break() {
    static CUTS: [(u64, u64); 4] =
        [(50_000, 300), (9000, 100_000), (1 << 20, 2 << 20), (1 << 20, 70_000)];
    let input = &numbers()[..10_000_000];
    let address = cutting_relay(guest("cat"), &CUTS);
    let (streams, out, _) = streams(Some(input));
    let ended = session(address).attach(0, true, streams).unwrap();
    assert_eq!((ended.exit, ended.lost_bytes), (Some(Exit::Status(0)), 0));
    assert!(out.take() == input);
}

#[test]
fn a_detached_program_keeps_its_tail_and_its_status() {
    let address = guest("seq 1 1000000; exit 4");
    let first = session(address);
    first.remote().detach();
    let ended = first.attach(FROM_END, true, streams(None).0).unwrap();
    assert_eq!(ended.exit, None);
    // Nobody waits for the output now, so the program runs to its end; this client sees when.
    let ended = session(address).attach(FROM_END, false, streams(None).0).unwrap();
    assert_eq!(ended.exit, Some(Exit::Status(4)));
    let (streams, out, _) = streams(None);
    let ended = session(address).attach(0, true, streams).unwrap();
    let (all, kept) = (&numbers()[..6_888_896], out.take());
    assert_eq!(ended.exit, Some(Exit::Status(4)));
    assert!(all.ends_with(&kept) && kept.len() > TAIL_MAX - 100_000);
    assert_eq!(ended.lost_bytes, (all.len() - kept.len()) as u64);
}

fn exec(
    address: SocketAddr,
    launch: &Launch<'_>,
    input: Option<&[u8]>,
) -> (Result<Ended, SessionError>, String) {
    let (streams, out, _) = streams(input);
    let ended = session(address).exec(launch, streams);
    (ended, String::from_utf8(out.take()).unwrap())
}

#[test]
fn exec_runs_beside_the_main_program() {
    let address = guest("sleep 1000");
    let run = |argv: &[&str], input| {
        let argv = list(argv);
        let env = list(&["PATH=/nowhere:/usr/bin:/bin", "A=b=c"]);
        exec(address, &Launch { cwd: b"/usr", ..launch(&argv, &env) }, input)
    };
    let (ended, output) = run(&["sh", "-c", "pwd; echo $A; cat; exit 9"], Some(b"in"));
    assert_eq!((ended.unwrap().exit, &output[..]), (Some(Exit::Status(9)), "/usr\nb=c\nin"));
    let (ended, output) = run(&["cat"], None);
    assert_eq!((ended.unwrap().exit, &output[..]), (Some(Exit::Status(0)), ""));
    for (program, expect, text) in [
        ("/bin/onde-nothing", Refusal::NotFound, "cannot start /bin/onde-nothing: No such file"),
        ("/etc/passwd", Refusal::NotExecutable, "cannot start /etc/passwd: Permission denied"),
    ] {
        let Err(SessionError::Refused { refusal, text: words }) = run(&[program], None).0 else {
            panic!("{program} started");
        };
        assert!(refusal == expect && words.starts_with(text), "{words}");
    }
}

#[test]
fn exec_on_a_terminal() {
    let address = guest("sleep 1000");
    let argv = list(&["sh", "-c", "tty | cut -c1-9; stty size; read line; echo got $line; cat"]);
    let window = Some(Window { rows: 33, columns: 77 });
    let env = list(&["PATH=/usr/bin:/bin"]);
    let (ended, output) = exec(address, &Launch { window, ..launch(&argv, &env) }, Some(b"hi\n"));
    assert_eq!(ended.unwrap().exit, Some(Exit::Status(0)));
    let output = output.replace("\r\n", "\n");
    // The terminal echoes the input whenever it comes.
    for line in ["/dev/pts/\n", "33 77\n", "got hi\n"] {
        assert!(output.contains(line), "{output:?}");
    }
}

#[test]
fn a_command_dies_with_its_client_and_the_main_program_does_not() {
    let fifo = std::env::temp_dir().join(format!("onde-agent-fifo-{}", std::process::id()));
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
    let path = fifo.to_str().unwrap().to_owned();
    static CUTS: [(u64, u64); 1] = [(450, 100_000)];
    let inner = guest("cat; echo end");
    let address = cutting_relay(inner, &CUTS);
    let client = std::thread::spawn(move || {
        let script = format!("exec 3>{path}; echo ready >&3; seq 1 10000; sleep 1000 | sleep 1000");
        let argv = list(&["/bin/sh", "-c", &script]);
        exec(address, &launch(&argv, b"PATH=/bin:/usr/bin\0"), None).0
    });
    // Ends when every process that has the fifo open is gone.
    let said = std::fs::read_to_string(&fifo).unwrap();
    std::fs::remove_file(&fifo).unwrap();
    assert_eq!(said, "ready\n");
    assert!(matches!(client.join().unwrap(), Err(SessionError::Lost(_))));
    let (streams, out, _) = streams(Some(b"alive "));
    session(inner).attach(0, true, streams).unwrap();
    assert_eq!(out.take(), b"alive end\n");
}

#[test]
fn logs_end_where_the_output_ends_now() {
    let address = guest("echo early; read line; echo $line; sleep 1000");
    let follower = session(address);
    let remote = follower.remote();
    let (told, hear) = std::sync::mpsc::channel();
    let follower = std::thread::spawn(move || {
        let streams = Streams { output: Box::new(Told(told)), ..streams(Some(b"late\n")).0 };
        follower.attach(0, true, streams)
    });
    let mut seen = Vec::new();
    while !seen.ends_with(b"late\n") {
        seen.extend(hear.recv().unwrap());
    }
    let (streams, out, _) = streams(None);
    let ended = session(address).logs(3, streams).unwrap();
    assert_eq!((ended.exit, &out.take()[..]), (None, &b"ly\nlate\n"[..]));
    remote.detach();
    assert_eq!(follower.join().unwrap().unwrap().exit, None);
}

/// Tells another thread what is written.
struct Told(std::sync::mpsc::Sender<Vec<u8>>);

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn strangers_get_no_session() {
    let address = guest("sleep 1000");
    let wrong = || Channel::connect(address, &JOB, &Key::new(&[3; 32]), Duration::from_secs(5));
    let (streams, ..) = streams(None);
    let error = Session::new(wrong, PATIENCE).attach(0, true, streams).unwrap_err();
    assert!(matches!(
        error,
        SessionError::Unreachable(ChannelError::Connection { .. } | ChannelError::Foreign { .. })
    ));
}

#[test]
fn strangers_who_dawdle_keep_no_customer_out() {
    let address = guest("echo served");
    let dawdlers: Vec<_> = (0..200).map(|_| TcpStream::connect(address).unwrap()).collect();
    let (streams, out, _) = streams(None);
    session(address).attach(0, true, streams).unwrap();
    assert_eq!(out.take(), b"served\n");
    drop(dawdlers);
}

#[test]
fn sessions_beyond_the_limit_are_refused_in_words() {
    let address = guest("cat");
    let (told, hear) = std::sync::mpsc::channel();
    let followers: Vec<_> = (0..32)
        .map(|_| {
            let (session, told) = (session(address), told.clone());
            let remote = session.remote();
            let argv = list(&["/bin/sh", "-c", "echo ready; cat"]);
            std::thread::spawn(move || {
                let streams = Streams {
                    input: Some(Box::new(Blocked)),
                    output: Box::new(Told(told)),
                    errors: Box::new(io::sink()),
                };
                session.exec(&launch(&argv, b"PATH=/bin:/usr/bin\0"), streams)
            });
            remote
        })
        .collect();
    for _ in &followers {
        hear.recv().unwrap();
    }
    let refused = session(address).attach(0, true, streams(None).0).unwrap_err();
    assert!(matches!(refused, SessionError::Refused { refusal: Refusal::Busy, .. }), "{refused}");
    followers.iter().for_each(|remote| remote.detach());
}

/// Input that neither comes nor ends.
struct Blocked;

impl Read for Blocked {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        loop {
            std::thread::park();
        }
    }
}
