//! The broker's doors as a stranger meets them: TLS, limits on connections and on requests. Behind them is a real
//! broker; the client is the customers' own.

use crate::stage::*;
use onde_broker::tls::Identity;
use onde_client::broker::Broker;
use onde_client::tls::Pin;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

/// What the broker says to the operator at this address.
fn check(url: &str, expect: Result<(), &str>) {
    let called = Broker::new(url, OPERATOR).and_then(|broker| broker.open_account("a"));
    // Refused by the broker or not: it was reached and believed.
    let told = match called {
        Err(error) if error.word().is_none() => Err(error.hint().unwrap_or_default().to_owned()),
        _ => Ok(()),
    };
    match (told, expect) {
        (Ok(()), Ok(())) => {}
        (Err(told), Err(expect)) if told.contains(expect) => {}
        (told, expect) => panic!("{url}: {told:?}, not {expect:?}"),
    }
}

#[test]
fn believes_the_pinned_certificate_and_no_other() {
    let (dir, other) = (Dir::new(), Dir::new());
    let here = [127, 0, 0, 1].into();
    let identity = Identity::load_or_make(&dir.0, here).expect("a certificate");
    let address = serve_as(broker(&dir.0, Instant::now()), Some(identity.config.clone()), 0);
    let stranger = Identity::load_or_make(&other.0, here).expect("a certificate").pin;
    check(&format!("https://{address}#{}", identity.pin), Ok(()));
    check(&format!("https://{address}#{stranger}"), Err("pinned"));
    check(&format!("https://{address}"), Err("authority"));
    check(&format!("https://{address}#sha256:00"), Err("HOST:PORT"));
    check(&format!("http://{address}#{}", identity.pin), Err("HOST:PORT"));
    let again = Identity::load_or_make(&dir.0, here).expect("the same one");
    assert_eq!(again.pin, identity.pin);
    let mode = std::fs::metadata(dir.0.join("tls.key")).expect("its key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let told = std::fs::read_to_string(dir.0.join("tls.pin")).expect("its pin");
    assert_eq!(told.trim().parse::<Pin>().expect("a pin"), identity.pin);
}

#[test]
fn a_key_meets_its_limit_and_others_do_not() {
    let dir = Dir::new();
    let address = serve_as(broker(&dir.0, Instant::now()), None, 5);
    let operator = Caller::new(&format!("http://{address}"), OPERATOR);
    let other = Caller::new(&operator.url, "onde_nobody");
    let status = |caller: &Caller| caller.send("/v1/events", None).expect("an answer").0;
    let first_no = (0..100).map(|_| status(&operator)).find(|status| *status != 200);
    assert_eq!(first_no, Some(429));
    assert_eq!(status(&other), 401, "another key is asked for itself");
}

/// A connection that sends `bytes` and then nothing: what comes back.
fn say(address: std::net::SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    stream.write_all(bytes).expect("sent");
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => String::from_utf8_lossy(&answer).into_owned(),
    }
}

#[test]
fn bounds_heads_and_connections() {
    let dir = Dir::new();
    let address = serve_as(broker(&dir.0, Instant::now()), None, 0);
    let line = "X-Filler: ".to_owned() + &"x".repeat(1000) + "\r\n";
    let long = format!("GET /healthz HTTP/1.1\r\n{}\r\n", line.repeat(40));
    assert!(say(address, long.as_bytes()).starts_with("HTTP/1.1 431"));
    let many = format!("GET /healthz HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(100));
    assert!(say(address, many.as_bytes()).starts_with("HTTP/1.1 431"));
    let held: Vec<_> =
        (0..200).map(|_| TcpStream::connect(address).expect("a connection")).collect();
    let closed = |mut stream: &TcpStream| {
        stream.set_read_timeout(Some(Duration::from_millis(1))).expect("set");
        matches!(stream.read(&mut [0]), Ok(0))
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while held.iter().filter(|stream| closed(stream)).count() < 200 - 96 {
        assert!(Instant::now() < deadline, "too many connections stay open");
    }
    drop(held);
    let ask = b"GET /healthz HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n";
    while !std::panic::catch_unwind(|| say(address, ask)).is_ok_and(|told| told.contains("200 OK"))
    {
        assert!(Instant::now() < deadline, "places are not given back");
    }
}

#[test]
fn a_request_at_work_is_finished_when_the_broker_ends() {
    let (dir, (end, ended)) = (Dir::new(), tokio::sync::oneshot::channel::<()>());
    let broker = broker(&dir.0, Instant::now());
    let (address, server) =
        serve_until(broker.clone(), None, 0, async move { ended.await.expect("told to end") });
    let idle = TcpStream::connect(address).expect("a connection");
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let body = "{\"name\": \"late\"}";
    let head = format!(
        "POST /v1/accounts HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer {OPERATOR}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("sent");
    let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
    let mut told = vec![0; go_on.len()];
    stream.read_exact(&mut told).expect("the broker is at work on it");
    assert_eq!(told, go_on);
    end.send(()).expect("it serves");
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(address).is_ok() {
        assert!(Instant::now() < deadline, "it takes new connections");
    }
    stream.write_all(body.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer, and then the end");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("onde_"), "{answer}");
    server.join().expect("nobody who idles holds it up");
    drop(idle);
    assert_eq!(broker.account("late", i64::MAX, 1).expect("it was opened").balance_micro, 0);
}
