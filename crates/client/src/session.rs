//! A client's end of a session with the agent of a guest: follows the main program or runs another one,
//! copies input, output and signals, and returns how the program ended. A connection that breaks is made
//! again and goes on at the byte where it was. `onde run`, `attach`, `logs` and `exec` are made of it.
//!
//! ```text
//!  input thread --> Outbox --> sender thread --> agent --> caller's thread --> output, errors
//!  Remote ---------/   ^------- acknowledged offsets ------------'
//! ```
//! Exactly once: output is numbered, the position is kept over connections, and the agent holds what was
//! not acknowledged. The agent kills what EXEC started when its connection breaks, so that is not made again.

pub mod frames;
mod outbox;

use crate::channel::{Channel, ChannelError, Writer};
use frames::{FrameReader, FrameWriter};
use onde_wire::session::{AgentFrame, ClientFrame, Exit, GRACE_MS, Launch, Refusal, Window};
use outbox::{Errand, Outbox};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use onde_wire::session::FROM_END;

/// How long the agent may take to answer the first frame: it starts a program for EXEC.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Pauses between attempts to connect grow from the first to the second.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// How long the agent may take to end a session that the user leaves.
const FAREWELL: Duration = Duration::from_secs(2);
/// Bytes read from the input at once.
const INPUT_CHUNK: usize = 16 << 10;

/// Why a session ended without the program's exit status.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The guest could not be reached in time.
    #[error("the guest cannot be reached")]
    Unreachable(#[source] ChannelError),
    /// The connection broke, and did not come back or must not.
    #[error("the connection to the guest broke")]
    Lost(#[source] io::Error),
    /// The agent refused.
    #[error("{text}")]
    Refused {
        /// Why.
        refusal: Refusal,
        /// The agent's words.
        text: String,
    },
    /// The guest gave this client up while the way there was cut.
    #[error("the way to the guest was cut for so long that input may be lost")]
    Forgotten,
    /// The output could not be written here.
    #[error("cannot write the program's output")]
    Output(#[source] io::Error),
}

/// Where input comes from and output goes to.
pub struct Streams {
    /// Read by a thread of its own until its end, which is passed on. `None`: EXEC's program finds its input at
    /// the end; the main program's input stays as it is.
    pub input: Option<Box<dyn Read + Send>>,
    /// The program's standard output.
    pub output: Box<dyn Write>,
    /// The program's standard error.
    pub errors: Box<dyn Write>,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How the program ended; `None` if the session ended before it.
    pub exit: Option<Exit>,
    /// Bytes of output that the agent no longer had.
    pub lost_bytes: u64,
    /// Offset behind the last byte of output written.
    pub position: u64,
}

/// Talks to a running session from other threads.
#[derive(Clone)]
pub struct Remote(Arc<Outbox>);

impl Remote {
    /// Sends a signal to the program's process group.
    pub fn signal(&self, signal: u8) {
        self.0.signal(signal);
    }

    /// Tells the program's terminal its new size.
    pub fn resize(&self, window: Window) {
        self.0.resize(window);
    }

    /// Ends the session and leaves the program running.
    pub fn detach(&self) {
        self.0.detach();
    }
}

/// A session to be: connects by `dial`, which is called again when a connection breaks.
pub struct Session<D> {
    dial: D,
    patience: Duration,
    is_away: Box<dyn FnMut() -> bool + Send>,
    outbox: Arc<Outbox>,
    client: u64,
}

/// What a session is about.
#[derive(Clone, Copy)]
enum Subject<'a> {
    Main { hold: bool },
    Log,
    Exec(&'a Launch<'a>),
}

/// Why a connection ended; one is made again only after `Broken`.
enum Stop {
    Ended(Option<Exit>),
    Broken(io::Error),
    Failed(SessionError),
}

/// What outlives connections.
struct Progress {
    streams: Streams,
    position: u64,
    lost_bytes: u64,
    is_started: bool,
    /// Offset at which a log ends.
    end: u64,
    /// Since when there is no connection, where there was one.
    cut_since: Option<Instant>,
}

impl<D: FnMut() -> Result<Channel, ChannelError>> Session<D> {
    /// A session over the channels that `dial` makes. `patience`: how long the first connection may take,
    /// for a guest that still boots.
    pub fn new(dial: D, patience: Duration) -> Self {
        // Without random numbers there is no channel either: that error will tell.
        let client = getrandom::u64().unwrap_or(0);
        Self { dial, patience, is_away: Box::new(|| false), outbox: Arc::default(), client }
    }

    /// A session that waits on, beyond its patience, while `is_away` says that the guest cannot answer and may yet: it is on
    /// its node's disk, or the way there is cut. From the last time that it says so on, patience begins anew.
    pub fn while_away(self, is_away: impl FnMut() -> bool + Send + 'static) -> Self {
        Self { is_away: Box::new(is_away), ..self }
    }

    /// To signal, resize and detach while the session runs.
    pub fn remote(&self) -> Remote {
        Remote(self.outbox.clone())
    }

    /// Follows the main program from offset `from` of its output to its end. With `hold` the program waits for
    /// this client to read, and takes its input; without it, a slow client loses output.
    pub fn attach(self, from: u64, hold: bool, streams: Streams) -> Result<Ended, SessionError> {
        self.run(Subject::Main { hold }, from, streams)
    }

    /// Copies what the agent still has of the main program's output from offset `from` on, and ends.
    pub fn logs(self, from: u64, streams: Streams) -> Result<Ended, SessionError> {
        self.run(Subject::Log, from, Streams { input: None, ..streams })
    }

    /// Runs another program in the guest to its end.
    pub fn exec(self, launch: &Launch<'_>, streams: Streams) -> Result<Ended, SessionError> {
        self.run(Subject::Exec(launch), 0, streams)
    }

    fn run(
        mut self,
        subject: Subject<'_>,
        from: u64,
        mut streams: Streams,
    ) -> Result<Ended, SessionError> {
        match streams.input.take() {
            Some(input) => copy_input(input, self.outbox.clone()),
            None if matches!(subject, Subject::Exec(_)) => self.outbox.end_input(),
            None => {}
        }
        let mut progress = Progress {
            streams,
            position: from,
            lost_bytes: 0,
            is_started: false,
            end: FROM_END,
            cut_since: None,
        };
        let result = self.until_end(subject, &mut progress);
        self.outbox.finish();
        let exit = result?;
        Ok(Ended { exit, lost_bytes: progress.lost_bytes, position: progress.position })
    }

    fn until_end(
        &mut self,
        subject: Subject<'_>,
        progress: &mut Progress,
    ) -> Result<Option<Exit>, SessionError> {
        let mut broken = None;
        loop {
            let channel = match self.connect(broken.take())? {
                Some(channel) => channel,
                None => return Ok(None),
            };
            match self.converse(channel, subject, progress) {
                Stop::Ended(exit) => return Ok(exit),
                Stop::Failed(error) => return Err(error),
                Stop::Broken(_) if self.outbox.is_detaching() => return Ok(None),
                Stop::Broken(error) if matches!(subject, Subject::Exec(_)) => {
                    return Err(SessionError::Lost(error));
                }
                Stop::Broken(error) => {
                    progress.cut_since.get_or_insert_with(Instant::now);
                    broken = Some(error);
                }
            }
        }
    }

    /// A connection, tried for as long as patience goes; `None` if the user asked to go meanwhile.
    fn connect(&mut self, broken: Option<io::Error>) -> Result<Option<Channel>, SessionError> {
        let grace = Duration::from_millis(GRACE_MS);
        let patience = if broken.is_some() { grace } else { self.patience };
        let (mut start, mut pause) = (Instant::now(), PAUSE_MIN);
        let mut was_away = false;
        loop {
            let error = match (self.dial)() {
                Ok(channel) => return Ok(Some(channel)),
                Err(error) => error,
            };
            if self.outbox.is_detaching() {
                return Ok(None);
            }
            let mut is_over = matches!(error, ChannelError::Foreign { .. });
            if !is_over && start.elapsed() >= patience {
                let is_away = (self.is_away)();
                // One that was away at the last look has just come back, perhaps while this call was under way.
                is_over = !std::mem::replace(&mut was_away, is_away) && !is_away;
                start = Instant::now();
            }
            if is_over {
                return Err(match broken {
                    Some(broken) => SessionError::Lost(broken),
                    None => SessionError::Unreachable(error),
                });
            }
            self.outbox.pause(pause);
            pause = PAUSE_MAX.min(pause * 2);
        }
    }

    /// One connection, from its first frame to its end.
    fn converse(&self, channel: Channel, subject: Subject<'_>, progress: &mut Progress) -> Stop {
        let mut reader = FrameReader::new(channel.reader);
        let mut writer = FrameWriter::new(channel.writer);
        let (client, from) = (self.client, progress.position);
        let first = match subject {
            Subject::Main { hold } => ClientFrame::Attach { client, from, hold },
            Subject::Log => ClientFrame::Attach { client, from, hold: false },
            Subject::Exec(launch) => ClientFrame::Exec(*launch),
        };
        let sent = writer.client(&first).and_then(|()| writer.flush());
        let sent = sent.and_then(|()| reader.stream().set_timeout(Some(START_TIMEOUT)));
        if let Err(error) = sent {
            return Stop::Broken(error);
        }
        let outbox = &*self.outbox;
        std::thread::scope(|scope| {
            let stop = match progress.start(&mut reader, subject, outbox) {
                Some(stop) => stop,
                None => {
                    // A program may be silent for ever; keepalive notices a peer that is gone.
                    if let Err(error) = reader.stream().set_timeout(None) {
                        return Stop::Broken(error);
                    }
                    scope.spawn(move || send(outbox, writer));
                    progress.listen(&mut reader, outbox)
                }
            };
            outbox.close();
            stop
        })
    }
}

/// Copies input to the outbox until either has enough. The thread may stay blocked in a read of a terminal
/// until the process ends.
fn copy_input(mut input: Box<dyn Read + Send>, outbox: Arc<Outbox>) {
    std::thread::spawn(move || {
        let mut chunk = [0; INPUT_CHUNK];
        loop {
            match input.read(&mut chunk) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return outbox.end_input(),
                Ok(count) if outbox.put_input(&chunk[..count]) => {}
                Ok(_) => return,
            }
        }
    });
}

/// Sends what the outbox has until the connection is over. An error here shows in the reader too.
fn send(outbox: &Outbox, mut writer: FrameWriter<Writer>) {
    let mut is_flushed = true;
    loop {
        let result = match outbox.next(is_flushed) {
            None => {
                is_flushed = true;
                writer.flush()
            }
            Some(Errand::Close) => break,
            Some(Errand::Detach) => {
                // The agent closes; a guest that is gone never does.
                let told = say(&mut writer, Errand::Detach).and_then(|()| writer.flush());
                if told.is_ok() {
                    outbox.wait_closed(FAREWELL);
                }
                break;
            }
            Some(errand) => {
                is_flushed = false;
                say(&mut writer, errand)
            }
        };
        if result.is_err() {
            break;
        }
    }
    writer.stream().shutdown();
}

fn say(writer: &mut FrameWriter<Writer>, errand: Errand) -> io::Result<()> {
    let frame = match &errand {
        Errand::Stdin { offset, bytes } => ClientFrame::Stdin { offset: *offset, bytes },
        Errand::StdinEof => ClientFrame::StdinEof,
        Errand::Signal(signal) => ClientFrame::Signal(*signal),
        Errand::Window(window) => ClientFrame::Window(*window),
        Errand::Ack(offset) => ClientFrame::Ack(*offset),
        Errand::Detach => ClientFrame::Detach,
        Errand::Close => return Ok(()),
    };
    writer.client(&frame)
}

impl Progress {
    /// Takes the answer to the first frame; `None` where the session stands.
    fn start<R: Read>(
        &mut self,
        reader: &mut FrameReader<R>,
        subject: Subject<'_>,
        outbox: &Outbox,
    ) -> Option<Stop> {
        match reader.agent() {
            Ok(AgentFrame::Started { from, end, received, .. }) => {
                self.reach(from);
                if matches!(subject, Subject::Log) && !self.is_started {
                    self.end = end;
                }
                self.is_started = true;
                let grace = Duration::from_millis(GRACE_MS);
                let is_late = self.cut_since.take().is_some_and(|since| since.elapsed() >= grace);
                if !outbox.open(received, self.position, is_late) {
                    return Some(Stop::Failed(SessionError::Forgotten));
                }
                (self.position >= self.end).then_some(Stop::Ended(None))
            }
            other => Some(unexpected(other)),
        }
    }

    /// The agent's next byte of output is at `offset`; what lies between was lost.
    fn reach(&mut self, offset: u64) {
        if self.position == FROM_END {
            self.position = offset;
        }
        self.lost_bytes += offset.saturating_sub(self.position);
        self.position = self.position.max(offset);
    }

    /// Writes what is new of a piece of output.
    fn write(&mut self, stream: u8, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.reach(offset);
        let known = (self.position - offset).min(bytes.len() as u64);
        let fresh = &bytes[known as usize..];
        let out = if stream == 2 { &mut self.streams.errors } else { &mut self.streams.output };
        out.write_all(fresh)?;
        self.position += fresh.len() as u64;
        out.flush()
    }

    /// Follows the output until the connection ends one way or other.
    fn listen<R: Read>(&mut self, reader: &mut FrameReader<R>, outbox: &Outbox) -> Stop {
        loop {
            match reader.agent() {
                Ok(AgentFrame::Output { stream, offset, bytes }) => {
                    if let Err(error) = self.write(stream, offset, bytes) {
                        return Stop::Failed(SessionError::Output(error));
                    }
                    outbox.ack(self.position);
                    if self.position >= self.end {
                        return Stop::Ended(None);
                    }
                }
                Ok(AgentFrame::Accepted(offset)) => outbox.accept(offset),
                Ok(AgentFrame::Exited(exit)) => return Stop::Ended(Some(exit)),
                other => return unexpected(other),
            }
        }
    }
}

/// A frame that does not belong here, or the end of the connection.
fn unexpected(frame: io::Result<AgentFrame<'_>>) -> Stop {
    match frame {
        Ok(AgentFrame::Error { refusal, text }) => {
            Stop::Failed(SessionError::Refused { refusal, text: text.to_owned() })
        }
        Ok(_) => Stop::Broken(ErrorKind::InvalidData.into()),
        Err(error) => Stop::Broken(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Dials a guest that never answers, with no patience; how often, when the looks at where it is say `away`.
    fn check(away: &'static [bool], expect: usize) {
        let dials = Cell::new(0);
        let peer = ([127, 0, 0, 1], 1).into();
        let dial = || {
            dials.set(dials.get() + 1);
            let source = ErrorKind::ConnectionRefused.into();
            Err(ChannelError::Connection { peer, source })
        };
        let mut looks = away.iter().copied();
        let mut session = Session::new(dial, Duration::ZERO)
            .while_away(move || looks.next().expect("no more looks than there are"));
        assert!(matches!(session.connect(None), Err(SessionError::Unreachable(_))));
        drop(session);
        assert_eq!(dials.get(), expect, "{away:?}");
    }

    #[test]
    fn a_guest_that_was_away_has_all_patience_when_it_is_back() {
        check(&[false], 1);
        check(&[true, true, true, false, false], 5);
        check(&[true, false, true, false, false], 5);
    }
}
