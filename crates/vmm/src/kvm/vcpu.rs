//! One vCPU: runs it, answers its exits, and carries out what it asks of the control device.
//! One thread each; the thread ends when the machine does.
//!
//! ```text
//!            +--------------------- exit: serial, device, control -------+
//!            v                                                           |
//!   start -> KVM_RUN -- kick signal --> machine ended? -- no ------------+
//!                                            | yes
//!                                            v
//!                                          return
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use onde_wire::machine::ColdStart;
use onde_wire::machine::control::{RESULT_INVALID, RESULT_OK, RESULT_REFUSED};
use onde_wire::token::PaymentToken;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::signal::{SIGRTMIN, clear_signal};

use super::registers::ResetState;
use super::vcpu_state::MsrList;
use crate::control::Request;
use crate::fault::{Context, Fault, Part};
use crate::machine::copying::Given;
use crate::machine::{Machine, Outcome};
use crate::noded::Leave;
use crate::sandbox;

/// The vCPU that starts; the others wait for INIT and SIPI.
const FIRST: u32 = 0;

/// `KVM_SET_SIGNAL_MASK` of linux/kvm.h: the signals blocked while the guest runs.
const KVM_SET_SIGNAL_MASK: u64 = 0x4004_AE8B;

/// The signal that gets a thread out of KVM_RUN. It is blocked at all other times, so one that
/// comes early stays pending and ends the next KVM_RUN at once; no handler ever runs.
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// A vCPU's thread, to get it out of KVM_RUN.
pub struct Thread(libc::pid_t);

impl Thread {
    /// The thread that calls this.
    fn current() -> Self {
        Self(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// Sends it the kick signal; one that is gone already does not mind.
    pub fn kick(&self) {
        // SAFETY: three numbers, no memory. The signal is blocked wherever it is not waited for, so
        // another thread that got this number would not mind it either.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, kick_signal()) };
    }
}

/// A vCPU and what it needs to be reset.
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) id: u32,
    pub(super) msrs: MsrList,
    reset: ResetState,
}

impl Vcpu {
    /// Takes over a vCPU that was just created and sets what each starts with.
    /// `listed` is the MSRs that KVM names as a vCPU's state.
    pub fn new(fd: VcpuFd, id: u32, listed: &[u32]) -> Result<Self, Fault> {
        let reset = ResetState::of(&fd)?;
        reset.set_msrs(&fd)?;
        let msrs = MsrList::of(&fd, listed)?;
        Ok(Self { fd, id, msrs, reset })
    }

    /// Puts the first vCPU at mstrap's entry point.
    pub fn enter_mstrap(&self, entry: u64) -> Result<(), Fault> {
        self.reset.set_mstrap(&self.fd, entry)
    }

    /// Frequency of the guest's time stamp counter, kHz.
    pub fn tsc_khz(&self) -> Result<u32, Fault> {
        self.fd.get_tsc_khz().fault(Part::Kvm, "ask for the TSC frequency")
    }

    /// The thread's body: runs until the machine ends, then returns.
    pub fn run(mut self, machine: Arc<Machine>) {
        let prepared = self.set_signal_mask().and_then(|()| sandbox::enter_vcpu());
        if let Err(fault) = prepared {
            return machine.end(Outcome::Fault(fault));
        }
        machine.gathering.join(self.id, Thread::current());
        if let Err(fault) = self.wake(&machine) {
            return machine.end(Outcome::Fault(fault));
        }
        while !machine.has_ended() {
            if let Err(fault) = self.attend(&machine) {
                return machine.end(Outcome::Fault(fault));
            }
            let request = match self.exit(&machine) {
                Ok(request) => request,
                Err(outcome) => return machine.end(outcome),
            };
            if let Some(request) = request {
                self.carry_out(request, &machine);
            }
        }
    }

    /// Where this machine is one that was saved, or a clone: the first vCPU goes on from there, and has all others do so.
    fn wake(&mut self, machine: &Machine) -> Result<(), Fault> {
        if self.id != FIRST {
            return Ok(());
        }
        let Some(state) = machine.take_waking() else { return Ok(()) };
        match self.go_on(state, machine)? {
            RESULT_OK => Ok(()),
            result => Err(Fault::new(Part::Saved, format!("wake up: result {result}"))),
        }
    }

    /// Lets the kick signal, which this thread inherited blocked, through inside KVM_RUN.
    fn set_signal_mask(&self) -> Result<(), Fault> {
        /// `struct kvm_signal_mask` with room for the kernel's 64 signals.
        #[repr(C, packed)]
        struct Mask {
            len: u32,
            signals: u64,
        }
        let all_but_kick = !(1u64 << (kick_signal() - 1));
        let mask = Mask { len: 8, signals: all_but_kick };
        // SAFETY: KVM reads `len` and that many bytes behind it, all inside `mask`.
        match unsafe { ioctl_with_ref(&self.fd, KVM_SET_SIGNAL_MASK, &mask) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).fault(Part::Vcpu, "set KVM's signal mask"),
        }
    }

    /// Runs the guest up to its next exit and answers it.
    fn exit(&mut self, machine: &Machine) -> Result<Option<Request>, Outcome> {
        match self.fd.run() {
            Ok(exit) => answer(exit, self.id, machine),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                // Nothing pending is the usual case; the loop looks at what the kick was for.
                let _ = clear_signal(kick_signal());
                Ok(None)
            }
            Err(error) => {
                let text = format!("run vCPU {}: {error}", self.id);
                Err(Outcome::Fault(Fault::new(Part::Vcpu, text)))
            }
        }
    }

    fn carry_out(&mut self, request: Request, machine: &Machine) {
        let result = match request {
            Request::Resume(address) => self.resume(address, machine),
            Request::Check(address) => machine.check(address),
            Request::Pay(index, value) => pay(PaymentToken { index, value }, machine),
            Request::Idle(timeout_ms) => {
                machine.arrivals.wait(Duration::from_millis(timeout_ms.into()));
                RESULT_OK
            }
            Request::Track(on) => or_end(machine.track(on), machine),
            Request::Harvest => or_end(machine.harvest(), machine),
            Request::Freeze(role) => or_end(self.freeze(role, machine), machine),
            Request::Commit => machine.commit(),
            Request::Abort => or_end(machine.abort(), machine),
            Request::PowerOff => return machine.end(Outcome::PowerOff),
            Request::Reset => return machine.end(Outcome::Reset),
        };
        machine.bus.control().finish(result);
    }

    /// RESUME: from here on the machine is the guest's.
    fn resume(&mut self, address: u64, machine: &Machine) -> u32 {
        if self.id != FIRST {
            return RESULT_INVALID;
        }
        match machine.given(address) {
            Ok(Given::Cold(start)) => {
                if let Err(fault) = self.start_cold(&start, machine) {
                    machine.end(Outcome::Fault(fault));
                }
                RESULT_OK
            }
            Ok(Given::Full(state)) => or_end(self.go_on(state, machine), machine),
            Err(refused) => refused,
        }
    }

    fn start_cold(&mut self, start: &ColdStart, machine: &Machine) -> Result<(), Fault> {
        self.finish_access(machine)?;
        machine.hand_over()?;
        self.reset.set_cold(&self.fd, start)?;
        if machine.noded.ask_leave() == Leave::Save {
            return Err(Fault::new(
                Part::Saved,
                "only a machine that was copied can be a template",
            ));
        }
        machine.drop_boot_soon();
        Ok(())
    }
}

/// Answers an exit; what the guest asks of the control device is for the caller to carry out.
pub fn answer(exit: VcpuExit<'_>, id: u32, machine: &Machine) -> Result<Option<Request>, Outcome> {
    match exit {
        VcpuExit::IoOut(port, data) => machine.bus.port_write(port, data),
        VcpuExit::IoIn(port, data) => machine.bus.port_read(port, data),
        VcpuExit::MmioRead(address, data) => machine.bus.read(address, data),
        VcpuExit::MmioWrite(address, data) => return Ok(machine.bus.write(address, data)),
        // Triple fault, a reset by a way of its own, or an instruction that KVM cannot emulate
        // where the guest uses it: all the guest's doing.
        VcpuExit::Shutdown | VcpuExit::SystemEvent(..) | VcpuExit::InternalError => {
            return Err(Outcome::Reset);
        }
        VcpuExit::Intr => {}
        other => {
            let text = format!("vCPU {id} stopped: {other:?}");
            return Err(Outcome::Fault(Fault::new(Part::Vcpu, text)));
        }
    }
    Ok(None)
}

/// A command's result; a fault ends the machine.
fn or_end(done: Result<u32, Fault>, machine: &Machine) -> u32 {
    done.unwrap_or_else(|fault| {
        machine.end(Outcome::Fault(fault));
        RESULT_INVALID
    })
}

fn pay(token: PaymentToken, machine: &Machine) -> u32 {
    if machine.noded.pay(token) { RESULT_OK } else { RESULT_REFUSED }
}
