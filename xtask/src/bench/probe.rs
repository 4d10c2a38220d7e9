//! A guest's silence as seen from outside: probes at a fixed pace, each of which it answers, and the longest time in
//! which no answer came. Used by [`super::migration`].

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

/// Where `bench-guest` answers.
const PORT: u16 = 7007;
/// Times between two probes, the first of which an emulated guest answers: 1 kHz where it can, and what is too fast for it
/// would measure a queue.
const PERIODS_MS: [u64; 5] = [1, 2, 4, 8, 16];
/// How long a pace is tried.
const TRIAL: Duration = Duration::from_secs(2);
/// Percent of all probes that a pace has to have answered.
const ANSWERED_MIN: u32 = 98;
/// How long one wait for an answer lasts, so that the end is noticed.
const WAIT: Duration = Duration::from_millis(50);

/// Probes under way.
pub struct Probe {
    is_over: Arc<AtomicBool>,
    sender: JoinHandle<u32>,
    receiver: JoinHandle<Vec<Instant>>,
}

/// What became of probes.
pub struct Answered {
    /// The longest time between two answers.
    pub silence: Duration,
    sent: u32,
    answers: u32,
}

/// The fastest pace at which `guest` answers.
pub fn pace(guest: Ipv4Addr) -> Result<Duration> {
    for period in PERIODS_MS.map(Duration::from_millis) {
        let probe = Probe::start(guest, period)?;
        std::thread::sleep(TRIAL);
        if probe.end().is_ok_and(|told| told.answers * 100 >= told.sent * ANSWERED_MIN) {
            return Ok(period);
        }
    }
    bail!("the guest at {guest} answers no pace")
}

impl Probe {
    /// Begins to probe `guest`, once in each period.
    pub fn start(guest: Ipv4Addr, period: Duration) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(WAIT))?;
        let (is_over, guest) = (Arc::new(AtomicBool::new(false)), SocketAddr::from((guest, PORT)));
        let (over, out) = (is_over.clone(), socket.try_clone()?);
        let sender = std::thread::spawn(move || {
            let (mut due, mut sent) = (Instant::now(), 0);
            while !over.load(Ordering::Relaxed) {
                // Nobody there to take it: that is what is measured.
                let _ = out.send_to(&[0; 16], guest);
                sent += 1;
                due += period;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            sent
        });
        let over = is_over.clone();
        let receiver = std::thread::spawn(move || {
            let (mut arrivals, mut buffer) = (Vec::new(), [0; 64]);
            while !over.load(Ordering::Relaxed) {
                if socket.recv_from(&mut buffer).is_ok() {
                    arrivals.push(Instant::now());
                }
            }
            arrivals
        });
        Ok(Self { is_over, sender, receiver })
    }

    /// Ends it.
    pub fn end(self) -> Result<Answered> {
        self.is_over.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("a sender does not panic");
        let arrivals = self.receiver.join().expect("a receiver does not panic");
        let gaps = arrivals.windows(2).map(|pair| pair[1] - pair[0]);
        let silence = gaps.max().unwrap_or_default();
        ensure!(arrivals.len() > 2, "the guest did not answer");
        Ok(Answered { silence, sent, answers: arrivals.len() as u32 })
    }
}
