//! Session frames of any bytes: no panic; what is read is written back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::session::{AgentFrame, ClientFrame, FRAME_MAX, HEAD_SIZE, Launch, head, strings};

fuzz_target!(|bytes: &[u8]| {
    let mut out = vec![0; FRAME_MAX];
    if let Some(launch) = Launch::parse(bytes) {
        strings(launch.argv).chain(strings(launch.env)).count();
    }
    let Some((frame_head, rest)) = bytes.split_first_chunk::<HEAD_SIZE>() else { return };
    let Some((kind, size)) = head(frame_head) else { return };
    let payload = &rest[..rest.len().min(size)];
    if let Some(frame) = ClientFrame::parse(kind, payload) {
        let size = frame.emit(&mut out).expect("what came in one frame fits one");
        assert_eq!(ClientFrame::parse(out[0], &out[HEAD_SIZE..size]), Some(frame));
    }
    if let Some(frame) = AgentFrame::parse(kind, payload) {
        let size = frame.emit(&mut out).expect("what came in one frame fits one");
        assert_eq!(AgentFrame::parse(out[0], &out[HEAD_SIZE..size]), Some(frame));
    }
});
