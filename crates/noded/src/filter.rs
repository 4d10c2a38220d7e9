//! The filter on what VMs send: an XDP program on each tap lets a frame pass only if it is ARP or IPv4 from one
//! of the VM's two MACs and one of its two addresses, and if the VM is not ahead of the rate it bought. MAC and address are
//! judged one by one: all four are the VM's own. One program serves all taps and finds the pairs in a table by the
//! tap's interface number. Used by [`crate::vm`]. It is attached through descriptors, so it cannot outlive `noded`, and
//! never looks past the fixed headers.
//!
//! XDP on a tap runs in the driver for every frame that the VMM writes, with or without a virtio-net header and
//! also for segments still to be cut (drivers/net/tun.c, `tun_build_skb` and `tun_get_user`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use onde_sys::bpf::{self, Insn, Table, Width, XDP_DROP, XDP_PASS};
use onde_wire::plan::VMS_MAX;

/// A MAC and an address that a VM may send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Source MAC.
    pub mac: [u8; 6],
    /// Source IPv4 address.
    pub ipv4: [u8; 4],
}

/// Most taps: one for each slot, and as many again that are on their way out.
const TAPS_MAX: u32 = 2 * VMS_MAX;
/// Bytes of a pair in the table: MAC, two zeros, address.
const PAIR_SIZE: usize = 12;
/// Bytes of an entry: two pairs, then the four numbers of the rate limit.
const ENTRY_SIZE: usize = 2 * PAIR_SIZE + 4 * 8;

/// Rates are in bytes per 2^30 ns, so that the program needs no division.
const SECOND_BITS: u32 = 30;
/// Rates from here on are no limit: no tap is as fast, and the program's products stay below 2^64.
const NET_KIB_S_MAX: u32 = 4 << 20;
/// Least that a VM may send at once, bytes: two of the largest segments, or none would ever pass.
const BURST_MIN: u64 = 128 << 10;

/// Most bytes that a VM limited to `net_kib_s` can send at once: an eighth of a second's.
pub fn burst_bytes(net_kib_s: u32) -> u64 {
    (u64::from(net_kib_s) * 1024 / 8).max(BURST_MIN)
}

/// Whether the filter limits a VM that bought `net_kib_s`.
pub fn is_limited(net_kib_s: u32) -> bool {
    (1..NET_KIB_S_MAX).contains(&net_kib_s)
}

/// The filter of a node.
pub struct Filter {
    table: Arc<Table>,
    program: OwnedFd,
    /// The program on a tap that nobody uses: the first and the last attachment of a program cost the kernel a
    /// grace period each (20 ms in an emulated node), so this one is always there.
    first: Option<(OwnedFd, OwnedFd)>,
}

/// The filter on one tap. Drop it when nobody sends through the tap any more: without it all would pass.
pub struct Attached {
    _link: OwnedFd,
    table: Arc<Table>,
    index: u32,
}

impl Drop for Attached {
    fn drop(&mut self) {
        // An entry that was never made is no loss.
        let _ = self.table.remove(self.index);
    }
}

impl Filter {
    /// Loads the program.
    pub fn load() -> io::Result<Self> {
        let table = Arc::new(Table::new(ENTRY_SIZE, TAPS_MAX)?);
        let program = bpf::load_xdp(&assemble(&table))?;
        Ok(Self { table, program, first: None })
    }

    /// Attaches it for the first time, to a tap of this interface number.
    pub fn warm_up(mut self, tap: OwnedFd, index: u32) -> io::Result<Self> {
        self.first = Some((bpf::attach_xdp(self.program.as_fd(), index)?, tap));
        Ok(self)
    }

    /// Lets the tap with this interface number send from what is in these pairs only, and at this rate; 0 for no limit.
    pub fn attach(&self, index: u32, pairs: [Pair; 2], net_kib_s: u32) -> io::Result<Attached> {
        // A tap that has no entry yet passes nothing.
        let link = bpf::attach_xdp(self.program.as_fd(), index)?;
        let attached = Attached { _link: link, table: self.table.clone(), index };
        self.table.set(index, &emit(pairs, net_kib_s))?;
        Ok(attached)
    }
}

/// An entry of the table: the VM starts with all of its burst.
fn emit(pairs: [Pair; 2], net_kib_s: u32) -> [u8; ENTRY_SIZE] {
    let mut out = [0; ENTRY_SIZE];
    for (out, pair) in out.chunks_exact_mut(PAIR_SIZE).zip(pairs) {
        out[..6].copy_from_slice(&pair.mac);
        out[8..].copy_from_slice(&pair.ipv4);
    }
    let bytes_s = if is_limited(net_kib_s) { u64::from(net_kib_s) * 1024 } else { 0 };
    let rate = (bytes_s << SECOND_BITS).div_ceil(1_000_000_000);
    let burst = burst_bytes(net_kib_s);
    for (at, number) in [(RATE, rate), (CREDIT, burst), (BURST, burst)] {
        out[at as usize..][..8].copy_from_slice(&number.to_ne_bytes());
    }
    out
}

// Numbers of the rate limit in an entry, u64 each.
const RATE: i16 = 24;
const LAST_NS: i16 = 32;
const CREDIT: i16 = 40;
const BURST: i16 = 48;

// Registers. 0 is the address of the pairs, then the result; 1 the context, then scratch; 10 the stack.
const RESULT: u8 = 0;
const PAIRS: u8 = 0;
const CONTEXT: u8 = 1;
const KEY: u8 = 2;
const EXPECT: u8 = 3;
const FIELD: u8 = 4;
const DATA: u8 = 6;
const END: u8 = 7;
const MAC_HEAD: u8 = 8;
const MAC_TAIL: u8 = 9;
// What the last two are when the MAC is known to be right.
const ENTRY: u8 = 8;
const SIZE: u8 = 9;
const STACK: u8 = 10;

// struct xdp_md (include/uapi/linux/bpf.h).
const CONTEXT_DATA: i16 = 0;
const CONTEXT_END: i16 = 4;
const CONTEXT_INDEX: i16 = 12;

// Ethernet, then ARP (RFC 826) or IPv4 (RFC 791): offsets from the start of the frame.
const MAC_AT: i16 = 6;
const TYPE_AT: i16 = 12;
const ARP_FORM_AT: i16 = 14;
const ARP_SIZES_AT: i16 = 18;
const ARP_MAC_AT: i16 = 22;
const ARP_IPV4_AT: i16 = 28;
const ARP_END: i32 = 42;
const IP_VERSION_AT: i16 = 14;
const IP_SOURCE_AT: i16 = 26;
const IP_END: i32 = 34;

const DROP: [Insn; 2] = [Insn::set(RESULT, XDP_DROP), Insn::exit()];
const PASS: [Insn; 2] = [Insn::set(RESULT, XDP_PASS), Insn::exit()];

/// A load of packet bytes gives this value for them: the processor's order is little endian.
fn word(bytes: [u8; 4]) -> u32 {
    u32::from_le_bytes(bytes)
}

fn half(bytes: [u8; 2]) -> u32 {
    u16::from_le_bytes(bytes).into()
}

/// The program.
fn assemble(table: &Table) -> Vec<Insn> {
    let mut code = vec![
        Insn::load(Width::U32, DATA, CONTEXT, CONTEXT_DATA),
        Insn::load(Width::U32, END, CONTEXT, CONTEXT_END),
        Insn::load(Width::U32, KEY, CONTEXT, CONTEXT_INDEX),
        Insn::store(Width::U32, STACK, -4, KEY),
    ];
    code.extend(Insn::table(CONTEXT, table));
    code.extend([Insn::copy(KEY, STACK), Insn::add(KEY, -4), Insn::look_up()]);
    code.push(Insn::skip_unless_zero(PAIRS, 2));
    code.extend(DROP);
    code.extend(bounds(IP_END));
    code.extend([
        Insn::load(Width::U32, MAC_HEAD, DATA, MAC_AT),
        Insn::load(Width::U16, MAC_TAIL, DATA, MAC_AT + 4),
    ]);
    // Each block of five ends behind the last if its MAC is the sender's; the last is followed by a drop.
    code.extend(match_mac(0, 5 + 2));
    code.extend(match_mac(PAIR_SIZE as i16, 2));
    code.extend(DROP);
    code.push(Insn::load(Width::U16, FIELD, DATA, TYPE_AT));
    let (ip, arp) = (ip_rules(), arp_rules());
    code.push(Insn::skip_unless_equal(FIELD, half([8, 0]), ip.len() as i16 + 1));
    code.extend(ip);
    code.push(Insn::skip(3 + arp.len() as i16));
    code.extend(require(FIELD, half([8, 6])));
    code.extend(arp);
    code.extend(rate_rules());
    code.extend(PASS);
    code
}

/// Drops what is ahead of the rate: a bucket that fills with time. Only one thread writes to a tap, so the numbers
/// need no lock.
fn rate_rules() -> Vec<Insn> {
    const NOW: u8 = 0;
    const SPEED: u8 = 1;
    const LAST: u8 = 2;
    const MOST: u8 = 3;
    let load = |to, at| Insn::load(Width::U64, to, ENTRY, at);
    let keep = |at, from| Insn::store(Width::U64, ENTRY, at, from);
    let limit = [
        Insn::now_ns(),
        load(LAST, LAST_NS),
        keep(LAST_NS, NOW),
        // NOW becomes the time since the last frame, at most a second, then what that adds to the credit.
        Insn::subtract(NOW, LAST),
        Insn::set(MOST, 1 << SECOND_BITS),
        Insn::skip_if_not_greater(NOW, MOST, 1),
        Insn::copy(NOW, MOST),
        load(SPEED, RATE),
        Insn::multiply(NOW, SPEED),
        Insn::shift_right(NOW, SECOND_BITS as i32),
        load(LAST, CREDIT),
        Insn::add_register(NOW, LAST),
        load(MOST, BURST),
        Insn::skip_if_not_greater(NOW, MOST, 1),
        Insn::copy(NOW, MOST),
        keep(CREDIT, NOW),
        Insn::skip_if_not_greater(SIZE, NOW, 2),
        DROP[0],
        DROP[1],
        Insn::subtract(NOW, SIZE),
        keep(CREDIT, NOW),
    ];
    let mut code = vec![
        Insn::copy(ENTRY, PAIRS),
        Insn::copy(SIZE, END),
        Insn::subtract(SIZE, DATA),
        load(SPEED, RATE),
        Insn::skip_unless_zero(SPEED, 1),
        Insn::skip(limit.len() as i16),
    ];
    code.extend(limit);
    code
}

/// Drops frames that end before `end`.
fn bounds(end: i32) -> [Insn; 5] {
    let fits = Insn::skip_if_not_greater(FIELD, END, 2);
    [Insn::copy(FIELD, DATA), Insn::add(FIELD, end), fits, DROP[0], DROP[1]]
}

/// Where the source MAC is that of the pair at this offset, skips `found` instructions.
fn match_mac(at: i16, found: i16) -> [Insn; 5] {
    [
        Insn::load(Width::U32, EXPECT, PAIRS, at),
        Insn::skip_unless_same(EXPECT, MAC_HEAD, 3),
        Insn::load(Width::U16, EXPECT, PAIRS, at + 4),
        Insn::skip_unless_same(EXPECT, MAC_TAIL, 1),
        Insn::skip(found),
    ]
}

/// Drops the frame unless the address in FIELD is one of the VM's.
fn require_ipv4() -> [Insn; 6] {
    let load = |at: usize| Insn::load(Width::U32, EXPECT, PAIRS, at as i16);
    let found = |skipped| Insn::skip_if_same(FIELD, EXPECT, skipped);
    [load(8), found(4), load(PAIR_SIZE + 8), found(2), DROP[0], DROP[1]]
}

fn require(register: u8, value: u32) -> [Insn; 3] {
    [Insn::skip_if_equal(register, value, 2), DROP[0], DROP[1]]
}

fn require_same(a: u8, b: u8) -> [Insn; 3] {
    [Insn::skip_if_same(a, b, 2), DROP[0], DROP[1]]
}

fn ip_rules() -> Vec<Insn> {
    let mut code = vec![Insn::load(Width::U8, FIELD, DATA, IP_VERSION_AT), Insn::and(FIELD, 0xF0)];
    code.extend(require(FIELD, 0x40));
    code.push(Insn::load(Width::U32, FIELD, DATA, IP_SOURCE_AT));
    code.extend(require_ipv4());
    code
}

fn arp_rules() -> Vec<Insn> {
    let mut code = bounds(ARP_END).to_vec();
    // Ethernet and IPv4, addresses of 6 and 4 bytes.
    code.push(Insn::load(Width::U32, FIELD, DATA, ARP_FORM_AT));
    code.extend(require(FIELD, word([0, 1, 8, 0])));
    code.push(Insn::load(Width::U16, FIELD, DATA, ARP_SIZES_AT));
    code.extend(require(FIELD, half([6, 4])));
    code.push(Insn::load(Width::U32, FIELD, DATA, ARP_MAC_AT));
    code.extend(require_same(FIELD, MAC_HEAD));
    code.push(Insn::load(Width::U16, FIELD, DATA, ARP_MAC_AT + 4));
    code.extend(require_same(FIELD, MAC_TAIL));
    code.push(Insn::load(Width::U32, FIELD, DATA, ARP_IPV4_AT));
    code.extend(require_ipv4());
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The interface that a program tried on a frame by hand believes the frame came from.
    const LOOPBACK: u32 = 1;
    const A: Pair = Pair { mac: [2, 0x4f, 198, 18, 3, 0x92], ipv4: [198, 18, 3, 2] };
    const B: Pair = Pair { mac: [0xFE, 0x4f, 198, 19, 0, 1], ipv4: [198, 19, 0, 1] };
    const OTHER: Pair = Pair { mac: [2, 0, 0, 0, 0, 9], ipv4: [198, 18, 3, 1] };

    fn ip(mac: [u8; 6], ipv4: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0xFF; 6];
        frame.extend(mac);
        frame.extend([8, 0, 0x45]);
        frame.resize(26, 0);
        frame.extend(ipv4);
        frame.resize(60, 0);
        frame
    }

    fn arp(mac: [u8; 6], sender: Pair) -> Vec<u8> {
        let mut frame = vec![0xFF; 6];
        frame.extend(mac);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(sender.mac);
        frame.extend(sender.ipv4);
        frame.resize(60, 0);
        frame
    }

    fn changed(mut frame: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
        frame[at] = value;
        frame
    }

    fn check(frame: &[u8], passes: bool) {
        let filter = Filter::load().expect("the verifier takes it");
        filter.table.set(LOOPBACK, &emit([A, B], 0)).expect("there is room");
        let verdict = bpf::try_on(filter.program.as_fd(), frame).expect("it runs");
        assert_eq!(verdict == XDP_PASS, passes, "verdict {verdict} on {frame:02x?}");
    }

    #[test]
    fn a_vm_sends_from_its_own_addresses_only() {
        for pair in [A, B] {
            check(&ip(pair.mac, pair.ipv4), true);
            check(&arp(pair.mac, pair), true);
            check(&ip(pair.mac, OTHER.ipv4), false);
            check(&ip(OTHER.mac, pair.ipv4), false);
            check(&arp(OTHER.mac, pair), false);
            check(&arp(pair.mac, OTHER), false);
            check(&arp(pair.mac, Pair { mac: OTHER.mac, ..pair }), false);
            check(&arp(pair.mac, Pair { ipv4: OTHER.ipv4, ..pair }), false);
        }
        // One pair's MAC with the other's address: all of them are the VM's.
        check(&ip(A.mac, B.ipv4), true);
        check(&arp(A.mac, Pair { ipv4: B.ipv4, ..A }), true);
        // The two MACs in one frame are one.
        check(&arp(B.mac, A), false);
    }

    #[test]
    fn a_tap_without_an_entry_passes_nothing() {
        let filter = Filter::load().expect("the verifier takes it");
        let verdict = bpf::try_on(filter.program.as_fd(), &ip(A.mac, A.ipv4)).expect("it runs");
        assert_eq!(verdict, XDP_DROP);
    }

    #[test]
    fn a_vm_sends_no_faster_than_it_bought() {
        let filter = Filter::load().expect("the verifier takes it");
        // 8 KiB a second: what comes in while this test runs is less than a frame.
        filter.table.set(LOOPBACK, &emit([A, B], 8)).expect("there is room");
        let mut frame = ip(A.mac, A.ipv4);
        frame.resize(1024, 0);
        let send = || bpf::try_on(filter.program.as_fd(), &frame).expect("it runs") == XDP_PASS;
        let passed = (0..300).filter(|_| send()).count() as u64;
        let all_at_once = burst_bytes(8) / 1024;
        assert!((all_at_once..all_at_once + 2).contains(&passed), "{passed} frames");
    }

    #[test]
    fn nothing_but_whole_ipv4_and_arp_passes() {
        let (ip, arp) = (ip(A.mac, A.ipv4), arp(A.mac, A));
        check(&changed(ip.clone(), 13, 6), false);
        check(&changed(ip.clone(), 14, 0x65), false);
        // IPv6, a VLAN tag, and a spanning tree frame.
        check(&[&ip[..12], &[0x86, 0xDD], &ip[14..]].concat(), false);
        check(&[&ip[..12], &[0x81, 0x00, 0, 1], &ip[12..]].concat(), false);
        check(&[&ip[..12], &[0, 38], &ip[14..]].concat(), false);
        check(&ip[..33], false);
        check(&ip[..34], true);
        check(&arp[..41], false);
        check(&arp[..42], true);
        for at in 14..20 {
            check(&changed(arp.clone(), at, 0x77), false);
        }
    }
}
