//! A customer: buys, boots, pays through the real home node with its real job files, stops, redeems. He crashes at
//! any call and comes back with what his files say, and he cheats where he can.

use std::cell::{Cell, RefCell};
use std::net::Ipv4Addr;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use onde_client::api::{
    AccountRequest, CreditRequest, Hex, JobOpened, JobRequest, NodeChoice, Payment, Prices,
    SettledBy, TokensRequest,
};
use onde_client::broker::BrokerError;
use onde_client::echo::{EchoError, Exchange, Policy};
use onde_client::home::{Home, Shop, Standing};
use onde_client::job::{Job, Jobs};
use onde_client::node::{Handle, NodeError};
use onde_wire::chain;
use onde_wire::cluster::TOKEN_MICRO;
use onde_wire::key::Key;
use onde_wire::packet::{self, Op, Packet, Reply, Request, Status};
use onde_wire::token::{BootToken, CERTIFICATE_SIZE, JobId, PaymentToken, Renewal};

use crate::metal::PRICES;
use crate::world::{Lost, World};

/// Money in every account.
pub const MONEY_MICRO: u64 = 400 * TOKEN_MICRO;
/// Tries of an HTTP call, as the client's.
const TRIES: u32 = 3;

/// A customer's line to the world. It breaks after so many calls: that is how he crashes.
#[derive(Clone)]
struct Line {
    world: Rc<RefCell<World>>,
    who: u8,
    account: String,
    calls_left: Rc<Cell<u32>>,
}

impl Line {
    /// Counts a call; false when the customer is dead.
    fn lives(&self) -> bool {
        let left = self.calls_left.get();
        self.calls_left.set(left.saturating_sub(1));
        left > 0
    }

    fn call<T: PartialEq>(
        &self,
        act: impl Fn(
            &onde_broker::Broker,
            &str,
            std::time::Instant,
        ) -> Result<T, onde_broker::refusal::Refusal>,
        mut done: impl FnMut(&mut crate::checks::Checks, &T),
    ) -> Result<T, BrokerError> {
        for _ in 0..TRIES {
            if !self.lives() {
                break;
            }
            let mut world = self.world.borrow_mut();
            match world.call(|broker, now| act(broker, &self.account, now), &mut done) {
                Ok(answer) => {
                    return answer.map_err(|refusal| BrokerError::Refused(refusal.failure()));
                }
                Err(Lost) => {
                    let until_ms = world.now_ms + 250;
                    world.run_until(until_ms, |_| false);
                }
            }
        }
        Err(BrokerError::Foreign { url: String::new(), status: 503 })
    }
}

impl Exchange for Line {
    fn exchange(
        &mut self,
        node: Ipv4Addr,
        packet: &Packet,
        op: Op,
        nonce: u64,
        key: Option<&Key>,
        policy: Policy,
    ) -> Result<Reply, EchoError> {
        let number = u32::from(node.octets()[2]);
        let mut wait = policy.first;
        for _ in 0..policy.tries {
            if !self.lives() {
                break;
            }
            let mut world = self.world.borrow_mut();
            world.send(number, self.who, *packet);
            let (until_ms, who) = (world.now_ms + wait.as_millis() as u64, self.who);
            let mut reply = None;
            world.run_until(until_ms, |world| {
                let inbox = world.inboxes.entry(who).or_default();
                while let Some((from, payload)) = inbox.pop_front() {
                    let parsed = Reply::parse(&payload, op, nonce, key);
                    reply = reply.or(parsed.filter(|_| from == node));
                }
                reply.is_some()
            });
            match reply {
                Some(reply) => return Ok(reply),
                None => wait *= 2,
            }
        }
        Err(EchoError::Silent { node })
    }
}

impl Shop for Line {
    fn tokens(&self, job: &JobId, request: &TokensRequest) -> Result<Payment, BrokerError> {
        self.call(
            |broker, account, _| broker.sell_tokens(account, job, request),
            |checks, payment| checks.sold(*job, payment.index, Some(payment.value.0)),
        )
    }

    fn prices(&self, _: u32) -> Result<Option<Prices>, BrokerError> {
        let packet::Prices { vcpu_s, gib_s, gib_sent, disk_gib_s } = PRICES;
        Ok(Some(Prices { vcpu_s, gib_s, gib_sent, disk_gib_s }))
    }
}

enum State {
    Shopping(Box<JobRequest>),
    Booting(Box<JobOpened>),
    Running(Box<Home<Line, Line>>),
    Settling,
    /// Dead; back at this time, if at all.
    Down(Option<u64>),
    Done,
}

pub struct Customer {
    line: Line,
    jobs: Jobs,
    state: State,
    job: Option<Job>,
    /// When he does something next, and when he has had enough of his job.
    pub due_ms: u64,
    enough_ms: u64,
    budget: u32,
    cheats: bool,
    boot_token: Option<BootToken>,
}

impl Customer {
    pub fn new(world: &Rc<RefCell<World>>, who: u8, name: &str, dir: &Path) -> Self {
        let mut it = world.borrow_mut();
        let account = format!("{name}-{who}");
        let broker = it.clerk.broker.as_ref().expect("it begins with a broker");
        broker.open_account(&AccountRequest { name: account.clone() }).expect("a new account");
        let credit = CreditRequest { idempotency_key: account.clone(), micro: MONEY_MICRO };
        broker.credit_account(&account, &credit).expect("credited");
        let random = &mut it.random;
        let tokens = random.between(1, 12) as u32;
        let node = random.one_in(2).then_some(NodeChoice::Number(0));
        let request = JobRequest {
            idempotency_key: format!("open {account}"),
            node,
            mem_mib: [64, 128, 256][random.index(3)],
            vcpus: random.between(1, 2) as u16,
            disk_mib: 0,
            net_kib_s: 0,
            loader_sha256: Hex([3; 32]),
            tokens,
            moves: None,
            template: false,
            clones: None,
        };
        let calls_left = if random.one_in(3) { random.between(1, 40) as u32 } else { u32::MAX };
        let due_ms = random.between(1000, 4000);
        Self {
            jobs: Jobs::open(&dir.join(&account)).expect("a folder for job files"),
            state: State::Shopping(Box::new(request)),
            job: None,
            due_ms,
            enough_ms: due_ms + random.between(500, 25_000),
            budget: tokens + random.between(0, 80) as u32,
            cheats: random.one_in(2),
            boot_token: None,
            line: Line {
                world: Rc::clone(world),
                who,
                account,
                calls_left: Rc::new(Cell::new(calls_left)),
            },
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    fn now_ms(&self) -> u64 {
        self.line.world.borrow().now_ms
    }

    fn note(&self, text: impl FnOnce() -> String) {
        let who = self.line.who;
        self.line.world.borrow_mut().note(|| format!("customer {who}: {}", text()));
    }

    /// No more crashes and no more cheating, and the job ends now.
    pub fn calm(&mut self) {
        self.line.calls_left.set(u32::MAX);
        self.enough_ms = 0;
        if let State::Down(back_ms) = &mut self.state {
            *back_ms = Some(0);
        }
    }

    /// Does the next thing.
    pub fn step(&mut self) {
        let before = std::mem::replace(&mut self.state, State::Done);
        self.state = match before {
            State::Shopping(request) => self.shop(request),
            State::Booting(opened) => self.boot(opened),
            State::Running(home) => self.run(home),
            State::Settling => self.settle(),
            State::Down(Some(back_ms)) if back_ms <= self.now_ms() => self.come_back(),
            other => other,
        };
        if self.line.calls_left.get() == 0 && !self.is_done() {
            self.crash();
        }
        let pause_ms = self.line.world.borrow_mut().random.between(300, 1300);
        self.due_ms = self.now_ms() + pause_ms;
    }

    fn crash(&mut self) {
        let now_ms = self.now_ms();
        self.note(|| "crashes".into());
        let random = &mut self.line.world.borrow_mut().random;
        let back_ms = (!random.one_in(4)).then(|| now_ms + random.between(100, 10_000));
        self.state = State::Down(back_ms);
    }

    /// What a new home node finds: its job files.
    fn come_back(&mut self) -> State {
        let random = &mut self.line.world.borrow_mut().random;
        let calls_left = if random.one_in(3) { random.between(1, 40) as u32 } else { u32::MAX };
        self.line.calls_left.set(calls_left);
        let job =
            self.jobs.list().expect("job files").into_iter().find(|job| job.settled.is_none());
        self.job = job;
        match &self.job {
            Some(job) => State::Running(Box::new(self.home(job))),
            None => State::Done,
        }
    }

    fn home(&self, job: &Job) -> Home<Line, Line> {
        Home::new(self.line.clone(), self.line.clone(), self.jobs.clone(), job)
    }

    fn shop(&mut self, request: Box<JobRequest>) -> State {
        let opened = self.line.call(
            |broker, account, now| broker.open_job(account, &request, now),
            |checks, opened| checks.sold(opened.job.id.0, opened.job.first_count, None),
        );
        match opened {
            Ok(opened) => {
                self.note(|| {
                    format!("bought {} tokens on node {}", opened.job.first_count, opened.job.node)
                });
                let job = Job::new(&opened, "", "", self.budget);
                self.jobs.add(&job).expect("a job file");
                self.job = Some(job);
                State::Booting(Box::new(opened))
            }
            // No node was heard of yet, or none has room.
            Err(error) if error.word() == Some("no_fitting_node") => self.shop_again(request),
            Err(error) if error.word() == Some("not_found") => self.shop_again(request),
            // The broker forgot its answer: the money comes back by itself.
            Err(error) if error.word() == Some("key_reused") => State::Done,
            Err(error) if error.word().is_some() => panic!("a sale was refused: {error}"),
            Err(_) => self.shop_again(request),
        }
    }

    fn shop_again(&self, request: Box<JobRequest>) -> State {
        // He may never learn that he bought something: the broker has to give it back by itself.
        if self.now_ms() > self.enough_ms { State::Done } else { State::Shopping(request) }
    }

    fn handle(&self) -> Handle {
        self.job.as_ref().expect("a job").handle()
    }

    fn boot(&mut self, opened: Box<JobOpened>) -> State {
        let token = BootToken::parse(&opened.boot_token.0).expect("a boot token");
        self.boot_token = Some(token);
        match self.handle().boot(&mut self.line, token, opened.boot_tag.0) {
            Ok(booted) => {
                self.note(|| format!("booted with {}", booted.balance_micro));
                let job = self.job.clone().expect("a job");
                State::Running(Box::new(self.home(&job)))
            }
            Err(error) if error.is_silence() && self.now_ms() < self.enough_ms => {
                State::Booting(opened)
            }
            Err(error) => {
                self.note(|| format!("not booted: {error}"));
                State::Settling
            }
        }
    }

    fn run(&mut self, mut home: Box<Home<Line, Line>>) -> State {
        if self.now_ms() >= self.enough_ms {
            return State::Settling;
        }
        if self.cheats {
            self.cheat();
        }
        self.sleep_or_wake();
        let (now, has_progress) = (Duration::from_millis(self.now_ms()), self.has_progress());
        match home.step_at(now, has_progress) {
            Ok(Standing::Over(status)) => {
                self.note(|| format!("is told that it is over: {:?}", status.end));
                State::Settling
            }
            Ok(Standing::Distrusted(status, why)) if !self.cheats => {
                panic!("an honest node is called a cheat: {why}: {status:?}")
            }
            Ok(standing) => {
                self.note(|| format!("{standing:?}"));
                State::Running(home)
            }
            Err(error) => {
                self.note(|| format!("home: {error}"));
                match self.now_ms() >= self.enough_ms {
                    true => State::Settling,
                    false => State::Running(home),
                }
            }
        }
    }

    /// Now and then he puts his VM on disk, or wakes it up, and does not care whether that worked.
    fn sleep_or_wake(&mut self) {
        let dice = self.line.world.borrow_mut().random.index(24);
        let handle = self.handle();
        let _ = match dice {
            0 => handle.suspend(&mut self.line),
            1 => handle.wake(&mut self.line),
            _ => return,
        };
    }

    /// Whether his program does what he wants to pay for: mostly.
    fn has_progress(&self) -> bool {
        !self.line.world.borrow_mut().random.one_in(8)
    }

    /// Sends what he hopes will be counted in his favour. He has the job's key, so the tags are right.
    fn cheat(&mut self) {
        let handle = self.handle();
        let number = u32::from(handle.node.octets()[2]);
        let mut world = self.line.world.borrow_mut();
        let values: Vec<_> =
            world.checks.values.iter().filter(|((job, _), _)| *job == handle.job).collect();
        let newest = values.iter().max_by_key(|((_, index), _)| *index);
        let (index, value) = newest.map_or((0, [1; 32]), |((_, index), value)| (*index, **value));
        let mut wrong = value;
        wrong[0] ^= 1;
        let pays = [
            (0, value),
            (index, wrong),
            (index + 1, value),
            (u32::MAX, value),
            (1, value),
            (index, value),
        ];
        let (index, value) = pays[world.random.index(pays.len())];
        let nonce = world.random.next();
        let request = match self.boot_token {
            // With the tag of another token, and with his own of old.
            Some(token) if world.random.one_in(4) => {
                Request::Boot(BootToken { first_count: token.first_count + 5, ..token }, [0; 32])
            }
            // A chain of his own, behind the tokens that he was sold.
            _ if world.random.one_in(4) => {
                let own = Renewal { index, anchor: chain::walk(&value, 9) };
                Request::Renew(own, own.sign(&handle.key, &handle.job, &[0; 16]))
            }
            _ => Request::Pay(PaymentToken { index, value }),
        };
        let packet = request.emit(nonce, &handle.job, &handle.key);
        let who = self.line.who;
        world.note(|| format!("customer {who} cheats: {:?} {index}", request.op()));
        world.send(number, who, packet);
    }

    /// As `onde` does it at the end of a job.
    fn settle(&mut self) -> State {
        let job = self.job.clone().expect("a job");
        let id = job.id.0;
        let told = match self.handle().stop(&mut self.line) {
            Ok(certificate) => {
                if self.cheats {
                    self.cheat_broker(&id, &certificate);
                }
                self.line
                    .call(|broker, account, _| broker.redeem(account, &id, &certificate), |_, _| ())
            }
            Err(error) if is_gone(&error) => {
                self.line.call(|broker, account, _| broker.job(account, &id), |_, _| ())
            }
            Err(error) => panic!("STOP was refused: {error}"),
        };
        match told {
            Ok(told) if told.settled_by.is_some() => {
                self.note(|| {
                    format!("settled by {:?}, {} back", told.settled_by, told.refund_micro)
                });
                self.jobs.update(&id, |job| job.settle(&told)).expect("a job file");
                State::Done
            }
            Ok(_) => State::Settling,
            Err(error) if error.word().is_some() => panic!("redeeming was refused: {error}"),
            Err(_) => State::Settling,
        }
    }

    /// Alters the certificate, and hands it in for others' jobs and in others' names.
    fn cheat_broker(&mut self, id: &JobId, certificate: &[u8; CERTIFICATE_SIZE]) {
        let mut world = self.line.world.borrow_mut();
        let bit = world.random.index(CERTIFICATE_SIZE * 8);
        let others: Vec<_> =
            world.checks.sold.keys().filter(|other| *other != id).copied().collect();
        let Some(broker) = &world.clerk.broker else { return };
        let mut altered = *certificate;
        altered[bit / 8] ^= 1 << (bit % 8);
        assert!(broker.redeem(&self.line.account, id, &altered).is_err(), "bit {bit} altered");
        assert!(broker.redeem("nobody", id, certificate).is_err());
        for other in others {
            assert!(broker.redeem(&self.line.account, &other, certificate).is_err());
        }
    }

    /// What the account and its jobs have to say when all is over.
    pub fn check(&self, world: &World) {
        let broker = world.clerk.broker.as_ref().expect("it is up");
        let jobs = broker.jobs(&self.line.account, false, i64::MAX, 500).expect("a list").jobs;
        let mut expect = MONEY_MICRO;
        for job in &jobs {
            let (id, paid) = (job.id.0, u64::from(job.sold) * job.value_micro);
            let by = job.settled_by.unwrap_or_else(|| panic!("a job is not settled: {job:?}"));
            assert_eq!(world.checks.sold[&id], job.sold, "sold another count than was bought");
            assert!(job.sold <= self.budget.max(job.first_count), "over the budget");
            let story = world.checks.stories.get(&id);
            let spent = story.map_or(0, |story| {
                story.cost_micro.min(u64::from(story.accepted) * job.value_micro)
            });
            match by {
                SettledBy::Certificate => {
                    assert_eq!(job.refund_micro, paid - spent, "change was lost")
                }
                SettledBy::Unused => assert!(story.is_none() && job.refund_micro == paid),
                SettledBy::NodeRestarted | SettledBy::NodeSilent => {
                    assert!((paid - spent..=paid).contains(&job.refund_micro), "change was lost");
                }
            }
            expect = expect + job.refund_micro - paid;
        }
        let account = broker.account(&self.line.account, i64::MAX, 500).expect("an account");
        assert_eq!(account.balance_micro, expect, "the books do not balance");
        let entries: i64 = account.entries.iter().map(|entry| entry.delta_micro).sum();
        assert_eq!(entries, expect as i64, "the journal does not add up");
    }
}

/// Whether the node has nothing to certify, as `onde` judges it.
fn is_gone(error: &NodeError) -> bool {
    error.is_silence() || error.refusal() == Some(Status::NoJob)
}
