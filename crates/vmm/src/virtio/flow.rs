//! Which frames leave after FREEZE: those of the one TCP connection that carries the machine away, and the echo requests
//! that ask what became of it. All others are the copy's to send. The network device asks for each frame it sends.

/// What REG_FLOW and REG_JUDGE say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    connection: Option<Connection>,
    judge: Option<[u8; 4]>,
}

/// A TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    peer: [u8; 4],
    peer_port: [u8; 2],
    own_port: [u8; 2],
}

const ETHERNET_SIZE: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_TCP: u8 = 6;
const ECHO_REQUEST: u8 = 8;

impl Flow {
    /// Reads the two registers' bytes; zeros let nothing out.
    pub fn parse(flow: [u8; 8], judge: [u8; 4]) -> Self {
        let [a, b, c, d, p, q, r, s] = flow;
        let connection = Connection { peer: [a, b, c, d], peer_port: [p, q], own_port: [r, s] };
        Self {
            connection: (flow != [0; 8]).then_some(connection),
            judge: (judge != [0; 4]).then_some(judge),
        }
    }

    /// Whether an Ethernet frame belongs to it.
    pub fn has(&self, frame: &[u8]) -> bool {
        let Some((ethernet, packet)) = frame.split_at_checked(ETHERNET_SIZE) else { return false };
        let Some(header) = packet.get(..20) else { return false };
        let fragment = [header[6] & 0x3F, header[7]] != [0, 0];
        let size = usize::from(header[0] & 0xF) * 4;
        let Some(payload) = packet.get(size.max(20)..) else { return false };
        let is_whole = ethernet[12..] == ETHERTYPE_IPV4 && header[0] >> 4 == 4 && !fragment;
        let target = &header[16..20];
        is_whole
            && match header[9] {
                PROTOCOL_TCP => self.connection.is_some_and(|one| one.has(target, payload)),
                PROTOCOL_ICMP => {
                    self.judge.is_some_and(|judge| judge == target)
                        && payload.first() == Some(&ECHO_REQUEST)
                }
                _ => false,
            }
    }
}

impl Connection {
    fn has(&self, target: &[u8], segment: &[u8]) -> bool {
        let Some(ports) = segment.get(..4) else { return false };
        target == self.peer && ports[..2] == self.own_port && ports[2..] == self.peer_port
    }
}

/// An echo request to `target`, for tests.
#[cfg(test)]
pub fn echo_request(target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; 42];
    frame[12..14].copy_from_slice(&ETHERTYPE_IPV4);
    (frame[14], frame[23], frame[34]) = (0x45, PROTOCOL_ICMP, ECHO_REQUEST);
    frame[30..34].copy_from_slice(&target);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: [u8; 4] = [198, 18, 0, 7];
    const JUDGE: [u8; 4] = [198, 18, 0, 1];

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
        let flow = Flow::parse([198, 18, 0, 7, 0x12, 0x34, 0x56, 0x78], JUDGE);
        assert_eq!(flow.has(frame), expect, "{frame:x?}");
        assert!(!Flow::parse([0; 8], [0; 4]).has(frame), "{frame:x?}");
    }

    fn changed(frame: &[u8], at: usize, value: u8) -> Vec<u8> {
        let mut frame = frame.to_vec();
        frame[at] = value;
        frame
    }

    #[test]
    fn only_the_flow_leaves() {
        let good = tcp(PEER, 0x5678, 0x1234);
        check(&good, true);
        check(&tcp([198, 18, 0, 8], 0x5678, 0x1234), false);
        check(&tcp(PEER, 0x5679, 0x1234), false);
        check(&tcp(PEER, 0x5678, 0x1235), false);
        for (at, value) in [(13, 6), (13, 0xDD), (14, 0x65), (23, 17), (20, 0x20), (21, 1)] {
            check(&changed(&good, at, value), false);
        }
        (0..38).for_each(|size| check(&good[..size], false));
        // With options, the ports lie behind them.
        let mut options = changed(&good, 14, 0x46);
        check(&options, false);
        options.splice(34..34, [1; 4]);
        check(&options, true);
    }

    #[test]
    fn questions_to_the_judge_leave() {
        let good = echo_request(JUDGE);
        check(&good, true);
        check(&echo_request(PEER), false);
        for (at, value) in [(12, 0x86), (23, 17), (20, 0x20), (34, 0)] {
            check(&changed(&good, at, value), false);
        }
        (0..35).for_each(|size| check(&good[..size], false));
    }
}
