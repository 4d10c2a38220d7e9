//! virtio-rng (virtio 1.2, 5.4): random bytes from the host's kernel.

use std::io::{self, Write};

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;

use super::ring::{self, Served};
use super::{Broken, Device};
use crate::memory::View;

/// Most bytes given for one buffer: Linux asks for 64 or less; a guest gets no more of the
/// I/O thread's time by offering more.
const CHUNK_SIZE: usize = 4096;

/// The entropy device; it has no state.
pub struct Rng;

impl Device for Rng {
    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn process(&mut self, queues: &mut [Queue], _: usize, view: &View) -> Result<Served, Broken> {
        ring::drain(&mut queues[0], view, |chain| {
            let mut writer = chain.writer(view).map_err(|_| Broken)?;
            let mut bytes = [0; CHUNK_SIZE];
            let size = writer.available_bytes().min(CHUNK_SIZE);
            let size =
                getrandom(&mut bytes[..size], GetRandomFlags::empty()).map_err(|_| Broken)?;
            writer.write_all(&bytes[..size]).map_err(|_| Broken)?;
            Ok(size as u32)
        })
    }
}
