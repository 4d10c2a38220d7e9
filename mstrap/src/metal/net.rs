//! The network device: virtio-net over virtio-mmio (Virtual I/O Device 1.2, sections 4.2 and 5.1), as
//! smoltcp wants to see one. Polled, never interrupted; memory is mapped one to one, so a buffer's address
//! is what the device is told.

use super::Lent;
use super::clock::Clock;
use super::control::{self, IDLE_MS_MAX};
use super::queue::{DEVICE_WRITES, Memory, Queue};
use crate::tcp::Wire;
use onde_wire::machine::{VIRTIO_NET, VIRTIO_START, VIRTIO_STRIDE};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::time::{Duration, Instant};

/// Largest frame without segmentation offload: Ethernet's header and 1500 bytes.
const FRAME_MAX: usize = 1514;
/// Bytes before each frame (`virtio_net_hdr` with `num_buffers`), all zero when we send.
const HEADER: usize = 12;
/// Receive buffers where each holds one frame of the wire: more than a window of them.
const RX_SMALL_COUNT: usize = 256;
const RX_SMALL_SIZE: usize = 2048;
/// Receive buffers where the device hands over whole runs of segments: the size the standard
/// demands (5.1.6.3.1), 65562 bytes, up to a cache line.
const RX_LARGE_COUNT: usize = 16;
const RX_LARGE_SIZE: usize = 65600;
/// Room for either.
const RX_POOL_SIZE: usize = RX_LARGE_COUNT * RX_LARGE_SIZE;
/// Frames we send at most before the device takes them: acknowledgements and reports.
const TX_COUNT: usize = 64;
const TX_SIZE: usize = 2048;

const _: () = assert!(RX_SMALL_COUNT * RX_SMALL_SIZE <= RX_POOL_SIZE);

/// Registers of virtio-mmio (section 4.2.2).
mod reg {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    /// Low halves of the three areas' addresses; the high halves lie 4 further.
    pub const QUEUE_AREAS: [u64; 3] = [0x080, 0x090, 0x0a0];
}

/// "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const DEVICE_NET: u32 = 1;
/// Device status bits, each step with those before it.
const STATUS_DRIVER: u32 = 1 | 2;
const STATUS_FEATURES_OK: u32 = STATUS_DRIVER | 8;
const STATUS_RUNNING: u32 = STATUS_FEATURES_OK | 4;

/// Features that we use where offered. GUEST_TSO4 lets 64 KiB of segments come in one buffer, at the
/// price of one; GUEST_CSUM goes with it.
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const EVENT_INDEX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

const RX: u32 = 0;
const TX: u32 = 1;

static RX_MEMORY: Lent<Memory<RX_SMALL_COUNT>> = Lent::new(Memory::new());
static TX_MEMORY: Lent<Memory<TX_COUNT>> = Lent::new(Memory::new());
static RX_POOL: Lent<[u8; RX_POOL_SIZE]> = Lent::new([0; RX_POOL_SIZE]);
static TX_POOL: Lent<[u8; TX_COUNT * TX_SIZE]> = Lent::new([0; TX_COUNT * TX_SIZE]);

/// The machine's network device is not what the contract says.
#[derive(Clone, Copy, Debug)]
pub struct NoDevice;

/// Network device.
pub struct Net {
    clock: Clock,
    rx: Rx,
    tx: Tx,
    /// The device checks or leaves out TCP checksums of what it hands over.
    checked: bool,
}

struct Rx {
    queue: Queue<RX_SMALL_COUNT>,
    pool: *mut u8,
    buffer_size: usize,
}

struct Tx {
    queue: Queue<TX_COUNT>,
    pool: *mut u8,
    free: [u16; TX_COUNT],
    free_count: usize,
}

fn read(offset: u64) -> u32 {
    // SAFETY: a register of the machine contract.
    unsafe { ((VIRTIO_START + VIRTIO_NET * VIRTIO_STRIDE + offset) as *const u32).read_volatile() }
}

fn write(offset: u64, value: u32) {
    let register = (VIRTIO_START + VIRTIO_NET * VIRTIO_STRIDE + offset) as *mut u32;
    // SAFETY: a register of the machine contract; the device touches only memory that the queues name.
    unsafe { register.write_volatile(value) }
}

/// Resets the device and agrees on features.
fn negotiate() -> Result<u64, NoDevice> {
    if read(reg::MAGIC) != MAGIC || read(reg::VERSION) != 2 || read(reg::DEVICE) != DEVICE_NET {
        return Err(NoDevice);
    }
    write(reg::STATUS, 0);
    write(reg::STATUS, STATUS_DRIVER);
    let mut offered = 0;
    for half in [0, 1] {
        write(reg::DEVICE_FEATURES_SELECT, half);
        offered |= u64::from(read(reg::DEVICE_FEATURES)) << (32 * half);
    }
    let features = offered & (GUEST_CSUM | GUEST_TSO4 | EVENT_INDEX | VERSION_1);
    for half in [0, 1] {
        write(reg::DRIVER_FEATURES_SELECT, half);
        write(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
    }
    write(reg::STATUS, STATUS_FEATURES_OK);
    if features & VERSION_1 == 0 || read(reg::STATUS) != STATUS_FEATURES_OK {
        return Err(NoDevice);
    }
    Ok(features)
}

fn attach<const N: usize>(index: u32, queue: &Queue<N>) -> Result<(), NoDevice> {
    write(reg::QUEUE_SELECT, index);
    if (read(reg::QUEUE_SIZE_MAX) as usize) < N {
        return Err(NoDevice);
    }
    write(reg::QUEUE_SIZE, N as u32);
    for (register, address) in reg::QUEUE_AREAS.into_iter().zip(queue.addresses()) {
        write(register, address as u32);
        write(register + 4, (address >> 32) as u32);
    }
    write(reg::QUEUE_READY, 1);
    Ok(())
}

impl Net {
    /// Brings the device up. May be called once.
    pub fn start(clock: Clock) -> Result<Self, NoDevice> {
        let features = negotiate()?;
        let event_index = features & EVENT_INDEX != 0;
        let (count, buffer_size) = match features & GUEST_TSO4 {
            0 => (RX_SMALL_COUNT, RX_SMALL_SIZE),
            _ => (RX_LARGE_COUNT, RX_LARGE_SIZE),
        };
        let mut rx = Rx {
            queue: Queue::new(RX_MEMORY.take(), event_index),
            pool: RX_POOL.take().as_mut_ptr(),
            buffer_size,
        };
        let mut tx = Tx {
            queue: Queue::new(TX_MEMORY.take(), event_index),
            pool: TX_POOL.take().as_mut_ptr(),
            free: core::array::from_fn(|id| id as u16),
            free_count: TX_COUNT,
        };
        attach(RX, &rx.queue)?;
        attach(TX, &tx.queue)?;
        write(reg::STATUS, STATUS_RUNNING);
        rx.fill(count);
        tx.describe();
        let mut net = Self { clock, rx, tx, checked: features & GUEST_CSUM != 0 };
        net.flush();
        Ok(net)
    }
}

impl Wire for Net {
    fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Shows the device all that was given to it since the last time; one exit at most for each direction.
    fn flush(&mut self) {
        if self.tx.queue.publish() {
            write(reg::NOTIFY, TX);
        }
        if self.rx.queue.publish() {
            write(reg::NOTIFY, RX);
        }
    }

    fn is_all_sent(&mut self) -> bool {
        self.tx.reclaim();
        self.tx.free_count == TX_COUNT
    }

    fn wait(&mut self, limit: Duration) {
        if !self.rx.queue.arm() {
            let ms = limit.total_micros().div_ceil(1000).min(IDLE_MS_MAX.into());
            control::idle(ms as u32);
        }
        self.rx.queue.disarm();
    }
}

impl Rx {
    fn fill(&mut self, count: usize) {
        for id in 0..count as u16 {
            let address = self.pool as u64 + (usize::from(id) * self.buffer_size) as u64;
            self.queue.describe(id, address, self.buffer_size as u32, DEVICE_WRITES);
            self.queue.push(id);
        }
    }

    /// The frame in buffer `id`, of which the device says that it wrote `size` bytes.
    fn frame(&mut self, id: u16, size: u32) -> &mut [u8] {
        let size = (size as usize).clamp(HEADER, self.buffer_size);
        // SAFETY: in the pool, and the device gave the buffer back, so nobody else touches it.
        unsafe {
            let start = self.pool.add(usize::from(id) * self.buffer_size);
            core::slice::from_raw_parts_mut(start.add(HEADER), size - HEADER)
        }
    }
}

impl Tx {
    fn describe(&mut self) {
        for id in 0..TX_COUNT as u16 {
            let address = self.pool as u64 + u64::from(id) * TX_SIZE as u64;
            self.queue.describe(id, address, 0, 0);
        }
    }

    fn reclaim(&mut self) {
        while let Some((id, _)) = self.queue.pop() {
            assert!(self.free_count < TX_COUNT, "virtio: buffer {id} came back twice");
            self.free[self.free_count] = id;
            self.free_count += 1;
        }
    }

    fn frame(&mut self, id: u16, size: usize) -> &mut [u8] {
        // SAFETY: in the pool, and a free buffer is ours alone. The header before the frame stays zero.
        unsafe {
            let start = self.pool.add(usize::from(id) * TX_SIZE);
            core::slice::from_raw_parts_mut(start.add(HEADER), size)
        }
    }
}

/// A frame that came in; smoltcp reads it once.
pub struct RxToken<'a>(&'a mut Rx);

/// Room for a frame to send.
pub struct TxToken<'a>(&'a mut Tx);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let Some((id, size)) = self.0.queue.pop() else { return read(&[]) };
        let result = read(self.0.frame(id, size));
        self.0.queue.push(id);
        result
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, size: usize, fill: F) -> R {
        assert!(size <= FRAME_MAX && self.0.free_count > 0, "no room for a frame of {size} bytes");
        self.0.free_count -= 1;
        let id = self.0.free[self.0.free_count];
        let result = fill(self.0.frame(id, size));
        self.0.queue.resize(id, (HEADER + size) as u32);
        self.0.queue.push(id);
        result
    }
}

impl phy::Device for Net {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        self.tx.reclaim();
        let ready = self.rx.queue.has_used() && self.tx.free_count > 0;
        ready.then_some((RxToken(&mut self.rx), TxToken(&mut self.tx)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<TxToken<'_>> {
        self.tx.reclaim();
        (self.tx.free_count > 0).then_some(TxToken(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_MAX;
        // No `max_burst_size`: it would cap the scaled window as if it were bytes (smoltcp issue 949).
        if self.checked {
            capabilities.checksum.tcp = Checksum::Tx;
        }
        capabilities
    }
}
