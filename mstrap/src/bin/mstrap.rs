//! First stage: what the VMM starts in a new VM. It listens on the address that `noded` promised, takes a
//! loader from a client who knows the job key, and runs it with the connection as its service. It parses
//! no memory image and no machine state, and ends by powering the VM off if no loader gets it further.
#![no_std]
#![no_main]

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicPtr, Ordering};
use onde_mstrap::log;
use onde_mstrap::metal::clock::Clock;
use onde_mstrap::metal::net::Net;
use onde_mstrap::metal::{Lent, console, control, cpu, info_page};
use onde_mstrap::server::{Channel, Nonces, Refused, SEND_MAX};
use onde_mstrap::tcp::{Limits, Room, STORAGE, Server, Storage};
use onde_mstrap::upload::{self, UploadError};
use onde_wire::bootstrap::{Report, SERVICES_VERSION, Services};
use onde_wire::channel::{PORT, RECORD_WIRE_MAX};
use onde_wire::machine::{
    BOOT_SIZE, BOOT_START, INFO_START, Identity, LOADER_SIZE_MAX, LOADER_START,
};
use smoltcp::time::{Duration, Instant};

/// Time for a loader to be in place; then the VM, which costs its customer money, is given up.
const DEADLINE: Duration = Duration::from_secs(60);
/// Silence that ends a connection during the upload.
const UPLOAD_STALL: Duration = Duration::from_secs(10);
/// Silence that ends it while the loader reads. The client has paid and proven itself by then, and a VM
/// that moves itself may pause between two rounds.
const LOADER_STALL: Duration = Duration::from_secs(30);
/// Lines about clients that were turned away: strangers must not keep the console busy.
const LINES_MAX: u32 = 16;

static SOCKETS: Lent<Storage> = Lent::new(STORAGE);
static ROOM: Lent<Room> = Lent::new(Room::new());
static RECORD: Lent<[u8; RECORD_WIRE_MAX]> = Lent::new([0; RECORD_WIRE_MAX]);

/// The channel of the loader that runs; the services come without a context of their own.
static CHANNEL: AtomicPtr<Channel<'static, Server<Net>>> = AtomicPtr::new(core::ptr::null_mut());

core::arch::global_asm!(
    ".section .text.start, \"ax\"",
    ".global start",
    "start:",
    "and rsp, -16",
    "xor ebp, ebp",
    "cld",
    "call {main}",
    "ud2",
    main = sym main,
);

extern "C" fn main() -> ! {
    cpu::enable_wide_registers();
    match boot() {
        Ok(status) => log!("mstrap: loader gave up: {status}"),
        Err(reason) => log!("mstrap: {reason}"),
    }
    control::power_off()
}

/// Everything. `Ok` is the status of a loader that returned.
fn boot() -> Result<i32, &'static str> {
    let identity = Identity::parse(info_page()).ok_or("no info page")?;
    let clock = Clock::start(identity.tsc_khz).ok_or("no clock")?;
    let net = Net::start(clock).map_err(|_| "no network device")?;
    let mut nonces = Nonces::new(&identity.seed);
    let deadline = Instant::ZERO + DEADLINE;
    let limits = Limits { deadline, stall: UPLOAD_STALL };
    let tcp_seed = nonces.tcp_seed();
    let mut server = Server::new(net, &identity, tcp_seed, SOCKETS.take(), ROOM.take());
    let [a, b, c, d] = identity.boot_ipv4;
    log!("mstrap: listening on {a}.{b}.{c}.{d}:{PORT}");

    let record = RECORD.take();
    let mut area = Area::new();
    let mut lines = 0;
    loop {
        server.set_limits(limits);
        let handshake = match server.accept() {
            Ok(handshake) => handshake,
            Err(_) => {
                server.close();
                return Err("nobody brought a loader in time");
            }
        };
        server.set_limits(Limits { deadline: handshake.min(deadline), ..limits });
        match serve(&mut server, &identity, &nonces.next_nonce(), record, limits, &mut area) {
            Ok(status) => {
                server.close();
                return Ok(status);
            }
            Err(reason) if lines < LINES_MAX => log!("mstrap: client turned away: {reason}"),
            Err(_) => {}
        }
        lines += 1;
        server.drop_client();
    }
}

/// Serves one client to the end. `Ok` is the status of its loader.
fn serve(
    server: &mut Server<Net>,
    identity: &Identity,
    nonce: &[u8; 32],
    record: &mut [u8; RECORD_WIRE_MAX],
    limits: Limits,
    area: &mut Area,
) -> Result<i32, &'static str> {
    let mut channel = Channel::accept(server, identity, nonce, record).map_err(Refused::name)?;
    channel.link().set_limits(limits);
    channel.link().close_line();
    match upload::receive(&mut channel, area.room(), &identity.loader_sha256) {
        Ok(size) => {
            channel.send(&Report::LoaderOk.emit()).map_err(Refused::name)?;
            log!("mstrap: loader ok");
            Ok(run(&mut channel, area, size))
        }
        Err(UploadError::Refused(refused)) => Err(refused.name()),
        Err(UploadError::Wrong(report)) => {
            let _ = channel.send(&report.emit()).and_then(|()| channel.flush());
            Err(if report == Report::BadUpload { "bad upload" } else { "other loader" })
        }
    }
}

/// The loader's place in BOOT.
struct Area {
    /// Uploads that may have written to it.
    uploads: u32,
}

impl Area {
    fn new() -> Self {
        Self { uploads: 0 }
    }

    /// Room for an upload.
    fn room(&mut self) -> &mut [u8] {
        self.uploads += 1;
        self.bytes()
    }

    /// Zeroes what earlier uploads may have left behind an image of `size`. After the first upload
    /// nothing is there: memory starts as zero, and what is not touched costs no page faults.
    fn clear_behind(&mut self, size: usize) {
        if self.uploads > 1 {
            self.bytes()[size..].fill(0);
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the upper half of BOOT; mstrap's image and stack end below it (link.ld), and only the
        // one `Area` hands it out.
        unsafe {
            core::slice::from_raw_parts_mut(LOADER_START as *mut u8, LOADER_SIZE_MAX as usize)
        }
    }
}

/// Calls the loader of `size` bytes that lies in `area`.
fn run(channel: &mut Channel<'_, Server<Net>>, area: &mut Area, size: usize) -> i32 {
    area.clear_behind(size);
    let forever = Instant::from_secs(i64::from(u32::MAX));
    channel.link().set_limits(Limits { deadline: forever, stall: LOADER_STALL });
    CHANNEL.store(core::ptr::from_mut(channel).cast(), Ordering::Relaxed);
    let services = Services {
        version: SERVICES_VERSION,
        info: INFO_START,
        heap_start: (LOADER_START + size as u64).next_multiple_of(16),
        heap_end: BOOT_START + BOOT_SIZE,
        recv,
        send,
        log: log_text,
    };
    // SAFETY: the image there has the digest that the boot token names: whoever paid for this VM says
    // that it is a loader. What it does beyond that is its owner's business.
    let status = unsafe {
        let loader: extern "C" fn(&Services) -> i32 =
            core::mem::transmute(LOADER_START as *const u8);
        loader(&services)
    };
    CHANNEL.store(core::ptr::null_mut(), Ordering::Relaxed);
    status
}

/// The running loader's channel.
fn channel() -> &'static mut Channel<'static, Server<Net>> {
    let channel = CHANNEL.load(Ordering::Relaxed);
    assert!(!channel.is_null(), "a service was called without a loader");
    // SAFETY: `run` set it to a channel that lives until the loader returns, and uses it only through here.
    unsafe { &mut *channel }
}

/// Status of a service: 0 is success, as [`Services`] says.
fn status(result: Result<(), Refused>) -> i32 {
    result.map_or(-1, |()| 0)
}

extern "C" fn recv(buffer: *mut u8, size: usize) -> i32 {
    if buffer.is_null() {
        return -1;
    }
    // SAFETY: the loader's claim, as for any `read`.
    status(channel().recv(unsafe { core::slice::from_raw_parts_mut(buffer, size) }))
}

extern "C" fn send(bytes: *const u8, size: usize) -> i32 {
    if bytes.is_null() || !(1..=SEND_MAX).contains(&size) {
        return -1;
    }
    // SAFETY: the loader's claim, as for any `write`.
    let bytes = unsafe { core::slice::from_raw_parts(bytes, size) };
    status(channel().send(bytes).and_then(|()| channel().flush()))
}

extern "C" fn log_text(text: *const u8, size: usize) {
    if !text.is_null() {
        // SAFETY: the loader's claim, as for any `write`.
        console::write(unsafe { core::slice::from_raw_parts(text, size) });
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    log!("mstrap: {info}");
    control::power_off()
}
