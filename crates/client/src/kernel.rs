//! Kernel images, read on the customer's side and never by a node: an ELF file with or without a PVH note, or
//! a bzImage. `layout` calls this. What it gives is only where bytes go and where to enter; every offset
//! that an image states is checked against the image.

use onde_wire::bytes::Reader;

/// Why an image cannot be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// Neither an ELF file nor a bzImage.
    #[error("is no kernel: neither an x86-64 ELF file nor a bzImage")]
    NoKernel,
    /// It starts like a kernel; this part of it makes no sense.
    #[error("is damaged or no Linux kernel: {0}")]
    Damaged(&'static str),
}

/// Bytes of an image that go to one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Guest-physical address.
    pub address: u64,
    /// The bytes.
    pub bytes: &'a [u8],
    /// Bytes of memory it takes; zeros behind `bytes`.
    pub mem_size: u64,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry<'a> {
    /// By its PVH note (Xen's `include/public/arch-x86/hvm/start_info.h`): 32-bit, no paging.
    Pvh(u32),
    /// By Linux' 64-bit boot protocol, with the setup header of its bzImage where there is one.
    Linux64 {
        /// Physical address of the first instruction.
        entry: u64,
        /// Bytes of the image from 0x1F1 on.
        setup_header: &'a [u8],
    },
}

/// A kernel image with its meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel<'a> {
    /// What goes where.
    pub segments: Vec<Segment<'a>>,
    /// How it is entered.
    pub entry: Entry<'a>,
}

/// Most program headers of an ELF file; Linux has five.
const HEADERS_MAX: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Type of the note "Xen" that carries the PVH entry.
const NOTE_PVH: u32 = 18;
/// Offset of the 64-bit entry in a bzImage's protected-mode code (Documentation/arch/x86/boot.rst).
const ENTRY_64: u64 = 0x200;
/// Where the setup header starts in a bzImage and in boot_params.
pub const SETUP_HEADER: usize = 0x1F1;
/// Magic of LZ4's legacy frames, which kernels use: blocks of at most 8 MiB, each behind its size.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4C, 0x18];
const LZ4_BLOCK_MAX: usize = 8 << 20;
/// Debian's kernel unpacks to 51 MiB.
const UNPACKED_SIZE_MAX: usize = 256 << 20;

/// The ELF file inside a bzImage, where it is packed with LZ4 as Debian's is. Entered by PVH, it spares
/// the guest the unpacking. Others (gzip, zstd, xz) unpack themselves in the guest: [`parse`] takes them.
pub fn unpack(image: &[u8]) -> Result<Option<Vec<u8>>, KernelError> {
    if !is_bzimage(image) {
        return Ok(None);
    }
    let damaged = KernelError::Damaged("its payload");
    let code = protected_mode_code(image)?;
    let (offset, size) = (word(image, 0x248)?, word(image, 0x24C)?);
    let payload = code.get(offset..).and_then(|rest| rest.get(..size)).ok_or(damaged)?;
    let Some(mut rest) = payload.strip_prefix(&LZ4_LEGACY) else { return Ok(None) };
    let mut unpacked = Vec::new();
    // The last word is the unpacked size, put there by the kernel's build.
    while rest.len() > 4 {
        let size = word(rest, 0)?;
        let block = rest.get(4..).and_then(|rest| rest.get(..size)).ok_or(damaged)?;
        let plain = lz4_flex::block::decompress(block, LZ4_BLOCK_MAX).map_err(|_| damaged)?;
        unpacked.extend(plain);
        if unpacked.len() > UNPACKED_SIZE_MAX {
            return Err(damaged);
        }
        rest = &rest[4 + size..];
    }
    Ok(Some(unpacked))
}

/// Reads an image that need not be unpacked first.
pub fn parse(image: &[u8]) -> Result<Kernel<'_>, KernelError> {
    match image {
        _ if image.starts_with(b"\x7fELF") => elf(image),
        _ if is_bzimage(image) => bzimage(image),
        _ => Err(KernelError::NoKernel),
    }
}

fn is_bzimage(image: &[u8]) -> bool {
    image.get(0x202..0x206) == Some(b"HdrS")
}

fn word(bytes: &[u8], at: usize) -> Result<usize, KernelError> {
    let word = bytes.get(at..).and_then(|rest| Reader::new(rest).u32());
    word.map(|word| word as usize).ok_or(KernelError::Damaged("cut short"))
}

/// What lies behind a bzImage's boot sector and real-mode code.
fn protected_mode_code(image: &[u8]) -> Result<&[u8], KernelError> {
    // Zero sectors mean four, for the sake of boot loaders of 1995.
    let sectors = match image[SETUP_HEADER] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    image.get((sectors + 1) * 512..).ok_or(KernelError::Damaged("cut short"))
}

fn bzimage(image: &[u8]) -> Result<Kernel<'_>, KernelError> {
    let code = protected_mode_code(image)?;
    let has_entry_64 = word(image, 0x206)? & 0xFFFF >= 0x20C && word(image, 0x236)? & 1 == 1;
    if !has_entry_64 {
        return Err(KernelError::Damaged("no 64-bit entry (older than Linux 3.8, or 32-bit)"));
    }
    // `word` found bytes up to 0x23A, the sector and code up to 0x400.
    let mut r = Reader::new(&image[0x258..]);
    let (Some(address), Some(init_size)) = (r.u64(), r.u32()) else {
        return Err(KernelError::Damaged("cut short"));
    };
    let header_end = 0x202 + usize::from(image[0x201]);
    let setup_header = image.get(SETUP_HEADER..header_end);
    Ok(Kernel {
        segments: vec![Segment {
            address,
            bytes: code,
            mem_size: u64::from(init_size).max(code.len() as u64),
        }],
        entry: Entry::Linux64 {
            entry: address.saturating_add(ENTRY_64),
            setup_header: setup_header.ok_or(KernelError::Damaged("its setup header"))?,
        },
    })
}

/// One program header.
struct Header {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    mem_size: u64,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        let (kind, _flags, offset, _virtual) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?);
        Some(Self { kind, offset, address: r.u64()?, file_size: r.u64()?, mem_size: r.u64()? })
    }

    fn bytes<'a>(&self, image: &'a [u8]) -> Option<&'a [u8]> {
        image
            .get(usize::try_from(self.offset).ok()?..)?
            .get(..usize::try_from(self.file_size).ok()?)
    }
}

fn elf(image: &[u8]) -> Result<Kernel<'_>, KernelError> {
    let damaged = KernelError::Damaged("its ELF headers");
    // 64-bit, little endian, and machine 62: x86-64.
    let is_x86_64 = image.get(4..6) == Some(&[2, 1]) && image.get(18..20) == Some(&[62, 0]);
    if !is_x86_64 {
        return Err(KernelError::NoKernel);
    }
    let entry = Reader::new(&image[20..]).take(12).map(|bytes| Reader::new(&bytes[4..]).u64());
    let entry = entry.flatten().ok_or(damaged)?;
    let headers = headers(image).ok_or(damaged)?;
    let mut segments = Vec::new();
    for header in headers.iter().filter(|header| header.kind == PT_LOAD && header.mem_size > 0) {
        let bytes = header.bytes(image).ok_or(damaged)?;
        let is_sane = header.file_size <= header.mem_size
            && header.address.checked_add(header.mem_size).is_some();
        if !is_sane {
            return Err(damaged);
        }
        segments.push(Segment { address: header.address, bytes, mem_size: header.mem_size });
    }
    let mut notes = headers.iter().filter(|header| header.kind == PT_NOTE);
    let pvh = notes.find_map(|header| pvh_note(header.bytes(image)?));
    let entry = pvh.map_or(Entry::Linux64 { entry, setup_header: &[] }, Entry::Pvh);
    Ok(Kernel { segments, entry })
}

fn headers(image: &[u8]) -> Option<Vec<Header>> {
    let mut r = Reader::new(image.get(32..)?);
    let offset = usize::try_from(r.u64()?).ok()?;
    r.take(14)?;
    let (size, count) = (usize::from(r.u16()?), r.u16()?);
    if count > HEADERS_MAX || size < 56 {
        return None;
    }
    let table = image.get(offset..)?.get(..size * usize::from(count))?;
    table.chunks_exact(size).map(Header::parse).collect()
}

/// The entry in a segment of notes, where there is one.
fn pvh_note(notes: &[u8]) -> Option<u32> {
    let mut r = Reader::new(notes);
    // Ends with the segment: each turn takes at least 12 bytes.
    loop {
        let (name_size, size, kind) = (r.u32()? as usize, r.u32()? as usize, r.u32()?);
        let name = r.take(name_size.checked_next_multiple_of(4)?)?;
        let value = r.take(size.checked_next_multiple_of(4)?)?;
        if kind == NOTE_PVH && name.starts_with(b"Xen\0") {
            return Reader::new(value).u32();
        }
    }
}
