//! virtio-net (virtio 1.2, 5.1) on the VM's tap: frames with their `virtio_net_hdr` go through
//! one buffer in each direction. Checksum and segmentation work is left to whoever is able.
//! It looks into a frame only after FREEZE, for FLOW; which packets a VM may send at all is enforced
//! outside of this process.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use onde_wire::machine::{ARP_SIZE, Identity};
use virtio_queue::{Queue, QueueT, Writer};
use vm_memory::bitmap::{AtomicBitmap, BS};

use super::ring::{self, BUDGET, Due, Served};
use super::{Broken, Device, Outgoing};
use crate::descriptors::{Tap, VNET_HEADER_SIZE};
use crate::memory::View;

/// Positions of the queues.
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// Feature bits (virtio 1.2, 5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MERGE_RX: u64 = 1 << 15;
}
/// `TUN_F_*` of linux/if_tun.h that each guest feature stands for.
const OFFLOADS: [(u64, u32); 3] =
    [(feature::GUEST_CSUM, 1), (feature::GUEST_TSO4, 2), (feature::GUEST_TSO6, 4)];

/// Largest frame with its header: 64 KiB of segmented TCP and room for link headers.
const FRAME_SIZE_MAX: usize = 68 << 10;
/// A frame that was not left for segmentation, with its header.
const FRAME_SIZE_SMALL: usize = VNET_HEADER_SIZE + 14 + 1500;
/// Most buffers that one frame may span: 64 KiB in the smallest buffers that Linux posts.
const MERGE_MAX: usize = 64;
/// Where the header holds the number of buffers.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// The addresses of a frame behind its header.
const TARGET_MAC: std::ops::Range<usize> = VNET_HEADER_SIZE..VNET_HEADER_SIZE + 6;
const SOURCE_MAC: std::ops::Range<usize> = VNET_HEADER_SIZE + 6..VNET_HEADER_SIZE + 12;

/// A buffer for a received frame: the head of its chain, and what writes to it.
type Buffer<'a> = (u16, Writer<'a, BS<'a, AtomicBitmap>>);

/// Tells a vCPU that waits in IDLE that a frame was delivered.
#[derive(Default)]
pub struct Arrivals {
    news: Mutex<bool>,
    changed: Condvar,
}

impl Arrivals {
    /// A frame was delivered, or the machine is about to stop.
    pub fn announce(&self) {
        *self.news.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for news since the last call, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        let news = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut news, _) = self
            .changed
            .wait_timeout_while(news, timeout, |news| !*news)
            .unwrap_or_else(PoisonError::into_inner);
        *news = false;
    }
}

/// Where frames come from and go to: the tap, or a test.
pub trait Link: Send {
    /// Reads one frame; `WouldBlock` where there is none.
    fn read(&mut self, frame: &mut [u8]) -> io::Result<usize>;
    /// Writes one frame.
    fn write(&mut self, frame: &[u8]) -> io::Result<usize>;
    /// Says which offloads (`TUN_F_*`) the guest can take.
    fn set_offload(&mut self, flags: u32) -> io::Result<()>;
}

impl Link for Tap {
    fn read(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.file().read(frame)
    }

    fn write(&mut self, frame: &[u8]) -> io::Result<usize> {
        self.file().write(frame)
    }

    fn set_offload(&mut self, flags: u32) -> io::Result<()> {
        Tap::set_offload(self, flags)
    }
}

/// The network device.
pub struct Net<L> {
    link: L,
    mac: [u8; 6],
    boot_mac: [u8; 6],
    guest_mac: [u8; 6],
    announcement: [u8; ARP_SIZE],
    arrivals: Arc<Arrivals>,
    merge: bool,
    /// A frame that was read; waits here while the guest has no buffers for it.
    received: Box<[u8]>,
    received_size: usize,
    sent: Box<[u8]>,
    outgoing: Outgoing,
}

impl<L: Link> Net<L> {
    /// A device that shows the MAC of the bootstrap until RESUME and the guest's from then on.
    pub fn new(link: L, identity: &Identity, arrivals: Arc<Arrivals>) -> Self {
        Self {
            link,
            mac: identity.boot_mac,
            boot_mac: identity.boot_mac,
            guest_mac: identity.mac,
            announcement: identity.announcement(),
            arrivals,
            merge: false,
            received: vec![0; FRAME_SIZE_MAX].into(),
            received_size: 0,
            sent: vec![0; FRAME_SIZE_MAX].into(),
            outgoing: Outgoing::All,
        }
    }

    fn send(&mut self, queue: &mut Queue, view: &View) -> Result<Served, Broken> {
        let (mut count, mut bytes) = (0, 0);
        let mut served = ring::drain(queue, view, |chain| {
            let mut reader = chain.reader(view).map_err(|_| Broken)?;
            let size = reader.available_bytes();
            (count, bytes) = (count + 1, bytes + size);
            let Some(frame) = self.sent.get_mut(..size) else { return Ok(0) };
            reader.read_exact(frame).map_err(|_| Broken)?;
            if leaves(&self.outgoing, self.boot_mac, frame) {
                // A frame that the tap does not take is lost, as on any network.
                let _ = self.link.write(frame);
            }
            Ok(0)
        })?;
        // Its sender may go on: what it still accounts for is one small frame.
        if served.interrupt == Due::Now && count == 1 && bytes <= FRAME_SIZE_SMALL {
            served.interrupt = Due::Later;
        }
        Ok(served)
    }

    fn receive(&mut self, queue: &mut Queue, view: &View) -> Result<Served, Broken> {
        let before = queue.next_used();
        let mut more = true;
        for count in 0..BUDGET {
            if !self.fetch() {
                more = false;
                break;
            }
            if !self.is_for_guest() {
                self.received_size = 0;
                continue;
            }
            if !self.deliver(queue, view)? {
                more = false;
                break;
            }
            // At once, so that a vCPU in IDLE works on the first frame while the others come.
            if count == 0 {
                self.arrivals.announce();
            }
        }
        if queue.next_used() != before {
            self.arrivals.announce();
        }
        Ok(Served { interrupt: ring::interrupt(queue, view, before)?, more })
    }

    /// Whether there is a frame to deliver.
    fn fetch(&mut self) -> bool {
        if self.received_size > 0 {
            return true;
        }
        loop {
            match self.link.read(&mut self.received) {
                Ok(size) => {
                    self.received_size = size;
                    self.readdress();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // WouldBlock; any other error means that the tap is going away with its VM.
                Err(_) => {}
            }
            return self.received_size > 0;
        }
    }

    /// Whether the frame that was read is for the guest: after FREEZE, only answers to what leaves. One that will not move
    /// goes on in a moment and misses nothing.
    fn is_for_guest(&self) -> bool {
        let frame = self.received[..self.received_size].get(VNET_HEADER_SIZE..).unwrap_or(&[]);
        match &self.outgoing {
            Outgoing::All => true,
            Outgoing::Only(flow) => flow.is_none() || flow.is_answered_by(frame),
        }
    }

    /// After FREEZE the guest is spoken to under the MAC that it speaks with.
    fn readdress(&mut self) {
        if let (Outgoing::Only(_), Some(target)) =
            (self.outgoing, self.received.get_mut(TARGET_MAC))
            && *target == self.boot_mac
        {
            target.copy_from_slice(&self.guest_mac);
        }
    }

    /// Puts the frame into the guest's buffers; false if there are not enough of them, in which
    /// case the guest will ring when it has added some.
    fn deliver(&mut self, queue: &mut Queue, view: &View) -> Result<bool, Broken> {
        let start = queue.next_avail();
        let Some(buffers) = self.collect(queue, view)? else {
            // Ask to be rung for a buffer beyond those seen, then take these up again later.
            let raced = queue.enable_notification(view).map_err(|_| Broken)?;
            queue.set_next_avail(start);
            return Ok(raced);
        };
        let size = std::mem::take(&mut self.received_size);
        let frame = &mut self.received[..size];
        if let Some(field) = frame.get_mut(NUM_BUFFERS) {
            field.copy_from_slice(&(buffers.len() as u16).to_le_bytes());
        }
        let mut rest = &*frame;
        let mut used = Vec::with_capacity(buffers.len());
        for (head, mut writer) in buffers {
            let part = rest.split_off(..writer.available_bytes().min(rest.len())).unwrap_or(&[]);
            writer.write_all(part).map_err(|_| Broken)?;
            used.push((head, part.len() as u32));
        }
        ring::publish(queue, view, &used)?;
        Ok(true)
    }

    /// Buffers that hold the frame together; a frame that can never fit is cut to what does.
    fn collect<'a>(
        &self,
        queue: &mut Queue,
        view: &'a View,
    ) -> Result<Option<Vec<Buffer<'a>>>, Broken> {
        let mut buffers = Vec::new();
        let mut room = 0;
        let most = if self.merge { MERGE_MAX } else { 1 };
        while room < self.received_size && buffers.len() < most {
            let Some(chain) = queue.pop_descriptor_chain(view) else { return Ok(None) };
            let head = chain.head_index();
            let writer = chain.writer(view).map_err(|_| Broken)?;
            room += writer.available_bytes();
            buffers.push((head, writer));
        }
        Ok(Some(buffers))
    }
}

impl<L: Link> Device for Net<L> {
    fn id(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        use feature::*;
        CSUM | GUEST_CSUM | MAC | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MERGE_RX
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE; 2]
    }

    fn config(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn activate(&mut self, features: u64) -> io::Result<()> {
        self.merge = features & feature::MERGE_RX != 0;
        let taken = OFFLOADS.iter().filter(|(feature, _)| features & feature != 0);
        self.link.set_offload(taken.fold(0, |flags, (_, flag)| flags | flag))
    }

    fn reset(&mut self) {
        self.received_size = 0;
        self.merge = false;
    }

    fn process(
        &mut self,
        queues: &mut [Queue],
        index: usize,
        view: &View,
    ) -> Result<Served, Broken> {
        match index {
            TX => self.send(&mut queues[TX], view),
            _ => self.receive(&mut queues[RX], view),
        }
    }

    fn hand_over(&mut self) {
        self.mac = self.guest_mac;
    }

    fn announce(&mut self) {
        let frame = [&[0; VNET_HEADER_SIZE], &self.announcement[..]].concat();
        // One that the tap does not take is lost, as on any network: the guest announces itself, too.
        let _ = self.link.write(&frame);
    }

    fn hold(&mut self, outgoing: Outgoing) {
        self.outgoing = outgoing;
    }
}

/// Whether a frame leaves. After FREEZE it does so under `boot_mac`: the guest's own MAC is where the copy is.
fn leaves(outgoing: &Outgoing, boot_mac: [u8; 6], frame: &mut [u8]) -> bool {
    let Outgoing::Only(flow) = outgoing else { return true };
    if !flow.has(frame.get(VNET_HEADER_SIZE..).unwrap_or(&[])) {
        return false;
    }
    frame[SOURCE_MAC].copy_from_slice(&boot_mac);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::flow::Flow;
    use onde_wire::machine::INFO_SIZE;
    use std::collections::VecDeque;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    const WRITE: u16 = 2;
    const BUFFER: u64 = 0x8000;

    #[derive(Default)]
    struct FakeLink {
        incoming: VecDeque<Vec<u8>>,
        outgoing: Vec<Vec<u8>>,
        offload: u32,
    }

    impl Link for FakeLink {
        fn read(&mut self, frame: &mut [u8]) -> io::Result<usize> {
            let next = self.incoming.pop_front().ok_or(ErrorKind::WouldBlock)?;
            frame[..next.len()].copy_from_slice(&next);
            Ok(next.len())
        }

        fn write(&mut self, frame: &[u8]) -> io::Result<usize> {
            self.outgoing.push(frame.to_vec());
            Ok(frame.len())
        }

        fn set_offload(&mut self, flags: u32) -> io::Result<()> {
            self.offload = flags;
            Ok(())
        }
    }

    fn identity() -> Identity {
        let mut page = [0; INFO_SIZE];
        page[..12].copy_from_slice(b"ONDEINFO\x01\0\0\0");
        Identity { boot_mac: [2; 6], mac: [4; 6], ..Identity::parse(&page).unwrap() }
    }

    fn net(incoming: &[usize], features: u64) -> Net<FakeLink> {
        let incoming = incoming.iter().map(|size| vec![0xAB; *size]).collect();
        let link = FakeLink { incoming, ..FakeLink::default() };
        let mut net = Net::new(link, &identity(), Arc::default());
        net.activate(features).unwrap();
        net
    }

    /// Offers `sizes` as one-descriptor buffers, receives, and tells the lengths used and what
    /// the first header says.
    fn check(frames: &[usize], sizes: &[u32], features: u64, expect: &[u32], count: u16) {
        let view = View::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap();
        let mock = MockSplitQueue::new(&view, 16);
        for (index, size) in sizes.iter().enumerate() {
            let at = BUFFER + 0x1000 * index as u64;
            let buffer = Descriptor::new(at, *size, WRITE, 0);
            mock.add_desc_chains(&[RawDescriptor::from(buffer)], index as u16).unwrap();
        }
        let mut queues = [mock.create_queue().unwrap(), Queue::new(16).unwrap()];
        net(frames, features).process(&mut queues, RX, &view).unwrap();
        let ring = queues[RX].used_ring();
        let used: Vec<u32> = (0..u64::from(queues[RX].next_used()))
            .map(|index| view.read_obj(GuestAddress(ring + 4 + 8 * index + 4)).unwrap())
            .collect();
        assert_eq!(used, expect, "{frames:?} in {sizes:?}");
        let told: u16 = view.read_obj(GuestAddress(BUFFER + 10)).unwrap();
        assert_eq!(told, count, "{frames:?} in {sizes:?}");
    }

    #[test]
    fn frames_fill_buffers() {
        check(&[100], &[2000], 0, &[100], 1);
        check(&[100, 60], &[2000, 2000], 0, &[100, 60], 1);
        check(&[3000], &[1500, 1000, 1500], feature::MERGE_RX, &[1500, 1000, 500], 3);
        // Without merging a frame that is too long is cut: its checksum tells.
        check(&[3000], &[1500, 1500], 0, &[1500], 1);
        // Not enough buffers: none is used in part.
        check(&[3000], &[1500, 1000], feature::MERGE_RX, &[], 0);
        check(&[100], &[], 0, &[], 0);
    }

    #[test]
    fn a_waiting_frame_is_delivered_when_buffers_come() {
        let view = View::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap();
        let mock = MockSplitQueue::new(&view, 16);
        let mut queues = [mock.create_queue().unwrap(), Queue::new(16).unwrap()];
        let mut net = net(&[100], 0);
        net.process(&mut queues, RX, &view).unwrap();
        let buffer = Descriptor::new(BUFFER, 2000, WRITE, 0);
        mock.add_desc_chains(&[RawDescriptor::from(buffer)], 0).unwrap();
        let served = net.process(&mut queues, RX, &view).unwrap();
        assert_eq!(served, Served { interrupt: Due::Now, more: false });
        assert_eq!(queues[RX].next_used(), 1);
        net.arrivals.wait(Duration::from_secs(60));
    }

    #[test]
    fn a_guest_is_announced_under_its_own_mac() {
        let mut net = net(&[], 0);
        net.announce();
        let expect = [&[0; VNET_HEADER_SIZE], &identity().announcement()[..]].concat();
        assert_eq!(net.link.outgoing, [expect]);
    }

    #[test]
    fn sends_whole_frames_and_skips_those_too_long() {
        let view = View::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap();
        let mock = MockSplitQueue::new(&view, 16);
        view.write_slice(b"0123456789ab frame", GuestAddress(BUFFER)).unwrap();
        let chains = [
            Descriptor::new(BUFFER, 12, 1, 1),
            Descriptor::new(BUFFER + 12, 6, 0, 0),
            Descriptor::new(BUFFER, 0x12000, 0, 0),
        ];
        mock.add_desc_chains(&chains.map(RawDescriptor::from), 0).unwrap();
        let mut queues = [Queue::new(16).unwrap(), mock.create_queue().unwrap()];
        let mut net = net(&[], feature::GUEST_CSUM | feature::GUEST_TSO4);
        net.hold(Outgoing::Only(Flow::parse([0; 8], [0; 4])));
        net.process(&mut queues, TX, &view).unwrap();
        assert_eq!((queues[TX].next_used(), net.link.outgoing.len()), (2, 0), "a frame got out");
        net.hold(Outgoing::All);
        mock.add_desc_chains(&chains.map(RawDescriptor::from), 3).unwrap();
        net.process(&mut queues, TX, &view).unwrap();
        assert_eq!(net.link.outgoing, [b"0123456789ab frame".to_vec()]);
        assert_eq!((queues[TX].next_used(), net.link.offload), (4, 3));
    }

    #[test]
    fn the_guest_can_wait_to_hear_of_one_small_frame_that_left() {
        let due = |sizes: &[u32]| {
            let view = View::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap();
            let mock = MockSplitQueue::new(&view, 16);
            for (index, size) in sizes.iter().enumerate() {
                let frame = RawDescriptor::from(Descriptor::new(BUFFER, *size, 0, 0));
                mock.add_desc_chains(&[frame], index as u16).unwrap();
            }
            let mut queues = [Queue::new(16).unwrap(), mock.create_queue().unwrap()];
            net(&[], 0).process(&mut queues, TX, &view).unwrap().interrupt
        };
        let full = FRAME_SIZE_SMALL as u32;
        let cases = [&[full][..], &[full + 1], &[60, 60], &[]];
        assert_eq!(cases.map(due), [Due::Later, Due::Now, Due::Now, Due::Never]);
    }

    #[test]
    fn a_frozen_guest_speaks_under_another_mac() {
        let mut net = net(&[], 0);
        let judge = [198, 18, 0, 7];
        net.hold(Outgoing::Only(Flow::parse([0; 8], judge)));
        let mut frame =
            [vec![0; VNET_HEADER_SIZE], crate::virtio::flow::echo_request(judge)].concat();
        assert!(leaves(&net.outgoing, net.boot_mac, &mut frame));
        assert_eq!(frame[SOURCE_MAC], [2; 6]);
        frame[TARGET_MAC].copy_from_slice(&[2; 6]);
        net.link.incoming.push_back(frame.clone());
        assert!(net.fetch());
        assert_eq!(net.received[TARGET_MAC], [4; 6]);
        net.hold(Outgoing::All);
        net.received_size = 0;
        net.link.incoming.push_back(frame);
        assert!(net.fetch());
        assert_eq!(net.received[TARGET_MAC], [2; 6]);
    }

    #[test]
    fn a_machine_that_moves_hears_only_answers() {
        let judge = [198, 18, 0, 7];
        let mut answer = crate::virtio::flow::echo_request([0; 4]);
        answer[26..30].copy_from_slice(&judge);
        answer[34] = 0;
        let answer = [vec![0; VNET_HEADER_SIZE], answer].concat();
        let heard = |outgoing| {
            let view = View::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap();
            let mock = MockSplitQueue::new(&view, 16);
            for index in 0..4 {
                let buffer = Descriptor::new(BUFFER + 0x1000 * index, 2000, WRITE, 0);
                mock.add_desc_chains(&[RawDescriptor::from(buffer)], index as u16).unwrap();
            }
            let mut queues = [mock.create_queue().unwrap(), Queue::new(16).unwrap()];
            let mut net = net(&[60, 60], 0);
            net.link.incoming.push_back(answer.clone());
            net.hold(outgoing);
            net.process(&mut queues, RX, &view).unwrap();
            queues[RX].next_used()
        };
        assert_eq!(heard(Outgoing::Only(Flow::parse([0; 8], judge))), 1);
        // One that is only copied goes on in a moment.
        assert_eq!(heard(Outgoing::Only(Flow::default())), 3);
        assert_eq!(heard(Outgoing::All), 3);
    }

    #[test]
    fn the_mac_changes_hands() {
        let mut net = net(&[], 0);
        assert_eq!(net.config(), [2; 6]);
        net.hand_over();
        assert_eq!(net.config(), [4; 6]);
    }
}
