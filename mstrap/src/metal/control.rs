//! The control device, as far as bare-metal programs use it. Every access is an exit to the VMM.

use super::cpu;
use onde_wire::machine::CONTROL_START;
use onde_wire::machine::control::{REG_CHECK, REG_IDLE, REG_RESULT, REG_RESUME, REG_SLEEP_CONTROL};

/// ACPI sleep control: sleep type 5 (S5, soft off) and "do it".
const SLEEP_S5: u8 = 5 << 2 | 1 << 5;
/// Longest wait that the register takes.
pub const IDLE_MS_MAX: u32 = 1000;

fn register<T>(offset: u64) -> *mut T {
    (CONTROL_START + offset) as *mut T
}

/// Waits until the network device has something, or for `ms` (1 to [`IDLE_MS_MAX`]).
pub fn idle(ms: u32) {
    // SAFETY: a register of the machine contract; the write touches no memory of ours.
    unsafe { register::<u32>(REG_IDLE).write_volatile(ms.clamp(1, IDLE_MS_MAX)) }
}

/// Whether the VMM would become the machine whose state lies at `state`: a `RESULT_*`.
pub fn check(state: &[u8]) -> u32 {
    hand_in(REG_CHECK, state)
}

/// Becomes the machine whose state lies at `state`. Returns only on failure, with the VMM's reason.
pub fn resume(state: &[u8]) -> u32 {
    hand_in(REG_RESUME, state)
}

fn hand_in(command: u64, state: &[u8]) -> u32 {
    // SAFETY: registers of the machine contract. The VMM reads the state and either never comes back or
    // has changed nothing of this program's memory.
    unsafe {
        register::<u64>(command).write_volatile(state.as_ptr() as u64);
        register::<u32>(REG_RESULT).read_volatile()
    }
}

/// Powers the VM off.
pub fn power_off() -> ! {
    // SAFETY: a register of the machine contract.
    unsafe { register::<u8>(REG_SLEEP_CONTROL).write_volatile(SLEEP_S5) }
    cpu::halt()
}
