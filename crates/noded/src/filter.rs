//! The filter on what a VM sends: an XDP program on its tap lets a frame pass only if it is ARP or IPv4
//! from one of the VM's two address pairs. Assembled by [`crate::vm`] for each VM with its addresses in
//! it, attached through a descriptor, so it cannot outlive the VM. Never looks past the fixed headers.
//!
//! XDP on a tap runs in the driver for every frame that the VMM writes, with or without a virtio-net header and
//! also for segments still to be cut (drivers/net/tun.c, `tun_build_skb` and `tun_get_user`).

use onde_sys::bpf::{Insn, Width, XDP_DROP, XDP_PASS};

/// An address pair that a VM may send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Source MAC.
    pub mac: [u8; 6],
    /// Source IPv4 address.
    pub ipv4: [u8; 4],
}

// Registers. 1 is the context at the start, 0 the result.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;
const FIELD: u8 = 4;
const MAC_HEAD: u8 = 5;
const MAC_TAIL: u8 = 6;
const IPV4: u8 = 7;

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

/// A load of packet bytes gives this value for them: the processor's order is little endian.
fn word(bytes: [u8; 4]) -> u32 {
    u32::from_le_bytes(bytes)
}

fn half(bytes: [u8; 2]) -> u32 {
    u16::from_le_bytes(bytes).into()
}

/// The program that lets only these pairs send.
pub fn assemble(pairs: [Pair; 2]) -> Vec<Insn> {
    let mut code =
        vec![Insn::load(Width::U32, DATA, CONTEXT, 0), Insn::load(Width::U32, END, CONTEXT, 4)];
    // The verdict of all that does not get to `pass`.
    let drop = [Insn::set(RESULT, XDP_DROP), Insn::exit()];
    let pass = [Insn::set(RESULT, XDP_PASS), Insn::exit()];
    code.extend(bounds(IP_END));
    code.extend([
        Insn::load(Width::U32, MAC_HEAD, DATA, MAC_AT),
        Insn::load(Width::U16, MAC_TAIL, DATA, MAC_AT + 4),
    ]);
    for (pair, is_last) in pairs.into_iter().zip([false, true]) {
        code.extend(match_pair(pair, is_last));
    }
    code.push(Insn::load(Width::U16, FIELD, DATA, TYPE_AT));
    let ip = ip_rules();
    code.push(Insn::skip_unless_equal(FIELD, half([8, 0]), ip.len() as i16 + 2));
    code.extend(ip);
    code.extend(pass);
    code.extend([Insn::skip_if_equal(FIELD, half([8, 6]), 2)]);
    code.extend(drop);
    code.extend(arp_rules());
    code.extend(pass);
    code
}

/// Drops frames that end before `end`.
fn bounds(end: i32) -> [Insn; 5] {
    let [verdict, exit] = [Insn::set(RESULT, XDP_DROP), Insn::exit()];
    [
        Insn::copy(FIELD, DATA),
        Insn::add(FIELD, end),
        Insn::skip_if_not_greater(FIELD, END, 2),
        verdict,
        exit,
    ]
}

/// Where the source MAC is this pair's, loads its address; else goes on to the next pair, or drops.
fn match_pair(pair: Pair, is_last: bool) -> Vec<Insn> {
    let [a, b, c, d, e, f] = pair.mac;
    let found = [Insn::set(IPV4, word(pair.ipv4))];
    // Behind the last pair: two instructions that drop. Behind the first: the second pair's block of six.
    let after = if is_last { 2 } else { 6 };
    let mut block = vec![
        Insn::skip_unless_equal(MAC_HEAD, word([a, b, c, d]), 3),
        Insn::skip_unless_equal(MAC_TAIL, half([e, f]), 2),
    ];
    block.extend(found);
    block.push(Insn::skip(after));
    if is_last {
        block.extend([Insn::set(RESULT, XDP_DROP), Insn::exit()]);
    }
    block
}

fn require(register: u8, value: u32) -> [Insn; 3] {
    [Insn::skip_if_equal(register, value, 2), Insn::set(RESULT, XDP_DROP), Insn::exit()]
}

fn require_same(a: u8, b: u8) -> [Insn; 3] {
    [Insn::skip_if_same(a, b, 2), Insn::set(RESULT, XDP_DROP), Insn::exit()]
}

fn ip_rules() -> Vec<Insn> {
    let mut code = vec![Insn::load(Width::U8, FIELD, DATA, IP_VERSION_AT), Insn::and(FIELD, 0xF0)];
    code.extend(require(FIELD, 0x40));
    code.push(Insn::load(Width::U32, FIELD, DATA, IP_SOURCE_AT));
    code.extend(require_same(FIELD, IPV4));
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
    code.extend(require_same(FIELD, IPV4));
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

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
        let program = onde_sys::bpf::load_xdp(&assemble([A, B])).expect("the verifier takes it");
        let verdict = onde_sys::bpf::try_on(program.as_fd(), frame).expect("it runs");
        assert_eq!(verdict == XDP_PASS, passes, "verdict {verdict} on {frame:02x?}");
    }

    #[test]
    fn a_vm_sends_from_its_own_pairs_only() {
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
        // One pair's MAC with the other's address.
        check(&ip(A.mac, B.ipv4), false);
        check(&arp(B.mac, A), false);
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
