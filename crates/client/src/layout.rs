//! A cold Linux laid out in memory: kernel, initramfs, command line and what tells the kernel where they are.
//! `stream` sends the pieces, a node's `vmm` only enters the machine where [`ColdStart`] says. Follows Xen's
//! `start_info.h` (PVH) and Linux' Documentation/arch/x86/boot.rst and zero-page.rst.

use crate::kernel::{self, Entry, Kernel, KernelError, SETUP_HEADER, Segment};
use onde_wire::machine::{ACPI_START, ColdStart, PAGE_SIZE, RAM_LOW_END, Space};

/// hvm_start_info, or boot_params.
const START_INFO: u64 = 0x7000;
/// PVH's module list and memory map, in the page of `hvm_start_info`.
const MODULES: u64 = START_INFO + 0x100;
const MEMORY_MAP: u64 = START_INFO + 0x200;
/// Page tables for the 64-bit protocol: a root, a table of 1 GiB entries, four of 2 MiB entries.
const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x1_0000;
/// Linux' own limit (COMMAND_LINE_SIZE) without its last zero.
pub const CMDLINE_SIZE_MAX: usize = 2047;
/// The kernel takes an initramfs that ends above this as not mapped (initrd_addr_max).
const INITRD_END_MAX: u64 = 0x8000_0000;
/// Conventional memory ends here; up to 1 MiB nothing is told to be RAM, which keeps kernels off the ACPI
/// tables at [`ACPI_START`].
const CONVENTIONAL_END: u64 = 0xA_0000;
const KERNEL_START_MIN: u64 = 0x10_0000;

const PVH_MAGIC: u32 = 0x336E_C578;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why a machine cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The kernel cannot be booted.
    #[error("the image {0}")]
    // No `#[from]`: the text has its words already, and a cause would say them twice.
    Kernel(KernelError),
    /// Kernel and initramfs do not fit.
    #[error("kernel and initramfs need {need_mib} MiB of memory, the VM has {mem_mib}")]
    Memory {
        /// What they need, MiB.
        need_mib: u64,
        /// What there is, MiB.
        mem_mib: u64,
    },
    /// The kernel wants to be where there is no RAM.
    #[error("the kernel is linked to {address:#x}, where a VM has no RAM for it")]
    Address {
        /// Where.
        address: u64,
    },
    /// The command line is longer than a kernel takes.
    #[error("the kernel's command line has {size} bytes, more than {CMDLINE_SIZE_MAX}")]
    Cmdline {
        /// Its size, bytes.
        size: usize,
    },
}

impl From<KernelError> for LayoutError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

/// Memory that is not all zero: whole pages from a page's start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Guest-physical address.
    pub address: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// A machine ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Its memory, by address; what is not here is zero.
    pub pieces: Vec<Piece>,
    /// How it starts.
    pub start: ColdStart,
}

impl Layout {
    /// Bytes of memory in all pieces.
    pub fn size(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes.len() as u64).sum()
    }
}

/// Lays out `kernel` (ELF or bzImage) with its `initrd` and command line in a machine of `mem_bytes`.
pub fn cold(
    kernel: &[u8],
    initrd: &[u8],
    cmdline: &str,
    mem_bytes: u64,
) -> Result<Layout, LayoutError> {
    if cmdline.len() > CMDLINE_SIZE_MAX {
        return Err(LayoutError::Cmdline { size: cmdline.len() });
    }
    let unpacked = kernel::unpack(kernel)?;
    let kernel = kernel::parse(unpacked.as_deref().unwrap_or(kernel))?;
    let ends =
        kernel.segments.iter().map(|segment| segment.address.saturating_add(segment.mem_size));
    let kernel_end = ends.max().unwrap_or(0);
    let initrd_address = place(initrd.len() as u64, kernel_end, mem_bytes)?;
    let boot = Boot { initrd_address, initrd_size: initrd.len() as u64, mem_bytes };
    let (start, mut pieces) = match kernel.entry {
        Entry::Pvh(entry) => {
            let start = ColdStart::Pvh { entry, start_info: START_INFO as u32 };
            (start, vec![piece(START_INFO, &boot.start_info())])
        }
        Entry::Linux64 { entry, setup_header } => {
            let start = ColdStart::Linux64 { entry, boot_params: START_INFO, cr3: PAGE_TABLES };
            let params = boot.boot_params(setup_header);
            (start, vec![piece(START_INFO, &params), piece(PAGE_TABLES, &identity_map())])
        }
    };
    pieces.push(piece(CMDLINE, &[cmdline.as_bytes(), &[0]].concat()));
    pieces.push(image(&kernel)?);
    if !initrd.is_empty() {
        pieces.push(piece(initrd_address, initrd));
    }
    Ok(Layout { pieces, start })
}

/// Where the initramfs goes: as high in low RAM as kernels take it, behind the kernel.
fn place(initrd_size: u64, kernel_end: u64, mem_bytes: u64) -> Result<u64, LayoutError> {
    let room_end = mem_bytes.min(RAM_LOW_END).min(INITRD_END_MAX);
    let start = room_end.checked_sub(initrd_size).map(|start| start & !(PAGE_SIZE - 1));
    start.filter(|start| *start >= kernel_end).ok_or(LayoutError::Memory {
        need_mib: kernel_end.saturating_add(initrd_size).div_ceil(1 << 20),
        mem_mib: mem_bytes >> 20,
    })
}

fn piece(address: u64, bytes: &[u8]) -> Piece {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE as usize), 0);
    Piece { address, bytes }
}

/// The kernel's segments as one piece. [`place`] made sure that it ends in RAM.
fn image(kernel: &Kernel<'_>) -> Result<Piece, LayoutError> {
    let start = kernel.segments.iter().map(|segment| segment.address).min().unwrap_or(0);
    let end = kernel.segments.iter().map(data_end).max().unwrap_or(0);
    if start < KERNEL_START_MIN {
        return Err(LayoutError::Address { address: start });
    }
    let address = start & !(PAGE_SIZE - 1);
    let mut bytes = vec![0; (end - address).next_multiple_of(PAGE_SIZE) as usize];
    for segment in &kernel.segments {
        let offset = (segment.address - address) as usize;
        bytes[offset..offset + segment.bytes.len()].copy_from_slice(segment.bytes);
    }
    Ok(Piece { address, bytes })
}

fn data_end(segment: &Segment<'_>) -> u64 {
    segment.address + segment.bytes.len() as u64
}

/// What the kernel is told.
struct Boot {
    initrd_address: u64,
    initrd_size: u64,
    mem_bytes: u64,
}

impl Boot {
    /// Address, size and type of each range of memory.
    fn memory_map(&self) -> Vec<(u64, u64, u32)> {
        let ram = Space { mem_bytes: self.mem_bytes, disk_bytes: 0 }.ram();
        let [(_, low_end), (high_start, high_size)] = ram;
        let mut map = vec![
            (0, CONVENTIONAL_END, E820_RAM),
            (CONVENTIONAL_END, KERNEL_START_MIN - CONVENTIONAL_END, E820_RESERVED),
            (KERNEL_START_MIN, low_end - KERNEL_START_MIN, E820_RAM),
        ];
        if high_size > 0 {
            map.push((high_start, high_size, E820_RAM));
        }
        map
    }

    /// A page with hvm_start_info, the module list and the memory map.
    fn start_info(&self) -> Vec<u8> {
        let map = self.memory_map();
        let mut page = vec![0; PAGE_SIZE as usize];
        let mut put = |address: u64, value: &[u8]| put(&mut page, address - START_INFO, value);
        let modules = u32::from(self.initrd_size > 0);
        let words = [PVH_MAGIC, 1, 0, modules].map(u32::to_le_bytes);
        put(START_INFO, words.as_flattened());
        let addresses = [MODULES, CMDLINE, ACPI_START, MEMORY_MAP].map(u64::to_le_bytes);
        put(START_INFO + 16, addresses.as_flattened());
        put(START_INFO + 48, &(map.len() as u32).to_le_bytes());
        let module = [self.initrd_address, self.initrd_size, 0, 0].map(u64::to_le_bytes);
        put(MODULES, module.as_flattened());
        for ((address, size, kind), at) in map.into_iter().zip((MEMORY_MAP..).step_by(24)) {
            put(at, [address, size, kind.into()].map(u64::to_le_bytes).as_flattened());
        }
        page
    }

    /// The page of boot_params.
    fn boot_params(&self, setup_header: &[u8]) -> Vec<u8> {
        let map = self.memory_map();
        let mut page = vec![0; PAGE_SIZE as usize];
        put(&mut page, SETUP_HEADER as u64, setup_header);
        let mut put = |offset, value: &[u8]| put(&mut page, offset, value);
        put(0x070, &ACPI_START.to_le_bytes());
        put(0x1E8, &[map.len() as u8]);
        put(0x1FE, &0xAA55u16.to_le_bytes());
        put(0x202, b"HdrS");
        if setup_header.is_empty() {
            put(0x206, &0x20Cu16.to_le_bytes());
        }
        // A loader without a number of its own, and a kernel loaded at 1 MiB or above.
        put(0x210, &[0xFF, 1]);
        put(0x218, &(self.initrd_address as u32).to_le_bytes());
        put(0x21C, &(self.initrd_size as u32).to_le_bytes());
        put(0x228, &(CMDLINE as u32).to_le_bytes());
        for ((address, size, kind), at) in map.into_iter().zip((0x2D0..).step_by(20)) {
            put(at, [address, size].map(u64::to_le_bytes).as_flattened());
            put(at + 16, &kind.to_le_bytes());
        }
        page
    }
}

fn put(page: &mut [u8], offset: u64, value: &[u8]) {
    page[offset as usize..][..value.len()].copy_from_slice(value);
}

/// Page tables at [`PAGE_TABLES`] that map the first 4 GiB one to one.
fn identity_map() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let table = |index: u64| (PAGE_TABLES + index * PAGE_SIZE) | PRESENT_WRITABLE;
    let mut entries = vec![0u64; 6 * 512];
    entries[0] = table(1);
    for gib in 0..4 {
        entries[512 + gib as usize] = table(2 + gib);
    }
    for (entry, address) in entries[1024..].iter_mut().zip((0u64..).step_by(2 << 20)) {
        *entry = address | LARGE | PRESENT_WRITABLE;
    }
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests;
