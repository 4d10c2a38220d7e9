//! Stands in for `packetd` in the tests of `noded`: passes messages between `noded` and a test that connects to the
//! socket `socket` beside this program. Never part of an image.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use onde_sys::spawn::handed_down;
use onde_wire::handover::{HANDOVER_SIZE, SETUP_SIZE, Setup};
use rustix::net::{RecvFlags, SendFlags};

fn main() {
    let noded = handed_down(3).expect("the socket to noded");
    let mut message = [0u8; HANDOVER_SIZE];
    let (size, _) =
        rustix::net::recv(&noded, &mut message[..], RecvFlags::empty()).expect("the setup");
    assert_eq!(size, SETUP_SIZE);
    let setup = Setup::parse(&message[..size]).expect("a setup");
    let path = std::env::current_exe().expect("/proc").with_file_name("socket");
    let name: Vec<u8> = setup.interface.into_iter().take_while(|byte| *byte != 0).collect();
    std::fs::write(path.with_file_name("interface"), name).expect("a file");
    let _ = std::fs::remove_file(&path);
    let (mut test, _) = UnixListener::bind(path).and_then(|it| it.accept()).expect("a test");
    let mut from_test = test.try_clone().expect("a second handle");
    let up = noded.try_clone().expect("a second handle");
    std::thread::spawn(move || {
        let mut message = [0u8; HANDOVER_SIZE];
        while from_test.read_exact(&mut message).is_ok() {
            rustix::net::send(&up, &message, SendFlags::empty()).expect("noded listens");
        }
        std::process::exit(0);
    });
    while let Ok((HANDOVER_SIZE, _)) =
        rustix::net::recv(&noded, &mut message[..], RecvFlags::empty())
    {
        test.write_all(&message).expect("the test listens");
    }
}
