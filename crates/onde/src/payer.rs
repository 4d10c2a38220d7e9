//! The loop round a home node: a step each second, what it says to people, and when the VM is over. `run` has
//! it in a thread, the wallet in one for each job.
//!
//! Silence alone never ends a VM: it may be this machine's own line that is down. A VM is over when its node says so, or
//! knows no such job in its present life, or when the broker has settled the job.

use onde_client::api;
use onde_client::bootstrap;
use onde_client::broker::Broker;
use onde_client::echo::EchoError;
use onde_client::home::{Home, HomeError, STEP_PERIOD, Standing};
use onde_client::job::Job;
use onde_client::node::NodeError;
use onde_client::session::frames::FrameWriter;
use onde_client::snapshot::tell_time;
use onde_wire::machine::Stage;
use onde_wire::packet::{JobStatus, Status};
use onde_wire::session::{ClientFrame, Purse};
use onde_wire::token::JobId;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::progress::Progress;
use crate::report::Report;
use crate::table::{cost, span};

/// Silence that is worth a word, and a question to the broker.
const SILENT: Duration = Duration::from_secs(5);
/// Between two questions to the broker about a job whose node is silent. It gives a silent node up after a minute; a
/// wallet with a thousand such jobs asks fifty times a second.
const ASK_PERIOD: Duration = Duration::from_secs(20);

/// A VM that has so few seconds left, and gets no more, is worth a word: time to pay by hand.
const DRY_S: u64 = 30;

/// How long a guest that wakes up may take to answer.
const CLOCK_PATIENCE: Duration = Duration::from_secs(30);

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM is over.
    Over(JobStatus),
    /// The node knows nothing of the job, since it came up anew; or it is silent, and the broker has settled the job.
    Lost,
    /// Somebody else settled the job.
    Settled,
    /// The caller wanted no more.
    Dismissed,
}

/// Pays until the VM is over, its node is lost, or the other end of `dismissed` is dropped; while there is progress. While
/// the node is silent it is asked on.
pub fn run(
    home: &mut Home,
    mut progress: Progress,
    report: &Report,
    dismissed: &Receiver<()>,
) -> Outcome {
    let (mut mood, mut courier) = (Mood::default(), Courier::default());
    let mut inquiries = [Inquiry::default(), Inquiry::default()];
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
                tell_time_to(&job);
            }
        }
        if let Some(outcome) = mood.judge(step, report) {
            return outcome;
        }
        if inquire(home, &mut mood, &mut inquiries) {
            return Outcome::Lost;
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

/// Asks the broker about the job of a silent node, and about one that has a part of this one's budget for no good: a move that
/// came to nothing, or a ticket that nobody used. Whether the job is settled.
fn inquire(home: &mut Home, mood: &mut Mood, [own, lent]: &mut [Inquiry; 2]) -> bool {
    let Ok(job) = home.job() else { return false };
    let question = |id: JobId| question(home.shop(), id);
    let told = own.ask(mood.silence(), || Some(question(job.id.0)));
    let to = job.lent.map(|lent| lent.to.0);
    // The next step reckons.
    let repaid = lent.ask(mood.lends(to.is_some()), || to.map(question));
    for told in told.iter().chain(&repaid) {
        // Where it cannot be noted now, the next one to ask hears the same.
        let _ = home.note(told);
    }
    told.is_some()
}

/// Asks the broker about a job that it may have settled, in a thread: where the line is down it takes a minute to say so,
/// and the node may answer again before that.
#[derive(Default)]
struct Inquiry {
    asked: Option<JoinHandle<Option<api::Job>>>,
    /// How many were begun in this wait.
    count: u32,
}

impl Inquiry {
    /// What the broker says of the job, once it has settled it. `waited`: for how long so far; `None` ends the matter.
    fn ask<Q: FnOnce() -> Option<api::Job> + Send + 'static>(
        &mut self,
        waited: Option<Duration>,
        question: impl FnOnce() -> Option<Q>,
    ) -> Option<api::Job> {
        let Some(waited) = waited else {
            *self = Self::default();
            return None;
        };
        if let Some(back) = self.asked.take_if(|thread| thread.is_finished())
            && let Ok(Some(told)) = back.join()
        {
            return Some(told);
        }
        if self.asked.is_none()
            && waited >= SILENT + ASK_PERIOD * self.count
            && let Some(question) = question()
        {
            self.count += 1;
            self.asked = Some(std::thread::spawn(question));
        }
        None
    }
}

/// Asks the broker whether the job is settled. A broker that cannot be reached says nothing.
fn question(broker: &Broker, id: JobId) -> impl FnOnce() -> Option<api::Job> + Send + use<> {
    let broker = broker.clone();
    move || broker.job(&id).ok().filter(|told| told.settled_by.is_some())
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

/// A guest that was on disk or moved has a clock that stood still. One whose clock is wrong goes on all the same.
pub fn tell_time_to(job: &Job) {
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
    lent_since: Option<Instant>,
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
                    Standing::Settled => Some(Outcome::Settled),
                    _ => None,
                }
            }
            Err(HomeError::Node(NodeError::Echo(
                EchoError::Silent { .. } | EchoError::Socket { .. },
            ))) => {
                self.miss(report);
                None
            }
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

    fn miss(&mut self, report: &Report) {
        let silence = self.silent_since.get_or_insert_with(Instant::now).elapsed();
        if silence >= SILENT && !std::mem::replace(&mut self.told_silent, true) {
            report.warn(
                "the node is silent: it is asked on, and paid when it answers; onde stop gives the job up",
            );
        }
    }

    /// How long a part of the budget has been another job's.
    fn lends(&mut self, is_lent: bool) -> Option<Duration> {
        let now = Instant::now();
        self.lent_since = is_lent.then(|| self.lent_since.unwrap_or(now));
        self.lent_since.map(|since| now - since)
    }

    /// How long the node has been silent; `None` where it answered last.
    fn silence(&self) -> Option<Duration> {
        self.silent_since.map(|since| since.elapsed())
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
    use crate::command::tests::status;
    use onde_client::api::Hex;

    const NODE: std::net::Ipv4Addr = std::net::Ipv4Addr::LOCALHOST;

    fn silent() -> Result<Standing, HomeError> {
        Err(NodeError::Echo(EchoError::Silent { node: NODE }).into())
    }

    /// A VM in this stage, with so much time left.
    fn at(stage: Stage, seconds_left: u64) -> JobStatus {
        JobStatus { seconds_left, ..status(stage) }
    }

    #[test]
    fn silence_alone_never_ends_a_vm_but_a_node_without_memory_of_it_does() {
        let (mut mood, report) = (Mood::default(), Report::new(true));
        let unreachable = std::io::ErrorKind::NetworkUnreachable.into();
        let unreachable = NodeError::Echo(EchoError::Socket { node: NODE, source: unreachable });
        assert_eq!(mood.judge(silent(), &report), None);
        mood.silent_since = Instant::now().checked_sub(Duration::from_secs(3600));
        assert_eq!(mood.judge(silent(), &report), None, "an hour");
        assert!(mood.told_silent && mood.silence().is_some_and(|silence| silence >= SILENT));
        assert_eq!(mood.judge(Err(unreachable.into()), &report), None, "no way to it");
        assert_eq!(mood.judge(Ok(Standing::Fine(at(Stage::Running, 60))), &report), None);
        assert!(!mood.told_silent && mood.silence().is_none(), "it answered");
        let refused = NodeError::Refused { node: NODE, status: Status::NoJob };
        assert_eq!(mood.judge(Err(refused.into()), &report), Some(Outcome::Lost));
        let over = at(Stage::Stopped, 0);
        assert_eq!(mood.judge(Ok(Standing::Over(over)), &report), Some(Outcome::Over(over)));
        assert_eq!(mood.judge(Ok(Standing::Settled), &report), Some(Outcome::Settled));
    }

    /// The broker's answer about a job that it has settled.
    fn settled() -> api::Job {
        api::Job {
            id: Hex([1; 16]),
            seq: 1,
            node: 1,
            node_id: Hex([2; 16]),
            incarnation: Hex([3; 16]),
            node_ipv4: NODE,
            guest_ipv4: NODE,
            mem_mib: 256,
            vcpus: 1,
            disk_mib: 0,
            value_micro: 1,
            first_count: 10,
            sold: 10,
            booted: true,
            spent_micro: 3,
            opened_at: 0,
            settled_by: Some(api::SettledBy::NodeSilent),
            settled_at: Some(9),
            refund_micro: 7,
        }
    }

    /// Asks after so many seconds of silence; whether that begins a question, and what came of those before.
    fn check(
        inquiry: &mut Inquiry,
        silence_s: u64,
        answer: Option<api::Job>,
        expect: (bool, bool),
    ) {
        if let Some(asked) = &inquiry.asked {
            while !asked.is_finished() {
                std::thread::yield_now();
            }
        }
        let mut begun = false;
        let silence = Some(Duration::from_secs(silence_s));
        let told = inquiry.ask(silence, || {
            begun = true;
            Some(move || answer)
        });
        assert_eq!((begun, told.is_some()), expect, "after {silence_s} s");
    }

    #[test]
    fn the_broker_is_asked_about_a_silent_nodes_job_until_it_has_settled_it() {
        let mut inquiry = Inquiry::default();
        check(&mut inquiry, 4, None, (false, false));
        check(&mut inquiry, 5, None, (true, false));
        check(&mut inquiry, 6, None, (false, false));
        check(&mut inquiry, 25, None, (true, false));
        // One that answers again is asked about no more, and the next silence begins anew.
        assert!(inquiry.ask(None, || Some(|| None)).is_none() && inquiry.asked.is_none());
        check(&mut inquiry, 5, Some(settled()), (true, false));
        check(&mut inquiry, 6, None, (false, true));
    }

    /// A home node's steps, and after each whether the customer was told that the VM runs dry.
    #[test]
    fn a_customer_hears_once_that_a_vm_runs_dry() {
        let (mut mood, report) = (Mood::default(), Report::new(true));
        let mut check = |standing: Standing, expect: bool| {
            mood.warn_dry(&standing, &report);
            assert_eq!(mood.told_dry, expect, "{standing:?}");
        };
        let at = |seconds_left| at(Stage::Running, seconds_left);
        check(Standing::Fine(at(5)), false);
        check(Standing::AtBudget(at(DRY_S)), false);
        check(Standing::AtBudget(at(DRY_S - 1)), true);
        check(Standing::Paid(at(60), 9), false);
        check(Standing::Withheld(at(DRY_S)), false);
        check(Standing::Withheld(at(3)), true);
        check(Standing::Settled, false);
    }
}
