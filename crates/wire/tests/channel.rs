//! The secure channel: its bytes, and that nothing but the next record opens.

mod sample;

use onde_wire::channel::*;
use onde_wire::key::Key;
use sample::*;

const CLIENT_NONCE: [u8; 32] = [0xaa; 32];
const SERVER_NONCE: [u8; 32] = [0xbb; 32];

/// Both ends of a new channel: client's and server's.
fn channel() -> (Halves, Halves) {
    let hello = client_hello(&JOB, &CLIENT_NONCE);
    let (answer, server) = server_hello(&hello, &JOB, &job(), &SERVER_NONCE).expect("a hello");
    (client_finish(&hello, &answer, &job()).expect("a server"), server)
}

fn seal(cipher: &mut Cipher, plaintext: &[u8]) -> Vec<u8> {
    let mut record = vec![0; RECORD_HEAD + plaintext.len() + RECORD_TAG];
    record[RECORD_HEAD..][..plaintext.len()].copy_from_slice(plaintext);
    assert_eq!(cipher.seal(&mut record, plaintext.len()), record.len());
    record
}

fn open(cipher: &mut Cipher, record: &[u8]) -> Option<Vec<u8>> {
    cipher.open(&mut record.to_vec()).map(<[u8]>::to_vec)
}

#[test]
fn hellos_and_records_keep_their_bytes() {
    let hello = client_hello(&JOB, &CLIENT_NONCE);
    let job_and_nonce = format!("{}{}", hex(&JOB), hex(&CLIENT_NONCE));
    check_golden(&hello, &format!("4f4e44454348414e{job_and_nonce}"));
    let (answer, mut server) = server_hello(&hello, &JOB, &job(), &SERVER_NONCE).unwrap();
    check_golden(
        &answer,
        &format!(
            "{}e8fe0f1168b618ceaf71d3643ad8f6654bb9d77ef592eaa7eac83d8992f9306c",
            hex(&SERVER_NONCE)
        ),
    );
    let mut client = client_finish(&hello, &answer, &job()).unwrap();
    for (plaintext, golden) in [
        (&b"first"[..], "050000008022d15802bab78bc6608e3e506ee344bb206cabf8"),
        (b"second", "060000001f2276925654a60a33ee7665eda386f083d6ffedaf6c"),
    ] {
        check_golden(&seal(&mut client.to_server, plaintext), golden);
    }
    let record = seal(&mut server.to_client, b"answer");
    check_golden(&record, "06000000e615ff7e4ecccaa4c524eb04572c26f589ecee928c3f");
}

#[test]
fn records_of_every_size_come_through_both_ways() {
    let (mut client, mut server) = channel();
    for size in [1, 2, 15, 16, 17, 63, 64, 65, 4096, RECORD_MAX - 1, RECORD_MAX] {
        let plaintext: Vec<u8> = (0..size).map(|index| index as u8).collect();
        let record = seal(&mut client.to_server, &plaintext);
        assert_eq!(record_size(record.first_chunk().unwrap()), Some(size));
        assert_eq!(open(&mut server.to_server, &record).as_deref(), Some(&plaintext[..]));
        let record = seal(&mut server.to_client, &plaintext);
        assert_eq!(open(&mut client.to_client, &record).as_deref(), Some(&plaintext[..]));
    }
}

#[test]
fn only_the_next_record_opens() {
    let records = |client: &mut Halves| {
        [&b"one"[..], b"two", b"three"].map(|text| seal(&mut client.to_server, text))
    };
    // Orders of the records sent, and how many of them open before the first that does not.
    let cases: [(&str, &[usize], usize); 4] = [
        ("in order", &[0, 1, 2], 3),
        ("replayed", &[0, 0], 1),
        ("reordered", &[1, 0], 0),
        ("lost", &[0, 2], 1),
    ];
    for (name, order, expected) in cases {
        let (mut client, mut server) = channel();
        let records = records(&mut client);
        let opened =
            order.iter().take_while(|&&i| open(&mut server.to_server, &records[i]).is_some());
        assert_eq!(opened.count(), expected, "{name}");
    }
    let (mut client, _) = channel();
    let record = seal(&mut client.to_server, b"mine");
    assert_eq!(open(&mut client.to_client, &record), None, "reflected to its sender");
}

#[test]
fn every_bit_of_a_record_counts() {
    let record = seal(&mut channel().0.to_server, b"plaintext");
    each_flip(&record, |bit, record| {
        assert_eq!(open(&mut channel().1.to_server, record), None, "bit {bit}");
    });
    for size in 0..record.len() {
        assert_eq!(open(&mut channel().1.to_server, &record[..size]), None, "cut to {size}");
    }
}

#[test]
fn sizes_outside_the_limits_are_refused() {
    for (size, expected) in [
        (0, None),
        (1, Some(1)),
        (RECORD_MAX as u32, Some(RECORD_MAX)),
        (RECORD_MAX as u32 + 1, None),
        (u32::MAX, None),
    ] {
        assert_eq!(record_size(&size.to_le_bytes()), expected);
    }
}

#[test]
fn who_does_not_know_the_job_key_gets_no_channel() {
    let hello = client_hello(&JOB, &CLIENT_NONCE);
    let other = Key::new(&[0; 32]);
    let (answer, _) = server_hello(&hello, &JOB, &other, &SERVER_NONCE).unwrap();
    assert!(client_finish(&hello, &answer, &job()).is_none(), "a false server");
    let (answer, mut server) = server_hello(&hello, &JOB, &job(), &SERVER_NONCE).unwrap();
    each_flip(&answer, |bit, answer| {
        let answer = answer.try_into().unwrap();
        assert!(client_finish(&hello, answer, &job()).is_none(), "bit {bit}");
    });
    let (answer, _) = server_hello(&hello, &JOB, &other, &SERVER_NONCE).unwrap();
    let mut client = client_finish(&hello, &answer, &other).unwrap();
    let record = seal(&mut client.to_server, b"let me in");
    assert_eq!(open(&mut server.to_server, &record), None, "a false client");
}

#[test]
fn a_hello_for_another_job_is_refused() {
    let hello = client_hello(&JOB, &CLIENT_NONCE);
    assert!(server_hello(&hello, &[1; 16], &job(), &SERVER_NONCE).is_none());
    each_flip(&hello[..24], |_, head| {
        let mut hello = hello;
        hello[..24].copy_from_slice(head);
        assert!(server_hello(&hello, &JOB, &job(), &SERVER_NONCE).is_none());
    });
}

#[test]
fn a_replayed_client_hello_gives_other_keys() {
    let hello = client_hello(&JOB, &CLIENT_NONCE);
    let (_, mut later) = server_hello(&hello, &JOB, &job(), &[0xcc; 32]).unwrap();
    let record = seal(&mut channel().0.to_server, b"stop");
    assert_eq!(open(&mut later.to_server, &record), None);
}
