//! Which of two machines lives: the source of a migration and its copy, when any message between them may be lost. Pure
//! state with `step(now, event)`; `agent` drives it in the source, the simulation drives it everywhere. No I/O, no clock.
//!
//! ```text
//!                     the source                                      the node of the copy, the judge
//!
//!   sending --Failed--> ABORT                            booting --STOP unless resumed--> stopped: never lives
//!      | Given: the last byte may be there                  |
//!      v                                                    | RESUME, with leave asked for before the first instruction
//!   asking --Lived--> COMMIT                                v
//!      |  \---Never--> ABORT                              resumed: has lived, whatever comes later
//!      | Broken, or patience is over
//!      v
//!   stopping --Lived--> COMMIT                           answers: Booting  it does not run yet
//!         \----Never--> ABORT                                     Lived    it has run: the source must not
//!                                                                 Never    it never will: the source goes on
//! ```
//! `asking` sends STATUS, `stopping` sends STOP unless resumed, both until there is an answer that ends it. The node decides
//! RESUME and STOP in one place, one after the other, so whatever is lost, exactly one of Lived and Never can ever be
//! heard. Without any answer the source stays frozen: it does not live while the copy may.
//!
//! | lost | result |
//! |---|---|
//! | anything before END | the copy has no whole stream and never resumes; the source says ABORT at once |
//! | END, or a part of it | the node says Booting; when patience is over the source stops the copy, then ABORT |
//! | the loader's report | nothing: nobody waits for it |
//! | STATUS or its answer | asked again |
//! | STOP or its answer | sent again; the answer is the same: the certificate, or that it has resumed |
//! | the target's node, after END, for good | nobody answers: frozen until its next life, which knows no such job: ABORT |
//! | the source, before END | the copy ends as one that was never sent; the job is lost with its node, as any |
//! | the source, after END | the copy resumes without asking it |
//! | the customer | neither end needs it; `onde ps` asks the judge later |

use crate::node::NodeError;
use onde_wire::machine::Stage;
use onde_wire::packet::{JobStatus, Status};
use onde_wire::token::CERTIFICATE_SIZE;

/// Time to the first question and between two: each costs the copy's node time in which the copy could wake up, and the end of
/// a migration waits so long at most.
pub const ASK_PERIOD_MS: u64 = 100;
/// Time that a copy has from the last byte of its stream to its first instruction: far more than a busy emulated node
/// needs. Then it is stopped, if it did not resume.
pub const PATIENCE_MS: u64 = 10_000;

/// What the judge says of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It does not run yet.
    Booting,
    /// It ran, if only for an instant.
    Lived,
    /// It did not run and never will.
    Never,
}

impl Word {
    /// What a node's answer to STATUS says; `None` where it says nothing.
    pub fn of_status(answer: &Result<JobStatus, NodeError>) -> Option<Self> {
        match answer {
            Ok(status) if status.has_resumed => Some(Word::Lived),
            Ok(status) if status.stage.is_alive() || status.stage == Stage::Suspended => {
                Some(Word::Booting)
            }
            Ok(_) => Some(Word::Never),
            Err(error) => Self::of_refusal(error),
        }
    }

    /// What a node's answer to STOP unless resumed says.
    pub fn of_stop(answer: &Result<[u8; CERTIFICATE_SIZE], NodeError>) -> Option<Self> {
        match answer {
            Ok(_) => Some(Word::Never),
            Err(error) => Self::of_refusal(error),
        }
    }

    fn of_refusal(error: &NodeError) -> Option<Self> {
        match error.refusal()? {
            Status::Resumed => Some(Word::Lived),
            // Another life of the node: the boot token died with the one before.
            Status::NoJob => Some(Word::Never),
            _ => None,
        }
    }
}

/// What happened to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something failed before the last byte of the stream was handed over.
    Failed,
    /// The last byte of the stream is handed over; the copy may run.
    Given,
    /// The connection to the copy broke, or its loader reported that the stream was no good.
    Broken,
    /// The judge answered.
    Heard(Word),
    /// Time went by.
    Tick,
}

/// What the source is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Wait until this time, milliseconds, or the next event.
    Wait(u64),
    /// Send STATUS to the judge.
    Ask,
    /// Send STOP unless resumed to the judge.
    Stop,
    /// End this machine for good: the copy lives. Final.
    Commit,
    /// Go on as if nothing had been: the copy never lives. Final.
    Abort,
}

/// A source, from FREEZE to COMMIT or ABORT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The stream is not whole yet: the copy cannot run.
    Sending,
    /// The copy may run.
    Asking {
        /// When it gets stopped, milliseconds.
        until_ms: u64,
        /// When it is asked for next.
        next_ms: u64,
    },
    /// The copy may run and shall not.
    Stopping {
        /// When it is stopped next.
        next_ms: u64,
    },
    /// This was the last of it: [`Act::Commit`] or [`Act::Abort`].
    Over(Act),
}

impl Source {
    /// Takes in what happened at `now_ms`, which never goes back, and says what to do. After [`Act::Ask`] and
    /// [`Act::Stop`] the answer comes as [`Event::Heard`], or [`Event::Tick`] follows without.
    pub fn step(&mut self, now_ms: u64, event: Event) -> Act {
        *self = match (*self, event) {
            (Source::Over(act), _) => Source::Over(act),
            (Source::Sending, Event::Failed | Event::Broken) => Source::Over(Act::Abort),
            (Source::Sending, Event::Given) => {
                Source::Asking { until_ms: now_ms + PATIENCE_MS, next_ms: now_ms + ASK_PERIOD_MS }
            }
            (Source::Sending, _) => Source::Sending,
            (_, Event::Heard(Word::Lived)) => Source::Over(Act::Commit),
            (_, Event::Heard(Word::Never)) => Source::Over(Act::Abort),
            (Source::Asking { .. }, Event::Broken) => Source::Stopping { next_ms: now_ms },
            (Source::Asking { until_ms, .. }, _) if now_ms >= until_ms => {
                Source::Stopping { next_ms: now_ms }
            }
            (state, _) => state,
        };
        self.act(now_ms)
    }

    fn act(&mut self, now_ms: u64) -> Act {
        let next = now_ms + ASK_PERIOD_MS;
        match self {
            Source::Sending => Act::Wait(next),
            Source::Asking { next_ms, .. } if now_ms >= *next_ms => {
                *next_ms = next;
                Act::Ask
            }
            Source::Stopping { next_ms } if now_ms >= *next_ms => {
                *next_ms = next;
                Act::Stop
            }
            Source::Asking { next_ms, .. } | Source::Stopping { next_ms } => Act::Wait(*next_ms),
            Source::Over(act) => *act,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Act::*;
    use Event::*;

    /// Feeds events at their times and compares what is to be done.
    fn check(moves: &[(u64, Event, Act)]) {
        let mut source = Source::Sending;
        for (now_ms, event, act) in moves {
            assert_eq!(source.step(*now_ms, *event), *act, "{event:?} at {now_ms} of {moves:?}");
        }
    }

    #[test]
    fn whatever_fails_before_the_last_byte_is_undone_at_once() {
        check(&[(0, Tick, Wait(100)), (5, Failed, Abort), (6, Heard(Word::Lived), Abort)]);
        check(&[(0, Broken, Abort)]);
    }

    #[test]
    fn the_judge_alone_decides_afterwards() {
        check(&[(0, Given, Wait(100)), (100, Tick, Ask), (110, Heard(Word::Booting), Wait(200))]);
        check(&[(0, Given, Wait(100)), (100, Tick, Ask), (109, Heard(Word::Lived), Commit)]);
        check(&[(9, Heard(Word::Lived), Wait(109)), (10, Given, Wait(110)), (11, Broken, Stop)]);
        check(&[(0, Given, Wait(100)), (9, Heard(Word::Lived), Commit), (10, Broken, Commit)]);
        check(&[(0, Given, Wait(100)), (9, Heard(Word::Never), Abort), (10, Tick, Abort)]);
        check(&[(0, Given, Wait(100)), (8, Broken, Stop), (9, Tick, Wait(108))]);
    }

    #[test]
    fn a_silent_judge_is_asked_for_ever() {
        let late = PATIENCE_MS;
        check(&[
            (0, Given, Wait(100)),
            (late - 1, Tick, Ask),
            (late, Tick, Stop),
            (late + 3_600_000, Tick, Stop),
            // An answer from before STOP arrived says nothing.
            (late + 3_600_001, Heard(Word::Booting), Wait(late + 3_600_100)),
            (late + 3_600_002, Heard(Word::Never), Abort),
        ]);
    }
}
