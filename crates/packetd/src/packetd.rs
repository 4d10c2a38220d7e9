//! What `packetd` does with each frame and each message from `noded`, as a state machine: the caller
//! passes the time and carries out the output. Answers strangers' ARP, echo and HELLO at bounded
//! rates; of the rest, only packets with a right tag reach `noded`.

use crate::bucket::Bucket;
use crate::frame::{Asker, FRAME_MAX, Host, Request, emit_arp, emit_echo};
use onde_wire::handover::{HANDOVER_SIZE, Handover};
use onde_wire::key::Key;
use onde_wire::packet::{MAGIC, Op, Packet, RequestUnchecked, hello_reply};

/// ARP answers: every neighbour asks about once a minute, and a link has a few thousand.
const ARP: Bucket = Bucket::new(1000, 1000);
/// Plain echo replies: what Linux lets a host send of other ICMP (`icmp_msgs_per_sec`); people
/// and monitors ping once a second.
const ECHO: Bucket = Bucket::new(1000, 1000);
/// HELLO replies: one costs about 3 us with its tag and its send, so a flood takes a tenth of a core and
/// leaves the rest for boot tokens; customers ask once a VM.
const HELLO: Bucket = Bucket::new(30_000, 3000);

/// What comes in.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// A frame from the network.
    Frame(&'a [u8]),
    /// A message from `noded`.
    Message(&'a [u8]),
}

/// What goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output<'a> {
    /// Nothing.
    Nothing,
    /// A frame to the network.
    Frame(&'a [u8]),
    /// A message to `noded`.
    Message(&'a [u8]),
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// ARP requests answered.
    pub arp: u64,
    /// Plain echo requests answered.
    pub echo: u64,
    /// HELLOs answered.
    pub hello: u64,
    /// Requests with a right tag, handed to `noded`.
    pub up: u64,
    /// Replies of `noded` sent.
    pub down: u64,
    /// Frames that no node answers.
    pub ignored: u64,
    /// Onde packets of a wrong form, or a HELLO before `noded` said what to answer.
    pub malformed: u64,
    /// Onde packets with a wrong tag.
    pub wrong_tag: u64,
    /// Requests over a rate.
    pub limited: u64,
    /// Messages of `noded` that made no sense.
    pub unreadable: u64,
}

/// The state of `packetd`, all of it.
pub struct Packetd {
    node: Host,
    node_key: Key,
    hello_template: Option<Packet>,
    arp: Bucket,
    echo: Bucket,
    hello: Bucket,
    counts: Counts,
    frame: [u8; FRAME_MAX],
    message: [u8; HANDOVER_SIZE],
}

impl Packetd {
    /// Starts with the node's addresses and key; HELLOs are answered once `noded` sends a template.
    pub fn new(node: Host, node_key: &[u8; 32]) -> Self {
        Self {
            node,
            node_key: Key::new(node_key),
            hello_template: None,
            arp: ARP,
            echo: ECHO,
            hello: HELLO,
            counts: Counts::default(),
            frame: [0; FRAME_MAX],
            message: [0; HANDOVER_SIZE],
        }
    }

    /// What happened so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    // tcb:stranger-begin
    /// Takes one input at `now_ms` of a clock that never goes back. Bounded work, no heap, no panic.
    pub fn step(&mut self, now_ms: u64, input: Input<'_>) -> Output<'_> {
        match input {
            Input::Frame(frame) => self.frame(now_ms, frame),
            Input::Message(message) => self.message(message),
        }
    }

    fn frame(&mut self, now_ms: u64, frame: &[u8]) -> Output<'_> {
        match Request::parse(&self.node, frame) {
            Some(Request::Arp(asker)) => self.answer_arp(now_ms, &asker),
            Some(Request::Echo(asker, payload)) if payload.starts_with(&MAGIC) => {
                self.onde(now_ms, &asker, payload)
            }
            Some(Request::Echo(asker, payload)) => self.answer_echo(now_ms, &asker, payload),
            None => drop_as(&mut self.counts.ignored),
        }
    }

    fn answer_arp(&mut self, now_ms: u64, asker: &Host) -> Output<'_> {
        if !self.arp.take(now_ms) {
            return drop_as(&mut self.counts.limited);
        }
        self.counts.arp += 1;
        Output::Frame(emit_arp(&self.node, asker, &mut self.frame))
    }

    fn answer_echo(&mut self, now_ms: u64, asker: &Asker, payload: &[u8]) -> Output<'_> {
        if !self.echo.take(now_ms) {
            return drop_as(&mut self.counts.limited);
        }
        self.counts.echo += 1;
        self.reply(asker, payload)
    }

    fn reply(&mut self, asker: &Asker, payload: &[u8]) -> Output<'_> {
        emit_echo(&self.node, asker, payload, &mut self.frame)
            .map_or(Output::Nothing, Output::Frame)
    }

    fn onde(&mut self, now_ms: u64, asker: &Asker, payload: &[u8]) -> Output<'_> {
        let (Some(request), Ok(packet)) = (RequestUnchecked::parse(payload), payload.try_into())
        else {
            return drop_as(&mut self.counts.malformed);
        };
        if request.op() == Op::Hello {
            self.answer_hello(now_ms, asker, request.nonce())
        } else if request.verify(&self.node_key) {
            self.up(asker, packet)
        } else {
            drop_as(&mut self.counts.wrong_tag)
        }
    }

    fn answer_hello(&mut self, now_ms: u64, asker: &Asker, nonce: u64) -> Output<'_> {
        let Some(template) = &self.hello_template else {
            return drop_as(&mut self.counts.malformed);
        };
        if !self.hello.take(now_ms) {
            return drop_as(&mut self.counts.limited);
        }
        self.counts.hello += 1;
        let packet = hello_reply(template, nonce, &self.node_key);
        self.reply(asker, &packet)
    }
    // tcb:stranger-end

    /// The tag was right: whoever sent this paid.
    fn up(&mut self, asker: &Asker, packet: &Packet) -> Output<'_> {
        self.counts.up += 1;
        self.message = Handover::Up(asker.emit(), *packet).emit();
        Output::Message(&self.message)
    }

    fn message(&mut self, message: &[u8]) -> Output<'_> {
        match Handover::parse(message) {
            Some(Handover::Hello(template)) => {
                self.hello_template = Some(template);
                Output::Nothing
            }
            Some(Handover::Down(cookie, packet)) => self.down(&cookie, &packet),
            Some(Handover::Up(..)) | None => drop_as(&mut self.counts.unreadable),
        }
    }

    fn down(&mut self, cookie: &[u8; 32], packet: &Packet) -> Output<'_> {
        let Some(asker) = Asker::parse(cookie) else {
            return drop_as(&mut self.counts.unreadable);
        };
        self.counts.down += 1;
        self.reply(&asker, packet)
    }
}

// tcb:stranger-begin
/// Counts a packet and answers nothing.
fn drop_as(count: &mut u64) -> Output<'static> {
    *count += 1;
    Output::Nothing
}
// tcb:stranger-end
