//! Has the agent of a running VM make more VMs that are copies of its machine, and lets their programs go. `onde fork`
//! calls it. It buys nothing: the tickets were bought before.

use crate::api::JobOpened;
use crate::channel::Channel;
use crate::session::frames::{FrameReader, FrameWriter};
use onde_wire::session::{AgentFrame, ClientFrame, FORK_MAX, Round, Taken, Ticket};
use std::io::{self, ErrorKind};
use std::time::Duration;

/// Longest silence of an agent: it makes the VMs, which takes seconds on a busy emulated node, before it copies.
const SILENCE: Duration = Duration::from_secs(90);

/// What became of a fork.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forked {
    /// What the machine that was copied says, where it got so far.
    pub taken: Option<Taken>,
    /// For each ticket: nothing where its VM is whole, else why not.
    pub faults: Vec<Option<String>>,
}

/// What a guest needs to make the VM of a job that was just bought.
pub fn ticket(opened: &JobOpened) -> Ticket {
    Ticket {
        node: opened.job.node_ipv4.octets(),
        key: opened.job_key.0,
        token: opened.boot_token.0,
        tag: opened.boot_tag.0,
    }
}

/// Has the agent behind `channel` make these VMs, at most [`FORK_MAX`]. What is not known at the end did not become
/// anything: it is a fault, too.
pub fn fork(channel: Channel, tickets: &[Ticket], on_round: impl FnMut(Round)) -> Forked {
    assert!((1..=FORK_MAX).contains(&tickets.len()));
    let mut forked = Forked { taken: None, faults: vec![None; tickets.len()] };
    let mut open = vec![true; tickets.len()];
    let end = converse(channel, tickets, &mut forked, &mut open, on_round);
    let why = match end {
        Ok(text) => text,
        Err(error) => format!("the connection to the guest that is copied broke: {error}"),
    };
    for (fault, _) in forked.faults.iter_mut().zip(open).filter(|(_, is_open)| *is_open) {
        *fault = Some(why.clone());
    }
    forked
}

/// The conversation up to its end, which is the words for those VMs of which nothing was said.
fn converse(
    channel: Channel,
    tickets: &[Ticket],
    forked: &mut Forked,
    open: &mut [bool],
    mut on_round: impl FnMut(Round),
) -> io::Result<String> {
    let (mut reader, mut writer) =
        (FrameReader::new(channel.reader), FrameWriter::new(channel.writer));
    let tickets: Vec<u8> = tickets.iter().flat_map(Ticket::emit).collect();
    writer.client(&ClientFrame::Fork(&tickets))?;
    writer.flush()?;
    reader.stream().set_timeout(Some(SILENCE))?;
    loop {
        match reader.agent()? {
            AgentFrame::Round(round) => on_round(round),
            AgentFrame::Made { index, fault } => {
                let index = index as usize;
                let is_open = open.get_mut(index).filter(|is_open| **is_open);
                *is_open.ok_or(ErrorKind::InvalidData)? = false;
                forked.faults[index] = (!fault.is_empty()).then(|| fault.to_owned());
            }
            AgentFrame::Taken(taken) => {
                forked.taken = Some(taken);
                return Ok("the guest that was copied says nothing of it".to_owned());
            }
            AgentFrame::Error { text, .. } => return Ok(text.to_owned()),
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
}

/// Lets the programs of a copy go, once its hooks are done.
pub fn release(channel: Channel) -> io::Result<()> {
    let (mut reader, mut writer) =
        (FrameReader::new(channel.reader), FrameWriter::new(channel.writer));
    writer.client(&ClientFrame::Release)?;
    writer.flush()?;
    reader.stream().set_timeout(Some(SILENCE))?;
    match reader.agent()? {
        AgentFrame::Released => Ok(()),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_wire::key::Key;
    use onde_wire::session::Refusal;
    use onde_wire::token::BOOT_TOKEN_SIZE;
    use std::net::TcpListener;

    const TAKEN: Taken = Taken { pause_us: 5, frozen_pages: 6 };

    /// Forks twice with an agent that answers so.
    fn check(answers: &[AgentFrame], expect: [Option<&str>; 2], taken: Option<Taken>) {
        let (job, key) = ([1; 16], Key::new(&[2; 32]));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = listener.local_addr().unwrap();
        let ticket =
            Ticket { node: [1; 4], key: [2; 32], token: [3; BOOT_TOKEN_SIZE], tag: [4; 32] };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let stream = listener.accept().unwrap().0;
                let channel = Channel::accept(stream, &job, &key).unwrap();
                let mut reader = FrameReader::new(channel.reader);
                assert!(matches!(reader.client(), Ok(ClientFrame::Fork(_))));
                let mut writer = FrameWriter::new(channel.writer);
                answers.iter().for_each(|answer| writer.agent(answer).unwrap());
                writer.flush().unwrap();
                writer.stream().shutdown();
            });
            let channel = Channel::connect(peer, &job, &key, Duration::from_secs(5)).unwrap();
            let forked = fork(channel, &[ticket.clone(), ticket], |_| {});
            assert_eq!(forked.taken, taken);
            for (fault, expect) in forked.faults.iter().zip(expect) {
                let is_right = match (fault, expect) {
                    (Some(fault), Some(expect)) => fault.contains(expect),
                    (fault, expect) => fault.is_none() && expect.is_none(),
                };
                assert!(is_right, "{fault:?} instead of {expect:?}");
            }
        });
    }

    #[test]
    fn what_nobody_vouches_for_is_a_fault() {
        use AgentFrame::{Error, Made, Taken};
        let (good, bad) = (Made { index: 0, fault: "" }, Made { index: 1, fault: "no room" });
        check(&[bad, good, Taken(TAKEN)], [None, Some("no room")], Some(TAKEN));
        check(&[good], [None, Some("broke")], None);
        check(&[good, good], [None, Some("broke")], None);
        check(&[Made { index: 2, fault: "" }], [Some("broke"), Some("broke")], None);
        let refusal = Error { refusal: Refusal::Guest, text: "busy" };
        check(&[bad, refusal], [Some("busy"), Some("no room")], None);
    }
}
