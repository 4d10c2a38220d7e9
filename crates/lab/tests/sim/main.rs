//! The whole market in one process and from one seed: real nodes' state, the real broker and its ledger, real home
//! nodes and job files, and between them a network that loses, doubles and reorders, power cuts, crashes and attackers.
//! `checks` holds Onde's promises against all that happens. A failure prints its seed; `SEED=n` runs that one again and
//! prints its schedule; `SCHEDULES=n` sets how many are run (`cargo xtask sim`).

mod checks;
mod clerk;
mod customer;
mod metal;
mod migration;
mod random;
mod vm;
mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::customer::Customer;
use crate::world::{Sabotage, World};

/// Schedules in an ordinary test run: some twenty seconds.
const SCHEDULES: u64 = 2000;
/// Migrations in an ordinary test run: some seconds.
const MIGRATIONS: u64 = 20_000;
/// Schedules that share a ledger: opening a new one costs as much as a short schedule.
const SCHEDULES_PER_LEDGER: u64 = 50;
/// The troubles end after this.
const TROUBLED_MS: u64 = 35_000;
/// So long afterwards every customer has his change: a boot token that was never shown can be for two minutes.
const PATIENCE_MS: u64 = 140_000;

/// A folder in memory that is gone with its owner.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let memory = Path::new("/dev/shm");
        let temp = std::env::temp_dir();
        let base = if memory.is_dir() { memory } else { &temp };
        let dir = base.join(format!("onde-sim-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        Self(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Plays one schedule.
fn play(seed: u64, folder: &Path, sabotage: Sabotage, log: &mut Option<Vec<String>>) {
    let world = World::new(seed, folder.join("ledger.db"), sabotage, log.is_some());
    let world = Rc::new(RefCell::new(world));
    let result = catch_unwind(AssertUnwindSafe(|| live(&world, seed, folder)));
    // A panic inside a call leaves the world borrowed for ever; its log is worth having all the same.
    if let Ok(mut world) = world.try_borrow_mut() {
        *log = world.log.take();
    }
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn live(world: &Rc<RefCell<World>>, seed: u64, folder: &Path) {
    let count = world.borrow_mut().random.between(1, 3) as u8;
    let mut customers: Vec<_> =
        (0..count).map(|who| Customer::new(world, who, &format!("s{seed}"), folder)).collect();
    while let Some(due_ms) = go_on(&mut customers, world) {
        if due_ms > TROUBLED_MS {
            break;
        }
    }
    world.borrow_mut().calm();
    customers.iter_mut().for_each(Customer::calm);
    while let Some(due_ms) = go_on(&mut customers, world) {
        assert!(due_ms < TROUBLED_MS + PATIENCE_MS, "a customer waits for his change for ever");
    }
    settle_forgotten(&mut world.borrow_mut());
    let world = world.borrow();
    customers.iter().for_each(|customer| customer.check(&world));
    let broker = world.clerk.broker.as_ref().expect("it is up");
    onde_broker::audit::audit(broker.store(), None).expect("sound books");
    let checks = &world.checks;
    for (seen, count) in SEEN.iter().zip([checks.renewed, checks.sleeps, checks.purged_from_disk]) {
        seen.fetch_add(count.into(), Ordering::Relaxed);
    }
    for node in &world.nodes {
        assert!(node.vms.is_empty(), "a VM is left behind");
    }
}

/// What is rare, over all schedules: new chains, VMs that went to disk, and that were purged there.
static SEEN: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// The customer who is next does something; when that was due. `None` when all are done.
fn go_on(customers: &mut [Customer], world: &Rc<RefCell<World>>) -> Option<u64> {
    let going = customers.iter_mut().filter(|customer| !customer.is_done());
    let next = going.min_by_key(|customer| customer.due_ms)?;
    world.borrow_mut().run_until(next.due_ms, |_| false);
    next.step();
    Some(next.due_ms)
}

/// What customers forgot about is settled when the nodes' lives end.
fn settle_forgotten(world: &mut World) {
    world.sabotage = Sabotage::None;
    for index in 0..world.nodes.len() {
        world.reboot(index);
    }
    let until_ms = world.now_ms + 4000;
    world.run_until(until_ms, |_| false);
}

fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// The broken promise of a schedule, if it breaks one.
fn broken(seed: u64, folder: &Path, sabotage: Sabotage) -> Option<String> {
    let mut log = None;
    let played = catch_unwind(AssertUnwindSafe(|| play(seed, folder, sabotage, &mut log)));
    played.err().map(|panic| words(&*panic))
}

/// Plays a schedule again and prints it.
fn show(seed: u64) {
    let folder = Folder::new(&format!("again-{seed}"));
    let mut log = Some(Vec::new());
    let played = catch_unwind(AssertUnwindSafe(|| play(seed, &folder.0, Sabotage::None, &mut log)));
    log.iter().flatten().for_each(|line| eprintln!("{line}"));
    if let Err(panic) = played {
        panic!(
            "seed {seed} breaks a promise: {}\nrepeat: SEED={seed} cargo test --release -p onde-lab --test sim",
            words(&*panic)
        );
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Plays schedules on all processors until one breaks a promise: which, and what promise.
fn first_broken(seeds: std::ops::Range<u64>, sabotage: Sabotage) -> Option<(u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let run = |thread: usize| {
        let mut found = None;
        while found.is_none() {
            let start = next.fetch_add(SCHEDULES_PER_LEDGER, Ordering::Relaxed);
            if start >= seeds.end {
                break;
            }
            let folder = Folder::new(&format!("{sabotage:?}-{thread}-{start}"));
            let mut part = start..seeds.end.min(start + SCHEDULES_PER_LEDGER);
            found = part.find_map(|seed| Some((seed, broken(seed, &folder.0, sabotage)?)));
        }
        next.fetch_max(if found.is_some() { seeds.end } else { 0 }, Ordering::Relaxed);
        found
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
        threads.into_iter().filter_map(|thread| thread.join().expect("it catches all")).min()
    })
}

#[test]
fn a_migration_leaves_exactly_one_alive() {
    let count = number("SCHEDULES").unwrap_or(MIGRATIONS);
    let seeds = number("SEED").map_or(0..count, |seed| seed..seed + 1);
    let shows = number("SEED").is_some();
    let found = quietly(|| migration::first_broken(seeds.clone(), migration::Sabotage::None));
    let seed = found.as_ref().map_or(seeds.start, |(seed, _)| *seed);
    if shows || found.is_some() {
        let (_, log) = quietly(|| migration::play(seed, migration::Sabotage::None));
        log.iter().for_each(|line| eprintln!("{line}"));
    }
    if let Some((seed, promise)) = found {
        panic!("seed {seed} breaks a promise: {promise}");
    }
}

#[test]
fn each_sabotage_of_a_migration_leaves_two_or_none() {
    use migration::Sabotage::*;
    for sabotage in [JudgeSkipped, Hasty, LeaveSkipped, StopAnyway] {
        let found = quietly(|| migration::first_broken(0..20_000, sabotage));
        let (seed, promise) = found.unwrap_or_else(|| panic!("{sabotage:?} is not seen"));
        eprintln!("{sabotage:?}: seed {seed}: {promise}");
    }
}

/// Runs `act` without the words of panics that are caught: one at a time, since the hook is the process's.
fn quietly<T>(act: impl FnOnce() -> T) -> T {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let done = act();
    std::panic::set_hook(before);
    done
}

#[test]
fn the_market_keeps_its_promises() {
    if let Some(seed) = number("SEED") {
        return show(seed);
    }
    let count = number("SCHEDULES").unwrap_or(SCHEDULES);
    let found = quietly(|| first_broken(0..count, Sabotage::None));
    if let Some((seed, promise)) = found {
        eprintln!("seed {seed} breaks a promise: {promise}");
        show(seed);
        panic!("seed {seed} broke a promise, but not when it was played again: {promise}");
    }
    let seen = SEEN.each_ref().map(|seen| seen.load(Ordering::Relaxed));
    eprintln!(
        "{count} schedules: {} renewals, {} VMs saved, {} purged on disk",
        seen[0], seen[1], seen[2]
    );
    assert!(
        count < SCHEDULES || seen.iter().all(|seen| *seen > 0),
        "what never happens is not tried"
    );
}

/// The checks are worth something only if they can fail: each sabotage has to be found within some hundred schedules.
#[test]
fn each_sabotage_breaks_a_promise() {
    let sabotages = [
        // Counted twice, or given back as never counted.
        (Sabotage::SameIncarnation, ["a boot token was counted twice", "story.is_none()"]),
        (Sabotage::LateTimer, ["a VM runs unpaid", "on disk unpaid"]),
        // A boot token may be altered in its prices, too.
        (Sabotage::Tags, ["a VM that nobody bought", "charged something else than the use"]),
    ];
    for (sabotage, expect) in sabotages {
        let found = quietly(|| first_broken(0..2000, sabotage));
        let (seed, promise) = found.expect("a broken promise");
        eprintln!("{sabotage:?}: seed {seed}: {promise}");
        let is_expected = expect.iter().any(|expect| promise.contains(expect));
        assert!(is_expected, "{sabotage:?}: {promise}");
    }
}
