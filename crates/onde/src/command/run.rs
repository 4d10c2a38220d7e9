//! `onde run`: a program in a VM of its own, as if it ran here. Packs it, launches the VM, follows the program,
//! pays meanwhile, and settles. The exit status is the program's.

use anyhow::{Context, Result, anyhow};
use onde_client::api::SettledBy;
use onde_client::echo::Echo;
use onde_client::home::Home;
use onde_client::job::Job;
use onde_client::session::{Ended, Session, SessionError};
use onde_wire::packet::{EndReason, JobStatus};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::{console, job, print, session};
use crate::cli::Run;
use crate::cluster::Cluster;
use crate::failure::hinted;
use crate::interrupt::Interrupt;
use crate::launch::{Content, Machine, launch};
use crate::payer::Outcome;
use crate::report::Report;
use crate::wallet::{self, BOOT_PATIENCE};
use crate::{moving, pack, settle, terminal};

/// Quiet on the serial port, whose every byte is an exit; what it has to say when it crashes comes all the same.
/// The machine has no PCI and one serial port; its clock needs no watching; and the kernel's self-tests of its
/// ciphers would take two thirds of its instructions until user space.
const CMDLINE: &str = "console=ttyS0 quiet tsc=reliable no_timer_check cryptomgr.notests 8250.nr_uarts=1 pci=off panic=-1";
/// Between a VM's end and the end of its program's session: the last output is on its way.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// Lines of the console that are shown of a guest that crashed.
const CONSOLE_LINES: usize = 12;
const UNDONE: &str = "the VM may still run, and its change was not collected";

pub fn run(context: Option<&str>, run: &Run, report: &Report) -> Result<ExitCode> {
    let cluster = Arc::new(Cluster::open(context)?);
    let kernel = onde_lab::kernel::KernelCache::find()?;
    let initrd = pack(run, &kernel, report)?;
    let vmlinux = std::fs::read(&kernel.vmlinux).context("cannot read the kernel")?;
    let interrupt = Interrupt::watch()?;
    let title: Vec<_> = run.command.iter().map(|word| word.to_string_lossy()).collect();
    let machine = Machine {
        content: Content::Cold { kernel: &vmlinux, initrd: &initrd, cmdline: CMDLINE },
        title: title.join(" "),
        has_agent: true,
        is_template: false,
    };
    let job = launch(&cluster, &run.order, &machine, &interrupt, report)?;
    let job = cluster.jobs.update(&job.id.0, |job| job.purse = run.purse)?;
    if run.detach {
        interrupt.leave("the VM runs, and nothing pays for it");
        wallet::leave(&cluster, &job)?;
        print(&format!("{}\n", job.short_id()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let followed = follow(&cluster, &job, run.tty, &interrupt, report);
    interrupt.leave(UNDONE);
    terminal::restore();
    let job = cluster.jobs.current(&job.id.0)?;
    if matches!(followed, Err(SessionError::Forgotten)) {
        // Nothing is wrong with the VM.
        wallet::leave(&cluster, &job)?;
        let text =
            format!("job {} goes on without this terminal: its input was cut off", job.short_id());
        return Err(hinted(text, "onde attach JOB follows it; onde stop JOB ends it"));
    }
    let crash = crash(&job, &followed);
    if let Ok((Ended { exit: Some(exit), .. }, _)) = &followed {
        let status = exit.shell_status();
        // Only `onde ps` would miss it.
        let _ = cluster.jobs.update(&job.id.0, |job| job.exit = Some(status));
    }
    settle::tell(&cluster, &job, report);
    match (crash, followed) {
        (Some(error), _) => Err(error),
        (None, Ok((ended, _))) => Ok(session::exit_code(&ended, report)),
        (None, Err(error)) => Ok(session::failed(error)),
    }
}

fn pack(run: &Run, kernel: &onde_lab::kernel::KernelCache, report: &Report) -> Result<Vec<u8>> {
    let window = if run.tty { terminal::window() } else { None };
    let packed = pack::pack(&pack::Request {
        command: &run.command,
        files: &run.file,
        env: &run.env,
        window,
        kernel,
    })?;
    packed.hints.iter().for_each(|hint| report.warn(hint));
    Ok(packed.image)
}

/// Follows the program to its end, while a thread pays. Returns how both ended.
fn follow(
    cluster: &Cluster,
    job: &Job,
    tty: bool,
    interrupt: &Interrupt,
    report: &Report,
) -> Result<(Ended, Outcome), SessionError> {
    let session = Session::new(session::dial(&cluster.jobs, job), BOOT_PATIENCE)
        .while_away(session::is_away(&cluster.jobs, job));
    let (remote, payers_remote) = (session.remote(), session.remote());
    let (dismiss, dismissed) = channel();
    let (leave, left) = channel();
    std::thread::scope(|scope| {
        let payer = scope.spawn(move || {
            let outcome = pay(cluster, job, report, dismissed);
            if outcome != Outcome::Dismissed {
                wait(&left, LAST_OUTPUT);
                payers_remote.detach();
            }
            outcome
        });
        interrupt.run_program(remote);
        if tty {
            // Without a terminal the program goes on as if its own were dumb.
            let _ = terminal::make_raw();
        }
        let ended = session.attach(0, true, session::streams());
        drop((dismiss, leave));
        let outcome = payer.join().unwrap_or(Outcome::Dismissed);
        ended.map(|ended| (ended, outcome))
    })
}

/// Waits so long, or until the other end is dropped.
fn wait(left: &Receiver<()>, time: Duration) {
    // Either way the wait is over.
    let _ = left.recv_timeout(time);
}

fn pay(cluster: &Cluster, job: &Job, report: &Report, dismissed: Receiver<()>) -> Outcome {
    let Ok(echo) = Echo::open() else {
        report.warn("cannot pay: no socket");
        return Outcome::Dismissed;
    };
    let mut home = Home::new(echo, cluster.broker.clone(), cluster.jobs.clone(), job);
    moving::pay(cluster, &mut home, job, report, &dismissed)
}

/// Why the program did not come to its own end, where it did not.
fn crash(job: &Job, followed: &Result<(Ended, Outcome), SessionError>) -> Option<anyhow::Error> {
    match followed {
        Ok((Ended { exit: Some(_), .. }, _)) => None,
        Ok((_, Outcome::Over(status))) => Some(over(job, status)),
        Ok((_, Outcome::Lost | Outcome::Settled)) => Some(gone(job)),
        Ok((_, Outcome::Dismissed)) => None,
        Err(SessionError::Refused { .. } | SessionError::Output(_) | SessionError::Forgotten) => {
            None
        }
        Err(SessionError::Unreachable(_) | SessionError::Lost(_)) => {
            console::tail(job, CONSOLE_LINES)
                .map(|tail| anyhow!("the guest cannot be reached; the end of its console:\n{tail}"))
        }
    }
}

/// The job was settled while its program ran, or its node forgot it.
fn gone(job: &Job) -> anyhow::Error {
    match job.settled.map(|settled| settled.by) {
        Some(SettledBy::Certificate | SettledBy::Unused) => {
            hinted("the job was stopped from elsewhere", "onde ps --all lists it")
        }
        _ => hinted(
            format!("node {} is lost, and the VM with it", job.node),
            "run it again on another node: onde node ls",
        ),
    }
}

fn over(job: &Job, status: &JobStatus) -> anyhow::Error {
    let why = job::end_words(status.end).unwrap_or("nobody knows why");
    let text = format!("the VM ended before its program did: {why}");
    if status.end == EndReason::OutOfTokens {
        return hinted(text, "give it a larger --budget, or onde pay JOB N while it runs");
    }
    match console::tail(job, CONSOLE_LINES) {
        Some(tail) => anyhow!("{text}; the end of its console:\n{tail}"),
        None => anyhow!(text),
    }
}
