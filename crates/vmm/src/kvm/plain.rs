//! KVM's structures as bytes and back. They are the kernel's own ABI: numbers in a fixed layout, padding spelled out.

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// A structure all of whose bytes are initialised and may have any value.
///
/// # Safety
/// It must have no padding between its fields, no references and no values that are not allowed.
pub unsafe trait Plain: Default {}

// SAFETY: for each of these: linux/kvm.h declares it of integers and arrays of integers, with its padding as fields, and
// `Default` zeroes all of it, unions included.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above; its flexible array has no size.
unsafe impl Plain for kvm_xsave {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_irqchip {}

/// The structure's bytes.
pub fn bytes<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` promises that all of its bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Reads a structure; `None` where the size is another.
pub fn parse<T: Plain>(bytes: &[u8]) -> Option<T> {
    let mut value = T::default();
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: `value` is as large as `bytes` and, being a new local, apart from it; `Plain` promises that any bytes make
    // a value.
    unsafe {
        let target = std::ptr::from_mut(&mut value).cast();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
    }
    Some(value)
}
