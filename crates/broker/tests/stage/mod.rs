//! A broker over a ledger in a directory of its own, nodes that tests invent, and an HTTP client: what the tests
//! of this crate share. The server and its ledger are the real ones; only the poller is left out.

#![allow(dead_code, reason = "each test program uses its part of this")]

pub mod server;

use onde_broker::ledger::Ledger;
use onde_broker::watch::Heard;
use onde_broker::{Broker, http, serve};
use onde_client::api::*;
use onde_client::tls::TlsConnector;
use onde_wire::cluster::Cluster;
use onde_wire::key::{Key, certificate_key, node_key};
use onde_wire::machine::Stage;
use onde_wire::packet::{Hello, JobStatus, Prices};
use onde_wire::token::{CERTIFICATE_SIZE, Certificate};
use rustls::ServerConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector as _, TcpConnector};

pub const OPERATOR: &str = "onde_0123456789012345678901234567890123456789";
pub const WEBHOOK: &str = "what a shop and its broker know";
pub const SECRET: [u8; 32] = [0x5e; 32];
pub const TOKEN: u64 = onde_wire::cluster::TOKEN_MICRO;

pub fn cluster() -> Cluster {
    let secret = "5e".repeat(32);
    Cluster::parse(&format!("secret={secret}\nnetwork=198.18.0.0/15\n")).expect("a cluster file")
}

pub fn broker(dir: &Path, now: Instant) -> Arc<Broker> {
    let ledger = Ledger::open(&place(dir)).expect("a ledger");
    Arc::new(Broker::new(cluster(), ledger, OPERATOR, now).with_webhook(WEBHOOK))
}

/// Whether this test program tries PostgreSQL: those whose names say so.
pub const ON_POSTGRES: bool =
    matches!(env!("CARGO_CRATE_NAME").as_bytes(), [.., b'g', b'r', b'e', b's']);

/// Where the ledger of a directory is: a file in it, or a database that is noted in it, and made at first.
pub fn place(dir: &Path) -> String {
    if !ON_POSTGRES {
        return dir.join("ledger.db").to_str().expect("UTF-8").into();
    }
    let note = dir.join("database");
    std::fs::read_to_string(&note).unwrap_or_else(|_| {
        let url = server::database();
        std::fs::write(note, &url).expect("a note");
        url
    })
}

/// Runs SQL without the guards that a broker's own connection is under.
pub fn tampered(place: &str, sql: &str) {
    if ON_POSTGRES {
        let mut client = postgres::Client::connect(place, postgres::NoTls).expect("the server");
        // As an owner of the database who wants to cheat would.
        client
            .batch_execute(&format!("SET session_replication_role = replica; {sql}"))
            .expect("SQL");
    } else {
        let file = rusqlite::Connection::open(place).expect("the file");
        let names = "SELECT 'DROP TRIGGER ' || name FROM sqlite_master WHERE type = 'trigger'";
        let mut query = file.prepare(names).expect("a query");
        let drops = query.query_map([], |row| row.get::<_, String>(0)).expect("rows");
        drops.for_each(|drop| file.execute_batch(&drop.expect("text")).expect("dropped"));
        file.execute_batch(&format!("PRAGMA foreign_keys = off; {sql}")).expect("SQL");
    }
}

/// Serves until the process ends, without TLS and without a limit; gives the address.
pub fn serve(broker: Arc<Broker>) -> String {
    format!("http://{}", serve_as(broker, None, 0))
}

/// Serves until the process ends.
pub fn serve_as(broker: Arc<Broker>, tls: Option<Arc<ServerConfig>>, per_s: u32) -> SocketAddr {
    serve_until(broker, tls, per_s, std::future::pending()).0
}

/// Serves until `end` comes, and then until nothing is at work.
pub fn serve_until(
    broker: Arc<Broker>,
    tls: Option<Arc<ServerConfig>>,
    per_s: u32,
    end: impl Future<Output = ()> + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    listener.set_nonblocking(true).expect("a socket");
    let server = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
            let routes = http::router(broker, per_s);
            serve::serve(listener, tls, routes, end).await;
        });
    });
    (address, server)
}

/// Node `number` in its `life`-th life, 1000 MiB and 4 slots, up for 10 s; dearer with its number.
pub fn hello(number: u32, life: u8) -> Hello {
    Hello {
        node: [number as u8; 16],
        incarnation: [life; 16],
        number,
        uptime_ms: 10_000,
        mem_mib: 1000,
        mem_mib_free: 1000,
        disk_mib: 500,
        disk_mib_free: 500,
        cpus: 2,
        slots_free: 4,
        prices: Prices { vcpu_s: 1000 + u64::from(number), gib_s: 10, gib_sent: 5, disk_gib_s: 1 },
    }
}

pub fn hear(broker: &Broker, hello: Hello, now: Instant) {
    broker.hear(&[Heard::Hello(hello)], now).expect("heard");
}

/// All nodes that are alive say of the jobs there that nobody booted them yet: what a broker has to hear after its start
/// before it sells more for them.
pub fn hear_unbooted(broker: &Broker, now: Instant) {
    let asks = broker.asks(0, now).expect("asks").0;
    let gone: Vec<_> = asks.iter().map(|ask| Heard::Gone(ask.job, false)).collect();
    broker.hear(&gone, now).expect("heard");
}

/// What a node says of a job that took ten tokens.
pub fn status(stage: Stage, spent_micro: u64) -> JobStatus {
    JobStatus { stage, last_index: 10, spent_micro, has_resumed: true, ..JobStatus::default() }
}

/// The certificate that the job's node would give.
pub fn certificate(job: &Job, last_index: u32, spent: u64) -> Hex<CERTIFICATE_SIZE> {
    let certificate = Certificate {
        job: job.id.0,
        node: job.node_id.0,
        incarnation: job.incarnation.0,
        last_index,
        spent_micro: spent,
        unused_micro: (u64::from(last_index) * job.value_micro).saturating_sub(spent),
    };
    let node_key = Key::new(&node_key(&SECRET, &job.node_id.0));
    Hex(certificate.sign(&Key::new(&certificate_key(&node_key))))
}

/// A purchase of one small VM with `tokens` tokens, under a new idempotency key.
pub fn purchase(tokens: u32) -> JobRequest {
    JobRequest {
        idempotency_key: fresh_key(),
        node: None,
        mem_mib: 64,
        vcpus: 1,
        disk_mib: 0,
        net_kib_s: 0,
        loader_sha256: Hex([3; 32]),
        tokens,
        moves: None,
        template: false,
        clones: None,
    }
}

pub fn fresh_key() -> String {
    Hex(getrandom::u64().expect("random").to_le_bytes()).to_string()
}

/// An HTTP client with a key.
#[derive(Clone)]
pub struct Caller {
    agent: ureq::Agent,
    pub url: String,
    pub key: String,
}

impl Caller {
    pub fn new(url: &str, key: &str) -> Self {
        // A connection for each request: a server may close one that idles at the very moment it is used
        // again, which `onde_client::broker` answers by another try.
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_idle_connections(0)
            .build();
        let tls = match url.split_once('#') {
            Some((_, pin)) => TlsConnector::new(Some(pin.parse().expect("a pin"))),
            None => TlsConnector::none(),
        };
        let connector = TcpConnector::default().chain(tls);
        let agent = ureq::Agent::with_parts(config, connector, DefaultResolver::default());
        Self { agent, url: url.into(), key: key.into() }
    }

    /// A new account with money, and its caller.
    pub fn customer(&self, name: &str, tokens: u64) -> Self {
        let opened: AccountOpened =
            self.post("/v1/accounts", &AccountRequest { name: name.into() });
        if tokens > 0 {
            let credit = CreditRequest { idempotency_key: fresh_key(), micro: tokens * TOKEN };
            let _: Credited = self.post(&format!("/v1/accounts/{name}/credit"), &credit);
        }
        Self::new(&self.url, &opened.key)
    }

    /// Status, media type and body of an answer to any method.
    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> (u16, String, String) {
        self.ask_with(method, path, body, ("Accept", "*/*"))
    }

    /// The same with one more line in its head.
    pub fn ask_with(
        &self,
        method: &str,
        path: &str,
        body: Option<&str>,
        (name, value): (&str, &str),
    ) -> (u16, String, String) {
        let host = self.url.split('#').next().expect("always one");
        let request = ureq::http::Request::builder()
            .method(&*method.to_uppercase())
            .uri(format!("{host}{path}"))
            .header(name, value)
            .header("Authorization", format!("Bearer {}", self.key));
        let answer = match body {
            None => self.agent.run(request.body(()).expect("a request")),
            Some(body) => {
                let request = request.header("Content-Type", "application/json");
                self.agent.run(request.body(body.to_owned()).expect("a request"))
            }
        };
        let mut answer = answer.expect("the broker answers");
        let kind = answer.headers().get("content-type").and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or_default().to_owned();
        let status = answer.status().as_u16();
        (status, kind, answer.body_mut().read_to_string().expect("a body"))
    }

    /// Status and body; an error where the server is away or went away.
    pub fn send(&self, path: &str, body: Option<&str>) -> Result<(u16, String), ureq::Error> {
        let host = self.url.split('#').next().expect("always one");
        let (url, bearer) = (format!("{host}{path}"), format!("Bearer {}", self.key));
        let mut response = match body {
            None => self.agent.get(url).header("Authorization", bearer).call()?,
            Some(body) => {
                let post = self.agent.post(url).header("Authorization", bearer);
                post.header("Content-Type", "application/json").send(body)?
            }
        };
        Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        answer(self.send(path, None).expect("the broker answers"))
    }

    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> T {
        answer(self.send(path, Some(&json(body))).expect("the broker answers"))
    }

    pub fn balance(&self) -> u64 {
        self.get::<Account>("/v1/account").balance_micro
    }
}

pub fn json(body: &impl Serialize) -> String {
    serde_json::to_string(body).expect("plain structs")
}

fn answer<T: DeserializeOwned>((status, body): (u16, String)) -> T {
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).expect("an answer of the API's type")
}

/// A directory of this process that is gone when the test ends well.
pub struct Dir(pub std::path::PathBuf);

impl Dir {
    pub fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("onde-broker-{}", fresh_key()));
        std::fs::create_dir(&dir).expect("a directory");
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
