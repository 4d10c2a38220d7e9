//! Onde packets: the payload of an ICMP Echo. All have one size, requests and replies alike.
//! `client` and `broker` send them, `packetd` checks their tags, `noded` acts on them.
//!
//! ```text
//!  0      4         5    6        7     8       16       32      64              1024
//!  "ONDE" | version | op | status | party | nonce | job id | tag | body, zeros   |
//! ```
//! The tag of a BOOT request is the boot token's, under the node key. HELLO requests have none.
//! All other requests and all replies are tagged over bytes 0..32 and the whole body under the
//! party's key of the job (HELLO replies: node key), so a reply answers exactly one nonce.

use crate::bytes::{Reader, Writer};
use crate::key::{Key, Tag};
use crate::machine::Stage;
use crate::token::{
    BOOT_TOKEN_SIZE, BootToken, CERTIFICATE_SIZE, Incarnation, JobId, NodeId, PaymentToken, Renewal,
};

/// Bytes of every Onde packet. With ICMP, IP and Ethernet headers it fits one frame on any LAN.
pub const PACKET_SIZE: usize = 1024;
/// "ONDE", first in every packet.
pub const MAGIC: [u8; 4] = *b"ONDE";
/// Version of the packets.
pub const VERSION: u8 = 1;
/// Bytes before the tag.
const HEAD_SIZE: usize = 32;
/// Where the body starts.
pub const BODY: usize = 64;
/// Bytes of the body.
pub const BODY_SIZE: usize = PACKET_SIZE - BODY;
/// Most console bytes in one CONSOLE reply.
pub const CONSOLE_SLICE_MAX: usize = BODY_SIZE - 24;
/// Set in `op` of a reply: keeps tags of requests and replies apart.
const REPLY: u8 = 0x80;

/// A packet's bytes.
pub type Packet = [u8; PACKET_SIZE];

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Who are you, what have you got, what does it cost?
    Hello = 1,
    /// Here is a boot token: make a VM.
    Boot = 2,
    /// Here is a payment token.
    Pay = 3,
    /// How does the job stand?
    Status = 4,
    /// Give me console output from this offset.
    Console = 5,
    /// End the VM and certify what is unused.
    Stop = 6,
    /// Save the VM to the node's disk, where only storage is paid for.
    Suspend = 7,
    /// Go on with a VM that was saved.
    Wake = 8,
    /// Here is a new chain: the old one is used up.
    Renew = 9,
}

impl Op {
    // tcb:stranger-begin
    fn parse(value: u8) -> Option<Self> {
        use Op::*;
        let all = [Hello, Boot, Pay, Status, Console, Stop, Suspend, Wake, Renew];
        all.into_iter().find(|op| *op as u8 == value)
    }

    /// Bytes of the request's body that mean something, and that its tag covers.
    pub fn request_size(self) -> usize {
        match self {
            Op::Hello | Op::Status => 0,
            Op::Boot => BOOT_TOKEN_SIZE,
            Op::Pay => 36,
            Op::Renew => 68,
            Op::Console | Op::Stop | Op::Suspend | Op::Wake => 8,
        }
    }
    // tcb:stranger-end
}

// tcb:stranger-begin
/// Who asks about a job: each has a key of its own for it, and gets the answer under that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Party {
    /// Its customer, under [`crate::key::job_key`].
    Customer = 0,
    /// The broker, under [`crate::key::owner_key`]: STATUS and STOP only.
    Owner = 1,
}

impl Party {
    /// Who sent this request.
    pub fn of(packet: &Packet) -> Self {
        if packet[7] == Self::Owner as u8 { Self::Owner } else { Self::Customer }
    }

    /// The party's key for a job.
    pub fn key(self, node_key: &Key, job: &JobId) -> Key {
        Key::new(&match self {
            Party::Customer => crate::key::job_key(node_key, job),
            Party::Owner => crate::key::owner_key(node_key, job),
        })
    }
}
// tcb:stranger-end

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The node knows no such job.
    NoJob = 1,
    /// The boot token was shown too late.
    Expired = 2,
    /// The boot token was bought for another life of this node.
    OtherIncarnation = 3,
    /// The node has not enough free memory.
    NoMemory = 4,
    /// The node has no free slot, or not that many vCPUs.
    NoRoom = 5,
    /// The token's limits make no sense to this node.
    BadLimits = 6,
    /// The job has ended; its boot token is spent.
    Ended = 7,
    /// The payment token does not lead to the last one accepted.
    BadPayment = 8,
    /// The payment token skips more than the cap.
    TooManySteps = 9,
    /// The node failed at its own work; nothing was charged.
    NodeFault = 10,
    /// The job has run: it is not stopped on the condition that it has not.
    Resumed = 11,
    /// The node has no disk to keep this VM on.
    NoDisk = 12,
    /// The balance does not cover what was asked for.
    Unpaid = 13,
    /// Not now: the VM is being booted.
    NotYet = 14,
    /// The template that this is a clone of is not here.
    NoTemplate = 16,
}

impl Status {
    /// The status with this number.
    pub fn parse(value: u8) -> Option<Self> {
        use Status::*;
        [
            Ok,
            NoJob,
            Expired,
            OtherIncarnation,
            NoMemory,
            NoRoom,
            BadLimits,
            Ended,
            BadPayment,
            TooManySteps,
            NodeFault,
            Resumed,
            NoDisk,
            Unpaid,
            NotYet,
            NoTemplate,
        ]
        .into_iter()
        .find(|status| *status as u8 == value)
    }
}

// tcb:stranger-begin
/// A request whose form is right and whose tag is not checked yet.
#[derive(Clone, Copy)]
pub struct RequestUnchecked<'a> {
    packet: &'a Packet,
    op: Op,
}

impl<'a> RequestUnchecked<'a> {
    /// Looks at an echo payload; `None` unless it is an Onde request of this version.
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let packet: &Packet = payload.try_into().ok()?;
        if packet[..4] != MAGIC || packet[4] != VERSION || packet[6] != 0 {
            return None;
        }
        let op = Op::parse(packet[5])?;
        let may_ask = matches!((packet[7], op), (0, _) | (1, Op::Status | Op::Stop));
        may_ask.then_some(Self { packet, op })
    }

    /// What it asks for.
    pub fn op(&self) -> Op {
        self.op
    }

    /// The number that its reply must repeat.
    pub fn nonce(&self) -> u64 {
        nonce(self.packet)
    }

    /// The job it speaks of.
    pub fn job(&self) -> JobId {
        job(self.packet)
    }

    /// Checks the tag: a BOOT's under the node key, any other under the party's key for the job, which the
    /// node key gives. HELLO has no tag and is not a case for this.
    pub fn verify(&self, node_key: &Key) -> bool {
        let body = &self.packet[BODY..BODY + self.op.request_size()];
        match self.op {
            Op::Hello => false,
            Op::Boot => node_key.verify(&[body], tag(self.packet)),
            _ => {
                let key = Party::of(self.packet).key(node_key, &self.job());
                key.verify(&[&self.packet[..HEAD_SIZE], body], tag(self.packet))
            }
        }
    }
}

fn job(packet: &Packet) -> JobId {
    let mut job = [0; 16];
    job.copy_from_slice(&packet[16..32]);
    job
}

fn tag(packet: &Packet) -> &Tag {
    packet[HEAD_SIZE..BODY].try_into().expect("a tag has 32 bytes")
}
// tcb:stranger-end

/// A request with its meaning. [`Request::parse`] takes only packets whose tag was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// See [`Op::Hello`].
    Hello,
    /// See [`Op::Boot`].
    Boot(BootToken, Tag),
    /// See [`Op::Pay`].
    Pay(PaymentToken),
    /// See [`Op::Status`].
    Status,
    /// See [`Op::Console`]; the offset of the first byte wanted.
    Console(u64),
    /// See [`Op::Stop`]; whether only a job that never ran is to be stopped.
    Stop(bool),
    /// See [`Op::Suspend`]; with the job's [`JobStatus::turn`], so that nobody who overheard it can have it done again.
    Suspend(u64),
    /// See [`Op::Wake`]; as SUSPEND.
    Wake(u64),
    /// See [`Op::Renew`]; with the renewal's own tag.
    Renew(Renewal, Tag),
}

impl Request {
    /// The request's op.
    pub fn op(&self) -> Op {
        match self {
            Request::Hello => Op::Hello,
            Request::Boot(..) => Op::Boot,
            Request::Pay(_) => Op::Pay,
            Request::Status => Op::Status,
            Request::Console(_) => Op::Console,
            Request::Stop(_) => Op::Stop,
            Request::Suspend(_) => Op::Suspend,
            Request::Wake(_) => Op::Wake,
            Request::Renew(..) => Op::Renew,
        }
    }

    /// The packet for this request. `job_key` tags it; HELLO and BOOT do not use it.
    pub fn emit(&self, nonce: u64, job: &JobId, job_key: &Key) -> Packet {
        self.emit_as(Party::Customer, nonce, job, job_key)
    }

    /// As [`Self::emit`], with the key of this party.
    pub fn emit_as(&self, party: Party, nonce: u64, job: &JobId, key: &Key) -> Packet {
        let mut packet = head(self.op() as u8, 0, nonce, job);
        packet[7] = party as u8;
        let mut w = Writer::new(&mut packet[BODY..]);
        match self {
            Request::Hello | Request::Status => {}
            Request::Suspend(turn) | Request::Wake(turn) => w.put(&turn.to_le_bytes()),
            Request::Stop(unless_resumed) => w.put(&[u8::from(*unless_resumed)]),
            Request::Boot(token, _) => w.put(&token.emit()),
            Request::Pay(token) => {
                w.put(&token.index.to_le_bytes());
                w.put(&token.value);
            }
            Request::Console(offset) => w.put(&offset.to_le_bytes()),
            Request::Renew(renewal, tag) => {
                w.put(&renewal.index.to_le_bytes());
                w.put(&renewal.anchor);
                w.put(tag);
            }
        }
        let tag = match self {
            Request::Hello => return packet,
            Request::Boot(_, tag) => *tag,
            _ => {
                let body = &packet[BODY..BODY + self.op().request_size()];
                key.tag(&[&packet[..HEAD_SIZE], body])
            }
        };
        packet[HEAD_SIZE..BODY].copy_from_slice(&tag);
        packet
    }

    /// The meaning of a request and its nonce and job; `None` where the form is wrong.
    pub fn parse(packet: &Packet) -> Option<(Self, u64, JobId)> {
        let unchecked = RequestUnchecked::parse(packet)?;
        let mut r = Reader::new(&packet[BODY..]);
        let request = match unchecked.op {
            Op::Hello => Request::Hello,
            Op::Boot => Request::Boot(BootToken::parse(&r.array()?)?, *tag(packet)),
            Op::Pay => Request::Pay(PaymentToken { index: r.u32()?, value: r.array()? }),
            Op::Status => Request::Status,
            Op::Console => Request::Console(r.u64()?),
            Op::Stop => Request::Stop(r.u8()? == 1),
            Op::Suspend => Request::Suspend(r.u64()?),
            Op::Wake => Request::Wake(r.u64()?),
            Op::Renew => {
                Request::Renew(Renewal { index: r.u32()?, anchor: r.array()? }, r.array()?)
            }
        };
        Some((request, nonce(packet), unchecked.job()))
    }
}

// tcb:stranger-begin
fn nonce(packet: &Packet) -> u64 {
    u64::from_le_bytes(packet[8..16].try_into().expect("a nonce has 8 bytes"))
}
// tcb:stranger-end

fn head(op: u8, status: u8, nonce: u64, job: &JobId) -> Packet {
    let mut packet = [0; PACKET_SIZE];
    let mut w = Writer::new(&mut packet);
    w.put(&MAGIC);
    w.put(&[VERSION, op, status, 0]);
    w.put(&nonce.to_le_bytes());
    w.put(job);
    packet
}

/// Price list, micro-tokens a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prices {
    /// A second of one vCPU's time, as used.
    pub vcpu_s: u64,
    /// A GiB of memory held for a second.
    pub gib_s: u64,
    /// A GiB sent.
    pub gib_sent: u64,
    /// A GiB of disk held for a second.
    pub disk_gib_s: u64,
}

impl Prices {
    pub(crate) fn emit(&self, w: &mut Writer<'_>) {
        [self.vcpu_s, self.gib_s, self.gib_sent, self.disk_gib_s]
            .iter()
            .for_each(|price| w.put(&price.to_le_bytes()));
    }

    pub(crate) fn parse(r: &mut Reader<'_>) -> Option<Self> {
        Some(Self { vcpu_s: r.u64()?, gib_s: r.u64()?, gib_sent: r.u64()?, disk_gib_s: r.u64()? })
    }
}

/// Answer to HELLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The node.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Its number in the address plan.
    pub number: u32,
    /// Milliseconds since the node booted: the clock of boot tokens' expiry.
    pub uptime_ms: u64,
    /// Memory that VMs can have in all, MiB.
    pub mem_mib: u32,
    /// Memory not given out, MiB.
    pub mem_mib_free: u32,
    /// Disk that VMs can have in all, MiB: for disks of their own, and to be saved on. 0: none is ever saved.
    pub disk_mib: u32,
    /// Disk not given out, MiB.
    pub disk_mib_free: u32,
    /// Processors.
    pub cpus: u16,
    /// VMs that can still be started.
    pub slots_free: u16,
    /// Price list.
    pub prices: Prices,
}

/// Answer to BOOT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Booted {
    /// MAC of mstrap.
    pub mac: [u8; 6],
    /// IPv4 address that mstrap listens on, at [`crate::channel::PORT`].
    pub ipv4: [u8; 4],
    /// Balance after the boot token's payment, micro-tokens.
    pub balance_micro: u64,
}

/// Answer to PAY and RENEW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paid {
    /// Number of tokens accepted so far.
    pub last_index: u32,
    /// Balance, micro-tokens.
    pub balance_micro: u64,
}

/// Why a VM is no longer alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum EndReason {
    /// It is alive.
    #[default]
    None = 0,
    /// The guest powered off.
    PowerOff = 1,
    /// The guest reset itself (also a triple fault).
    Reset = 2,
    /// No valid loader and stream came in time.
    BootTimeout = 3,
    /// The VMM failed.
    Fault = 4,
    /// STOP.
    Stopped = 5,
    /// The balance reached zero.
    OutOfTokens = 6,
    /// It wanted more memory than it bought: a clone that wrote too many of its template's pages.
    OutOfMemory = 7,
}

impl EndReason {
    /// The reason with this number.
    pub fn parse(value: u8) -> Option<Self> {
        use EndReason::*;
        [None, PowerOff, Reset, BootTimeout, Fault, Stopped, OutOfTokens, OutOfMemory]
            .into_iter()
            .find(|reason| *reason as u8 == value)
    }
}

/// Answer to STATUS. The default is a VM that was just bought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobStatus {
    /// Where the VM stands.
    pub stage: Stage,
    /// Why it ended.
    pub end: EndReason,
    /// Number of tokens accepted.
    pub last_index: u32,
    /// Micro-tokens left.
    pub balance_micro: u64,
    /// Micro-tokens charged so far.
    pub spent_micro: u64,
    /// Micro-tokens a second at the present rate.
    pub burn_micro_per_s: u64,
    /// Seconds left at the present rate: until a running VM is saved, or purged where it cannot be; until a saved one
    /// is purged. `u64::MAX` where nothing is charged.
    pub seconds_left: u64,
    /// Seconds until all of it is gone, at the present rate; for a saved VM a promise. `u64::MAX` where nothing is charged.
    pub purge_s: u64,
    /// Micro-tokens to pay before a saved VM wakes up by itself; 0 for one that was saved by SUSPEND, which only WAKE wakes.
    pub wake_micro: u64,
    /// Milliseconds since the VM was started.
    pub age_ms: u64,
    /// Meter: microseconds of processor time.
    pub cpu_us: u64,
    /// Meter: MiB-milliseconds of memory held.
    pub mem_mib_ms: u64,
    /// Meter: bytes sent.
    pub sent_bytes: u64,
    /// Meter: MiB-milliseconds of disk held.
    pub disk_mib_ms: u64,
    /// Whether its guest ever ran, if only for an instant: the machine that it was made of must not.
    pub has_resumed: bool,
    /// How many SUSPEND and WAKE were obeyed or refused: the next one has to name it. Another changes nothing.
    pub turn: u64,
}

/// Answer to CONSOLE: `len` bytes from `offset` of all the `total` bytes ever written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsoleSlice {
    /// Offset of the first byte here: as asked for, or the oldest still kept.
    pub offset: u64,
    /// Bytes the guest ever wrote.
    pub total: u64,
    /// How many of `data` mean something.
    pub len: u16,
    /// The bytes.
    pub data: [u8; CONSOLE_SLICE_MAX],
}

/// A reply with its meaning. Anything but Ok carries nothing but its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "a reply is one packet on the stack, never stored")]
pub enum Reply {
    /// To HELLO.
    Hello(Hello),
    /// To BOOT.
    Boot(Booted),
    /// To PAY.
    Pay(Paid),
    /// To STATUS.
    Status(JobStatus),
    /// To CONSOLE.
    Console(ConsoleSlice),
    /// To STOP: the certificate's bytes.
    Stop([u8; CERTIFICATE_SIZE]),
    /// To SUSPEND: it is under way, or done when the stage says so.
    Suspend(JobStatus),
    /// To WAKE: it is under way, or done when the stage says so.
    Wake(JobStatus),
    /// To RENEW.
    Renew(Paid),
    /// The request was understood and not done.
    Refused(Op, Status),
}

impl Reply {
    /// The reply's packet, tagged under the job key (HELLO: the node key).
    pub fn emit(&self, nonce: u64, job: &JobId, key: &Key) -> Packet {
        let (op, status) = match self {
            Reply::Hello(_) => (Op::Hello, Status::Ok),
            Reply::Boot(_) => (Op::Boot, Status::Ok),
            Reply::Pay(_) => (Op::Pay, Status::Ok),
            Reply::Status(_) => (Op::Status, Status::Ok),
            Reply::Console(_) => (Op::Console, Status::Ok),
            Reply::Stop(_) => (Op::Stop, Status::Ok),
            Reply::Suspend(_) => (Op::Suspend, Status::Ok),
            Reply::Wake(_) => (Op::Wake, Status::Ok),
            Reply::Renew(_) => (Op::Renew, Status::Ok),
            Reply::Refused(op, status) => (*op, *status),
        };
        let mut packet = head(op as u8 | REPLY, status as u8, nonce, job);
        self.emit_body(&mut Writer::new(&mut packet[BODY..]));
        let tag = key.tag(&[&packet[..HEAD_SIZE], &packet[BODY..]]);
        packet[HEAD_SIZE..BODY].copy_from_slice(&tag);
        packet
    }

    fn emit_body(&self, w: &mut Writer<'_>) {
        match self {
            Reply::Hello(hello) => hello.emit(w),
            Reply::Boot(booted) => {
                w.put(&booted.mac);
                w.put(&booted.ipv4);
                w.put(&booted.balance_micro.to_le_bytes());
            }
            Reply::Pay(paid) | Reply::Renew(paid) => {
                w.put(&paid.last_index.to_le_bytes());
                w.put(&paid.balance_micro.to_le_bytes());
            }
            Reply::Status(status) | Reply::Suspend(status) | Reply::Wake(status) => status.emit(w),
            Reply::Console(slice) => {
                w.put(&slice.offset.to_le_bytes());
                w.put(&slice.total.to_le_bytes());
                w.put(&slice.len.to_le_bytes());
                w.put(&slice.data);
            }
            Reply::Stop(certificate) => w.put(certificate),
            Reply::Refused(..) => {}
        }
    }

    /// Reads a reply to the request with this op and nonce; `None` if it is not one, or if its tag
    /// is wrong. Without a key (HELLO by somebody who has no node key) the tag is not looked at.
    pub fn parse(payload: &[u8], op: Op, nonce_sent: u64, key: Option<&Key>) -> Option<Self> {
        let packet: &Packet = payload.try_into().ok()?;
        let head_ok = packet[..4] == MAGIC && packet[4] == VERSION && packet[5] == op as u8 | REPLY;
        if !head_ok || nonce(packet) != nonce_sent {
            return None;
        }
        if let Some(key) = key
            && !key.verify(&[&packet[..HEAD_SIZE], &packet[BODY..]], tag(packet))
        {
            return None;
        }
        match Status::parse(packet[6])? {
            Status::Ok => Self::parse_body(op, &mut Reader::new(&packet[BODY..])),
            refused => Some(Reply::Refused(op, refused)),
        }
    }

    fn parse_body(op: Op, r: &mut Reader<'_>) -> Option<Self> {
        Some(match op {
            Op::Hello => Reply::Hello(Hello::parse(r)?),
            Op::Boot => {
                Reply::Boot(Booted { mac: r.array()?, ipv4: r.array()?, balance_micro: r.u64()? })
            }
            Op::Pay => Reply::Pay(Paid { last_index: r.u32()?, balance_micro: r.u64()? }),
            Op::Renew => Reply::Renew(Paid { last_index: r.u32()?, balance_micro: r.u64()? }),
            Op::Status => Reply::Status(JobStatus::parse(r)?),
            Op::Console => {
                let (offset, total, len) = (r.u64()?, r.u64()?, r.u16()?);
                if usize::from(len) > CONSOLE_SLICE_MAX {
                    return None;
                }
                Reply::Console(ConsoleSlice { offset, total, len, data: r.array()? })
            }
            Op::Stop => Reply::Stop(r.array()?),
            Op::Suspend => Reply::Suspend(JobStatus::parse(r)?),
            Op::Wake => Reply::Wake(JobStatus::parse(r)?),
        })
    }
}

// tcb:stranger-begin
/// The HELLO reply for one nonce, from a template that [`Reply::emit`] made: `packetd` answers
/// strangers with this, `noded` makes the template once a second.
pub fn hello_reply(template: &Packet, nonce: u64, node_key: &Key) -> Packet {
    let mut packet = *template;
    packet[8..16].copy_from_slice(&nonce.to_le_bytes());
    let tag = node_key.tag(&[&packet[..HEAD_SIZE], &packet[BODY..]]);
    packet[HEAD_SIZE..BODY].copy_from_slice(&tag);
    packet
}
// tcb:stranger-end

impl Hello {
    fn emit(&self, w: &mut Writer<'_>) {
        w.put(&self.node);
        w.put(&self.incarnation);
        w.put(&self.number.to_le_bytes());
        w.put(&self.uptime_ms.to_le_bytes());
        w.put(&self.mem_mib.to_le_bytes());
        w.put(&self.mem_mib_free.to_le_bytes());
        w.put(&self.disk_mib.to_le_bytes());
        w.put(&self.disk_mib_free.to_le_bytes());
        w.put(&self.cpus.to_le_bytes());
        w.put(&self.slots_free.to_le_bytes());
        self.prices.emit(w);
    }

    fn parse(r: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            node: r.array()?,
            incarnation: r.array()?,
            number: r.u32()?,
            uptime_ms: r.u64()?,
            mem_mib: r.u32()?,
            mem_mib_free: r.u32()?,
            disk_mib: r.u32()?,
            disk_mib_free: r.u32()?,
            cpus: r.u16()?,
            slots_free: r.u16()?,
            prices: Prices::parse(r)?,
        })
    }
}

impl JobStatus {
    fn emit(&self, w: &mut Writer<'_>) {
        w.put(&(self.stage as u32).to_le_bytes());
        w.put(&[self.end as u8]);
        w.put(&self.last_index.to_le_bytes());
        [
            self.balance_micro,
            self.spent_micro,
            self.burn_micro_per_s,
            self.seconds_left,
            self.purge_s,
            self.wake_micro,
            self.age_ms,
            self.cpu_us,
            self.mem_mib_ms,
            self.sent_bytes,
            self.disk_mib_ms,
        ]
        .iter()
        .for_each(|number| w.put(&number.to_le_bytes()));
        w.put(&[u8::from(self.has_resumed)]);
        w.put(&self.turn.to_le_bytes());
    }

    fn parse(r: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            stage: Stage::parse(r.u32()?)?,
            end: EndReason::parse(r.u8()?)?,
            last_index: r.u32()?,
            balance_micro: r.u64()?,
            spent_micro: r.u64()?,
            burn_micro_per_s: r.u64()?,
            seconds_left: r.u64()?,
            purge_s: r.u64()?,
            wake_micro: r.u64()?,
            age_ms: r.u64()?,
            cpu_us: r.u64()?,
            mem_mib_ms: r.u64()?,
            sent_bytes: r.u64()?,
            disk_mib_ms: r.u64()?,
            has_resumed: r.u8()? == 1,
            turn: r.u64()?,
        })
    }
}
