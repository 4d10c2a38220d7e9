//! The last output of a program: bytes of two streams in the order they came, numbered from the program's
//! start. Bounded; says when it is full and leaves it to [`crate::program`] what may be forgotten.

use onde_wire::session::TAIL_MAX;
use std::collections::VecDeque;

/// What a change of streams is counted as, so that a program that alternates between its two streams byte by byte
/// does not fill the guest's memory with bookkeeping.
const RUN_COST: usize = 16;

/// Bytes of one stream that came one after the other; they begin where the run before ends.
struct Run {
    stream: u8,
    end: u64,
}

/// See the module.
pub struct Tail {
    bytes: VecDeque<u8>,
    runs: VecDeque<Run>,
    start: u64,
}

impl Tail {
    pub fn new() -> Self {
        Self { bytes: VecDeque::new(), runs: VecDeque::new(), start: 0 }
    }

    /// Offset of the oldest byte kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Offset behind the newest byte.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// How many bytes can be added now.
    pub fn room(&self) -> usize {
        TAIL_MAX.saturating_sub(self.bytes.len() + (self.runs.len() + 1) * RUN_COST)
    }

    /// Adds output; the caller has looked for room.
    pub fn push(&mut self, stream: u8, bytes: &[u8]) {
        assert!(bytes.len() <= self.room(), "{} bytes for a full tail", bytes.len());
        self.bytes.extend(bytes);
        let end = self.end();
        match self.runs.back_mut() {
            Some(run) if run.stream == stream => run.end = end,
            _ => self.runs.push_back(Run { stream, end }),
        }
    }

    /// Forgets the oldest bytes until there is room for `size`, but none at `floor` or behind.
    pub fn forget(&mut self, size: usize, floor: u64) {
        while self.room() < size && self.start < floor.min(self.end()) {
            let front = self.runs.front().expect("bytes belong to runs");
            let wanted = self.start + (size - self.room()) as u64;
            let start = wanted.min(floor).min(front.end);
            self.bytes.drain(..(start - self.start) as usize);
            self.start = start;
            if front.end == start {
                self.runs.pop_front();
            }
        }
    }

    /// Copies bytes of one stream from offset `from` on, which is not before the start; the stream and
    /// the count, `None` where there are no more.
    pub fn read(&self, from: u64, out: &mut [u8]) -> Option<(u8, usize)> {
        let run = self.runs.get(self.runs.partition_point(|run| run.end <= from))?;
        let first = (from - self.start) as usize;
        let count = out.len().min((run.end - from) as usize);
        let (front, back) = self.bytes.as_slices();
        let from_front = front.get(first..).unwrap_or_default();
        let split = from_front.len().min(count);
        out[..split].copy_from_slice(&from_front[..split]);
        if split < count {
            let skip = first.saturating_sub(front.len());
            out[split..count].copy_from_slice(&back[skip..skip + count - split]);
        }
        Some((run.stream, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(tail: &Tail, mut from: u64) -> Vec<(u8, Vec<u8>)> {
        let mut out = [0; 7];
        let mut pieces = Vec::new();
        while let Some((stream, count)) = tail.read(from, &mut out) {
            pieces.push((stream, out[..count].to_vec()));
            from += count as u64;
        }
        assert_eq!(from, tail.end());
        pieces
    }

    #[test]
    fn keeps_the_order_of_two_streams() {
        let mut tail = Tail::new();
        tail.push(1, b"abc");
        tail.push(1, b"defgh");
        tail.push(2, b"E");
        tail.push(1, b"i");
        let piece = |stream, bytes: &[u8]| (stream, bytes.to_vec());
        let rest = [piece(2, b"E"), piece(1, b"i")];
        assert_eq!(all(&tail, 0), [&[piece(1, b"abcdefg"), piece(1, b"h")][..], &rest].concat());
        assert_eq!(all(&tail, 8), rest);
        assert_eq!(all(&tail, 10), []);
    }

    #[test]
    fn forgets_the_oldest_and_only_before_the_floor() {
        let mut tail = Tail::new();
        for round in 0..100u64 {
            let size = 50_000;
            tail.forget(size, u64::MAX);
            tail.push(1 + (round % 2) as u8, &[round as u8; 50_000]);
        }
        assert_eq!(tail.end(), 5_000_000);
        assert!(tail.end() - tail.start() > TAIL_MAX as u64 - 1000);
        let pieces = all(&tail, tail.start());
        let newest = pieces.last().unwrap();
        assert_eq!((newest.0, newest.1[0]), (2, 99));
        let floor = tail.start() + 10;
        tail.forget(60_000, floor);
        assert_eq!(tail.start(), floor);
        assert!(tail.room() < 60_000);
    }

    #[test]
    fn streams_that_alternate_stay_bounded() {
        let mut tail = Tail::new();
        for round in 0..1_000_000u32 {
            tail.forget(1, u64::MAX);
            tail.push(1 + (round % 2) as u8, &[7]);
        }
        assert!(tail.runs.len() * RUN_COST <= TAIL_MAX);
    }
}
