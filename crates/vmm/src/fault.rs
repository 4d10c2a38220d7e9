//! Why a `vmm` process cannot go on: a number for `noded` and one line for the log. Faults of
//! the guest are not here: those end as a reset or as a refused register write.

use std::fmt::{self, Display};

/// The part that failed; the number goes out in `VmmEvent::Fault`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Part {
    /// The command line.
    Arguments = 1,
    /// A descriptor that `noded` was to hand down is missing or of the wrong kind.
    Descriptors = 2,
    /// Guest memory could not be mapped.
    Memory = 3,
    /// The mstrap image is not the ELF file that fits the BOOT window.
    Mstrap = 4,
    /// KVM refused a step of building the machine.
    Kvm = 5,
    /// A vCPU stopped for a reason that no guest should be able to cause.
    Vcpu = 6,
    /// The system call filter was refused.
    Sandbox = 7,
    /// The I/O thread's own descriptors failed.
    Io = 8,
    /// The file of a machine that was saved is not whole, or another machine's.
    Saved = 9,
}

/// A failed part and what was tried, with the system's own words.
#[derive(Debug)]
pub struct Fault {
    /// The part that failed.
    pub part: Part,
    text: String,
}

impl Fault {
    /// A fault that no system error explains.
    pub fn new(part: Part, text: impl Into<String>) -> Self {
        Self { part, text: text.into() }
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Turns any error into a [`Fault`] that says what was being done.
pub trait Context<T> {
    /// Names the part and the act that failed.
    fn fault(self, part: Part, act: &str) -> Result<T, Fault>;
}

impl<T, E: Display> Context<T> for Result<T, E> {
    fn fault(self, part: Part, act: &str) -> Result<T, Fault> {
        self.map_err(|error| Fault::new(part, format!("{act}: {error}")))
    }
}
