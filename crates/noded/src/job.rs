//! One job: what it was sold, what it paid, what it used, where it stands. Pure state: [`crate::node`] calls it.
//! Never looks at a clock or at the kernel.
//!
//! ```text
//!          resumed          little left              next to nothing left     gone           balance zero
//!  Booting -------> Running <---------> Low ------------> (saving) --> Suspended ---------------> Purged
//!                      ^      paid              |                     |     ^
//!                      |                        | no disk             |     | gone
//!                      |                        +--> (ending)         v     |
//!                      +---------------- resumed ------------------ (waking)
//! ```
//! A template goes from Booting to (saving) when it would run, and then it is a Template, which never wakes up.
//! `end(reason)` leads from everywhere to (ending), and `gone` from there to Ended, Stopped or Purged. While ending,
//! saving or waking the stage stays what it was. While ending nothing is charged any more and payments are refused.
//! [`descent`] has what each step has to pay before.

mod descent;

use onde_wire::chain::{self, STEPS_MAX};
use onde_wire::machine::{Meter, Stage};
use onde_wire::packet::{EndReason, JobStatus, Status};
use onde_wire::token::{
    BootToken, Certificate, Incarnation, NodeId, Origin, PaymentToken, Renewal,
};

use crate::meter::{Held, Meters, Reading, Terms, burn_held, burn_max, held_running};

/// Longest time between two charges. The guest's meter is as old at most.
pub const TICK_MAX_MS: u64 = 1000;
/// Shortest time between two charges: what a VM can run unpaid at the very end of its balance.
/// Shorter, and a VM that idles towards zero would keep the node busy with looking.
pub const TICK_MIN_MS: u64 = 10;
/// A time between two charges that only the node can be at fault for (it stood still, or its clock jumped): nothing of
/// it is charged. Five looks that were missed; shorter, and a node that is merely busy would work for nothing.
pub const STALL_MS: u64 = 5 * TICK_MAX_MS;
/// How long a VM that is being filled may send nothing: what comes in over TCP is acknowledged, so it stands still then,
/// and a loader of ours gives up long before. How long all of it takes is limited by what is paid. Longer, and an
/// abandoned upload costs its customer more; shorter, and a slow line that stumbles loses all that is there.
pub const BOOT_STALL_MS: u64 = 90_000;
/// Time to write a VM to disk or to read it back, at least, and for each MiB of it: a slow disk's 20 MiB a second. What
/// takes longer is stuck.
const FILE_MAX_MS: u64 = 60_000;
const FILE_MAX_MS_PER_MIB: u64 = 50;
/// After a payment that cost hashes and led nowhere, the job's next one is refused unseen for so long: bounds
/// the work that a guest can cause through its control device to a few hundredths of a processor.
const PAY_PAUSE_MS: u64 = 50;

/// What is on its way, from one stage to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Nothing,
    /// Its VMM writes it to disk since then; whether it said that all is there.
    Saving(u64, bool),
    /// Its VMM reads it from disk since then; whether it was given up.
    Waking(u64, bool),
}

/// What a look at a job leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Goes,
    /// What is left is for the disk: it has to be saved.
    Save,
    /// Nothing is left.
    Purge,
}

/// A job's record.
#[derive(Clone, Debug)]
pub struct Job {
    token: BootToken,
    terms: Terms,
    /// Where its VM lives, as long as there is a process.
    slot: Option<u32>,
    stage: Stage,
    end: EndReason,
    doing: Doing,
    /// Disk set aside for its machine, MiB; 0 where there was none left.
    room_mib: u32,
    /// Its machine can be saved there.
    can_save: bool,
    /// SUSPEND came, and the saving has not begun.
    suspend_asked: bool,
    /// Disk that its machine takes now, or a template's memory, MiB.
    saved_mib: u32,
    /// Memory of a template that is gone, which it pays for besides its own, MiB.
    inherited_mib: u32,
    /// Once saved it wakes up by itself when there is enough to pay for that.
    wakes_by_itself: bool,
    /// The newest chain value accepted.
    value: chain::Value,
    last_index: u32,
    /// The last token of the chain before the present one, where there was one.
    before: Option<PaymentToken>,
    pay_from_ms: u64,
    meters: Meters,
    spent_micro: u64,
    started_ms: u64,
    ended_ms: u64,
    /// All is charged up to here.
    charged_ms: u64,
    /// The counters of its present process at that time.
    reading: Reading,
    /// The next reading holds work of the node's own, which nobody pays for.
    skips_reading: bool,
    /// When its VM sent something last, while it is being filled.
    sent_ms: u64,
    due_ms: u64,
    burn: Burn,
    has_resumed: bool,
    turn: u64,
}

/// The burn rate: measured over whole seconds, because a tick near the end of a balance is too short for it.
#[derive(Clone, Copy, Debug)]
struct Burn {
    micro_per_s: u64,
    from_ms: u64,
    from_cost_micro: u64,
}

impl Job {
    /// A job that was just admitted into `slot`, with `room_mib` of disk to be saved on. `token` went through
    /// [`crate::admission`].
    pub fn new(token: BootToken, slot: u32, now_ms: u64, terms: &Terms, room_mib: u32) -> Self {
        let burn = burn_held(&token.prices, held_running(&token));
        let mut job = Self {
            terms: Terms { prices: token.prices, ..*terms },
            slot: Some(slot),
            stage: Stage::Booting,
            end: EndReason::None,
            doing: Doing::Nothing,
            room_mib,
            can_save: room_mib > 0,
            suspend_asked: false,
            saved_mib: 0,
            inherited_mib: 0,
            wakes_by_itself: false,
            value: token.anchor,
            last_index: token.first_count,
            before: None,
            pay_from_ms: 0,
            meters: Meters::default(),
            spent_micro: 0,
            started_ms: now_ms,
            ended_ms: 0,
            charged_ms: now_ms,
            reading: Reading::default(),
            skips_reading: false,
            sent_ms: now_ms,
            due_ms: 0,
            burn: Burn { micro_per_s: burn, from_ms: now_ms, from_cost_micro: 0 },
            has_resumed: false,
            turn: 0,
            token,
        };
        job.due_ms = now_ms + job.tick_ms();
        job
    }

    /// What it was sold.
    pub fn token(&self) -> &BootToken {
        &self.token
    }

    /// Where its VM lives, as long as there is a process.
    pub fn slot(&self) -> Option<u32> {
        self.slot
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether it shall go on.
    pub fn is_going(&self) -> bool {
        self.end == EndReason::None
    }

    /// Whether all of it is gone.
    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Ended | Stage::Stopped | Stage::Purged)
    }

    /// Whether it is in its file: on disk, its VM perhaps about to wake up, or as a template.
    pub fn is_saved(&self) -> bool {
        matches!(self.stage, Stage::Suspended | Stage::Template)
    }

    /// Whether it is one that clones are made of, or will be.
    pub fn is_template(&self) -> bool {
        self.token.origin == Origin::Template
    }

    /// Memory that it pays for now, MiB.
    pub fn held_mib(&self) -> u32 {
        self.held().mem_mib
    }

    /// It pays for so much more memory: pages of a template that is gone.
    pub fn inherit(&mut self, mib: u32) {
        self.inherited_mib += mib;
    }

    /// Its shape as it is charged for now.
    fn shape(&self) -> BootToken {
        BootToken { held_mib: self.token.held_mib + self.inherited_mib, ..self.token }
    }

    /// Whether it is being written to disk.
    pub fn is_saving(&self) -> bool {
        matches!(self.doing, Doing::Saving(..))
    }

    /// Whether it is being read from disk.
    pub fn is_waking(&self) -> bool {
        matches!(self.doing, Doing::Waking(..))
    }

    /// Room that is set aside for its machine on disk, MiB.
    pub fn room_mib(&self) -> u32 {
        self.room_mib
    }

    /// Disk that is held for it, MiB: its own, and room to be saved on.
    pub fn disk_mib(&self) -> u32 {
        self.token.disk_mib + self.room_mib
    }

    /// When it has to be looked at next: to charge it, or because something takes too long.
    pub fn due_ms(&self) -> u64 {
        self.due_ms.min(self.late_ms())
    }

    /// When what is on its way is given up.
    fn late_ms(&self) -> u64 {
        let file_ms = FILE_MAX_MS + FILE_MAX_MS_PER_MIB * u64::from(self.token.mem_mib);
        match (self.doing, self.stage) {
            (Doing::Saving(from_ms, false) | Doing::Waking(from_ms, false), _) => from_ms + file_ms,
            (Doing::Nothing, Stage::Booting) => self.sent_ms + BOOT_STALL_MS,
            _ => u64::MAX,
        }
    }

    /// Whether what is on its way takes too long.
    pub fn is_late(&self, now_ms: u64) -> bool {
        now_ms >= self.late_ms()
    }

    /// Now, or when it was told to end: the node's time to take it down is nobody's to pay.
    fn lived_until(&self, now_ms: u64) -> u64 {
        if self.is_going() { now_ms } else { self.ended_ms }
    }

    /// When it was told to end; 0 before.
    pub fn ended_ms(&self) -> u64 {
        self.ended_ms
    }

    fn paid_micro(&self) -> u64 {
        // Admission keeps the value below 2^32, so the product fits.
        u64::from(self.last_index) * self.token.value_micro
    }

    /// Micro-tokens left.
    pub fn balance_micro(&self) -> u64 {
        self.paid_micro() - self.spent_micro
    }

    /// Number of payment tokens accepted.
    pub fn last_index(&self) -> u32 {
        self.last_index
    }

    /// RESUME is all but done: whether the guest may run. Once it was allowed it counts as a life, even if the VM
    /// is gone before its first instruction. One that was on disk runs, and what is there is the past; nobody pays for
    /// the node's reading of it.
    pub fn resume(&mut self, now_ms: u64) -> bool {
        if !self.is_going() || matches!(self.doing, Doing::Waking(_, true)) {
            return false;
        }
        self.has_resumed = true;
        match (self.stage, self.doing) {
            (Stage::Booting, _) => self.stage = Stage::Running,
            (Stage::Suspended, Doing::Waking(..)) => {
                self.stage = Stage::Running;
                (self.doing, self.saved_mib) = (Doing::Nothing, 0);
                (self.charged_ms, self.skips_reading) = (now_ms, true);
                self.due_ms = now_ms + self.tick_ms();
            }
            _ => {}
        }
        true
    }

    /// Whether its guest ever was allowed to run.
    pub fn has_resumed(&self) -> bool {
        self.has_resumed
    }

    /// Charges all that was used up to now, sets the time of the next charge, and says what has to follow.
    pub fn charge(&mut self, now_ms: u64, reading: Reading) -> Verdict {
        let used = reading.since(&self.reading);
        self.reading = reading.max(&self.reading);
        if used.sent_bytes > 0 {
            self.sent_ms = now_ms;
        }
        let is_nodes_work = self.is_saving() || self.is_saved();
        let skips = std::mem::replace(&mut self.skips_reading, is_nodes_work) || is_nodes_work;
        self.charge_for(now_ms, if skips { Reading::default() } else { used })
    }

    /// Charges a job whose VM does nothing.
    pub fn charge_time(&mut self, now_ms: u64) -> Verdict {
        self.charge_for(now_ms, Reading::default())
    }

    fn charge_for(&mut self, now_ms: u64, used: Reading) -> Verdict {
        let now_ms = self.lived_until(now_ms);
        let time_ms = now_ms - self.charged_ms;
        self.charged_ms = now_ms;
        if time_ms <= STALL_MS {
            self.meters.add(time_ms, self.held(), used);
        }
        let cost = self.meters.cost_micro(&self.terms.prices);
        self.spent_micro = cost.min(self.paid_micro());
        if time_ms > STALL_MS || self.is_saved() || self.is_saving() {
            // Such a time says nothing of what the VM burns.
            (self.burn.from_ms, self.burn.from_cost_micro) = (now_ms, cost);
        } else {
            self.burn.update(now_ms, cost);
        }
        self.due_ms = now_ms + self.tick_ms();
        self.judge()
    }

    /// What is held now, and by whose will: while the node writes or reads a file, its VM has no use of its memory.
    fn held(&self) -> Held {
        let running = held_running(&self.shape());
        match self.stage {
            Stage::Booting | Stage::Running | Stage::Low if !self.is_saving() => running,
            Stage::Template => Held { mem_mib: self.saved_mib, disk_mib: 0 },
            _ => Held { mem_mib: 0, disk_mib: running.disk_mib + self.saved_mib },
        }
    }

    fn judge(&mut self) -> Verdict {
        let is_free = burn_max(&self.terms.prices, &self.shape()) == 0;
        if self.suspend_asked && !self.is_saving() {
            return Verdict::Save;
        }
        if is_free || self.is_saving() {
            return Verdict::Goes;
        }
        match self.stage {
            Stage::Suspended | Stage::Template => self.judge_saved(),
            Stage::Running | Stage::Low if self.can_save && self.left_micro() == 0 => {
                self.stage = Stage::Low;
                Verdict::Save
            }
            _ if self.balance_micro() == 0 => Verdict::Purge,
            Stage::Running | Stage::Low => {
                self.stage = if self.is_low() { Stage::Low } else { Stage::Running };
                Verdict::Goes
            }
            _ => Verdict::Goes,
        }
    }

    fn judge_saved(&self) -> Verdict {
        let costs = burn_held(&self.terms.prices, self.held()) > 0;
        if costs && self.balance_micro() == 0 && !self.is_waking() {
            Verdict::Purge
        } else {
            Verdict::Goes
        }
    }

    /// Takes a payment. The same token again is accepted again and changes nothing.
    pub fn pay(&mut self, now_ms: u64, token: &PaymentToken) -> Result<(), Status> {
        if !self.is_going() {
            return Err(Status::Ended);
        }
        let known = self.known_to(token.index);
        if *token == known {
            return Ok(());
        }
        if now_ms < self.pay_from_ms {
            return Err(Status::BadPayment);
        }
        if token.index.abs_diff(known.index) > STEPS_MAX {
            return Err(Status::TooManySteps);
        }
        let newer = token.index > self.last_index;
        let steps = token.index.abs_diff(known.index);
        let (last, value) =
            if newer { (&known.value, &token.value) } else { (&token.value, &known.value) };
        let fits = chain::verify(last, value, steps);
        if fits && newer {
            (self.last_index, self.value) = (token.index, token.value);
            self.judge();
        } else {
            self.pay_from_ms = now_ms + PAY_PAUSE_MS;
        }
        if fits { Ok(()) } else { Err(Status::BadPayment) }
    }

    /// The newest token of the chain that this index is of.
    fn known_to(&self, index: u32) -> PaymentToken {
        let newest = PaymentToken { index: self.last_index, value: self.value };
        self.before.filter(|before| index <= before.index).unwrap_or(newest)
    }

    /// Takes a new chain where the present one is used up to the renewal's index. The same again is accepted again and
    /// changes nothing. Its tag was checked: the broker makes one for each chain's end.
    pub fn renew(&mut self, renewal: &Renewal) -> Result<(), Status> {
        if !self.is_going() {
            return Err(Status::Ended);
        }
        if self.before.is_some_and(|before| renewal.index <= before.index) {
            return Ok(());
        }
        if renewal.index != self.last_index {
            return Err(Status::BadPayment);
        }
        self.before = Some(PaymentToken { index: self.last_index, value: self.value });
        self.value = renewal.anchor;
        Ok(())
    }

    /// Whether a SUSPEND or WAKE that names `turn` is the next one; each is only once.
    pub fn take_turn(&mut self, turn: u64) -> bool {
        let is_next = turn == self.turn;
        self.turn += u64::from(is_next);
        is_next
    }

    /// Why it cannot be saved; `None` where it can, or is.
    pub fn why_not_saved(&self) -> Option<Status> {
        match self.stage {
            _ if !self.is_going() => Some(Status::Ended),
            Stage::Booting => Some(Status::NotYet),
            Stage::Suspended => None,
            _ if self.room_mib == 0 => Some(Status::NoDisk),
            _ => None,
        }
    }

    /// SUSPEND: its next look leads to [`Verdict::Save`], and only WAKE wakes it up. Its owner may know that what stood
    /// in the way is over.
    pub fn suspend(&mut self) {
        self.can_save = true;
        self.suspend_asked = !self.is_saved() && !self.is_saving();
        self.wakes_by_itself = false;
    }

    /// Its VMM was told to write it to disk: because of SUSPEND, or because its balance is for the disk only. All was
    /// charged just now; for the time of writing nothing is charged.
    pub fn save(&mut self, now_ms: u64) {
        self.doing = Doing::Saving(now_ms, false);
        let was_asked = std::mem::take(&mut self.suspend_asked);
        self.wakes_by_itself = !was_asked && !self.is_template();
        self.skips_reading = true;
    }

    /// Its VMM says that all of it is on disk.
    pub fn saved(&mut self) {
        if let Doing::Saving(from_ms, false) = self.doing {
            self.doing = Doing::Saving(from_ms, true);
        }
    }

    /// Its VMM could not write it, and goes on. It is not tried again before SUSPEND, and has nothing to keep back for the
    /// disk.
    pub fn not_saved(&mut self, now_ms: u64) {
        if self.is_saving() {
            (self.doing, self.charged_ms) = (Doing::Nothing, now_ms);
            self.can_save = false;
        }
    }

    /// A VMM that reads it from disk lives in `slot`.
    pub fn wake(&mut self, now_ms: u64, slot: u32) {
        self.doing = Doing::Waking(now_ms, false);
        (self.slot, self.reading) = (Some(slot), Reading::default());
    }

    /// Its VM did not wake up in time, and is taken down.
    pub fn give_up_waking(&mut self) {
        if let Doing::Waking(from_ms, _) = self.doing {
            self.doing = Doing::Waking(from_ms, true);
        }
    }

    /// The VM has to go. The first reason stands.
    pub fn end(&mut self, now_ms: u64, reason: EndReason) {
        if self.is_going() {
            (self.end, self.ended_ms) = (reason, now_ms);
        }
    }

    /// The VM's process is gone, and all it held but `saved_mib` of disk that its machine takes. The job is over, unless
    /// its machine is on disk.
    pub fn gone(&mut self, now_ms: u64, saved_mib: u32) {
        self.slot = None;
        if self.is_going() && self.is_kept(now_ms, saved_mib) {
            return;
        }
        // Nobody asked it to go: the VMM broke down.
        self.end(now_ms, EndReason::Fault);
        self.stage = match self.end {
            EndReason::Stopped => Stage::Stopped,
            EndReason::OutOfTokens => Stage::Purged,
            _ => Stage::Ended,
        };
        (self.doing, self.burn.micro_per_s) = (Doing::Nothing, 0);
    }

    /// Whether its machine is on disk.
    fn is_kept(&mut self, now_ms: u64, saved_mib: u32) -> bool {
        match self.doing {
            Doing::Saving(_, true) => {
                // What a file has beside memory is the node's affair.
                self.stage = if self.is_template() { Stage::Template } else { Stage::Suspended };
                (self.saved_mib, self.charged_ms) = (saved_mib.min(self.token.mem_mib), now_ms);
            }
            // What did not work once waits for somebody who asks for it.
            Doing::Waking(..) => self.wakes_by_itself = false,
            _ => return false,
        }
        self.doing = Doing::Nothing;
        self.due_ms = now_ms + self.tick_ms();
        true
    }

    /// The statement that the broker redeems; final once the VM is gone.
    pub fn certificate(&self, node: NodeId, incarnation: Incarnation) -> Certificate {
        Certificate {
            job: self.token.job,
            node,
            incarnation,
            last_index: self.last_index,
            spent_micro: self.spent_micro,
            unused_micro: self.balance_micro(),
        }
    }

    /// The meter for the guest.
    pub fn meter(&self) -> Meter {
        let (seconds_left, purge_s) = self.times();
        Meter {
            stage: self.stage,
            balance_micro: self.balance_micro(),
            burn_micro_per_s: self.rate(),
            seconds_left,
            purge_s,
        }
    }

    /// The meter for the customer.
    pub fn status(&self, now_ms: u64) -> JobStatus {
        let meter = self.meter();
        JobStatus {
            stage: self.stage,
            end: self.end,
            last_index: self.last_index,
            balance_micro: meter.balance_micro,
            spent_micro: self.spent_micro,
            burn_micro_per_s: meter.burn_micro_per_s,
            seconds_left: meter.seconds_left,
            purge_s: meter.purge_s,
            wake_micro: self.wake_micro(),
            age_ms: self.lived_until(now_ms) - self.started_ms,
            cpu_us: self.meters.cpu_us,
            mem_mib_ms: self.meters.mem_mib_ms,
            sent_bytes: self.meters.sent_bytes,
            disk_mib_ms: self.meters.disk_mib_ms,
            has_resumed: self.has_resumed,
            turn: self.turn,
        }
    }
}

impl Burn {
    fn update(&mut self, now_ms: u64, cost_micro: u64) {
        let time_ms = now_ms - self.from_ms;
        if time_ms >= TICK_MAX_MS {
            let cost = u128::from(cost_micro - self.from_cost_micro);
            let rate = cost * 1000 / u128::from(time_ms);
            *self = Self {
                micro_per_s: rate.try_into().unwrap_or(u64::MAX),
                from_ms: now_ms,
                from_cost_micro: cost_micro,
            };
        }
    }
}
