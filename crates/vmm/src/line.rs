//! An interrupt line as devices see it. The bus and the virtio devices raise it; what it leads to is `kvm`'s business, and
//! in tests a counter's.

#[cfg(test)]
use vmm_sys_util::eventfd::EventFd;

/// A line into an interrupt controller.
pub trait Line: Send + Sync {
    /// An edge on it. Whoever raises one line takes turns under its device's lock: an edge that meets another is lost.
    fn pulse(&self);
}

#[cfg(test)]
impl Line for EventFd {
    fn pulse(&self) {
        self.write(1).expect("a counter far from its end");
    }
}
