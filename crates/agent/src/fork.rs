//! Copies of this machine: what a snapshot and a fork have in common, and the fork itself. One FREEZE's image goes to all
//! VMs of a fork at the same time, packed once; one that fails is reported and harms no other, and the source goes
//! on whatever happens.
//!
//! ```text
//!   machine --> snapshot::take --> Branches --queue--> thread of a VM --> its loader
//!                                     '------queue--> ...
//! ```

use onde_client::bootstrap::Vacant;
use onde_client::channel::Writer;
use onde_client::session::frames::FrameWriter;
use onde_client::stream::Packer;
use onde_wire::machine::Identity;
use onde_wire::session::{AgentFrame, Round, TICKET_SIZE, Taken, Ticket};
use onde_wire::stream::Start;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use crate::children::spawn_thread;
use crate::copied::become_other;
use crate::guest::power_off;
use crate::hooks;
use crate::machine::{Devices, Machine};
use crate::session::Guest;
use crate::snapshot::{self, Failed, Outcome, Role, Sink};
use crate::target::{self, Piece, Target};

/// Packed records that may wait for each VM: with 128 KiB each, a megabyte.
const QUEUE: usize = 8;
/// The client hears something at least so often.
const NEWS: Duration = Duration::from_secs(5);

/// A copy of this machine about to be made: there is one at a time.
pub struct Copying<'a> {
    guest: &'a Guest,
    one: MutexGuard<'a, ()>,
    machine: Devices,
    identity: Identity,
    shape: Start,
}

impl<'a> Copying<'a> {
    /// Runs the hooks and finds the control device.
    pub fn begin(guest: &'a Guest) -> Result<Self, Failed> {
        let Some(one) = one(&guest.copying) else {
            let text = "another copy of this guest is being made";
            return Err(Failed::Machine(text.to_owned()));
        };
        let failed = |error| Failed::Machine(format!("this guest has no control device: {error}"));
        let mut machine = Devices::open(&guest.children.freezer).map_err(failed)?;
        let identity = machine.identity().map_err(failed)?;
        let shape = Start { job: identity.job, space: identity.space, vcpus: identity.vcpus };
        // What is held was readied in the machine that it is a copy of.
        if !guest.copied.is_held() {
            hooks::run(&guest.children, hooks::PRE_FREEZE);
        }
        Ok(Self { guest, one, machine, identity, shape })
    }

    /// The machine that is copied.
    pub fn shape(&self) -> &Start {
        &self.shape
    }

    /// The machine that is copied, from inside.
    pub fn machine(&mut self) -> &mut Devices {
        &mut self.machine
    }

    /// Copies the machine to go on elsewhere: it stays as it is at that moment ([`snapshot::undo`]).
    pub fn take_to_move(&mut self, sink: &mut impl Sink) -> Result<Outcome, Failed> {
        snapshot::take(&mut self.machine, &self.shape, sink, Role::Moved)
    }

    /// Copies the machine. `None` in the copy, which is itself now, its programs still stopped ([`crate::copied`]).
    pub fn take(mut self, sink: &mut impl Sink) -> Result<Option<(Taken, Vec<u8>)>, Failed> {
        match snapshot::take(&mut self.machine, &self.shape, sink, Role::Forked)? {
            Outcome::Source(taken, state) => return Ok(Some((taken, state))),
            Outcome::Copy => {}
        }
        let Self { guest, one, mut machine, identity: source, .. } = self;
        // Both before the copy has an address: whoever connects to it may ask for more copies, or for its release.
        guest.pocket.empty();
        drop(one);
        let own = machine.identity();
        guest.copied.set(machine.into_frozen());
        let became = own
            .map_err(anyhow::Error::from)
            .and_then(|own| become_other(guest, source.ipv4.into(), &own));
        if let Err(error) = became {
            eprintln!("onde-agent: no good copy: {error:#}");
            power_off();
        }
        Ok(None)
    }
}

/// The lock, if nobody has it.
fn one(lock: &Mutex<()>) -> Option<MutexGuard<'_, ()>> {
    match lock.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// How a VM of a fork ended: its position, and what went wrong.
type Verdict = (u32, anyhow::Result<()>);

/// Makes the VMs of `tickets`, and tells the client what became of each. `None` in a copy.
pub fn run(
    guest: &Guest,
    client: &mut FrameWriter<Writer>,
    tickets: &[u8],
) -> Result<Option<Taken>, Failed> {
    let copying = Copying::begin(guest)?;
    let loader = target::loader().map_err(|error| Failed::Machine(format!("{error:#}")))?;
    let (tell, verdicts) = channel();
    let packer = Packer::default();
    let mut branches = Branches { client, packer, queues: Vec::new(), told: None };
    let mut ready = Vec::new();
    for ((index, ticket), opened) in (0..).zip(targets(tickets)).zip(open(tickets, &loader)) {
        match (ticket, opened) {
            (Some(target), Ok(vm)) => ready.push((index, target, vm)),
            (_, Err(error)) => branches.tell(index, &Err(error))?,
            (None, Ok(_)) => unreachable!("nothing opens without a target"),
        }
    }
    for (index, target, vm) in ready {
        let (queue, pieces) = sync_channel(QUEUE);
        let (tell, shape) = (tell.clone(), *copying.shape());
        let started = spawn_thread("branch", move || {
            // The end of the fork is not waited for by a copy of this thread.
            let _ = tell.send((index, target.send(vm, &shape, &pieces)));
        });
        match started {
            Ok(()) => branches.queues.push(queue),
            Err(error) => branches.tell(index, &Err(error.into()))?,
        }
    }
    drop(tell);
    branches.copy(copying, &verdicts)
}

fn targets(tickets: &[u8]) -> impl Iterator<Item = Option<Target>> {
    tickets.chunks(TICKET_SIZE).map(|ticket| Target::parse(&Ticket::parse(ticket)?))
}

/// Opens all VMs at the same time.
fn open(tickets: &[u8], loader: &[u8]) -> Vec<anyhow::Result<Vacant>> {
    std::thread::scope(|scope| {
        let opening = targets(tickets).map(|target| {
            scope.spawn(move || match target {
                Some(target) => target.open(loader),
                None => Err(anyhow::anyhow!("a boot token of another version")),
            })
        });
        let opening: Vec<_> = opening.collect();
        opening.into_iter().map(|vm| vm.join().expect("opening a VM does not panic")).collect()
    })
}

/// The VMs that are being filled.
struct Branches<'a> {
    client: &'a mut FrameWriter<Writer>,
    packer: Packer,
    /// Of those that take what they are sent.
    queues: Vec<SyncSender<Piece>>,
    /// What the client was told last, and when.
    told: Option<(Round, Instant)>,
}

impl Branches<'_> {
    fn tell(&mut self, index: u32, verdict: &anyhow::Result<()>) -> io::Result<()> {
        let fault = verdict.as_ref().err().map_or(String::new(), |error| format!("{error:#}"));
        self.client.agent(&AgentFrame::Made { index, fault: &fault })?;
        self.client.flush()
    }

    fn copy(
        mut self,
        copying: Copying<'_>,
        verdicts: &Receiver<Verdict>,
    ) -> Result<Option<Taken>, Failed> {
        let copied = match self.queues.is_empty() {
            true => Err(Failed::Machine("no VM was made".to_owned())),
            false => copying.take(&mut self),
        };
        let taken = match copied {
            // Here the VMs are somebody else's.
            Ok(None) => return Ok(None),
            Ok(Some((taken, state))) => {
                // Where none is left, each told why.
                let _ = put(&mut self.queues, &Piece::State(Arc::new(state)));
                Ok(Some(taken))
            }
            Err(Failed::Sink(error)) => Err(Failed::Machine(error.to_string())),
            Err(error) => Err(error),
        };
        self.queues.clear();
        for (index, verdict) in verdicts {
            self.tell(index, &verdict)?;
        }
        taken
    }
}

/// Sends to all that are left. Errors: none is.
fn put(queues: &mut Vec<SyncSender<Piece>>, piece: &Piece) -> io::Result<()> {
    // One whose thread ended has told why.
    queues.retain(|queue| queue.send(piece.clone()).is_ok());
    if queues.is_empty() { Err(io::Error::other("no VM takes the copy")) } else { Ok(()) }
}

impl Sink for Branches<'_> {
    fn round(&mut self, round: Round) -> io::Result<()> {
        self.told = Some((round, Instant::now()));
        // A client that is gone ends the fork: nobody would look after the VMs.
        self.client.agent(&AgentFrame::Round(round))?;
        self.client.flush()
    }

    fn memory(&mut self, address: u64, bytes: &[u8]) -> io::Result<()> {
        // A long round is told again, so that both ends know of each other.
        if let Some((round, at)) = self.told
            && at.elapsed() >= NEWS
        {
            self.round(round)?;
        }
        let Self { packer, queues, .. } = self;
        let mut records = packer.records(address, bytes);
        records.try_for_each(|record| put(queues, &Piece::Record(Arc::new(record))))
    }
}
