//! A set of pages, one bit each, in the order of the BITMAP window ([`Space`]). HARVEST and FREEZE make it of what KVM
//! noted and what the VMM's own writes noted. Touches neither.

use onde_wire::machine::Space;

/// A set of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    space: Space,
    words: Vec<u64>,
}

impl PageSet {
    /// No page of a VM.
    pub fn empty(space: Space) -> Self {
        Self { space, words: vec![0; space.bitmap_size() as usize / 8] }
    }

    /// Adds the pages of the piece that starts at `start`. Pieces are whole MiB, so no word has pages of two.
    pub fn merge(&mut self, start: u64, noted: &[u64]) {
        let first = self.space.page(start) / 64;
        for (word, noted) in self.words[first as usize..].iter_mut().zip(noted) {
            *word |= noted;
        }
    }

    /// Number of pages.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Their addresses, in order.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let space = self.space;
        self.words.iter().enumerate().flat_map(move |(at, &word)| {
            let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| space.address(at as u64 * 64 + bit))
        })
    }

    /// The BITMAP window's bytes.
    pub fn emit(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_wire::machine::{DISK_START, RAM_HIGH_START};

    #[test]
    fn what_two_noted_is_one_set() {
        let space = Space::of_mib(3072 + 64, 1);
        let mut set = PageSet::empty(space);
        set.merge(0, &[0b1001, 0, 1 << 63]);
        set.merge(0, &[0b0011]);
        set.merge(RAM_HIGH_START, &[0b10]);
        set.merge(DISK_START, &[0b100]);
        let expect = [0, 0x1000, 0x3000, 191 << 12, RAM_HIGH_START + 0x1000, DISK_START + 0x2000];
        assert_eq!(set.addresses().collect::<Vec<_>>(), expect);
        assert_eq!((set.count(), set.emit().len() as u64), (6, space.bitmap_size()));
        assert_eq!(set.emit()[0], 0b1011);
    }
}
