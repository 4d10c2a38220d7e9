//! A session: what a client and `agent` say to each other inside the secure channel, on TCP port
//! [`crate::channel::PORT`] of the guest. One connection is one session.
//!
//! ```text
//!  frame   kind u8 | payload size u32 | payload             one frame is at most one record
//!  client  ATTACH or EXEC, then STDIN, STDIN_EOF, SIGNAL, WINDOW, ACK in any order, at last DETACH
//!  agent   STARTED or ERROR, then OUTPUT and ACCEPTED, at last EXITED
//!  client  SNAPSHOT, and nothing more
//!  agent   STREAM and ROUND, at last TAKEN; or ERROR
//!  client  FORK, and nothing more
//!  agent   ROUND, one MADE for each new VM, at last TAKEN; or ERROR
//!  client  MIGRATE, and nothing more
//!  agent   ROUND, SENT, perhaps STOPPED, at last MOVED, from the copy on the same connection; or ERROR, from the source that goes on
//!  client  RELEASE, and nothing more
//!  agent   RELEASED; or ERROR
//!  client  CLOCK or PURSE, and nothing more; nothing is answered
//! ```
//! Output and input are numbered by byte, so that a client that lost its connection goes on where
//! it was: OUTPUT's offset counts both streams of the program from its start, STDIN's offset counts what
//! this client (its id is in ATTACH) ever sent. Neither end keeps more than [`INPUT_MAX`] of input
//! in flight. A program's description in EXEC is also the file that tells the agent what to start. The bytes of all
//! STREAM frames, one after the other, are a checkpoint stream ([`crate::stream`]) of the guest itself.

use crate::bytes::{Reader, Writer};
use crate::channel::RECORD_MAX;
use crate::key::Tag;
use crate::token::BOOT_TOKEN_SIZE;

/// Bytes of a frame's head.
pub const HEAD_SIZE: usize = 5;
/// Most bytes of a frame: one record of the channel, so that no frame is ever cut in two.
pub const FRAME_MAX: usize = RECORD_MAX;
/// Most bytes of a frame's payload.
pub const PAYLOAD_MAX: usize = FRAME_MAX - HEAD_SIZE;
/// Most bytes of output in one OUTPUT: half a frame, a good size of write for terminals and pipes.
pub const OUTPUT_MAX: usize = 32 << 10;
/// Most bytes of input in one STDIN.
pub const STDIN_MAX: usize = 32 << 10;
/// Most bytes of input that the agent has not yet accepted; what each end buffers.
pub const INPUT_MAX: usize = 256 << 10;
/// Output that the agent keeps of each program for those who come later, bytes.
pub const TAIL_MAX: usize = 1 << 20;
/// How long the agent holds a program's output back for a client whose connection broke.
pub const GRACE_MS: u64 = 60_000;
/// Most strings in a program's arguments or environment: far more than fit a frame in practice.
pub const STRINGS_MAX: usize = 8192;
/// Longest text of an ERROR, bytes.
pub const ERROR_TEXT_MAX: usize = 1024;
/// A guest's clock that is behind by less is left as it is: a word on its way is as late.
pub const CLOCK_BEHIND_US: u64 = 20_000;
/// A guest's clock that is ahead by less is left as it is: time that goes back harms programs more.
pub const CLOCK_AHEAD_US: u64 = 1_000_000;
/// In ATTACH: begin behind all output there is now.
pub const FROM_END: u64 = u64::MAX;

/// Path in a packed guest of the main program's [`Launch`] bytes.
pub const LAUNCH_PATH: &str = "/onde/run";
/// Path in a packed guest of the list of kernel modules to load, one path a line, in this order.
pub const MODULES_PATH: &str = "/onde/modules";
/// Path in a packed guest of the loader that it sends to VMs it makes elsewhere.
pub const LOADER_PATH: &str = "/onde/loader";
/// Most VMs in one FORK: each costs the guest a connection, two threads and a megabyte of queue.
pub const FORK_MAX: usize = 16;

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// A program to start. Lists are strings that end with a zero byte each; see [`strings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch<'a> {
    /// The size of the terminal to give it, if it wants one instead of three pipes.
    pub window: Option<Window>,
    /// User id to run as.
    pub uid: u32,
    /// Group id to run as.
    pub gid: u32,
    /// Folder to start in.
    pub cwd: &'a [u8],
    /// The program, found by PATH if it has no slash, and its arguments.
    pub argv: &'a [u8],
    /// `NAME=value` strings; the whole environment.
    pub env: &'a [u8],
}

/// All that a guest needs to make a VM elsewhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Where the node answers.
    pub node: [u8; 4],
    /// Key of the new job.
    pub key: [u8; 32],
    /// Its boot token ([`crate::token::BootToken`]).
    pub token: [u8; BOOT_TOKEN_SIZE],
    /// The boot token's tag.
    pub tag: Tag,
}

impl core::fmt::Debug for Ticket {
    // The key stays out of logs.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Ticket").field("node", &self.node).finish_non_exhaustive()
    }
}

/// Bytes of a [`Ticket`].
pub const TICKET_SIZE: usize = 4 + 32 + BOOT_TOKEN_SIZE + 32;

impl Ticket {
    /// The ticket's bytes.
    pub fn emit(&self) -> [u8; TICKET_SIZE] {
        let mut out = [0; TICKET_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&self.node);
        w.put(&self.key);
        w.put(&self.token);
        w.put(&self.tag);
        out
    }

    /// Reads a ticket.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        let ticket = Self { node: r.array()?, key: r.array()?, token: r.array()?, tag: r.array()? };
        r.rest().is_empty().then_some(ticket)
    }
}

/// The strings of a list in [`Launch`].
pub fn strings(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.strip_suffix(b"\0").into_iter().flat_map(|list| list.split(|&byte| byte == 0))
}

impl<'a> Launch<'a> {
    /// Writes the description to the front of `out`; its size, or `None` if it does not fit.
    pub fn emit(&self, out: &mut [u8]) -> Option<usize> {
        let size = 24 + self.cwd.len() + self.argv.len() + self.env.len();
        let mut w = Writer::new(out.get_mut(..size)?);
        let window = self.window.unwrap_or(Window { rows: 0, columns: 0 });
        w.put(&u32::from(self.window.is_some()).to_le_bytes());
        w.put(&window.rows.to_le_bytes());
        w.put(&window.columns.to_le_bytes());
        w.put(&self.uid.to_le_bytes());
        w.put(&self.gid.to_le_bytes());
        w.put(&u32::try_from(self.cwd.len()).ok()?.to_le_bytes());
        w.put(&u32::try_from(self.argv.len()).ok()?.to_le_bytes());
        w.put(self.cwd);
        w.put(self.argv);
        w.put(self.env);
        Some(size)
    }

    /// Reads a description; `None` if it is none, or names no program.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        let terminal = r.u32()?;
        let window = Window { rows: r.u16()?, columns: r.u16()? };
        let (uid, gid) = (r.u32()?, r.u32()?);
        let (cwd_size, argv_size) = (r.u32()?, r.u32()?);
        let cwd = r.take(cwd_size as usize)?;
        let argv = r.take(argv_size as usize)?;
        let env = r.rest();
        let well_formed = terminal <= 1
            && !cwd.contains(&0)
            && !argv.is_empty()
            && is_list(argv)
            && is_list(env)
            && argv[0] != 0;
        let window = (terminal == 1).then_some(window);
        well_formed.then_some(Self { window, uid, gid, cwd, argv, env })
    }
}

fn is_list(list: &[u8]) -> bool {
    matches!(list.last(), None | Some(0))
        && strings(list).take(STRINGS_MAX + 1).count() <= STRINGS_MAX
}

/// What a client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientFrame<'a> {
    /// First frame: follow the main program.
    Attach {
        /// Drawn at random by the client and kept when it connects again: the new session replaces the old.
        client: u64,
        /// Offset of the first byte of output wanted; clamped to what there is. [`FROM_END`] for none of it.
        from: u64,
        /// Whether the program waits for this client to read, also while it connects again; only
        /// such a client may send input.
        hold: bool,
    },
    /// First frame: start this program, and follow it.
    Exec(Launch<'a>),
    /// Input for the program.
    Stdin {
        /// Offset of the first byte.
        offset: u64,
        /// At most [`STDIN_MAX`].
        bytes: &'a [u8],
    },
    /// No input comes any more.
    StdinEof,
    /// A signal for the program's process group.
    Signal(u8),
    /// The terminal's new size.
    Window(Window),
    /// All output before this offset has been written where it belongs.
    Ack(u64),
    /// The session ends on purpose: nothing waits for this client any more.
    Detach,
    /// First frame: copy the whole running machine into this session.
    Snapshot,
    /// First frame: microseconds since 1970 by the client's clock, for a guest that slept in a file or moved. One that is
    /// behind by [`CLOCK_BEHIND_US`] or ahead by [`CLOCK_AHEAD_US`] is set.
    Clock(u64),
    /// First frame: payment tokens that the guest may show by itself, in place of those it had.
    Purse(Purse),
    /// First frame: make these VMs, copies of this machine at one instant: 1 to [`FORK_MAX`] [`Ticket`]s, one behind the
    /// other. Their programs stand still until RELEASE, so that each of them can make more of the same instant.
    Fork(&'a [u8]),
    /// First frame: move this machine to the VM of this [`Ticket`]'s bytes, whose job has the same guest's address.
    Migrate(&'a [u8; TICKET_SIZE]),
    /// First frame, to a copy that FORK made: its programs go on.
    Release,
}

/// Payment tokens of the job's chain, for the guest to pay with while its customer is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purse {
    /// Tokens that the node has seen.
    pub shown: u32,
    /// Index of the last token here.
    pub last: u32,
    /// How many to show at once.
    pub lot: u32,
    /// The last token; it gives all before it ([`crate::chain::walk`]).
    pub value: crate::chain::Value,
}

/// A round of a snapshot: memory that was written meanwhile is sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Number of the round; 0 is all memory, the last comes from the frozen machine.
    pub number: u32,
    /// Pages that it looks at.
    pub pages: u64,
}

/// What a snapshot was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// How long the guest stood still, microseconds by its own clock.
    pub pause_us: u64,
    /// Pages that were saved while it stood still.
    pub frozen_pages: u64,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It returned this status.
    Status(u8),
    /// This signal killed it.
    Signal(u8),
}

impl Exit {
    /// The status that a shell would report: 128 plus the number for a signal.
    pub fn shell_status(self) -> u8 {
        match self {
            Exit::Status(status) => status,
            Exit::Signal(signal) => 128u8.saturating_add(signal),
        }
    }
}

/// Why the agent refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Refusal {
    /// A frame that makes no sense, or not here.
    Protocol = 1,
    /// The program does not exist in the guest.
    NotFound = 2,
    /// It exists and cannot be started.
    NotExecutable = 3,
    /// Too many sessions.
    Busy = 4,
    /// Another session with the same client id took over.
    Replaced = 5,
    /// The guest is out of something.
    Guest = 6,
}

impl Refusal {
    /// The refusal with this number.
    pub fn parse(value: u16) -> Option<Self> {
        use Refusal::*;
        [Protocol, NotFound, NotExecutable, Busy, Replaced, Guest]
            .into_iter()
            .find(|refusal| *refusal as u16 == value)
    }
}

/// What the agent says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentFrame<'a> {
    /// The session stands.
    Started {
        /// Process id in the guest.
        pid: u32,
        /// Offset of the first byte of output that will be sent: later than wanted if that is gone.
        from: u64,
        /// Offset behind all output so far.
        end: u64,
        /// How much of this client's input arrived.
        received: u64,
    },
    /// Output.
    Output {
        /// 1 or 2; always 1 for a terminal.
        stream: u8,
        /// Offset of the first byte; larger than expected if a slow client that does not hold lost some.
        offset: u64,
        /// At most [`OUTPUT_MAX`].
        bytes: &'a [u8],
    },
    /// All input before this offset went to the program.
    Accepted(u64),
    /// The program ended and all its output was sent.
    Exited(Exit),
    /// The session is over for this reason.
    Error {
        /// Why.
        refusal: Refusal,
        /// More words, UTF-8, at most [`ERROR_TEXT_MAX`].
        text: &'a str,
    },
    /// Bytes of the checkpoint stream, at most [`OUTPUT_MAX`].
    Stream(&'a [u8]),
    /// A round of the snapshot begins.
    Round(Round),
    /// The checkpoint stream is complete.
    Taken(Taken),
    /// What became of a VM of FORK.
    Made {
        /// Its position among the tickets.
        index: u32,
        /// Empty where its loader has all of the machine; else what went wrong, UTF-8, at most [`ERROR_TEXT_MAX`].
        fault: &'a str,
    },
    /// The programs go on.
    Released,
    /// How far a round of a migration is.
    Sent {
        /// Pages that the round has still to look at.
        pages_left: u64,
        /// Bytes of stream so far, in all rounds.
        bytes: u64,
    },
    /// The programs of a machine that moves stand still from here on: they write faster than it can be copied.
    Stopped,
    /// This is the copy, on its new node.
    Moved,
}

const ATTACH: u8 = 1;
const EXEC: u8 = 2;
const STDIN: u8 = 3;
const STDIN_EOF: u8 = 4;
const SIGNAL: u8 = 5;
const WINDOW: u8 = 6;
const ACK: u8 = 7;
const DETACH: u8 = 8;
const SNAPSHOT: u8 = 9;
const CLOCK: u8 = 10;
const FORK: u8 = 11;
const RELEASE: u8 = 12;
const PURSE: u8 = 13;
const MIGRATE: u8 = 14;
const STARTED: u8 = 16;
const OUTPUT: u8 = 17;
const ACCEPTED: u8 = 18;
const EXITED: u8 = 19;
const ERROR: u8 = 20;
const STREAM: u8 = 21;
const ROUND: u8 = 22;
const TAKEN: u8 = 23;
const MADE: u8 = 24;
const RELEASED: u8 = 25;
const SENT: u8 = 26;
const MOVED: u8 = 27;
const STOPPED: u8 = 28;

/// Kind and payload size that a frame's head announces; `None` above [`PAYLOAD_MAX`].
pub fn head(bytes: &[u8; HEAD_SIZE]) -> Option<(u8, usize)> {
    let [kind, size @ ..] = *bytes;
    let size = u32::from_le_bytes(size) as usize;
    (size <= PAYLOAD_MAX).then_some((kind, size))
}

/// Puts a frame together from the fields of its payload; its size, or `None` if they do not fit.
fn frame(out: &mut [u8], kind: u8, fields: &[&[u8]]) -> Option<usize> {
    let size: usize = fields.iter().map(|field| field.len()).sum();
    let payload = set_head(out, kind, size)?;
    let mut w = Writer::new(payload);
    fields.iter().for_each(|field| w.put(field));
    Some(HEAD_SIZE + size)
}

fn set_head(out: &mut [u8], kind: u8, size: usize) -> Option<&mut [u8]> {
    if size > PAYLOAD_MAX {
        return None;
    }
    let (head, payload) = out.split_first_chunk_mut::<HEAD_SIZE>()?;
    head[0] = kind;
    head[1..].copy_from_slice(&(size as u32).to_le_bytes());
    payload.get_mut(..size)
}

impl<'a> ClientFrame<'a> {
    /// Writes the whole frame to the front of `out`; its size, or `None` if it does not fit.
    pub fn emit(&self, out: &mut [u8]) -> Option<usize> {
        use ClientFrame::*;
        match *self {
            Attach { client, from, hold } => {
                let fields = [&client.to_le_bytes()[..], &from.to_le_bytes(), &[u8::from(hold)]];
                frame(out, ATTACH, &fields)
            }
            Exec(launch) => {
                let size = launch.emit(out.get_mut(HEAD_SIZE..)?)?;
                set_head(out, EXEC, size)?;
                Some(HEAD_SIZE + size)
            }
            Stdin { offset, bytes } => frame(out, STDIN, &[&offset.to_le_bytes(), bytes]),
            StdinEof => frame(out, STDIN_EOF, &[]),
            Signal(signal) => frame(out, SIGNAL, &[&[signal]]),
            ClientFrame::Window(window) => {
                let fields = [&window.rows.to_le_bytes()[..], &window.columns.to_le_bytes()];
                frame(out, WINDOW, &fields)
            }
            Ack(offset) => frame(out, ACK, &[&offset.to_le_bytes()]),
            Detach => frame(out, DETACH, &[]),
            Snapshot => frame(out, SNAPSHOT, &[]),
            Clock(unix_us) => frame(out, CLOCK, &[&unix_us.to_le_bytes()]),
            Fork(tickets) => frame(out, FORK, &[tickets]),
            Migrate(ticket) => frame(out, MIGRATE, &[ticket]),
            Release => frame(out, RELEASE, &[]),
            ClientFrame::Purse(purse) => {
                let [shown, last, lot] = [purse.shown, purse.last, purse.lot].map(u32::to_le_bytes);
                frame(out, PURSE, &[&shown, &last, &lot, &purse.value])
            }
        }
    }

    /// Reads a frame's payload; `None` if it is none of a client.
    pub fn parse(kind: u8, payload: &'a [u8]) -> Option<Self> {
        let mut r = Reader::new(payload);
        let frame = match kind {
            ATTACH => {
                let (client, from) = (r.u64()?, r.u64()?);
                ClientFrame::Attach { client, from, hold: flag(r.u8()?)? }
            }
            EXEC => return Launch::parse(payload).map(ClientFrame::Exec),
            STDIN => {
                let offset = r.u64()?;
                let bytes = r.rest();
                let fits = (1..=STDIN_MAX).contains(&bytes.len());
                return fits.then_some(ClientFrame::Stdin { offset, bytes });
            }
            STDIN_EOF => ClientFrame::StdinEof,
            SIGNAL => ClientFrame::Signal(r.u8()?),
            WINDOW => ClientFrame::Window(Window { rows: r.u16()?, columns: r.u16()? }),
            ACK => ClientFrame::Ack(r.u64()?),
            DETACH => ClientFrame::Detach,
            SNAPSHOT => ClientFrame::Snapshot,
            CLOCK => ClientFrame::Clock(r.u64()?),
            FORK => {
                let tickets = r.rest();
                let is_whole = tickets.len().is_multiple_of(TICKET_SIZE);
                let fits = (1..=FORK_MAX).contains(&(tickets.len() / TICKET_SIZE));
                return (is_whole && fits).then_some(ClientFrame::Fork(tickets));
            }
            MIGRATE => return Some(ClientFrame::Migrate(r.rest().try_into().ok()?)),
            RELEASE => ClientFrame::Release,
            PURSE => {
                let (shown, last, lot, value) = (r.u32()?, r.u32()?, r.u32()?, r.array()?);
                ClientFrame::Purse(Purse { shown, last, lot, value })
            }
            _ => return None,
        };
        r.rest().is_empty().then_some(frame)
    }
}

impl<'a> AgentFrame<'a> {
    /// Writes the whole frame to the front of `out`; its size, or `None` if it does not fit.
    pub fn emit(&self, out: &mut [u8]) -> Option<usize> {
        use AgentFrame::*;
        match *self {
            Started { pid, from, end, received } => {
                let [from, end, received] = [from, end, received].map(u64::to_le_bytes);
                frame(out, STARTED, &[&pid.to_le_bytes(), &from, &end, &received])
            }
            Output { stream, offset, bytes } => {
                frame(out, OUTPUT, &[&[stream], &offset.to_le_bytes(), bytes])
            }
            Accepted(offset) => frame(out, ACCEPTED, &[&offset.to_le_bytes()]),
            Exited(Exit::Status(status)) => frame(out, EXITED, &[&[0, status]]),
            Exited(Exit::Signal(signal)) => frame(out, EXITED, &[&[1, signal]]),
            Error { refusal, text } => {
                let text = cut(text, ERROR_TEXT_MAX);
                frame(out, ERROR, &[&(refusal as u16).to_le_bytes(), text.as_bytes()])
            }
            Stream(bytes) => frame(out, STREAM, &[bytes]),
            AgentFrame::Round(round) => {
                frame(out, ROUND, &[&round.number.to_le_bytes(), &round.pages.to_le_bytes()])
            }
            AgentFrame::Taken(taken) => {
                let fields = [taken.pause_us, taken.frozen_pages].map(u64::to_le_bytes);
                frame(out, TAKEN, &[fields.as_flattened()])
            }
            Made { index, fault } => {
                let fault = cut(fault, ERROR_TEXT_MAX);
                frame(out, MADE, &[&index.to_le_bytes(), fault.as_bytes()])
            }
            Released => frame(out, RELEASED, &[]),
            Sent { pages_left, bytes } => {
                frame(out, SENT, &[&pages_left.to_le_bytes(), &bytes.to_le_bytes()])
            }
            Stopped => frame(out, STOPPED, &[]),
            Moved => frame(out, MOVED, &[]),
        }
    }

    /// Reads a frame's payload; `None` if it is none of an agent.
    pub fn parse(kind: u8, payload: &'a [u8]) -> Option<Self> {
        let mut r = Reader::new(payload);
        let frame = match kind {
            STARTED => {
                let (pid, from, end, received) = (r.u32()?, r.u64()?, r.u64()?, r.u64()?);
                AgentFrame::Started { pid, from, end, received }
            }
            OUTPUT => {
                let (stream, offset, bytes) = (r.u8()?, r.u64()?, r.rest());
                let fits = matches!(stream, 1 | 2) && (1..=OUTPUT_MAX).contains(&bytes.len());
                return fits.then_some(AgentFrame::Output { stream, offset, bytes });
            }
            ACCEPTED => AgentFrame::Accepted(r.u64()?),
            EXITED => match (r.u8()?, r.u8()?) {
                (0, status) => AgentFrame::Exited(Exit::Status(status)),
                (1, signal) => AgentFrame::Exited(Exit::Signal(signal)),
                _ => return None,
            },
            ERROR => {
                let refusal = Refusal::parse(r.u16()?)?;
                return Some(AgentFrame::Error { refusal, text: text(r.rest())? });
            }
            MADE => {
                let index = r.u32()?;
                return Some(AgentFrame::Made { index, fault: text(r.rest())? });
            }
            RELEASED => AgentFrame::Released,
            SENT => AgentFrame::Sent { pages_left: r.u64()?, bytes: r.u64()? },
            STOPPED => AgentFrame::Stopped,
            MOVED => AgentFrame::Moved,
            STREAM => {
                let bytes = r.rest();
                return (1..=OUTPUT_MAX)
                    .contains(&bytes.len())
                    .then_some(AgentFrame::Stream(bytes));
            }
            ROUND => AgentFrame::Round(Round { number: r.u32()?, pages: r.u64()? }),
            TAKEN => AgentFrame::Taken(Taken { pause_us: r.u64()?, frozen_pages: r.u64()? }),
            _ => return None,
        };
        r.rest().is_empty().then_some(frame)
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    core::str::from_utf8(bytes).ok().filter(|text| text.len() <= ERROR_TEXT_MAX)
}

fn flag(byte: u8) -> Option<bool> {
    (byte <= 1).then_some(byte == 1)
}

/// The longest front of `text` of at most `size` bytes that is whole characters.
fn cut(text: &str, size: usize) -> &str {
    let end = (0..=size.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests;
