//! A VM that this guest makes elsewhere, with a boot token that it was given: it shows the token to the node from inside,
//! uploads the loader that was packed with it, and sends a copy of its own machine. It buys nothing and pays nothing.

use anyhow::{Context, Result};
use onde_client::bootstrap::Vacant;
use onde_client::echo::Echo;
use onde_client::node::Handle;
use onde_client::stream::{Record, StreamWriter};
use onde_wire::key::{Key, Tag};
use onde_wire::session::{LOADER_PATH, Ticket};
use onde_wire::stream::Start;
use onde_wire::token::BootToken;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// See the module.
#[derive(Clone, Debug)]
pub struct Target {
    /// What its node and its loader are asked with.
    pub handle: Handle,
    token: BootToken,
    tag: Tag,
}

/// What is sent to a target that waits.
#[derive(Clone)]
pub enum Piece {
    /// Memory, packed once for all targets.
    Record(Arc<Record>),
    /// The machine state, which ends the stream.
    State(Arc<Vec<u8>>),
}

impl Target {
    /// The target of a ticket; `None` if its token is of another version.
    pub fn parse(ticket: &Ticket) -> Option<Self> {
        let token = BootToken::parse(&ticket.token)?;
        let handle =
            Handle { job: token.job, key: Key::new(&ticket.key), node: ticket.node.into() };
        Some(Self { handle, token, tag: ticket.tag })
    }

    /// The stream's head for a machine of this shape.
    pub fn start(&self, shape: &Start) -> Start {
        Start { job: self.token.job, ..*shape }
    }

    /// Has the node make the VM and its mstrap take the loader; then it waits for the stream.
    pub fn open(&self, loader: &[u8]) -> Result<Vacant> {
        let booted = self.handle.boot(&mut Echo::open()?, self.token, self.tag)?;
        Ok(Vacant::open(&self.handle, booted.ipv4.into(), loader)?)
    }

    /// Sends what comes out of `pieces` to a VM that waits, which is about to run when this returns well.
    pub fn send(&self, mut vm: Vacant, shape: &Start, pieces: &Receiver<Piece>) -> Result<()> {
        let sent = write(&mut vm, &self.start(shape), pieces);
        Ok(vm.finish(sent)?)
    }
}

fn write(vm: &mut Vacant, start: &Start, pieces: &Receiver<Piece>) -> io::Result<()> {
    let mut stream = StreamWriter::start(vm.writer(), start)?;
    loop {
        match pieces.recv() {
            Ok(Piece::Record(record)) => stream.put(&record)?,
            Ok(Piece::State(state)) => return stream.machine(&state).map(drop),
            Err(_) => return Err(io::Error::other("the copy was given up")),
        }
    }
}

/// The loader that was packed with this guest.
pub fn loader() -> Result<Vec<u8>> {
    std::fs::read(LOADER_PATH).with_context(|| format!("this guest has no {LOADER_PATH}"))
}
