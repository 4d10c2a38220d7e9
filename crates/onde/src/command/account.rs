//! `onde account`: what a user has with the broker, and the operator's acts on accounts.

use anyhow::{Context as _, Result};
use onde_client::api::{CreditRequest, Hex, KeyRequest, Scope};
use onde_client::broker::{Broker, new_key};
use onde_wire::cluster::TOKEN_MICRO;

use super::{print, print_json};
use crate::cli::{Account, Operator};
use crate::cluster::{Cluster, enter};
use crate::config::{Config, Context};
use crate::failure::hinted;
use crate::report::Report;
use crate::table::{cost, render, span, tokens};

pub fn run(context: Option<&str>, account: Account, report: &Report) -> Result<()> {
    match account {
        Account::Show { limit, json } => show(&Cluster::open(context)?, limit, json),
        Account::Use { key, broker, pin, plain_http } => {
            let broker = match (broker, pin) {
                (Some(url), Some(pin)) => Some(format!("{url}#{pin}")),
                (url, _) => url,
            };
            take(context.unwrap_or("default"), key, broker, plain_http, report)
        }
        Account::Open { name, operator } => {
            let opened = broker(context, &operator)?.open_account(&name)?;
            report.line(&format!("opened account {}; this key is shown once:", opened.name));
            print(&format!("{}\n", opened.key))
        }
        Account::Key { name, read_only, metrics, days, operator } => {
            let scope = match (read_only, metrics) {
                (true, _) => Scope::Reader,
                (_, true) => Scope::Metrics,
                _ => Scope::Customer,
            };
            let request = KeyRequest { scope, expires_in_s: days.map(|days| days * 86_400) };
            let opened = broker(context, &operator)?.new_account_key(&name, &request)?;
            let id = opened.id;
            report.line(&format!("key {id} of account {name}; it is shown once:"));
            print(&format!("{}\n", opened.key))
        }
        Account::Revoke { id, operator } => {
            let id = id.parse::<Hex<8>>().map_err(|_| {
                hinted(format!("`{id}` is no key's id"), "16 hex digits, told when it was made")
            })?;
            let revoked = broker(context, &operator)?.revoke_key(&id)?;
            report.line(&format!("key {} is worthless now", revoked.id));
            Ok(())
        }
        Account::Credit { name, tokens: count, operator } => {
            let micro = count.checked_mul(TOKEN_MICRO).context("that many tokens do not exist")?;
            let request = CreditRequest { idempotency_key: new_key()?, micro };
            let credited = broker(context, &operator)?.credit(&name, &request)?;
            let balance = tokens(credited.balance_micro);
            report.line(&format!("account {} has {balance} tokens", credited.name));
            Ok(())
        }
    }
}

fn show(cluster: &Cluster, limit: u32, json: bool) -> Result<()> {
    let account = cluster.broker.account(limit)?;
    if json {
        return print_json(&account);
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let row = |entry: &onde_client::api::Entry| {
        let job = entry.job.map_or(String::new(), |job| job.to_string()[..8].to_owned());
        let amount = match entry.delta_micro {
            out @ ..0 => format!("-{}", cost(out.unsigned_abs())),
            into => format!("+{}", tokens(into.unsigned_abs())),
        };
        vec![span(now.saturating_sub(entry.at)), amount, entry.reason.clone(), job]
    };
    let rows: Vec<_> = account.entries.iter().map(row).collect();
    print(&format!("{}: {} tokens\n\n", account.name, tokens(account.balance_micro)))?;
    print(&render(&["AGO", "TOKENS", "FOR", "JOB"], &rows))
}

/// Makes the key a context, and that the current one.
fn take(
    name: &str,
    key: String,
    broker: Option<String>,
    plain_http: bool,
    report: &Report,
) -> Result<()> {
    let mut config = Config::load()?;
    let broker = match broker {
        Some(broker) => broker,
        None => config.choose(None)?.1.broker.clone(),
    };
    Broker::new(&broker, &key)?;
    if !plain_http && is_open_to_readers(&broker) {
        return Err(hinted(
            format!("{broker} is not encrypted: whoever is on the way can read the key"),
            "use the broker's https:// address, or say --plain-http",
        ));
    }
    // The current cluster's broker under another key: a lab stays a lab.
    let current = config.choose(None).ok().filter(|(_, current)| current.broker == broker);
    let lab = current.and_then(|(_, current)| current.lab.clone());
    config.contexts.insert(name.to_owned(), Context { broker, key, lab });
    config.current = Some(name.to_owned());
    config.save()?;
    report.line(&format!("context {name} is the current one"));
    Ok(())
}

/// Whether calls to this address cross a network in clear.
fn is_open_to_readers(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("http://") else { return false };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = host.parse::<std::net::IpAddr>();
    !(host == "localhost" || address.is_ok_and(|address| address.is_loopback()))
}

/// The broker, called with the operator's key.
fn broker(context: Option<&str>, operator: &Operator) -> Result<Broker> {
    let config = Config::load()?;
    let known = config.choose(context).ok().map(|(_, context)| context);
    if let Some(context) = known {
        enter(context)?;
    }
    let lab = known.and_then(|context| context.lab.as_ref()).map(|dir| dir.join("admin.key"));
    let file = operator.operator_key.clone().or(lab);
    let Some(file) = file else {
        return Err(hinted("no operator's key", "--operator-key FILE, as the broker wrote it"));
    };
    let key = std::fs::read_to_string(&file);
    let key = key.with_context(|| format!("cannot read {}", file.display()))?;
    let url = operator.broker.as_ref().or(known.map(|context| &context.broker));
    let Some(url) = url else {
        return Err(hinted("no broker to talk to", "--broker https://HOST:PORT#sha256:DIGEST"));
    };
    Ok(Broker::new(url, key.trim())?)
}
