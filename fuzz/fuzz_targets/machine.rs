//! What passes between a VM, its VMM and its bootstrap, of any bytes: no panic; what is read is written
//! back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onde_wire::bootstrap::{Report, parse_upload_head, upload_head};
use onde_wire::machine::{ColdStart, Identity, Meter, VmmCommand, VmmEvent};

fuzz_target!(|bytes: &[u8]| {
    if let Some(size) = bytes.first_chunk().and_then(parse_upload_head) {
        assert_eq!(upload_head(size), bytes[..12]);
    }
    if let Some(report) = bytes.first_chunk().and_then(Report::parse) {
        assert_eq!(Report::parse(&report.emit()), Some(report));
    }
    if let Some(state) = ColdStart::parse(bytes) {
        assert_eq!(ColdStart::parse(&state.emit()), Some(state));
    }
    if let Some(identity) = Identity::parse(bytes) {
        assert!(Identity::parse(&identity.emit()) == Some(identity));
    }
    if let Some(meter) = Meter::parse(bytes) {
        assert_eq!(Meter::parse(&meter.emit(2)), Some(meter));
    }
    if let Some(event) = VmmEvent::parse(bytes) {
        assert_eq!(VmmEvent::parse(&event.emit()), Some(event));
    }
    if let Some(command) = VmmCommand::parse(bytes) {
        assert_eq!(VmmCommand::parse(&command.emit()), Some(command));
    }
});
