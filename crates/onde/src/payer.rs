//! The loop round a home node: a step each second, what it says to people, and when to give the VM up. `run` has
//! it in a thread, the wallet in one for each job.

use onde_client::bootstrap;
use onde_client::home::{Home, HomeError, STEP_PERIOD, Standing};
use onde_client::job::Job;
use onde_client::session::frames::FrameWriter;
use onde_client::snapshot::tell_time;
use onde_wire::machine::Stage;
use onde_wire::packet::{JobStatus, Status};
use onde_wire::session::{ClientFrame, Purse};
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::progress::Progress;
use crate::report::Report;
use crate::table::{cost, span};

/// A node that is silent for so long is lost: half of what the broker allows it before it credits.
pub const LOST: Duration = Duration::from_secs(30);
/// Silence that is worth a word.
const SILENT: Duration = Duration::from_secs(5);

/// A VM that has so few seconds left, and gets no more, is worth a word: time to pay by hand.
const DRY_S: u64 = 30;

/// How long a guest that wakes up may take to answer.
const CLOCK_PATIENCE: Duration = Duration::from_secs(30);

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM is over.
    Over(JobStatus),
    /// The node is silent, or knows nothing of the job: it is off or came up anew.
    Lost,
    /// The caller wanted no more, or somebody else settled the job.
    Dismissed,
}

/// Pays until the VM is over, its node is lost, or the other end of `dismissed` is dropped; while there is progress.
pub fn run(
    home: &mut Home,
    mut progress: Progress,
    report: &Report,
    dismissed: &Receiver<()>,
) -> Outcome {
    let (mut mood, mut courier) = (Mood::default(), Courier::default());
    let mut stage = Stage::Booting;
    loop {
        let missing = progress.missing();
        mood.miss_progress(missing.as_deref(), report);
        let step = home.step(missing.is_none());
        let is_paid_for = matches!(step, Ok(Standing::Fine(_) | Standing::Paid(..)));
        let status = step.as_ref().ok().and_then(Standing::status).copied();
        if let Some(status) = status {
            let was = std::mem::replace(&mut stage, status.stage);
            if was == Stage::Suspended
                && stage.is_alive()
                && let Ok(job) = home.job()
            {
                wakes_up(&job);
            }
        }
        if let Some(outcome) = mood.judge(step, report) {
            return outcome;
        }
        if let Some(status) = status.filter(|status| is_paid_for && status.stage == Stage::Running)
        {
            // What fails here is tried again in a second, and the job is paid for as long as this process lives.
            let _ = courier.call(home, &status);
        }
        match dismissed.recv_timeout(STEP_PERIOD) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return Outcome::Dismissed,
        }
    }
}

/// Brings the guest its purse, in a thread: a guest may be slow to answer, and its node is not to wait.
#[derive(Default)]
struct Courier {
    away: Option<JoinHandle<io::Result<u32>>>,
}

impl Courier {
    fn call(&mut self, home: &mut Home, status: &JobStatus) -> Result<(), HomeError> {
        if let Some(back) = self.away.take_if(|thread| thread.is_finished())
            && let Ok(Ok(last)) = back.join()
        {
            home.purse_given(last)?;
        }
        if self.away.is_none()
            && let Some((job, purse)) = home.purse(status)?
        {
            self.away = Some(std::thread::spawn(move || deliver(&job, purse)));
        }
        Ok(())
    }
}

/// Index of the last token delivered.
fn deliver(job: &Job, purse: Purse) -> io::Result<u32> {
    let last = purse.last;
    let channel = bootstrap::connect(&job.handle(), job.guest_ipv4, Duration::ZERO);
    let mut writer = FrameWriter::new(channel.map_err(io::Error::other)?.writer);
    writer.client(&ClientFrame::Purse(purse))?;
    writer.flush()?;
    Ok(last)
}

/// A guest that was on disk has a clock that stood still. One whose clock is wrong goes on all the same.
fn wakes_up(job: &Job) {
    let (handle, guest) = (job.handle(), job.guest_ipv4);
    if job.has_agent {
        std::thread::spawn(move || {
            bootstrap::connect(&handle, guest, CLOCK_PATIENCE).map(tell_time).is_ok()
        });
    }
}

/// What was noticed and told so far.
#[derive(Default)]
struct Mood {
    asleep: bool,
    silent_since: Option<Instant>,
    told_silent: bool,
    told_dry: bool,
    told_trouble: bool,
    told_progress: bool,
    told_cheat: bool,
}

impl Mood {
    fn judge(&mut self, step: Result<Standing, HomeError>, report: &Report) -> Option<Outcome> {
        match step {
            Ok(standing) => {
                self.hear(&standing, report);
                match standing {
                    Standing::Over(status) => Some(Outcome::Over(status)),
                    Standing::Settled => Some(Outcome::Dismissed),
                    _ => None,
                }
            }
            Err(HomeError::Node(error)) if error.is_silence() => self.miss(report),
            Err(HomeError::Node(error)) if error.refusal() == Some(Status::NoJob) => {
                Some(Outcome::Lost)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.told_trouble, true) {
                    report.warn(&format!("cannot pay, trying on: {}", chain(&error)));
                }
                None
            }
        }
    }

    fn hear(&mut self, standing: &Standing, report: &Report) {
        if std::mem::take(&mut self.told_silent) {
            report.line("the node answers again");
        }
        self.silent_since = None;
        if let Some(status) = standing.status() {
            self.hear_sleep(status, report);
        }
        if let Standing::Distrusted(_, why) = standing
            && !std::mem::replace(&mut self.told_cheat, true)
        {
            report.warn(&format!(
                "the node cheats and gets nothing more: {why}; onde stop ends the job"
            ));
        }
        self.warn_dry(standing, report);
        self.told_trouble &= !matches!(standing, Standing::Paid(..));
    }

    fn hear_sleep(&mut self, status: &JobStatus, report: &Report) {
        let (left, asleep) = (span(status.seconds_left), status.stage == Stage::Suspended);
        match (std::mem::replace(&mut self.asleep, asleep), asleep) {
            (false, true) if status.wake_micro > 0 => report.warn(&format!(
                "out of tokens: the VM is on its node's disk, for {left} more; {} tokens wake it up",
                cost(status.wake_micro)
            )),
            (false, true) => report.line(&format!("the VM is on its node's disk, for {left} more")),
            (true, false) => report.line("the VM is awake again"),
            _ => {}
        }
    }

    /// A VM that gets nothing more, for whatever reason, ends soon.
    fn warn_dry(&mut self, standing: &Standing, report: &Report) {
        let why = match standing {
            Standing::AtBudget(_) => "the budget is spent",
            Standing::Withheld(_) => "without progress nothing is paid",
            _ => "",
        };
        let left_s = standing.status().map_or(u64::MAX, |status| status.seconds_left);
        let is_dry = !why.is_empty() && left_s < DRY_S;
        if is_dry && !self.told_dry {
            let left = span(left_s);
            report.warn(&format!("{why}: the VM has {left} left; onde pay lifts it"));
        }
        self.told_dry = is_dry;
    }

    fn miss_progress(&mut self, missing: Option<&str>, report: &Report) {
        match missing {
            Some(why) if !self.told_progress => {
                report.warn(&format!("no progress, so nothing is paid: {why}"));
            }
            None if self.told_progress => report.line("there is progress again"),
            _ => {}
        }
        self.told_progress = missing.is_some();
    }

    fn miss(&mut self, report: &Report) -> Option<Outcome> {
        let silence = self.silent_since.get_or_insert_with(Instant::now).elapsed();
        if silence >= SILENT && !std::mem::replace(&mut self.told_silent, true) {
            report.warn(&format!("the node is silent; lost after {} s", LOST.as_secs()));
        }
        (silence >= LOST).then_some(Outcome::Lost)
    }
}

/// An error with its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |cause| cause.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_client::echo::EchoError;
    use onde_client::node::NodeError;

    #[test]
    fn one_lost_answer_is_no_lost_node_but_one_without_memory_is() {
        let (mut mood, report, node) = (Mood::default(), Report::new(true), [127, 0, 0, 1].into());
        let silent = || Err(NodeError::Echo(EchoError::Silent { node }).into());
        assert_eq!(mood.judge(silent(), &report), None);
        mood.silent_since = Instant::now().checked_sub(LOST);
        assert_eq!(mood.judge(silent(), &report), Some(Outcome::Lost));
        let refused = NodeError::Refused { node, status: Status::NoJob };
        assert_eq!(Mood::default().judge(Err(refused.into()), &report), Some(Outcome::Lost));
    }
}
