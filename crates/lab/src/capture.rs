//! What the nodes put on the lab's wire, as seen on the bridge's ports; and connections that are cut there.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvError, channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};
use onde_sys::packet::{Instruction, PacketSocket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// BPF: take all of the frame (`ret #-1`).
const ALL: [Instruction; 1] = [Instruction { code: 0x06, jt: 0, jf: 0, k: u32::MAX }];
/// Between two looks whether anybody wants more.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// Frames taken at once.
const AT_ONCE: usize = 256;

const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [8, 0];
const ARP: [u8; 2] = [8, 6];
const TCP: u8 = 6;
const RST: u8 = 4;

/// An Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

/// A TCP segment's addresses, and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Whom it is for.
    pub dst: Ipv4Addr,
    /// Its sender's port.
    pub src_port: u16,
    /// Its receiver's port.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement.
    pub ack: u32,
    /// Bytes of data.
    pub size: u32,
}

impl Frame {
    /// The MAC that it bears.
    pub fn src_mac(&self) -> [u8; 6] {
        self.field(6)
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
        bytes.unwrap_or([0; N])
    }

    fn is(&self, ethertype: [u8; 2]) -> bool {
        self.field(12) == ethertype
    }

    /// Who sends it: by its IPv4 header, or as it says in ARP.
    pub fn sender(&self) -> Option<Ipv4Addr> {
        let at = match self.field(12) {
            IPV4 => ETHERNET + 12,
            ARP => ETHERNET + 14,
            _ => return None,
        };
        Some(Ipv4Addr::from(self.field::<4>(at)))
    }

    /// Whether it is an announcement of its sender's own address: sender and target are the same.
    pub fn is_announcement(&self) -> bool {
        self.is(ARP) && self.field::<4>(ETHERNET + 14) == self.field::<4>(ETHERNET + 24)
    }

    /// Whether it is an echo request to `target`.
    pub fn asks(&self, target: Ipv4Addr) -> bool {
        self.is(IPV4)
            && self.field(ETHERNET + 9) == [1]
            && Ipv4Addr::from(self.field::<4>(ETHERNET + 16)) == target
            && self.field(self.payload_at()) == [8]
    }

    fn payload_at(&self) -> usize {
        let [first] = self.field(ETHERNET);
        ETHERNET + usize::from(first & 0xF) * 4
    }

    /// The TCP segment in it.
    pub fn segment(&self) -> Option<Segment> {
        if !self.is(IPV4) || self.field(ETHERNET + 9) != [TCP] {
            return None;
        }
        let (at, all) = (self.payload_at(), u16::from_be_bytes(self.field(ETHERNET + 2)));
        let [offset] = self.field(at + 12);
        let heads = at - ETHERNET + usize::from(offset >> 4) * 4;
        Some(Segment {
            dst: self.field::<4>(ETHERNET + 16).into(),
            src_port: u16::from_be_bytes(self.field(at)),
            dst_port: u16::from_be_bytes(self.field(at + 2)),
            seq: u32::from_be_bytes(self.field(at + 4)),
            ack: u32::from_be_bytes(self.field(at + 8)),
            size: u32::from(all).saturating_sub(heads as u32),
        })
    }

    /// What ends the connection of this segment at both its ends: the next segment of its sender's, and of its receiver's.
    pub fn resets(&self) -> Option<[Self; 2]> {
        let segment = self.segment()?;
        let (from, to) = (self.field::<4>(ETHERNET + 12), self.field::<4>(ETHERNET + 16));
        let ports = (segment.src_port, segment.dst_port);
        let macs = (self.field::<6>(6), self.field::<6>(0));
        let next = segment.seq.wrapping_add(segment.size);
        Some([
            reset(macs, (from, to), ports, next),
            reset((macs.1, macs.0), (to, from), (ports.1, ports.0), segment.ack),
        ])
    }
}

type Pair<T> = (T, T);

/// A TCP RST, RFC 9293, 3.5.2, from the first of each pair to the second.
fn reset(macs: Pair<[u8; 6]>, addresses: Pair<[u8; 4]>, ports: Pair<u16>, seq: u32) -> Frame {
    let mut tcp = [&ports.0.to_be_bytes()[..], &ports.1.to_be_bytes(), &seq.to_be_bytes()].concat();
    tcp.extend_from_slice(&[0, 0, 0, 0, 5 << 4, RST, 0, 0, 0, 0, 0, 0]);
    let both = [addresses.0, addresses.1].concat();
    let sum = checksum(&[&both[..], &[0, TCP, 0, 20], &tcp].concat());
    tcp[16..18].copy_from_slice(&sum);
    let mut ip = [&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0][..], &both].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    Frame([&macs.1[..], &macs.0, &IPV4, &ip, &tcp].concat())
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word)));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xFFFF) + (sum >> 16);
    (!((sum & 0xFFFF) + (sum >> 16)) as u16).to_be_bytes()
}

/// Name of the bridge's port that a node hangs on.
pub fn port(node: u64) -> String {
    format!("node{node}")
}

/// A thread that sees all frames that a node sends.
pub struct Capture<T> {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Capture<T> {
    /// Begins, with `see` for each frame until it returns false; [`Self::end`] returns `state` as it left it.
    pub fn start(
        node: u64,
        mut state: T,
        mut see: impl FnMut(&mut T, Frame) -> Result<bool> + Send + 'static,
    ) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        // The socket stays in its thread; frames from when it is ready on are seen.
        let (ready, is_ready) = channel();
        let thread = thread::spawn(move || {
            let mut socket =
                PacketSocket::open(&port(node)).context("cannot listen on the bridge")?;
            socket.start(&ALL)?;
            drop(ready);
            let mut seen = Ok(true);
            while matches!(seen, Ok(true)) && !is_over.load(Ordering::Relaxed) {
                poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&LOOK))?;
                socket.receive(AT_ONCE, |_, frame| {
                    if matches!(seen, Ok(true)) {
                        seen = see(&mut state, Frame(frame.to_vec()));
                    }
                });
            }
            seen.map(|_| state)
        });
        // Nothing is ever sent: the other end is dropped.
        let _: Result<(), RecvError> = is_ready.recv();
        Ok(Self { over, thread })
    }

    /// Whether `see` has seen enough, or failed.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends the capture; what it came to.
    pub fn end(self) -> Result<T> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| bail!("the capture panicked"))
    }
}

/// Cuts the connection of this segment from a VM on one node to one on another, by what both take for the other's word.
pub fn cut(from: u64, to: u64, frame: &Frame) -> Result<()> {
    let resets = frame.resets().context("no segment")?;
    for (Frame(reset), node) in resets.iter().zip([to, from]) {
        PacketSocket::open(&port(node))?.send(reset)?;
    }
    Ok(())
}

/// Pulls a node's cable, or plugs it in again.
pub fn plug(node: u64, is_in: bool) -> Result<()> {
    let state = if is_in { "up" } else { "down" };
    let done =
        std::process::Command::new("ip").args(["link", "set", &port(node), state]).status()?;
    ensure!(done.success(), "ip link set {} {state}: {done}", port(node));
    Ok(())
}
