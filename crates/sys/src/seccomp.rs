//! Giving up what a process may do: root, files, and all system calls but a few.
//! `packetd` calls these once, after it has opened all that it needs.

use rustix::fs::{Mode, OFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;
use std::io;

/// A system call that stays allowed.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Its number, `libc::SYS_*`.
    pub call: libc::c_long,
    /// Index and value of an argument that it must have.
    pub only: Option<(u8, u64)>,
}

impl Allowed {
    /// The call with any arguments.
    pub const fn any(call: libc::c_long) -> Self {
        Self { call, only: None }
    }

    /// The call where its argument number `index`, from 0, is `value`.
    pub const fn with(call: libc::c_long, index: u8, value: u64) -> Self {
        Self { call, only: Some((index, value)) }
    }

    fn rules(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let Some((index, value)) = self.only else { return Ok(vec![]) };
        let size = SeccompCmpArgLen::Qword;
        let condition = SeccompCondition::new(index, size, SeccompCmpOp::Eq, value)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    }
}

/// From now on any system call of this thread but these kills the process. Sets no_new_privs.
/// `allowed` names a call at most once.
pub fn allow_only(allowed: &[Allowed]) -> io::Result<()> {
    let filter = compile(allowed).map_err(io::Error::other)?;
    seccompiler::apply_filter(&filter).map_err(io::Error::other)
}

fn compile(allowed: &[Allowed]) -> Result<BpfProgram, seccompiler::BackendError> {
    let rules: Result<BTreeMap<_, _>, _> =
        allowed.iter().map(|entry| Ok((entry.call, entry.rules()?))).collect();
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules?, SeccompAction::KillProcess, SeccompAction::Allow, arch)?.try_into()
}

/// Makes a root process an ordinary one in an empty root directory: user and group `id`, no
/// supplementary groups, no capability, and none to be had by exec. Single-threaded processes only.
pub fn drop_privileges(id: u32) -> io::Result<()> {
    enter_empty_root()?;
    // SAFETY: the calls change ids of this process only; no groups are read.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(id, id, id))?;
        check(libc::setresuid(id, id, id))?;
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// The new root is a directory that is deleted already, so nothing can ever appear in it.
fn enter_empty_root() -> io::Result<()> {
    let name = format!("onde-empty-{}", std::process::id());
    let made = ["/run", "/tmp", ""].into_iter().map(|base| format!("{base}/{name}"));
    let path = made
        .filter_map(|path| rustix::fs::mkdir(&path, Mode::RWXU).is_ok().then_some(path))
        .next()
        .ok_or_else(|| io::Error::other("no directory can be made in /run, /tmp or /"))?;
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let directory = rustix::fs::open(&path, flags, Mode::empty());
    rustix::fs::rmdir(&path)?;
    rustix::process::fchdir(directory?)?;
    rustix::process::chroot(".")?;
    Ok(())
}

/// Ends the process without running anything more, such as handlers that need other system calls.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
