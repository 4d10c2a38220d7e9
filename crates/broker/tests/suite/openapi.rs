//! Walks the OpenAPI document and asks the running broker for each operation: with right and wrong keys, with
//! parameters and bodies made from the document's schemas, and with each of them broken in each of its parts. Every
//! status and every body that comes back has to be one that the document promises, and each operation is seen to do what it
//! is for.

use crate::stage::*;
use onde_broker::Broker;
use onde_broker::ledger::Ledger;
use onde_broker::payments::Webhook as WebhookSecret;
use onde_client::api::*;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json as value};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

/// Deepest nesting of schemas that is followed.
const DEPTH_MAX: u32 = 16;

/// A document and a broker to hold against it.
struct Tester {
    document: Value,
    callers: Vec<Caller>,
    /// Ids that exist, for paths.
    job: String,
    asked: usize,
    /// Operations that did what they are for.
    done: BTreeSet<String>,
}

impl Tester {
    /// What a schema is when references are followed.
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(path) => self.document.pointer(&path[1..]).expect("a schema of this name"),
            None => schema,
        }
    }

    /// Something that fits a schema.
    fn example(&self, name: &str, schema: &Value, depth: u32) -> Value {
        assert!(depth < DEPTH_MAX, "{name} nests too deeply");
        let schema = self.resolve(schema);
        if let Some(one) = schema["oneOf"].as_array().and_then(|any| any.last()) {
            return self.example(name, one, depth + 1);
        }
        if let Some(one) = schema["enum"].as_array().and_then(|any| any.first()) {
            return one.clone();
        }
        match self.kinds(schema).first().copied() {
            Some("object") => {
                let parts = schema["properties"].as_object().cloned().unwrap_or_default();
                let part = |(name, part): (&String, &Value)| {
                    (name.clone(), self.example(name, part, depth + 1))
                };
                Value::Object(parts.iter().map(part).collect::<Map<_, _>>())
            }
            Some("array") => value!([self.example(name, &schema["items"], depth + 1)]),
            Some("integer" | "number") => schema["minimum"].as_u64().unwrap_or(1).max(1).into(),
            Some("boolean") => true.into(),
            Some("string") => text(name).into(),
            _ => Value::Null,
        }
    }

    /// The types that a schema allows; none: any.
    fn kinds<'a>(&self, schema: &'a Value) -> Vec<&'a str> {
        match &schema["type"] {
            Value::String(kind) => vec![kind],
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// Why a value does not fit a schema.
    fn misfit(&self, value: &Value, schema: &Value, at: &str) -> Result<(), String> {
        let schema = self.resolve(schema);
        if let Some(any) = schema["oneOf"].as_array() {
            let fits = any.iter().any(|one| self.misfit(value, one, at).is_ok());
            return if fits { Ok(()) } else { Err(format!("{at} fits none: {value}")) };
        }
        let kinds = self.kinds(schema);
        if !kinds.is_empty() && !kinds.iter().any(|kind| is_a(value, kind)) {
            return Err(format!("{at} is no {kinds:?}: {value}"));
        }
        if let Some(any) = schema["enum"].as_array().filter(|any| !any.contains(value)) {
            return Err(format!("{at} is none of {any:?}: {value}"));
        }
        if let Some(low) = schema["minimum"].as_i64()
            && value.as_i64().is_some_and(|value| value < low)
        {
            return Err(format!("{at} is below {low}: {value}"));
        }
        match value {
            Value::Array(values) => {
                values.iter().try_for_each(|one| self.misfit(one, &schema["items"], at))
            }
            Value::Object(parts) => self.misfit_object(parts, schema, at),
            _ => Ok(()),
        }
    }

    fn misfit_object(
        &self,
        parts: &Map<String, Value>,
        schema: &Value,
        at: &str,
    ) -> Result<(), String> {
        let known = schema["properties"].as_object().cloned().unwrap_or_default();
        if let Some(name) = required(schema).into_iter().find(|name| !parts.contains_key(*name)) {
            return Err(format!("{at} has no {name}"));
        }
        parts.iter().try_for_each(|(name, part)| match known.get(name) {
            Some(schema) => self.misfit(part, schema, &format!("{at}.{name}")),
            None => Err(format!("{at} has {name}, which nobody told of")),
        })
    }

    /// Sends, and holds the answer against the operation.
    fn ask(&mut self, caller: usize, method: &str, path: &str, body: Option<&str>, op: &Value) {
        let answer = self.callers[caller].ask(method, path, body);
        self.hold((method, path, body), answer, op);
    }

    /// Holds an answer against the operation that it is of.
    fn hold(
        &mut self,
        (method, path, body): (&str, &str, Option<&str>),
        (status, kind, text): (u16, String, String),
        op: &Value,
    ) {
        let what = format!("{method} {path} {body:?}: {status} {text}");
        let patterns = [status.to_string(), format!("{}XX", status / 100)];
        let promised = patterns.iter().find_map(|status| op["responses"].get(status));
        let promised = promised.unwrap_or_else(|| panic!("nobody told of this status: {what}"));
        let content = promised["content"].as_object().expect("every answer has a body");
        let (promised_kind, promised) = content.iter().next().expect("of one kind");
        assert!(kind.starts_with(&**promised_kind), "{kind}, not {promised_kind}: {what}");
        if promised_kind == "application/json" {
            let value: Value = serde_json::from_str(&text).expect(&what);
            if let Err(misfit) = self.misfit(&value, &promised["schema"], "body") {
                panic!("{misfit}: {what}");
            }
        }
        self.asked += 1;
        if (200..300).contains(&status) {
            self.done.insert(op["operationId"].as_str().expect("each has one").into());
        }
    }

    /// Does what an operation is for, as `caller`, at a path that fits `pattern`: the answer.
    fn act<T: DeserializeOwned>(
        &mut self,
        caller: usize,
        (method, pattern): (&str, &str),
        id: &str,
        body: Option<&str>,
        head: (&str, &str),
    ) -> T {
        let op = self.document["paths"][pattern][method].clone();
        let path = pattern.replace("{id}", id).replace("{name}", "rich");
        let answer = self.callers[caller].ask_with(method, &path, body, head);
        let text = answer.2.clone();
        assert_eq!(answer.0, 200, "{method} {path}: {text}");
        self.hold((method, &path, body), answer, &op);
        serde_json::from_str(&text).expect("an answer of the API's type")
    }

    /// The life of a job, of a key and of a shop's payment, from their beginning to their end.
    fn live(&mut self) {
        const NO: (&str, &str) = ("Accept", "*/*");
        const RICH: usize = 1;
        let opened: JobOpened =
            self.act(RICH, ("post", "/v1/jobs"), "", Some(&json(&purchase(5))), NO);
        let id = opened.job.id.to_string();
        // The second is of a new chain.
        for renewed in [false, true] {
            let request = TokensRequest { idempotency_key: fresh_key(), count: 9 };
            let at = ("post", "/v1/jobs/{id}/tokens");
            let paid: Payment = self.act(RICH, at, &id, Some(&json(&request)), NO);
            assert_eq!(paid.renewal.is_some(), renewed);
        }
        let request = RedeemRequest { certificate: certificate(&opened.job, 5, 3 * TOKEN) };
        let at = ("post", "/v1/jobs/{id}/redeem");
        let settled: Job = self.act(RICH, at, &id, Some(&json(&request)), NO);
        let again: Job = self.act(RICH, ("post", "/v1/jobs/{id}/cancel"), &id, Some("{}"), NO);
        assert_eq!(settled, again);
        let shown: Job = self.act(RICH, ("get", "/v1/jobs/{id}"), &id, None, NO);
        assert_eq!(settled, shown);
        let at = ("get", "/v1/jobs/{id}/receipt");
        let signed: SignedReceipt = self.act(RICH, at, &id, None, NO);
        let usage: Usage = self.act(RICH, ("get", "/v1/jobs/{id}/usage"), &id, None, NO);
        assert_eq!(usage.samples.last().copied(), signed.receipt.last);

        let at = ("post", "/v1/accounts/{name}/keys");
        let key: AccountOpened = self.act(0, at, "", Some(&json(&KeyRequest::default())), NO);
        let _: Revoked = self.act(RICH, ("delete", "/v1/keys/{id}"), &key.id.to_string(), None, NO);

        let (reference, account) = ("order-1".into(), "rich".into());
        let body = json(&PaidRequest { reference, account, micro: 1 });
        let at = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
        let signature = WebhookSecret::new(WEBHOOK).sign(at, body.as_bytes());
        let head = ("Onde-Signature", &*signature);
        let _: Credited = self.act(2, ("post", "/v1/webhook"), "", Some(&body), head);
    }

    /// Paths and queries for an operation: right ones first.
    fn paths(&self, path: &str, op: &Value) -> Vec<String> {
        let parameters = op["parameters"].as_array().cloned().unwrap_or_default();
        let mut paths = match path.contains("{id}") {
            true => [&*self.job, &"0".repeat(32), "zz", "%00"]
                .iter()
                .map(|id| path.replace("{id}", id))
                .collect(),
            false => vec![path.replace("{name}", "rich"), path.replace("{name}", "%F0%9F")],
        };
        let right = paths[0].clone();
        for parameter in parameters.iter().filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().expect("a name");
            let example = self.example(name, &parameter["schema"], 0);
            for value in
                [&*example.to_string().replace('"', ""), "-1", "99999999999999999999", "x", ""]
            {
                paths.push(format!("{right}?{name}={value}"));
            }
        }
        paths
    }

    /// A body that fits and many that do not.
    fn bodies(&self, op: &Value) -> Vec<Option<String>> {
        let content = &op["requestBody"]["content"]["application/json"];
        if content.is_null() {
            return vec![Some("{}".into()), Some("{".into())];
        }
        let right = self.example("body", &content["schema"], 0);
        let mut bodies = vec![right.clone()];
        for name in right.as_object().expect("an object").keys() {
            let mut without = right.clone();
            without.as_object_mut().expect("an object").remove(name);
            bodies.push(without);
            for wrong in
                [value!(null), value!(-1), value!("x"), value!([]), value!(u64::MAX), value!(1.5)]
            {
                let mut broken = right.clone();
                broken[name] = wrong;
                bodies.push(broken);
            }
        }
        let mut more = right;
        more["nobody_told_of_this"] = 1.into();
        bodies.push(more);
        let texts = bodies.iter().map(|body| Some(body.to_string()));
        texts.chain([Some("{".into()), Some(String::new()), Some("x".repeat(20_000))]).collect()
    }

    fn operation(&mut self, path: &str, method: &str, op: &Value) {
        let bodies = if method == "post" { self.bodies(op) } else { vec![None] };
        let paths = self.paths(path, op);
        for caller in 0..self.callers.len() {
            for path in &paths {
                self.ask(caller, method, path, bodies[0].as_deref(), op);
            }
            for body in &bodies {
                self.ask(caller, method, &paths[0], body.as_deref(), op);
            }
        }
    }
}

fn required(schema: &Value) -> Vec<&str> {
    let names = schema["required"].as_array();
    names.into_iter().flatten().filter_map(Value::as_str).collect()
}

fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

/// What a text of this name looks like where it fits.
fn text(name: &str) -> String {
    match name {
        "loader_sha256" => "03".repeat(32),
        "certificate" => "00".repeat(onde_wire::token::CERTIFICATE_SIZE),
        "moves" => "01".repeat(16),
        "idempotency_key" => fresh_key(),
        _ => "rich".into(),
    }
}

#[test]
fn the_broker_keeps_what_its_document_promises() {
    let dir = Dir::new();
    let now = Instant::now();
    let ledger = Ledger::open(&place(&dir.0)).expect("a ledger");
    // Chains of two tokens, so that a job is soon at the end of its first.
    let broker = Broker::new(cluster(), ledger, OPERATOR, now).with_chains(1);
    let broker = Arc::new(broker.with_webhook(WEBHOOK));
    hear(&broker, hello(1, 1), now);
    let operator = Caller::new(&serve(broker), OPERATOR);
    let rich = operator.customer("rich", 1_000_000);
    let job = rich.post::<JobOpened>("/v1/jobs", &purchase(1)).job.id;
    let stranger = Caller::new(&operator.url, "onde_nobody");
    let document: Value = stranger.get("/openapi.json");
    let callers = vec![operator, rich, stranger];
    let mut tester =
        Tester { document, callers, job: job.to_string(), asked: 0, done: BTreeSet::new() };
    tester.live();
    let paths = tester.document["paths"].as_object().cloned().expect("paths");
    for (path, operations) in &paths {
        for (method, op) in operations.as_object().expect("operations") {
            tester.operation(path, method, op);
        }
    }
    let operations =
        paths.values().flat_map(|operations| operations.as_object().expect("an object"));
    for (method, op) in operations {
        let id = op["operationId"].as_str().expect("each has one");
        assert!(tester.done.contains(id), "{method} {id} was never seen to succeed");
    }
    assert!(tester.asked > 500, "only {} requests", tester.asked);
    println!("openapi: {} requests answered as promised", tester.asked);
}
