//! Makes a program that `std` starts the leader of a session of its own, so that it and all it starts
//! can be signalled together, and so that it can own a terminal. Used by `agent`.

use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The program will call setsid(2) first and, where `terminal`, take its standard input for its
/// controlling terminal.
pub fn lead_session(command: &mut Command, terminal: bool) {
    let lead = move || {
        rustix::process::setsid()?;
        if terminal {
            // SAFETY: the child has just been given descriptor 0, and nothing closes it before exec.
            let stdin = unsafe { BorrowedFd::borrow_raw(0) };
            rustix::process::ioctl_tiocsctty(stdin)?;
        }
        Ok(())
    };
    // SAFETY: the closure makes two system calls and touches no memory, lock or descriptor of the parent.
    unsafe { command.pre_exec(lead) };
}
