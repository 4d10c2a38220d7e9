//! Virtio over MMIO, version 2 (virtio 1.2, 4.2): the registers of one device and the life of its
//! driver. Called by vCPU threads for writes to registers and by the I/O thread for the rings. What registers read as
//! lies in a page that the guest sees, so reading costs no exit.
//!
//! ```text
//!   reset -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK -> (NEEDS_RESET)
//!     ^                                                               |
//!     +-------------------- guest writes 0 to STATUS -----------------+
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use onde_wire::bytes::Reader;
use onde_wire::machine::VIRTIO_STRIDE;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use super::ring::{Due, Served};
use super::{Device, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Outgoing};
use crate::line::Line;
use crate::memory::View;

/// Register offsets.
mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0C;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xA0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xA4;
    pub const CONFIG: u64 = 0x100;
}
/// Where the guest writes a queue's number to have it served. KVM turns each such write into an
/// eventfd of the I/O thread, so none comes through here.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Where the guest acknowledges interrupts. KVM drops each write of [`ACK_USED`] there.
pub const INTERRUPT_ACK: u64 = 0x64;
/// The value that a guest acknowledges an interrupt with, and nothing but that.
pub const ACK_USED: u32 = interrupt::USED;

/// Bits of INTERRUPT_STATUS.
mod interrupt {
    /// A ring was used. Set as long as the driver is live: what it is told of is in the rings, and it need not come to us to
    /// learn that it has to look there, nor to say that it does.
    pub const USED: u32 = 1;
    /// Configuration or device status changed.
    pub const CONFIG: u32 = 2;
}

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// "ONDE".
const VENDOR: u32 = u32::from_le_bytes(*b"ONDE");

/// Bits of STATUS.
mod status {
    pub const FEATURES_OK: u32 = 8;
    pub const DRIVER_OK: u32 = 4;
    pub const NEEDS_RESET: u32 = 0x40;
}

/// A device with its transport: what the bus and the I/O thread hold.
pub struct Slot {
    transport: Mutex<Transport>,
}

/// What leads from a device to its guest.
pub struct Wiring {
    /// Its interrupt.
    pub line: Arc<dyn Line>,
    /// An eventfd for each queue.
    pub kicks: Vec<EventFd>,
    /// What its registers read as, a page for each position, which the guest cannot write.
    pub registers: Arc<MmapRegion>,
    /// Its position.
    pub position: usize,
}

impl Slot {
    /// A device after power-on; `view` is what it may touch of guest memory.
    pub fn new(device: Box<dyn Device>, wiring: Wiring, view: Arc<View>) -> Self {
        Self { transport: Mutex::new(Transport::new(device, wiring, view)) }
    }

    fn lock(&self) -> MutexGuard<'_, Transport> {
        // A thread that panics ends the process, so a poisoned lock is never met.
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let mut transport = self.lock();
        transport.write(offset, u32::from_le_bytes(bytes));
        transport.show();
    }

    /// Serves queue `index`: the guest rang, or its host side has something. Returns whether an interrupt is due that can
    /// wait, for [`Self::interrupt_late`].
    pub fn process(&self, index: usize) -> bool {
        let mut transport = self.lock();
        transport.process(index);
        transport.interrupt_waits
    }

    /// Raises the interrupt that waited, unless another one took its place.
    pub fn interrupt_late(&self) {
        let mut transport = self.lock();
        if transport.interrupt_waits {
            transport.interrupt();
        }
    }

    /// RESUME: resets the device and hands it to the guest, with RAM as all it may touch.
    pub fn hand_over(&self, ram: Arc<View>) {
        let mut transport = self.lock();
        transport.reset();
        transport.view = ram;
        transport.device.hand_over();
        transport.show();
    }

    /// Tells the network where the guest is.
    pub fn announce(&self) {
        self.lock().device.announce();
    }

    /// FREEZE and its undoing: what the device may send from here on.
    pub fn hold(&self, outgoing: Outgoing) {
        self.lock().device.hold(outgoing);
    }

    /// FREEZE: the state of transport and rings. The devices behind them have none of their own: a frame that
    /// waits for a buffer is lost to the copy, as on any network.
    pub fn save(&self) -> Vec<u8> {
        self.lock().save()
    }

    /// Reads what [`Self::save`] wrote, for [`Self::load`].
    pub fn parse(&self, bytes: &[u8]) -> Option<Saved> {
        self.lock().parse(bytes)
    }

    /// RESUME of a copy, after [`Self::hand_over`]: goes on where the device stopped.
    pub fn load(&self, saved: Saved) {
        self.lock().load(saved);
    }
}

/// A device's state, checked.
pub struct Saved {
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    status: u32,
    config_changed: bool,
    queues: Vec<Queue>,
}

struct Transport {
    device: Box<dyn Device>,
    wiring: Wiring,
    view: Arc<View>,
    queues: Vec<Queue>,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    status: u32,
    /// The driver has not acknowledged yet that configuration or status changed.
    config_changed: bool,
    /// An interrupt is due that can wait.
    interrupt_waits: bool,
}

impl Transport {
    fn new(device: Box<dyn Device>, wiring: Wiring, view: Arc<View>) -> Self {
        let sizes = device.queue_sizes();
        assert_eq!(sizes.len(), wiring.kicks.len());
        let queue = |&size| Queue::new(size).expect("queue sizes are powers of two");
        let transport = Self {
            queues: sizes.iter().map(queue).collect(),
            device,
            wiring,
            view,
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            status: 0,
            config_changed: false,
            interrupt_waits: false,
        };
        transport.show();
        transport
    }

    fn offered(&self) -> u64 {
        self.device.features() | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// Puts what the registers read as into their page, after whatever may have changed them. All others are zero; so is the
    /// configuration's generation, which changes only at RESUME, with a reset.
    fn show(&self) {
        let of_queue = |value: fn(&Queue) -> u32| self.selected().map_or(0, value);
        let words = [
            (reg::MAGIC, MAGIC),
            (reg::VERSION, 2),
            (reg::DEVICE_ID, self.device.id()),
            (reg::VENDOR_ID, VENDOR),
            (reg::DEVICE_FEATURES, half(self.offered(), self.device_features_select)),
            (reg::QUEUE_NUM_MAX, of_queue(|queue| queue.max_size().into())),
            (reg::QUEUE_READY, of_queue(|queue| queue.ready().into())),
            (reg::INTERRUPT_STATUS, self.interrupt_status()),
            (reg::STATUS, self.status),
        ];
        let start = self.wiring.position * VIRTIO_STRIDE as usize;
        let page = self.wiring.registers.as_volatile_slice();
        let put = |offset: u64, bytes: &[u8]| {
            let put = page.write_slice(bytes, start + offset as usize);
            put.expect("each position has a page of registers");
        };
        words.iter().for_each(|(offset, word)| put(*offset, &word.to_le_bytes()));
        put(reg::CONFIG, &self.device.config());
    }

    /// Whether rings are served.
    fn is_live(&self) -> bool {
        let running = status::DRIVER_OK | status::FEATURES_OK;
        self.status & (running | status::NEEDS_RESET) == running
    }

    fn interrupt_status(&self) -> u32 {
        let used = if self.is_live() { interrupt::USED } else { 0 };
        used | if self.config_changed { interrupt::CONFIG } else { 0 }
    }

    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::DRIVER_FEATURES => self.set_driver_features(value),
            reg::QUEUE_SEL => self.queue_select = value,
            reg::STATUS => self.set_status(value),
            INTERRUPT_ACK => self.config_changed &= value & interrupt::CONFIG == 0,
            _ => self.write_queue(offset, value),
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features >> 32 << 32 | u64::from(value),
            1 => {
                let low = self.driver_features & u64::from(u32::MAX);
                self.driver_features = low | u64::from(value) << 32;
            }
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        // A live ring does not move under the I/O thread.
        let live = self.status & status::DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if live && queue.ready() && offset != reg::QUEUE_READY {
            return;
        }
        match offset {
            // Values that are no queue size are ignored by `set_size`.
            reg::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            reg::QUEUE_READY => {
                queue.set_event_idx(self.driver_features & FEATURE_EVENT_IDX != 0);
                queue.set_ready(value == 1);
                if !queue.is_valid(&*self.view) {
                    queue.set_ready(false);
                }
            }
            reg::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            reg::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            reg::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            reg::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            reg::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            reg::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let risen = value & !self.status;
        self.status = value & 0xFF | self.status & status::NEEDS_RESET;
        if risen & status::FEATURES_OK != 0 {
            let known = self.driver_features & !self.offered() == 0;
            if !known || self.driver_features & FEATURE_VERSION_1 == 0 {
                self.status &= !status::FEATURES_OK;
            }
        }
        if risen & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.start();
        }
    }

    fn start(&mut self) {
        if self.device.activate(self.driver_features).is_err() {
            return self.fail();
        }
        // What came for the device before its driver was ready waits for these.
        for kick in &self.wiring.kicks {
            let _ = kick.write(1);
        }
    }

    fn process(&mut self, index: usize) {
        if !self.is_live() || !self.queues.get(index).is_some_and(Queue::ready) {
            return;
        }
        match self.device.process(&mut self.queues, index, &self.view) {
            Ok(served) => self.finish(index, served),
            Err(super::Broken) => self.fail(),
        }
    }

    fn finish(&mut self, index: usize, served: Served) {
        match served.interrupt {
            Due::Never => {}
            // A second one that can wait is one too many: a sender may stop at two.
            Due::Later if !self.interrupt_waits => self.interrupt_waits = true,
            Due::Later | Due::Now => self.interrupt(),
        }
        if served.more {
            let _ = self.wiring.kicks[index].write(1);
        }
    }

    fn save(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.device.id().to_le_bytes());
        out.extend(self.queue_select.to_le_bytes());
        out.extend(self.device_features_select.to_le_bytes());
        out.extend(self.driver_features_select.to_le_bytes());
        out.extend(self.driver_features.to_le_bytes());
        out.extend(self.status.to_le_bytes());
        out.extend(self.interrupt_status().to_le_bytes());
        for queue in &self.queues {
            let state = queue.state();
            for value in [state.size, state.next_avail, state.next_used] {
                out.extend(value.to_le_bytes());
            }
            out.extend([u8::from(state.event_idx_enabled), u8::from(state.ready)]);
            for address in [state.desc_table, state.avail_ring, state.used_ring] {
                out.extend(address.to_le_bytes());
            }
        }
        out
    }

    fn parse(&self, bytes: &[u8]) -> Option<Saved> {
        let mut r = Reader::new(bytes);
        if r.u32()? != self.device.id() {
            return None;
        }
        let mut saved = Saved {
            queue_select: r.u32()?,
            device_features_select: r.u32()?,
            driver_features_select: r.u32()?,
            driver_features: r.u64()?,
            status: r.u32()?,
            config_changed: r.u32()? & interrupt::CONFIG != 0,
            queues: Vec::new(),
        };
        if saved.driver_features & !self.offered() != 0 {
            return None;
        }
        for queue in &self.queues {
            let state = QueueState {
                max_size: queue.max_size(),
                size: r.u16()?,
                next_avail: r.u16()?,
                next_used: r.u16()?,
                event_idx_enabled: r.u8()? == 1,
                ready: r.u8()? == 1,
                desc_table: r.u64()?,
                avail_ring: r.u64()?,
                used_ring: r.u64()?,
            };
            saved.queues.push(state.try_into().ok()?);
        }
        r.rest().is_empty().then_some(saved)
    }

    fn load(&mut self, saved: Saved) {
        self.queue_select = saved.queue_select;
        self.device_features_select = saved.device_features_select;
        self.driver_features_select = saved.driver_features_select;
        self.driver_features = saved.driver_features;
        self.status = saved.status;
        self.queues = saved.queues;
        for queue in &mut self.queues {
            // A ring that lies outside of RAM is not served.
            let good = queue.ready() && queue.is_valid(&*self.view);
            queue.set_ready(good);
        }
        self.config_changed = saved.config_changed;
        if self.is_live() {
            // Rings that the copy's source was rung for and had not served are served now.
            self.start();
        }
        if self.interrupt_status() != 0 {
            // Once more: the last one may have waited, or come when the source's vCPU was saved already.
            self.interrupt();
        }
        self.show();
    }

    /// The driver broke the rules: no more service until it resets the device.
    fn fail(&mut self) {
        self.status |= status::NEEDS_RESET;
        self.config_changed = true;
        self.show();
        self.interrupt();
    }

    /// The driver looks at all its rings at each.
    fn interrupt(&mut self) {
        self.interrupt_waits = false;
        self.wiring.line.pulse();
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(QueueT::reset);
        self.config_changed = false;
        self.interrupt_waits = false;
        self.status = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
    }
}

/// The low or the high word of a feature set.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::rng::Rng;
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    /// Status writes of a driver that sets up a device.
    const DRIVER: u32 = 1 | 2;
    const WRITABLE: u16 = 2;

    /// A device at the second position, and what it raises and is rung by.
    fn slot(view: Arc<View>) -> (Slot, EventFd, EventFd) {
        let [line, kick] = [(); 2].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let wiring = Wiring {
            line: Arc::new(line.try_clone().unwrap()),
            kicks: vec![kick.try_clone().unwrap()],
            registers: Arc::new(crate::memory::map_registers(2).unwrap()),
            position: 1,
        };
        (Slot::new(Box::new(Rng), wiring, view), line, kick)
    }

    /// As the guest reads it.
    fn get(slot: &Slot, offset: u64) -> u32 {
        let registers = slot.lock().wiring.registers.clone();
        registers.as_volatile_slice().read_obj((VIRTIO_STRIDE + offset) as usize).unwrap()
    }

    fn set(slot: &Slot, writes: &[(u64, u32)]) {
        for (offset, value) in writes {
            slot.write(*offset, &value.to_le_bytes());
        }
    }

    fn negotiate(slot: &Slot, low: u32, high: u32) -> u32 {
        set(slot, &[(reg::STATUS, DRIVER)]);
        set(slot, &[(reg::DRIVER_FEATURES_SEL, 0), (reg::DRIVER_FEATURES, low)]);
        set(slot, &[(reg::DRIVER_FEATURES_SEL, 1), (reg::DRIVER_FEATURES, high)]);
        set(slot, &[(reg::STATUS, DRIVER | status::FEATURES_OK)]);
        get(slot, reg::STATUS)
    }

    fn view() -> Arc<View> {
        Arc::new(View::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap())
    }

    #[test]
    fn identifies_itself() {
        let (slot, ..) = slot(view());
        assert_eq!(get(&slot, reg::MAGIC).to_le_bytes(), *b"virt");
        assert_eq!((get(&slot, reg::VERSION), get(&slot, reg::DEVICE_ID)), (2, 4));
        assert_eq!(get(&slot, reg::QUEUE_NUM_MAX), 64);
        set(&slot, &[(reg::QUEUE_SEL, 1)]);
        assert_eq!(get(&slot, reg::QUEUE_NUM_MAX), 0);
        let other = slot.lock().wiring.registers.as_volatile_slice().read_obj::<u32>(0).unwrap();
        assert_eq!(other, 0, "the other position's page was written");
    }

    #[test]
    fn features_are_taken_only_if_modern_and_offered() {
        for (low, high, expect) in [(0, 1, true), (0, 0, false), (1, 1, false)] {
            let (slot, ..) = slot(view());
            let ok = negotiate(&slot, low, high) & status::FEATURES_OK != 0;
            assert_eq!(ok, expect, "{low:#x} {high:#x}");
        }
    }

    /// Brings the entropy device up with one buffer in its ring and rings it.
    fn serve_one(view: Arc<View>) -> (Slot, EventFd, Vec<u8>) {
        let mock = MockSplitQueue::new(&*view, 16);
        let chain = [RawDescriptor::from(Descriptor::new(0x8000, 64, WRITABLE, 0))];
        mock.add_desc_chains(&chain, 0).unwrap();
        let (slot, line, _) = slot(view.clone());
        negotiate(&slot, 0, 1);
        set(&slot, &[(reg::QUEUE_SEL, 0), (reg::QUEUE_NUM, 16)]);
        set(&slot, &[(reg::QUEUE_DESC_LOW, mock.desc_table_addr().0 as u32)]);
        set(&slot, &[(reg::QUEUE_DRIVER_LOW, mock.avail_addr().0 as u32)]);
        set(&slot, &[(reg::QUEUE_DEVICE_LOW, mock.used_addr().0 as u32)]);
        set(&slot, &[(reg::QUEUE_READY, 1)]);
        slot.process(0);
        assert!(line.read().is_err(), "served before DRIVER_OK");
        set(&slot, &[(reg::STATUS, DRIVER | status::FEATURES_OK | status::DRIVER_OK)]);
        slot.process(0);
        let mut bytes = vec![0; 64];
        view.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        (slot, line, bytes)
    }

    #[test]
    fn serves_a_ring_and_interrupts() {
        let (slot, line, bytes) = serve_one(view());
        assert!(bytes.iter().any(|byte| *byte != 0));
        assert_eq!((line.read().unwrap(), get(&slot, reg::INTERRUPT_STATUS)), (1, ACK_USED));
        // Where it has to look it is told anew by each interrupt, whatever it acknowledged.
        set(&slot, &[(INTERRUPT_ACK, ACK_USED)]);
        assert_eq!(get(&slot, reg::INTERRUPT_STATUS), ACK_USED);
    }

    #[test]
    fn an_interrupt_that_can_wait_is_raised_once() {
        let (slot, line, _) = slot(view());
        let serve = |interrupt| {
            slot.lock().finish(0, Served { interrupt, more: false });
            line.read().is_ok()
        };
        assert!(!serve(Due::Later));
        assert!(!serve(Due::Never));
        slot.interrupt_late();
        assert!(line.read().is_ok(), "nobody heard of it");
        slot.interrupt_late();
        assert!(line.read().is_err(), "heard of twice");
        // Not two of them, and none beside one that does not wait.
        assert_eq!(
            [Due::Later, Due::Later, Due::Later, Due::Now].map(serve),
            [false, true, false, true]
        );
        slot.interrupt_late();
        assert!(line.read().is_err(), "heard of twice");
    }

    #[test]
    fn a_broken_ring_is_told_until_that_is_acknowledged() {
        let (slot, line, _) = serve_one(view());
        let _ = line.read();
        slot.lock().fail();
        assert_eq!((line.read().unwrap(), get(&slot, reg::INTERRUPT_STATUS)), (1, 2));
        assert_eq!(get(&slot, reg::STATUS) & status::NEEDS_RESET, status::NEEDS_RESET);
        set(&slot, &[(INTERRUPT_ACK, ACK_USED)]);
        assert_eq!(get(&slot, reg::INTERRUPT_STATUS), 2);
        set(&slot, &[(INTERRUPT_ACK, 3)]);
        assert_eq!(get(&slot, reg::INTERRUPT_STATUS), 0);
    }

    #[test]
    fn a_copy_goes_on_where_its_source_stopped() {
        let view = view();
        let (source, ..) = serve_one(view.clone());
        let saved = source.save();
        let (copy, line, kick) = slot(view);
        copy.load(copy.parse(&saved).unwrap());
        assert_eq!(copy.save(), saved);
        assert_eq!(get(&copy, reg::INTERRUPT_STATUS), 1);
        assert!(line.read().is_ok() && kick.read().is_ok(), "an interrupt or a ring was lost");
        (0..saved.len()).for_each(|size| assert!(copy.parse(&saved[..size]).is_none()));
        let mut other = saved.clone();
        other[0] ^= 1;
        assert!(copy.parse(&other).is_none(), "took another device's state");
    }

    #[test]
    fn hand_over_leaves_nothing_of_the_first_driver() {
        let (slot, ..) = serve_one(view());
        slot.hand_over(Arc::new(View::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()));
        assert_eq!((get(&slot, reg::STATUS), get(&slot, reg::INTERRUPT_STATUS)), (0, 0));
        negotiate(&slot, 0, 1);
        set(&slot, &[(reg::QUEUE_DESC_LOW, 0x8000), (reg::QUEUE_READY, 1)]);
        assert_eq!(get(&slot, reg::QUEUE_READY), 0, "a ring outside the new view was accepted");
    }
}
