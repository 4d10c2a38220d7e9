//! Brings a program's output from its pipes or terminal into its tail, by one thread, so that the order
//! of the two streams is kept as well as pipes allow. While the tail is full the thread does not read, and the
//! program waits in its own writes.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::PipeReader;
use std::os::fd::OwnedFd;

use crate::program::Program;

/// Bytes read at once: half of what a pipe holds.
const CHUNK: usize = 32 << 10;

/// One stream of a program: its number and where it comes from.
pub type Source = (u8, OwnedFd);

/// Runs until the program has ended and all its streams too. `running` reads as closed once the program
/// itself has ended; what it left behind may hold the streams open for longer.
pub fn pump(program: &Program, mut sources: Vec<Source>, running: PipeReader) {
    let mut running = Some(running);
    let mut is_drained = false;
    let mut chunk = [0; CHUNK];
    loop {
        let is_ended = running.is_none();
        if is_ended && sources.is_empty() {
            if !is_drained {
                program.drained();
            }
            return;
        }
        // Once the program has ended, the first time that nothing is to be read is the end of its own output.
        let at_once = is_ended && !is_drained;
        let (ready, has_ended) = wait(&sources, running.as_ref(), at_once);
        if at_once && ready.is_empty() {
            is_drained = true;
            program.drained();
        }
        for index in ready.into_iter().rev() {
            let (stream, source) = &sources[index];
            match rustix::io::read(source, &mut chunk) {
                Ok(count) if count > 0 => program.put_output(*stream, &chunk[..count]),
                Err(Errno::INTR | Errno::AGAIN) => {}
                // A terminal that nobody has open any more reads as an I/O error.
                Ok(_) | Err(_) => drop(sources.remove(index)),
            }
        }
        if has_ended {
            running = None;
        }
    }
}

/// Which sources can be read, and whether the program has ended.
fn wait(sources: &[Source], running: Option<&PipeReader>, at_once: bool) -> (Vec<usize>, bool) {
    let source_fds = sources.iter().map(|(_, source)| PollFd::new(source, PollFlags::IN));
    let running_fd = running.map(|running| PollFd::new(running, PollFlags::IN));
    let mut fds: Vec<_> = source_fds.chain(running_fd).collect();
    let timeout = at_once.then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
    while poll(&mut fds, timeout.as_ref()) == Err(Errno::INTR) {}
    let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
    let has_ended = running.is_some() && fds.pop().as_ref().is_some_and(is_ready);
    ((0..fds.len()).filter(|index| is_ready(&fds[*index])).collect(), has_ended)
}
