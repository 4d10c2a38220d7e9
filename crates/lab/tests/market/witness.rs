//! The host's end of a [`onde_lab::witness`]: a program in a VM that knows what its memory, its output and its connection
//! have to be, whatever becomes of the VM meanwhile.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use onde_client::job::{Job, Jobs};
use onde_lab::witness::{FROM_GUEST, FROM_HOST, GOOD, Noise, PAUSE_MS, PIECE};
use serde_json::Value;

use crate::world::{World, wait};

/// A program in a VM, and `onde run` that waits for it.
pub struct Witness {
    name: String,
    onde: Child,
    output: PathBuf,
    over: Arc<AtomicBool>,
    heard_bytes: Arc<AtomicU64>,
    ends: Option<[JoinHandle<Result<()>>; 2]>,
}

impl Witness {
    /// Starts one in a VM called `name` on node 1.
    pub fn start(world: &World, name: &str) -> Result<Self> {
        Self::start_with(world, name, &[])
    }

    /// The same with more options of `onde run`.
    pub fn start_with(world: &World, name: &str, options: &[&str]) -> Result<Self> {
        let listener = TcpListener::bind("198.18.255.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?.to_string();
        let output = world.file(name);
        let order = ["run", "--name", name, "--node", "1", "--memory", "128", "--budget", "4000"];
        let program = ["--", env!("CARGO_BIN_EXE_witness"), &address];
        let mut onde = world
            .command([&order[..], options, &program[..]].concat())?
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .spawn()?;
        let mut stream = None;
        wait("the witness to connect", || {
            ensure!(onde.try_wait()?.is_none(), "the witness did not start");
            stream = listener.accept().ok();
            Ok(stream.is_some())
        })?;
        let (stream, _) = stream.context("a connection")?;
        stream.set_nonblocking(false)?;
        let (over, heard_bytes) = (Arc::default(), Arc::default());
        let ends = [hear(stream.try_clone()?, &heard_bytes), send(stream, &over)];
        let name = name.to_owned();
        let witness = Self { name, onde, output, over, heard_bytes, ends: Some(ends) };
        witness.goes_on()?;
        Ok(witness)
    }

    /// Lines of output that came so far: all that were ever written, in their order.
    fn lines(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.output)?;
        for (line, expect) in text.split_inclusive('\n').zip(1..) {
            let is_part = !line.ends_with('\n');
            ensure!(is_part || line == format!("{expect}\n"), "line {expect} is {line:?}");
        }
        Ok(text.matches('\n').count() as u64)
    }

    /// Waits for more output, and more on the connection.
    pub fn goes_on(&self) -> Result<()> {
        let heard = || self.heard_bytes.load(Ordering::Relaxed);
        let before = (self.lines()?, heard());
        wait("the witness to say more", || {
            let is_over = self.ends.iter().flatten().any(JoinHandle::is_finished);
            ensure!(!is_over, "the witness's connection is over");
            Ok(self.lines()? > before.0 + 5 && heard() > before.1 + 10 * PIECE as u64)
        })
    }

    /// The one job that this VM is now; an error if two of its jobs' VMs live.
    pub fn only_one(&self, world: &World) -> Result<Job> {
        let mut alive = Vec::new();
        wait("exactly one to live", || {
            // `onde ps` finds out what became of moves that nobody saw the end of; meanwhile two have one name.
            let is_clear = whereabouts(world, &self.name).is_ok();
            alive = living(&world.jobs()?, &self.name)?;
            Ok(is_clear && alive.len() == 1)
        })
        .with_context(|| format!("alive are {:?}", ids(&alive)))?;
        self.goes_on()?;
        let job = alive.remove(0);
        let told = whereabouts(world, &self.name)?;
        ensure!(told == (job.node.into(), job.id.to_string()), "{told:?} is {}", job.id);
        Ok(job)
    }

    /// Tells the program to end, and checks how it did, and that all it ever wrote came.
    pub fn end(mut self, world: &World) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        let status = self.onde.wait()?;
        for end in self.ends.take().into_iter().flatten() {
            end.join().unwrap_or_else(|_| bail!("a thread panicked"))?;
        }
        ensure!(status.code() == Some(GOOD.into()), "the witness ended with {status}");
        ensure!(self.lines()? > 0, "no output");
        wait("all jobs to be settled", || {
            Ok(world.broker.jobs(false, 200)?.jobs.iter().all(|job| job.settled_by.is_some()))
        })
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // One that has ended does not mind.
        let _ = self.onde.kill();
        let _ = self.onde.wait();
    }
}

fn ids(jobs: &[Job]) -> Vec<String> {
    jobs.iter().map(Job::short_id).collect()
}

/// Jobs of this VM that have run and is not over, as their nodes say. A silent node says nothing.
fn living(jobs: &Jobs, name: &str) -> Result<Vec<Job>> {
    let mut echo = onde_client::echo::Echo::open()?;
    // Wherever a VM moves, it keeps its address.
    let guest_ipv4 = jobs.find(name)?.guest_ipv4;
    let mut open = jobs.list()?;
    open.retain(|job| job.guest_ipv4 == guest_ipv4 && job.settled.is_none());
    open.retain(|job| {
        let answer = job.handle().status(&mut echo, Default::default());
        answer.is_ok_and(|status| status.stage.is_alive() && status.has_resumed)
    });
    Ok(open)
}

/// The node that a job is on, and its id, as `onde ps` has it.
pub fn whereabouts(world: &World, name: &str) -> Result<(u64, String)> {
    let rows: Value = serde_json::from_str(&world.onde(["ps", "--json"])?)?;
    let rows = rows.as_array().context("a list")?;
    let mut named = rows.iter().filter(|row| row["name"] == name);
    let row = named.next().with_context(|| format!("no job {name} in {rows:?}"))?;
    ensure!(named.next().is_none(), "two jobs are {name}: {rows:?}");
    let id = row["id"].as_str().context("an id")?.to_owned();
    Ok((row["node"].as_u64().context("a node")?, id))
}

/// Takes all that the guest sends, and at last how much that was.
fn hear(mut stream: TcpStream, heard_bytes: &Arc<AtomicU64>) -> JoinHandle<Result<()>> {
    let heard = heard_bytes.clone();
    let mut listen = move || {
        let (mut noise, mut bytes, mut kept) = (Noise::new(FROM_GUEST), [0; PIECE], Vec::new());
        loop {
            let size = stream.read(&mut bytes)?;
            // The last eight may be the count.
            kept.extend_from_slice(&bytes[..size]);
            let count = kept.len().saturating_sub(8);
            ensure!(noise.is_next(&kept[..count]), "bytes of the guest are lost or altered");
            kept.drain(..count);
            let so_far = heard.fetch_add(count as u64, Ordering::Relaxed) + count as u64;
            if size == 0 {
                ensure!(kept == so_far.to_le_bytes(), "{so_far} bytes came: {kept:?}");
                return Ok(());
            }
        }
    };
    thread::spawn(move || listen().inspect_err(|error| println!("  {error:#}")))
}

/// Sends until it is told to end.
fn send(mut stream: TcpStream, over: &Arc<AtomicBool>) -> JoinHandle<Result<()>> {
    let over = over.clone();
    thread::spawn(move || {
        let (mut noise, mut bytes) = (Noise::new(FROM_HOST), [0; PIECE]);
        while !over.load(Ordering::Relaxed) {
            noise.fill(&mut bytes);
            stream.write_all(&bytes)?;
            thread::sleep(Duration::from_millis(PAUSE_MS));
        }
        Ok(stream.shutdown(Shutdown::Write)?)
    })
}
