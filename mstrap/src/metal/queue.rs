//! A virtio split queue (Virtual I/O Device 1.2, section 2.7) of `N` buffers, each of one descriptor that
//! always describes the same buffer. The device is told and asked as rarely as it allows, since each
//! notification is an exit: `push` any number, then `publish` once.

use core::ptr::{addr_of, addr_of_mut};
use core::sync::atomic::{AtomicU16, Ordering, fence};

/// Descriptor flag: the device writes the buffer.
pub const DEVICE_WRITES: u16 = 2;
/// avail.flags, where there is no event index: no interrupts, please.
const NO_INTERRUPT: u16 = 1;
/// used.flags, where there is no event index: no notifications, please.
const NO_NOTIFY: u16 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    size: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Used {
    id: u32,
    size: u32,
}

/// The queue's memory, which the device reads and writes at any time.
#[repr(C, align(4096))]
pub struct Memory<const N: usize> {
    descriptors: [Descriptor; N],
    avail_flags: AtomicU16,
    avail_index: AtomicU16,
    avail: [u16; N],
    used_event: AtomicU16,
    used_area: UsedArea<N>,
}

#[repr(C, align(4))]
struct UsedArea<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [Used; N],
    avail_event: AtomicU16,
}

impl<const N: usize> Memory<N> {
    /// Memory of a queue that holds nothing.
    pub const fn new() -> Self {
        Self {
            descriptors: [Descriptor { address: 0, size: 0, flags: 0, next: 0 }; N],
            avail_flags: AtomicU16::new(0),
            avail_index: AtomicU16::new(0),
            avail: [0; N],
            used_event: AtomicU16::new(0),
            used_area: UsedArea {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [Used { id: 0, size: 0 }; N],
                avail_event: AtomicU16::new(0),
            },
        }
    }
}

impl<const N: usize> Default for Memory<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// The driver's end of a queue. `N` is a power of two.
pub struct Queue<const N: usize> {
    memory: &'static mut Memory<N>,
    event_index: bool,
    /// Buffers ever pushed, published, and taken back; all wrap, as the indexes in memory do.
    pushed: u16,
    published: u16,
    taken: u16,
}

impl<const N: usize> Queue<N> {
    /// A queue over fresh memory. `event_index`: VIRTIO_F_EVENT_IDX was agreed on.
    pub fn new(memory: &'static mut Memory<N>, event_index: bool) -> Self {
        // Armed only by `arm`: until then no interrupts.
        memory.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
        memory.used_event.store(u16::MAX, Ordering::Relaxed);
        Self { memory, event_index, pushed: 0, published: 0, taken: 0 }
    }

    /// Physical addresses of the three areas: descriptors, available, used.
    pub fn addresses(&self) -> [u64; 3] {
        [
            addr_of!(self.memory.descriptors) as u64,
            addr_of!(self.memory.avail_flags) as u64,
            addr_of!(self.memory.used_area) as u64,
        ]
    }

    /// Says what buffer descriptor `id` is.
    pub fn describe(&mut self, id: u16, address: u64, size: u32, flags: u16) {
        let descriptor = addr_of_mut!(self.memory.descriptors[usize::from(id)]);
        // SAFETY: in the array; volatile because the device reads it.
        unsafe { descriptor.write_volatile(Descriptor { address, size, flags, next: 0 }) }
    }

    /// Changes the size of a buffer that is ours at the moment.
    pub fn resize(&mut self, id: u16, size: u32) {
        let place = addr_of_mut!(self.memory.descriptors[usize::from(id)].size);
        // SAFETY: as in `describe`.
        unsafe { place.write_volatile(size) }
    }

    /// Gives buffer `id` to the device, which sees it after the next `publish`.
    pub fn push(&mut self, id: u16) {
        let slot = addr_of_mut!(self.memory.avail[usize::from(self.pushed) % N]);
        // SAFETY: as in `describe`.
        unsafe { slot.write_volatile(id) }
        self.pushed = self.pushed.wrapping_add(1);
    }

    /// Shows the device what was pushed. True if it wants to be notified.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.pushed);
        if old == new {
            return false;
        }
        self.memory.avail_index.store(new, Ordering::Release);
        self.published = new;
        // The device may go to sleep between our store and our look: both see each other's write.
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = self.memory.used_area.avail_event.load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.used_area.flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// Whether the device has given back a buffer.
    pub fn has_used(&self) -> bool {
        self.memory.used_area.index.load(Ordering::Acquire) != self.taken
    }

    /// Takes back a buffer: its number, below `N`, and the bytes that the device wrote into it.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let slot = addr_of!(self.memory.used_area.ring[usize::from(self.taken) % N]);
        // SAFETY: in the array; volatile because the device writes it, before the index we have seen.
        let used = unsafe { slot.read_volatile() };
        self.taken = self.taken.wrapping_add(1);
        // The VMM runs us and may do as it likes; a number beyond the queue is not survivable.
        assert!((used.id as usize) < N, "virtio: buffer {} of {N}", used.id);
        Some((used.id as u16, used.size))
    }

    /// Asks for an interrupt (which ends REG_IDLE, nothing else) at the next buffer given back. True if
    /// there is one already, in which case there is no need to wait.
    pub fn arm(&mut self) -> bool {
        self.memory.avail_flags.store(0, Ordering::Relaxed);
        self.memory.used_event.store(self.taken, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Takes the wish for interrupts back. With an event index it lapses by itself.
    pub fn disarm(&mut self) {
        self.memory.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
    }
}
