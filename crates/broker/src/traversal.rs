//! Hash chains walked from their end to their start without storing them: of a chain of 2^k tokens, k values are
//! kept, and a token costs at most k hashes. The sale of payment tokens calls it. Pure: it knows no store.
//!
//! The scheme is Jakobsson's *Fractal Hash Sequence Representation and Traversal* (2002). Token number i lies at
//! position i of the chain, the anchor at 0 and the seed at 2^k. Level l, from 1 to k, keeps one value, and serves the
//! odd multiples of 2^l with it. When one of these is given out, the level jumps to half a way beyond the next, where
//! a higher level lies, and walks back from there, two steps a token, to be in its place in time:
//!
//! ```text
//!  anchor  1   2   3   4   5   6   7   8                      16 = seed
//!    +---+---o---+---o---+---+---+---o---+---+---+---+---+---+---+---o      at first
//!    x---x---x---+---o---+---+---<---o---+---+---+---+---+---+---+---o      2 is out: level 1 walks from 8 to 6
//! ```
//! So where each level lies is known from the number of tokens given out, and values are all there is to store.

use onde_wire::chain::{Value, step};
use onde_wire::key::KEY_SIZE;

/// Most levels: 2^31 tokens, so that every position fits an index.
pub const LEVELS_MAX: u32 = 31;
/// Bytes before the values in [`Traversal::emit`]: levels, tokens given out.
const HEAD_SIZE: usize = 1 + 4;

/// What is kept of a chain of which some tokens are out.
#[derive(Clone, PartialEq, Eq)]
pub struct Traversal {
    given: u32,
    /// That of level 1 first; zero where a level has nothing to serve any more.
    values: Vec<Value>,
}

impl Traversal {
    /// A new chain of 2^`levels` tokens, and its anchor. Costs a hash for each token, this once.
    pub fn mint(seed: &Value, levels: u32) -> (Self, Value) {
        assert!((1..=LEVELS_MAX).contains(&levels), "a chain has 2^1 to 2^31 tokens");
        let (mut values, mut value) = (Vec::with_capacity(levels as usize), *seed);
        for position in (1..=1u32 << levels).rev() {
            if position.is_power_of_two() && position > 1 {
                values.push(value);
            }
            value = step(&value);
        }
        values.reverse();
        (Self { given: 0, values }, value)
    }

    fn levels(&self) -> u32 {
        self.values.len() as u32
    }

    /// Number of tokens in the whole chain.
    pub fn count(&self) -> u32 {
        1 << self.levels()
    }

    /// How many tokens are out: the index of the last.
    pub fn given(&self) -> u32 {
        self.given
    }

    /// How many tokens are still to be given out.
    pub fn left(&self) -> u32 {
        self.count() - self.given
    }

    /// The next token; `None` behind the last.
    pub fn next_token(&mut self) -> Option<Value> {
        self.next_with(step)
    }

    /// Gives out `count` tokens, of which the last proves the others. `None`, and nothing is given, where `count` is 0 or
    /// more than are left.
    pub fn next_tokens(&mut self, count: u32) -> Option<Value> {
        if count > self.left() {
            return None;
        }
        (0..count).fold(None, |_, _| self.next_token())
    }

    fn next_with(&mut self, mut step: impl FnMut(&Value) -> Value) -> Option<Value> {
        if self.given == self.count() {
            return None;
        }
        self.given += 1;
        let (given, count) = (self.given, self.count());
        for (level, value) in (1..).zip(&mut self.values) {
            if is_walking(level, given, count) {
                let half_way = step(value);
                *value = step(&half_way);
            }
        }
        // Level 1 and higher serve the even positions; an odd one is a step from the even one behind it.
        let level = (self.given + self.given % 2).trailing_zeros();
        let value = self.values[level as usize - 1];
        if self.given % 2 == 1 {
            return Some(step(&value));
        }
        self.values[level as usize - 1] = self.jump(level);
        Some(value)
    }

    /// The value that a level starts its next walk with, now that the one it had is out.
    fn jump(&self, level: u32) -> Value {
        let from = u64::from(self.given) + (3 << level);
        if from > u64::from(self.count()) {
            // The seed is behind: the level's next place would be, too.
            return [0; KEY_SIZE];
        }
        // Three halves ahead lies a place of a higher level. It arrived there three of its own halves of a half
        // before it is due, and those are no fewer: now at the latest.
        self.values[from.trailing_zeros() as usize - 1]
    }

    /// The bytes to store: as secret as the seed, and of one length for all of a chain's life.
    pub fn emit(&self) -> Vec<u8> {
        let mut out = vec![self.levels() as u8];
        out.extend(self.given.to_le_bytes());
        self.values.iter().for_each(|value| out.extend(value));
        out
    }

    /// Reads what [`Self::emit`] wrote; `None` where it is of another form. Whether the values are the chain's
    /// shows at the next token: it has to lead to the one before.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let ([levels, given @ ..], rest) = bytes.split_first_chunk::<HEAD_SIZE>()?;
        let given = u32::from_le_bytes(*given);
        let (values, []) = rest.as_chunks() else { return None };
        let is_sane = (1..=LEVELS_MAX).contains(&(*levels).into())
            && values.len() == usize::from(*levels)
            && given <= 1 << levels;
        is_sane.then(|| Self { given, values: values.to_vec() })
    }
}

impl std::fmt::Debug for Traversal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Traversal({} of {})", self.given, self.count())
    }
}

/// Whether a level of a chain of `count` tokens walks while token number `given` is given out: in the first quarter of
/// the way from one odd multiple of 2^level to the next.
fn is_walking(level: u32, given: u32, count: u32) -> bool {
    let (half, way) = (1u64 << level, 2u64 << level);
    // Since the level's last place; before its first, this is half a way and more.
    let since = (u64::from(given) + half) % way;
    (1..=half / 2).contains(&since) && u64::from(given) - since + way <= u64::from(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const SEED: Value = [7; KEY_SIZE];

    /// All values, the anchor first.
    fn naive(levels: u32) -> Vec<Value> {
        let mut values = vec![SEED];
        (0..1 << levels).for_each(|_| values.push(step(&values[values.len() - 1])));
        values.reverse();
        values
    }

    /// Gives out a whole chain, stored and read again at every `store`-th token.
    fn check(levels: u32, store: u32) {
        let naive = naive(levels);
        let (mut chain, anchor) = Traversal::mint(&SEED, levels);
        assert_eq!((anchor, chain.count()), (naive[0], 1 << levels));
        for (index, expect) in (1..).zip(&naive[1..]) {
            let hashes = Cell::new(0);
            let counted = |value: &Value| {
                hashes.set(hashes.get() + 1);
                step(value)
            };
            assert_eq!(chain.next_with(counted), Some(*expect), "{index} of 2^{levels}");
            assert!(hashes.get() <= levels, "{} hashes for {index} of 2^{levels}", hashes.get());
            assert!(chain.values.len() <= levels as usize);
            if index % store == 0 {
                let stored = chain.emit();
                assert_eq!(stored.len(), HEAD_SIZE + KEY_SIZE * levels as usize);
                chain = Traversal::parse(&stored).expect("what was emitted");
            }
        }
        assert_eq!((chain.next_token(), chain.given()), (None, 1 << levels));
        assert!(chain.values.iter().all(|value| *value == [0; KEY_SIZE]), "secrets are kept");
    }

    #[test]
    fn every_token_is_that_of_the_naive_chain_for_log_n_values_and_log_n_hashes() {
        (1..=14).for_each(|levels| check(levels, 1));
        check(20, 1000);
    }

    #[test]
    fn several_at_once_are_as_one_by_one_and_the_end_is_the_seed() {
        let naive = naive(10);
        let (mut chain, _) = Traversal::mint(&SEED, 10);
        let mut index = 0;
        for count in [1, 2, 7, 64, 1, 300, 500] {
            index += count;
            assert_eq!(chain.next_tokens(count), Some(naive[index as usize]));
        }
        assert_eq!((chain.next_tokens(0), chain.next_tokens(150)), (None, None));
        assert_eq!((chain.given(), chain.next_tokens(149)), (875, Some(SEED)));
    }

    #[test]
    fn bytes_of_another_form_are_none() {
        let (mut chain, _) = Traversal::mint(&SEED, 4);
        let good = chain.emit();
        (0..good.len()).for_each(|size| assert_eq!(Traversal::parse(&good[..size]), None));
        for (at, byte) in [(0, 0), (0, 3), (0, 5), (0, 32), (1, 17), (4, 1)] {
            let mut bytes = good.clone();
            bytes[at] = byte;
            assert_eq!(Traversal::parse(&bytes), None, "{byte} at {at}");
        }
        assert_eq!(Traversal::parse(&[&good[..], &[0]].concat()), None);
        chain.next_tokens(16);
        assert_eq!(Traversal::parse(&chain.emit()).map(|mut chain| chain.next_token()), Some(None));
    }
}
