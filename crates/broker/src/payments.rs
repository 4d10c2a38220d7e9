//! How customers' money comes in. All that a payment provider has to say is a [`Paid`]; [`Broker::paid`] takes it once
//! for each of the provider's references. Two providers are built in: the operator, with its key, and any shop system
//! that can send a signed request (a webhook).

use crate::Broker;
use crate::accounts::{balance, credit};
use crate::journal::request_key;
use crate::refusal::Refusal;
use hmac::{Hmac, KeyInit, Mac};
use onde_client::api::{Credited, Hex, PaidRequest};
use sha2::Sha256;

/// Most micro-tokens in one credit: 10^9 tokens. Nine thousand of them still fit a balance of 63 bits.
const CREDIT_MICRO_MAX: u64 = 1_000_000_000_000_000;
/// How far a webhook's time may be from the broker's clock: what shops allow for clocks and queues.
const AGE_MAX_S: u64 = 300;

/// Money that came in.
#[derive(Debug)]
pub struct Paid<'a> {
    /// The provider's word: money comes out of the book `cash:WORD`.
    pub through: &'static str,
    /// Whose references these are: one namespace a provider, which is no account's name.
    pub scope: &'static str,
    /// The provider's reference, its idempotency key.
    pub reference: &'a str,
    /// The account.
    pub account: &'a str,
    /// Micro-tokens.
    pub micro: u64,
}

/// A shop system's secret.
pub struct Webhook(Hmac<Sha256>);

impl Webhook {
    /// Takes the secret, as text that both sides have.
    pub fn new(secret: &str) -> Self {
        Self(Hmac::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length"))
    }

    /// The `Onde-Signature` of a body sent at `at` seconds since 1970.
    pub fn sign(&self, at: u64, body: &[u8]) -> String {
        let tag: [u8; 32] = self.over(at, body).finalize().into_bytes().into();
        format!("t={at},v1={}", Hex(tag))
    }

    /// Whether the shop sent this body lately. The time is signed too, so that an old request cannot be sent again;
    /// one that is young is taken once, by its reference.
    pub fn check(&self, signature: &str, body: &[u8], now: u64) -> Result<(), Refusal> {
        let parts = signature.strip_prefix("t=").and_then(|text| text.split_once(",v1="));
        let (at, tag) = parts.ok_or(Refusal::BadSignature("has another form"))?;
        let at: u64 = at.parse().map_err(|_| Refusal::BadSignature("has no time"))?;
        let tag: Hex<32> = tag.parse().map_err(|_| Refusal::BadSignature("is not hex"))?;
        let right = self.over(at, body).verify_slice(&tag.0).is_ok();
        match right {
            false => Err(Refusal::BadSignature("is not over this time and body")),
            true if at.abs_diff(now) > AGE_MAX_S => Err(Refusal::BadSignature("is too old")),
            true => Ok(()),
        }
    }

    fn over(&self, at: u64, body: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(format!("{at}.").as_bytes());
        mac.update(body);
        mac
    }
}

impl Broker {
    /// Takes in what a provider says, once.
    pub fn paid(&self, paid: &Paid<'_>) -> Result<Credited, Refusal> {
        let (name, micro) = (paid.account, paid.micro);
        if !(1..=CREDIT_MICRO_MAX).contains(&micro) {
            return Err(Refusal::Invalid("a credit is 1 to 10^15 micro-tokens"));
        }
        let key = request_key(paid.scope, paid.reference);
        self.ledger.act_once(paid.scope, paid.reference, &("credit", name, micro), |tx| {
            balance(tx, name)?;
            credit(tx, name, micro, paid.through, key.clone())?;
            Ok(Credited { name: name.into(), balance_micro: balance(tx, name)? })
        })
    }

    /// Takes in a webhook's request.
    pub fn webhook_paid(
        &self,
        signature: &str,
        body: &[u8],
        now: u64,
    ) -> Result<Credited, Refusal> {
        let webhook = self.webhook.as_ref().ok_or(Refusal::NotFound("webhook"))?;
        webhook.check(signature, body, now)?;
        let request: PaidRequest = serde_json::from_slice(body)
            .map_err(|_| Refusal::Invalid("the body has to be a PaidRequest"))?;
        self.paid(&Paid {
            through: "webhook",
            scope: "/webhook",
            reference: &request.reference,
            account: &request.account,
            micro: request.micro,
        })
    }

    /// Lets a shop system credit accounts.
    pub fn with_webhook(mut self, secret: &str) -> Self {
        self.webhook = Some(Webhook::new(secret));
        self
    }
}
