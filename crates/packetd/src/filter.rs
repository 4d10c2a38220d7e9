//! The kernel's share of the work: a classic BPF program that lets only those frames through to the ring
//! that [`crate::frame`] may read. It saves time and trusts nothing: all that it checks is checked again.

use crate::frame::{FRAME_MAX, Host};

/// Instructions of the program.
pub const PROGRAM_SIZE: usize = 24;

/// Code, jump if true, jump if false, operand: as in Linux `struct sock_filter`.
pub type Instruction = (u16, u8, u8, u32);

// Codes of <linux/bpf_common.h>.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// Where the kernel shows whether a VLAN tag was taken off (SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT).
const VLAN_PRESENT: u32 = 0u32.wrapping_sub(0x1000) + 48;

// tcb:stranger-begin
/// The program for this node: requests for its address, by ARP or to its MAC by unfragmented ICMP
/// echo. Loads beyond a frame's end drop the frame.
pub fn program(node: &Host) -> [Instruction; PROGRAM_SIZE] {
    let ipv4 = u32::from_be_bytes(node.ipv4);
    let [m0, m1, m2, m3, m4, m5] = node.mac;
    let mac_high = u32::from_be_bytes([m0, m1, m2, m3]);
    let mac_low = u32::from(u16::from_be_bytes([m4, m5]));
    let load = |code, at| (code, 0, 0, at);
    // The next instruction, or the drop at `PROGRAM_SIZE - 1` from instruction `at`.
    let need = |at: usize, value| (JUMP_EQUAL, 0, (PROGRAM_SIZE - 2 - at) as u8, value);
    [
        load(LOAD_BYTE, VLAN_PRESENT),
        need(1, 0),
        load(LOAD_HALF, 12),
        (JUMP_EQUAL, 0, 4, 0x0806), // ARP, else go on at 8
        load(LOAD_HALF, 20),
        need(5, 1), // a request
        load(LOAD_WORD, 38),
        (JUMP_EQUAL, 14, 15, ipv4), // for us: done
        need(8, 0x0800),            // IPv4
        load(LOAD_WORD, 0),
        need(10, mac_high),
        load(LOAD_HALF, 4),
        need(12, mac_low),
        load(LOAD_HALF, 20),
        (AND, 0, 0, 0xbfff),
        need(15, 0), // no fragment
        load(LOAD_BYTE, 23),
        need(17, 1), // ICMP
        load(LOAD_WORD, 30),
        need(19, ipv4),
        load(LOAD_BYTE, 34), // no options, or else `frame` drops it
        need(21, 8),         // echo request
        (RETURN, 0, 0, FRAME_MAX as u32),
        (RETURN, 0, 0, 0),
    ]
}
// tcb:stranger-end
