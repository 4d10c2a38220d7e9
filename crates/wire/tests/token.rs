//! Keys, boot tokens, payment chains and redemption certificates.

mod sample;

use onde_wire::chain::{STEPS_MAX, step, verify, walk};
use onde_wire::key::{Key, certificate_key, job_key, node_id, node_key};
use onde_wire::token::{BOOT_TOKEN_SIZE, BootToken, Certificate, Origin, Renewal};
use sample::*;

#[test]
fn keys_are_drawn_by_their_labels() {
    check_golden(&node_id(&MAC), "91c9625b55caeb287c9c252d5a6203a5");
    check_golden(
        &node_key(&secret(), &node_id(&MAC)),
        "0e88ef9c800392b69cb7af7c36ccc70c262fe6f31a42748419b98514204889d9",
    );
    check_golden(
        &job_key(&node(), &JOB),
        "38ba57801cdbd0cd90803c211237153dc1fcfa9a0e1764df685cb5b31cd307e3",
    );
    check_golden(
        &certificate_key(&node()),
        "cd4ccf70b4abed9a3f1eda1d88d70a768f08e8625576ee4214e53134f8c0c236",
    );
}

#[test]
fn a_tag_is_hmac_sha256() {
    // RFC 4231, test cases 1 and 2: keys shorter than a block count as padded with zeros.
    let padded = |key: &[u8]| {
        let mut out = [0; 32];
        out[..key.len()].copy_from_slice(key);
        Key::new(&out)
    };
    let cases = [
        (
            padded(&[0x0b; 20]),
            &b"Hi There"[..],
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        ),
        (
            padded(b"Jefe"),
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
    ];
    for (key, message, golden) in cases {
        let tag = key.tag(&[message]);
        check_golden(&tag, golden);
        for cut in 0..message.len() {
            assert!(key.verify(&[&message[..cut], &message[cut..]], &tag), "parts are one message");
        }
        each_flip(&tag, |_, tag| assert!(!key.verify(&[message], tag.try_into().unwrap())));
    }
}

#[test]
fn a_boot_token_keeps_its_bytes() {
    let bytes = token().emit();
    check_golden(&bytes, "f4dcf0daa477337ccf62a4281738671c7a9732a0cf4457bda39c1b1b014845a8");
    check_golden(
        &token().sign(&node()),
        "b3bc0706ea31f0d824a5a51c9681c8f11575b59db16b1e733aeb440d050cd8f8",
    );
    assert_eq!(BootToken::parse(&bytes), Some(token()));
    each_flip(&bytes[..8], |_, magic| {
        let mut bytes = bytes;
        bytes[..8].copy_from_slice(magic);
        assert_eq!(BootToken::parse(&bytes), None, "another version");
    });
    for origin in [Origin::Loader, Origin::Template] {
        let token = BootToken { origin, ..token() };
        assert_eq!(BootToken::parse(&token.emit()), Some(token));
    }
    let mut strange = bytes;
    strange[BOOT_TOKEN_SIZE - 53] = 3;
    assert_eq!(BootToken::parse(&strange), None, "no such origin");
}

#[test]
fn a_renewal_is_for_one_job_in_one_life_and_for_one_index() {
    let (right, life) = (renewal(), [3; 16]);
    let tag = right.sign(&node(), &JOB, &life);
    check_golden(&tag, "b88dcb7e218d7d46deff6a4f6f0acb9c4484e3dddf722b03dbf20267e083b4a3");
    assert!(right.verify(&node(), &JOB, &life, &tag));
    assert!(!right.verify(&node(), &[8; 16], &life, &tag), "another job's");
    assert!(!right.verify(&node(), &JOB, &[4; 16], &tag), "another life's");
    assert!(!right.verify(&job(), &JOB, &life, &tag), "by one who knows the job's key only");
    for other in [Renewal { index: 78, ..right }, Renewal { anchor: [7; 32], ..right }] {
        assert!(!other.verify(&node(), &JOB, &life, &tag));
    }
    each_flip(&tag, |bit, tag| {
        let is_right = right.verify(&node(), &JOB, &life, tag.try_into().unwrap());
        assert!(!is_right, "bit {bit}");
    });
}

#[test]
fn a_certificate_cannot_be_forged() {
    let bytes = certificate().sign(&certificates());
    check_golden(
        &bytes,
        "4f4e4445434552540909090909090909090909090909090991c9625b55caeb287c9c252d5a6203a503030303\
         030303030303030303030303460000000000000087d6120000000000b1cb74000000000006e91caf889d671d\
         9df2034a827cb2d478e19dfd12587bee9412fe8f1154bbaa",
    );
    assert_eq!(Certificate::verify(&bytes, &certificates()), Some(certificate()));
    assert_eq!(Certificate::claimed_node(&bytes), node_id(&MAC));
    each_flip(&bytes, |bit, bytes| {
        let bytes = bytes.try_into().unwrap();
        assert_eq!(Certificate::verify(bytes, &certificates()), None, "bit {bit}");
    });
    for other in [node(), job()] {
        assert_eq!(Certificate::verify(&bytes, &other), None, "a key for another purpose");
    }
}

#[test]
fn a_chain_is_sha256_under_its_label() {
    let seed = [0; 32];
    check_golden(&step(&seed), "5af61df146a4ad486e1c2b88c60813746ceb1ec5169d0b91637f564072bf1b9a");
    check_golden(
        &walk(&seed, 4096),
        "9201da8cfb828578f8431760d006eac9253c64cced891fef8a83d942a1108928",
    );
    assert_eq!(walk(&seed, 0), seed);
    assert_eq!(walk(&walk(&seed, 3), 4), walk(&seed, 7));
}

#[test]
fn a_payment_leads_to_the_last_one_in_the_steps_stated() {
    let seed = [8; 32];
    let last = walk(&seed, STEPS_MAX + 1);
    for steps in [1, 2, 100, STEPS_MAX] {
        let value = walk(&seed, STEPS_MAX + 1 - steps);
        assert!(verify(&last, &value, steps));
        assert!(!verify(&last, &value, steps - 1));
        assert!(!verify(&last, &value, steps + 1));
        each_flip(&value[..1], |_, first| {
            let mut value = value;
            value[0] = first[0];
            assert!(!verify(&last, &value, 1));
        });
    }
    assert!(!verify(&last, &last, 0), "nothing is paid twice");
    assert!(!verify(&last, &seed, STEPS_MAX + 1), "too long a walk, though right");
    assert!(!verify(&last, &seed, u32::MAX), "returns at once");
}
