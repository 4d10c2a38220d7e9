//! A machine in a file: takes a running guest's copy of itself from its agent, and reads such a file back to make new
//! machines of it. The file is a checkpoint stream as it is on the wire. Every byte goes through [`Checker`], in
//! and out: a file that is cut or altered boots nothing.

use crate::channel::Channel;
use crate::session::frames::{FrameReader, FrameWriter};
use crate::stream::{Progress, StreamWriter};
use onde_wire::machine::{DISK_MIB_MAX, MEM_MIB_MAX, MEM_MIB_MIN, Space, VCPUS_MAX};
use onde_wire::session::{AgentFrame, ClientFrame, Round, Taken};
use onde_wire::stream::{Checker, HEAD_SIZE, Head, Kind, START_SIZE, Start, StreamError};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest silence of an agent: between two frames it packs a chunk of memory, on a busy emulated node too.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes read from a file at once.
const PIECE: usize = 256 << 10;

/// Why no snapshot was taken. The guest goes on in any case.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The connection broke.
    #[error("the connection to the guest broke")]
    Broken(#[source] io::Error),
    /// The agent cannot.
    #[error("{0}")]
    Refused(String),
    /// What the agent sent is not the stream of this job's machine.
    #[error("the guest sent what is no copy of it ({0:?})")]
    Stream(StreamError),
    /// The file.
    #[error("cannot write {}", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Why a file is no machine.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("{} is {}", file.display(), flaw.words())]
    Flawed {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        flaw: Flaw,
    },
}

impl FileError {
    /// What to do about it, one line.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            FileError::Flawed { flaw: Flaw::Other, .. } => {
                Some("onde snapshot JOB -o FILE writes such files")
            }
            FileError::Flawed { flaw: Flaw::Version, .. } => {
                Some("use the version of onde that wrote it")
            }
            FileError::Flawed { .. } => Some("copy it again, or take the snapshot again"),
            FileError::Read { .. } => None,
        }
    }
}

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// No checkpoint stream at all.
    Other,
    /// A stream of another version.
    Version,
    /// Its end is missing.
    Cut,
    /// Not what was written.
    Altered,
}

impl Flaw {
    fn words(self) -> &'static str {
        match self {
            Flaw::Other => "no snapshot of a machine",
            Flaw::Version => "a snapshot of another version than this program reads",
            Flaw::Cut => "incomplete: its end is missing",
            Flaw::Altered => "damaged: it is not what was written",
        }
    }
}

impl From<StreamError> for Flaw {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Version => Flaw::Version,
            _ => Flaw::Altered,
        }
    }
}

/// Takes a stream in pieces of any size, and gives out its records once they are judged.
struct Scanner {
    checker: Checker,
    head: Option<Head>,
    /// What is not judged yet: less than a record.
    rest: Vec<u8>,
}

/// Why a scan ended.
enum Stop {
    Stream(StreamError),
    Io(io::Error),
}

impl Scanner {
    fn new(expect: Start) -> Self {
        Self { checker: Checker::new(expect), head: None, rest: Vec::new() }
    }

    fn push(
        &mut self,
        bytes: &[u8],
        each: &mut impl FnMut(&Head, &[u8]) -> io::Result<()>,
    ) -> Result<(), Stop> {
        self.rest.extend(bytes);
        let mut used = 0;
        loop {
            let left = &self.rest[used..];
            if let Some(head) = self.head {
                let Some(payload) = left.get(..head.payload_size as usize) else { break };
                self.checker.payload(payload).map_err(Stop::Stream)?;
                each(&head, payload).map_err(Stop::Io)?;
                used += payload.len();
                self.head = None;
            } else if self.checker.is_done() && !left.is_empty() {
                return Err(Stop::Stream(StreamError::OutOfOrder));
            } else {
                let Some(head) = left.first_chunk() else { break };
                self.head = Some(self.checker.head(head).map_err(Stop::Stream)?);
                used += HEAD_SIZE;
            }
        }
        self.rest.drain(..used);
        Ok(())
    }
}

/// What happens while a snapshot is taken.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A round begins.
    Round(Round),
    /// So many bytes of stream are here.
    Received(u64),
}

/// A file that comes to be: under another name until it is whole, and gone if it never is.
struct Draft {
    file: File,
    aside: PathBuf,
}

impl Draft {
    fn create(aside: PathBuf) -> io::Result<Self> {
        // All memory of a machine: nobody else's business.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
        Ok(Self { file, aside })
    }

    fn publish(self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.aside, target)?;
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // After `publish` it is not there any more.
        let _ = fs::remove_file(&self.aside);
    }
}

/// The name under which `file` is written by this process until it is whole.
pub fn aside(file: &Path) -> PathBuf {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    file.with_file_name(format!(".{name}.{}.part", std::process::id()))
}

/// What became a file.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    /// Its size, bytes.
    pub size: u64,
    /// What the agent says of it.
    pub taken: Taken,
}

/// Has the agent behind `channel` copy its machine, which must be `expect`, to `file`. On any error there is no such file,
/// or the one that was there before.
pub fn take(
    channel: Channel,
    expect: Start,
    file: &Path,
    mut on_event: impl FnMut(Event),
) -> Result<Snapshot, TakeError> {
    let failed = |source| TakeError::File { file: file.to_owned(), source };
    let mut draft = Draft::create(aside(file)).map_err(failed)?;
    let (mut reader, mut writer) =
        (FrameReader::new(channel.reader), FrameWriter::new(channel.writer));
    let asked = writer.client(&ClientFrame::Snapshot).and_then(|()| writer.flush());
    asked.and_then(|()| reader.stream().set_timeout(Some(SILENCE))).map_err(TakeError::Broken)?;
    let (mut scanner, mut size) = (Scanner::new(expect), 0);
    let taken = loop {
        match reader.agent().map_err(TakeError::Broken)? {
            AgentFrame::Stream(bytes) => {
                draft.file.write_all(bytes).map_err(failed)?;
                scanner.push(bytes, &mut |_, _| Ok(())).map_err(|stop| match stop {
                    Stop::Stream(error) => TakeError::Stream(error),
                    Stop::Io(error) => failed(error),
                })?;
                size += bytes.len() as u64;
                on_event(Event::Received(size));
            }
            AgentFrame::Round(round) => on_event(Event::Round(round)),
            AgentFrame::Taken(taken) if scanner.checker.is_done() => break taken,
            AgentFrame::Error { text, .. } => return Err(TakeError::Refused(text.to_owned())),
            _ => return Err(TakeError::Broken(ErrorKind::InvalidData.into())),
        }
    };
    draft.publish(file).map_err(failed)?;
    Ok(Snapshot { size, taken })
}

/// Tells a guest that slept in a file what time it is.
pub fn tell_time(channel: Channel) -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut writer = FrameWriter::new(channel.writer);
    writer.client(&ClientFrame::Clock(now.as_micros() as u64))?;
    writer.flush()
}

/// A snapshot's file whose every byte was checked.
pub struct SnapshotFile {
    path: PathBuf,
    file: File,
    start: Start,
    mem_total: u64,
}

impl SnapshotFile {
    /// Reads all of the file and judges it.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Read { file: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let start = start(&file).map_err(failed)?;
        let start = start.map_err(|flaw| FileError::Flawed { file: path.to_owned(), flaw })?;
        let mut opened = Self { path: path.to_owned(), file, start, mem_total: 0 };
        let mut mem_total = 0;
        opened.scan(|head, _| {
            mem_total += head.mem_size;
            Ok(())
        })?;
        opened.mem_total = mem_total;
        Ok(opened)
    }

    /// The machine it was taken of: its shape is the new ones'.
    pub fn start(&self) -> Start {
        self.start
    }

    /// Bytes of memory in all its records.
    pub fn mem_total(&self) -> u64 {
        self.mem_total
    }

    /// Gives out all records and judges the file once more: it may have changed meanwhile.
    fn scan(&self, mut each: impl FnMut(&Head, &[u8]) -> io::Result<()>) -> Result<(), FileError> {
        let failed = |source| FileError::Read { file: self.path.clone(), source };
        let flawed = |flaw| FileError::Flawed { file: self.path.clone(), flaw };
        (&self.file).rewind().map_err(failed)?;
        let (mut scanner, mut piece) = (Scanner::new(self.start), vec![0; PIECE]);
        loop {
            let count = match (&self.file).read(&mut piece) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
                Ok(count) => count,
            };
            if count == 0 {
                let is_done = scanner.checker.is_done() && scanner.rest.is_empty();
                return if is_done { Ok(()) } else { Err(flawed(Flaw::Cut)) };
            }
            scanner.push(&piece[..count], &mut each).map_err(|stop| match stop {
                Stop::Stream(error) => flawed(error.into()),
                Stop::Io(error) => failed(error),
            })?;
        }
    }

    /// Writes its stream to `out` for another machine of the same shape. Nothing of what was read is taken for whole
    /// before its digest agreed: else the last record is never written.
    pub fn write(
        &self,
        out: &mut impl Write,
        start: &Start,
        mut on_progress: impl FnMut(Progress),
    ) -> io::Result<Progress> {
        assert_eq!((start.space, start.vcpus), (self.start.space, self.start.vcpus));
        let mut progress = Progress { mem_total: self.mem_total, ..Progress::default() };
        let mut stream = StreamWriter::start(out, start)?;
        let mut state = Vec::new();
        let scanned = self.scan(|head, payload| {
            match head.kind {
                Kind::Start | Kind::End | Kind::Pad => {}
                Kind::Machine | Kind::Moved => state = payload.to_vec(),
                Kind::Raw | Kind::Zero | Kind::Lz4 => stream.record(head, payload)?,
            }
            progress.mem_done += head.mem_size;
            progress.sent = stream.sent();
            on_progress(progress);
            Ok(())
        });
        scanned.map_err(|error| match error {
            FileError::Read { source, .. } => source,
            flawed => io::Error::other(flawed),
        })?;
        progress.sent = stream.machine(&state)?.1;
        Ok(progress)
    }
}

/// What machine a file says it is of.
fn start(mut file: &File) -> io::Result<Result<Start, Flaw>> {
    let mut bytes = [0; HEAD_SIZE + START_SIZE];
    match file.read_exact(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Err(Flaw::Other)),
        read => read?,
    }
    let (head, payload) = bytes.split_first_chunk().expect("longer than a head");
    if !Head::parse(head).is_some_and(|head| head.kind == Kind::Start) {
        return Ok(Err(Flaw::Other));
    }
    Ok(match Start::parse(payload) {
        Err(StreamError::Version) => Err(Flaw::Version),
        Err(_) => Err(Flaw::Other),
        Ok(start) if !is_possible(&start) => Err(Flaw::Altered),
        Ok(start) => Ok(start),
    })
}

/// Whether there are machines of this shape.
fn is_possible(start: &Start) -> bool {
    let Space { mem_bytes, disk_bytes } = start.space;
    [mem_bytes, disk_bytes].iter().all(|bytes| bytes.is_multiple_of(1 << 20))
        && (MEM_MIB_MIN.into()..=MEM_MIB_MAX.into()).contains(&(mem_bytes >> 20))
        && disk_bytes >> 20 <= DISK_MIB_MAX.into()
        && (1..=VCPUS_MAX.into()).contains(&start.vcpus)
}

#[cfg(test)]
mod tests;
