//! Boot tokens, certificates and payments of any bytes: no panic, nothing forged, bounded work.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::bytes::Reader;
use onde_wire::key::Key;
use onde_wire::token::{BootToken, Certificate};

fuzz_target!(|bytes: &[u8]| {
    let key = Key::new(&[7; 32]);
    if let Some(token) = bytes.first_chunk().and_then(BootToken::parse) {
        assert_eq!(BootToken::parse(&token.emit()), Some(token));
    }
    if let Some(certificate) = bytes.first_chunk() {
        assert_eq!(Certificate::verify(certificate, &key), None, "a tag was guessed");
        Certificate::claimed_node(certificate);
    }
    let mut r = Reader::new(bytes);
    if let (Some(last), Some(value), Some(steps)) = (r.array(), r.array(), r.u32()) {
        assert!(!onde_wire::chain::verify(&last, &value, steps), "a payment was guessed");
    }
});
