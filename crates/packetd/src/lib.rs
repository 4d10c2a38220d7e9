//! The pure part of `packetd`, the only program on a node that a stranger's packet can reach:
//! frames in, frames and messages out. No I/O, no clock, no unsafe code, and no heap (no `alloc` is
//! linked), so all memory it uses is fixed at compile time. Called by `main`, tests and fuzzing.
#![no_std]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod bucket;
pub mod filter;
pub mod frame;
mod packetd;

pub use packetd::{Counts, Input, Output, Packetd};
