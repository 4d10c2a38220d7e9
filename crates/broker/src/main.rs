//! `broker`: reads its files, opens the store, starts the poller and serves the API until SIGTERM or SIGINT.

mod command;

use anyhow::{Context, Result};
use clap::Parser;
use onde_broker::ledger::Ledger;
use onde_broker::policy::Policy;
use onde_broker::poller::Poller;
use onde_broker::store::shown;
use onde_broker::tls::Identity;
use onde_broker::{Broker, accounts, http, serve};
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
///
/// broker audit, broker backup, broker restore and broker thaw look after the ledger: see their --help.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address and port of the API, which is HTTPS
    #[arg(long, default_value = "127.0.0.1:8180", value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// The ledger: a file, made if it is not there, or a PostgreSQL database as postgres://...
    #[arg(long, value_name = "FILE|URL", env = "DATABASE_URL", hide_env_values = true)]
    db: String,
    /// The cluster's secret, network and prices
    #[arg(long, value_name = "FILE")]
    cluster: PathBuf,
    /// The operator's API key; made if it is not there
    #[arg(long, value_name = "FILE")]
    admin_key_file: PathBuf,
    /// The certificate, and those between it and an authority, as PEM [default: one that the broker makes beside the
    /// admin key, for customers to pin]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Speak HTTP: for a proxy on this machine that speaks TLS, or a network that everybody on it may listen to
    #[arg(long, conflicts_with_all = ["tls_cert", "tls_key"])]
    plain_http: bool,
    /// Requests a second that one API key may make; an address may make four times as many. 0 for any number
    #[arg(long, value_name = "N", default_value_t = 100)]
    rate: u32,
    /// The secret that a shop system signs its webhook with; made if it is not there [default: no webhook]
    #[arg(long, value_name = "FILE")]
    webhook_secret_file: Option<PathBuf>,
    /// What is charged on which nodes and at what time of day: rules, the first that fits counts [default: what each node
    /// says]
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
    /// How the log is written to standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log: LogFormat,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

fn start_log(format: LogFormat) {
    // ONDE_LOG=debug shows each request.
    let filter = EnvFilter::try_from_env("ONDE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

fn main() -> ExitCode {
    match begin() {
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

/// Serves, or looks after the ledger where the first word says so.
fn begin() -> Result<()> {
    let first = std::env::args().nth(1);
    if first.is_some_and(|first| command::WORDS.contains(&&*first)) {
        return command::run(&command::Command::parse());
    }
    let args = Args::parse();
    start_log(args.log);
    run(&args)
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
    let key = secret(&args.admin_key_file, accounts::new_key)
        .with_context(|| format!("the admin key file {}", args.admin_key_file.display()))?;
    let ledger = Ledger::open(&args.db)
        .with_context(|| format!("opening the ledger {}", shown(&args.db)))?;
    let broker = Arc::new(providers(args, Broker::new(cluster, ledger, &key, Instant::now()))?);
    let poller = Poller::start(&broker)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let served = runtime.block_on(serve(args, broker));
    poller.stop();
    tracing::info!("stopped");
    served
}

/// The owner's rules.
fn policy(file: &Path) -> Result<Policy> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("reading the prices in {}", file.display()))?;
    Policy::parse(&text).with_context(|| format!("the prices in {}", file.display()))
}

/// Gives the broker its secrets for receipts and the webhook, both made at the first start.
fn providers(args: &Args, broker: Broker) -> Result<Broker> {
    let file = args.admin_key_file.with_file_name("receipt.key");
    let drawn = || onde_client::api::Hex(accounts::random_key()).to_string();
    let key = secret(&file, drawn).with_context(|| format!("the key file {}", file.display()))?;
    let key: onde_client::api::Hex<32> =
        key.parse().with_context(|| format!("in {}", file.display()))?;
    let broker = match &args.prices {
        Some(file) => broker.signing_with(&key.0).with_policy(policy(file)?),
        None => broker.signing_with(&key.0),
    };
    let Some(file) = &args.webhook_secret_file else { return Ok(broker) };
    let key = secret(file, accounts::new_key)
        .with_context(|| format!("the webhook's secret {}", file.display()))?;
    Ok(broker.with_webhook(&key))
}

async fn serve(args: &Args, broker: Arc<Broker>) -> Result<()> {
    let tls = identity(args).context("the TLS certificate")?;
    let listen = args.listen;
    let listener =
        TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    let address = listener.local_addr()?;
    match &tls {
        Some(tls) => tracing::info!("customers find this broker at https://{address}#{}", tls.pin),
        None => tracing::warn!("no TLS: whoever is on the way to http://{address} reads API keys"),
    }
    // Whoever started this waits for the line (the lab does); all else is on standard error.
    println!("onde: broker ready {address}");
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let end = async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tracing::info!("stopping: requests at work are finished first");
    };
    let routes = http::router(broker, args.rate);
    serve::serve(listener, tls.map(|tls| tls.config), routes, end).await;
    Ok(())
}

fn identity(args: &Args) -> Result<Option<Identity>> {
    if args.plain_http {
        return Ok(None);
    }
    let dir = args.admin_key_file.parent().filter(|dir| !dir.as_os_str().is_empty());
    match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Identity::load(certificate, key),
        _ => Identity::load_or_make(dir.unwrap_or(Path::new(".")), args.listen.ip()),
    }
    .map(Some)
}

/// A secret, drawn at the first start and readable by the broker's user alone.
fn secret(path: &Path, draw: impl Fn() -> String) -> Result<String> {
    match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => {
            let key = draw();
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
