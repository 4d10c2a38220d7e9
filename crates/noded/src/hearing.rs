//! What VMs hear: a classic BPF program on each tap drops what the bridge floods to all and only one is asked, ARP for
//! an address that is not the VM's. A cluster looks for nodes and guests all the time, and each frame would wake every VM at
//! its customer's cost. Used by [`crate::vm`]. It guards nothing: what gets past it is any Ethernet frame.

use onde_sys::packet::Instruction;

// Codes of <linux/bpf_common.h>.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// More bytes than a frame has.
const ALL: u32 = u32::MAX;

/// The program for a VM with these addresses. A load beyond a frame's end drops the frame.
pub fn program(addresses: [[u8; 4]; 2]) -> [Instruction; 7] {
    let [one, other] = addresses.map(u32::from_be_bytes);
    let instruction = |code, jt, jf, k| Instruction { code, jt, jf, k };
    [
        instruction(LOAD_HALF, 0, 0, 12),
        instruction(JUMP_EQUAL, 0, 3, 0x0806), // ARP, else it passes
        instruction(LOAD_WORD, 0, 0, 38),
        instruction(JUMP_EQUAL, 1, 0, one),
        instruction(JUMP_EQUAL, 0, 1, other),
        instruction(RETURN, 0, 0, ALL),
        instruction(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_vm_is_not_woken_by_questions_for_others() {
        let addresses = [[198, 19, 0, 7], [198, 18, 1, 2]];
        let (here, there) = UnixDatagram::pair().unwrap();
        onde_sys::packet::attach(there.as_fd(), &program(addresses)).unwrap();
        there.set_nonblocking(true).unwrap();
        let passes = |kind: [u8; 2], target: [u8; 4], size: usize| {
            let mut frame = [0xFF; 60];
            frame[12..14].copy_from_slice(&kind);
            frame[38..42].copy_from_slice(&target);
            here.send(&frame[..size]).unwrap();
            let mut heard = [0; 64];
            // Whole, or not at all.
            there.recv(&mut heard).map(|count| assert_eq!(heard[..count], frame[..size])).is_ok()
        };
        let arp = [0x08, 0x06];
        assert_eq!(addresses.map(|address| passes(arp, address, 60)), [true, true]);
        for [a, b, c, d] in addresses {
            assert!(!passes(arp, [a, b, c, d + 1], 60) && !passes(arp, [d, c, b, a], 60));
        }
        assert!(!passes(arp, addresses[0], 41), "a frame that was cut");
        for kind in [[0x08, 0x00], [0x86, 0xDD], [0x06, 0x08]] {
            assert!(passes(kind, [9; 4], 60) && passes(kind, addresses[0], 34));
        }
    }
}
