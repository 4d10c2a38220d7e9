//! Layouts of tiny made-up kernels, byte for byte by their digests, and of images that are none.

use super::*;
use onde_wire::machine::Space;

const MIB: u64 = 1 << 20;

/// An ELF file with one segment of 8 KiB at 16 MiB, and a PVH note where asked for.
fn elf(pvh: Option<u32>) -> Vec<u8> {
    let mut file = vec![0; 0x3000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(18, &62u16.to_le_bytes());
    put(24, &0x100_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    // Type and flags, offset, virtual and physical address, size in the file and in memory.
    put(64, [1u64, 0x1000, 0, 0x100_0010, 0x1FF0, 0x5000].map(u64::to_le_bytes).as_flattened());
    put(120, [4u64, 0x200, 0, 0, 20, 20].map(u64::to_le_bytes).as_flattened());
    if let Some(entry) = pvh {
        put(
            0x200,
            [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry].map(u32::to_le_bytes).as_flattened(),
        );
    }
    put(0x1000, &[0x90; 0x1FF0]);
    file
}

/// A bzImage with one setup sector whose payload is `payload`.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]);
    put(0x201, &[0x6A]);
    put(0x202, b"HdrS");
    put(0x206, &0x20Fu16.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x248, [16u32, payload.len() as u32].map(u32::to_le_bytes).as_flattened());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    [&file[..], &[0x55; 16], payload].concat()
}

/// The legacy LZ4 frame that a kernel's build makes of `plain`.
fn lz4(plain: &[u8]) -> Vec<u8> {
    let block = lz4_flex::block::compress(plain);
    let sizes = [block.len(), plain.len()].map(|size| (size as u32).to_le_bytes());
    [&[0x02, 0x21, 0x4C, 0x18], &sizes[0], &block[..], &sizes[1]].concat()
}

fn digest(layout: &Layout) -> String {
    let bytes: Vec<u8> = layout
        .pieces
        .iter()
        .flat_map(|piece| [&piece.address.to_le_bytes(), &piece.bytes[..]].concat())
        .chain(layout.start.emit())
        .collect();
    onde_wire::key::sha256(&bytes)[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check(kernel: &[u8], mem_mib: u64, places: &[u64], golden: &str) {
    let layout = cold(kernel, &[3; 5000], "console=ttyS0", mem_mib * MIB).unwrap();
    let got: Vec<u64> = layout.pieces.iter().map(|piece| piece.address).collect();
    assert_eq!(got, places);
    let whole = |piece: &Piece| (piece.bytes.len() as u64).is_multiple_of(PAGE_SIZE);
    assert!(layout.pieces.iter().all(whole));
    assert_eq!(digest(&layout), golden);
}

#[test]
fn lays_out_each_kind_of_kernel() {
    let pvh = [START_INFO, CMDLINE, 0x100_0000, 64 * MIB - 0x2000];
    check(&elf(Some(0x100_0040)), 64, &pvh, "f8bbec2798c318b5");
    check(&bzimage(&lz4(&elf(Some(0x100_0040)))), 64, &pvh, "f8bbec2798c318b5");
    let linux64 = [START_INFO, PAGE_TABLES, CMDLINE, 0x100_0000, 0x8000_0000 - 0x2000];
    check(&elf(None), 4096, &linux64, "5f5d418702ad3867");
    check(&bzimage(b"packed in some other way"), 4096, &linux64, "d174c9ec599d7e05");
}

#[test]
fn tells_of_ram_on_both_sides_of_the_hole_and_never_of_the_acpi_area() {
    let map =
        |mem_mib| Boot { initrd_address: 0, initrd_size: 0, mem_bytes: mem_mib * MIB }.memory_map();
    for mem_mib in [64, 3072, 3073, 65536] {
        let ram: Vec<_> = map(mem_mib).into_iter().filter(|range| range.2 == E820_RAM).collect();
        let below_1_mib = KERNEL_START_MIN - CONVENTIONAL_END;
        assert_eq!(ram.iter().map(|range| range.1).sum::<u64>(), mem_mib * MIB - below_1_mib);
        for (address, size, _) in ram {
            assert!(Space { mem_bytes: mem_mib * MIB, disk_bytes: 0 }.holds(address, size));
            assert!(address + size <= ACPI_START || address >= onde_wire::machine::ACPI_END);
        }
    }
}

#[test]
fn refuses_what_cannot_boot_and_says_why() {
    let refuse = |kernel: &[u8], initrd: &[u8], mem_mib: u64| {
        cold(kernel, initrd, "", mem_mib * MIB).unwrap_err().to_string()
    };
    let no_kernel = "the image is no kernel: neither an x86-64 ELF file nor a bzImage";
    assert_eq!(refuse(b"#!/bin/sh\n", &[], 64), no_kernel);
    assert_eq!(refuse(&[], &[], 64), no_kernel);
    let damaged = "the image is damaged or no Linux kernel: its ELF headers";
    assert_eq!(refuse(&elf(None)[..0x1800], &[], 64), damaged);
    let mut low = elf(Some(1));
    low[64 + 24..64 + 32].copy_from_slice(&0x8000u64.to_le_bytes());
    let text = "the kernel is linked to 0x8000, where a VM has no RAM for it";
    assert_eq!(refuse(&low, &[], 64), text);
    let text = "kernel and initramfs need 67 MiB of memory, the VM has 64";
    assert_eq!(refuse(&elf(None), &vec![1; 50 << 20], 64), text);
    let cmdline = "x".repeat(CMDLINE_SIZE_MAX + 1);
    assert_eq!(
        cold(&elf(None), &[], &cmdline, 64 * MIB),
        Err(LayoutError::Cmdline { size: CMDLINE_SIZE_MAX + 1 })
    );
}

#[test]
fn no_prefix_of_a_kernel_makes_it_panic() {
    for image in [elf(Some(0x100_0040)), elf(None), bzimage(&lz4(&elf(None)))] {
        for size in (0..image.len()).step_by(7) {
            let _ = cold(&image[..size], &[], "", 64 * MIB);
        }
    }
}
