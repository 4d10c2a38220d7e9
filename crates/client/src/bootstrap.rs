//! The way into a new VM: connect to mstrap, upload the loader, send the stream, hear that it was good. `onde`
//! calls this after BOOT. It waits for mstrap to listen, and never longer than its deadlines.

use crate::channel::{Channel, ChannelError, Reader, Writer};
use crate::layout::Layout;
use crate::node::Handle;
use crate::stream::{Progress, write_cold};
use onde_wire::bootstrap::{REPORT_SIZE, Report, upload_head};
use onde_wire::channel::PORT;
use onde_wire::machine::control::{RESULT_OTHER_CPU, RESULT_OTHER_SHAPE, RESULT_UNREADABLE};
use onde_wire::stream::{Start, StreamError};
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// From BOOT until mstrap listens: the VM is made and starts, 0.3 s on emulated metal that is idle.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(30);
/// The first attempt to connect: a SYN that got lost in a bridge that had not learned the way is sent anew. Each further
/// one has twice as long: on a node so busy that an answer takes longer, none would succeed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between attempts that a node refused at once. There is nothing to be told by meanwhile.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Longest time in which the peer takes or says nothing, with a busy emulated node in mind.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// A peer that broke the connection may have said why just before.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a VM did not come to life.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// mstrap was not there, or did not know the job's key.
    #[error("the new VM does not answer")]
    Channel(#[from] ChannelError),
    /// mstrap refused the upload's form or size.
    #[error("the VM refused the loader: too large, or malformed")]
    BadUpload,
    /// The loader is not the one in the boot token.
    #[error("the VM refused the loader: the boot token names another one")]
    OtherLoader,
    /// The loader refused the stream.
    #[error("the loader refused the stream: {}", stream_words(*.0))]
    BadStream(u32),
    /// The VMM did not take the machine state.
    #[error("the new VM cannot become this machine: {}", state_words(*.0))]
    BadState(u32),
    /// What came was no report.
    #[error("the VM answered with something that is no report")]
    NoReport,
    /// The connection broke.
    #[error("the connection to the new VM broke {stage}")]
    Broken {
        /// When.
        stage: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl BootstrapError {
    /// What to do about it, one line.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            BootstrapError::Channel(_) | BootstrapError::Broken { .. } => Some(
                "the node may be overloaded or gone: onde node ls; what was not used comes back",
            ),
            BootstrapError::BadState(RESULT_OTHER_CPU) => {
                Some("another node may have the same processor: onde node ls")
            }
            BootstrapError::OtherLoader => Some("was the loader rebuilt in between? Run it again"),
            _ => None,
        }
    }
}

fn state_words(result: u32) -> &'static str {
    match result {
        RESULT_UNREADABLE => "it was saved by another version of the VMM, or is malformed",
        RESULT_OTHER_SHAPE => "it has other memory, disk or processors than were bought",
        RESULT_OTHER_CPU => "its programs saw a processor with other features than this node's",
        _ => "for a reason unknown here",
    }
}

fn stream_words(code: u32) -> &'static str {
    use StreamError::*;
    let is = |error: &StreamError| u32::from(*error as u8) == code;
    let all = [Malformed, OutOfOrder, Address, TooLarge, OtherMachine, Lz4, Digest, Version];
    match all.into_iter().find(is) {
        Some(Malformed) => "not a record",
        Some(OutOfOrder) => "a record out of order",
        Some(Address) => "memory where the VM has none",
        Some(TooLarge) => "a record that is too large",
        Some(OtherMachine) => "it is for another machine",
        Some(Lz4) => "a block that does not unpack",
        Some(Digest) => "its digest is wrong",
        Some(Version) => "a version it does not know",
        None => "for a reason unknown here",
    }
}

/// Makes a cold machine of the new VM whose mstrap listens at `ipv4`. On success the guest is about to run.
pub fn boot(
    handle: &Handle,
    ipv4: Ipv4Addr,
    loader: &[u8],
    start: &Start,
    layout: &Layout,
    on_progress: impl FnMut(Progress),
) -> Result<Progress, BootstrapError> {
    boot_stream(handle, ipv4, loader, |out| write_cold(out, start, layout, on_progress))
}

/// Makes a machine of the new VM whose mstrap listens at `ipv4`: the one whose checkpoint stream `write` writes. On
/// success the guest is about to run.
pub fn boot_stream<T>(
    handle: &Handle,
    ipv4: Ipv4Addr,
    loader: &[u8],
    write: impl FnOnce(&mut Writer) -> io::Result<T>,
) -> Result<T, BootstrapError> {
    let mut vm = Vacant::open(handle, ipv4, loader)?;
    let sent = write(vm.writer());
    vm.finish(sent)
}

/// A new VM whose loader waits for a stream.
#[derive(Debug)]
pub struct Vacant {
    channel: Channel,
}

impl Vacant {
    /// Connects to the mstrap at `ipv4` and uploads the loader.
    pub fn open(handle: &Handle, ipv4: Ipv4Addr, loader: &[u8]) -> Result<Self, BootstrapError> {
        Self::over(connect(handle, ipv4, LISTEN_TIMEOUT)?, loader)
    }

    fn over(mut channel: Channel, loader: &[u8]) -> Result<Self, BootstrapError> {
        let timeouts = channel
            .reader
            .set_timeout(Some(IDLE_TIMEOUT))
            .and_then(|()| channel.writer.set_timeout(Some(IDLE_TIMEOUT)));
        timeouts.map_err(|source| BootstrapError::Broken { stage: "at once", source })?;
        let sent = upload(&mut channel, loader);
        expect(&mut channel, sent, Report::LoaderOk, "during the loader's upload")?;
        Ok(Self { channel })
    }

    /// Where the stream goes.
    pub fn writer(&mut self) -> &mut Writer {
        &mut self.channel.writer
    }

    /// What the loader says once it has the stream: a [`Report`].
    pub fn reader(&mut self) -> &mut Reader {
        &mut self.channel.reader
    }

    /// Hears what the loader says of the stream, `sent` being how writing it went. On success the guest is about to run.
    pub fn finish<T>(mut self, sent: io::Result<T>) -> Result<T, BootstrapError> {
        expect(&mut self.channel, sent, Report::StreamOk, "during the stream")
    }
}

/// Connects to a VM that is coming up, until `patience` is over.
pub fn connect(
    handle: &Handle,
    ipv4: Ipv4Addr,
    patience: Duration,
) -> Result<Channel, ChannelError> {
    let deadline = Instant::now() + patience;
    let peer = (ipv4, PORT).into();
    let mut limit = CONNECT_TIMEOUT;
    loop {
        let attempt = Instant::now();
        match Channel::connect(peer, &handle.job, &handle.key, limit) {
            Err(ChannelError::Connection { .. }) if Instant::now() < deadline => {}
            done => return done,
        }
        if attempt.elapsed() >= limit {
            let left = deadline.saturating_duration_since(Instant::now());
            limit = (limit * 2).min(left.max(CONNECT_TIMEOUT));
        }
        std::thread::sleep(RETRY_PAUSE.saturating_sub(attempt.elapsed()));
    }
}

fn upload(channel: &mut Channel, loader: &[u8]) -> io::Result<()> {
    channel.writer.write_all(&upload_head(loader.len() as u32))?;
    channel.writer.write_all(loader)?;
    channel.writer.flush()
}

/// Hears the report on what was sent. Where sending failed, the report says why, if one came before the end.
fn expect<T>(
    channel: &mut Channel,
    sent: io::Result<T>,
    good: Report,
    stage: &'static str,
) -> Result<T, BootstrapError> {
    let broken = |source| BootstrapError::Broken { stage, source };
    if sent.is_err() {
        // An error means that the socket is dead; reading will tell.
        let _ = channel.reader.set_timeout(Some(LAST_WORDS_TIMEOUT));
    }
    let mut report = [0; REPORT_SIZE];
    if let Err(unheard) = channel.reader.read_exact(&mut report) {
        return Err(broken(sent.err().unwrap_or(unheard)));
    }
    match Report::parse(&report) {
        Some(report) if report == good => sent.map_err(broken),
        report => Err(report.and_then(refusal).unwrap_or(BootstrapError::NoReport)),
    }
}

/// What a report refuses, where it is no good news.
pub fn refusal(report: Report) -> Option<BootstrapError> {
    match report {
        Report::LoaderOk | Report::StreamOk => None,
        Report::BadUpload => Some(BootstrapError::BadUpload),
        Report::OtherLoader => Some(BootstrapError::OtherLoader),
        Report::BadStream(code) => Some(BootstrapError::BadStream(code)),
        Report::BadState(code) => Some(BootstrapError::BadState(code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Piece;
    use onde_wire::key::Key;
    use onde_wire::machine::ColdStart;
    use onde_wire::machine::Space;
    use std::net::TcpListener;

    /// Boots against a VM that reads `read_bytes` behind the hellos, answers with `reports`, and leaves.
    fn check(read_bytes: usize, reports: &[Report], expect: &str) {
        let handle = Handle { job: [1; 16], key: Key::new(&[2; 32]), node: Ipv4Addr::LOCALHOST };
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let peer = listener.local_addr().unwrap();
        let layout = Layout {
            pieces: vec![Piece {
                address: 0,
                bytes: (0..4 << 20).map(|i| (i / 3) as u8).collect(),
            }],
            start: ColdStart::Pvh { entry: 1, start_info: 2 },
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let stream = listener.accept().unwrap().0;
                let mut vm = Channel::accept(stream, &handle.job, &handle.key).unwrap();
                vm.reader.read_exact(&mut vec![0; read_bytes]).unwrap();
                for report in reports {
                    vm.writer.write_all(&report.emit()).unwrap();
                    vm.writer.flush().unwrap();
                }
            });
            let channel =
                Channel::connect(peer, &handle.job, &handle.key, CONNECT_TIMEOUT).unwrap();
            let start = Start { job: handle.job, space: Space::of_mib(64, 0), vcpus: 1 };
            let got = Vacant::over(channel, &[7; 1000]).and_then(|mut vm| {
                let sent = write_cold(vm.writer(), &start, &layout, |_| {});
                vm.finish(sent)
            });
            let text = got.map_or_else(|error| error.to_string(), |_| "ok".to_owned());
            assert_eq!(text, expect);
        });
    }

    #[test]
    fn says_what_the_vm_reported_even_when_it_left_at_once() {
        let head = onde_wire::bootstrap::UPLOAD_HEAD_SIZE;
        check(head, &[Report::BadUpload], "the VM refused the loader: too large, or malformed");
        let other = "the VM refused the loader: the boot token names another one";
        check(head + 1000, &[Report::OtherLoader], other);
        let bad = "the loader refused the stream: it is for another machine";
        check(head + 1000, &[Report::LoaderOk, Report::BadStream(5)], bad);
        let other = "the new VM cannot become this machine: it was saved by another version of the VMM, or is malformed";
        let reports = [Report::LoaderOk, Report::BadState(RESULT_UNREADABLE)];
        check(head + 1000, &reports, other);
        let broken = "the connection to the new VM broke during the stream";
        check(head + 1000, &[Report::LoaderOk], broken);
        let broken = "the connection to the new VM broke during the loader's upload";
        check(head, &[], broken);
    }
}
