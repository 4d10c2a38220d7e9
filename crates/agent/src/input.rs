//! Input of a program: what clients sent and the program has not taken yet, and the thread that feeds it.
//! Bounded: a client sends no more than [`INPUT_MAX`] before it hears that some was accepted.

use onde_wire::session::INPUT_MAX;
use std::collections::VecDeque;
use std::io::Write;

use crate::follower::Follower;
use crate::program::Program;

/// A client left a gap in its input, or sent more than it may.
#[derive(Clone, Copy, Debug)]
pub struct Malformed;

/// See the module.
#[derive(Default)]
pub struct Input {
    /// Pieces and whose they are.
    pieces: VecDeque<(u64, Vec<u8>)>,
    size: usize,
    is_ended: bool,
    is_closed: bool,
}

impl Input {
    /// Takes what is new of a client's input.
    pub fn put(
        &mut self,
        follower: &mut Follower,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Malformed> {
        let known = follower.received.checked_sub(offset).ok_or(Malformed)?;
        let fresh = bytes.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default();
        follower.received += fresh.len() as u64;
        if self.is_closed || self.is_ended {
            // Nobody will take it; the client need not keep it.
            follower.accepted = follower.received;
            return Ok(());
        }
        // Two clients' worth: one that connects again may have some of each connection on the way.
        if self.size + fresh.len() > 2 * INPUT_MAX {
            return Err(Malformed);
        }
        self.size += fresh.len();
        if !fresh.is_empty() {
            self.pieces.push_back((follower.client(), fresh.to_vec()));
        }
        Ok(())
    }

    /// No client has more.
    pub fn end(&mut self) {
        self.is_ended = true;
    }

    /// The program takes no more.
    pub fn close(&mut self) {
        self.is_closed = true;
    }

    /// The oldest piece and whose it is.
    pub fn take(&mut self) -> Option<(u64, Vec<u8>)> {
        let piece = self.pieces.pop_front()?;
        self.size -= piece.1.len();
        Some(piece)
    }

    /// Whether no more will come.
    pub fn is_over(&self) -> bool {
        self.is_ended || self.is_closed
    }
}

/// Writes input to the program until there is no more. A program that closed its input is no error: the
/// rest is taken and thrown away. `end` is what ends input where closing does not, on a terminal.
pub fn feed(program: &Program, mut pipe: impl Write, end: &[u8]) {
    let mut is_open = true;
    while let Some((client, bytes)) = program.take_input() {
        is_open = is_open && pipe.write_all(&bytes).is_ok();
        program.accept_input(client, bytes.len());
    }
    if is_open {
        let _ = pipe.write_all(end);
    }
}
