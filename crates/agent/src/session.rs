//! One session: a connection whose client follows a program. Two threads: the receiver, which takes the
//! client's frames and never waits for the program, and the sender, which waits for output and for the client's
//! socket. Nothing is done for a client before its first frame, which proves that it knows the job key.

use onde_client::channel::{Channel, Reader, Writer};
use onde_client::session::frames::{FrameReader, FrameWriter};
use onde_client::stream::StreamWriter;
use onde_wire::session::{AgentFrame, ClientFrame, OUTPUT_MAX, Refusal, Round};
use rustix::process::Signal;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::children::{Children, spawn_thread};
use crate::copied::Copied;
use crate::door::Door;
use crate::fork::{self, Copying};
use crate::guest::set_clock;
use crate::moving;
use crate::pocket::Pocket;
use crate::program::{Cursor, Joined, Program, Step};
use crate::snapshot::{Failed, Sink};
use crate::start::{NotStarted, start};

/// A client that says nothing after the hellos is dropped.
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// A client of a snapshot that takes no bytes for so long is gone.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);
/// The main program waits for its client under the id it draws; nobody else follows what EXEC starts.
const EXEC_CLIENT: u64 = 1;

/// What sessions are about.
pub struct Guest {
    pub children: Arc<Children>,
    /// The main program, or why it did not start.
    pub program: Result<Arc<Program>, NotStarted>,
    /// Who may have a session.
    pub door: Arc<Door>,
    /// Held while a copy is made: the machine can track what is written for one only.
    pub copying: Mutex<()>,
    /// What this machine is as a copy.
    pub copied: Arc<Copied>,
    /// What the guest can pay with by itself.
    pub pocket: Pocket,
}

impl Guest {
    /// A guest whose main program is started.
    pub fn new(
        children: Arc<Children>,
        program: Result<Arc<Program>, NotStarted>,
        door: Arc<Door>,
    ) -> Self {
        let (copying, copied, pocket) = (Mutex::new(()), Arc::default(), Pocket::default());
        Self { children, program, door, copying, copied, pocket }
    }
}

/// Why a session is refused or ends.
struct End(Refusal, String);

impl From<NotStarted> for End {
    fn from(error: NotStarted) -> Self {
        End(error.refusal, error.text)
    }
}

fn protocol(text: &str) -> End {
    End(Refusal::Protocol, text.to_owned())
}

/// Serves a client until it is gone or its program has ended. `stranger` is dropped once the client has shown that it
/// knows the job key.
pub fn serve<T>(guest: &Guest, channel: Channel, stranger: T) -> io::Result<()> {
    let mut reader = FrameReader::new(channel.reader);
    let mut writer = FrameWriter::new(channel.writer);
    reader.stream().set_timeout(Some(FIRST_FRAME_TIMEOUT))?;
    let frame = reader.client()?;
    drop(stranger);
    match frame {
        ClientFrame::Snapshot => return snapshot(guest, &mut writer),
        ClientFrame::Fork(tickets) => return fork(guest, &mut writer, tickets),
        ClientFrame::Migrate(ticket) => return migrate(guest, &mut writer, ticket),
        ClientFrame::Release => return release(guest, &mut writer),
        ClientFrame::Clock(unix_us) => return set_clock(unix_us),
        ClientFrame::Purse(purse) => {
            guest.pocket.fill(purse);
            return Ok(());
        }
        _ => {}
    }
    let opened = open(guest, frame);
    let session = match opened {
        Ok(session) => session,
        Err(end) => return refuse(&mut writer, &end),
    };
    reader.stream().set_timeout(None)?;
    session.run(guest, reader, writer)
}

/// Tells a client that there are too many sessions, and a stranger nothing.
pub fn refuse_busy<T>(channel: Channel, stranger: T) -> io::Result<()> {
    let mut reader = FrameReader::new(channel.reader);
    reader.stream().set_timeout(Some(FIRST_FRAME_TIMEOUT))?;
    reader.client()?;
    drop(stranger);
    let end = End(Refusal::Busy, "the guest has too many sessions".to_owned());
    refuse(&mut FrameWriter::new(channel.writer), &end)
}

/// Says why the session is over.
fn refuse(writer: &mut FrameWriter<Writer>, End(refusal, text): &End) -> io::Result<()> {
    writer.agent(&AgentFrame::Error { refusal: *refusal, text })?;
    writer.flush()?;
    writer.stream().shutdown_write();
    Ok(())
}

/// A client and the program it follows.
struct Session {
    program: Arc<Program>,
    joined: Joined,
    /// Whether the program was started for this session and ends with it.
    is_owner: bool,
}

fn open(guest: &Guest, frame: ClientFrame<'_>) -> Result<Session, End> {
    match frame {
        ClientFrame::Attach { client, from, hold } => {
            let program = guest.program.clone()?;
            let joined = program.join(client, from, hold);
            Ok(Session { program, joined, is_owner: false })
        }
        ClientFrame::Exec(launch) => {
            let program = start(&guest.children, &launch)?;
            let joined = program.join(EXEC_CLIENT, 0, true);
            Ok(Session { program, joined, is_owner: true })
        }
        _ => Err(protocol("a session begins with ATTACH, EXEC, SNAPSHOT, FORK or MIGRATE")),
    }
}

impl Session {
    fn run(
        self,
        guest: &Guest,
        reader: FrameReader<Reader>,
        mut writer: FrameWriter<Writer>,
    ) -> io::Result<()> {
        let Joined { connection, from, end, received } = self.joined;
        let pid = self.program.pid();
        let is_closed = Arc::new(AtomicBool::new(false));
        let (program, closed) = (self.program.clone(), is_closed.clone());
        let sender = spawn_thread("send", move || {
            let cursor =
                Cursor { connection, position: from, accepted: received, is_closed: &closed };
            let started = AgentFrame::Started { pid, from, end, received };
            // An error means that the client is gone, which the receiver finds out too.
            let _ = writer.agent(&started).and_then(|()| send(&program, cursor, &mut writer));
            writer.stream().shutdown_write();
        });
        let is_done = match sender {
            Ok(()) => self.receive(guest, reader),
            Err(_) => false,
        };
        self.program.close(&is_closed);
        self.leave(guest, is_done);
        sender
    }

    /// The client is gone: what was started for it goes too.
    fn leave(&self, guest: &Guest, is_done: bool) {
        if let Some(connection) = self.joined.connection {
            self.program.leave(connection, is_done || self.is_owner);
        }
        if self.is_owner {
            guest.children.signal(&self.program, Signal::HUP);
        }
    }

    /// Takes frames until the client leaves; whether it said so.
    fn receive(&self, guest: &Guest, mut reader: FrameReader<Reader>) -> bool {
        loop {
            match reader.client() {
                Ok(ClientFrame::Detach) => return true,
                Ok(frame) => {
                    if self.take(guest, frame).is_none() {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
    }

    /// Does what a frame asks for; `None` for one that no client of ours sends.
    fn take(&self, guest: &Guest, frame: ClientFrame<'_>) -> Option<()> {
        let connection = self.joined.connection;
        match frame {
            ClientFrame::Signal(number) => {
                let signal = Signal::from_named_raw(i32::from(number))?;
                guest.children.signal(&self.program, signal);
            }
            ClientFrame::Window(window) => self.program.resize(window),
            ClientFrame::Ack(offset) => {
                if let Some(connection) = connection {
                    self.program.ack(connection, offset);
                }
            }
            ClientFrame::Stdin { offset, bytes } => {
                self.program.put_input(connection?, offset, bytes).ok()?;
            }
            ClientFrame::StdinEof => {
                connection?;
                self.program.end_input();
            }
            ClientFrame::Attach { .. }
            | ClientFrame::Exec(_)
            | ClientFrame::Detach
            | ClientFrame::Snapshot
            | ClientFrame::Fork(_)
            | ClientFrame::Migrate(_)
            | ClientFrame::Release
            | ClientFrame::Clock(_)
            | ClientFrame::Purse(_) => return None,
        }
        Some(())
    }
}

/// Copies this machine to a client. In the copy, the machine becomes its own.
fn snapshot(guest: &Guest, writer: &mut FrameWriter<Writer>) -> io::Result<()> {
    let copied = Copying::begin(guest).and_then(|copying| {
        writer.stream().set_timeout(Some(SNAPSHOT_TIMEOUT))?;
        let mut stream = StreamWriter::start(Frames(&mut *writer), copying.shape())?;
        match copying.take(&mut stream)? {
            Some((taken, state)) => stream.machine(&state).map(|_| Some(taken)).map_err(Into::into),
            None => Ok(None),
        }
    });
    match copied {
        Ok(Some(taken)) => {
            writer.agent(&AgentFrame::Taken(taken))?;
            writer.flush()
        }
        Ok(None) => {
            guest.copied.release(&guest.children);
            Ok(())
        }
        Err(Failed::Sink(error)) => Err(error),
        Err(Failed::Machine(text)) => refuse(writer, &End(Refusal::Guest, text)),
    }
}

/// Makes VMs that are copies of this machine. In each of them this returns, too: held, for the client to release.
fn fork(guest: &Guest, writer: &mut FrameWriter<Writer>, tickets: &[u8]) -> io::Result<()> {
    guest.copied.serve();
    let forked = fork::run(guest, writer, tickets);
    guest.copied.served();
    match forked {
        Ok(Some(taken)) => {
            writer.agent(&AgentFrame::Taken(taken))?;
            writer.flush()
        }
        Ok(None) => {
            guest.copied.hold(&guest.children);
            Ok(())
        }
        Err(Failed::Sink(error)) => Err(error),
        Err(Failed::Machine(text)) => refuse(writer, &End(Refusal::Guest, text)),
    }
}

/// Moves this machine. Only the copy gets to say so; the source says why it goes on.
fn migrate(guest: &Guest, writer: &mut FrameWriter<Writer>, ticket: &[u8]) -> io::Result<()> {
    match moving::run(guest, writer, ticket) {
        Ok(()) => {
            // Heard or not: the machine has moved.
            let told = writer.agent(&AgentFrame::Moved).and_then(|()| writer.flush());
            moving::settle_in(guest);
            told
        }
        Err(Failed::Sink(error)) => Err(error),
        Err(Failed::Machine(text)) => refuse(writer, &End(Refusal::Guest, text)),
    }
}

/// Lets the programs of a copy go on.
fn release(guest: &Guest, writer: &mut FrameWriter<Writer>) -> io::Result<()> {
    guest.copied.release(&guest.children);
    writer.agent(&AgentFrame::Released)?;
    writer.flush()
}

/// A session that takes a checkpoint stream.
struct Frames<'a>(&'a mut FrameWriter<Writer>);

impl Write for Frames<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(OUTPUT_MAX);
        if count > 0 {
            self.0.agent(&AgentFrame::Stream(&bytes[..count]))?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Sink for StreamWriter<Frames<'_>> {
    fn round(&mut self, round: Round) -> io::Result<()> {
        self.out().0.agent(&AgentFrame::Round(round))
    }

    fn memory(&mut self, address: u64, bytes: &[u8]) -> io::Result<()> {
        StreamWriter::memory(self, address, bytes)
    }
}

/// Sends what the program writes, until its end or the client's.
fn send(
    program: &Program,
    mut cursor: Cursor<'_>,
    writer: &mut FrameWriter<Writer>,
) -> io::Result<()> {
    let mut buffer = Box::new([0; OUTPUT_MAX]);
    // STARTED is still in the writer's buffer.
    let mut is_flushed = false;
    loop {
        let step = program.next(&mut cursor, &mut buffer, is_flushed);
        is_flushed = matches!(step, Step::Idle);
        match step {
            Step::Output { stream, offset, count } => {
                let bytes = &buffer[..count];
                writer.agent(&AgentFrame::Output { stream, offset, bytes })?;
            }
            Step::Accepted(offset) => writer.agent(&AgentFrame::Accepted(offset))?,
            Step::Exited(exit) => {
                writer.agent(&AgentFrame::Exited(exit))?;
                return writer.flush();
            }
            Step::Replaced => {
                let text = "the same client connected again".to_owned();
                return refuse(writer, &End(Refusal::Replaced, text));
            }
            Step::Closed => return Ok(()),
            Step::Idle => writer.flush()?,
        }
    }
}
