//! Clones of a template beside a cold boot of the same guest on the same node: how long one takes, how many a second,
//! how much memory each holds, and how many live at once, up to `ONDE_BENCH_CLONES` on a node of `ONDE_BENCH_NODE_MIB`.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use onde_client::api::{Clones, Hex, Job, JobRequest};
use onde_client::bootstrap;
use onde_client::broker::new_key;
use onde_client::echo::Echo;
use onde_client::node::Handle;
use onde_lab::progress::Step;
use onde_lab::{Shape, programs};
use onde_wire::key::Key;
use onde_wire::token::BootToken;

use super::{Bench, Figure, NODE_MIB, RUNS, SETTLE, median, numbers};

/// Memory of the guest, MiB: a kernel, the agent and one small program.
const GUEST_MIB: u32 = 96;
/// What each clone may hold for itself, MiB.
const HELD_MIB: u32 = 16;
/// Clones alive at once, where nothing else is said: what a bench of minutes has time for.
const CLONES: u32 = 32;
/// Clones started at once.
const AT_ONCE: u32 = 4;
const WAKE_MAX: Duration = Duration::from_secs(30);
/// Tokens for each: more than a clone that idles uses meanwhile.
const TOKENS: u32 = 60;

/// Measures all of it on a lab of one node.
pub fn run() -> Result<Vec<Figure>> {
    let wanted = number("ONDE_BENCH_CLONES", CLONES)?;
    let memory_mib = number("ONDE_BENCH_NODE_MIB", NODE_MIB)?;
    let bench = Bench::up_with(&Shape { nodes: 1, memory_mib, vcpus: 2, ..Shape::default() }, 0)?;
    onde(&bench, &["account", "use", &bench.account, "--broker", &bench.lab.broker_url()?])?;
    let colds: Vec<_> = (0..RUNS).map(|_| cold(&bench)).collect::<Result<_>>()?;
    let template = template(&bench)?;
    let (mut starts, mut answers, mut orders) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let clone = clone(&bench, &template)?;
        starts.push(clone.started.as_secs_f64() * 1000.0);
        answers.push(clone.answered.as_secs_f64() * 1000.0);
        bench.stop(&clone.vm)?;
        println!(
            "clone: guest runs after {:.0?}, answers after {:.0?}",
            clone.started, clone.answered
        );
        orders.push(ordered(&bench, &["boot", "--clone", &template.id.to_string()])?);
    }
    let progress = Step::new(&format!("{wanted} clones"));
    let (alive, took) = many(&bench, &template, wanted);
    progress.done(&format!("{alive} alive"));
    std::thread::sleep(SETTLE);
    let held = numbers(&bench.lab.console(1)?, "bench: groups", "median_kib=");
    let held = *held.last().context("the node tells no groups' memory")?;
    bench.down()?;
    let (peer, cold) = ("cold boot, same guest", median(colds)?);
    let per_second = f64::from(alive) / took.as_secs_f64();
    let whole_kib = f64::from(GUEST_MIB) * 1024.0;
    Ok(vec![
        Figure::new("order of a clone to its agent's answer", median(orders)?, "ms", peer, cold),
        Figure::new("BOOT of a clone to its agent's answer", median(answers)?, "ms", peer, cold),
        Figure::new("BOOT of a clone to its guest running", median(starts)?, "ms", peer, cold),
        Figure::new("clones started in 100 s", 100.0 * per_second, "1", peer, 100_000.0 / cold),
        Figure::new("memory that a clone holds", held, "KiB", "its RAM", whole_kib),
        Figure::new("clones alive at once", alive.into(), "VMs", "asked for", wanted.into()),
    ])
}

fn number(name: &'static str, usual: u32) -> Result<u32> {
    std::env::var(name).map_or(Ok(usual), |text| text.parse()).context(name)
}

/// Runs `onde` as the customer.
fn onde(bench: &Bench, args: &[&str]) -> Result<String> {
    let done = Command::new(programs::find("onde")?)
        .args(args)
        .env("ONDE_CONFIG", bench.dir.join("config.toml"))
        .env("XDG_STATE_HOME", bench.dir.join("state"))
        .output()?;
    let complaint = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "onde {args:?}: {complaint}");
    Ok(String::from_utf8(done.stdout)?.trim().to_owned())
}

/// Milliseconds that this order takes until the agent answered; its VM is stopped again.
fn ordered(bench: &Bench, order: &[&str]) -> Result<f64> {
    let begun = Instant::now();
    let id = onde(bench, order)?;
    let took = begun.elapsed();
    onde(bench, &["stop", &id])?;
    Ok(took.as_secs_f64() * 1000.0)
}

/// The same of a guest that starts from nothing.
fn cold(bench: &Bench) -> Result<f64> {
    let memory = GUEST_MIB.to_string();
    ordered(bench, &["run", "-d", "--memory", &memory, "--", "/bin/sleep", "1000000"])
}

/// A template of a guest that was copied while it ran.
fn template(bench: &Bench) -> Result<Job> {
    let file = bench.dir.join("machine");
    let file = file.to_str().context("a path")?;
    let memory = GUEST_MIB.to_string();
    let source = onde(bench, &["run", "-d", "--memory", &memory, "--", "/bin/sleep", "1000000"])?;
    onde(bench, &["snapshot", &source, "-o", file])?;
    onde(bench, &["stop", &source])?;
    let id = onde(bench, &["boot", "--from", file, "--template"])?;
    let jobs = bench.broker.jobs(true, 100)?.jobs;
    jobs.into_iter().find(|job| job.id.to_string().starts_with(&id)).context("no template")
}

/// A clone that answers.
struct Started {
    vm: Handle,
    /// From the BOOT packet until its guest ran.
    started: Duration,
    /// And until its agent answered.
    answered: Duration,
}

/// Starts a clone.
fn clone(bench: &Bench, template: &Job) -> Result<Started> {
    let opened = bench.broker.open_job(&JobRequest {
        idempotency_key: new_key()?,
        node: None,
        mem_mib: template.mem_mib,
        vcpus: template.vcpus,
        disk_mib: 0,
        net_kib_s: 0,
        loader_sha256: Hex([0; 32]),
        tokens: TOKENS,
        moves: None,
        template: false,
        clones: Some(Clones { template: template.id, held_mib: HELD_MIB }),
    })?;
    let (job, key) = (opened.job.id.0, Key::new(&opened.job_key.0));
    let vm = Handle { job, key, node: opened.job.node_ipv4 };
    let token = BootToken::parse(&opened.boot_token.0).context("the broker's token")?;
    let mut echo = Echo::open()?;
    let begun = Instant::now();
    vm.boot(&mut echo, token, opened.boot_tag.0)?;
    let started = begun.elapsed();
    bootstrap::connect(&vm, opened.job.guest_ipv4, WAKE_MAX)?;
    Ok(Started { vm, started, answered: begun.elapsed() })
}

/// Starts up to `count` clones; how many live, and how long that took. The first failure ends it.
fn many(bench: &Bench, template: &Job, count: u32) -> (u32, Duration) {
    let (begun, next, alive) = (Instant::now(), AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while next.fetch_add(1, Ordering::Relaxed) < count {
                    if let Err(error) = clone(bench, template) {
                        println!("no more clones: {error:#}");
                        next.store(count, Ordering::Relaxed);
                        return;
                    }
                    alive.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    (alive.into_inner(), begun.elapsed())
}
