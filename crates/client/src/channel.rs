//! The secure channel over TCP: [`onde_wire::channel`]'s records as `Read` and `Write`. `bootstrap` and
//! `session` connect, `agent` accepts. The two directions are two halves, so that two threads can each have
//! one. It never sends a byte in clear but the two hellos, and never takes a record that does not open.

use onde_wire::channel::{
    CLIENT_HELLO_SIZE, Cipher, Halves, RECORD_HEAD, RECORD_MAX, RECORD_TAG, RECORD_WIRE_MAX,
    SERVER_HELLO_SIZE, client_finish, client_hello, record_size, server_hello,
};
use onde_wire::key::Key;
use onde_wire::token::JobId;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// How long a peer may take over the hellos: an emulated guest that is busy needs a second.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Plaintext bytes of a record that is full: with head and tag it is 44 segments of Ethernet, the most that TCP hands to a
/// network card at once. A few bytes more, and each record would end in a packet of its own and an acknowledgement of that.
const RECORD_FILL: usize = 44 * 1460 - RECORD_HEAD - RECORD_TAG;
const _: () = assert!(RECORD_FILL <= RECORD_MAX);

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// No TCP connection, or it broke during the hellos.
    #[error("no connection to {peer}")]
    Connection {
        /// Who was to be reached.
        peer: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The peer did not prove that it knows the job's key.
    #[error("{peer} does not know this job's key: another job's VM, or not ours at all")]
    Foreign {
        /// Who answered.
        peer: SocketAddr,
    },
}

/// A channel with both its directions.
pub struct Channel {
    /// What comes from the peer.
    pub reader: Reader,
    /// What goes to the peer.
    pub writer: Writer,
}

impl std::fmt::Debug for Channel {
    // The ciphers hold keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").finish_non_exhaustive()
    }
}

impl Channel {
    /// Connects to the VM of `job` at `peer`; `timeout` is for TCP alone.
    pub fn connect(
        peer: SocketAddr,
        job: &JobId,
        job_key: &Key,
        timeout: Duration,
    ) -> Result<Self, ChannelError> {
        let failed = |source| ChannelError::Connection { peer, source };
        let stream = TcpStream::connect_timeout(&peer, timeout).map_err(failed)?;
        let hello = client_hello(job, &nonce().map_err(failed)?);
        let answer: [u8; SERVER_HELLO_SIZE] = hellos(&stream, Some(&hello)).map_err(failed)?;
        let halves =
            client_finish(&hello, &answer, job_key).ok_or(ChannelError::Foreign { peer })?;
        let Halves { to_server, to_client } = halves;
        // Agents and loaders always read, so bytes that stay unacknowledged mean that the guest is gone. The
        // other way round a person may have stopped the terminal.
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, 30_000);
        Ok(Self::over(stream, to_client, to_server))
    }

    /// Takes the server's end of a connection that came in. Nothing is proven about the peer before
    /// its first record opens.
    pub fn accept(stream: TcpStream, job: &JobId, job_key: &Key) -> Result<Self, ChannelError> {
        let peer = stream.peer_addr().unwrap_or(([0; 4], 0).into());
        let failed = |source| ChannelError::Connection { peer, source };
        let hello: [u8; CLIENT_HELLO_SIZE] = hellos(&stream, None).map_err(failed)?;
        let nonce = nonce().map_err(failed)?;
        let (answer, halves) =
            server_hello(&hello, job, job_key, &nonce).ok_or(ChannelError::Foreign { peer })?;
        (&stream).write_all(&answer).map_err(failed)?;
        Ok(Self::over(stream, halves.to_server, halves.to_client))
    }

    fn over(stream: TcpStream, incoming: Cipher, outgoing: Cipher) -> Self {
        // Records are whole messages: waiting to fill a segment would only delay keystrokes.
        let _ = stream.set_nodelay(true);
        keep_alive(&stream);
        let stream = Arc::new(stream);
        let buffer = || vec![0; RECORD_WIRE_MAX].into_boxed_slice();
        Self {
            reader: Reader {
                stream: stream.clone(),
                cipher: incoming,
                record: buffer(),
                filled: 0,
                plain: 0..0,
            },
            writer: Writer { stream, cipher: outgoing, record: buffer(), size: 0, used: 0 },
        }
    }
}

/// Lets the kernel notice within half a minute that the peer's machine is gone: a session may be silent for
/// hours. A kernel that refuses keeps its own, longer times.
fn keep_alive(stream: &TcpStream) {
    use rustix::net::sockopt;
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, Duration::from_secs(10));
    let _ = sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5));
    let _ = sockopt::set_tcp_keepcnt(stream, 4);
}

/// Sends `ours`, where there is something, and reads the peer's hello, all within the time for hellos.
fn hellos<const N: usize>(mut stream: &TcpStream, ours: Option<&[u8]>) -> io::Result<[u8; N]> {
    stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
    if let Some(ours) = ours {
        stream.write_all(ours)?;
    }
    let mut theirs = [0; N];
    stream.read_exact(&mut theirs)?;
    stream.set_read_timeout(None)?;
    Ok(theirs)
}

fn nonce() -> io::Result<[u8; 32]> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

/// The incoming half. Reads never mix records of a broken channel: after an error all reads fail.
pub struct Reader {
    stream: Arc<TcpStream>,
    cipher: Cipher,
    /// The record under way: its first `filled` bytes are here, so that a timeout loses nothing.
    record: Box<[u8]>,
    filled: usize,
    /// Plaintext not read yet, as a range of `record`.
    plain: std::ops::Range<usize>,
}

impl Reader {
    /// How long a read waits before it fails with `WouldBlock`; it can be tried again. `None`: for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// Reads until `size` bytes of the record under way are there; false at the end of the stream.
    fn fill(&mut self, size: usize) -> io::Result<bool> {
        while self.filled < size {
            match (&*self.stream).read(&mut self.record[self.filled..size]) {
                Ok(0) if self.filled == 0 => return Ok(false),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Brings in the next record; false at the end of the stream.
    fn next(&mut self) -> io::Result<bool> {
        let tampered = || io::Error::new(ErrorKind::InvalidData, "a record was tampered with");
        if !self.fill(RECORD_HEAD)? {
            return Ok(false);
        }
        let head = self.record[..RECORD_HEAD].try_into().expect("a head was just read");
        let size = record_size(head).ok_or_else(tampered)?;
        let wire = RECORD_HEAD + size + RECORD_TAG;
        self.fill(wire)?;
        self.cipher.open(&mut self.record[..wire]).ok_or_else(tampered)?;
        self.filled = 0;
        self.plain = RECORD_HEAD..RECORD_HEAD + size;
        Ok(true)
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.plain.is_empty() && !self.next()? {
            return Ok(0);
        }
        let count = buffer.len().min(self.plain.len());
        buffer[..count].copy_from_slice(&self.record[self.plain.start..][..count]);
        self.plain.start += count;
        Ok(count)
    }
}

/// The outgoing half. Bytes gather into records; [`Write::flush`] sends what is there. A record that is full leaves only
/// with what follows it, so that TCP can fill its segments: each packet costs a VM at either end several exits.
pub struct Writer {
    stream: Arc<TcpStream>,
    cipher: Cipher,
    record: Box<[u8]>,
    /// Plaintext bytes that wait in `record`.
    size: usize,
    /// Bytes of `record` that may not be zero.
    used: usize,
}

impl Writer {
    /// How long a write waits for the peer to take bytes; the channel is broken after that. `None`: for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }

    /// How long bytes may stay unacknowledged and writes may wait; the channel is broken after that.
    pub fn set_patience(&self, time: Duration) -> io::Result<()> {
        let time_ms = time.as_millis().try_into().unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(&*self.stream, time_ms)?;
        self.set_timeout(Some(time))
    }

    /// The connection's two ends: here and there.
    pub fn ends(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.stream.local_addr()?, self.stream.peer_addr()?))
    }

    /// Tells the peer that no more comes; the other direction goes on.
    pub fn shutdown_write(&self) {
        // An error means that the connection is over already; so too below.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Ends both directions, whatever another thread is doing with the other half.
    pub fn shutdown(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl AsFd for Writer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Only now that there is more: after a flush nothing is left that TCP keeps for company.
        if self.size == RECORD_FILL && !bytes.is_empty() {
            self.send(SendFlags::MORE)?;
        }
        let count = bytes.len().min(RECORD_FILL - self.size);
        self.record[RECORD_HEAD + self.size..][..count].copy_from_slice(&bytes[..count]);
        self.size += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.size == 0 { Ok(()) } else { self.send(SendFlags::empty()) }
    }
}

impl Writer {
    /// Flushes, and leaves nothing of it in memory: a machine that is about to be copied has less to copy.
    pub fn flush_and_wipe(&mut self) -> io::Result<()> {
        self.flush()?;
        self.record[..self.used].fill(0);
        self.used = 0;
        Ok(())
    }

    /// Seals the record and hands it to the kernel.
    fn send(&mut self, flags: SendFlags) -> io::Result<()> {
        let wire = self.cipher.seal(&mut self.record, std::mem::take(&mut self.size));
        self.used = self.used.max(wire);
        let mut rest = &self.record[..wire];
        while !rest.is_empty() {
            match rustix::net::send(&*self.stream, rest, flags | SendFlags::NOSIGNAL) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const JOB: JobId = [3; 16];

    fn pair(
        client_key: [u8; 32],
    ) -> (Result<Channel, ChannelError>, Result<Channel, ChannelError>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            let server = scope.spawn(move || {
                Channel::accept(listener.accept().unwrap().0, &JOB, &Key::new(&[7; 32]))
            });
            let key = Key::new(&client_key);
            let client = Channel::connect(address, &JOB, &key, Duration::from_secs(5));
            (client, server.join().unwrap())
        })
    }

    #[test]
    fn carries_more_than_a_record_both_ways_at_once() {
        let (client, server) = pair([7; 32]);
        let (client, server) = (client.unwrap(), server.unwrap());
        let sent: Vec<u8> = (0..3 * RECORD_MAX + 17).map(|i| (i * 7) as u8).collect();
        let send = |mut writer: Writer| {
            writer.write_all(&sent).unwrap();
            writer.flush().unwrap();
            writer.shutdown_write();
        };
        let check = |mut reader: Reader| {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            assert!(got == sent);
        };
        let (send, check) = (&send, &check);
        std::thread::scope(|scope| {
            scope.spawn(move || send(client.writer));
            scope.spawn(move || send(server.writer));
            scope.spawn(move || check(client.reader));
            check(server.reader);
        });
    }

    #[test]
    fn wiping_leaves_nothing_of_a_record() {
        let (client, server) = pair([7; 32]);
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        for text in [&b"longer than the next one"[..], b"short"] {
            client.writer.write_all(text).unwrap();
            client.writer.flush_and_wipe().unwrap();
            assert!(client.writer.record.iter().all(|byte| *byte == 0));
            let mut got = vec![0; text.len()];
            server.reader.read_exact(&mut got).unwrap();
            assert_eq!(got, text);
        }
    }

    #[test]
    fn refuses_a_peer_without_the_key() {
        let (client, _) = pair([8; 32]);
        assert!(matches!(client, Err(ChannelError::Foreign { .. })));
    }

    #[test]
    fn a_timeout_in_the_middle_of_a_record_loses_nothing() {
        let (client, server) = pair([7; 32]);
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        client.writer.record[RECORD_HEAD..RECORD_HEAD + 5].copy_from_slice(b"hello");
        let wire = client.writer.cipher.seal(&mut client.writer.record, 5);
        let (front, back) = client.writer.record[..wire].split_at(9);
        (&*client.writer.stream).write_all(front).unwrap();
        server.reader.set_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut got = [0; 5];
        assert_eq!(server.reader.read(&mut got).unwrap_err().kind(), ErrorKind::WouldBlock);
        (&*client.writer.stream).write_all(back).unwrap();
        server.reader.set_timeout(None).unwrap();
        server.reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
    }

    #[test]
    fn a_record_altered_on_the_way_does_not_open() {
        let (client, server) = pair([7; 32]);
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        let wire = client.writer.cipher.seal(&mut client.writer.record, 5);
        client.writer.record[6] ^= 1;
        (&*client.writer.stream).write_all(&client.writer.record[..wire]).unwrap();
        let error = server.reader.read(&mut [0; 5]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
    }
}
