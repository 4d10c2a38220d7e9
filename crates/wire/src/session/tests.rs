//! Frames byte for byte, and what is refused.

use super::*;

const LAUNCH: Launch = Launch {
    window: Some(Window { rows: 24, columns: 80 }),
    uid: 1,
    gid: 2,
    cwd: b"/w",
    argv: b"ls\0-l\0",
    env: b"A=b\0",
};

fn check_client(frame: ClientFrame, golden: &[u8]) {
    let mut out = [0; FRAME_MAX];
    let size = frame.emit(&mut out).unwrap();
    assert_eq!(&out[..size], golden, "{frame:?}");
    let (kind, payload_size) = head(golden.first_chunk().unwrap()).unwrap();
    assert_eq!(payload_size, golden.len() - HEAD_SIZE);
    assert_eq!(ClientFrame::parse(kind, &golden[HEAD_SIZE..]), Some(frame));
    assert_eq!(AgentFrame::parse(kind, &golden[HEAD_SIZE..]), None);
}

fn check_agent(frame: AgentFrame, golden: &[u8]) {
    let mut out = [0; FRAME_MAX];
    let size = frame.emit(&mut out).unwrap();
    assert_eq!(&out[..size], golden, "{frame:?}");
    assert_eq!(AgentFrame::parse(golden[0], &golden[HEAD_SIZE..]), Some(frame));
    assert_eq!(ClientFrame::parse(golden[0], &golden[HEAD_SIZE..]), None);
}

#[test]
fn client_frames_keep_their_bytes() {
    use ClientFrame::*;
    let attach = b"\x01\x11\0\0\0\x07\0\0\0\0\0\0\0\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01";
    check_client(Attach { client: 7, from: FROM_END, hold: true }, attach);
    let exec = b"\x02\x24\0\0\0\x01\0\0\0\x18\0\x50\0\x01\0\0\0\x02\0\0\0\x02\0\0\0\x06\0\0\0/wls\0-l\0A=b\0";
    check_client(Exec(LAUNCH), exec);
    check_client(Stdin { offset: 3, bytes: b"hi" }, b"\x03\x0A\0\0\0\x03\0\0\0\0\0\0\0hi");
    check_client(StdinEof, b"\x04\0\0\0\0");
    check_client(Signal(15), b"\x05\x01\0\0\0\x0F");
    let window = super::Window { rows: 25, columns: 80 };
    check_client(ClientFrame::Window(window), b"\x06\x04\0\0\0\x19\0\x50\0");
    check_client(Ack(258), b"\x07\x08\0\0\0\x02\x01\0\0\0\0\0\0");
    check_client(Detach, b"\x08\0\0\0\0");
    check_client(Snapshot, b"\x09\0\0\0\0");
    check_client(Clock(258), b"\x0A\x08\0\0\0\x02\x01\0\0\0\0\0\0");
    let ticket = Ticket { node: [1; 4], key: [2; 32], token: [3; BOOT_TOKEN_SIZE], tag: [4; 32] };
    let tickets = [ticket.emit(), ticket.emit()].concat();
    check_client(Fork(&tickets), &[&b"\x0B\x54\x02\0\0"[..], &tickets].concat());
    assert_eq!(Ticket::parse(&tickets[..TICKET_SIZE]), Some(ticket));
    check_client(Release, b"\x0C\0\0\0\0");
    let purse =
        super::Purse { shown: 1, last: 258, lot: 3, value: *b"0123456789abcdef0123456789ABCDEF" };
    let golden =
        b"\x0D\x2C\0\0\0\x01\0\0\0\x02\x01\0\0\x03\0\0\x000123456789abcdef0123456789ABCDEF";
    check_client(ClientFrame::Purse(purse), golden);
    let bytes = [7; TICKET_SIZE];
    check_client(Migrate(&bytes), &[&b"\x0E\x2A\x01\0\0"[..], &bytes].concat());
}

#[test]
fn agent_frames_keep_their_bytes() {
    use AgentFrame::*;
    let started = b"\x10\x1C\0\0\0\x05\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0";
    check_agent(Started { pid: 5, from: 1, end: 2, received: 3 }, started);
    let output = b"\x11\x0B\0\0\0\x02\x09\0\0\0\0\0\0\0ok";
    check_agent(Output { stream: 2, offset: 9, bytes: b"ok" }, output);
    check_agent(Accepted(4), b"\x12\x08\0\0\0\x04\0\0\0\0\0\0\0");
    check_agent(Exited(Exit::Status(3)), b"\x13\x02\0\0\0\0\x03");
    check_agent(Exited(Exit::Signal(9)), b"\x13\x02\0\0\0\x01\x09");
    check_agent(Error { refusal: Refusal::NotFound, text: "ls" }, b"\x14\x04\0\0\0\x02\0ls");
    check_agent(Stream(b"ok"), b"\x15\x02\0\0\0ok");
    let round = super::Round { number: 1, pages: 2 };
    check_agent(AgentFrame::Round(round), b"\x16\x0C\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0");
    let taken = super::Taken { pause_us: 3, frozen_pages: 4 };
    let golden = b"\x17\x10\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0";
    check_agent(AgentFrame::Taken(taken), golden);
    check_agent(Made { index: 2, fault: "no" }, b"\x18\x06\0\0\0\x02\0\0\0no");
    check_agent(Released, b"\x19\0\0\0\0");
    let sent = b"\x1A\x10\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0";
    check_agent(Sent { pages_left: 5, bytes: 6 }, sent);
    check_agent(Moved, b"\x1B\0\0\0\0");
    check_agent(Stopped, b"\x1C\0\0\0\0");
}

#[test]
fn launch_lists_are_strings_that_end() {
    assert_eq!(strings(LAUNCH.argv).collect::<Vec<_>>(), [&b"ls"[..], b"-l"]);
    assert_eq!(strings(b"a\0\0b\0").collect::<Vec<_>>(), [&b"a"[..], b"", b"b"]);
    assert_eq!(strings(b"").count(), 0);
    let mut out = [0; 64];
    for (argv, env) in [(&b""[..], &b""[..]), (b"ls", b""), (b"ls\0", b"A"), (b"\0x\0", b"")] {
        let size = Launch { argv, env, ..LAUNCH }.emit(&mut out).unwrap();
        assert_eq!(Launch::parse(&out[..size]), None, "{argv:?} {env:?}");
    }
}

#[test]
fn malformed_frames_are_refused() {
    assert_eq!(head(&[1, 0xFB, 0xFF, 0, 0]), Some((1, PAYLOAD_MAX)));
    assert_eq!(head(&[1, 0xFC, 0xFF, 0, 0]), None);
    let mut out = [0; FRAME_MAX];
    let long = [7; PAYLOAD_MAX];
    assert_eq!(ClientFrame::Stdin { offset: 0, bytes: &long }.emit(&mut out), None);
    let size = ClientFrame::Exec(LAUNCH).emit(&mut out).unwrap();
    for cut in 0..24 {
        assert_eq!(ClientFrame::parse(EXEC, &out[HEAD_SIZE..HEAD_SIZE + cut]), None);
    }
    assert!(ClientFrame::parse(EXEC, &out[HEAD_SIZE..size]).is_some());
    for (kind, payload) in
        [(DETACH, &b"x"[..]), (SIGNAL, b""), (FORK, b""), (FORK, b"x"), (STDIN, &[0; 8]), (99, b"")]
    {
        assert_eq!(ClientFrame::parse(kind, payload), None, "{kind}");
    }
    assert_eq!(AgentFrame::parse(OUTPUT, b"\x03\0\0\0\0\0\0\0\0x"), None);
    assert_eq!(AgentFrame::parse(ERROR, b"\x02\0\xFF"), None);
}

#[test]
fn a_long_error_text_is_cut_at_a_character() {
    let text = "é".repeat(600);
    let text = format!("x{text}");
    let mut out = [0; FRAME_MAX];
    let error = AgentFrame::Error { refusal: Refusal::Guest, text: &text };
    let size = error.emit(&mut out).unwrap();
    let parsed = AgentFrame::parse(ERROR, &out[HEAD_SIZE..size]).unwrap();
    assert_eq!(parsed, AgentFrame::Error { refusal: Refusal::Guest, text: &text[..1023] });
}
