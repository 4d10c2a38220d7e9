//! `vmm`: one process, one virtual machine on KVM. `noded` starts it in a jail with the descriptors
//! of `wire::machine::fds`; it runs mstrap, then whatever the loader puts into memory. It has no
//! network socket, opens no file and parses no bytes from a network.

mod acpi;
mod bus;
mod checkpoint;
mod console;
mod control;
mod descriptors;
mod fault;
mod gathering;
mod io;
mod kvm;
mod line;
mod machine;
mod memory;
mod mstrap;
mod noded;
mod pages;
mod sandbox;
mod saved;
mod state;
mod virtio;

use std::process::ExitCode;
use std::thread::{Builder, JoinHandle};

use onde_wire::machine::{DISK_MIB_MAX, MEM_MIB_MAX, MEM_MIB_MIN, Space, VCPUS_MAX, VmmEvent};
use vmm_sys_util::signal::{Killable, block_signal};

use descriptors::Descriptors;
use fault::{Context, Fault, Part};
use io::Io;
use kvm::vcpu::{Vcpu, kick_signal};
use machine::{Built, Machine, Origin, Outcome, Shape};

/// A vCPU thread calls a few functions deep and keeps 4 KiB of random bytes at most.
const STACK_SIZE: usize = 128 << 10;

fn main() -> ExitCode {
    die_on_panic();
    match Arguments::parse(std::env::args().skip(1)).inspect_err(say).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Says in the log why this process cannot go on.
fn say(fault: &Fault) {
    eprintln!("vmm: {fault}");
}

/// A bug in one thread ends the whole process; `noded` sees the exit and cleans up.
fn die_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("vmm: bug: {info}");
        std::process::exit(1);
    }));
}

/// What `noded` wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arguments {
    shape: Shape,
    /// The machine may be saved to a file.
    has_saved: bool,
    /// What of it is there already.
    origin: Origin,
}

/// Runs a machine to its end. On success it powered off, reset or is in its file; `noded` was told in any case.
fn run(arguments: Arguments) -> Result<(), Fault> {
    let Arguments { shape, has_saved, .. } = arguments;
    let given = Descriptors::take(shape.has_disk(), has_saved).inspect_err(say)?;
    let control = given.control.try_clone();
    let control = control.fault(Part::Descriptors, "clone the control socket").inspect_err(say)?;
    live(arguments, given).inspect_err(|fault| {
        // In this order: `noded` ends whoever tells it that it cannot go on.
        say(fault);
        let _ = control.send(&VmmEvent::Fault(fault.part as u32).emit());
    })
}

/// The same, but that nobody is told of a fault.
fn live(Arguments { shape, origin, .. }: Arguments, given: Descriptors) -> Result<(), Fault> {
    let Built { machine, vcpus, doorbells } = machine::build(shape, origin, given)?;
    let outcome = match start(&machine, vcpus) {
        Ok(threads) => {
            let outcome = serve(&machine, &doorbells);
            machine.end(Outcome::Abandoned);
            stop(threads);
            outcome
        }
        Err(fault) => Outcome::Fault(fault),
    };
    report(&machine, outcome)
}

/// Starts a thread for each vCPU.
fn start(
    machine: &std::sync::Arc<Machine>,
    vcpus: Vec<Vcpu>,
) -> Result<Vec<JoinHandle<()>>, Fault> {
    // Threads inherit the mask: the kick signal comes through in KVM_RUN only.
    block_signal(kick_signal()).fault(Part::Vcpu, "block the kick signal")?;
    machine.noded.tell(VmmEvent::Started);
    vcpus
        .into_iter()
        .map(|vcpu| {
            let machine = machine.clone();
            let thread = Builder::new().name("vcpu".into()).stack_size(STACK_SIZE);
            thread.spawn(move || vcpu.run(machine)).fault(Part::Vcpu, "start a vCPU thread")
        })
        .collect()
}

/// The I/O thread's life: this one.
fn serve(machine: &Machine, doorbells: &[machine::Doorbell]) -> Outcome {
    let prepared = Io::new(machine, doorbells).and_then(|io| sandbox::enter_io().map(|()| io));
    match prepared {
        Ok(mut io) => io.run(),
        Err(fault) => Outcome::Fault(fault),
    }
}

/// Gets every vCPU out of its guest and waits for its thread.
fn stop(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        // A thread that is gone already does not mind.
        let _ = thread.kill(kick_signal());
        // A thread that panicked has ended the process.
        let _ = thread.join();
    }
}

fn report(machine: &Machine, outcome: Outcome) -> Result<(), Fault> {
    match outcome {
        Outcome::PowerOff => machine.noded.tell(VmmEvent::PowerOff),
        Outcome::Reset => machine.noded.tell(VmmEvent::Reset),
        Outcome::Saved => machine.noded.tell(VmmEvent::Saved),
        Outcome::Kept(state) => {
            let written = machine.write_to_file(&state);
            return report(machine, written.map_or_else(Outcome::Fault, |()| Outcome::Saved));
        }
        Outcome::Abandoned => return Err(Fault::new(Part::Io, "noded closed the control socket")),
        Outcome::Fault(fault) => return Err(fault),
    }
    Ok(())
}

impl Arguments {
    /// `--memory-mib N --vcpus N [--disk-mib N] [--saved [--wakes | --clone]]`
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Fault> {
        const USAGE: &str =
            "usage: vmm --memory-mib N --vcpus N [--disk-mib N] [--saved [--wakes | --clone]]";
        let bad = |what: &str| Fault::new(Part::Arguments, format!("{what}; {USAGE}"));
        let (mut mem_mib, mut vcpus, mut disk_mib) = (None, None, Some(0));
        let (mut has_saved, mut origin) = (false, Origin::Loader);
        while let Some(word) = words.next() {
            let mut number = || words.next().and_then(|value| value.parse::<u32>().ok());
            match word.as_str() {
                "--memory-mib" => mem_mib = number(),
                "--vcpus" => vcpus = number(),
                "--disk-mib" => disk_mib = number(),
                "--saved" => has_saved = true,
                "--wakes" => origin = Origin::Saved,
                "--clone" => origin = Origin::Template,
                _ => return Err(bad(&format!("unknown argument {word}"))),
            }
        }
        let mem_mib = mem_mib
            .filter(|mib| (MEM_MIB_MIN..=MEM_MIB_MAX).contains(mib))
            .ok_or_else(|| bad(&format!("memory must be {MEM_MIB_MIN} to {MEM_MIB_MAX} MiB")))?;
        let vcpus = vcpus
            .filter(|count| (1..=u32::from(VCPUS_MAX)).contains(count))
            .ok_or_else(|| bad(&format!("vCPUs must be 1 to {VCPUS_MAX}")))?;
        let disk_mib = disk_mib
            .filter(|mib| *mib <= DISK_MIB_MAX)
            .ok_or_else(|| bad(&format!("a disk has at most {DISK_MIB_MAX} MiB")))?;
        if origin != Origin::Loader && !has_saved {
            return Err(bad("nothing to go on from"));
        }
        let shape = Shape { space: Space::of_mib(mem_mib, disk_mib), vcpus };
        Ok(Self { shape, has_saved, origin })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expect: Option<(Shape, bool, Origin)>) {
        let parsed = Arguments::parse(line.split_whitespace().map(String::from)).ok();
        let parsed = parsed.map(|parsed| (parsed.shape, parsed.has_saved, parsed.origin));
        assert_eq!(parsed, expect, "{line}");
    }

    #[test]
    fn shapes_have_limits() {
        let shape = Shape { space: Space::of_mib(128, 0), vcpus: 2 };
        check("--memory-mib 128 --vcpus 2", Some((shape, false, Origin::Loader)));
        let with_disk = Shape { space: Space::of_mib(128, 9), ..shape };
        check("--disk-mib 9 --vcpus 2 --memory-mib 128", Some((with_disk, false, Origin::Loader)));
        check("--saved --vcpus 2 --memory-mib 128", Some((shape, true, Origin::Loader)));
        check("--vcpus 2 --memory-mib 128 --saved --wakes", Some((shape, true, Origin::Saved)));
        check("--vcpus 2 --memory-mib 128 --saved --clone", Some((shape, true, Origin::Template)));
        check("--vcpus 2 --memory-mib 128 --wakes", None);
        check("--memory-mib 16 --vcpus 2", None);
        check("--memory-mib 128 --vcpus 65", None);
        check("--memory-mib 128 --vcpus", None);
        check("--memory-mib 128 --vcpus 1 --kernel x", None);
    }
}
