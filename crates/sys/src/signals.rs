//! Signals as something to poll (signalfd(2)), for programs with one loop. Used by `noded` and `onde`.
//! Never installs a handler.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Signals that wait to be read.
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks these signals for this thread and all it starts, and reads them from here instead.
    pub fn block(numbers: &[i32]) -> io::Result<Self> {
        // SAFETY: the set is emptied before it is used, the calls take pointers to it that live over them,
        // and signalfd(2) returns a new descriptor that nobody else owns.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            numbers.iter().for_each(|number| {
                libc::sigaddset(&mut set, *number);
            });
            if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) == -1 {
                return Err(io::Error::last_os_error());
            }
            match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self { fd: OwnedFd::from_raw_fd(fd) }),
            }
        }
    }

    /// The next signal's number; `None` where none waits.
    pub fn next(&self) -> io::Result<Option<i32>> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.fd, &mut info[..]) {
            // ssi_signo is the first member.
            Ok(_) => Ok(Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The program will start with no signal blocked: it inherits what this process blocks, and would never end by a signal.
pub fn unblock(command: &mut Command) {
    let unblock = || {
        // SAFETY: the set is emptied before it is used, and the call takes a pointer to it that lives over it.
        let result = unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut())
        };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes one system call and touches no memory, lock or descriptor of the parent.
    unsafe { command.pre_exec(unblock) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_program_that_is_started_ends_by_signals_that_its_starter_reads() {
        let signals = Signals::block(&[libc::SIGTERM]).unwrap();
        let mut suicide = Command::new("/bin/sh");
        suicide.args(["-c", "kill -TERM $$; exit 3"]);
        assert_eq!(suicide.status().unwrap().code(), Some(3));
        unblock(&mut suicide);
        assert_eq!(suicide.status().unwrap().signal(), Some(libc::SIGTERM));
        assert_eq!(signals.next().unwrap(), None);
    }
}
