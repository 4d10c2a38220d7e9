//! Connections: a bounded number of them, in all and from one address, each with TLS unless the owner asked for
//! none, and each with a time for everything. What they ask goes to `http`'s routes.

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use std::collections::HashMap;
use std::future::Future;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::rate::network;

/// Most connections at once: each holds a descriptor, of 1024 by default, and some 40 KiB.
const CONNECTIONS_MAX: usize = 768;
/// Most of them from one address, so that no single customer takes all.
const CONNECTIONS_PER_ADDRESS_MAX: usize = 96;
/// Longest TLS handshake: a round trip or two.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Longest wait for a request's head on a connection that is open, and so the longest idleness.
const HEAD_TIME_MAX: Duration = Duration::from_secs(60);
/// Most lines in a request's head.
const HEAD_LINES_MAX: usize = 64;
/// Most bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;
/// Longest life of a connection, so that one that never reads its answer goes, too.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(600);
/// Pause when the system gives no descriptor.
const FULL_PAUSE: Duration = Duration::from_millis(100);
/// Longest time that a graceful end waits for requests at work.
const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(5);

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// Open connections by network address.
#[derive(Clone, Default)]
struct Places(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of the places; free again when dropped.
struct Place(Places, IpAddr);

impl Places {
    fn take(&self, address: IpAddr) -> Option<Place> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let here = taken.get(&address).copied().unwrap_or_default();
        // What bounds the sum bounds the table.
        let is_full = taken.values().sum::<usize>() >= CONNECTIONS_MAX;
        if is_full || here >= CONNECTIONS_PER_ADDRESS_MAX {
            return None;
        }
        taken.insert(address, here + 1);
        Some(Place(self.clone(), address))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = taken.get_mut(&self.1) {
            *here -= 1;
            if *here == 0 {
                taken.remove(&self.1);
            }
        }
    }
}

/// Serves `routes` until `end` comes, then lets requests at work finish. Without `tls` all is in clear.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    routes: Router,
    end: impl Future<Output = ()>,
) {
    let (graceful, places) = (GracefulShutdown::new(), Places::default());
    let acceptor = tls.map(TlsAcceptor::from);
    let mut end = std::pin::pin!(end);
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => (stream, peer.ip()),
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    if error.kind() != ErrorKind::ConnectionAborted {
                        sleep(FULL_PAUSE).await;
                    }
                    continue;
                }
            },
            () = &mut end => break,
        };
        let Some(place) = places.take(network(peer)) else {
            tracing::debug!(%peer, "too many connections");
            continue;
        };
        let (acceptor, routes, watcher) = (acceptor.clone(), routes.clone(), graceful.watcher());
        tokio::spawn(async move {
            let _place = place;
            let served = connection(stream, acceptor, routes, Peer(peer), watcher);
            if timeout(CONNECTION_TIME_MAX, served).await.is_err() {
                tracing::debug!(%peer, "a connection was open for too long");
            }
        });
    }
    drop(listener);
    if timeout(SHUTDOWN_TIME_MAX, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests did not end in time");
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    routes: Router,
    peer: Peer,
    watcher: Watcher,
) {
    let _ = stream.set_nodelay(true);
    let Some(acceptor) = acceptor else { return requests(stream, routes, peer, watcher).await };
    match timeout(HANDSHAKE_TIME_MAX, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => requests(stream, routes, peer, watcher).await,
        Ok(Err(error)) => tracing::debug!(?peer, %error, "no TLS"),
        Err(_) => tracing::debug!(?peer, "a slow handshake"),
    }
}

async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    routes: Router,
    peer: Peer,
    watcher: Watcher,
) {
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        routes.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_headers(HEAD_LINES_MAX)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(?peer, %error, "a connection broke");
    }
}
