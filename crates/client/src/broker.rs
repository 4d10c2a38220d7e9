//! The broker's HTTP API as calls: [`crate::api`] says what goes over it. `onde` and the home node call it.
//! A call that spends money carries a key of its own, drawn once, so that trying again never pays twice.
//! A broker's address is `https://HOST:PORT`, with `#sha256:DIGEST` behind it where its certificate is pinned, or
//! `http://HOST:PORT`, where somebody chose to trust the network.

use crate::api::{
    Account, AccountOpened, AccountRequest, CreditRequest, Credited, Failure, Hex, Job, JobList,
    JobOpened, JobRequest, KeyRequest, Node, NodeList, PAGE_MAX, Payment, RedeemRequest, Revoked,
    SignedReceipt, TokensRequest, Usage,
};
use onde_wire::token::{CERTIFICATE_SIZE, JobId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector as _, TcpConnector};

use crate::tls::{Pin, TlsConnector};

/// A call in all; the broker answers from its own tables.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest answer: a page of 500 rows of less than 1 KiB each, and room.
const ANSWER_SIZE_MAX: u64 = 2 << 20;
/// How often a call is tried when the broker cannot be reached or has trouble, with pauses between.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The broker cannot be reached.
    #[error("cannot reach the broker at {url}")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The broker said no.
    #[error("the broker refused: {}", .0.message)]
    Refused(Failure),
    /// The text is no address of a broker.
    #[error("`{0}` is no broker's address")]
    BadUrl(String),
    /// The broker's answer is of another version, or no broker's.
    #[error("{url} did not answer as a broker does (HTTP status {status})")]
    Foreign {
        /// Where.
        url: String,
        /// HTTP status.
        status: u16,
    },
}

impl BrokerError {
    /// What to do about it, one line.
    pub fn hint(&self) -> Option<&str> {
        match self {
            BrokerError::BadUrl(_) => Some("https://HOST:PORT or https://HOST:PORT#sha256:DIGEST"),
            BrokerError::Unreachable { source, .. }
                if matches!(**source, ureq::Error::Other(_)) =>
            {
                Some(
                    "its certificate is not the one that was pinned, or no authority of this machine signed it: ask the \
                 operator for the pin",
                )
            }
            BrokerError::Unreachable { .. } => {
                Some("is the broker up and the context the right one? See: onde context ls")
            }
            BrokerError::Refused(failure) => Some(&*failure.hint).filter(|hint| !hint.is_empty()),
            BrokerError::Foreign { .. } => Some("check the broker's address: onde context ls"),
        }
    }

    /// The broker's word for its refusal, where it is one.
    pub fn word(&self) -> Option<&str> {
        match self {
            BrokerError::Refused(failure) => Some(&failure.error),
            _ => None,
        }
    }
}

/// A new idempotency key.
pub fn new_key() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(Hex(bytes).to_string())
}

/// A broker and the account that calls it.
#[derive(Clone, Debug)]
pub struct Broker {
    agent: ureq::Agent,
    url: String,
    key: String,
}

impl Broker {
    /// The broker at `url`, called with the API key `key`.
    pub fn new(url: &str, key: &str) -> Result<Self, BrokerError> {
        let bad_url = || BrokerError::BadUrl(url.to_owned());
        let (plain, pin) = match url.split_once('#') {
            Some((plain, pin)) => (plain, Some(pin.parse::<Pin>().map_err(|_| bad_url())?)),
            None => (url, None),
        };
        let tls = match plain.split_once("://") {
            Some(("https", _)) => TlsConnector::new(pin),
            Some(("http", _)) if pin.is_none() => TlsConnector::none(),
            _ => return Err(bad_url()),
        };
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(CALL_TIMEOUT))
            .max_redirects(0)
            // A broker stands on the cluster's own network.
            .proxy(None)
            .build();
        let connector = TcpConnector::default().chain(tls);
        Ok(Self {
            agent: ureq::Agent::with_parts(config, connector, DefaultResolver::default()),
            url: plain.trim_end_matches('/').to_owned(),
            key: key.to_owned(),
        })
    }

    /// All nodes.
    pub fn nodes(&self) -> Result<Vec<Node>, BrokerError> {
        let (mut nodes, mut after) = (Vec::new(), String::new());
        // Ends with the plan's nodes: every page has a node with a higher number.
        loop {
            let page: NodeList = self.get(&format!("/v1/nodes?limit={PAGE_MAX}{after}"))?;
            nodes.extend(page.nodes);
            match page.next {
                Some(next) => after = format!("&after={next}"),
                None => return Ok(nodes),
            }
        }
    }

    /// The node with this number, where the broker knows it.
    pub fn node(&self, number: u32) -> Result<Option<Node>, BrokerError> {
        let after =
            number.checked_sub(1).map_or(String::new(), |before| format!("&after={before}"));
        let page: NodeList = self.get(&format!("/v1/nodes?limit=1{after}"))?;
        Ok(page.nodes.into_iter().find(|node| node.number == number))
    }

    /// The caller's account with the newest `limit` lines of its journal.
    pub fn account(&self, limit: u32) -> Result<Account, BrokerError> {
        self.get(&format!("/v1/account?limit={}", limit.clamp(1, PAGE_MAX)))
    }

    /// A page of the caller's journal: the lines before `before`, or the newest.
    pub fn journal(&self, before: Option<i64>) -> Result<Account, BrokerError> {
        let before = before.map_or(String::new(), |before| format!("&before={before}"));
        self.get(&format!("/v1/account?limit={PAGE_MAX}{before}"))
    }

    /// Buys a job.
    pub fn open_job(&self, request: &JobRequest) -> Result<JobOpened, BrokerError> {
        self.post("/v1/jobs", request)
    }

    /// The newest `limit` of the caller's jobs.
    pub fn jobs(&self, only_open: bool, limit: u32) -> Result<JobList, BrokerError> {
        let limit = limit.clamp(1, PAGE_MAX);
        let open = if only_open { "&open=true" } else { "" };
        self.get(&format!("/v1/jobs?limit={limit}{open}"))
    }

    /// One job.
    pub fn job(&self, job: &JobId) -> Result<Job, BrokerError> {
        self.get(&format!("/v1/jobs/{}", Hex(*job)))
    }

    /// Buys payment tokens.
    pub fn tokens(&self, job: &JobId, request: &TokensRequest) -> Result<Payment, BrokerError> {
        self.post(&format!("/v1/jobs/{}/tokens", Hex(*job)), request)
    }

    /// Hands in a certificate: the change comes back to the account. Again: the same answer.
    pub fn redeem(
        &self,
        job: &JobId,
        certificate: &[u8; CERTIFICATE_SIZE],
    ) -> Result<Job, BrokerError> {
        let request = RedeemRequest { certificate: Hex(*certificate) };
        self.post(&format!("/v1/jobs/{}/redeem", Hex(*job)), &request)
    }

    /// Gives a job back whose boot token was never shown, or whose node is lost.
    pub fn cancel(&self, job: &JobId) -> Result<Job, BrokerError> {
        self.post(&format!("/v1/jobs/{}/cancel", Hex(*job)), &())
    }

    /// Opens an account (operator's key).
    pub fn open_account(&self, name: &str) -> Result<AccountOpened, BrokerError> {
        self.post("/v1/accounts", &AccountRequest { name: name.to_owned() })
    }

    /// Makes one more key of an account (operator's key).
    pub fn new_account_key(
        &self,
        name: &str,
        request: &KeyRequest,
    ) -> Result<AccountOpened, BrokerError> {
        self.post(&format!("/v1/accounts/{name}/keys"), request)
    }

    /// Makes a key worthless: one of the caller's account, or any (operator's key).
    pub fn revoke_key(&self, id: &Hex<8>) -> Result<Revoked, BrokerError> {
        let path = format!("/v1/keys/{id}");
        self.call(|url, key| self.agent.delete(url).header("Authorization", key).call())(&path)
    }

    /// All that the broker saw a job use.
    pub fn usage(&self, job: &JobId) -> Result<Usage, BrokerError> {
        let page = |after: &str| {
            self.get(&format!("/v1/jobs/{}/usage?limit={PAGE_MAX}{after}", Hex(*job)))
        };
        let mut usage: Usage = page("")?;
        // Ends: every page starts later in the VM's life.
        while let Some(next) = usage.next {
            let more: Usage = page(&format!("&after={next}"))?;
            usage.samples.extend(more.samples);
            usage.next = more.next;
        }
        Ok(usage)
    }

    /// A settled job's receipt.
    pub fn receipt(&self, job: &JobId) -> Result<SignedReceipt, BrokerError> {
        self.get(&format!("/v1/jobs/{}/receipt", Hex(*job)))
    }

    /// Puts money into an account (operator's key).
    pub fn credit(&self, name: &str, request: &CreditRequest) -> Result<Credited, BrokerError> {
        self.post(&format!("/v1/accounts/{name}/credit"), request)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, BrokerError> {
        self.call(|url, key| self.agent.get(url).header("Authorization", key).call())(path)
    }

    fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
    ) -> Result<T, BrokerError> {
        let body = serde_json::to_vec(request).expect("the API's types are JSON");
        self.call(|url, key| {
            let post = self.agent.post(url).header("Authorization", key);
            post.content_type("application/json").send(&body)
        })(path)
    }

    /// Makes a call, and makes it again while the broker is away or in trouble.
    fn call<T: DeserializeOwned>(
        &self,
        send: impl Fn(&str, &str) -> Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> impl FnOnce(&str) -> Result<T, BrokerError> {
        move |path| {
            let (url, key) = (format!("{}{path}", self.url), format!("Bearer {}", self.key));
            let mut pause = PAUSE;
            for _ in 1..TRIES {
                match self.answer(send(&url, &key)) {
                    Err(error) if is_passing(&error) => std::thread::sleep(pause),
                    done => return done,
                }
                pause *= 2;
            }
            self.answer(send(&url, &key))
        }
    }

    fn answer<T: DeserializeOwned>(
        &self,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<T, BrokerError> {
        let unreachable =
            |source| BrokerError::Unreachable { url: self.url.clone(), source: Box::new(source) };
        let mut response = response.map_err(unreachable)?;
        let body = response.body_mut().with_config().limit(ANSWER_SIZE_MAX).read_to_vec();
        let (status, body) = (response.status().as_u16(), body.map_err(unreachable)?);
        let foreign = || BrokerError::Foreign { url: self.url.clone(), status };
        match status {
            200..300 => serde_json::from_slice(&body).map_err(|_| foreign()),
            _ => {
                Err(serde_json::from_slice(&body).map_or_else(|_| foreign(), BrokerError::Refused))
            }
        }
    }
}

/// Whether the next try may succeed: no connection, or a server that says it is unwell.
fn is_passing(error: &BrokerError) -> bool {
    match error {
        BrokerError::Unreachable { source, .. } => matches!(
            **source,
            ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed
        ),
        BrokerError::Foreign { status, .. } => (502..=504).contains(status),
        BrokerError::Refused(failure) => ["busy", "too_many"].contains(&&*failure.error),
        BrokerError::BadUrl(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;

    /// Serves each of `answers` to one connection; an empty one is a connection that breaks. Returns the bodies got.
    fn serve(listener: TcpListener, answers: &[&str]) -> Vec<String> {
        answers
            .iter()
            .map(|answer| {
                let stream = listener.accept().unwrap().0;
                let mut reader = BufReader::new(&stream);
                let (mut line, mut size) = (String::from("-"), 0);
                while !line.trim().is_empty() {
                    line.clear();
                    reader.read_line(&mut line).unwrap();
                    if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                        size = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; size];
                reader.read_exact(&mut body).unwrap();
                (&stream).write_all(answer.as_bytes()).unwrap();
                String::from_utf8(body).unwrap()
            })
            .collect()
    }

    fn http(status: &str, body: &str) -> String {
        let size = body.len();
        format!("HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n{body}")
    }

    fn check(answers: &[&str], expect: &str) -> Vec<String> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let broker =
            Broker::new(&format!("http://{}/", listener.local_addr().unwrap()), "KEY").unwrap();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(listener, answers));
            let request = TokensRequest { idempotency_key: new_key().unwrap(), count: 7 };
            let text = match broker.tokens(&[1; 16], &request) {
                Ok(payment) => format!("{}", payment.index),
                Err(error) => format!("{:?}", error.word()),
            };
            assert_eq!(text, expect);
            server.join().unwrap()
        })
    }

    #[test]
    fn tries_again_with_the_same_key_and_takes_a_no_for_an_answer() {
        let value = "0".repeat(64);
        let paid = http("200 OK", &format!("{{\"index\":7,\"value\":\"{value}\"}}"));
        let no = r#"{"error":"no_money","message":"too little","hint":"credit it"}"#;
        let bodies = check(&["", &http("503 Busy", ""), &paid], "7");
        assert!(bodies.iter().all(|body| body == &bodies[0] && body.contains("idempotency_key")));
        check(&[&http("402 Payment Required", no)], "Some(\"no_money\")");
    }
}
