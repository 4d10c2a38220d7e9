//! Hash chains: payment tokens are the values of a chain shown from its end to its start.
//! With f = SHA-256 under a label, a chain of length n is s_0 (secret), s_1 = f(s_0), .., s_n,
//! the anchor. Token number i is s_{n-i}: whoever holds it can compute every earlier
//! token and no later one (Lamport 1981; Rivest and Shamir, PayWord, 1996).

use crate::key::KEY_SIZE;
use sha2::{Digest, Sha256};

/// One value of a chain.
pub type Value = [u8; KEY_SIZE];

/// Most tokens that one payment may skip: bounds the hashes that a PAY can cost a node
/// (4096 steps of 45 ns are 0.2 ms). A larger payment comes in several.
pub const STEPS_MAX: u32 = 4096;

/// Label of the step function; with the value it fits one block of SHA-256.
const LABEL: &[u8; 16] = b"onde chain step\0";

/// f: one step towards the anchor.
pub fn step(value: &Value) -> Value {
    Sha256::new().chain_update(LABEL).chain_update(value).finalize().into()
}

/// f applied `steps` times.
pub fn walk(value: &Value, steps: u32) -> Value {
    (0..steps).fold(*value, |value, _| step(&value))
}

/// Whether `value` lies exactly `steps` tokens behind `last`, the newest value accepted so far.
/// Refuses 0 and more than [`STEPS_MAX`] steps before any hash is computed.
pub fn verify(last: &Value, value: &Value, steps: u32) -> bool {
    (1..=STEPS_MAX).contains(&steps) && walk(value, steps) == *last
}
