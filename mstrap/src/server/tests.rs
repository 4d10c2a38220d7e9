//! The channel and the upload against clients that are honest, slow, lying, cut off or strangers.

use super::*;
use crate::upload::{self, UploadError};
use onde_wire::bootstrap::{Report, upload_head};
use onde_wire::channel::{
    CLIENT_HELLO_SIZE, Cipher, SERVER_HELLO_SIZE, client_finish, client_hello,
};
use onde_wire::key::sha256;
use onde_wire::machine::Space;

const JOB: [u8; 16] = [7; 16];
const JOB_KEY: [u8; 32] = [9; 32];
const NONCE: [u8; 32] = [3; 32];

fn identity() -> Identity {
    Identity {
        job: JOB,
        node: [0; 16],
        job_key: JOB_KEY,
        loader_sha256: sha256(b"the loader"),
        seed: [5; 32],
        space: Space::of_mib(64, 0),
        vcpus: 1,
        tsc_khz: 1,
        boot_mac: [2; 6],
        boot_ipv4: [198, 18, 0, 2],
        mac: [2; 6],
        ipv4: [198, 19, 0, 2],
        gateway: [0; 4],
        prefix_len: 15,
    }
}

/// A client that follows a script of bytes. The first answer it gets is the server hello, with which it
/// seals what it still has to say, because the nonce is known only then.
struct Script {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Plaintext records to say after the server hello; and what then happens to the bytes.
    records: Vec<Vec<u8>>,
    spoil: fn(&mut Vec<u8>),
    hello: [u8; CLIENT_HELLO_SIZE],
    key: [u8; 32],
    to_client: Option<Cipher>,
}

impl Script {
    fn new(job: [u8; 16], key: [u8; 32], records: &[&[u8]], spoil: fn(&mut Vec<u8>)) -> Self {
        let hello = client_hello(&job, &[1; 32]);
        let records = records.iter().map(|record| record.to_vec()).collect();
        let incoming = hello.to_vec();
        Self { incoming, outgoing: Vec::new(), records, spoil, hello, key, to_client: None }
    }

    fn answer(&mut self, answer: &[u8]) {
        let answer: &[u8; SERVER_HELLO_SIZE] = answer.try_into().unwrap();
        // Who has another key cannot check the answer, but can seal with what it has.
        let genuine = client_finish(&self.hello, answer, &Key::new(&self.key));
        let mut halves = genuine.unwrap_or_else(|| {
            let key = Key::new(&self.key);
            channel::server_hello(&self.hello, &JOB, &key, &NONCE).unwrap().1
        });
        for record in &self.records {
            let mut sealed = [&[0; RECORD_HEAD], &record[..], &[0; RECORD_TAG]].concat();
            halves.to_server.seal(&mut sealed, record.len());
            self.incoming.extend(sealed);
        }
        (self.spoil)(&mut self.incoming);
        self.to_client = Some(halves.to_client);
    }

    fn said(&mut self) -> Vec<u8> {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        if outgoing.is_empty() {
            return outgoing;
        }
        self.to_client.as_mut().unwrap().open(&mut outgoing).unwrap().to_vec()
    }
}

impl Link for Script {
    fn recv(&mut self, buffer: &mut [u8]) -> Result<(), Refused> {
        if self.incoming.len() < buffer.len() {
            return Err(Refused::Closed);
        }
        buffer.copy_from_slice(&self.incoming[..buffer.len()]);
        self.incoming.drain(..buffer.len());
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        if self.to_client.is_none() {
            self.answer(bytes);
        } else {
            self.outgoing.extend(bytes);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Refused> {
        Ok(())
    }
}

fn nothing(_: &mut Vec<u8>) {}

/// Runs handshake and upload; on success also checks what the channel then carries both ways.
fn check(mut script: Script, expect: Result<usize, UploadError>) {
    let mut area = vec![0; onde_wire::machine::LOADER_SIZE_MAX as usize];
    let mut record = Box::new([0; RECORD_WIRE_MAX]);
    let identity = identity();
    let result = Channel::accept(&mut script, &identity, &NONCE, &mut record)
        .map_err(UploadError::Refused)
        .and_then(|mut channel| {
            let size = upload::receive(&mut channel, &mut area, &identity.loader_sha256)?;
            channel.send(&Report::LoaderOk.emit())?;
            Ok(size)
        });
    assert_eq!(result, expect);
    if let Ok(size) = result {
        assert_eq!(&area[..size], b"the loader");
        assert_eq!(script.said(), Report::LoaderOk.emit());
    }
}

fn upload(records: &[&[u8]], expect: Result<usize, UploadError>) {
    check(Script::new(JOB, JOB_KEY, records, nothing), expect);
}

#[test]
fn an_upload_may_be_cut_into_records_anyhow() {
    let whole = [&upload_head(10)[..], b"the loader"].concat();
    upload(&[&whole], Ok(10));
    upload(&[&whole[..5], &whole[5..13], &whole[13..]], Ok(10));
    let bytes: Vec<&[u8]> = whole.chunks(1).collect();
    upload(&bytes, Ok(10));
    // What follows belongs to the loader.
    upload(&[&whole, &[0xAA; channel::RECORD_MAX]], Ok(10));
}

#[test]
fn lies_about_the_loader_are_told() {
    let bad = Err(UploadError::Wrong(Report::BadUpload));
    upload(&[b"ONDELOAx\x0a\0\0\0the loader"], bad);
    upload(&[&upload_head(0)], bad);
    upload(&[&upload_head(onde_wire::machine::LOADER_SIZE_MAX + 1)], bad);
    upload(&[&upload_head(u32::MAX)], bad);
    let other = Err(UploadError::Wrong(Report::OtherLoader));
    upload(&[&upload_head(10), b"the lOader"], other);
    upload(&[&upload_head(9), b"the loader"], other);
    upload(&[&upload_head(11), b"the loade"], Err(UploadError::Refused(Refused::Closed)));
}

#[test]
fn strangers_get_nowhere() {
    let whole = [&upload_head(10)[..], b"the loader"].concat();
    let refused = |refused| Err(UploadError::Refused(refused));
    let of = |job, key, spoil| Script::new(job, key, &[&whole, b"more"], spoil);
    check(of([8; 16], JOB_KEY, nothing), refused(Refused::NotHello));
    check(of(JOB, [8; 32], nothing), refused(Refused::Forged));
    check(of(JOB, JOB_KEY, |bytes| bytes[4] ^= 1), refused(Refused::Forged));
    check(of(JOB, JOB_KEY, |bytes| bytes[..4].fill(0)), refused(Refused::Forged));
    check(of(JOB, JOB_KEY, |bytes| bytes[..4].fill(0xFF)), refused(Refused::Forged));
    check(of(JOB, JOB_KEY, |bytes| bytes.truncate(20)), refused(Refused::Closed));
    check(of(JOB, JOB_KEY, |bytes| bytes.clear()), refused(Refused::Closed));
    // The second record first.
    check(of(JOB, JOB_KEY, |bytes| _ = bytes.drain(..42)), refused(Refused::Forged));
    let mut garbage = of(JOB, JOB_KEY, nothing);
    garbage.incoming = vec![0x16; 56];
    check(garbage, refused(Refused::NotHello));
}

#[test]
fn nonces_never_repeat() {
    let mut nonces = Nonces::new(&[5; 32]);
    let drawn: std::collections::HashSet<_> = (0..100).map(|_| nonces.next_nonce()).collect();
    assert_eq!(drawn.len(), 100);
    assert_ne!(Nonces::new(&[6; 32]).next_nonce(), Nonces::new(&[5; 32]).next_nonce());
    assert_ne!(Nonces::new(&[6; 32]).tcp_seed(), Nonces::new(&[5; 32]).tcp_seed());
}
