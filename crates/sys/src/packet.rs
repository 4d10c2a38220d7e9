//! A packet socket with a receive ring: raw Ethernet frames of one interface, past the kernel's
//! TCP/IP. Called by `packetd`, and by tests as a stranger's network card.
//!
//! The ring is TPACKET_V2 (kernel `Documentation/networking/packet_mmap.rst`): slots of one size, each
//! handed over as its frame arrives. TPACKET_V3 packs blocks tighter but hands one over only when
//! it is full or its timer fires (a jiffy or more: 4 ms and up), which a lone boot packet would wait for.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of a slot: its header and the largest Ethernet frame.
const SLOT_SIZE: usize = 2048;
/// Slots: at the 0.6 million frames a second that one core takes in, 3 ms of being scheduled away.
const SLOTS: usize = 2048;
/// Bytes of contiguous kernel memory that the ring is made of.
const BLOCK_SIZE: usize = 64 << 10;
const RING_SIZE: usize = SLOT_SIZE * SLOTS;
const _: () = assert!(RING_SIZE.is_multiple_of(BLOCK_SIZE) && BLOCK_SIZE.is_multiple_of(SLOT_SIZE));

/// One instruction of a classic BPF program: code, jump if true, jump if false, operand.
pub type Instruction = libc::sock_filter;

/// A packet socket on one interface.
pub struct PacketSocket {
    fd: OwnedFd,
    index: i32,
    mac: [u8; 6],
    ring: Option<Ring>,
}

/// What became of a frame to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The kernel took it.
    Yes,
    /// The interface's queue is full; the frame is gone.
    Full,
}

impl PacketSocket {
    /// Opens a socket on `interface`, which must be up. It receives nothing before [`Self::start`].
    pub fn open(interface: &str) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
        let index = rustix::net::netdevice::name_to_index(&fd, interface)? as i32;
        let mut socket = Self { fd, index, mac: [0; 6], ring: None };
        socket.bind(0)?;
        socket.mac = socket.hardware_address()?;
        Ok(socket)
    }

    /// MAC of the interface.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Starts to receive what `filter` lets pass (at most [`libc::BPF_MAXINSNS`] instructions): no
    /// frame that came before the filter, and none that this host sends.
    pub fn start(&mut self, filter: &[Instruction]) -> io::Result<()> {
        attach(self.fd.as_fd(), filter)?;
        self.set_option(libc::PACKET_IGNORE_OUTGOING, &1)?;
        self.set_option(libc::PACKET_VERSION, &(libc::tpacket_versions::TPACKET_V2 as i32))?;
        let request = libc::tpacket_req {
            tp_block_size: BLOCK_SIZE as u32,
            tp_block_nr: (RING_SIZE / BLOCK_SIZE) as u32,
            tp_frame_size: SLOT_SIZE as u32,
            tp_frame_nr: SLOTS as u32,
        };
        self.set_option(libc::PACKET_RX_RING, &request)?;
        self.ring = Some(Ring::map(self.fd.as_fd())?);
        self.bind(libc::ETH_P_ALL as u16)?;
        self.check()
    }

    /// The error the kernel keeps for this socket, such as the interface being down.
    pub fn check(&self) -> io::Result<()> {
        match rustix::net::sockopt::socket_error(&self.fd)? {
            Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    // tcb:stranger-begin
    /// Hands at most `count_max` frames that have come to `each`, and returns how many; never waits.
    pub fn receive(&mut self, count_max: usize, mut each: impl FnMut(&Self, &[u8])) -> usize {
        let Some(mut ring) = self.ring.take() else { return 0 };
        let count = (0..count_max).take_while(|_| ring.next(|frame| each(self, frame))).count();
        self.ring = Some(ring);
        count
    }

    /// Sends one frame, without waiting.
    pub fn send(&self, frame: &[u8]) -> io::Result<Sent> {
        match rustix::net::send(&self.fd, frame, SendFlags::DONTWAIT) {
            Ok(_) => Ok(Sent::Yes),
            Err(Errno::AGAIN | Errno::NOBUFS) => Ok(Sent::Full),
            Err(error) => Err(error.into()),
        }
    }
    // tcb:stranger-end

    /// `protocol` is an EtherType, ETH_P_ALL, or 0 for none.
    fn bind(&self, protocol: u16) -> io::Result<()> {
        let mut address = empty_address();
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = self.index;
        let size = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the address is a whole sockaddr_ll and outlives the call.
        check(unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), size) })
    }

    fn hardware_address(&self) -> io::Result<[u8; 6]> {
        let mut address = empty_address();
        let mut size = size_of::<libc::sockaddr_ll>() as u32;
        let fd = self.fd.as_raw_fd();
        // SAFETY: the kernel writes at most `size` bytes, and a sockaddr_ll may hold any.
        check(unsafe { libc::getsockname(fd, (&raw mut address).cast(), &mut size) })?;
        match (address.sll_hatype, address.sll_halen) {
            (libc::ARPHRD_ETHER, 6) => Ok(address.sll_addr[..6].try_into().expect("6 of 8 bytes")),
            _ => Err(io::Error::other("not an Ethernet interface")),
        }
    }

    fn set_option<T>(&self, name: i32, value: &T) -> io::Result<()> {
        set_option(self.fd.as_fd(), libc::SOL_PACKET, name, value)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Lets only what `filter` lets pass (at most [`libc::BPF_MAXINSNS`] instructions) into a socket.
pub fn attach(socket: BorrowedFd<'_>, filter: &[Instruction]) -> io::Result<()> {
    let program = program(filter)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// What the kernel takes for a program; it refers to `filter`.
pub(crate) fn program(filter: &[Instruction]) -> io::Result<libc::sock_fprog> {
    let len = u16::try_from(filter.len()).map_err(|_| Errno::TOOBIG)?;
    Ok(libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() })
}

fn empty_address() -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: 0,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}

/// `T` is the plain C type that the kernel expects for `name`.
fn set_option<T>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let size = size_of::<T>() as u32;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the kernel reads `size` bytes of `value`, and of a filter the instructions it counts;
    // both outlive the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value, size) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The receive ring, mapped. Its slots belong to the kernel and to us in turn, as their status says.
struct Ring {
    start: NonNull<u8>,
    next: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is read through `&mut self` only.
unsafe impl Send for Ring {}

impl Ring {
    fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let null = std::ptr::null_mut();
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start =
            unsafe { libc::mmap(null, RING_SIZE, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: NonNull::new(start.cast()).expect("mmap gives no null"), next: 0 })
    }

    // tcb:stranger-begin
    /// Hands the next frame to `each` and its slot back to the kernel; false where none has come.
    fn next(&mut self, each: impl FnOnce(&[u8])) -> bool {
        // SAFETY: `next` < SLOTS, so the slot lies in the mapping.
        let slot = unsafe { self.start.add(self.next * SLOT_SIZE) };
        let header: NonNull<libc::tpacket2_hdr> = slot.cast();
        // SAFETY: slots are 2048-aligned and start with a tpacket2_hdr, whose first word is the status,
        // the word that both sides access atomically.
        let status = unsafe { AtomicU32::from_ptr((&raw mut (*header.as_ptr()).tp_status).cast()) };
        if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return false;
        }
        // SAFETY: the status says that the slot is ours until we give it back, below.
        let (offset, size) = unsafe {
            let header = header.as_ptr();
            (usize::from((*header).tp_mac), (*header).tp_snaplen as usize)
        };
        if offset + size <= SLOT_SIZE {
            // SAFETY: the bytes lie inside the slot, and nobody writes there while it is ours.
            each(unsafe { slice::from_raw_parts(slot.as_ptr().add(offset), size) });
        }
        status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % SLOTS;
        true
    }
    // tcb:stranger-end
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), RING_SIZE) };
    }
}
