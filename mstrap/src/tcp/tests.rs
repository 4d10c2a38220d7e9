//! The server against clients on a simulated wire: time passes only while the server waits, so minutes of
//! silence cost nothing, and every run is the same.

use super::*;
use crate::server::{Channel, Nonces};
use crate::upload::{self, UploadError};
use onde_wire::bootstrap::upload_head;
use onde_wire::channel::{
    self, Cipher, RECORD_HEAD, RECORD_TAG, RECORD_WIRE_MAX, SERVER_HELLO_SIZE, client_finish,
};
use onde_wire::key::{Key, sha256};
use onde_wire::machine::Space;
use smoltcp::iface::SocketStorage;
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::wire::IpAddress;
use std::collections::VecDeque;

const JOB: [u8; 16] = [7; 16];
const SERVER: [u8; 4] = [198, 18, 0, 2];
const DEADLINE: Instant = Instant::from_millis_const(60_000);
const STALL: Duration = Duration::from_secs(10);

fn identity() -> Identity {
    Identity {
        job: JOB,
        node: [0; 16],
        job_key: [9; 32],
        loader_sha256: sha256(&image()),
        seed: [5; 32],
        space: Space::of_mib(64, 0),
        vcpus: 1,
        tsc_khz: 1,
        boot_mac: [2, 0, 0, 0, 0, 1],
        boot_ipv4: SERVER,
        mac: [2; 6],
        ipv4: [198, 19, 0, 2],
        gateway: [0; 4],
        prefix_len: 15,
    }
}

/// A loader larger than the window, so that it takes many turns.
fn image() -> Vec<u8> {
    (0..600_000u32).map(|i| (i / 7) as u8).collect()
}

/// One end of the wire: frames that come and go, of which each `lose`-th is lost.
#[derive(Default)]
struct End {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    lose: usize,
    count: usize,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut End);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, size: usize, fill: F) -> R {
        let mut frame = vec![0; size];
        let result = fill(&mut frame);
        self.0.count += 1;
        if self.0.lose == 0 || !self.0.count.is_multiple_of(self.0.lose) {
            self.0.outgoing.push_back(frame);
        }
        result
    }
}

impl Device for End {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.incoming.pop_front()?), Tx(self)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Tx<'_>> {
        Some(Tx(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// What a client does whenever it has a turn.
type Act = Box<dyn FnMut(&mut Socket<'static>)>;

/// The wire with all clients at its other end.
struct Simulation {
    now: Instant,
    server: End,
    client: End,
    iface: Interface,
    sockets: SocketSet<'static>,
    acts: Vec<(SocketHandle, Act)>,
}

impl Simulation {
    fn new(lose: usize, acts: Vec<Act>) -> Self {
        let mut client = End { lose, ..End::default() };
        let config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 9]).into());
        let mut iface = Interface::new(config, &mut client, Instant::ZERO);
        let address = Ipv4Cidr::new(Ipv4Address::new(198, 18, 255, 1), 15);
        iface.update_ip_addrs(|all| all.push(address.into()).unwrap());
        let storage: &'static mut [SocketStorage<'static>] =
            Box::leak(Box::new([const { SocketStorage::EMPTY }; 8]));
        let mut sockets = SocketSet::new(storage);
        let mut connect = |port: usize, act| {
            let buffer = |size| SocketBuffer::new(Box::leak(vec![0; size].into_boxed_slice()));
            let mut socket = Socket::new(buffer(4096), buffer(700_000));
            let peer = (IpAddress::from(Ipv4Address::from(SERVER)), PORT);
            socket.connect(iface.context(), peer, 40_000 + port as u16).unwrap();
            (sockets.add(socket), act)
        };
        let acts = acts.into_iter().enumerate().map(|(i, act)| connect(i, act)).collect();
        let server = End { lose, ..End::default() };
        Self { now: Instant::ZERO, server, client, iface, sockets, acts }
    }
}

impl Device for Simulation {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Rx, Tx<'_>)> {
        self.server.receive(now)
    }

    fn transmit(&mut self, now: Instant) -> Option<Tx<'_>> {
        self.server.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.server.capabilities()
    }
}

impl Wire for Simulation {
    fn now(&self) -> Instant {
        self.now
    }

    fn flush(&mut self) {
        self.client.incoming.append(&mut self.server.outgoing);
    }

    fn is_all_sent(&mut self) -> bool {
        true
    }

    /// The clients' turns, a millisecond each, until something comes of them.
    fn wait(&mut self, limit: Duration) {
        assert!(limit > Duration::ZERO, "the server does not spin");
        let until = self.now + limit;
        while self.now < until && self.server.incoming.is_empty() {
            self.now += Duration::from_millis(1);
            for (handle, act) in &mut self.acts {
                act(self.sockets.get_mut(*handle));
            }
            self.iface.poll(self.now, &mut self.client, &mut self.sockets);
            self.server.incoming.append(&mut self.client.outgoing);
        }
    }
}

/// Says nothing.
fn silent() -> Act {
    Box::new(|_| ())
}

/// Says these bytes, once, and no more.
fn says(bytes: Vec<u8>) -> Act {
    let mut said = false;
    Box::new(move |socket| {
        if socket.can_send() && !said {
            socket.send_slice(&bytes).unwrap();
            said = true;
        }
    })
}

fn hello() -> [u8; CLIENT_HELLO_SIZE] {
    channel::client_hello(&JOB, &[1; 32])
}

/// Says hello, proves the key, and uploads the first `size` bytes of the image; then closes if it is to.
fn uploads(size: usize, closes: bool) -> Act {
    let mut greet = says(hello().to_vec());
    let mut cipher: Option<Cipher> = None;
    Box::new(move |socket| {
        greet(socket);
        if cipher.is_none() && socket.recv_queue() >= SERVER_HELLO_SIZE {
            let mut answer = [0; SERVER_HELLO_SIZE];
            socket.recv_slice(&mut answer).unwrap();
            let halves = client_finish(&hello(), &answer, &Key::new(&[9; 32])).unwrap();
            let cipher = cipher.insert(halves.to_server);
            let plain = [&upload_head(image().len() as u32)[..], &image()[..size]].concat();
            for part in plain.chunks(channel::RECORD_MAX) {
                let mut record = [&[0; RECORD_HEAD], part, &[0; RECORD_TAG]].concat();
                cipher.seal(&mut record, part.len());
                assert_eq!(socket.send_slice(&record), Ok(record.len()));
            }
            if closes {
                socket.close();
            }
        }
    })
}

/// Serves one client as mstrap does. Returns how that ended and the second in which it did.
fn serve(lose: usize, acts: Vec<Act>) -> (Result<usize, UploadError>, i64, Server<Simulation>) {
    let identity = identity();
    let mut nonces = Nonces::new(&identity.seed);
    let (storage, room) = (Box::leak(Box::new(STORAGE)), Box::leak(Box::default()));
    let wire = Simulation::new(lose, acts);
    let mut server = Server::new(wire, &identity, nonces.tcp_seed(), storage, room);
    let limits = Limits { deadline: DEADLINE, stall: STALL };
    server.set_limits(limits);
    let mut record = Box::new([0; RECORD_WIRE_MAX]);
    let mut area = vec![0; onde_wire::machine::LOADER_SIZE_MAX as usize];
    let result = server.accept().map_err(UploadError::Refused).and_then(|deadline| {
        server.set_limits(Limits { deadline, ..limits });
        let nonce = nonces.next_nonce();
        let mut channel = Channel::accept(&mut server, &identity, &nonce, &mut record)?;
        channel.link().set_limits(limits);
        channel.link().close_line();
        let size = upload::receive(&mut channel, &mut area, &identity.loader_sha256)?;
        assert!(area[..size] == image());
        Ok(size)
    });
    let seconds = server.wire.now().secs();
    (result, seconds, server)
}

fn check(lose: usize, acts: Vec<Act>, expect: Result<usize, Refused>, seconds: i64) {
    let (result, took, _) = serve(lose, acts);
    assert_eq!(result, expect.map_err(UploadError::Refused));
    assert_eq!(took, seconds, "{expect:?}");
}

#[test]
fn honest_clients_get_through() {
    let all = image().len();
    check(0, vec![uploads(all, false)], Ok(all), 0);
    check(0, vec![uploads(all, true)], Ok(all), 0);
    // Silent strangers in the line keep nobody out.
    check(0, vec![silent(), silent(), silent(), uploads(all, false)], Ok(all), 0);
}

#[test]
fn lost_frames_cost_time_only() {
    for lose in [13, 31, 97] {
        let (result, seconds, _) = serve(lose, vec![uploads(image().len(), false)]);
        assert_eq!(result, Ok(image().len()), "one in {lose} lost");
        assert!(seconds < 60);
    }
}

#[test]
fn every_wait_has_an_end() {
    use Refused::*;
    check(0, vec![], Err(TooLate), 60);
    check(0, vec![silent()], Err(TooLate), 60);
    check(0, vec![says(hello()[..55].to_vec())], Err(TooLate), 60);
    check(0, vec![says(hello().to_vec())], Err(TooLate), HANDSHAKE.secs() as i64);
    check(0, vec![uploads(500_000, false)], Err(Stalled), STALL.secs() as i64);
    check(0, vec![uploads(500_000, true)], Err(Closed), 0);
    check(0, vec![says(vec![0x16; 3000])], Err(NotHello), 0);
}

#[test]
fn one_client_is_served_at_a_time() {
    let (result, _, mut server) = serve(0, vec![uploads(image().len(), false), silent()]);
    assert!(result.is_ok());
    server.turn();
    server.wire.wait(Duration::from_millis(10));
    let states: Vec<State> = server
        .wire
        .acts
        .iter()
        .map(|(handle, _)| server.wire.sockets.get::<Socket>(*handle).state())
        .collect();
    assert_eq!(states, [State::Established, State::Closed]);
    server.close();
    server.wire.wait(Duration::from_millis(10));
    let handle = server.wire.acts[0].0;
    assert_eq!(server.wire.sockets.get::<Socket>(handle).state(), State::Closed);
}
