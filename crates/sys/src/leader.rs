//! Makes a program that `std` starts the leader of a session of its own, so that it and all it starts
//! can be signalled together, and so that it can own a terminal. Used by `agent`.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Signals by which a session is told to end. Whoever started this process may have had them ignored (nohup(1)
/// does), and a program inherits that.
const ENDING: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// The program will call setsid(2) first and, where `terminal`, take its standard input for its
/// controlling terminal. Signals that end a session have their default effect on it.
pub fn lead_session(command: &mut Command, terminal: bool) {
    let lead = move || {
        for signal in ENDING {
            // SAFETY: the default disposition runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        rustix::process::setsid()?;
        if terminal {
            // SAFETY: the child has just been given descriptor 0, and nothing closes it before exec.
            let stdin = unsafe { BorrowedFd::borrow_raw(0) };
            rustix::process::ioctl_tiocsctty(stdin)?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only and touches no memory, lock or descriptor of the parent.
    unsafe { command.pre_exec(lead) };
}

/// The program will enter a cgroup, whose `cgroup.procs` is open for writing, before its first instruction.
pub fn enter_cgroup(command: &mut Command, procs: File) {
    let enter = move || rustix::io::write(&procs, b"0").map(drop).map_err(Into::into);
    // SAFETY: the closure makes one system call and touches no memory, lock or descriptor of the parent.
    unsafe { command.pre_exec(enter) };
}
