//! The secure channel under a job key: what TCP between a customer and mstrap or `agent`
//! carries. Authenticated encryption (ChaCha20-Poly1305, RFC 8439) with keys drawn by HKDF
//! (RFC 5869) from the job key and a nonce of each end. Sans I/O: callers move the bytes.
//!
//! ```text
//!  client -> server  ClientHello  "ONDECHAN" | job id | nonce            56 bytes
//!  server -> client  ServerHello  nonce | tag under the job key          64 bytes
//!  both ways         records      length u32 | ciphertext | tag 16
//! ```
//! The client's first record proves that it knows the job key; a server acts on nothing before.

use crate::bytes::{Reader, Writer};
use crate::key::{Key, Tag};
use crate::token::JobId;
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};

/// TCP port of mstrap and of the agent.
pub const PORT: u16 = 7033;
/// Most plaintext bytes of a record: what a bare-metal receiver keeps in memory.
pub const RECORD_MAX: usize = 64 << 10;
/// Bytes before a record's ciphertext.
pub const RECORD_HEAD: usize = 4;
/// Bytes behind it.
pub const RECORD_TAG: usize = 16;
/// Most bytes of a record on the wire.
pub const RECORD_WIRE_MAX: usize = RECORD_HEAD + RECORD_MAX + RECORD_TAG;

/// "ONDECHAN", first in every client hello.
const MAGIC: [u8; 8] = *b"ONDECHAN";
/// Bytes of a client hello.
pub const CLIENT_HELLO_SIZE: usize = 56;
/// Bytes of a server hello.
pub const SERVER_HELLO_SIZE: usize = 64;

/// What the client sends first.
pub fn client_hello(job: &JobId, nonce: &[u8; 32]) -> [u8; CLIENT_HELLO_SIZE] {
    let mut out = [0; CLIENT_HELLO_SIZE];
    let mut w = Writer::new(&mut out);
    w.put(&MAGIC);
    w.put(job);
    w.put(nonce);
    out
}

/// The server's answer to a client hello; `None` if it is none, or for another job.
pub fn server_hello(
    hello: &[u8; CLIENT_HELLO_SIZE],
    job: &JobId,
    job_key: &Key,
    nonce: &[u8; 32],
) -> Option<([u8; SERVER_HELLO_SIZE], Halves)> {
    let mut r = Reader::new(hello);
    if r.array()? != MAGIC || r.array()? != *job {
        return None;
    }
    let mut out = [0; SERVER_HELLO_SIZE];
    let mut w = Writer::new(&mut out);
    w.put(nonce);
    w.put(&server_tag(job_key, hello, nonce));
    Some((out, Halves::derive(job_key, hello, nonce)))
}

/// The client's end after the server hello; `None` if the server does not know the job key.
pub fn client_finish(
    hello: &[u8; CLIENT_HELLO_SIZE],
    answer: &[u8; SERVER_HELLO_SIZE],
    job_key: &Key,
) -> Option<Halves> {
    let mut r = Reader::new(answer);
    let (nonce, tag): ([u8; 32], Tag) = (r.array()?, r.array()?);
    job_key
        .verify(&[b"channel server", hello, &nonce], &tag)
        .then(|| Halves::derive(job_key, hello, &nonce))
}

fn server_tag(job_key: &Key, hello: &[u8], nonce: &[u8; 32]) -> Tag {
    job_key.tag(&[b"channel server", hello, nonce])
}

/// The two directions of a channel.
pub struct Halves {
    /// From client to server.
    pub to_server: Cipher,
    /// From server to client.
    pub to_client: Cipher,
}

impl Halves {
    fn derive(job_key: &Key, hello: &[u8], nonce: &[u8; 32]) -> Self {
        let secret = Key::new(&job_key.tag(&[b"channel keys", hello, nonce]));
        Self {
            to_server: Cipher::new(&secret.tag(&[b"to server", &[1]])),
            to_client: Cipher::new(&secret.tag(&[b"to client", &[1]])),
        }
    }
}

/// One direction of a channel: seals at its one end, opens at the other. Records count up, so a record
/// that is lost, repeated, reordered or altered does not open.
pub struct Cipher {
    cipher: ChaCha20Poly1305,
    count: u64,
}

impl Cipher {
    fn new(key: &[u8; 32]) -> Self {
        Self { cipher: ChaCha20Poly1305::new(key.into()), count: 0 }
    }

    fn next_nonce(&mut self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.count.to_le_bytes());
        self.count += 1;
        nonce.into()
    }

    /// Seals the plaintext that the caller put at `record[RECORD_HEAD..RECORD_HEAD + size]`;
    /// returns the bytes of the whole record. `size` is 1 to [`RECORD_MAX`].
    pub fn seal(&mut self, record: &mut [u8], size: usize) -> usize {
        assert!((1..=RECORD_MAX).contains(&size), "record of {size} bytes");
        let (head, rest) = record.split_at_mut(RECORD_HEAD);
        head.copy_from_slice(&(size as u32).to_le_bytes());
        let (body, tag) = rest.split_at_mut(size);
        let nonce = self.next_nonce();
        let sealed = self
            .cipher
            .encrypt_inout_detached(&nonce, head, body.into())
            .expect("a record is far below the cipher's limit");
        tag[..RECORD_TAG].copy_from_slice(&sealed);
        RECORD_HEAD + size + RECORD_TAG
    }

    /// Opens a whole record in place; `None` if it is not the next one of this channel.
    pub fn open<'a>(&mut self, record: &'a mut [u8]) -> Option<&'a [u8]> {
        let (head, rest) = record.split_at_mut_checked(RECORD_HEAD)?;
        let size = record_size(&(*head).try_into().ok()?)?;
        let (body, tag) = rest.split_at_mut_checked(size)?;
        let tag: [u8; RECORD_TAG] = (*tag).try_into().ok()?;
        let nonce = self.next_nonce();
        self.cipher.decrypt_inout_detached(&nonce, head, (&mut *body).into(), &tag.into()).ok()?;
        Some(body)
    }
}

/// Plaintext bytes that a record's head announces; `None` outside 1 to [`RECORD_MAX`].
/// [`RECORD_TAG`] bytes more follow on the wire.
pub fn record_size(head: &[u8; RECORD_HEAD]) -> Option<usize> {
    let size = u32::from_le_bytes(*head) as usize;
    (1..=RECORD_MAX).contains(&size).then_some(size)
}
