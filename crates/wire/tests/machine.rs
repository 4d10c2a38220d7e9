//! The info page, cold machine states, messages between `noded` and `vmm`, and the bootstrap's reports.

mod sample;

use onde_wire::bootstrap::{Report, UPLOAD_HEAD_SIZE, parse_upload_head, upload_head};
use onde_wire::key::node_id;
use onde_wire::machine::*;
use onde_wire::token::PaymentToken;
use sample::*;

fn identity() -> Identity {
    Identity {
        job: JOB,
        node: node_id(&MAC),
        job_key: [0x11; 32],
        loader_sha256: [5; 32],
        seed: [0x22; 32],
        space: Space::of_mib(256, 9),
        vcpus: 2,
        tsc_khz: 2_500_000,
        boot_mac: [2, 0x4f, 198, 18, 1, 2],
        boot_ipv4: [198, 18, 1, 2],
        mac: [2, 0, 0, 0, 0, 1],
        ipv4: [198, 19, 0, 1],
        gateway: [198, 18, 0, 1],
        prefix_len: 15,
    }
}

#[test]
fn the_info_page_keeps_its_bytes() {
    let page = identity().emit();
    check_golden(&page, "01552825f01a25e66d579c84e0f4e6c8b92a51f0da82486b43d1ce1eb5174414");
    assert_eq!(page[INFO_TSC_KHZ..INFO_TSC_KHZ + 4], 2_500_000u32.to_le_bytes());
    assert!(Identity::parse(&page) == Some(identity()));
    assert!((0..INFO_SIZE).all(|size| Identity::parse(&page[..size]).is_none()));
    each_flip(&page[..12], |_, head| {
        let mut page = page;
        page[..12].copy_from_slice(head);
        assert!(Identity::parse(&page).is_none(), "another version");
    });
    let shown = format!("{:?}", identity());
    assert!(!shown.contains("17, 17") && !shown.contains("34, 34"), "no key in a log: {shown}");
}

#[test]
fn a_guest_is_announced_as_linux_does_it() {
    let expect = b"\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x08\x06\
        \x00\x01\x08\x00\x06\x04\x00\x01\x02\x00\x00\x00\x00\x01\xc6\x13\x00\x01\
        \x00\x00\x00\x00\x00\x00\xc6\x13\x00\x01";
    assert_eq!(&identity().announcement(), expect);
}

#[test]
fn the_meter_keeps_its_bytes() {
    let meter = Meter {
        stage: Stage::Running,
        balance_micro: 5,
        burn_micro_per_s: 6,
        seconds_left: 7,
        purge_s: 8,
    };
    let bytes = meter.emit(6);
    check_golden(
        &bytes,
        // The digits themselves, split so that they are not taken for a digest's.
        &[
            "06000000010000000500000000000000",
            "06000000000000000700000000000000",
            "0800000000000000",
        ]
        .concat(),
    );
    assert_eq!(Meter::parse(&bytes), Some(meter));
    assert_eq!(Meter::parse(&meter.emit(7)), None, "being written");
    assert!((0..INFO_METER_SIZE).all(|size| Meter::parse(&bytes[..size]).is_none()));
}

#[test]
fn every_stage_has_its_number_and_name() {
    let stages: Vec<Stage> = (0..100).map_while(Stage::parse).collect();
    assert_eq!(stages.len(), 8);
    assert!(stages.iter().zip(0..).all(|(stage, number)| *stage as u32 == number));
    let alive: Vec<&str> = stages.iter().filter(|s| s.is_alive()).map(|s| s.name()).collect();
    assert_eq!(alive, ["booting", "running", "low", "template"]);
    assert_eq!(Stage::parse(u32::MAX), None);
}

#[test]
fn cold_states_keep_their_bytes() {
    for (state, golden) in [
        (
            ColdStart::Pvh { entry: 0x10_0000, start_info: 0x6000 },
            "4f4e44454d41434801000000010000000000100000000000006000000000000000000000000000000000000000000000",
        ),
        (
            ColdStart::Linux64 { entry: 0x100_0200, boot_params: 0x7000, cr3: 0x9000 },
            "4f4e44454d41434801000000020000000002000100000000007000000000000000900000000000000000000000000000",
        ),
    ] {
        let bytes = state.emit();
        check_golden(&bytes, golden);
        assert_eq!(ColdStart::parse(&bytes), Some(state));
        assert!((0..40).all(|size| ColdStart::parse(&bytes[..size]).is_none()));
        for (byte, value) in [(0, 0), (8, 2), (12, 3), (12, 0)] {
            let mut bytes = bytes;
            bytes[byte] = value;
            assert_eq!(ColdStart::parse(&bytes), None, "byte {byte}");
        }
    }
    let mut far = ColdStart::Pvh { entry: 1, start_info: 2 }.emit();
    far[20] = 1;
    assert_eq!(ColdStart::parse(&far), None, "an entry beyond 4 GiB");
}

#[test]
fn messages_of_vmm_come_back_as_they_were() {
    let payment = PaymentToken { index: 0x0102_0304, value: [7; 32] };
    for (event, first) in [
        (VmmEvent::Started, &[1][..]),
        (VmmEvent::Resumed, &[2]),
        (VmmEvent::Pay(payment), &[3, 4, 3, 2, 1, 7]),
        (VmmEvent::PowerOff, &[4]),
        (VmmEvent::Reset, &[5]),
        (VmmEvent::Fault(9), &[6, 9, 0, 0, 0]),
        (VmmEvent::Saved, &[7]),
        (VmmEvent::NotSaved, &[8]),
    ] {
        let bytes = event.emit();
        assert!(bytes.starts_with(first), "{event:?}: {bytes:?}");
        assert_eq!(VmmEvent::parse(&bytes), Some(event));
        assert_eq!(VmmEvent::parse(&bytes[..MESSAGE_SIZE - 1]), None);
    }
    assert_eq!(VmmEvent::parse(&[0; MESSAGE_SIZE]), None);
    for (command, first) in [
        (VmmCommand::PayDone(true), [1, 1]),
        (VmmCommand::PayDone(false), [1, 0]),
        (VmmCommand::PowerButton, [2, 0]),
        (VmmCommand::Go, [3, 0]),
        (VmmCommand::Save, [4, 0]),
    ] {
        let bytes = command.emit();
        assert!(bytes.starts_with(&first));
        assert_eq!(VmmCommand::parse(&bytes), Some(command));
        assert_eq!(VmmCommand::parse(&bytes[1..]), None);
    }
    assert_eq!(VmmCommand::parse(&[0; MESSAGE_SIZE]), None);
}

#[test]
fn an_upload_is_a_loader_of_an_allowed_size() {
    check_golden(&upload_head(0x1234), "4f4e44454c4f414434120000");
    for (size, expected) in [
        (0, None),
        (1, Some(1)),
        (LOADER_SIZE_MAX, Some(LOADER_SIZE_MAX)),
        (LOADER_SIZE_MAX + 1, None),
        (u32::MAX, None),
    ] {
        assert_eq!(parse_upload_head(&upload_head(size)), expected);
    }
    each_flip(&upload_head(5)[..8], |_, magic| {
        let mut head = upload_head(5);
        head[..8].copy_from_slice(magic);
        assert_eq!(parse_upload_head(&head), None);
    });
    assert_eq!(UPLOAD_HEAD_SIZE, 12);
}

#[test]
fn reports_come_back_as_they_were() {
    for (report, golden) in [
        (Report::LoaderOk, "0100000000"),
        (Report::BadUpload, "0200000000"),
        (Report::OtherLoader, "0300000000"),
        (Report::StreamOk, "0400000000"),
        (Report::BadStream(7), "0507000000"),
        (Report::BadState(0x0102_0304), "0604030201"),
    ] {
        check_golden(&report.emit(), golden);
        assert_eq!(Report::parse(&report.emit()), Some(report));
    }
    assert_eq!(Report::parse(&[0; 5]), None);
    assert_eq!(Report::parse(&[7, 0, 0, 0, 0]), None);
}

#[test]
fn pages_are_counted_through_ram_and_disk() {
    let space = Space::of_mib(3074, 3);
    let mib = |count: u64| (count << 20) / PAGE_SIZE;
    for (page, address) in [
        (0, 0),
        (mib(3072) - 1, RAM_LOW_END - PAGE_SIZE),
        (mib(3072), RAM_HIGH_START),
        (mib(3074) - 1, RAM_HIGH_START + (2 << 20) - PAGE_SIZE),
        (mib(3074), DISK_START),
        (mib(3077) - 1, DISK_START + (3 << 20) - PAGE_SIZE),
    ] {
        assert_eq!((space.address(page), space.page(address)), (address, page));
        assert!(space.holds(address, PAGE_SIZE));
    }
    assert_eq!((space.pages(), space.bitmap_size()), (mib(3077), mib(3077) / 8));
    for (address, size) in [
        (RAM_LOW_END, 1),
        (RAM_LOW_END - 1, 2),
        (RAM_HIGH_START + (2 << 20), 1),
        (DISK_START - 1, 1),
        (DISK_START + (3 << 20) - 1, 2),
        (DISK_START, u64::MAX),
        (u64::MAX, 1),
    ] {
        assert!(!space.holds(address, size), "{address:#x} {size}");
    }
    assert!(!Space::of_mib(64, 0).holds(DISK_START, 1));
}
