//! The ledger's own promises, on the store that this program tries: the audit finds what was altered or removed, the
//! store refuses what does not balance, and two brokers on one database sell each token once.

use crate::stage::*;
use onde_broker::audit::{Unsound, audit};
use onde_broker::ledger::Ledger;
use onde_broker::refusal::Refusal;
use onde_broker::store::Store;
use onde_client::api::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

/// A broker whose customer has bought, paid more and settled one of two jobs.
fn with_history(dir: &Dir) -> Arc<onde_broker::Broker> {
    let now = Instant::now();
    let broker = broker(&dir.0, now);
    hear(&broker, hello(1, 1), now);
    broker.open_account(&AccountRequest { name: "a".into() }).expect("an account");
    let credit = CreditRequest { idempotency_key: fresh_key(), micro: 100 * TOKEN };
    broker.credit_account("a", &credit).expect("money");
    let first = broker.open_job("a", &purchase(10), now).expect("a job").job;
    let more = TokensRequest { idempotency_key: fresh_key(), count: 5 };
    broker.sell_tokens("a", &first.id.0, &more).expect("tokens");
    broker.redeem("a", &first.id.0, &certificate(&first, 15, 4 * TOKEN).0).expect("settled");
    broker.open_job("a", &purchase(7), now).expect("a job");
    broker
}

/// Does something to a sound ledger behind the broker's back; the audit names the first act that is wrong.
fn check(dir: &Dir, tamper: &str, expect: Option<i64>) {
    let place = place(&dir.0);
    let noted = audit(&Store::open(&place).expect("a store"), None).expect("sound before");
    tampered(&place, tamper);
    let found = audit(&Store::open(&place).expect("a store"), Some((noted.acts, noted.head)));
    match (found, expect) {
        (Err(Unsound::Act { seq, .. }), Some(expect)) => assert_eq!(seq, expect, "{tamper}"),
        (Err(Unsound::Beside(_)), None) => {}
        (found, _) => panic!("{tamper}: {found:?}"),
    }
}

#[test]
fn the_audit_names_the_first_bad_act() {
    for (tamper, expect) in [
        ("UPDATE lines SET delta_micro = delta_micro * 2 WHERE act = 3", Some(3)),
        (
            "UPDATE lines SET delta_micro = delta_micro + 1 WHERE act = 2 AND book = 'customer:a'",
            Some(2),
        ),
        ("UPDATE acts SET last_index = 16 WHERE seq = 3", Some(3)),
        ("UPDATE acts SET at = at + 1 WHERE seq = 1", Some(1)),
        ("DELETE FROM lines WHERE act = 2", Some(2)),
        ("DELETE FROM acts WHERE seq = 4; DELETE FROM lines WHERE act = 4", Some(5)),
        ("DELETE FROM acts WHERE seq = 5; DELETE FROM lines WHERE act = 5", None),
        ("DELETE FROM acts WHERE seq = 5", None),
        ("UPDATE books SET balance_micro = balance_micro + 1 WHERE name = 'customer:a'", None),
        ("DELETE FROM books WHERE name = 'customer:a'", None),
        ("DELETE FROM books WHERE name LIKE 'job:%' AND balance_micro = 0", None),
        ("UPDATE jobs SET sold = sold + 1 WHERE settled_at IS NULL", None),
        ("UPDATE jobs SET settled_at = 1 WHERE settled_at IS NULL", None),
        ("DELETE FROM jobs WHERE settled_at IS NULL", None),
    ] {
        let dir = Dir::new();
        with_history(&dir);
        check(&dir, tamper, expect);
    }
}

#[test]
fn the_store_refuses_what_does_not_balance() {
    let dir = Dir::new();
    with_history(&dir);
    let ledger = Ledger::open(&place(&dir.0)).expect("a ledger");
    let act = "INSERT INTO acts (seq, kind, key, at, prev, hash) \
        SELECT seq + 1, 'credit', 'k', 0, hash, hash FROM acts WHERE seq = 5";
    let line = |book: &str, micro: i64| {
        format!("INSERT INTO lines (act, book, delta_micro) VALUES (6, '{book}', {micro})")
    };
    let refused = |statements: &[String]| {
        let done = ledger.act(|tx| {
            statements.iter().try_for_each(|sql| tx.execute(sql, &[]).map(drop)).map_err(Into::into)
        });
        assert!(done.is_err(), "{statements:?}");
    };
    let credit = line("cash:operator", -1);
    refused(&[act.into()]);
    refused(std::slice::from_ref(&credit));
    refused(&[credit.clone(), act.into()]);
    refused(&[credit.clone(), line("customer:a", 2), act.into()]);
    refused(&[credit.clone(), line("customer:nobody", 1), act.into()]);
    refused(&[
        line("cash:operator", 1000),
        line("owner:income", -1000),
        act.replace("seq + 1", "seq + 2"),
    ]);
    refused(&[line("cash:operator", 1 << 40), line("customer:a", -(1 << 40)), act.into()]);
    refused(&["UPDATE lines SET delta_micro = 1".into()]);
    refused(&["DELETE FROM acts".into()]);
    refused(&[credit, line("customer:a", 1), act.into(), line("customer:a", 1)]);
    let more = "INSERT INTO lines (act, book, delta_micro) VALUES (2, 'owner:income', 5)";
    refused(&[more.into()]);
    audit(ledger.store(), None).expect("nothing of it was kept");
}

/// A customer may be away for long between paying and hearing what was bought.
#[test]
fn the_answer_to_an_open_jobs_last_sale_is_kept() {
    const YEAR_S: u64 = 365 * 24 * 3600;
    let dir = Dir::new();
    let broker = with_history(&dir);
    let job = broker.jobs("a", true, i64::MAX, 1).expect("jobs").jobs.remove(0);
    let [before, last] = [1, 2].map(|count| {
        let request = TokensRequest { idempotency_key: fresh_key(), count };
        let sold = broker.sell_tokens("a", &job.id.0, &request).expect("tokens");
        (request, sold)
    });
    let ledger = Ledger::open(&place(&dir.0)).expect("a ledger");
    let next_year = broker.store().unix_s() + YEAR_S;
    ledger.with_clock(Box::new(move || next_year)).prune().expect("the ledger works");
    let again = |(request, _): &(TokensRequest, _)| broker.sell_tokens("a", &job.id.0, request);
    assert_eq!(again(&last).expect("told again"), last.1);
    assert!(matches!(again(&before), Err(Refusal::KeyReused)), "sold once, and long told");
    audit(broker.store(), None).expect("sound books");
}

#[test]
fn two_brokers_on_one_store_sell_each_token_once() {
    const BUYERS: u32 = 8;
    const SALES: u32 = 12;
    let dir = Dir::new();
    let first = with_history(&dir);
    let second = broker(&dir.0, Instant::now());
    hear(&second, hello(1, 1), Instant::now());
    hear_unbooted(&second, Instant::now());
    let job = first.jobs("a", true, i64::MAX, 1).expect("jobs").jobs.remove(0);
    let buy = |buyer: u32| {
        let broker = if buyer.is_multiple_of(2) { &first } else { &second };
        let sell = |_| {
            let request = TokensRequest { idempotency_key: fresh_key(), count: 1 };
            let sold = broker.sell_tokens("a", &job.id.0, &request);
            let again = broker.sell_tokens("a", &job.id.0, &request);
            match (sold, again) {
                (Ok(sold), Ok(again)) => {
                    assert_eq!(sold, again);
                    Some(sold.index)
                }
                (Err(_), Err(_)) => None,
                odd => panic!("{odd:?}"),
            }
        };
        (0..SALES).filter_map(sell).collect::<Vec<_>>()
    };
    let sold: Vec<u32> = std::thread::scope(|scope| {
        let buyers: Vec<_> = (0..BUYERS).map(|buyer| scope.spawn(move || buy(buyer))).collect();
        buyers.into_iter().flat_map(|buyer| buyer.join().expect("a buyer")).collect()
    });
    // 100 tokens of money, 4 used by the first job, 7 in the second's boot token.
    assert_eq!(sold.len(), 89, "the money buys so many, and not one more");
    let different: BTreeSet<_> = sold.iter().collect();
    assert_eq!(different.len(), sold.len(), "no index twice");
    let books = audit(first.store(), None).expect("sound books");
    assert_eq!(books.micro["customer"], 0);
}
