//! Selling: boot tokens and payment tokens. A sale is one act: the account is charged, the job is written, the
//! token is made and the answer is kept under its idempotency key, or nothing of this happens.

use crate::Broker;
use crate::accounts::balance;
use crate::chains::{self, New};
use crate::jobs::{self, Frozen, JobRow};
use crate::journal::{self, Act, Book, Reason, request_key, signed};
use crate::ledger::{mark, set_mark};
use crate::nodes::{Market, Reserved, Seen};
use crate::refusal::Refusal;
use crate::store::{StoreError, Tx, params};
use crate::usage::note_prices;
use onde_client::api::{
    self, Hex, JobOpened, JobRequest, NodeChoice, NodeList, Payment, TOKENS_PER_BOOT_MAX,
    TOKENS_PER_SALE_MAX, TokensRequest,
};
use onde_wire::chain::Value;
use onde_wire::cluster::TOKEN_MICRO;
use onde_wire::key::{Key, job_key, sha256};
use onde_wire::machine::{DISK_MIB_MAX, MEM_MIB_MAX, MEM_MIB_MIN, VCPUS_MAX, held_mib};
use onde_wire::packet::Prices;
use onde_wire::plan;
use onde_wire::token::{BootToken, JobId, NodeId, Origin, Renewal};
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Instant;

/// How long a boot token can be shown: time to build a VM's memory image, and not much more, since the node's
/// memory is reserved for it.
const BOOT_TOKEN_LIFE_MS: u64 = 120_000;
fn check_shape(request: &JobRequest) -> Result<(), Refusal> {
    if !(MEM_MIB_MIN..=MEM_MIB_MAX).contains(&request.mem_mib) {
        return Err(Refusal::Invalid("mem_mib is 64 to 65536"));
    }
    if !(1..=VCPUS_MAX).contains(&request.vcpus) {
        return Err(Refusal::Invalid("vcpus is 1 to 64"));
    }
    if request.disk_mib > DISK_MIB_MAX {
        return Err(Refusal::Invalid("disk_mib is at most 32768"));
    }
    if let Some(clones) = request.clones {
        if request.template || request.moves.is_some() {
            return Err(Refusal::Invalid("a clone is no template and comes from nowhere else"));
        }
        if clones.held_mib > MEM_MIB_MAX * 2 {
            return Err(Refusal::Invalid("held_mib is more than any VM's memory"));
        }
    }
    if !(1..=TOKENS_PER_BOOT_MAX).contains(&request.tokens) {
        return Err(Refusal::Invalid("tokens is 1 to 65536"));
    }
    Ok(())
}

/// Memory that a VM takes from its node, MiB. Where that is too little, the node refuses a boot token and its money comes
/// back.
fn reserved_mib(request: &JobRequest) -> u32 {
    request.clones.map_or(held_mib(request.mem_mib), |clones| clones.held_mib)
}

/// What is sold on each node and was not seen used yet.
fn reserved(tx: &Tx<'_>) -> Result<HashMap<NodeId, Reserved>, Refusal> {
    let sql = "SELECT node_id, CAST(sum(reserved_mib) AS BIGINT), count(*), CAST(sum(disk_mib) AS BIGINT) FROM jobs \
         WHERE settled_at IS NULL AND booted = 0 GROUP BY node_id";
    let rows = tx.rows(sql, params![], |row| {
        let (mem_mib, slots, disk_mib) = (row.get(1)?, row.get(2)?, row.get(3)?);
        Ok((row.get(0)?, Reserved { mem_mib, slots, disk_mib }))
    })?;
    Ok(rows.into_iter().collect())
}

/// The mark of the guest address from which on the next one is looked for.
const NEXT_GUEST: &str = "guests/next";
/// The mark that tells the next sale to leave that place; its number is random.
const SKIP_GUESTS: &str = "guests/skip";

/// A guest address that no open job has. Goes round, so that an address rests long before it is used again.
fn free_guest(tx: &Tx<'_>, guests_max: u32) -> Result<u32, Refusal> {
    let next = next_guest(tx, guests_max)?;
    for start in [next, 0] {
        let guest = free_guest_from(tx, start)?;
        if guest < guests_max {
            set_mark(tx, NEXT_GUEST, Some(u64::from(guest) + 1))?;
            return Ok(guest);
        }
    }
    Err(Refusal::NoAddress)
}

/// Where to look for an address.
fn next_guest(tx: &Tx<'_>, guests_max: u32) -> Result<u32, Refusal> {
    let next = match mark(tx, NEXT_GUEST)? {
        Some(next) => Some(next),
        // The first sale after brokers that did not note it.
        None => {
            tx.row("SELECT guest + 1 FROM jobs ORDER BY seq DESC LIMIT 1", &[], |row| row.get(0))?
        }
    };
    let (mut next, all) = (next.unwrap_or_default(), u64::from(guests_max));
    if let Some(random) = mark(tx, SKIP_GUESTS)? {
        set_mark(tx, SKIP_GUESTS, None)?;
        next = (next + all / 4 + random % (all / 2)) % all;
    }
    Ok(u32::try_from(next).unwrap_or_default())
}

/// After a restore there may be VMs that the ledger does not know, with the addresses behind the last one that it does. The
/// next sale goes on a quarter to three quarters of all addresses further: past a quarter of all that have been
/// sold since, for sure. Where is random, so that a second restore of the same backup does not meet the sales after the first.
pub fn skip_guests(tx: &Tx<'_>) -> Result<(), StoreError> {
    let random = u32::from_le_bytes(crate::random());
    set_mark(tx, SKIP_GUESTS, Some(random.into()))
}

/// The first free index from `start` on: `start`, or the one behind the run of taken ones there.
fn free_guest_from(tx: &Tx<'_>, start: u32) -> Result<u32, Refusal> {
    let sql = "SELECT a.guest + 1 FROM jobs a WHERE a.settled_at IS NULL AND a.guest >= ?1 \
         AND EXISTS (SELECT 1 FROM jobs WHERE settled_at IS NULL AND guest = ?1) \
         AND NOT EXISTS (SELECT 1 FROM jobs b WHERE b.settled_at IS NULL AND b.guest = a.guest + 1) \
         ORDER BY a.guest LIMIT 1";
    let behind_the_run: Option<u32> = tx.row(sql, params![start], |row| row.get(0))?;
    Ok(behind_the_run.unwrap_or(start))
}

impl Broker {
    /// A page of nodes with numbers above `after`.
    pub fn node_list(
        &self,
        after: Option<u32>,
        limit: u32,
        now: Instant,
    ) -> Result<NodeList, Refusal> {
        let reserved = self.ledger.read(reserved)?;
        let limit = limit as usize;
        let market = self.at(self.store().unix_s(), now);
        let nodes = self.nodes().page(&self.cluster.plan, &reserved, after, limit, market);
        let next = nodes.last().filter(|_| nodes.len() == limit).map(|node| node.number);
        Ok(NodeList { nodes, next })
    }

    /// The market at a moment, by both clocks.
    fn at(&self, unix_s: u64, now: Instant) -> Market<'_> {
        Market { policy: &self.policy, unix_s, now }
    }

    /// Sells a boot token.
    pub fn open_job(
        &self,
        account: &str,
        request: &JobRequest,
        now: Instant,
    ) -> Result<JobOpened, Refusal> {
        check_shape(request)?;
        self.with_chain(|chain| self.try_open_job(account, request, now, chain))
    }

    /// Makes a sale that may want a new chain. It asks for one only where all else is settled, so whoever cannot pay, or
    /// asks for what was sold before, costs none; and one is made while the ledger is free for others.
    fn with_chain<T>(
        &self,
        sale: impl Fn(&dyn Fn() -> Result<New, Refusal>) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let taken = RefCell::new(None);
        let take = || {
            let mut taken = taken.borrow_mut();
            *taken = taken.take().or_else(|| self.stock.take());
            taken.clone().ok_or(Refusal::NoChain)
        };
        let mut done = sale(&take);
        if matches!(done, Err(Refusal::NoChain)) {
            taken.replace(Some(self.stock.mint()));
            done = sale(&take);
        }
        // Where the store failed nobody knows whether it was sold.
        if let (Err(refusal), Some(new)) = (&done, taken.take())
            && !matches!(refusal, Refusal::Ledger(_))
        {
            self.stock.put_back(new);
        }
        done
    }

    fn try_open_job(
        &self,
        account: &str,
        request: &JobRequest,
        now: Instant,
        chain: &dyn Fn() -> Result<New, Refusal>,
    ) -> Result<JobOpened, Refusal> {
        self.ledger.act_once(account, &request.idempotency_key, &("job", request), |tx| {
            check_money(tx, account, request.tokens, TOKEN_MICRO)?;
            let request = match request.clones {
                Some(clones) => &at_template(tx, account, request, &clones.template.0)?,
                None => request,
            };
            let seen = self.nodes().choose(request, &reserved(tx)?, self.at(tx.unix_s(), now))?;
            let guest = match request.moves {
                Some(job) => moved_guest(tx, account, &job.0)?,
                None => free_guest(tx, self.cluster.plan.guests_max())?,
            };
            let new = chain()?;
            let mut job = new_job(account, request, &seen, guest, &new, (tx.unix_s(), now));
            job.insert(tx)?;
            note_prices(tx, &job.id, &seen.hello.prices)?;
            journal::open(tx, Book::Job(&job.id))?;
            let key = request_key(account, &request.idempotency_key);
            charge(tx, &job, Reason::Boot, (1, job.sold), key)?;
            Ok(self.opened(&job, request, new.anchor, seen.hello.prices))
        })
    }

    /// The answer to a sale: the token itself, and the key that its owner speaks to the node with.
    fn opened(
        &self,
        job: &JobRow,
        request: &JobRequest,
        anchor: Value,
        prices: Prices,
    ) -> JobOpened {
        let node_key = self.node_key(&job.node_id);
        let token = BootToken { prices, ..self.boot_token(job, request, anchor) };
        JobOpened {
            job: job.show(&self.cluster.plan),
            job_key: Hex(job_key(&node_key, &job.id)),
            boot_token: Hex(token.emit()),
            boot_tag: Hex(token.sign(&node_key)),
            expires_in_ms: BOOT_TOKEN_LIFE_MS,
            prices: Some(prices.into()),
            keep_s: self.cluster.keep_s,
        }
    }

    fn boot_token(&self, job: &JobRow, request: &JobRequest, anchor: Value) -> BootToken {
        let plan = &self.cluster.plan;
        let ipv4 = plan.guest(job.guest);
        let mut broker_key = [0; 8];
        broker_key.copy_from_slice(&sha256(&self.cluster.secret)[..8]);
        BootToken {
            broker_key,
            node: job.node_id,
            incarnation: job.incarnation,
            job: job.id,
            expiry_ms: job.expiry_ms,
            anchor,
            value_micro: job.value_micro,
            first_count: job.first_count,
            loader_sha256: request.loader_sha256.0,
            mem_mib: job.mem_mib,
            held_mib: request.clones.map_or(job.mem_mib, |clones| clones.held_mib),
            origin: match (request.clones, request.template) {
                (Some(clones), _) => Origin::Clone(clones.template.0),
                (None, true) => Origin::Template,
                (None, false) => Origin::Loader,
            },
            vcpus: job.vcpus,
            disk_mib: job.disk_mib,
            net_kib_s: request.net_kib_s,
            mac: plan::mac(ipv4),
            ipv4,
            gateway: self.cluster.gateway,
            prefix_len: plan.prefix_len(),
            prices: Prices::default(),
        }
    }

    /// Sells payment tokens for an open job: fewer than asked for where its chain ends, and then those of a new one.
    pub fn sell_tokens(
        &self,
        account: &str,
        id: &JobId,
        request: &TokensRequest,
    ) -> Result<Payment, Refusal> {
        if !(1..=TOKENS_PER_SALE_MAX).contains(&request.count) {
            return Err(Refusal::Invalid("count is 1 to 4096"));
        }
        self.with_chain(|chain| self.try_sell_tokens(account, id, request, chain))
    }

    fn try_sell_tokens(
        &self,
        account: &str,
        id: &JobId,
        request: &TokensRequest,
        chain: &dyn Fn() -> Result<New, Refusal>,
    ) -> Result<Payment, Refusal> {
        let (key, asked) = (&request.idempotency_key, ("tokens", Hex(*id), request));
        self.ledger.act_once(account, key, &asked, |tx| {
            let job = jobs::find_own(tx, account, id)?;
            self.check_sells(&job)?;
            let fresh = || {
                let count = request.count.min(self.stock.count());
                check_money(tx, account, count, job.value_micro)?;
                chain()
            };
            let sale = chains::sell(&job, request.count, fresh)?;
            let index = job.sold.checked_add(sale.count).ok_or(Refusal::ChainSpent)?;
            charge(tx, &job, Reason::Tokens, (job.sold + 1, index), request_key(account, key))?;
            tx.execute(
                "UPDATE jobs SET sold = ?2, chain = ?3, chain_from = ?4 WHERE id = ?1",
                params![id, index, sale.chain, sale.chain_from],
            )?;
            let renewal = sale.anchor.map(|anchor| self.renewal(&job, anchor));
            Ok(Payment { index, value: Hex(sale.value), renewal })
        })
    }

    /// Whether tokens of a job may be sold: all that were sold before are known.
    fn check_sells(&self, job: &JobRow) -> Result<(), Refusal> {
        if !job.is_open() {
            Err(Refusal::JobSettled)
        } else if job.frozen != Frozen::No {
            Err(Refusal::JobFrozen)
        } else if self.ledger.is_unheard(&job.id) {
            Err(Refusal::NotHeard)
        } else {
            Ok(())
        }
    }

    /// What makes a job's node take the tokens of a new chain, once all that were sold until now are paid.
    fn renewal(&self, job: &JobRow, anchor: Value) -> api::Renewal {
        let renewal = Renewal { index: job.sold, anchor };
        let tag = renewal.sign(&self.node_key(&job.node_id), &job.id, &job.incarnation);
        api::Renewal { index: renewal.index, anchor: Hex(anchor), tag: Hex(tag) }
    }

    /// Key of a node.
    pub fn node_key(&self, node: &NodeId) -> Key {
        Key::new(&onde_wire::key::node_key(&self.cluster.secret, node))
    }
}

/// What so many tokens cost, if the account covers it.
fn check_money(tx: &Tx<'_>, account: &str, count: u32, value_micro: u64) -> Result<u64, Refusal> {
    let (need, have) = (u64::from(count) * value_micro, balance(tx, account)?);
    if have < need { Err(Refusal::NoMoney { need, have }) } else { Ok(need) }
}

/// Moves the price of a job's tokens `first` to `last` from its customer to the job.
fn charge(
    tx: &Tx<'_>,
    job: &JobRow,
    reason: Reason,
    (first, last): (u32, u32),
    key: String,
) -> Result<(), Refusal> {
    let need = check_money(tx, &job.account, last - first + 1, job.value_micro)?;
    let lines = [(Book::Customer(&job.account), -signed(need)), (Book::Job(&job.id), signed(need))];
    let (job, tokens, at) = (Some(&job.id), Some((first, last)), tx.unix_s());
    journal::post(tx, &Act { reason, key, job, tokens, at, lines: &lines })
}

/// The address that a guest takes with it when it moves to a new job.
fn moved_guest(tx: &Tx<'_>, account: &str, from: &JobId) -> Result<u32, Refusal> {
    let from = jobs::find_own(tx, account, from)?;
    if from.is_open() { Ok(from.guest) } else { Err(Refusal::JobSettled) }
}

/// A clone's request, on the node where its template is.
fn at_template(
    tx: &Tx<'_>,
    account: &str,
    request: &JobRequest,
    template: &JobId,
) -> Result<JobRequest, Refusal> {
    let template = jobs::find_own(tx, account, template)?;
    if !template.is_open() {
        return Err(Refusal::JobSettled);
    }
    let asked = (request.mem_mib, request.vcpus, request.disk_mib);
    if asked != (template.mem_mib, template.vcpus, template.disk_mib) {
        return Err(Refusal::Invalid("a clone has the shape of its template"));
    }
    Ok(JobRequest { node: Some(NodeChoice::Id(Hex(template.node_id))), ..request.clone() })
}

fn new_job(
    account: &str,
    request: &JobRequest,
    seen: &Seen,
    guest: u32,
    new: &New,
    (opened_at, now): (u64, Instant),
) -> JobRow {
    JobRow {
        seq: 0,
        id: crate::random(),
        account: account.into(),
        node: seen.hello.number,
        node_id: seen.hello.node,
        incarnation: seen.hello.incarnation,
        guest,
        mem_mib: request.mem_mib,
        reserved_mib: reserved_mib(request),
        vcpus: request.vcpus,
        disk_mib: request.disk_mib,
        value_micro: TOKEN_MICRO,
        first_count: request.tokens,
        sold: request.tokens,
        seed: [0; 32],
        chain_from: request.tokens,
        chain: Some(new.chain.emit()),
        expiry_ms: seen.uptime_ms(now).saturating_add(BOOT_TOKEN_LIFE_MS),
        booted: false,
        spent_micro: 0,
        opened_at,
        ended_at: None,
        settled_by: None,
        settled_at: None,
        refund_micro: 0,
        frozen: Frozen::No,
    }
}
