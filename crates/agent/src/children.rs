//! The guest's processes: starts programs, reaps whatever ends (orphans come to PID 1), and signals
//! programs. A process id is used only under the lock under which it would be reaped, so never a stale one.

use onde_wire::session::Exit;
use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process_group, wait, waitid,
};
use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::freezer::Freezer;
use crate::program::Program;

/// See the module.
#[derive(Default)]
pub struct Children {
    /// Stops the programs among them.
    pub freezer: Arc<Freezer>,
    programs: Mutex<HashMap<Pid, Arc<Program>>>,
    started: Condvar,
}

impl Children {
    /// Starts the thread that reaps.
    pub fn start(freezer: Arc<Freezer>) -> io::Result<Arc<Self>> {
        let children = Arc::new(Self { freezer, ..Self::default() });
        let reaper = children.clone();
        spawn_thread("reap", move || reaper.reap())?;
        Ok(children)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pid, Arc<Program>>> {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a program, which must lead a process group; `describe` makes what sessions see of it.
    pub fn spawn(
        &self,
        command: &mut Command,
        describe: impl FnOnce(u32) -> Arc<Program>,
    ) -> io::Result<(Child, Arc<Program>)> {
        // The lock is held until the program is known: it may end before this returns.
        let mut programs = self.lock();
        let child = command.spawn()?;
        let program = describe(child.id());
        let pid = Pid::from_raw(child.id() as i32).expect("a child has a process id");
        programs.insert(pid, program.clone());
        self.started.notify_all();
        Ok((child, program))
    }

    /// Sends a signal to the process group of a program, if that has not ended.
    pub fn signal(&self, program: &Program, signal: Signal) {
        let programs = self.lock();
        let pid = Pid::from_raw(program.pid() as i32).expect("a program has a process id");
        if programs.contains_key(&pid) {
            // The group may just have ended, all of it.
            let _ = kill_process_group(pid, signal);
        }
    }

    fn reap(&self) {
        loop {
            let peek = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match waitid(WaitId::All, peek) {
                Ok(_) => self.reap_ended(),
                Err(Errno::CHILD) => self.wait_for_start(),
                Err(_) => {}
            }
        }
    }

    /// Reaps all that has ended, and reports those that are programs.
    fn reap_ended(&self) {
        let mut programs = self.lock();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(program) = programs.remove(&pid) {
                program.exited(exit(status));
            }
        }
    }

    /// With no child at all nothing can end: waits until there is one.
    fn wait_for_start(&self) {
        let programs = self.lock();
        drop(self.started.wait_while(programs, |programs| programs.is_empty()));
    }
}

fn exit(status: WaitStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => Exit::Status(status as u8),
        (None, signal) => Exit::Signal(signal.unwrap_or(0) as u8),
    }
}

/// Starts a thread with a small stack: the guest's memory is the customer's.
pub fn spawn_thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    const STACK: usize = 256 << 10;
    std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(run).map(drop)
}
