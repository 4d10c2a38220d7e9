//! The HTTP API: routes, keys, limits, refusals as JSON, and the OpenAPI document made from the same functions.
//! Each request becomes one call of [`Broker`] on a blocking thread. Nothing is decided here.

use crate::Broker;
use crate::accounts::KeyDigest;
use crate::ledger;
use crate::rate::{Rates, network};
use crate::refusal::Refusal;
use crate::serve::Peer;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequestParts, MatchedPath, Path, Query, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use onde_client::api::*;
use onde_wire::key::sha256;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Info, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Most bytes of a request's body: the largest is a certificate in hex.
const BODY_MAX: usize = 16 << 10;
/// Most requests at work at once: they queue for one connection to the store, and each holds a thread.
const REQUESTS_MAX: usize = 128;
/// Longest time for one request, the reading of its body included.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);
/// Requests that an address may make, in those of one key: a company's customers may share an address.
const KEYS_PER_ADDRESS: u32 = 4;
/// Age of the last look after the nodes, which comes once a second, from which on the broker is not well.
const TICK_AGE_MAX: Duration = Duration::from_secs(10);
/// Rows in a page when the request does not say.
const PAGE_DEFAULT: u32 = 100;

type Shared = State<Arc<Broker>>;
type Answer<T> = Result<Json<T>, Refusal>;

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, ..) = self.parts();
        if let Refusal::Ledger(error) = &self {
            tracing::error!(%error, "the ledger failed");
        }
        let status = StatusCode::from_u16(status).expect("parts() gives HTTP statuses");
        (status, Json(self.failure())).into_response()
    }
}

/// The digest of the key that a request came with, and whether the request would change something.
struct Bearer(KeyDigest, bool);

impl<S: Sync> FromRequestParts<S> for Bearer {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let writes = parts.method != Method::GET;
        digest(&parts.headers).map(|key| Self(key, writes)).ok_or(Refusal::Unauthorized)
    }
}

fn digest(headers: &HeaderMap) -> Option<KeyDigest> {
    let key = headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?;
    Some(sha256(key.trim().as_bytes()))
}

async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Answer<T> {
    let done = tokio::task::spawn_blocking(act).await;
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())).map(Json)
}

/// Runs `act` for the customer whose key it is.
async fn customer<T: Send + 'static>(
    State(broker): Shared,
    key: Bearer,
    act: impl FnOnce(&Broker, &str) -> Result<T, Refusal> + Send + 'static,
) -> Answer<T> {
    blocking(move || act(&broker, &broker.customer(&key.0, key.1)?)).await
}

/// Runs `act` if the key is the operator's.
async fn operator<T: Send + 'static>(
    State(broker): Shared,
    key: Bearer,
    act: impl FnOnce(&Broker) -> Result<T, Refusal> + Send + 'static,
) -> Answer<T> {
    blocking(move || {
        if !broker.is_operator(&key.0) {
            broker.customer(&key.0, false)?;
            return Err(Refusal::NotOperator);
        }
        act(&broker)
    })
    .await
}

/// Which page of a list.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct Page {
    /// Only rows before this one: the `next` of the page before.
    before: Option<i64>,
    /// Most rows; 100 if absent, at most 500.
    limit: Option<u32>,
    /// Jobs only: leave out those that are settled.
    open: Option<bool>,
}

impl Page {
    fn before(self) -> i64 {
        self.before.unwrap_or(i64::MAX)
    }

    fn limit(self) -> u32 {
        self.limit.unwrap_or(PAGE_DEFAULT).clamp(1, PAGE_MAX)
    }
}

/// Which page of nodes.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct NodePage {
    /// Only nodes with greater numbers.
    after: Option<u32>,
    /// Most rows; 100 if absent, at most 500.
    limit: Option<u32>,
}

/// The nodes: what they have free and what they charge.
#[utoipa::path(get, path = "/v1/nodes", params(NodePage),
    responses((status = 200, body = NodeList), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn nodes(broker: Shared, key: Bearer, Query(page): Query<NodePage>) -> Answer<NodeList> {
    let limit = page.limit.unwrap_or(PAGE_DEFAULT).clamp(1, PAGE_MAX);
    customer(broker, key, move |broker, _| broker.node_list(page.after, limit, Instant::now()))
        .await
}

/// The caller's balance and journal.
#[utoipa::path(get, path = "/v1/account", params(Page),
    responses((status = 200, body = Account), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn account(broker: Shared, key: Bearer, Query(page): Query<Page>) -> Answer<Account> {
    customer(broker, key, move |broker, name| broker.account(name, page.before(), page.limit()))
        .await
}

/// Buys a boot token.
#[utoipa::path(post, path = "/v1/jobs", request_body = JobRequest,
    responses((status = 200, body = JobOpened), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn open_job(
    broker: Shared,
    key: Bearer,
    Json(request): Json<JobRequest>,
) -> Answer<JobOpened> {
    customer(broker, key, move |broker, name| broker.open_job(name, &request, Instant::now())).await
}

/// The caller's jobs, newest first.
#[utoipa::path(get, path = "/v1/jobs", params(Page),
    responses((status = 200, body = JobList), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn jobs(broker: Shared, key: Bearer, Query(page): Query<Page>) -> Answer<JobList> {
    let open = page.open.unwrap_or(false);
    customer(broker, key, move |broker, name| broker.jobs(name, open, page.before(), page.limit()))
        .await
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", params(("id" = String, Path)),
    responses((status = 200, body = Job), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn job(broker: Shared, key: Bearer, Path(id): Path<Hex<16>>) -> Answer<Job> {
    customer(broker, key, move |broker, name| broker.job(name, &id.0)).await
}

/// Buys payment tokens for an open job.
#[utoipa::path(post, path = "/v1/jobs/{id}/tokens", params(("id" = String, Path)),
    request_body = TokensRequest,
    responses((status = 200, body = Payment), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn tokens(
    broker: Shared,
    key: Bearer,
    Path(id): Path<Hex<16>>,
    Json(request): Json<TokensRequest>,
) -> Answer<Payment> {
    customer(broker, key, move |broker, name| broker.sell_tokens(name, &id.0, &request)).await
}

/// Redeems a certificate: what is left goes back to the account, once.
#[utoipa::path(post, path = "/v1/jobs/{id}/redeem", params(("id" = String, Path)),
    request_body = RedeemRequest,
    responses((status = 200, body = Job), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn redeem(
    broker: Shared,
    key: Bearer,
    Path(id): Path<Hex<16>>,
    Json(request): Json<RedeemRequest>,
) -> Answer<Job> {
    customer(broker, key, move |broker, name| broker.redeem(name, &id.0, &request.certificate.0))
        .await
}

/// Asks for the money of a boot token that was never shown.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", params(("id" = String, Path)),
    responses((status = 200, body = Job), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn cancel(broker: Shared, key: Bearer, Path(id): Path<Hex<16>>) -> Answer<Job> {
    customer(broker, key, move |broker, name| broker.cancel(name, &id.0, Instant::now())).await
}

/// Opens an account (operator).
#[utoipa::path(post, path = "/v1/accounts", request_body = AccountRequest,
    responses((status = 200, body = AccountOpened), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn open_account(
    broker: Shared,
    key: Bearer,
    Json(request): Json<AccountRequest>,
) -> Answer<AccountOpened> {
    operator(broker, key, move |broker| broker.open_account(&request)).await
}

/// Issues one more key for an account (operator).
#[utoipa::path(post, path = "/v1/accounts/{name}/keys", params(("name" = String, Path)),
    request_body = KeyRequest,
    responses((status = 200, body = AccountOpened), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn add_key(
    broker: Shared,
    key: Bearer,
    Path(name): Path<String>,
    Json(request): Json<KeyRequest>,
) -> Answer<AccountOpened> {
    operator(broker, key, move |broker| broker.add_key(&name, request)).await
}

/// Makes a key worthless: one of the caller's account, or any (operator).
#[utoipa::path(delete, path = "/v1/keys/{id}", params(("id" = String, Path)),
    responses((status = 200, body = Revoked), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn revoke_key(State(broker): Shared, key: Bearer, Path(id): Path<Hex<8>>) -> Answer<Revoked> {
    blocking(move || match broker.is_operator(&key.0) {
        true => broker.revoke_key(None, &id),
        false => broker.revoke_key(Some(&broker.customer(&key.0, key.1)?), &id),
    })
    .await
}

/// A shop system says that somebody paid. Needs no key: `Onde-Signature: t=SECONDS,v1=HEX` signs time and body.
#[utoipa::path(post, path = "/v1/webhook", request_body = PaidRequest, security(()),
    params(("Onde-Signature" = String, Header)),
    responses((status = 200, body = Credited), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn webhook(State(broker): Shared, headers: HeaderMap, body: Bytes) -> Answer<Credited> {
    let signature = headers.get("onde-signature").and_then(|value| value.to_str().ok());
    let signature = signature.unwrap_or_default().to_owned();
    blocking(move || broker.webhook_paid(&signature, &body, broker.store().unix_s())).await
}

/// Which page of a job's usage.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct UsagePage {
    /// Only what was seen later in the VM's life, milliseconds: the `next` of the page before.
    after: Option<u64>,
    /// Most rows; 100 if absent, at most 500.
    limit: Option<u32>,
}

/// What a job used, as its node said each time it was asked.
#[utoipa::path(get, path = "/v1/jobs/{id}/usage", params(("id" = String, Path), UsagePage),
    responses((status = 200, body = Usage), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn usage(
    broker: Shared,
    key: Bearer,
    Path(id): Path<Hex<16>>,
    Query(page): Query<UsagePage>,
) -> Answer<Usage> {
    let limit = page.limit.unwrap_or(PAGE_DEFAULT).clamp(1, PAGE_MAX);
    customer(broker, key, move |broker, name| broker.usage(name, &id.0, page.after, limit)).await
}

/// A settled job's receipt, signed.
#[utoipa::path(get, path = "/v1/jobs/{id}/receipt", params(("id" = String, Path)),
    responses((status = 200, body = SignedReceipt), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn receipt(broker: Shared, key: Bearer, Path(id): Path<Hex<16>>) -> Answer<SignedReceipt> {
    customer(broker, key, move |broker, name| broker.receipt(name, &id.0)).await
}

/// Puts money into an account (operator).
#[utoipa::path(post, path = "/v1/accounts/{name}/credit", params(("name" = String, Path)),
    request_body = CreditRequest,
    responses((status = 200, body = Credited), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn credit(
    broker: Shared,
    key: Bearer,
    Path(name): Path<String>,
    Json(request): Json<CreditRequest>,
) -> Answer<Credited> {
    operator(broker, key, move |broker| broker.credit_account(&name, &request)).await
}

/// What happened to nodes and jobs (operator).
#[utoipa::path(get, path = "/v1/events", params(Page),
    responses((status = 200, body = EventList), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn events(broker: Shared, key: Bearer, Query(page): Query<Page>) -> Answer<EventList> {
    operator(broker, key, move |broker| {
        broker.ledger.read(|tx| ledger::events(tx, page.before(), page.limit()))
    })
    .await
}

/// The broker is up.
#[derive(Serialize, utoipa::ToSchema)]
struct Alive {}

/// Whether the broker runs at all. Needs no key.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = Alive)), security(()))]
async fn healthz() -> Json<Alive> {
    Json(Alive {})
}

/// What the broker has to work with.
#[derive(Serialize, utoipa::ToSchema)]
struct Ready {
    /// Nodes that answer.
    nodes_alive: usize,
}

/// Whether the store answers and the nodes are looked after. Needs no key.
#[utoipa::path(get, path = "/readyz", security(()),
    responses((status = 200, body = Ready), (status = "5XX", body = Failure)))]
async fn readyz(State(broker): Shared) -> Answer<Ready> {
    blocking(move || {
        broker.ledger.read(|_| Ok(()))?;
        let (nodes, now) = (broker.nodes(), Instant::now());
        if now.saturating_duration_since(nodes.last_tick()) > TICK_AGE_MAX {
            return Err(Refusal::NotReady("the nodes are not looked after"));
        }
        Ok(Ready { nodes_alive: nodes.alive(now).count() })
    })
    .await
}

/// Figures for Prometheus (operator, or a key with this scope).
#[utoipa::path(get, path = "/metrics",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"), (status = "4XX", body = Failure),
        (status = "5XX", body = Failure)))]
async fn metrics(broker: Shared, key: Bearer) -> Result<Response, Refusal> {
    let figures = move |broker: &Broker| broker.figures(Instant::now());
    let State(it) = &broker;
    let (it, digest) = (Arc::clone(it), key.0);
    let Json(may) = blocking(move || it.is_for_metrics(&digest)).await?;
    let Json(text) = match may {
        true => blocking(move || figures(&broker.0)).await?,
        false => operator(broker, key, figures).await?,
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], text).into_response())
}

/// All routes and the document that describes them.
fn routes() -> (Router<Arc<Broker>>, OpenApi) {
    let info = Info::builder()
        .title("Onde broker")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Sells tokens for virtual machines. Money is whole micro-tokens, bytes are hex.",
        ))
        .build();
    let (router, mut api) = OpenApiRouter::new()
        .routes(routes!(nodes))
        .routes(routes!(account))
        .routes(routes!(open_job, jobs))
        .routes(routes!(job))
        .routes(routes!(tokens))
        .routes(routes!(redeem))
        .routes(routes!(cancel))
        .routes(routes!(open_account))
        .routes(routes!(add_key))
        .routes(routes!(credit))
        .routes(routes!(events))
        .routes(routes!(revoke_key))
        .routes(routes!(webhook))
        .routes(routes!(usage))
        .routes(routes!(receipt))
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(metrics))
        .split_for_parts();
    api.info = info;
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    let components = api.components.get_or_insert_default();
    components.add_security_scheme("key", SecurityScheme::Http(bearer));
    let no_scopes: [&str; 0] = [];
    api.security = Some(vec![utoipa::openapi::SecurityRequirement::new("key", no_scopes)]);
    (router, api)
}

/// The API over a broker; each key may make `per_s` requests a second (0: any number).
pub fn router(broker: Arc<Broker>, per_s: u32) -> Router {
    let (router, api) = routes();
    let document = api.to_json().expect("the document is made of strings");
    let openapi = || async { ([(CONTENT_TYPE, "application/json")], document) };
    router
        .route("/openapi.json", axum::routing::get(openapi))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn(plain_refusals))
        .layer(middleware::from_fn_with_state(Arc::new(Gate::new(broker.clone(), per_s)), limit))
        .with_state(broker)
}

/// What a request passes before any work is done for it.
struct Gate {
    broker: Arc<Broker>,
    places: Semaphore,
    addresses: Mutex<Rates<IpAddr>>,
    keys: Mutex<Rates<KeyDigest>>,
}

impl Gate {
    fn new(broker: Arc<Broker>, per_s: u32) -> Self {
        Self {
            broker,
            places: Semaphore::new(REQUESTS_MAX),
            addresses: Mutex::new(Rates::new(per_s.saturating_mul(KEYS_PER_ADDRESS))),
            keys: Mutex::new(Rates::new(per_s)),
        }
    }

    fn may(&self, request: &Request) -> bool {
        let now = Instant::now();
        let peer = request.extensions().get::<Peer>();
        let take_address = |peer: &Peer| lock(&self.addresses).take(network(peer.0), now);
        peer.is_none_or(take_address)
            && digest(request.headers()).is_none_or(|key| lock(&self.keys).take(key, now))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A table of rates is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bounds how many requests there are, how many are at work, and for how long; logs each.
async fn limit(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    // Not the path: a stranger could make as many figures of it as he likes.
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let start = Instant::now();
    let response = match gate.places.try_acquire() {
        _ if !gate.may(&request) => Ok(Refusal::TooMany.into_response()),
        Ok(_place) => tokio::time::timeout(REQUEST_TIME_MAX, next.run(request)).await,
        Err(_) => Ok(Refusal::Busy.into_response()),
    };
    let response = response.unwrap_or_else(|_| Refusal::Busy.into_response());
    let (status, took) = (response.status().as_u16(), start.elapsed());
    gate.broker.metrics.request(matched.unwrap_or_default(), status, took);
    let ms = took.as_millis() as u64;
    tracing::debug!(%method, path, status, ms, "request");
    response
}

/// Gives the framework's own refusals (wrong JSON, unknown path, too large a body) the form of all others.
async fn plain_refusals(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let is_json =
        response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let text = axum::body::to_bytes(body, BODY_MAX).await.unwrap_or_default();
    let failure = Failure {
        error: word(status).into(),
        message: match text.is_empty() {
            true => status.canonical_reason().unwrap_or("refused").to_lowercase(),
            false => String::from_utf8_lossy(&text).into_owned(),
        },
        hint: "see /openapi.json for paths and fields".into(),
    };
    let json = serde_json::to_vec(&failure).expect("a plain struct");
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Response::from_parts(parts, Body::from(json))
}

fn word(status: StatusCode) -> &'static str {
    match status {
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::METHOD_NOT_ALLOWED => "wrong_method",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        status if status.is_server_error() => "internal",
        _ => "invalid",
    }
}
