//! A guest's silence as seen from outside: probes at a fixed pace, each of which it answers, and the longest time in
//! which no answer came. Used by [`super::migration`].

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// Where `bench-guest` answers.
const PORT: u16 = 7007;
/// Time between two probes: the shortest that leaves an emulated guest time for something else, whoever runs it. What is
/// faster measures a queue.
pub const PERIOD: Duration = Duration::from_millis(8);
/// How long one wait for an answer lasts, so that the end is noticed.
const WAIT: Duration = Duration::from_millis(50);

/// Probes under way.
pub struct Probe {
    is_over: Arc<AtomicBool>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<Vec<Instant>>,
}

impl Probe {
    /// Begins to probe `guest`, once in each [`PERIOD`].
    pub fn start(guest: Ipv4Addr) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(WAIT))?;
        let (is_over, guest) = (Arc::new(AtomicBool::new(false)), SocketAddr::from((guest, PORT)));
        let (over, out) = (is_over.clone(), socket.try_clone()?);
        let sender = std::thread::spawn(move || {
            let mut due = Instant::now();
            while !over.load(Ordering::Relaxed) {
                // Nobody there to take it: that is what is measured.
                let _ = out.send_to(&[0; 16], guest);
                due += PERIOD;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
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

    /// Ends it; the longest time between two answers.
    pub fn end(self) -> Result<Duration> {
        self.is_over.store(true, Ordering::Relaxed);
        self.sender.join().expect("a sender does not panic");
        let arrivals = self.receiver.join().expect("a receiver does not panic");
        let gaps = arrivals.windows(2).map(|pair| pair[1] - pair[0]);
        let silence = gaps.max().unwrap_or_default();
        ensure!(arrivals.len() > 2, "the guest did not answer");
        Ok(silence)
    }
}
