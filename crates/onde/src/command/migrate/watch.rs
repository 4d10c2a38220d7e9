//! What is seen of a move: how far it is, how fast it goes, and what is left, for people and for programs.

use onde_client::job::Job;
use onde_client::mover::Event;
use onde_wire::session::Round;
use serde::Serialize;
use std::time::{Duration, Instant};

use super::print_line;
use crate::report::{Report, Spinner};

/// How far a move is: what a program that watches reads, and the words for people.
#[derive(Serialize)]
struct Progress<'a> {
    event: &'static str,
    from: &'a str,
    round: u32,
    /// In this round.
    pages: u64,
    pages_left: u64,
    /// In all rounds.
    sent_bytes: u64,
    bytes_per_s: f64,
    /// Until this round is over, as fast as it went so far.
    seconds_left: Option<f64>,
}

/// What is seen of a move.
pub struct Watch {
    spinner: Spinner,
    is_json: bool,
    from: String,
    born: Instant,
    seen: Seen,
}

/// What was heard, by the time since the watch began.
struct Seen {
    /// When the first byte was sent.
    begun: Option<Duration>,
    round: Round,
    round_begun: Duration,
    pages_left: u64,
    bytes: u64,
}

impl Watch {
    /// Watches the VM of `old` move.
    pub fn new(report: &Report, old: &Job, is_json: bool) -> Self {
        let (from, born) = (old.short_id(), Instant::now());
        Self { spinner: report.spinner(), is_json, from, born, seen: Seen::default() }
    }

    /// Takes in what the guest says, and tells.
    pub fn hear(&mut self, event: Event) {
        let now = self.born.elapsed();
        self.seen.hear(now, event);
        let progress = self.seen.progress(now, &self.from);
        if self.is_json {
            // A reader that is gone is no reason to stay.
            let _ = print_line(&progress);
        }
        self.spinner.say(|| words(&progress));
    }

    /// Rounds so far.
    pub fn rounds(&self) -> u32 {
        self.seen.round.number + 1
    }

    /// Bytes of the stream that the guest told of: it is silent from its last round on, so those of the last records and of
    /// the machine's state are not among them.
    pub fn sent_bytes(&self) -> u64 {
        self.seen.bytes
    }
}

impl Default for Seen {
    fn default() -> Self {
        let round = Round { number: 0, pages: 0 };
        Self { begun: None, round, round_begun: Duration::ZERO, pages_left: 0, bytes: 0 }
    }
}

impl Seen {
    fn hear(&mut self, now: Duration, event: Event) {
        self.begun.get_or_insert(now);
        match event {
            Event::Round(round) => {
                (self.round, self.round_begun, self.pages_left) = (round, now, round.pages);
            }
            Event::Sent(pages_left, bytes) => (self.pages_left, self.bytes) = (pages_left, bytes),
        }
    }

    fn progress<'a>(&self, now: Duration, from: &'a str) -> Progress<'a> {
        let seconds = now.saturating_sub(self.begun.unwrap_or(now)).as_secs_f64();
        let done = self.round.pages.saturating_sub(self.pages_left);
        let round_s = now.saturating_sub(self.round_begun).as_secs_f64();
        Progress {
            event: "progress",
            from,
            round: self.round.number,
            pages: self.round.pages,
            pages_left: self.pages_left,
            sent_bytes: self.bytes,
            bytes_per_s: if seconds > 0.0 { self.bytes as f64 / seconds } else { 0.0 },
            seconds_left: (done > 0).then(|| round_s * self.pages_left as f64 / done as f64),
        }
    }
}

fn words(progress: &Progress<'_>) -> String {
    let Progress { round, pages, pages_left, sent_bytes, bytes_per_s, seconds_left, .. } = progress;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let left = seconds_left.map_or(String::new(), |left| format!(", about {left:.0} s"));
    format!(
        "round {round}: {pages_left} of {pages} pages left, {:.1} MiB sent, {:.1} MiB/s{left}",
        mib(*sent_bytes as f64),
        mib(*bytes_per_s)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// What is told after these events, at these times in milliseconds; the last is the time of telling.
    fn check(events: &[(u64, Event)], now_ms: u64, expect: &str) {
        let mut seen = Seen::default();
        for (ms, event) in events {
            seen.hear(Duration::from_millis(*ms), *event);
        }
        let progress = seen.progress(Duration::from_millis(now_ms), "a1");
        assert!(progress.bytes_per_s.is_finite() && progress.bytes_per_s >= 0.0);
        assert!(progress.seconds_left.is_none_or(|left| left.is_finite() && left >= 0.0));
        let json = serde_json::to_string(&progress).expect("a line for programs");
        assert!(json.starts_with(r#"{"event":"progress","from":"a1","round":"#), "{json}");
        assert_eq!(words(&progress), expect);
    }

    #[test]
    fn tells_what_is_left_of_a_round_and_how_fast_it_goes() {
        let round = |number, pages| Event::Round(Round { number, pages });
        let first = (100, round(0, 1000));
        check(&[], 0, "round 0: 0 of 0 pages left, 0.0 MiB sent, 0.0 MiB/s");
        check(&[first], 100, "round 0: 1000 of 1000 pages left, 0.0 MiB sent, 0.0 MiB/s");
        // At the very moment in which it began there is no rate, and nothing is done yet.
        let sent = |pages_left, mib| Event::Sent(pages_left, mib * MIB);
        check(
            &[first, (100, sent(1000, 1))],
            100,
            "round 0: 1000 of 1000 pages left, 1.0 MiB sent, 0.0 MiB/s",
        );
        check(
            &[first, (2100, sent(750, 3))],
            2100,
            "round 0: 750 of 1000 pages left, 3.0 MiB sent, 1.5 MiB/s, about 6 s",
        );
        // The next round's estimate is its own; the rate is of all rounds.
        let second = [first, (8100, sent(0, 12)), (8100, round(1, 90))];
        check(&second, 8100, "round 1: 90 of 90 pages left, 12.0 MiB sent, 1.5 MiB/s");
        check(
            &[&second[..], &[(10_100, sent(30, 15))]].concat(),
            10_100,
            "round 1: 30 of 90 pages left, 15.0 MiB sent, 1.5 MiB/s, about 1 s",
        );
        // Pages that a guest frees or adds meanwhile.
        check(
            &[first, (1100, sent(1200, 1))],
            1100,
            "round 0: 1200 of 1000 pages left, 1.0 MiB sent, 1.0 MiB/s",
        );
        check(&[(5, round(3, 0))], 9, "round 3: 0 of 0 pages left, 0.0 MiB sent, 0.0 MiB/s");
    }
}
