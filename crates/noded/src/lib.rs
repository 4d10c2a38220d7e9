//! The only privileged program on a node. It has no network: no IP socket is ever made here, and what
//! strangers send reaches it only through `packetd`, checked. [`node`] is the state without a kernel, [`world`] the
//! kernel without a policy; [`run`] is the one loop that joins them.
#![warn(missing_docs)]
#![forbid(unsafe_code)]

pub mod admission;
pub mod cgroup;
pub mod files;
pub mod filter;
mod hearing;
pub mod host;
pub mod init;
pub mod inventory;
pub mod job;
pub mod meter;
pub mod node;
pub mod packetd;
pub mod run;
#[cfg(test)]
mod samples;
pub mod scratch;
pub mod service;
pub mod vm;
pub mod world;

/// Fills `bytes` with random ones from the kernel.
pub fn random(bytes: &mut [u8]) -> std::io::Result<()> {
    let size = rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())?;
    // The kernel gives up to 256 bytes whole (getrandom(2)).
    assert_eq!(size, bytes.len(), "no more than 256 bytes are asked for");
    Ok(())
}
