//! The server's end of a secure channel over any byte link: the handshake, then plaintext in and out.
//! mstrap runs it over TCP, the tests over byte vectors. It waits nowhere: the link does, and says when to stop.

use onde_wire::channel::{self, Halves, RECORD_HEAD, RECORD_TAG, RECORD_WIRE_MAX};
use onde_wire::key::Key;
use onde_wire::machine::Identity;

/// Most plaintext bytes that [`Channel::send`] takes at once.
pub const SEND_MAX: usize = 4096;

/// A byte link to one client. Waiting, and for how long, is its business.
pub trait Link {
    /// Fills all of `buffer`.
    fn recv(&mut self, buffer: &mut [u8]) -> Result<(), Refused>;
    /// Hands over all of `bytes`, without waiting for them to arrive.
    fn send(&mut self, bytes: &[u8]) -> Result<(), Refused>;
    /// Waits until the client acknowledged all that was sent.
    fn flush(&mut self) -> Result<(), Refused>;
}

/// Why a connection is over. The client's or the network's doing, never ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The client closed or reset it.
    Closed,
    /// The client was silent too long.
    Stalled,
    /// The time allowed for this step is over.
    TooLate,
    /// What it said first is no hello for this job.
    NotHello,
    /// A record that no holder of the job key sealed, or of an impossible length.
    Forged,
}

impl Refused {
    /// The reason as the console shows it.
    pub fn name(self) -> &'static str {
        match self {
            Refused::Closed => "closed",
            Refused::Stalled => "stalled",
            Refused::TooLate => "too late",
            Refused::NotHello => "no hello",
            Refused::Forged => "forged record",
        }
    }
}

/// The nonces of a VM's server: one for each handshake, never the same twice. They are drawn from the
/// seed in the info page, which is fresh for every VM, and a count.
pub struct Nonces {
    key: Key,
    count: u64,
}

impl Nonces {
    /// Starts at the first nonce of this seed.
    pub fn new(seed: &[u8; 32]) -> Self {
        Self { key: Key::new(seed), count: 0 }
    }

    /// The next nonce.
    pub fn next_nonce(&mut self) -> [u8; 32] {
        self.count += 1;
        self.key.tag(&[b"mstrap nonce", &self.count.to_le_bytes()])
    }

    /// A number for TCP's initial sequence numbers and ports, not to be told from a random one.
    pub fn tcp_seed(&self) -> u64 {
        let tag = self.key.tag(&[b"mstrap tcp"]);
        u64::from_le_bytes(*tag.first_chunk().expect("a tag has 32 bytes"))
    }
}

/// An open channel whose client has proven that it knows the job key.
pub struct Channel<'a, L> {
    link: &'a mut L,
    halves: Halves,
    record: &'a mut [u8; RECORD_WIRE_MAX],
    /// Plaintext of the last record that nobody has read yet: `record[unread]`.
    unread: core::ops::Range<usize>,
}

impl<'a, L: Link> Channel<'a, L> {
    /// Greets a client and opens its first record, which proves the job key. `record` is room for one record.
    pub fn accept(
        link: &'a mut L,
        identity: &Identity,
        nonce: &[u8; 32],
        record: &'a mut [u8; RECORD_WIRE_MAX],
    ) -> Result<Self, Refused> {
        let mut hello = [0; channel::CLIENT_HELLO_SIZE];
        link.recv(&mut hello)?;
        let key = Key::new(&identity.job_key);
        let (answer, halves) =
            channel::server_hello(&hello, &identity.job, &key, nonce).ok_or(Refused::NotHello)?;
        link.send(&answer)?;
        let mut channel = Self { link, halves, record, unread: 0..0 };
        channel.next_record()?;
        Ok(channel)
    }

    /// The link below, to set its limits.
    pub fn link(&mut self) -> &mut L {
        self.link
    }

    fn next_record(&mut self) -> Result<(), Refused> {
        let (head, rest) =
            self.record.split_first_chunk_mut::<RECORD_HEAD>().expect("a record has a head");
        self.link.recv(head)?;
        let size = channel::record_size(head).ok_or(Refused::Forged)?;
        self.link.recv(&mut rest[..size + RECORD_TAG])?;
        let whole = &mut self.record[..RECORD_HEAD + size + RECORD_TAG];
        self.halves.to_server.open(whole).ok_or(Refused::Forged)?;
        self.unread = RECORD_HEAD..RECORD_HEAD + size;
        Ok(())
    }

    /// Fills all of `buffer` with plaintext. After an error the channel is of no more use.
    pub fn recv(&mut self, mut buffer: &mut [u8]) -> Result<(), Refused> {
        while !buffer.is_empty() {
            if self.unread.is_empty() {
                self.next_record()?;
            }
            let count = buffer.len().min(self.unread.len());
            let (now, later) = buffer.split_at_mut(count);
            now.copy_from_slice(&self.record[self.unread.start..][..count]);
            self.unread.start += count;
            buffer = later;
        }
        Ok(())
    }

    /// Sends `bytes`, 1 to [`SEND_MAX`] of them, as one record; does not wait for them to arrive.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        let mut record = [0; RECORD_HEAD + SEND_MAX + RECORD_TAG];
        record[RECORD_HEAD..][..bytes.len()].copy_from_slice(bytes);
        let size = self.halves.to_client.seal(&mut record, bytes.len());
        self.link.send(&record[..size])
    }

    /// Waits until the client acknowledged all that was sent.
    pub fn flush(&mut self) -> Result<(), Refused> {
        self.link.flush()
    }
}

#[cfg(test)]
mod tests;
