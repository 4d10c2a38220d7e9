//! `broker`: reads its files, opens the store, starts the poller and serves the API until SIGTERM or SIGINT.

use anyhow::{Context, Result};
use clap::Parser;
use onde_broker::ledger::Ledger;
use onde_broker::poller::Poller;
use onde_broker::{Broker, accounts, http};
use onde_wire::cluster::Cluster;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Sells tokens for a cluster's machines and keeps the ledger.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address and port of the HTTP API
    #[arg(long, default_value = "127.0.0.1:8180", value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// The ledger; made if it is not there
    #[arg(long, value_name = "FILE")]
    db: PathBuf,
    /// The cluster's secret, network and prices
    #[arg(long, value_name = "FILE")]
    cluster: PathBuf,
    /// The operator's API key; made if it is not there
    #[arg(long, value_name = "FILE")]
    admin_key_file: PathBuf,
}

fn main() -> ExitCode {
    // ONDE_LOG=debug shows each request.
    let filter = EnvFilter::try_from_env("ONDE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("broker: {error:#}");
            if let Some(hint) = hint(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

fn hint(error: &anyhow::Error) -> Option<&'static str> {
    if let Some(echo) = error.downcast_ref::<onde_client::echo::EchoError>() {
        return echo.hint();
    }
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>())?;
    match io.kind() {
        ErrorKind::NotFound => {
            Some("check the path: --cluster names the file that the nodes have, too")
        }
        ErrorKind::AddrInUse => {
            Some("another program, or another broker, listens there: see --listen")
        }
        ErrorKind::PermissionDenied => {
            Some("the broker's user has to own its ledger and its key file")
        }
        _ => None,
    }
}

fn run(args: &Args) -> Result<()> {
    let text = std::fs::read_to_string(&args.cluster)
        .with_context(|| format!("reading the cluster file {}", args.cluster.display()))?;
    let cluster = Cluster::parse(&text)?;
    let key = admin_key(&args.admin_key_file)
        .with_context(|| format!("the admin key file {}", args.admin_key_file.display()))?;
    let ledger = Ledger::open(&args.db)
        .with_context(|| format!("opening the ledger {}", args.db.display()))?;
    let broker = Arc::new(Broker::new(cluster, ledger, &key, Instant::now()));
    let poller = Poller::start(&broker)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let served = runtime.block_on(serve(args.listen, broker));
    poller.stop();
    tracing::info!("stopped");
    served
}

async fn serve(listen: SocketAddr, broker: Arc<Broker>) -> Result<()> {
    let listener =
        TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    // Whoever started this waits for the line (the lab does); all else is on standard error.
    println!("onde: broker ready {}", listener.local_addr()?);
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let end = async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    };
    Ok(http::serve(listener, broker, end).await?)
}

/// The operator's key, drawn at the first start and readable by the broker's user alone.
fn admin_key(path: &Path) -> Result<String> {
    match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => {
            let key = accounts::new_key();
            file.write_all(format!("{key}\n").as_bytes())?;
            file.sync_all()?;
            Ok(key)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let key = std::fs::read_to_string(path)?.trim().to_owned();
            anyhow::ensure!(
                key.len() >= 32,
                "less than 32 characters: remove it to draw a new key"
            );
            Ok(key)
        }
        Err(error) => Err(error.into()),
    }
}
