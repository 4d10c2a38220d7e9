//! What `virtio-queue` leaves to the device: the loop that serves a ring, giving several used
//! buffers to the guest at once (a received frame that spans buffers must not be seen in part),
//! and the full rule for when to interrupt (it has no `VRING_AVAIL_F_NO_INTERRUPT`).
//! Virtio 1.2, 2.7.7 and 2.7.8.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Broken;
use crate::memory::View;

/// A used buffer: head of its descriptor chain, and bytes written to it.
pub type Used = (u16, u32);

/// Bytes of flags and index before either ring's entries.
const RING_HEADER: u64 = 4;
const USED_ENTRY: u64 = 8;
/// Driver asks for no interrupts.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Chains served in one go, so that a guest that never stops ringing leaves the I/O thread time
/// for its other devices.
pub const BUDGET: usize = 256;

/// When the guest is to hear of used buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// It does not want to.
    Never,
    /// With its next interrupt, or after a while: nobody waits for these buffers.
    Later,
    /// At once.
    Now,
}

/// What serving a ring came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// The guest's interrupt.
    pub interrupt: Due,
    /// The budget ended before the ring did: serve it again soon.
    pub more: bool,
}

/// Hands each available chain to `handle`, which says how many bytes it wrote, until the ring is
/// empty and the guest will ring again, or the budget is used up.
pub fn drain<'a>(
    queue: &mut Queue,
    view: &'a View,
    mut handle: impl FnMut(DescriptorChain<&'a View>) -> Result<u32, Broken>,
) -> Result<Served, Broken> {
    let before = queue.next_used();
    queue.disable_notification(view).map_err(|_| Broken)?;
    for _ in 0..BUDGET {
        let Some(chain) = next_or_rearm(queue, view)? else {
            let interrupt = interrupt(queue, view, before)?;
            return Ok(Served { interrupt, more: false });
        };
        let head = chain.head_index();
        let written = handle(chain)?;
        publish(queue, view, &[(head, written)])?;
    }
    Ok(Served { interrupt: interrupt(queue, view, before)?, more: true })
}

/// The next chain; where there is none, asks to be rung and looks once more.
fn next_or_rearm<'a>(
    queue: &mut Queue,
    view: &'a View,
) -> Result<Option<DescriptorChain<&'a View>>, Broken> {
    if let Some(chain) = queue.pop_descriptor_chain(view) {
        return Ok(Some(chain));
    }
    if !queue.enable_notification(view).map_err(|_| Broken)? {
        return Ok(None);
    }
    // The index moved, so there is a chain; none means that it makes no sense.
    queue.pop_descriptor_chain(view).ok_or(Broken).map(Some)
}

/// Gives `used` to the guest, all with one update of the index.
pub fn publish(queue: &mut Queue, memory: &View, used: &[Used]) -> Result<(), Broken> {
    let first = queue.next_used();
    for (count, &(head, length)) in used.iter().enumerate() {
        let position = first.wrapping_add(count as u16) % queue.size();
        let at = offset(queue.used_ring(), RING_HEADER + USED_ENTRY * u64::from(position))?;
        let entry = u64::from(head) | u64::from(length) << 32;
        memory.write_obj(entry.to_le(), at).map_err(|_| Broken)?;
    }
    let next = first.wrapping_add(used.len() as u16);
    queue.set_next_used(next);
    let index = offset(queue.used_ring(), 2)?;
    memory.store(next.to_le(), index, Ordering::Release).map_err(|_| Broken)
}

/// When the guest is to hear of the buffers used since the index was `before`.
pub fn interrupt(queue: &Queue, memory: &View, before: u16) -> Result<Due, Broken> {
    let wants = wants_interrupt(queue, memory, before)?;
    Ok(if wants { Due::Now } else { Due::Never })
}

/// The rule of virtio 1.2, 2.7.7.
fn wants_interrupt(queue: &Queue, memory: &View, before: u16) -> Result<bool, Broken> {
    let next = queue.next_used();
    if next == before {
        return Ok(false);
    }
    // The index must be visible before the driver's wish is read.
    fence(Ordering::SeqCst);
    let load = |at: u64| -> Result<u16, Broken> {
        let at = offset(queue.avail_ring(), at)?;
        memory.load(at, Ordering::Relaxed).map(u16::from_le).map_err(|_| Broken)
    };
    if !queue.event_idx_enabled() {
        return Ok(load(0)? & AVAIL_NO_INTERRUPT == 0);
    }
    let event = load(RING_HEADER + 2 * u64::from(queue.size()))?;
    Ok(next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(before))
}

fn offset(ring: u64, at: u64) -> Result<GuestAddress, Broken> {
    ring.checked_add(at).map(GuestAddress).ok_or(Broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::mock::MockSplitQueue;

    /// Publishes `count` buffers at used index `start` and asks whether to interrupt.
    fn check(event: Option<u16>, flags: u16, start: u16, count: u16, expect: bool) {
        let memory = View::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mock = MockSplitQueue::new(&memory, 16);
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.set_event_idx(event.is_some());
        // The mock leaves no room for the event fields behind its rings.
        queue.set_used_ring_address(Some(0x6000), None);
        queue.set_next_used(start);
        memory.write_obj(flags, GuestAddress(queue.avail_ring())).unwrap();
        let event_at = GuestAddress(queue.avail_ring() + 4 + 32);
        memory.write_obj(event.unwrap_or(0), event_at).unwrap();
        let used: Vec<Used> = (0..count).map(|head| (head, 100)).collect();
        publish(&mut queue, &memory, &used).unwrap();
        let index: u16 = memory.read_obj(GuestAddress(queue.used_ring() + 2)).unwrap();
        assert_eq!(index, start.wrapping_add(count));
        assert_eq!(
            wants_interrupt(&queue, &memory, start),
            Ok(expect),
            "{event:?} {start} {count}"
        );
    }

    #[test]
    fn interrupts_when_the_driver_wants_them() {
        check(None, 0, 0, 1, true);
        check(None, AVAIL_NO_INTERRUPT, 0, 1, false);
        check(None, 0, 5, 0, false);
        check(Some(0), 0, 0, 1, true);
        check(Some(3), 0, 0, 3, false);
        check(Some(2), 0, 0, 3, true);
        check(Some(65535), 0, 65534, 4, true);
        check(Some(1), 0, 65534, 3, false);
    }

    #[test]
    fn an_index_that_makes_no_sense_breaks_the_device() {
        let memory = View::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mock = MockSplitQueue::new(&memory, 16);
        let mut queue: Queue = mock.create_queue().unwrap();
        let drained = drain(&mut queue, &memory, |_| Ok(0));
        assert_eq!(drained, Ok(Served { interrupt: Due::Never, more: false }));
        memory.write_obj(1000u16, GuestAddress(queue.avail_ring() + 2)).unwrap();
        assert_eq!(drain(&mut queue, &memory, |_| Ok(0)), Err(Broken));
    }

    #[test]
    fn rings_outside_memory_break_the_device() {
        let memory = View::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(16).unwrap();
        queue.set_used_ring_address(Some(0xFFFF_FFF0), Some(0xFFFF_FFFF));
        assert_eq!(publish(&mut queue, &memory, &[(0, 1)]), Err(Broken));
    }
}
