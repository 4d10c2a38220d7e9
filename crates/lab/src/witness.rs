//! What a program in a guest and its host tell each other to see whether the guest is still the machine that it was: bytes
//! that both can reckon, so that one that is lost, doubled or altered shows. The program is `src/bin/witness.rs`.

/// Bytes that look random and follow from where they are.
#[derive(Clone, Debug)]
pub struct Noise {
    state: u64,
    word: [u8; 8],
    used: usize,
}

/// What the guest sends to its host begins so.
pub const FROM_GUEST: u64 = 1;
/// What the host sends to its guest begins so.
pub const FROM_HOST: u64 = 2;
/// Bytes that each end sends at once, and milliseconds in between: a stream that never stands still, and leaves the
/// emulated processor time for other things.
pub const PIECE: usize = 1024;
/// See [`PIECE`].
pub const PAUSE_MS: u64 = 50;
/// Status with which the program ends when all it saw was right.
pub const GOOD: u8 = 7;

/// One step of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of `value`.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

impl Noise {
    /// The bytes of this seed from their begin.
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed), word: [0; 8], used: 8 }
    }

    /// The next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|byte| *byte = self.next_byte());
    }

    /// Whether these are the next bytes.
    pub fn is_next(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().all(|byte| *byte == self.next_byte())
    }

    fn next_byte(&mut self) -> u8 {
        if self.used == 8 {
            self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            (self.word, self.used) = (mix(self.state).to_le_bytes(), 0);
        }
        self.used += 1;
        self.word[self.used - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_reckon_the_same_however_the_bytes_are_cut() {
        let (mut whole, mut parts) = (Noise::new(5), Noise::new(5));
        let mut bytes = [0; 1001];
        whole.fill(&mut bytes);
        assert!(bytes.chunks(13).all(|part| parts.is_next(part)));
        bytes[500] ^= 1;
        assert!(!Noise::new(5).is_next(&bytes));
    }
}
