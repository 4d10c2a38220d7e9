//! Starts a program from an open file with exactly the descriptors it shall have, jailed where asked:
//! own PID, mount, network, IPC and UTS namespaces, own cgroup, own user, an empty root, no capability.
//! `noded` starts `packetd` and every `vmm` with it. Never waits for the child: a jail that cannot be built
//! ends the child with [`JAIL_FAILED`] and a line on its log.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::{Gid, Pid, Resource, Rlimit, Signal, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

/// Exit status of a child that could not become the program.
pub const JAIL_FAILED: i32 = 125;

/// First number that no program's own descriptors reach: sources are moved above it before they are
/// put in place, so that none is overwritten on the way.
const PARKING: RawFd = 64;
/// Last capability that any kernel so far knows is 40; asking for more ends the loop early.
const CAPABILITIES_MAX: u32 = 63;

/// include/uapi/linux/sched.h; libc's constant is of a type that is too small.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A program to start.
pub struct Program<'a> {
    /// Its file, opened for reading; it needs no path.
    pub file: BorrowedFd<'a>,
    /// Its arguments, its name first.
    pub args: &'a [CString],
    /// Its descriptors and the numbers they shall have, all below 64. It gets no others.
    pub fds: &'a [(BorrowedFd<'a>, RawFd)],
    /// Its jail; without one it keeps the caller's user and namespaces.
    pub jail: Option<Jail<'a>>,
}

/// Where a jailed program lives.
pub struct Jail<'a> {
    /// User and group.
    pub user: u32,
    /// The cgroup v2 folder it starts in.
    pub cgroup: BorrowedFd<'a>,
    /// Mount point of an empty, read-only file system that becomes its root.
    pub root: &'a CStr,
    /// Most descriptors it may open.
    pub files_max: u64,
}

/// Starts the program and returns its process id. The caller waits for it (SIGCHLD) and must not have
/// blocked on anything the child needs. Errors: those of clone3(2); `EINVAL` for a descriptor number out of range.
pub fn spawn(program: &Program<'_>) -> io::Result<Pid> {
    if program.fds.iter().any(|(_, number)| !(0..PARKING).contains(number)) {
        return Err(Errno::INVAL.into());
    }
    // All memory is taken before the clone: the child takes none, so no lock of another thread matters.
    let mut argv: Vec<_> = program.args.iter().map(|arg| arg.as_ptr()).collect();
    argv.push(std::ptr::null());
    let mut parked = vec![PARKING; program.fds.len()];
    // SAFETY: no CLONE_VM and no own stack: the child is a copy as after fork(2). It runs only `become_program`,
    // which makes system calls on memory prepared here and never returns.
    match unsafe { clone3(program.jail.as_ref()) }? {
        Some(child) => Ok(child),
        None => become_program(program, &argv, &mut parked),
    }
}

/// `None` in the child.
///
/// # Safety
/// The child may only do what a forked child of a program with threads may do.
unsafe fn clone3(jail: Option<&Jail<'_>>) -> io::Result<Option<Pid>> {
    // SAFETY: all zeros is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(jail) = jail {
        // The other namespaces are left to the child: the parent need not wait until they are made.
        args.flags = libc::CLONE_NEWPID as u64 | CLONE_INTO_CGROUP;
        args.cgroup = jail.cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args is a whole clone_args of the size told, and lives over the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &args, size_of_val(&args)) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}

/// Where the child failed, for its last words.
struct Failed(&'static str, Errno);

/// Gives a failed step its name.
trait Step<T> {
    fn step(self, name: &'static str) -> Result<T, Failed>;
}

impl<T> Step<T> for rustix::io::Result<T> {
    fn step(self, name: &'static str) -> Result<T, Failed> {
        self.map_err(|errno| Failed(name, errno))
    }
}

fn become_program(program: &Program<'_>, argv: &[*const libc::c_char], parked: &mut [RawFd]) -> ! {
    let Err(Failed(name, errno)) = try_become(program, argv, parked);
    last_words(name, errno);
    // SAFETY: _exit(2) takes any status and runs no handlers, which belong to the parent.
    unsafe { libc::_exit(JAIL_FAILED) }
}

/// Writes `jail: NAME: error N` to descriptor 2, without memory of its own.
fn last_words(name: &str, errno: Errno) {
    let mut line = [0u8; 80];
    let mut rest = &mut line[..];
    let room = rest.len();
    let fits = io::Write::write_fmt(
        &mut rest,
        format_args!("jail: {name}: error {}\n", errno.raw_os_error()),
    );
    let used = room - rest.len();
    if fits.is_ok() {
        // SAFETY: only written to, and the child owns its table of descriptors; a missing one is an error.
        let log = unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
        let _ = rustix::io::write(log, &line[..used]);
    }
}

fn try_become(
    program: &Program<'_>,
    argv: &[*const libc::c_char],
    parked: &mut [RawFd],
) -> Result<std::convert::Infallible, Failed> {
    unblock_signals();
    rustix::process::setsid().step("setsid")?;
    // A supervisor may run with a better priority than what it starts.
    rustix::process::setpriority_process(None, 0).step("priority")?;
    let file = place_fds(program, parked)?;
    if let Some(jail) = &program.jail {
        enter(jail)?;
    }
    // A supervisor that dies takes its children along; asked for after the change of user, which forgets it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("death signal")?;
    rustix::thread::set_no_new_privs(true).step("no new privileges")?;
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: argv and environment end with a null pointer and point to strings that live until the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file,
            c"".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(Failed("exec", last_errno()))
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

fn unblock_signals() {
    // SAFETY: an all-zero set is the empty set on Linux, and the old one is not asked for.
    unsafe {
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Puts the descriptors in place and closes all others; returns where the program's file is now.
fn place_fds(program: &Program<'_>, parked: &mut [RawFd]) -> Result<RawFd, Failed> {
    for ((source, _), parked) in program.fds.iter().zip(parked.iter_mut()) {
        *parked = park(*source)?;
    }
    let file = park(program.file)?;
    for ((_, number), parked) in program.fds.iter().zip(parked.iter()) {
        // SAFETY: dup2(2) on numbers; whatever had this number in the child is replaced, which is the purpose,
        // and no Rust value in the child uses it any more.
        if unsafe { libc::dup2(*parked, *number) } == -1 {
            return Err(Failed("dup2", last_errno()));
        }
    }
    let file_fd = file as u32;
    let mut start = 0;
    for number in 0..PARKING {
        if program.fds.iter().any(|(_, kept)| *kept == number) {
            close_range(start, number as u32)?;
            start = number as u32 + 1;
        }
    }
    close_range(start, file_fd)?;
    close_range(file_fd + 1, u32::MAX)?;
    Ok(file)
}

/// Closes descriptors `start..end`.
fn close_range(start: u32, end: u32) -> Result<(), Failed> {
    if start >= end {
        return Ok(());
    }
    // SAFETY: the child owns a copy of the table and uses none of these numbers again.
    match unsafe { libc::syscall(libc::SYS_close_range, start, end - 1, 0) } {
        -1 => Err(Failed("close_range", last_errno())),
        _ => Ok(()),
    }
}

/// Copies a descriptor to a number that no program asks for.
fn park(source: BorrowedFd<'_>) -> Result<RawFd, Failed> {
    let copy = rustix::io::fcntl_dupfd_cloexec(source, PARKING).step("dup")?;
    Ok(copy.into_raw_fd())
}

fn enter(jail: &Jail<'_>) -> Result<(), Failed> {
    let own = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    // SAFETY: none of these flags shares or unshares memory or descriptors.
    unsafe { rustix::thread::unshare_unsafe(own | UnshareFlags::NEWUTS) }.step("unshare")?;
    empty_root(jail.root)?;
    let limit = |count| Rlimit { current: Some(count), maximum: Some(count) };
    rustix::process::setrlimit(Resource::Nofile, limit(jail.files_max)).step("limit of files")?;
    rustix::process::setrlimit(Resource::Core, limit(0)).step("limit of core")?;
    for number in 0..=CAPABILITIES_MAX {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if rustix::thread::remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    let (user, group) = (Uid::from_raw(jail.user), Gid::from_raw(jail.user));
    rustix::thread::set_thread_groups(&[]).step("groups")?;
    rustix::thread::set_thread_res_gid(group, group, group).step("group")?;
    rustix::thread::set_thread_res_uid(user, user, user).step("user")?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )
    .step("capabilities")
}

/// pivot_root(2) onto itself and away with the old root, as its manual page shows.
fn empty_root(root: &CStr) -> Result<(), Failed> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change(c"/", private).step("private mounts")?;
    rustix::process::chdir(root).step("chdir")?;
    rustix::process::pivot_root(c".", c".").step("pivot_root")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).step("unmount")
}

/// Opens `/dev/null` for reading and writing.
pub fn dev_null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::options().read(true).write(true).open("/dev/null")?.into())
}

/// A copy, above all agreed numbers, of the descriptor that this program was started with as `number`.
/// Errors: `EBADF` where there is none.
pub fn handed_down(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) on a number; with F_DUPFD_CLOEXEC it touches no descriptor that anybody owns.
    match unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, PARKING) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: a new descriptor that nobody else owns.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}
