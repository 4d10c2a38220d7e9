//! Where vCPU threads stand still together: one of them calls the others out of the guest, has each save or load
//! its own vCPU (no thread ever touches another's), does what it must, and lets them go. None saves before all stand
//! still: one that runs could send the others an interrupt, which a state saved before would lack.
//!
//! ```text
//!   caller:  call ------------- stand() --- own vCPU --- all() waits --- works on the machine --- release
//!   others:  (kicked) called() - stand() --- own vCPU --- answer() waits ----------- back to the guest
//! ```
//! The I/O thread has no vCPU: it calls, and waits for the others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::kvm::vcpu::Thread;
use crate::kvm::vcpu_state::VcpuState;

/// What each vCPU thread is called for.
pub enum Call {
    /// To save its vCPU.
    Save,
    /// To load this into its vCPU.
    Load(Box<VcpuState>),
}

/// The meeting place.
pub struct Gathering {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Whether a call is on, to be asked before each KVM_RUN without the lock.
    on: AtomicBool,
}

struct Inner {
    /// By vCPU, from the time its thread started.
    threads: Vec<Option<Thread>>,
    /// What each vCPU has still to do.
    calls: Vec<Option<Call>>,
    /// Threads that stand still for the call.
    standing: usize,
    /// What each vCPU answered: a state where it was to save one.
    answers: Vec<Option<Option<VcpuState>>>,
    on: bool,
    /// Calls that are over: whoever stands still goes on when this one is, even if the next is on already.
    over: u64,
    ended: bool,
}

impl Gathering {
    /// For this many vCPUs.
    pub fn new(vcpus: u32) -> Self {
        let inner = Inner {
            threads: (0..vcpus).map(|_| None).collect(),
            calls: Vec::new(),
            standing: 0,
            answers: Vec::new(),
            on: false,
            over: 0,
            ended: false,
        };
        Self { inner: Mutex::new(inner), changed: Condvar::new(), on: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU's thread is there, before its first KVM_RUN.
    pub fn join(&self, id: u32, thread: Thread) {
        self.lock().threads[id as usize] = Some(thread);
    }

    /// Calls all vCPUs, `id` being the caller's where it is one's thread; false where another call is on.
    pub fn call(&self, id: Option<u32>, calls: Vec<Call>) -> bool {
        let mut inner = self.lock();
        if inner.on {
            return false;
        }
        assert_eq!(calls.len(), inner.threads.len());
        (inner.on, inner.standing) = (true, 0);
        inner.answers = calls.iter().map(|_| None).collect();
        inner.calls = calls.into_iter().map(Some).collect();
        self.on.store(true, Ordering::SeqCst);
        for (other, thread) in inner.threads.iter().enumerate() {
            // One that is not there yet looks before its first KVM_RUN.
            if let (Some(thread), true) = (thread, Some(other as u32) != id) {
                thread.kick();
            }
        }
        true
    }

    /// What vCPU `id` is called for, if it is. The caller's own part is here, too.
    pub fn called(&self, id: u32) -> Option<Call> {
        if !self.on.load(Ordering::SeqCst) {
            return None;
        }
        self.lock().calls.get_mut(id as usize)?.take()
    }

    /// A vCPU's thread is out of the guest, its access done: waits for all others', or for the machine's end.
    pub fn stand(&self) {
        let mut inner = self.lock();
        inner.standing += 1;
        self.changed.notify_all();
        let until = |inner: &mut Inner| inner.standing < inner.threads.len() && !inner.ended;
        drop(self.changed.wait_while(inner, until).unwrap_or_else(PoisonError::into_inner));
    }

    /// Another vCPU's answer: gives it and stands still until the caller is done.
    pub fn answer(&self, id: u32, state: Option<VcpuState>) {
        let mut inner = self.lock();
        inner.answers[id as usize] = Some(state);
        self.changed.notify_all();
        let over = inner.over;
        let until = |inner: &mut Inner| inner.over == over && !inner.ended;
        drop(self.changed.wait_while(inner, until).unwrap_or_else(PoisonError::into_inner));
    }

    /// The caller's own answer: waits for all others'. By vCPU; `None` if the machine ended meanwhile.
    pub fn all(&self, id: u32, state: Option<VcpuState>) -> Option<Vec<Option<VcpuState>>> {
        self.lock().answers[id as usize] = Some(state);
        self.others()
    }

    /// Waits for all answers, for a caller that is no vCPU's thread.
    pub fn others(&self) -> Option<Vec<Option<VcpuState>>> {
        let inner = self.lock();
        let until = |inner: &mut Inner| inner.answers.iter().any(Option::is_none) && !inner.ended;
        let mut inner =
            self.changed.wait_while(inner, until).unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut inner.answers).into_iter().collect()
    }

    /// Lets all vCPUs go.
    pub fn release(&self) {
        let mut inner = self.lock();
        inner.on = false;
        inner.over += 1;
        // Under the lock: the next call may come at once.
        self.on.store(false, Ordering::SeqCst);
        drop(inner);
        self.changed.notify_all();
    }

    /// The machine ended: nobody waits any more.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_calls_and_all_stand_still() {
        let (gathering, still) = (Gathering::new(2), AtomicBool::new(false));
        assert!(gathering.called(1).is_none());
        assert!(gathering.call(Some(0), vec![Call::Save, Call::Save]));
        assert!(!gathering.call(None, vec![Call::Save, Call::Save]));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(matches!(gathering.called(1), Some(Call::Save)));
                assert!(gathering.called(1).is_none(), "one call is answered once");
                std::thread::sleep(std::time::Duration::from_millis(20));
                still.store(true, Ordering::SeqCst);
                gathering.stand();
                gathering.answer(1, None);
            });
            gathering.stand();
            assert!(still.load(Ordering::SeqCst), "one that ran on could have sent an interrupt");
            assert_eq!(gathering.all(0, None).map(|answers| answers.len()), Some(2));
            gathering.release();
        });
        assert!(gathering.call(Some(1), vec![Call::Save, Call::Save]));
        gathering.end();
        gathering.stand();
        assert!(gathering.all(1, None).is_none(), "nobody answers in a machine that ended");
    }
}
