//! Every byte format and every limit of Onde: packets, tokens and hash chains,
//! the secure channel, the checkpoint stream, the machine contract. Programs
//! meet only in these bytes. No I/O, no clock, no heap, no unsafe code.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod bootstrap;
pub mod bytes;
pub mod chain;
pub mod channel;
pub mod cluster;
pub mod handover;
pub mod key;
pub mod machine;
pub mod packet;
pub mod plan;
pub mod price;
pub mod session;
pub mod stream;
pub mod token;
