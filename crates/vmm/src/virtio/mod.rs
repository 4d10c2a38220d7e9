//! Virtio devices (virtio 1.2): the transport `mmio`, the rings `ring`, and the devices `net`,
//! `rng` and `blk`. They see guest memory through a bounds-checked view and raise interrupts
//! through a line; none knows KVM, so all of it is tested on any host.

pub mod blk;
pub mod flow;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod rng;

use std::io;

use virtio_queue::Queue;

use crate::memory::View;

/// `VIRTIO_F_VERSION_1`: every device here is modern and nothing else.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// The guest broke a ring's rules: the device stops until the guest resets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// One virtio device behind the transport. All calls come under the transport's lock.
pub trait Device: Send {
    /// Device id (virtio 1.2, chapter 5).
    fn id(&self) -> u32;
    /// Features offered beside those of the transport.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];
    /// The configuration space; reads beyond it give zeros.
    fn config(&self) -> Vec<u8>;
    /// The guest's driver is ready and took `features`.
    fn activate(&mut self, features: u64) -> io::Result<()>;
    /// Back to the state after power-on.
    fn reset(&mut self);
    /// Serves queue `index`.
    fn process(
        &mut self,
        queues: &mut [Queue],
        index: usize,
        view: &View,
    ) -> Result<ring::Served, Broken>;
    /// RESUME was done: from here on the device belongs to the guest, not to mstrap.
    fn hand_over(&mut self) {}
    /// Tells the network where the guest is.
    fn announce(&mut self) {}
    /// What leaves: all, or this alone.
    fn hold(&mut self, _outgoing: Outgoing) {}
}

/// What a machine sends: everything, unless it was saved and its copy may run already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// All frames.
    All,
    /// These.
    Only(flow::Flow),
}
