//! Keys and message authentication: HMAC-SHA256 (RFC 2104) with the key schedule kept,
//! and the derivations of one key from another. Every derivation has its own label.

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// Bytes of a key, a digest, a tag and a chain value.
pub const KEY_SIZE: usize = 32;

/// A 32-byte authentication tag.
pub type Tag = [u8; KEY_SIZE];

/// A secret key with its HMAC key schedule, so that each check costs only the message's blocks.
#[derive(Clone)]
pub struct Key {
    mac: Hmac<Sha256>,
}

impl core::fmt::Debug for Key {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    // tcb:stranger-begin
    /// Takes the key's bytes.
    pub fn new(bytes: &[u8; KEY_SIZE]) -> Self {
        Self { mac: Hmac::new_from_slice(bytes).expect("HMAC takes keys of any length") }
    }

    /// HMAC-SHA256 of the parts, one behind the other.
    pub fn tag(&self, parts: &[&[u8]]) -> Tag {
        self.over(parts).finalize().into_bytes().into()
    }

    /// Whether `tag` is the tag of the parts; takes the same time for every wrong tag.
    pub fn verify(&self, parts: &[&[u8]], tag: &Tag) -> bool {
        self.over(parts).verify_slice(tag).is_ok()
    }

    fn over(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        parts.iter().for_each(|part| mac.update(part));
        mac
    }
    // tcb:stranger-end
}

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; KEY_SIZE] {
    Sha256::digest(bytes).into()
}

/// Key of a node, from the cluster secret: one image serves every node.
pub fn node_key(cluster_secret: &[u8; KEY_SIZE], node: &[u8; 16]) -> [u8; KEY_SIZE] {
    Key::new(cluster_secret).tag(&[b"node", node])
}

// tcb:stranger-begin
/// Key of a job on a node. The broker tells the customer, the node derives it; it never crosses the LAN.
pub fn job_key(node_key: &Key, job: &[u8; 16]) -> [u8; KEY_SIZE] {
    node_key.tag(&[b"job", job])
}

/// Key under which the broker asks a node about a job. Its customer never knows it, and so cannot answer in the
/// node's place that the job is gone and its money is to come back.
pub fn owner_key(node_key: &Key, job: &[u8; 16]) -> [u8; KEY_SIZE] {
    node_key.tag(&[b"owner", job])
}
// tcb:stranger-end

/// Key of a node's redemption certificates, used for nothing else.
pub fn certificate_key(node_key: &Key) -> [u8; KEY_SIZE] {
    node_key.tag(&[b"certificate"])
}

/// Id of a node, from the MAC of its network interface.
pub fn node_id(mac: &[u8; 6]) -> [u8; 16] {
    let digest: [u8; KEY_SIZE] =
        Sha256::new().chain_update(b"onde node").chain_update(mac).finalize().into();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    id
}
