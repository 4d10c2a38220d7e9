//! The system call filters, one for each kind of thread; a call that is not listed kills the
//! process. Installed after set-up, so opening files, making sockets and starting programs are
//! not on any list. Recorded against static glibc 2.36.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

use crate::descriptors::TUNSETOFFLOAD;
use crate::fault::{Context, Fault, Part};

/// Of every thread: memory, locks, the log, ends of threads and of the process.
const COMMON: &[libc::c_long] = &[
    libc::SYS_write,
    libc::SYS_sendto,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_set_robust_list,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Of vCPU threads: taking back the kick signal, finding what is on the disk. They serve no queue.
const VCPU: &[libc::c_long] =
    &[libc::SYS_rt_sigtimedwait, libc::SYS_rt_sigpending, libc::SYS_lseek];

/// Of the I/O thread: events, frames, the disk, randomness for the guest.
const IO: &[libc::c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fdatasync,
    libc::SYS_getrandom,
];

/// KVM's calls (linux/kvm.h) for running, resetting, saving and loading a vCPU, and for tracking and saving its machine.
const VCPU_IOCTLS: &[u64] = &[
    0xAE80,      // KVM_RUN
    0x4090_AE82, // KVM_SET_REGS
    0x4138_AE84, // KVM_SET_SREGS
    0x4008_AE89, // KVM_SET_MSRS
    0x41A0_AE8D, // KVM_SET_FPU
    0x4400_AE8F, // KVM_SET_LAPIC
    0x4040_AEA0, // KVM_SET_VCPU_EVENTS
    0x4080_AEA2, // KVM_SET_DEBUGREGS
    0x4188_AEA7, // KVM_SET_XCRS
    0x8208_AE63, // KVM_SET_IRQCHIP
    0x8090_AE81, // KVM_GET_REGS
    0x8138_AE83, // KVM_GET_SREGS
    0xC008_AE88, // KVM_GET_MSRS
    0x8400_AE8E, // KVM_GET_LAPIC
    0x8004_AE98, // KVM_GET_MP_STATE
    0x4004_AE99, // KVM_SET_MP_STATE
    IRQ_LINE,
    0x8040_AE9F, // KVM_GET_VCPU_EVENTS
    0x8080_AEA1, // KVM_GET_DEBUGREGS
    0xAEA2,      // KVM_SET_TSC_KHZ
    0xAEA3,      // KVM_GET_TSC_KHZ
    0x9000_AEA4, // KVM_GET_XSAVE
    0x5000_AEA5, // KVM_SET_XSAVE
    0x8188_AEA6, // KVM_GET_XCRS
    0x4188_AEA7, // KVM_SET_XCRS
    0x4010_AE42, // KVM_GET_DIRTY_LOG
    0xC018_AEC0, // KVM_CLEAR_DIRTY_LOG
    0x4020_AE46, // KVM_SET_USER_MEMORY_REGION
    0xC208_AE62, // KVM_GET_IRQCHIP
    0x4030_AE7B, // KVM_SET_CLOCK
    0x8030_AE7C, // KVM_GET_CLOCK
    TUNSETOFFLOAD,
];

/// `KVM_IRQ_LINE`, as devices raise interrupts.
const IRQ_LINE: u64 = 0x4008_AE61;

/// KVM's calls to interrupt the guest, to drop BOOT, and to save what of the machine is no vCPU's.
const IO_IOCTLS: &[u64] = &[
    IRQ_LINE,
    0x4020_AE46, // KVM_SET_USER_MEMORY_REGION
    0xC208_AE62, // KVM_GET_IRQCHIP
    0x8030_AE7C, // KVM_GET_CLOCK
];

/// Confines the calling vCPU thread.
pub fn enter_vcpu() -> Result<(), Fault> {
    enter(&[COMMON, VCPU].concat(), VCPU_IOCTLS)
}

/// Confines the calling I/O thread. vCPU threads must be running already.
pub fn enter_io() -> Result<(), Fault> {
    enter(&[COMMON, IO].concat(), IO_IOCTLS)
}

fn enter(calls: &[libc::c_long], ioctls: &[u64]) -> Result<(), Fault> {
    let filter = compile(calls, ioctls).fault(Part::Sandbox, "compile the filter")?;
    seccompiler::apply_filter(&filter).fault(Part::Sandbox, "install the filter")
}

fn compile(calls: &[libc::c_long], ioctls: &[u64]) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<_, _> = calls.iter().map(|call| (*call, vec![])).collect();
    // The heap grows by mmap and mprotect; nothing becomes code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = libc::PROT_EXEC as u64;
        let not_code = SeccompCmpOp::MaskedEq(executable);
        rules.insert(call, vec![argument(2, not_code, 0)?]);
    }
    let ioctl: Result<_, _> =
        ioctls.iter().map(|request| argument(1, SeccompCmpOp::Eq, *request)).collect();
    rules.insert(libc::SYS_ioctl, ioctl?);
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?.try_into()
}

fn argument(index: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_compile() {
        assert!(compile(&[COMMON, VCPU].concat(), VCPU_IOCTLS).is_ok());
        assert!(compile(&[COMMON, IO].concat(), IO_IOCTLS).is_ok());
    }

    #[test]
    fn nothing_opens_or_starts_anything() {
        let open = [libc::SYS_openat, libc::SYS_socket, libc::SYS_execve, libc::SYS_clone3];
        for call in open {
            assert!(![COMMON, VCPU, IO].concat().contains(&call));
        }
    }
}
