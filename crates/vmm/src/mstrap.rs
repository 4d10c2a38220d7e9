//! Puts mstrap into the BOOT window: a bounded reader of our own static ELF64 file, and the page
//! tables and segment descriptors it starts with. Called once, before the first vCPU runs.
//! mstrap is part of the node image, so a malformed file is our bug, not a guest's.

use onde_wire::machine::{
    BOOT_START, BOOT_TABLES_SIZE, LOADER_START, MSTRAP_START, RAM_HIGH_START, Space,
};
use vm_memory::{Bytes, GuestAddress};

use crate::fault::{Context, Fault, Part};
use crate::memory::View;

/// Largest mstrap file that is read: its window in BOOT, with room for section headers.
pub const IMAGE_SIZE_MAX: u64 = 4 << 20;

/// Segment descriptors at the start of BOOT: null, 64-bit code, data.
pub const GDT: [u64; 3] = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
/// Guest-physical address of [`GDT`].
pub const GDT_START: u64 = BOOT_START;
/// Guest-physical address of the root of the page tables.
pub const PAGE_TABLE_START: u64 = BOOT_START + 0x1000;

const GIB: u64 = 1 << 30;
/// Present, writable.
const TABLE: u64 = 0b11;
/// Present, writable, a 2 MiB page.
const HUGE: u64 = TABLE | 1 << 7;

/// Copies the ELF image's segments to where it is linked and returns its entry point.
pub fn load(image: &[u8], memory: &View) -> Result<u64, Fault> {
    let bad = || Fault::new(Part::Mstrap, "mstrap image is no ELF file for the BOOT window");
    let (entry, segments) = parse(image).ok_or_else(bad)?;
    for (address, bytes) in segments {
        memory.write_slice(bytes, GuestAddress(address)).fault(Part::Mstrap, "write mstrap")?;
    }
    Ok(entry)
}

/// Entry point, and segments with their addresses.
type Parsed<'a> = (u64, Vec<(u64, &'a [u8])>);

/// Reads the image; `None` unless all of it lies in mstrap's window.
fn parse(image: &[u8]) -> Option<Parsed<'_>> {
    let word = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?));
    // ELF, 64 bits, little endian, version 1; a static executable for x86-64.
    if image.get(..7)? != b"\x7fELF\x02\x01\x01" || half(16)? != 2 || half(18)? != 62 {
        return None;
    }
    let (entry, table, size, count) = (word(24)?, word(32)? as usize, half(54)?, half(56)?);
    let mut segments = Vec::new();
    for index in 0..usize::from(count) {
        let header = table.checked_add(index * usize::from(size))?;
        // PT_LOAD.
        if image.get(header..header.checked_add(56)?)?[..4] != [1, 0, 0, 0] {
            continue;
        }
        let (offset, address) = (word(header + 8)?, word(header + 24)?);
        let (file_size, mem_size) = (word(header + 32)?, word(header + 40)?);
        let end = address.checked_add(mem_size.max(file_size))?;
        if address < MSTRAP_START || end > LOADER_START {
            return None;
        }
        let range = offset as usize..offset.checked_add(file_size)? as usize;
        segments.push((address, image.get(range)?));
    }
    (MSTRAP_START..LOADER_START).contains(&entry).then_some((entry, segments))
}

/// Writes the GDT and an identity map of the low 4 GiB, all RAM and the disk, in pages of 2 MiB.
pub fn write_tables(memory: &View, space: &Space) -> Result<(), Fault> {
    let pointers = PAGE_TABLE_START + 0x1000;
    let first = pointers + 0x1000;
    let low = (0, RAM_HIGH_START);
    let [_, high, disk] = space.pieces();
    let gibs = [low, high, disk].into_iter().flat_map(|(start, size)| {
        let first = start / GIB;
        first..first + size.div_ceil(GIB)
    });
    for (index, descriptor) in GDT.iter().enumerate() {
        write(memory, GDT_START + 8 * index as u64, *descriptor)?;
    }
    write(memory, PAGE_TABLE_START, pointers | TABLE)?;
    for (index, gib) in gibs.enumerate() {
        let directory = first + index as u64 * 0x1000;
        assert!(directory + 0x1000 <= BOOT_START + BOOT_TABLES_SIZE && gib < 512);
        write(memory, pointers + 8 * gib, directory | TABLE)?;
        let pages: Vec<u8> = (0..512u64)
            .flat_map(|page| ((gib * GIB + (page << 21)) | HUGE).to_le_bytes())
            .collect();
        memory.write_slice(&pages, GuestAddress(directory)).fault(Part::Mstrap, "page tables")?;
    }
    Ok(())
}

fn write(memory: &View, address: u64, value: u64) -> Result<(), Fault> {
    memory.write_obj(value, GuestAddress(address)).fault(Part::Mstrap, "page tables")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use onde_wire::machine::DISK_START;

    /// A one-segment ELF file: `address`, 4 bytes of code.
    fn elf(address: u64, entry: u64, mem_size: u64) -> Vec<u8> {
        let mut image = vec![0u8; 124];
        image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        image[16] = 2;
        image[18] = 62;
        image[24..32].copy_from_slice(&entry.to_le_bytes());
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64] = 1;
        image[72] = 120;
        image[88..96].copy_from_slice(&address.to_le_bytes());
        image[96] = 4;
        image[104..112].copy_from_slice(&mem_size.to_le_bytes());
        image[120..].copy_from_slice(b"code");
        image
    }

    fn check(image: &[u8], expect: Option<u64>) {
        let memory = Memory::new(&Space::of_mib(64, 0), None).unwrap();
        assert_eq!(load(image, &memory.ram_and_boot).ok(), expect);
    }

    #[test]
    fn only_mstraps_own_window_is_loaded() {
        let good = elf(MSTRAP_START, MSTRAP_START, 4096);
        check(&good, Some(MSTRAP_START));
        check(&good[..122], None);
        check(b"\x7fELF", None);
        check(&elf(0x10_0000, MSTRAP_START, 4), None);
        check(&elf(MSTRAP_START, 0x10_0000, 4), None);
        check(&elf(MSTRAP_START, MSTRAP_START, 4 << 20), None);
        check(&elf(u64::MAX, MSTRAP_START, 4), None);
    }

    #[test]
    fn tables_map_all_ram_and_disk_onto_itself() {
        let memory = Memory::new(&Space::of_mib(5 << 10, 0), None).unwrap();
        write_tables(&memory.ram_and_boot, &Space::of_mib(5 << 10, 2 << 10)).unwrap();
        let read = |at: u64| -> u64 { memory.ram_and_boot.read_obj(GuestAddress(at)).unwrap() };
        for address in
            [0, 0xC010_0000, 0x1_0000_0000, 0x1_7FE0_0000u64, DISK_START, DISK_START + (1 << 30)]
        {
            let pointers = read(PAGE_TABLE_START) & !0xFFF;
            let directory = read(pointers + 8 * (address >> 30)) & !0xFFF;
            let page = read(directory + 8 * ((address >> 21) & 511));
            assert_eq!(page, (address & !0x1F_FFFF) | HUGE);
        }
    }
}
