//! A set of pages of RAM, one bit each, in the order of the BITMAP window: low RAM, then high. HARVEST and FREEZE
//! make it of what KVM noted and what the VMM's own writes noted. Touches neither.

use onde_wire::machine::{PAGE_SIZE, RAM_HIGH_START, RAM_LOW_END};

/// Pages of low RAM, where there is high RAM: a multiple of 64, so no word has pages of both.
const LOW_PAGES: u64 = RAM_LOW_END / PAGE_SIZE;

/// A set of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

/// Bytes of the BITMAP window.
pub fn bitmap_size(mem_bytes: u64) -> u64 {
    (mem_bytes / PAGE_SIZE).div_ceil(64) * 8
}

impl PageSet {
    /// No page of a VM of `mem_bytes`.
    pub fn empty(mem_bytes: u64) -> Self {
        Self { words: vec![0; bitmap_size(mem_bytes) as usize / 8] }
    }

    /// Adds the pages of a piece of RAM that starts at `start`.
    pub fn merge(&mut self, start: u64, noted: &[u64]) {
        let first = if start < RAM_HIGH_START { 0 } else { LOW_PAGES / 64 };
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
        self.words.iter().enumerate().flat_map(|(at, &word)| {
            let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| address(at as u64 * 64 + bit))
        })
    }

    /// The BITMAP window's bytes.
    pub fn emit(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

fn address(page: u64) -> u64 {
    match page.checked_sub(LOW_PAGES) {
        Some(high) => RAM_HIGH_START + high * PAGE_SIZE,
        None => page * PAGE_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_noted_is_one_set() {
        let mem_bytes = RAM_LOW_END + (64 << 20);
        let mut set = PageSet::empty(mem_bytes);
        set.merge(0, &[0b1001, 0, 1 << 63]);
        set.merge(0, &[0b0011]);
        set.merge(RAM_HIGH_START, &[0b10]);
        let expect = [0, 0x1000, 0x3000, 191 << 12, RAM_HIGH_START + 0x1000];
        assert_eq!(set.addresses().collect::<Vec<_>>(), expect);
        assert_eq!((set.count(), set.emit().len() as u64), (5, bitmap_size(mem_bytes)));
        assert_eq!(set.emit()[0], 0b1011);
    }
}
