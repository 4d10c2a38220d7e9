//! Two threads with a ping socket each: one sweeps all node addresses of the plan for nodes that are new or were
//! away, one asks the nodes that are up, and about jobs. They check tags and tell [`Broker::hear`]; they decide nothing.

use crate::Broker;
use crate::nodes::ALIVE;
use crate::watch::{Ask, Heard};
use onde_client::echo::{Echo, EchoError};
use onde_wire::key::Key;
use onde_wire::packet::{Hello, Op, Packet, Party, Reply, Request, Status};
use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time from one round to the next: as often as nodes draw up their HELLO.
const ROUND: Duration = Duration::from_secs(1);
/// How long a round waits for the last answers.
const ANSWER_TIME: Duration = Duration::from_millis(700);
/// Addresses swept in a round. Each that nobody has keeps an ARP entry busy for three seconds, of 1024 by default.
const SWEEP_PER_ROUND: u32 = 128;
/// Requests sent before the socket is read again: their answers fit its buffer.
const BURST: usize = 32;
/// Time to read answers between two bursts.
const BURST_TIME: Duration = Duration::from_millis(5);
/// Rounds between two looks for what the ledger can forget; while there is more, each round forgets some.
const ROUNDS_PER_PRUNE: u64 = 60;

/// The running threads; dropping it asks them to stop.
#[derive(Debug)]
pub struct Poller {
    threads: Vec<(Sender<()>, JoinHandle<()>)>,
}

impl Poller {
    /// Opens the sockets and starts the threads.
    pub fn start(broker: &Arc<Broker>) -> Result<Self, EchoError> {
        let (watch, sweep) = (Asker::new(broker)?, Asker::new(broker)?);
        let threads = vec![
            spawn("watch", move |stop| run_watch(watch, stop)),
            spawn("sweep", move |stop| run_sweep(sweep, stop)),
        ];
        Ok(Self { threads })
    }

    /// Stops the threads and waits for them: a round at most.
    pub fn stop(self) {
        let (stops, threads): (Vec<_>, Vec<_>) = self.threads.into_iter().unzip();
        drop(stops);
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a poller thread had panicked");
            }
        }
    }
}

fn spawn(
    name: &str,
    run: impl FnOnce(&Receiver<()>) + Send + 'static,
) -> (Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = channel();
    let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&stopped));
    (stop, thread.expect("the system has room for two threads"))
}

/// Calls `round` with its number once a [`ROUND`], until told to stop.
fn rounds(stop: &Receiver<()>, mut round: impl FnMut(u64, Instant)) {
    for number in 0.. {
        let start = Instant::now();
        round(number, start);
        let left = (start + ROUND).saturating_duration_since(Instant::now());
        if stop.recv_timeout(left) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

fn run_sweep(mut asker: Asker, stop: &Receiver<()>) {
    let nodes_max = asker.broker.cluster.plan.nodes_max();
    let mut next = 0;
    rounds(stop, |_, now| {
        let known: HashSet<u32> = asker.broker.nodes().alive(now).collect();
        let numbers = (0..SWEEP_PER_ROUND.min(nodes_max)).map(|i| (next + i) % nodes_max);
        let unknown = numbers.filter(|number| !known.contains(number));
        let asks: Vec<_> = unknown.map(|number| asker.hello(number)).collect();
        next = (next + SWEEP_PER_ROUND) % nodes_max;
        asker.round(asks);
    });
}

fn run_watch(mut asker: Asker, stop: &Receiver<()>) {
    let (mut after, mut prune_at) = (0, 0);
    rounds(stop, |number, now| {
        let broker = Arc::clone(&asker.broker);
        let alive: HashSet<u32> = broker.nodes().alive(now).collect();
        let mut asks: Vec<_> = alive.into_iter().map(|number| asker.hello(number)).collect();
        match broker.asks(after, now) {
            Ok((jobs, next)) => {
                asks.extend(jobs.iter().map(|ask| asker.about_job(ask)));
                after = next;
            }
            Err(refusal) => tracing::error!(?refusal, "listing jobs to ask about"),
        }
        asker.round(asks);
        if let Err(refusal) = broker.tick(Instant::now()) {
            tracing::error!(?refusal, "settling lost jobs");
        }
        if number >= prune_at {
            let more = broker.prune_some().unwrap_or_else(|refusal| {
                tracing::error!(?refusal, "pruning");
                false
            });
            prune_at = number + if more { 1 } else { ROUNDS_PER_PRUNE };
        }
    });
}

/// A request on its way.
struct Pending {
    ipv4: Ipv4Addr,
    packet: Packet,
    kind: Kind,
}

enum Kind {
    Hello,
    Job(Ask, Box<Key>),
}

/// A socket and what it takes to use it.
struct Asker {
    broker: Arc<Broker>,
    echo: Echo,
    /// Whether the last round could not send something: said once, not every second.
    is_failing: bool,
}

impl Asker {
    fn new(broker: &Arc<Broker>) -> Result<Self, EchoError> {
        Ok(Self { broker: Arc::clone(broker), echo: Echo::open()?, is_failing: false })
    }

    /// A HELLO to node `number`. It has no tag, so the key does not matter.
    fn hello(&self, number: u32) -> (u64, Pending) {
        let nonce = u64::from_le_bytes(crate::random());
        let packet = Request::Hello.emit(nonce, &[0; 16], &Key::new(&[0; 32]));
        let ipv4 = self.broker.cluster.plan.node(number).into();
        (nonce, Pending { ipv4, packet, kind: Kind::Hello })
    }

    fn about_job(&self, ask: &Ask) -> (u64, Pending) {
        let nonce = u64::from_le_bytes(crate::random());
        let key = Party::Owner.key(&self.broker.node_key(&ask.node), &ask.job);
        let request = if ask.op == Op::Stop { Request::Stop(false) } else { Request::Status };
        let packet = request.emit_as(Party::Owner, nonce, &ask.job, &key);
        (nonce, Pending { ipv4: ask.ipv4, packet, kind: Kind::Job(*ask, Box::new(key)) })
    }

    /// Sends requests in bursts, reads answers meanwhile, and tells the broker.
    fn round(&mut self, asks: Vec<(u64, Pending)>) {
        let (mut waiting, mut heard) = (HashMap::new(), Vec::new());
        let mut failure = None;
        for (sent, (nonce, pending)) in (1..).zip(asks) {
            match self.echo.send(pending.ipv4, &pending.packet) {
                Ok(()) => drop(waiting.insert(nonce, pending)),
                Err(error) => failure = Some(anyhow::Error::from(error)),
            }
            if sent % BURST == 0 {
                self.read(&mut waiting, &mut heard, Instant::now() + BURST_TIME);
            }
        }
        match &failure {
            Some(error) if !self.is_failing => tracing::warn!("cannot send: {error:#}"),
            None if self.is_failing => tracing::info!("can send again"),
            _ => {}
        }
        self.is_failing = failure.is_some();
        self.read(&mut waiting, &mut heard, Instant::now() + ANSWER_TIME);
        if let Err(refusal) = self.broker.hear(&heard, Instant::now()) {
            tracing::error!(?refusal, "taking in what nodes said");
        }
    }

    /// Reads until the deadline or until nothing is awaited.
    fn read(
        &mut self,
        waiting: &mut HashMap<u64, Pending>,
        heard: &mut Vec<Heard>,
        deadline: Instant,
    ) {
        while !waiting.is_empty() {
            match self.echo.receive(deadline) {
                Ok(Some((from, packet))) => heard.extend(self.take(waiting, from, &packet)),
                Ok(None) => return,
                Err(error) => return tracing::warn!(%error, "receiving"),
            }
        }
    }

    /// The meaning of an answer, if it is to a request from here and its tag is right.
    fn take(
        &self,
        waiting: &mut HashMap<u64, Pending>,
        from: Ipv4Addr,
        packet: &Packet,
    ) -> Option<Heard> {
        let nonce = u64::from_le_bytes(packet[8..16].try_into().expect("8 bytes"));
        let pending = waiting.get(&nonce).filter(|pending| pending.ipv4 == from)?;
        let heard = match &pending.kind {
            Kind::Hello => Heard::Hello(self.checked_hello(from, packet, nonce)?),
            Kind::Job(ask, key) => about_job(ask, Reply::parse(packet, ask.op, nonce, Some(key))?)?,
        };
        waiting.remove(&nonce);
        Some(heard)
    }

    /// A HELLO that a node of this cluster tagged, from the address that its number has.
    fn checked_hello(&self, from: Ipv4Addr, packet: &Packet, nonce: u64) -> Option<Hello> {
        let Reply::Hello(claim) = Reply::parse(packet, Op::Hello, nonce, None)? else {
            return None;
        };
        let key = self.broker.node_key(&claim.node);
        Reply::parse(packet, Op::Hello, nonce, Some(&key))?;
        let plan = &self.broker.cluster.plan;
        let is_at_home =
            claim.number < plan.nodes_max() && Ipv4Addr::from(plan.node(claim.number)) == from;
        is_at_home.then_some(claim)
    }
}

fn about_job(ask: &Ask, reply: Reply) -> Option<Heard> {
    match reply {
        Reply::Status(status) => Some(Heard::Status(ask.job, status)),
        Reply::Stop(certificate) => Some(Heard::Certificate(ask.job, certificate)),
        Reply::Refused(_, Status::NoJob) => Some(Heard::Gone(ask.job, ask.expired)),
        _ => None,
    }
}

// A node must get several HELLOs before it counts as silent.
const _: () = assert!(ALIVE.as_millis() >= 3 * ROUND.as_millis());
