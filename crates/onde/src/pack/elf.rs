//! What a program's ELF file says about how it is started: its machine, its loader and the libraries it
//! names (System V ABI, chapters 4 and 5). Reads only headers and the dynamic section; every
//! offset is checked, since the file may be anything.

use std::fmt;

/// Most program headers; the format's own limit is in practice about 20.
const HEADERS_MAX: usize = 256;
/// Most entries of a dynamic section; the largest programs have a few hundred.
const DYNAMIC_MAX: usize = 8192;
/// Longest string taken from the file: paths are shorter.
const STRING_MAX: usize = 4096;

const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

/// What to know about a program or a library.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Elf {
    /// The loader, where there is one.
    pub interpreter: Option<String>,
    /// Names of the libraries it needs.
    pub needed: Vec<String>,
    /// Where its libraries are looked for first, and those of what it loads, unless `runpath` is there.
    pub rpath: Option<String>,
    /// Where its own libraries are looked for after `LD_LIBRARY_PATH`.
    pub runpath: Option<String>,
}

/// Why a file is no program for a VM.
#[derive(Debug, PartialEq, Eq)]
pub enum ElfError {
    /// It does not begin like an ELF file.
    NotElf,
    /// For other processors.
    Machine(&'static str),
    /// An object file, a core dump or damaged.
    Malformed,
}

impl fmt::Display for ElfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ElfError::NotElf => f.write_str("is no ELF file"),
            ElfError::Machine(name) => write!(f, "is for {name}, and VMs are x86-64"),
            ElfError::Malformed => f.write_str("is an ELF file but no program"),
        }
    }
}

impl std::error::Error for ElfError {}

/// A part of the file that is mapped at `address`.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

struct File<'a>(&'a [u8]);

impl<'a> File<'a> {
    fn bytes<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        self.0.get(usize::try_from(offset).ok()?..)?.first_chunk().copied()
    }

    fn u16(&self, offset: u64) -> Option<u16> {
        self.bytes(offset).map(u16::from_le_bytes)
    }

    fn u32(&self, offset: u64) -> Option<u32> {
        self.bytes(offset).map(u32::from_le_bytes)
    }

    fn u64(&self, offset: u64) -> Option<u64> {
        self.bytes(offset).map(u64::from_le_bytes)
    }

    fn string(&self, offset: u64) -> Option<String> {
        let rest = self.0.get(usize::try_from(offset).ok()?..)?;
        let size = rest.iter().take(STRING_MAX).position(|&byte| byte == 0)?;
        String::from_utf8(rest[..size].to_vec()).ok()
    }

    fn segments(&self) -> Option<Vec<Segment>> {
        let (table, size) = (self.u64(32)?, u64::from(self.u16(54)?));
        let count = usize::from(self.u16(56)?).min(HEADERS_MAX) as u64;
        let segment = |index: u64| {
            let at = table.checked_add(index * size)?;
            Some(Segment {
                kind: self.u32(at)?,
                offset: self.u64(at.checked_add(8)?)?,
                address: self.u64(at.checked_add(16)?)?,
                size: self.u64(at.checked_add(32)?)?,
            })
        };
        (0..count).map(segment).collect()
    }
}

/// Reads a program or a library for x86-64.
pub fn parse(bytes: &[u8]) -> Result<Elf, ElfError> {
    if !bytes.starts_with(b"\x7fELF") {
        return Err(ElfError::NotElf);
    }
    let file = File(bytes);
    check_machine(&file)?;
    let segments = file.segments().ok_or(ElfError::Malformed)?;
    read(&file, &segments).ok_or(ElfError::Malformed)
}

fn check_machine(file: &File<'_>) -> Result<(), ElfError> {
    let [class, order] = file.bytes(4).ok_or(ElfError::Malformed)?;
    let number = file.bytes(18).ok_or(ElfError::Malformed)?;
    let machine = if order == 2 { u16::from_be_bytes(number) } else { u16::from_le_bytes(number) };
    match (machine, class, order) {
        (EM_X86_64, 2, 1) => {}
        (EM_X86_64, ..) => return Err(ElfError::Machine("x32")),
        (3, ..) => return Err(ElfError::Machine("32-bit x86")),
        (183, ..) => return Err(ElfError::Machine("64-bit ARM")),
        (40, ..) => return Err(ElfError::Machine("32-bit ARM")),
        (243, ..) => return Err(ElfError::Machine("RISC-V")),
        (20 | 21, ..) => return Err(ElfError::Machine("PowerPC")),
        (22, ..) => return Err(ElfError::Machine("S/390")),
        _ => return Err(ElfError::Machine("another processor")),
    }
    // Executable or shared; most programs are the latter.
    match file.u16(16) {
        Some(2 | 3) => Ok(()),
        _ => Err(ElfError::Malformed),
    }
}

fn read(file: &File<'_>, segments: &[Segment]) -> Option<Elf> {
    let mut elf = Elf::default();
    if let Some(interpreter) = segments.iter().find(|segment| segment.kind == PT_INTERP) {
        elf.interpreter = Some(file.string(interpreter.offset)?);
    }
    let Some(dynamic) = segments.iter().find(|segment| segment.kind == PT_DYNAMIC) else {
        return Some(elf);
    };
    let entries = entries(file, dynamic)?;
    let value = |tag| entries.iter().find(|entry| entry.0 == tag).map(|entry| entry.1);
    let Some(strings) = value(DT_STRTAB) else { return Some(elf) };
    let strings = file_offset(segments, strings)?;
    let string = |offset: u64| file.string(strings.checked_add(offset)?);
    for (tag, value) in &entries {
        match *tag {
            DT_NEEDED => elf.needed.push(string(*value)?),
            DT_RPATH => elf.rpath = Some(string(*value)?),
            DT_RUNPATH => elf.runpath = Some(string(*value)?),
            _ => {}
        }
    }
    Some(elf)
}

/// Tags and values of the dynamic section, up to its end mark.
fn entries(file: &File<'_>, dynamic: &Segment) -> Option<Vec<(u64, u64)>> {
    let mut entries = Vec::new();
    for index in 0..(dynamic.size / 16).min(DYNAMIC_MAX as u64) {
        let at = dynamic.offset.checked_add(index * 16)?;
        match (file.u64(at)?, file.u64(at + 8)?) {
            (0, _) => break,
            entry => entries.push(entry),
        }
    }
    Some(entries)
}

/// Where in the file the byte is that will be at `address`.
fn file_offset(segments: &[Segment], address: u64) -> Option<u64> {
    segments.iter().filter(|segment| segment.kind == PT_LOAD).find_map(|segment| {
        let inside = address.checked_sub(segment.address)?;
        (inside < segment.size).then(|| segment.offset.checked_add(inside))?
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The first 64 bytes of a program for some machine.
    pub fn header(machine: u16, class: u8) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..7].copy_from_slice(&[0x7F, b'E', b'L', b'F', class, 1, 1]);
        elf[16] = 2;
        elf[18..20].copy_from_slice(&machine.to_le_bytes());
        elf[54] = 56;
        elf
    }

    #[test]
    fn machines_have_names() {
        let check = |machine, class, expect| {
            assert_eq!(parse(&header(machine, class)), expect, "{machine} {class}");
        };
        check(62, 2, Ok(Elf::default()));
        check(183, 2, Err(ElfError::Machine("64-bit ARM")));
        check(3, 1, Err(ElfError::Machine("32-bit x86")));
        check(62, 1, Err(ElfError::Machine("x32")));
        check(999, 2, Err(ElfError::Machine("another processor")));
        assert_eq!(parse(b"#!/bin/sh"), Err(ElfError::NotElf));
        assert_eq!(parse(b"\x7fELF"), Err(ElfError::Malformed));
    }

    #[test]
    fn a_real_program_names_its_loader_and_libraries() {
        let elf = parse(&std::fs::read("/bin/ls").unwrap()).unwrap();
        assert_eq!(elf.interpreter.as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert!(elf.needed.iter().any(|name| name == "libc.so.6"), "{elf:?}");
    }

    #[test]
    fn damaged_files_are_refused_and_never_panic() {
        let whole = std::fs::read("/bin/true").unwrap();
        for cut in (0..whole.len().min(4096)).chain([whole.len() / 2]) {
            let _ = parse(&whole[..cut]);
        }
        for at in 0..1024 {
            let mut wild = whole.clone();
            wild[at] ^= 0xFF;
            let _ = parse(&wild);
        }
    }
}
