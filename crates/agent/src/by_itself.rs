//! `onde-agent migrate --token TICKET`, from inside a guest: the machine moves because somebody in it wants to, with what
//! `onde ticket` printed (`-` reads it from the standard input, where no process list shows it). Asks the agent in the way
//! that `onde migrate` does; root alone can read the job's key.

use anyhow::{Context, Result, bail};
use onde_client::channel::Channel;
use onde_client::mover::{Ended, migrate};
use onde_wire::channel::PORT;
use onde_wire::key::Key;
use onde_wire::session::{TICKET_SIZE, Ticket};
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::Duration;

use crate::guest;

/// The agent is on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Moves this machine.
pub fn run(ticket: &str) -> ExitCode {
    match go(ticket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("onde-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn go(ticket: &str) -> Result<()> {
    let text = match ticket {
        "-" => std::io::read_to_string(std::io::stdin()).context("cannot read the ticket")?,
        _ => ticket.to_owned(),
    };
    let ticket = parse(text.trim()).context("this is no ticket: onde ticket prints one")?;
    let identity = guest::identity()?;
    let peer = (Ipv4Addr::LOCALHOST, PORT).into();
    let key = Key::new(&identity.job_key);
    let channel = Channel::connect(peer, &identity.job, &key, CONNECT_TIMEOUT)?;
    match migrate(channel, &ticket, |_| {}) {
        Ended::Moved(_) => Ok(()),
        Ended::Stayed(why) => bail!("this machine stays: {why}"),
        Ended::Unknown(error) => Err(error).context("the agent says nothing any more"),
    }
}

/// A ticket in hex digits.
fn parse(text: &str) -> Option<Ticket> {
    if !text.is_ascii() || text.len() != 2 * TICKET_SIZE {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok();
    Ticket::parse(&(0..TICKET_SIZE).map(byte).collect::<Option<Vec<_>>>()?)
}
