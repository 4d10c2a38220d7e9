//! `cargo xtask build`: every program, static, in one folder, where the
//! programs find each other.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use onde_wire::machine::{LOADER_SIZE_MAX, LOADER_START};

use crate::step::{TARGET, cargo, release_dir, root, step};

/// Builds the workspace and the bare-metal package.
pub fn run() -> Result<()> {
    step("build the programs", || cargo(root(), &["build", "--release", "--workspace"]))?;
    step("build the bare-metal programs", bare_metal)
}

/// `mstrap` stays an ELF file, which the VMM loads; the loader becomes a flat image, which mstrap
/// puts at its place and jumps to.
fn bare_metal() -> Result<()> {
    let package = root().join("mstrap");
    if !package.join("Cargo.toml").is_file() {
        bail!("{} is missing", package.display());
    }
    cargo(&package, &["build", "--release"])?;
    let built = package.join("target").join(TARGET).join("release");
    let read = |name: &str| {
        let file = built.join(name);
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    place("mstrap", &read("mstrap")?)?;
    let loader = read("loader")?;
    place("loader", &flatten(&loader, LOADER_START).context("the loader")?)
}

/// Writes a program beside the others; what runs the old one keeps it.
fn place(name: &str, bytes: &[u8]) -> Result<()> {
    let (dir, mut new) = (release_dir(), release_dir().into_os_string());
    new.push(format!("/.{name}.new"));
    let new = Path::new(&new);
    fs::write(new, bytes)?;
    fs::rename(new, dir.join(name)).with_context(|| format!("cannot place {name}"))
}

/// The bytes that the ELF file's segments put into memory from `base` on, up to the last that is
/// not just zeroed. Its first instruction is the first of them.
fn flatten(elf: &[u8], base: u64) -> Result<Vec<u8>> {
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "is no 64-bit ELF file");
    let field = |at: usize, size: usize| -> Result<u64> {
        let bytes = elf.get(at..at + size).context("is cut short")?;
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    ensure!(field(0x18, 8)? == base, "starts at {:#x} instead of {base:#x}", field(0x18, 8)?);
    let mut image = Vec::new();
    for index in 0..field(0x38, 2)? as usize {
        // Elf64_Ehdr: e_phoff at 0x20, e_phentsize at 0x36; Elf64_Phdr: type, offset at 8,
        // physical address at 0x18, size in the file at 0x20.
        let header = field(0x20, 8)? as usize + index * field(0x36, 2)? as usize;
        let (start, size) = (field(header + 8, 8)? as usize, field(header + 0x20, 8)? as usize);
        if field(header, 4)? != 1 || size == 0 {
            continue;
        }
        let offset = field(header + 0x18, 8)?.checked_sub(base).context("lies below its base")?;
        let end = offset as usize + size;
        ensure!(end <= LOADER_SIZE_MAX as usize, "is larger than {LOADER_SIZE_MAX} bytes");
        if image.len() < end {
            image.resize(end, 0);
        }
        let bytes = elf.get(start..start + size).context("is cut short")?;
        image[offset as usize..end].copy_from_slice(bytes);
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with its entry and one segment each of (address, bytes).
    fn elf(entry: u64, segments: &[(u64, &[u8])]) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x18..0x20].copy_from_slice(&entry.to_le_bytes());
        elf[0x20] = 64;
        elf[0x36] = 56;
        elf[0x38] = segments.len() as u8;
        let mut start = 64 + 56 * segments.len() as u64;
        for (address, bytes) in segments {
            let mut header = [0; 56];
            header[0] = 1;
            header[8..16].copy_from_slice(&start.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&address.to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            elf.extend(header);
            start += bytes.len() as u64;
        }
        segments.iter().for_each(|(_, bytes)| elf.extend(*bytes));
        elf
    }

    fn check(entry: u64, segments: &[(u64, &[u8])], expect: Option<&[u8]>) {
        let file = elf(entry, segments);
        assert_eq!(flatten(&file, 0x1000).ok().as_deref(), expect);
        assert!(flatten(&file[..file.len() - 1], 0x1000).is_err());
    }

    #[test]
    fn flatten_lays_segments_where_they_run() {
        check(0x1000, &[(0x1000, b"code"), (0x1008, b"data")], Some(b"code\0\0\0\0data"));
        check(0x1001, &[(0x1000, b"code")], None);
        check(0x1000, &[(0x1000, b"code"), (0xFFF, b"below")], None);
        check(0x1000, &[(0x1000 + u64::from(LOADER_SIZE_MAX), b"beyond")], None);
    }
}
