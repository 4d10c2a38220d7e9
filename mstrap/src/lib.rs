//! The bare-metal programs of a new VM: `mstrap`, which takes in a loader over TCP, and our `loader`,
//! which takes in a checkpoint stream and resumes it. What they decide is in [`server`], [`upload`],
//! [`tcp`] and [`restore`], which touch no hardware and are tested on the host; what touches the machine is in
//! `metal`, the only place with unsafe code. Both programs own the machine: one CPU, no interrupts, no heap.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(not(test))]
#[allow(unsafe_code)]
pub mod metal;
pub mod restore;
pub mod server;
pub mod tcp;
pub mod upload;
