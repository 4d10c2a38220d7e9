//! `onde lab`: runs `onde-lab`, and after `up` makes the lab the current context, with an account in it that has
//! money. Everything about the lab itself is in `onde_lab`.

use anyhow::{Context as _, Result};
use onde_client::api::{CreditRequest, KeyRequest};
use onde_client::broker::{Broker, BrokerError, new_key};
use onde_lab::Lab;
use onde_wire::cluster::TOKEN_MICRO;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::config::{Config, Context};
use crate::report::Report;

/// Name of the context, and of the account.
const NAME: &str = "lab";
/// What the account starts with: a day of one busy vCPU at the lab's prices.
const TOKENS: u64 = 100_000;
/// The broker looks at all addresses of the lab's network within some seconds.
const SWEEP_PATIENCE: Duration = Duration::from_secs(20);
const SWEEP_PERIOD: Duration = Duration::from_millis(200);

pub fn run(args: &[OsString], report: &Report) -> Result<ExitCode> {
    let program = onde_lab::programs::find("onde-lab")?;
    let mut command = Command::new(&program);
    command.args(args);
    if !args.iter().any(|arg| arg == "up") || args.iter().any(|arg| arg == "--help" || arg == "-h")
    {
        return Err(command.exec()).with_context(|| format!("cannot run {}", program.display()));
    }
    let status = command.status().with_context(|| format!("cannot run {}", program.display()))?;
    if !status.success() {
        return Ok(ExitCode::FAILURE);
    }
    let dir = std::path::absolute(dir(args)?)?;
    let lab = Lab::attach(&dir)?;
    let status = lab.status()?;
    if status.shape.broker {
        lab.enter()?;
        let broker = take(&dir, &lab.broker_url()?)?;
        wait_for_nodes(&broker, status.shape.nodes.into(), report)?;
        report.line(&format!("context {NAME} is the current one; try: onde run -- /bin/ls /"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The lab's folder, as `onde-lab` finds it.
fn dir(args: &[OsString]) -> Result<PathBuf> {
    let given = args.iter().zip(args.iter().skip(1)).find(|(arg, _)| *arg == "--dir");
    let joined = || args.iter().find_map(|arg| arg.to_str()?.strip_prefix("--dir="));
    match given {
        Some((_, dir)) => Ok(dir.into()),
        None => joined().map_or_else(onde_lab::default_dir, |dir| Ok(dir.into())),
    }
}

/// Makes the lab the current context, with an account unless it has one that works.
fn take(dir: &Path, url: &str) -> Result<Broker> {
    let mut config = Config::load()?;
    let known = config.contexts.get(NAME).filter(|known| known.lab.as_deref() == Some(dir));
    let known = known.map(|known| Broker::new(url, &known.key)).transpose()?;
    config.current = Some(NAME.to_owned());
    if let Some(broker) = known.filter(|broker| broker.account(1).is_ok()) {
        config.contexts.entry(NAME.to_owned()).and_modify(|known| known.broker = url.to_owned());
        config.save()?;
        return Ok(broker);
    }
    let key = open_account(url, &dir.join("admin.key"))?;
    let broker = Broker::new(url, &key)?;
    let context = Context { broker: url.to_owned(), key, lab: Some(dir.to_owned()) };
    config.contexts.insert(NAME.to_owned(), context);
    config.save()?;
    Ok(broker)
}

/// Waits until the broker has found all nodes: before that it has nothing to sell.
fn wait_for_nodes(broker: &Broker, count: usize, report: &Report) -> Result<()> {
    let deadline = Instant::now() + SWEEP_PATIENCE;
    while broker.nodes()?.iter().filter(|node| node.alive).count() < count {
        if Instant::now() >= deadline {
            report.warn("the broker has not found all nodes yet; see onde node ls");
            break;
        }
        // Nothing to wait for but the broker's next look.
        std::thread::sleep(SWEEP_PERIOD);
    }
    Ok(())
}

/// Opens the account, or draws one more key where there is one, and gives it money.
fn open_account(url: &str, admin_key: &Path) -> Result<String> {
    let key = std::fs::read_to_string(admin_key)
        .with_context(|| format!("cannot read {}", admin_key.display()))?;
    let operator = Broker::new(url, key.trim())?;
    let opened = match operator.open_account(NAME) {
        Err(BrokerError::Refused(failure)) if failure.error == "account_exists" => {
            return Ok(operator.new_account_key(NAME, &KeyRequest::default())?.key);
        }
        opened => opened?,
    };
    let micro = TOKENS * TOKEN_MICRO;
    operator.credit(NAME, &CreditRequest { idempotency_key: new_key()?, micro })?;
    Ok(opened.key)
}
