//! Which frames leave after FREEZE: those of the one TCP connection that carries the machine away, and the ARP that
//! keeps its peer reachable. All others are the copy's to send. The network device asks for each frame it sends.

/// The TCP connection in REG_FLOW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    peer: [u8; 4],
    peer_port: [u8; 2],
    own_port: [u8; 2],
}

const ETHERNET_SIZE: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const PROTOCOL_TCP: u8 = 6;

impl Flow {
    /// Reads REG_FLOW; `None` for no connection.
    pub fn parse(register: u64) -> Option<Self> {
        let [a, b, c, d, p, q, r, s] = register.to_le_bytes();
        (register != 0).then_some(Self { peer: [a, b, c, d], peer_port: [p, q], own_port: [r, s] })
    }

    /// Whether an Ethernet frame belongs to it.
    pub fn has(&self, frame: &[u8]) -> bool {
        let Some((ethernet, packet)) = frame.split_at_checked(ETHERNET_SIZE) else { return false };
        match [ethernet[12], ethernet[13]] {
            ETHERTYPE_IPV4 => self.has_ipv4(packet),
            // Target protocol address (RFC 826).
            ETHERTYPE_ARP => packet.get(24..28) == Some(&self.peer),
            _ => false,
        }
    }

    fn has_ipv4(&self, packet: &[u8]) -> bool {
        let Some(header) = packet.get(..20) else { return false };
        let fragment = [header[6] & 0x3F, header[7]] != [0, 0];
        let size = usize::from(header[0] & 0xF) * 4;
        let Some(ports) = packet.get(size.max(20)..size.max(20) + 4) else { return false };
        let is_tcp = header[0] >> 4 == 4 && header[9] == PROTOCOL_TCP && !fragment;
        is_tcp
            && header[16..20] == self.peer
            && ports[..2] == self.own_port
            && ports[2..] == self.peer_port
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: [u8; 4] = [198, 18, 0, 7];

    fn flow() -> Flow {
        Flow::parse(u64::from_le_bytes([198, 18, 0, 7, 0x12, 0x34, 0x56, 0x78])).unwrap()
    }

    fn tcp(peer: [u8; 4], own_port: u16, peer_port: u16) -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12..14].copy_from_slice(&ETHERTYPE_IPV4);
        (frame[14], frame[23]) = (0x45, PROTOCOL_TCP);
        frame[30..34].copy_from_slice(&peer);
        frame[34..36].copy_from_slice(&own_port.to_be_bytes());
        frame[36..38].copy_from_slice(&peer_port.to_be_bytes());
        frame
    }

    fn check(frame: &[u8], expect: bool) {
        assert_eq!(flow().has(frame), expect, "{frame:x?}");
    }

    #[test]
    fn only_the_flow_leaves() {
        let good = tcp(PEER, 0x5678, 0x1234);
        check(&good, true);
        check(&tcp([198, 18, 0, 8], 0x5678, 0x1234), false);
        check(&tcp(PEER, 0x5679, 0x1234), false);
        check(&tcp(PEER, 0x5678, 0x1235), false);
        for (at, value) in [(13, 0xDD), (14, 0x65), (23, 17), (20, 0x20), (21, 1)] {
            let mut frame = good.clone();
            frame[at] = value;
            check(&frame, false);
        }
        (0..38).for_each(|size| check(&good[..size], false));
        // With options, the ports lie behind them.
        let mut options = good.clone();
        options[14] = 0x46;
        check(&options, false);
        options.splice(34..34, [1; 4]);
        check(&options, true);
    }

    #[test]
    fn arp_for_the_peer_alone_leaves() {
        let mut arp = vec![0; 42];
        arp[12..14].copy_from_slice(&ETHERTYPE_ARP);
        check(&arp, false);
        arp[38..42].copy_from_slice(&PEER);
        check(&arp, true);
        assert_eq!(Flow::parse(0), None);
    }
}
