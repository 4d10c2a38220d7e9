//! Stands in for `vmm` in the tests of `noded`: has no guest, and does what its memory size says, so that a test can
//! see what a jailed process can do. Never part of an image.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use onde_sys::link::Links;
use onde_sys::spawn::handed_down;
use onde_wire::machine::{Identity, MESSAGE_SIZE, PAGE_SIZE, VmmCommand, VmmEvent, fds};
use onde_wire::token::PaymentToken;
use rustix::net::{RecvFlags, SendFlags};

/// Bytes of a virtio-net header without merged buffers, as a tap wants it by default.
const HEADER: [u8; 10] = [0; 10];

fn main() {
    let memory = std::env::args().nth(2).expect("--memory-mib N");
    let control = handed_down(fds::CONTROL).expect("the control socket");
    let console: File = handed_down(fds::CONSOLE).expect("the console").into();
    tell(&control, VmmEvent::Started);
    match memory.as_str() {
        "64" => tell(&control, VmmEvent::Resumed),
        "65" => tell(&control, VmmEvent::PowerOff),
        "66" => loop {
            std::hint::spin_loop();
        },
        "67" => print(&console, &describe_jail()),
        "68" => send_frames().expect("the tap takes frames"),
        "69" => std::process::exit(3),
        "70" => print(&console, &pay_wrongly(&control)),
        "71" => eprintln!("a word for the log"),
        "72" => live_on_disk(&control),
        other => panic!("no part for {other} MiB"),
    }
    // Until it is killed.
    let mut message = [0u8; MESSAGE_SIZE];
    while rustix::net::recv(&control, &mut message[..], RecvFlags::empty()).is_ok() {}
}

fn tell(control: &OwnedFd, event: VmmEvent) {
    rustix::net::send(control, &event.emit(), SendFlags::empty()).expect("noded listens");
}

fn print(console: &File, text: &str) {
    console.write_all_at(text.as_bytes(), PAGE_SIZE).expect("the ring has room");
    console.write_all_at(&(text.len() as u64).to_le_bytes(), 0).expect("the ring has a head");
}

/// Goes on where it was, and writes where that is when it is told to.
fn live_on_disk(control: &OwnedFd) {
    let saved: File = handed_down(fds::SAVED).expect("room on disk").into();
    let mut machine = [0; 7];
    saved.read_exact_at(&mut machine, 0).expect("a file as large as a machine");
    let wakes = std::env::args().any(|arg| arg == "--wakes");
    assert_eq!(&machine == b"machine", wakes, "what was written is there, and only then");
    tell(control, VmmEvent::Resumed);
    let mut message = [0u8; MESSAGE_SIZE];
    while let Ok((size, _)) = rustix::net::recv(control, &mut message[..], RecvFlags::empty()) {
        if VmmCommand::parse(&message[..size]) == Some(VmmCommand::Save) {
            saved.write_all_at(b"machine", 0).expect("room for it");
            tell(control, VmmEvent::Saved);
        }
    }
}

/// What the process can see and do, a line each.
fn describe_jail() -> String {
    let caps = rustix::thread::capabilities(None).expect("capget");
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let open = (0..64).filter(|fd| handed_down(*fd).is_ok()).collect::<Vec<i32>>();
    let links = Links::open().expect("a local socket");
    [
        format!("pid {}", std::process::id()),
        format!("uid {}", rustix::process::getuid().as_raw()),
        format!("gid {}", rustix::process::getgid().as_raw()),
        format!("groups {:?}", rustix::process::getgroups().expect("getgroups").len()),
        format!("caps {}", (caps.effective | caps.permitted | caps.inheritable).bits()),
        format!("no new privs {}", rustix::thread::no_new_privs().expect("prctl")),
        format!("files {:?}", files.maximum),
        format!("root {:?}", std::fs::read_dir("/").map(Iterator::count).map_err(|e| e.kind())),
        format!("parent {:?}", std::fs::read_dir("/..").map(Iterator::count).map_err(|e| e.kind())),
        format!("write {:?}", File::create("/file").map(drop).map_err(|e| e.kind())),
        format!("own lo {}", links.index(c"lo").is_ok()),
        format!("host's card {}", links.index(c"card").is_ok()),
        format!("environment {}", std::env::vars_os().count()),
        format!("descriptors {open:?}"),
    ]
    .map(|line| line + "\n")
    .concat()
}

/// ARP announcements: three from each of its pairs, and three under a neighbour's address.
fn send_frames() -> io::Result<()> {
    let tap: File = handed_down(fds::TAP)?.into();
    let info: File = handed_down(fds::INFO)?.into();
    let mut page = [0u8; PAGE_SIZE as usize];
    info.read_exact_at(&mut page, 0)?;
    let own = Identity::parse(&page).ok_or(io::ErrorKind::InvalidData)?;
    let (foreign, other) = ([2, 0x4f, 198, 18, 9, 9], [198, 18, 9, 9]);
    for _ in 0..3 {
        for (mac, ipv4) in [
            (own.boot_mac, own.boot_ipv4),
            (own.mac, own.ipv4),
            (own.mac, other),
            (foreign, own.ipv4),
        ] {
            rustix::io::write(&tap, &[&HEADER[..], &announcement(mac, ipv4)].concat())?;
        }
    }
    Ok(())
}

fn announcement(mac: [u8; 6], ipv4: [u8; 4]) -> [u8; 60] {
    let mut frame = [0u8; 60];
    frame[..6].fill(0xFF);
    frame[6..12].copy_from_slice(&mac);
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&ipv4);
    frame
}

fn pay_wrongly(control: &OwnedFd) -> String {
    tell(control, VmmEvent::Pay(PaymentToken { index: 4, value: [1; 32] }));
    let mut message = [0u8; MESSAGE_SIZE];
    let (size, _) =
        rustix::net::recv(control, &mut message[..], RecvFlags::empty()).expect("an answer");
    format!("{:?}", VmmCommand::parse(&message[..size]))
}
