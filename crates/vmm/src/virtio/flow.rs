//! Which frames leave after FREEZE: those of the one TCP connection that carries the machine away, and the echo requests
//! that ask what became of it. All others are the copy's to send. What comes in but their answers is lost to the copy
//! anyway, and would keep the source from its work. The network device asks for each frame.

/// What REG_FLOW and REG_JUDGE say. By default nothing leaves, and nothing that comes in is an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
const ECHO_REPLY: u8 = 0;

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

    /// Whether an Ethernet frame is one of those that leave.
    pub fn has(&self, frame: &[u8]) -> bool {
        let Some(Packet { protocol, to, payload, .. }) = Packet::parse(frame) else { return false };
        self.fits(protocol, to, payload, ECHO_REQUEST, |one, ports| {
            ports[..2] == one.own_port && ports[2..] == one.peer_port
        })
    }

    /// Whether nothing leaves.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether an Ethernet frame is an answer to those.
    pub fn is_answered_by(&self, frame: &[u8]) -> bool {
        let Some(Packet { protocol, from, payload, .. }) = Packet::parse(frame) else {
            return false;
        };
        self.fits(protocol, from, payload, ECHO_REPLY, |one, ports| {
            ports[..2] == one.peer_port && ports[2..] == one.own_port
        })
    }

    fn fits(
        &self,
        protocol: u8,
        other: &[u8],
        payload: &[u8],
        echo: u8,
        have: impl Fn(&Connection, &[u8]) -> bool,
    ) -> bool {
        match protocol {
            PROTOCOL_TCP => self
                .connection
                .zip(payload.get(..4))
                .is_some_and(|(one, ports)| one.peer == other && have(&one, ports)),
            PROTOCOL_ICMP => {
                self.judge.is_some_and(|judge| judge == other) && payload.first() == Some(&echo)
            }
            _ => false,
        }
    }
}

/// A whole IPv4 packet in an Ethernet frame.
struct Packet<'a> {
    protocol: u8,
    from: &'a [u8],
    to: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Packet<'a> {
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let (ethernet, packet) = frame.split_at_checked(ETHERNET_SIZE)?;
        let header = packet.get(..20)?;
        let fragment = [header[6] & 0x3F, header[7]] != [0, 0];
        let size = usize::from(header[0] & 0xF) * 4;
        let payload = packet.get(size.max(20)..)?;
        let is_whole = ethernet[12..] == ETHERTYPE_IPV4 && header[0] >> 4 == 4 && !fragment;
        let (protocol, from, to) = (header[9], &header[12..16], &header[16..20]);
        is_whole.then_some(Self { protocol, from, to, payload })
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
        assert!(!flow.is_answered_by(frame), "{frame:x?}");
        let answer = turned(frame);
        assert_eq!(flow.is_answered_by(&answer), expect, "{answer:x?}");
        assert!(!flow.has(&answer), "{answer:x?}");
        let none = Flow::parse([0; 8], [0; 4]);
        assert!(!none.has(frame) && !none.is_answered_by(&answer), "{frame:x?}");
    }

    /// The frame that answers this one, if both are of a flow.
    fn turned(frame: &[u8]) -> Vec<u8> {
        let mut frame = frame.to_vec();
        let ports = 14 + usize::from(frame.get(14).unwrap_or(&0) & 0xF).max(5) * 4;
        swap(&mut frame, 26, 4);
        match frame.get(23) {
            Some(&PROTOCOL_TCP) => swap(&mut frame, ports, 2),
            Some(&PROTOCOL_ICMP) if frame.len() > ports => {
                frame[ports] ^= ECHO_REQUEST ^ ECHO_REPLY
            }
            _ => {}
        }
        frame
    }

    /// Exchanges two fields of `size` bytes, if they are there.
    fn swap(frame: &mut [u8], at: usize, size: usize) {
        if let Some(fields) = frame.get_mut(at..at + 2 * size) {
            fields.rotate_left(size);
        }
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
