//! Has the agent of a running VM move it to another node, and hears how that goes. `onde migrate` calls it, and the
//! agent's own program inside a guest. It buys nothing: the ticket was bought before. What became of both machines when
//! the connection broke is for [`crate::migration`]'s judge to say.

use crate::channel::Channel;
use crate::session::frames::{FrameReader, FrameWriter};
use onde_wire::session::{AgentFrame, ClientFrame, Round, Ticket};
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

/// Longest silence of an agent while it makes the VM and sends: it says something several times a second, but on a busy
/// emulated node the VM takes a while to come up.
const SILENCE: Duration = Duration::from_secs(60);

/// How far a migration is.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A round begins.
    Round(Round),
    /// Pages that the round has left, and bytes sent in all.
    Sent(u64, u64),
}

/// How it ended.
#[derive(Debug)]
pub enum Ended {
    /// The copy says that it is there; how long its programs can have stood still before that.
    Moved(Duration),
    /// The source says that it goes on, and why.
    Stayed(String),
    /// The connection broke before either.
    Unknown(io::Error),
}

/// Has the agent behind `channel` move its machine to the VM of `ticket`.
pub fn migrate(channel: Channel, ticket: &Ticket, on_event: impl FnMut(Event)) -> Ended {
    converse(channel, ticket, on_event).unwrap_or_else(Ended::Unknown)
}

fn converse(
    channel: Channel,
    ticket: &Ticket,
    mut on_event: impl FnMut(Event),
) -> io::Result<Ended> {
    let (mut reader, mut writer) =
        (FrameReader::new(channel.reader), FrameWriter::new(channel.writer));
    writer.client(&ClientFrame::Migrate(&ticket.emit()))?;
    writer.flush()?;
    reader.stream().set_timeout(Some(SILENCE))?;
    let (mut heard, mut stopped) = (Instant::now(), None);
    loop {
        match reader.agent()? {
            AgentFrame::Round(round) => on_event(Event::Round(round)),
            AgentFrame::Sent { pages_left, bytes } => on_event(Event::Sent(pages_left, bytes)),
            AgentFrame::Stopped => _ = stopped.get_or_insert_with(Instant::now),
            AgentFrame::Moved => return Ok(Ended::Moved(stopped.unwrap_or(heard).elapsed())),
            AgentFrame::Error { text, .. } => return Ok(Ended::Stayed(text.to_owned())),
            _ => return Err(ErrorKind::InvalidData.into()),
        }
        heard = Instant::now();
    }
}
