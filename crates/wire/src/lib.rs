//! Every byte format and every limit of Onde: packets, tokens and hash chains,
//! the secure channel, the checkpoint stream, the machine contract. Programs
//! meet only in these bytes. No I/O, no clock, no heap, no unsafe code.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod bytes;
pub mod machine;
pub mod token;
