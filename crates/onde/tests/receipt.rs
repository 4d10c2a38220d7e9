//! `onde receipt verify` as its users have it: the program, a file, and nobody to ask.

use ed25519_dalek::{Signer, SigningKey};
use onde_client::api::{Hex, Receipt, SettledBy, SignedReceipt};
use onde_client::receipt::RECEIPT_VERSION;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A folder of its own for a test, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("onde-receipt-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        Self(dir)
    }

    /// What the program says of a receipt, with no configuration but what is in the folder.
    fn verify(&self, text: &str, key: Option<&str>) -> Output {
        let file = self.0.join("receipt.json");
        fs::write(&file, text).expect("a file");
        let mut onde = Command::new(env!("CARGO_BIN_EXE_onde"));
        onde.env_clear().env("HOME", &self.0).args(["receipt", "verify"]).arg(&file);
        onde.args(key.map(|key| ["--key", key]).into_iter().flatten());
        onde.output().expect("onde runs")
    }

    /// `expect`: what it prints, or a word of the error.
    fn check(&self, text: &str, key: Option<&str>, expect: Result<&str, &str>) {
        let told = self.verify(text, key);
        let [out, errors] =
            [told.stdout, told.stderr].map(|text| String::from_utf8(text).expect("text"));
        match expect {
            Ok(line) => assert_eq!((told.status.code(), &*out), (Some(0), line), "{errors}"),
            Err(word) => {
                assert!(!told.status.success() && out.is_empty(), "{out}");
                assert!(errors.starts_with("error: ") && errors.contains(word), "{errors}");
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// 30 tokens were paid, and 24.39 came back.
fn signed(key: &SigningKey) -> String {
    let receipt = Receipt {
        version: RECEIPT_VERSION,
        job: Hex([0xA1; 16]),
        account: "ada".to_owned(),
        node: 1,
        node_id: Hex([2; 16]),
        incarnation: Hex([3; 16]),
        mem_mib: 256,
        vcpus: 1,
        disk_mib: 0,
        prices: None,
        opened_at: 1_000,
        settled_at: 1_060,
        settled_by: SettledBy::Certificate,
        value_micro: 1_000_000,
        sold: 30,
        paid_micro: 30_000_000,
        refund_micro: 24_390_000,
        last: None,
    };
    let signature = Hex(key.sign(&receipt.signed_text()).to_bytes());
    let signed = SignedReceipt { receipt, key: Hex(key.verifying_key().to_bytes()), signature };
    serde_json::to_string_pretty(&signed).expect("JSON")
}

#[test]
fn a_good_receipt_is_valid_and_an_altered_one_is_not() {
    let folder = Folder::new();
    let key = |seed| SigningKey::from_bytes(&[seed; 32]);
    let name = |key: &SigningKey| format!("ed25519:{}", Hex(key.verifying_key().to_bytes()));
    let (broker, other) = (key(7), key(8));
    let (good, told) = (signed(&broker), name(&broker));
    let id = "a1".repeat(16);
    let valid = format!("valid: job {id} of ada cost 5.61 tokens; signed by {told}\n");
    folder.check(&good, Some(&told), Ok(&valid));
    for (was, is) in [
        ("24390000", "24390001"),
        ("\"ada\"", "\"eve\""),
        ("\"sold\": 30", "\"sold\": 31"),
        ("\"certificate\"", "\"unused\""),
        ("\"last\": null", "\"last\": null, \"more\": 1"),
    ] {
        let altered = good.replace(was, is);
        assert_ne!(altered, good, "{was}");
        folder.check(&altered, Some(&told), Err("receipt.json"));
    }
    folder.check(&good, Some(&name(&other)), Err("another broker's key"));
    folder.check(&good, Some("ed25519:00"), Err("no key"));
    folder.check(&good[..good.len() / 2], Some(&told), Err("receipt.json"));
    // Without a key those count that a context has seen, and here is none.
    folder.check(&good, None, Err("hint: --key"));
    let known = format!("[receipt_keys]\nlab = \"{told}\"\n");
    fs::create_dir_all(folder.0.join(".config/onde")).expect("a folder");
    fs::write(folder.0.join(".config/onde/config.toml"), known).expect("a file");
    let valid = valid.replace(&told, "the broker of context lab");
    folder.check(&good, None, Ok(&valid));
}
