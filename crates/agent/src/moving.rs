//! This machine moves to another node: it makes the VM there, sends itself, and ends once the judge said that its copy
//! lives ([`onde_client::migration`]). In the copy, the machine says where it is now, and its programs and
//! connections go on. Whatever fails, exactly one of the two goes on.
//!
//! ```text
//!   source: BOOT, loader, rounds | FREEZE, rest, END | asks the judge  -> COMMIT or ABORT
//!   copy:                                            | programs run; announces itself, new key, hooks
//! ```

use onde_client::bootstrap::{self, Vacant};
use onde_client::channel::{Reader, Writer};
use onde_client::echo::{Echo, Policy};
use onde_client::migration::{Act, Event, Source, Word};
use onde_client::node::Handle;
use onde_client::session::frames::FrameWriter;
use onde_client::stream::StreamWriter;
use onde_sys::inet::unacknowledged;
use onde_wire::bootstrap::{REPORT_SIZE, Report};
use onde_wire::machine::Identity;
use onde_wire::machine::control::{REG_COMMIT, REG_FLOW, REG_JUDGE};
use onde_wire::session::{AgentFrame, Round, Ticket};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use crate::children::spawn_thread;
use crate::fork::Copying;
use crate::hooks;
use crate::machine::Machine;
use crate::network;
use crate::session::Guest;
use crate::snapshot::{self, FEW, Failed, Outcome, Sink};
use crate::target::{self, Target};

/// One question to the judge: it is asked again anyway.
const QUESTION: Policy = Policy { tries: 1, first: Duration::from_millis(200) };
/// A client that takes no word for so long hears no more.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of the stream that are under way at once in a round that may be the last one before FREEZE. The kernel keeps them in
/// pages of its own, which have to be copied again, and they are noise that does not pack: it takes the same pages for the next
/// ones only once the peer has all of these.
const IN_FLIGHT: u64 = 12 << 10;
/// The first round is most of the work and no race, since what is written meanwhile is sent again anyway: the machine's programs
/// come first. With so much less weight (sched(7), a step is a factor of 1.25) it takes a ninth of a processor that they want, too.
const YIELDING: i32 = 9;
/// Later rounds are a race with those who write, but not for the whole of a processor: with this weight it gets a quarter of one
/// that they want, too.
const RACING: i32 = 5;
/// Frozen, all others wait for the end of the stream, and nobody hears of what they do meanwhile.
const HURRYING: i32 = -20;
/// About as long as an acknowledgement takes within a building: nothing tells that it is there.
const ROUND_TRIP: Duration = Duration::from_micros(200);
/// How long FREEZE waits for an acknowledgement: it is better without, and right with it.
const ACKNOWLEDGED_TIMEOUT: Duration = Duration::from_millis(50);
/// How long the new VM may take nothing of what is sent frozen. Its node is gone then, and this machine goes on before those
/// who talk to it give it up: many times what a busy node needs for an answer. The longer, the further apart are all tries of TCP to
/// reach it again.
const FROZEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two words on how far a round is.
const PROGRESS: Duration = Duration::from_millis(250);
/// When the copy announces itself after its VMM did: an announcement that got lost must not cost a connection its life.
const ANNOUNCEMENTS: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(400), Duration::from_millis(1500)];

/// Moves this machine to the VM of `ticket`. Returns well in the copy only: then [`settle_in`] is due.
pub fn run(guest: &Guest, client: &mut FrameWriter<Writer>, ticket: &[u8]) -> Result<(), Failed> {
    let words = |error: anyhow::Error| Failed::Machine(format!("{error:#}"));
    let target = Ticket::parse(ticket).and_then(|ticket| Target::parse(&ticket));
    let target = target.ok_or(Failed::Machine("a boot token of another version".to_owned()))?;
    let mut copying = Copying::begin(guest)?;
    client.stream().set_timeout(Some(CLIENT_TIMEOUT))?;
    let loader = target::loader().map_err(words)?;
    let mut judge = Judge::open(&target.handle).map_err(words)?;
    let mut vm = target.open(&loader).map_err(words)?;
    let ends = vm.writer().ends()?;
    let moved = network::hold_neighbours(true).map_err(Failed::from).and_then(|()| {
        permit(copying.machine(), ends, target.handle.node)?;
        let start = target.start(copying.shape());
        let stream = StreamWriter::start(vm.writer(), &start)?;
        let mut road = Road::new(client, stream);
        match copying.take_to_move(&mut road)? {
            Outcome::Copy => Ok(None),
            Outcome::Source(_, state) => Ok(Some(road.end(&state))),
        }
    });
    match moved {
        Ok(None) => arrive(guest, copying.machine()),
        Ok(Some(ended)) => {
            // What they do from here on nobody hears of, unless the copy does not live.
            if let Err(error) = copying.machine().stop_programs() {
                eprintln!("onde-agent: programs run on: {error}");
            }
            let Some(why) = judge.settle(ended, &mut vm) else {
                copying.machine().command(REG_COMMIT, 1);
                // The machine ends here; whatever became of that, it never goes on.
                loop {
                    std::thread::park();
                }
            };
            snapshot::undo(copying.machine());
            calm_down();
            Err(Failed::Machine(why))
        }
        Err(failed) => {
            calm_down();
            Err(explain(vm, failed))
        }
    }
}

/// The move is over: neighbours are asked as usual, and this thread is one of many.
fn calm_down() {
    // A kernel that took the other value takes this one.
    let _ = network::hold_neighbours(false);
    take_turns(0);
}

/// How much of a processor this thread gets that others want, too. Where that cannot be said, a move takes what it takes.
fn take_turns(nice: i32) {
    let _ = rustix::process::setpriority_process(None, nice);
}

/// Why the stream broke, by the loader's own words where it left some.
fn explain(vm: Vacant, failed: Failed) -> Failed {
    match failed {
        Failed::Sink(error) => match vm.finish::<()>(Err(error)) {
            Err(error) => Failed::Machine(format!("{:#}", anyhow::Error::from(error))),
            Ok(()) => Failed::Machine("the stream broke".to_owned()),
        },
        machine => machine,
    }
}

/// Tells the VMM what leaves after FREEZE: the connection that the stream is on, and questions to the judge.
fn permit(
    machine: &mut impl Machine,
    (own, peer): (SocketAddr, SocketAddr),
    judge: Ipv4Addr,
) -> Result<(), Failed> {
    let IpAddr::V4(address) = peer.ip() else {
        return Err(Failed::Machine("the new VM has no IPv4 address".to_owned()));
    };
    let ([p, q], [r, s]) = (peer.port().to_be_bytes(), own.port().to_be_bytes());
    machine.command(REG_FLOW, u32::from_le_bytes(address.octets()));
    machine.command(REG_FLOW + 4, u32::from_le_bytes([p, q, r, s]));
    machine.command(REG_JUDGE, u32::from_le_bytes(judge.octets()));
    Ok(())
}

/// The way of the stream, and what the client hears of it.
struct Road<'a> {
    client: &'a mut FrameWriter<Writer>,
    stream: StreamWriter<&'a mut Writer>,
    pages_left: u64,
    told: Instant,
    /// In a round that may be the last one before FREEZE: how many bytes of the stream the peer has.
    arrived: Option<u64>,
    is_frozen: bool,
    /// Nothing more is told: the client is gone, which is no reason to stay, or this machine is frozen.
    is_silent: bool,
}

impl<'a> Road<'a> {
    fn new(client: &'a mut FrameWriter<Writer>, stream: StreamWriter<&'a mut Writer>) -> Self {
        let told = Instant::now();
        Self {
            client,
            stream,
            pages_left: 0,
            told,
            arrived: None,
            is_frozen: false,
            is_silent: false,
        }
    }

    fn tell(&mut self, frame: &AgentFrame<'_>) {
        self.told = Instant::now();
        let is_gone = |client: &mut FrameWriter<Writer>| {
            client.agent(frame).and_then(|()| client.flush()).is_err()
        };
        self.is_silent = self.is_silent || is_gone(self.client);
    }

    /// Leaves nothing of the stream so far in memory, where it would be copied, too; how many bytes of it the peer has.
    fn wipe(&mut self) -> io::Result<u64> {
        self.stream.wipe();
        self.stream.out().flush_and_wipe()?;
        await_acknowledged(self.stream.out());
        Ok(self.stream.sent())
    }

    /// The rest of the stream. What it returns tells whether its last byte may be on its way.
    fn end(mut self, state: &[u8]) -> Event {
        match self.stream.moved(state) {
            Err(_) => Event::Failed,
            Ok(()) => match self.stream.end() {
                Ok(_) => Event::Given,
                // Some of it may have been handed over.
                Err(_) => Event::Broken,
            },
        }
    }
}

impl Sink for Road<'_> {
    fn round(&mut self, round: Round) -> io::Result<()> {
        self.pages_left = round.pages;
        let is_careful = round.pages <= FEW && !self.is_frozen;
        self.arrived = if is_careful { Some(self.wipe()?) } else { None };
        if !self.is_frozen {
            take_turns(match round.number {
                0 => YIELDING,
                _ if is_careful => 0,
                _ => RACING,
            });
        }
        self.tell(&AgentFrame::Round(round));
        Ok(())
    }

    fn memory(&mut self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.stream.memory(address, bytes)?;
        if self.arrived.is_some_and(|arrived| self.stream.sent() - arrived >= IN_FLIGHT) {
            self.stream.out().flush()?;
            await_acknowledged(self.stream.out());
            self.arrived = Some(self.stream.sent());
        }
        self.pages_left =
            self.pages_left.saturating_sub(bytes.len() as u64 / onde_wire::machine::PAGE_SIZE);
        if self.told.elapsed() >= PROGRESS {
            let (pages_left, bytes) = (self.pages_left, self.stream.sent());
            self.tell(&AgentFrame::Sent { pages_left, bytes });
        }
        Ok(())
    }

    fn stopping(&mut self) {
        self.tell(&AgentFrame::Stopped);
    }

    fn freezing(&mut self) {
        // The client's measure of the pause begins here.
        let bytes = self.stream.sent();
        self.tell(&AgentFrame::Sent { pages_left: self.pages_left, bytes });
        self.is_silent = true;
        // What breaks here breaks again at the next record.
        let _ = self.wipe();
        // A kernel that refuses keeps its own, longer time.
        let _ = self.stream.out().set_patience(FROZEN_TIMEOUT);
    }

    fn frozen(&mut self) {
        self.is_frozen = true;
        take_turns(HURRYING);
    }
}

/// Waits until the peer has all of it: the kernel would send the rest again in the copy, before anything else.
fn await_acknowledged(out: &Writer) {
    let begun = Instant::now();
    while begun.elapsed() < ACKNOWLEDGED_TIMEOUT && matches!(unacknowledged(out), Ok(1..)) {
        std::thread::sleep(ROUND_TRIP);
    }
}

/// Who knows whether the copy lives: its node.
struct Judge {
    handle: Handle,
    echo: Echo,
}

impl Judge {
    fn open(handle: &Handle) -> anyhow::Result<Self> {
        Ok(Self { handle: handle.clone(), echo: Echo::open()? })
    }

    /// Waits until it is sure which of the two machines lives; `ended` is how the stream ended. `None`: the copy.
    fn settle(&mut self, ended: Event, vm: &mut Vacant) -> Option<String> {
        let (begun, mut source) = (Instant::now(), Source::Sending);
        let now_ms = || begun.elapsed().as_millis() as u64;
        let mut ear = Ear { reader: vm.reader(), is_deaf: false, refusal: None };
        // A stream whose end broke may be whole: as one that is.
        let mut next = (ended == Event::Broken).then_some(Event::Broken);
        let mut event = if next.is_some() { Event::Given } else { ended };
        loop {
            event = match source.step(now_ms(), event) {
                Act::Ask => self.ask(),
                Act::Stop => self.stop(),
                Act::Wait(until_ms) => {
                    ear.listen(Duration::from_millis(until_ms.saturating_sub(now_ms())))
                }
                Act::Commit => return None,
                Act::Abort => return Some(ear.why(ended)),
            };
            if let (Event::Tick, Some(broken)) = (event, next) {
                (event, next) = (broken, None);
            }
        }
    }

    fn ask(&mut self) -> Event {
        heard(Word::of_status(&self.handle.status(&mut self.echo, QUESTION)))
    }

    fn stop(&mut self) -> Event {
        heard(Word::of_stop(&self.handle.stop_unless_resumed(&mut self.echo, QUESTION)))
    }
}

fn heard(word: Option<Word>) -> Event {
    word.map_or(Event::Tick, Event::Heard)
}

/// What comes back on the stream's connection.
struct Ear<'a> {
    reader: &'a mut Reader,
    /// Nothing of interest comes any more.
    is_deaf: bool,
    /// Why the copy cannot live, in the loader's words.
    refusal: Option<String>,
}

impl Ear<'_> {
    /// Listens for so long.
    fn listen(&mut self, time: Duration) -> Event {
        // Zero would be for ever.
        let time = time.max(Duration::from_millis(1));
        if self.is_deaf || self.reader.set_timeout(Some(time)).is_err() {
            // Nothing else tells when it is time to ask again.
            std::thread::sleep(time);
            return Event::Tick;
        }
        let mut report = [0; REPORT_SIZE];
        match self.reader.read(&mut report) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Event::Tick;
            }
            // It says so before RESUME, which the judge knows better.
            Ok(REPORT_SIZE) if Report::parse(&report) == Some(Report::StreamOk) => {
                return Event::Tick;
            }
            Ok(REPORT_SIZE) => {
                let refusal = Report::parse(&report).and_then(bootstrap::refusal);
                self.refusal = refusal.map(|error| error.to_string());
            }
            _ => {}
        }
        self.is_deaf = true;
        Event::Broken
    }

    /// Why this machine goes on.
    fn why(self, ended: Event) -> String {
        let broke = || match ended {
            Event::Failed => "the connection to the new VM broke".to_owned(),
            _ => "the copy did not come to life".to_owned(),
        };
        self.refusal.unwrap_or_else(broke)
    }
}

/// The copy, which is the machine from now on: what its programs and its client wait for.
fn arrive(guest: &Guest, machine: &mut impl Machine) -> Result<(), Failed> {
    // Programs come first: they answer who waits for an answer.
    take_turns(YIELDING);
    rustix::thread::sched_yield();
    let identity = machine.identity()?;
    // Tokens of the old job's chain buy nothing here.
    guest.pocket.empty();
    // Those that wrote faster than could be copied; all others run already.
    machine.start_programs();
    guest.door.move_to(identity.job, &identity.job_key);
    Ok(())
}

fn hex(identity: &Identity) -> String {
    identity.job[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn announce_again(identity: Identity) {
    // Without a thread the VMM's announcement has to do.
    let _ = spawn_thread("announce", move || {
        for pause in ANNOUNCEMENTS {
            // Nothing tells whether it is needed.
            std::thread::sleep(pause);
            let _ = network::announce(&identity);
        }
    });
}

/// What else there is to do in a machine that moved, once its client knows.
pub fn settle_in(guest: &Guest) {
    calm_down();
    if let Ok(identity) = crate::guest::identity() {
        println!("onde-agent: moved to job {}", hex(&identity));
        announce_again(identity);
    }
    hooks::run(&guest.children, hooks::MOVED);
}
