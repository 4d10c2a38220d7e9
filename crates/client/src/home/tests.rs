//! Home nodes on a market of their own: nodes that cheat, answers that get lost, brokers and home nodes that die
//! between any two steps. Time and luck come from a seed.

use super::*;
use crate::api::{self, Hex, Payment};
use crate::echo::EchoError;
use crate::job::tests::{Folder, sample};
use onde_wire::key::Key;
use onde_wire::packet::{Op, Packet, Paid, Prices as PriceList, Reply, Request, Status};
use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::rc::Rc;

const PRICES: api::Prices =
    api::Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 };
/// 0.85 tokens a second when busy.
pub(crate) const DEAL: Deal = Deal {
    mem_mib: 256,
    vcpus: 1,
    disk_mib: 0,
    value_micro: 1_000_000,
    prices: PriceList { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 },
    keep_s: 0,
};
/// Tokens in each of the job's chains: it comes to the end of several.
const CHAIN: u32 = 30;
const FIRST: u32 = 20;

/// What an honest node says of a VM of this age and processor time, seconds.
pub(crate) fn honest(age_s: u64, cpu_s: u64, last_index: u32) -> JobStatus {
    let mut status = JobStatus {
        stage: Stage::Running,
        last_index,
        age_ms: age_s * 1000,
        cpu_us: cpu_s * 1_000_000,
        mem_mib_ms: age_s * 1000 * u64::from(DEAL.mem_mib),
        has_resumed: true,
        ..JobStatus::default()
    };
    let paid = u64::from(last_index) * DEAL.value_micro;
    status.spent_micro = DEAL.cost_micro(&status).min(paid);
    status.balance_micro = paid - status.spent_micro;
    status
}

/// The last token of the chain that the token behind `index` is of.
fn chain_end(index: u32) -> u32 {
    FIRST + (index.saturating_sub(FIRST) / CHAIN + 1) * CHAIN
}

/// A token's value as it follows from the chain that ends with the token `end`.
fn chain_value(end: u32, index: u32) -> chain::Value {
    chain::walk(&[end as u8; 32], end - index)
}

/// A job that bought `sold` tokens and released so many of them.
pub(crate) fn job(sold: u32, released: u32, budget: u32) -> Job {
    let payments = vec![Payment { index: sold, value: Hex([0; 32]), renewal: None }];
    Job { sold, released, budget, payments, prices: Some(PRICES), ..sample([7; 16], None, 1) }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evil {
    /// Only what gets lost.
    None,
    /// The node charges twice.
    Overcharge,
    /// A tenth of the balance is gone.
    Thief,
    /// It claims to burn ten times what it may.
    Burn,
    /// It takes payments and denies it.
    Denies,
    /// It refuses payments.
    Refuses,
    /// It tells the same every time.
    Replays,
}

/// A node with one VM, a broker, and luck.
struct World {
    luck: u64,
    evil: Evil,
    evil_from_s: u64,
    now_s: u64,
    cpu_s: u64,
    last_index: u32,
    last_value: chain::Value,
    replayed: Option<JobStatus>,
    sold: u32,
    answers: HashMap<String, Payment>,
}

impl World {
    /// A node with a VM that was just booted.
    fn new(seed: u64, evil: Evil) -> Self {
        Self {
            luck: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            evil,
            evil_from_s: 40,
            now_s: 0,
            cpu_s: 0,
            last_index: FIRST,
            last_value: chain_value(chain_end(FIRST), FIRST),
            replayed: None,
            sold: FIRST,
            answers: HashMap::new(),
        }
    }

    /// A number below `n` (xorshift64).
    fn below(&mut self, n: u64) -> u64 {
        self.luck ^= self.luck << 13;
        self.luck ^= self.luck >> 7;
        self.luck ^= self.luck << 17;
        self.luck % n
    }

    fn is_evil(&self) -> bool {
        self.now_s >= self.evil_from_s
    }

    fn told(&mut self) -> JobStatus {
        let right = honest(self.now_s, self.cpu_s, self.last_index);
        let evil = if self.is_evil() { self.evil } else { Evil::None };
        match evil {
            Evil::None | Evil::Refuses => right,
            Evil::Overcharge => JobStatus {
                spent_micro: (2 * right.spent_micro).min(right.spent_micro + right.balance_micro),
                balance_micro: right.balance_micro.saturating_sub(right.spent_micro),
                ..right
            },
            Evil::Thief => JobStatus { balance_micro: right.balance_micro * 9 / 10, ..right },
            Evil::Burn => JobStatus { burn_micro_per_s: 10 * DEAL.burn_max_micro_per_s(), ..right },
            Evil::Denies => JobStatus {
                last_index: FIRST.min(right.last_index),
                ..honest(self.now_s, self.cpu_s, FIRST)
            },
            Evil::Replays => *self.replayed.get_or_insert(right),
        }
    }

    fn pay(&mut self, token: PaymentToken) -> Result<(), Status> {
        if self.evil == Evil::Refuses && self.is_evil() {
            return Err(Status::BadPayment);
        }
        if token.index <= self.last_index {
            return Ok(());
        }
        match chain::verify(&self.last_value, &token.value, token.index - self.last_index) {
            true => (self.last_index, self.last_value) = (token.index, token.value),
            false => return Err(Status::BadPayment),
        }
        Ok(())
    }

    fn renew(&mut self, renewal: &token::Renewal) -> Result<(), Status> {
        match renewal.index.cmp(&self.last_index) {
            Ordering::Less => {}
            Ordering::Equal => self.last_value = renewal.anchor,
            Ordering::Greater => return Err(Status::BadPayment),
        }
        Ok(())
    }

    fn sell(&mut self, request: &TokensRequest) -> Payment {
        if let Some(answer) = self.answers.get(&request.idempotency_key) {
            return *answer;
        }
        let (before, end) = (self.sold, chain_end(self.sold));
        self.sold = end.min(before + request.count);
        let anchor = Hex(chain_value(end, before));
        let renewal = Renewal { index: before, anchor, tag: Hex([0; 32]) };
        let renewal = (before > FIRST && chain_end(before - 1) == before).then_some(renewal);
        let payment =
            Payment { index: self.sold, value: Hex(chain_value(end, self.sold)), renewal };
        self.answers.insert(request.idempotency_key.clone(), payment);
        payment
    }
}

/// One home node's way to the world: each call may die before it has an effect, or after.
struct Line(Rc<RefCell<World>>);

impl Line {
    fn call<T, E>(
        &self,
        act: impl FnOnce(&mut World) -> Result<T, E>,
        lost: impl Fn() -> E,
    ) -> Result<T, E> {
        let mut world = self.0.borrow_mut();
        match world.below(8) {
            0 => Err(lost()),
            1 => act(&mut world).and(Err(lost())),
            _ => act(&mut world),
        }
    }
}

impl Exchange for Line {
    fn exchange(
        &mut self,
        node: Ipv4Addr,
        packet: &Packet,
        op: Op,
        _nonce: u64,
        _key: Option<&Key>,
        _policy: Policy,
    ) -> Result<Reply, EchoError> {
        let (request, ..) = Request::parse(packet).unwrap();
        let answer = |world: &mut World| match request {
            Request::Status => Reply::Status(world.told()),
            Request::Pay(token) => match world.pay(token) {
                Ok(()) => Reply::Pay(Paid { last_index: token.index, balance_micro: 0 }),
                Err(status) => Reply::Refused(op, status),
            },
            Request::Renew(renewal, _) => match world.renew(&renewal) {
                Ok(()) => Reply::Renew(Paid { last_index: renewal.index, balance_micro: 0 }),
                Err(status) => Reply::Refused(op, status),
            },
            other => unreachable!("{other:?}"),
        };
        self.call(|world| Ok(answer(world)), || EchoError::Silent { node })
    }
}

impl Shop for Line {
    fn tokens(&self, _: &JobId, request: &TokensRequest) -> Result<Payment, BrokerError> {
        let away = || BrokerError::Foreign { url: String::new(), status: 503 };
        self.call(|world| Ok(world.sell(request)), away)
    }

    fn prices(&self, _: u32) -> Result<Option<Prices>, BrokerError> {
        Ok(Some(PRICES))
    }
}

/// Lives through one seed: after every step nothing is overspent, and no node holds more than a release. Returns the
/// world, the job's file, and the most that a node ever held, micro-tokens.
fn live(seed: u64, evil: Evil, budget: u32) -> (Rc<RefCell<World>>, Job, u64) {
    let folder = Folder::new(&format!("home-{evil:?}-{seed}-{budget}"));
    let jobs = Jobs::open(&folder.0).unwrap();
    let mine =
        Job { sold: FIRST, released: FIRST, payments: Vec::new(), ..job(FIRST, FIRST, budget) };
    jobs.add(&mine).unwrap();
    let world = Rc::new(RefCell::new(World::new(seed, evil)));
    let line = || Line(world.clone());
    let new_home = || Home::new(line(), line(), jobs.clone(), &mine);
    let (mut home, mut held_max) = (new_home(), 0);
    for _ in 0..120 {
        let now_s = {
            let mut world = world.borrow_mut();
            world.now_s += 1;
            world.cpu_s += world.below(2);
            world.now_s
        };
        // A home node that failed is a home node that died.
        if home.step_at(Duration::from_secs(now_s), true).is_err() {
            home = new_home();
        }
        let (job, world) = (jobs.get(&mine.id.0).unwrap(), world.borrow());
        assert!(world.sold <= budget.max(FIRST), "seed {seed}: {} sold", world.sold);
        assert!(world.last_index <= job.released && job.released <= world.sold, "seed {seed}");
        let earned = honest(world.now_s, world.cpu_s, u32::MAX).spent_micro;
        let held = (u64::from(job.released) * DEAL.value_micro).saturating_sub(earned);
        held_max = held_max.max(if job.released > FIRST { held } else { 0 });
    }
    let job = jobs.get(&mine.id.0).unwrap();
    (world, job, held_max)
}

const SEEDS: std::ops::Range<u64> = 1..13;

/// A release, rounded up to a token.
fn release_micro() -> u64 {
    DEAL.busy_micro_per_s() * release::RELEASE_S + DEAL.value_micro
}

#[test]
fn an_honest_node_is_kept_paid_through_every_crash_and_loss() {
    for seed in SEEDS {
        let (world, job, held) = live(seed, Evil::None, 1500);
        let (world, cost) =
            (world.borrow(), honest(120, world.borrow().cpu_s, u32::MAX).spent_micro);
        assert!(u64::from(world.last_index) * DEAL.value_micro > cost, "seed {seed}: it ran dry");
        assert!(held <= release_micro(), "seed {seed}: {held} held");
        assert_eq!(job.distrust, None, "seed {seed}");
    }
}

#[test]
fn without_progress_nothing_is_bought_and_nothing_released() {
    let folder = Folder::new("home-progress");
    let jobs = Jobs::open(&folder.0).unwrap();
    let mine = Job { payments: Vec::new(), ..job(FIRST, FIRST, 1500) };
    jobs.add(&mine).unwrap();
    let world = Rc::new(RefCell::new(World::new(1, Evil::None)));
    let line = || Line(world.clone());
    let mut home = Home::new(line(), line(), jobs.clone(), &mine);
    // A VM of 100 s that computed for 12: its node holds less than half of a release.
    world.borrow_mut().cpu_s = 12;
    let mut step = |now_s, has_progress| {
        world.borrow_mut().now_s = now_s;
        home.step_at(Duration::from_secs(now_s), has_progress)
    };
    let told: Vec<_> = (100..140).filter_map(|now_s| step(now_s, false).ok()).collect();
    assert!(!told.is_empty() && told.iter().all(|told| matches!(told, Standing::Withheld(_))));
    assert_eq!(jobs.get(&mine.id.0).unwrap(), mine, "its file is as it was");
    assert_eq!((world.borrow().sold, world.borrow().last_index), (FIRST, FIRST));
    // An answer that says so may be lost.
    (140..180).for_each(|now_s| drop(step(now_s, true)));
    assert!(world.borrow().last_index > FIRST, "there is progress again");
}

#[test]
fn a_budget_is_never_overshot_and_used_up() {
    for seed in SEEDS {
        let (world, job, _) = live(seed, Evil::None, 37);
        assert_eq!((world.borrow().sold, world.borrow().last_index), (37, 37), "seed {seed}");
        assert_eq!(job.sold, 37);
    }
}

/// A VM with a budget of 90 tokens that is to move after 30 s, and for which both its jobs are paid from then on.
fn moves(seed: u64) {
    const BUDGET: u32 = 90;
    let folder = Folder::new(&format!("home-moves-{seed}"));
    let jobs = Jobs::open(&folder.0).unwrap();
    let old = Job { payments: Vec::new(), ..job(FIRST, FIRST, BUDGET) };
    let new = Job { id: Hex([8; 16]), budget: 0, ..old.clone() };
    jobs.add(&old).unwrap();
    let worlds = [seed, seed + 100].map(|seed| Rc::new(RefCell::new(World::new(seed, Evil::None))));
    for now_s in 1..250 {
        if now_s == 30 {
            let status = worlds[0].borrow_mut().told();
            let part = |old: &Job| old.part(&status, FIRST, 0);
            assert!(jobs.split(&old.id.0, &new, part).unwrap().is_some(), "seed {seed}");
        }
        for (job, world) in [&old, &new].into_iter().zip(&worlds).take(1 + usize::from(now_s >= 30))
        {
            let age_s = if job.id == old.id { now_s } else { now_s - 29 };
            {
                let mut world = world.borrow_mut();
                (world.now_s, world.cpu_s) = (age_s, age_s);
            }
            // A new home node each time: all that it knows is in the files.
            let line = || Line(world.clone());
            let mut home = Home::new(line(), line(), jobs.clone(), job);
            let _ = home.step_at(Duration::from_secs(age_s), true);
        }
        let seen: u32 = worlds.iter().map(|world| world.borrow().last_index).sum();
        let seen = if now_s < 30 { worlds[0].borrow().last_index } else { seen };
        assert!(seen <= BUDGET, "seed {seed}: {seen} released after {now_s} s");
    }
    let seen: u32 = worlds.iter().map(|world| world.borrow().last_index).sum();
    assert_eq!(seen, BUDGET, "seed {seed}: each had its part");
}

#[test]
fn both_jobs_of_a_vm_that_moves_share_its_budget() {
    SEEDS.for_each(moves);
}

fn check_cheat(evil: Evil, is_found: Option<bool>) {
    for seed in SEEDS {
        let (_, job, held) = live(seed, evil, 1500);
        assert!(held <= release_micro(), "{evil:?}, seed {seed}: {held} micro-tokens lost");
        let found = job.distrust.is_some();
        assert!(
            is_found.is_none_or(|is_found| found == is_found),
            "{evil:?}, {seed}: {:?}",
            job.distrust
        );
    }
}

#[test]
fn a_cheating_node_gets_one_release_at_most() {
    check_cheat(Evil::Overcharge, Some(true));
    check_cheat(Evil::Thief, Some(true));
    check_cheat(Evil::Burn, Some(true));
    // Nothing that it says is wrong; it gets the same token again, and no other.
    check_cheat(Evil::Refuses, Some(false));
    // Found out if the home node lives to see the contradiction; else as above.
    check_cheat(Evil::Replays, None);
    check_cheat(Evil::Denies, None);
}
