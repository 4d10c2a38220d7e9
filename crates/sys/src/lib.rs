//! Safe wrappers for the few Linux calls that we need and that `rustix` lacks. With `vmm`'s KVM and
//! memory modules the only host code that may be unsafe. No policy lives here: who may do what is said
//! by the programs that call it.
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod bpf;
pub mod heap;
pub mod inet;
pub mod inherited;
pub mod leader;
pub mod link;
pub mod mounts;
pub mod packet;
pub mod physical;
pub mod random;
pub mod seccomp;
pub mod signals;
pub mod spawn;
pub mod swap;
pub mod tap;
pub mod tsc;
