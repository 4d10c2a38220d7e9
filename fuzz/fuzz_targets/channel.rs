//! Hellos and records of any bytes at both ends of a channel: no panic, and nothing opens.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::channel::{
    CLIENT_HELLO_SIZE, SERVER_HELLO_SIZE, client_finish, client_hello, record_size, server_hello,
};
use onde_wire::key::Key;

const JOB: [u8; 16] = [9; 16];

fuzz_target!(|bytes: &[u8]| {
    let key = Key::new(&[7; 32]);
    if let Some(hello) = bytes.first_chunk::<CLIENT_HELLO_SIZE>()
        && let Some((answer, _)) = server_hello(hello, &JOB, &key, &[1; 32])
    {
        assert!(client_finish(hello, &answer, &key).is_some());
    }
    let hello = client_hello(&JOB, &[2; 32]);
    if let Some(answer) = bytes.first_chunk::<SERVER_HELLO_SIZE>() {
        assert!(client_finish(&hello, answer, &key).is_none(), "a tag was guessed");
    }
    if let Some(head) = bytes.first_chunk() {
        record_size(head);
    }
    let (_, mut halves) = server_hello(&hello, &JOB, &key, &[1; 32]).expect("a right hello");
    assert!(halves.to_server.open(&mut bytes.to_vec()).is_none(), "a record was guessed");
});
