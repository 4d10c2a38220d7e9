//! Virtual metal: diskless Onde nodes as QEMU machines on a network of their
//! own, for development, tests, the demo and benchmarks on any Linux machine.
//! The program `onde-lab`, `xtask` and tests drive [`Lab`]. Nothing here is
//! part of a real node or of what a customer trusts.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod capture;
pub mod cluster;
pub mod guest;
pub mod image;
pub mod keeper;
pub mod kernel;
mod lab;
pub mod modules;
mod network;
pub mod programs;
pub mod progress;
mod qemu;
mod service;
mod status;
pub mod witness;

pub use lab::{Lab, clean, default_dir};
pub use status::{Member, Shape, State, Status};
