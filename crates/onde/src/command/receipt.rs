//! `onde receipt`: a settled job's receipt, fetched from its broker and verified by nobody but this machine.

use anyhow::{Context as _, Result};
use onde_client::api::{Hex, SignedReceipt};
use std::path::Path;

use super::{print, print_json};
use crate::cli::Receipt;
use crate::cluster::Cluster;
use crate::config::Config;
use crate::failure::hinted;
use crate::report::Report;
use crate::table::tokens;

/// What a key starts with.
const PREFIX: &str = "ed25519:";
/// Most bytes of a receipt: far more than any has.
const SIZE_MAX: u64 = 64 << 10;

pub fn run(receipt: Receipt, report: &Report) -> Result<()> {
    match receipt {
        Receipt::Get { job } => get(&job.job, report),
        Receipt::Verify { file, key } => verify(&file, key.as_deref()),
    }
}

/// Prints a receipt. The broker's key is kept with the context: TLS vouched for it.
fn get(job: &str, report: &Report) -> Result<()> {
    let (cluster, job) = Cluster::open_for(job)?;
    let signed = cluster.broker.receipt(&job.id.0)?;
    signed.verify(&signed.key.0)?;
    let key = format!("{PREFIX}{}", signed.key);
    let mut config = Config::load()?;
    match config.receipt_keys.get(&cluster.name) {
        Some(known) if *known != key => {
            return Err(hinted(
                format!("the broker signs with {key}, and signed with {known} before"),
                "ask the operator; to take the new key, remove the old one from the configuration",
            ));
        }
        Some(_) => {}
        None => {
            config.receipt_keys.insert(cluster.name.clone(), key.clone());
            config.save()?;
        }
    }
    report.line(&format!("signed with {key}"));
    print_json(&signed)
}

fn verify(file: &Path, key: Option<&str>) -> Result<()> {
    let in_file = || format!("in {}", file.display());
    let size = std::fs::metadata(file).with_context(in_file)?.len();
    anyhow::ensure!(size <= SIZE_MAX, "{} is no receipt", file.display());
    let text = std::fs::read_to_string(file).with_context(in_file)?;
    let signed: SignedReceipt = serde_json::from_str(&text).with_context(in_file)?;
    let who = match key {
        Some(key) => {
            let parsed = key.strip_prefix(PREFIX).and_then(|digits| digits.parse::<Hex<32>>().ok());
            let parsed = parsed.ok_or_else(|| hinted("no key", "ed25519: and 64 hex digits"))?;
            signed.verify(&parsed.0).with_context(in_file)?;
            key.to_owned()
        }
        None => {
            let told = format!("{PREFIX}{}", signed.key);
            let config = Config::load()?;
            let known = config.receipt_keys.iter().find(|(_, key)| **key == told);
            let Some((context, _)) = known else {
                return Err(hinted(
                    format!("{told} signed it, which no context here knows"),
                    "--key KEY, as the operator told you; or onde receipt get JOB once",
                ));
            };
            signed.verify(&signed.key.0).with_context(in_file)?;
            format!("the broker of context {context}")
        }
    };
    let receipt = &signed.receipt;
    let spent = tokens(receipt.paid_micro - receipt.refund_micro);
    let (job, account) = (receipt.job, &receipt.account);
    print(&format!("valid: job {job} of {account} cost {spent} tokens; signed by {who}\n"))
}
