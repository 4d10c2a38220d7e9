//! Boot tokens, payments and uploads that are wrong, each with its verdict. The tokens are forged here with
//! the cluster's secret, so that exactly one thing is wrong with each.

use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use onde_client::bootstrap::{self, BootstrapError};
use onde_client::echo::{Echo, Exchange, Policy};
use onde_client::layout::{self, Layout};
use onde_client::node::NodeError;
use onde_lab::kernel::KernelCache;
use onde_wire::bootstrap::upload_head;
use onde_wire::channel::PORT;
use onde_wire::machine::Space;
use onde_wire::packet::{Op, Request, Status};
use onde_wire::stream::Start;
use onde_wire::token::{BootToken, PaymentToken};

use crate::world::{Forged, MEM_MIB, ONCE, World, wait};

/// Shows a forged token at node `number`; nobody may answer.
fn check_silent(world: &World, number: u32, forged: &Forged) -> Result<()> {
    let request = Request::Boot(forged.token, forged.tag);
    let packet = request.emit(7, &forged.handle.job, &forged.handle.key);
    let mut echo = Echo::open()?;
    let answer = echo.exchange(world.node(number), &packet, Op::Boot, 7, None, ONCE);
    ensure!(answer.is_err(), "answered: {answer:?}");
    Ok(())
}

/// Shows a forged token whose tag is right; the node must refuse it with `expect`.
fn check_refused(world: &World, change: impl FnOnce(&mut BootToken), expect: Status) -> Result<()> {
    let forged = world.forge(1, change)?;
    let answer = forged.handle.boot(&mut Echo::open()?, forged.token, forged.tag);
    let refusal = answer.as_ref().err().and_then(NodeError::refusal);
    ensure!(refusal == Some(expect), "{answer:?} instead of {expect:?}");
    Ok(())
}

pub fn wrong(world: &World) -> Result<()> {
    let mut forged = world.forge(1, |_| {})?;
    forged.tag[31] ^= 1;
    check_silent(world, 1, &forged)?;
    let mut forged = world.forge(1, |_| {})?;
    forged.token.first_count += 1;
    check_silent(world, 1, &forged)
}

pub fn other_node(world: &World) -> Result<()> {
    check_silent(world, 2, &world.forge(1, |_| {})?)
}

pub fn expired(world: &World) -> Result<()> {
    check_refused(world, |token| token.expiry_ms = 1, Status::Expired)
}

pub fn other_incarnation(world: &World) -> Result<()> {
    check_refused(world, |token| token.incarnation[0] ^= 1, Status::OtherIncarnation)
}

pub fn too_large(world: &World) -> Result<()> {
    let all = |token: &mut BootToken| (token.mem_mib, token.held_mib) = (60 << 10, 60 << 10);
    check_refused(world, all, Status::NoMemory)?;
    check_refused(world, |token| token.mem_mib = 60 << 10, Status::BadLimits)?;
    check_refused(world, |token| token.vcpus = 64, Status::NoRoom)?;
    check_refused(world, |token| token.mem_mib = 0, Status::BadLimits)?;
    check_refused(world, |token| token.vcpus = 0, Status::BadLimits)
}

/// Shown again while its VM lives, a token gets the same answer; afterwards it is spent.
pub fn replayed(world: &World) -> Result<()> {
    let forged = world.forge(1, |_| {})?;
    let mut echo = Echo::open()?;
    let first = forged.handle.boot(&mut echo, forged.token, forged.tag)?;
    let again = forged.handle.boot(&mut echo, forged.token, forged.tag)?;
    ensure!((first.ipv4, first.mac) == (again.ipv4, again.mac), "{first:?}, then {again:?}");
    let certificate = forged.handle.stop(&mut echo)?;
    ensure!(certificate == forged.handle.stop(&mut echo)?, "another certificate");
    let late = forged.handle.boot(&mut echo, forged.token, forged.tag);
    let refusal = late.as_ref().err().and_then(NodeError::refusal);
    ensure!(refusal == Some(Status::Ended), "{late:?}");
    Ok(())
}

pub fn payments(world: &World) -> Result<()> {
    let forged = world.forge(1, |_| {})?;
    let mut echo = Echo::open()?;
    forged.handle.boot(&mut echo, forged.token, forged.tag)?;
    let first = forged.handle.pay(&mut echo, forged.payment(150))?;
    let again = forged.handle.pay(&mut echo, forged.payment(150))?;
    ensure!(first.last_index == 150 && again.last_index == 150, "{first:?}, then {again:?}");
    ensure!(again.balance_micro <= first.balance_micro, "paid twice");
    let mut wrong = forged.payment(160);
    wrong.value[0] ^= 1;
    let far = PaymentToken { index: u32::MAX, ..wrong };
    for (token, expect) in [(far, Status::TooManySteps), (wrong, Status::BadPayment)] {
        let answer = forged.handle.pay(&mut echo, token);
        let refusal = answer.as_ref().err().and_then(NodeError::refusal);
        ensure!(refusal == Some(expect), "{answer:?} instead of {expect:?}");
    }
    let status = forged.handle.status(&mut echo, Policy::default())?;
    let paid = status.balance_micro + status.spent_micro;
    ensure!(paid == 150 * forged.token.value_micro, "{status:?}");
    forged.handle.stop(&mut echo)?;
    Ok(())
}

fn layout() -> Result<Layout> {
    let vmlinux = std::fs::read(KernelCache::find()?.vmlinux)?;
    Ok(layout::cold(&vmlinux, &[], "console=ttyS0 quiet panic=-1", u64::from(MEM_MIB) << 20)?)
}

fn start(forged: &Forged) -> Start {
    Start { job: forged.handle.job, space: Space::of_mib(MEM_MIB, 0), vcpus: 1 }
}

pub fn other_loader(world: &World) -> Result<()> {
    let forged = world.forge(1, |token| token.loader_sha256[0] ^= 1)?;
    let mut echo = Echo::open()?;
    let booted = forged.handle.boot(&mut echo, forged.token, forged.tag)?;
    let ipv4 = Ipv4Addr::from(booted.ipv4);
    let refused =
        bootstrap::boot(&forged.handle, ipv4, &world.loader, &start(&forged), &layout()?, |_| {});
    ensure!(matches!(refused, Err(BootstrapError::OtherLoader)), "{refused:?}");
    forged.handle.stop(&mut echo)?;
    Ok(())
}

/// A customer's machine vanishes in the middle of the loader's upload, another stranger connects and says
/// nothing; the customer comes back and boots.
pub fn broken_upload(world: &World) -> Result<()> {
    let forged = world.forge(1, |_| {})?;
    let mut echo = Echo::open()?;
    let booted = forged.handle.boot(&mut echo, forged.token, forged.tag)?;
    let ipv4 = Ipv4Addr::from(booted.ipv4);
    let mut channel = bootstrap::connect(&forged.handle, ipv4, Duration::from_secs(30))?;
    channel.writer.write_all(&upload_head(world.loader.len() as u32))?;
    channel.writer.write_all(&world.loader[..world.loader.len() / 2])?;
    channel.writer.flush()?;
    drop(channel);
    let mut stranger = None;
    wait("mstrap to listen again", || {
        stranger = TcpStream::connect((ipv4, PORT)).ok();
        Ok(stranger.is_some())
    })?;
    bootstrap::boot(&forged.handle, ipv4, &world.loader, &start(&forged), &layout()?, |_| {})?;
    drop(stranger);
    forged.handle.stop(&mut echo)?;
    Ok(())
}
