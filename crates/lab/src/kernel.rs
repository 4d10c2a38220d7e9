//! The kernel that `cargo xtask setup` left in the cache: nodes of the lab boot
//! it, and customers pack their guests with it. Only reads the cache.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::modules::Modules;

/// Debian's kernel for virtual machines, unpacked.
#[derive(Clone, Debug)]
pub struct KernelCache {
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// The ELF file in it: entered by PVH, it boots without unpacking itself first.
    pub vmlinux: PathBuf,
    /// Tree of the kernel's `.ko` files.
    pub modules_dir: PathBuf,
    /// Its version as `uname -r` prints it.
    pub version: String,
}

/// Onde's cache folder: `$ONDE_CACHE`, else `$XDG_CACHE_HOME/onde`, else `~/.cache/onde`.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("ONDE_CACHE") {
        return Ok(dir.into());
    }
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(dir).join("onde"));
    }
    let home = std::env::var_os("HOME").context("neither ONDE_CACHE nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cache/onde"))
}

impl KernelCache {
    /// The kernel in the cache.
    pub fn find() -> Result<Self> {
        let dir = cache_dir()?.join("kernel");
        let vmlinux = dir.join("vmlinux");
        // Both are part of a folder that was renamed into place whole.
        let version = std::fs::read_to_string(dir.join("version")).unwrap_or_default();
        if version.is_empty() || !vmlinux.is_file() {
            bail!("no kernel in {}\nhint: cargo xtask setup", dir.display());
        }
        Ok(Self {
            vmlinuz: dir.join("vmlinuz"),
            vmlinux,
            modules_dir: dir.join("modules"),
            version: version.trim().to_owned(),
        })
    }

    /// Its modules, by name.
    pub fn modules(&self) -> Result<Modules> {
        Modules::scan(&self.modules_dir)
    }
}

/// Magic of LZ4's legacy frames, which kernels use: blocks of at most 8 MiB, each with its size.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4C, 0x18];
const LZ4_BLOCK_MAX: usize = 8 << 20;
/// Debian's kernel unpacks to 51 MiB.
const VMLINUX_SIZE_MAX: usize = 256 << 20;

/// The ELF file inside a bzImage that is compressed by LZ4, as Debian's is (Linux boot protocol
/// 2.08: payload_offset at 0x248, payload_length at 0x24c, counted from the protected-mode code).
pub fn unpack(bzimage: &[u8]) -> Result<Vec<u8>> {
    let u32_at = |bytes: &[u8], at: usize| -> Result<usize> {
        let word = bytes.get(at..).and_then(|rest| rest.first_chunk()).context("cut short")?;
        Ok(u32::from_le_bytes(*word) as usize)
    };
    ensure!(bzimage.get(0x202..0x206) == Some(b"HdrS"), "is no Linux kernel");
    let setup = (usize::from(bzimage[0x1F1]) + 1) * 512;
    let start = setup + u32_at(bzimage, 0x248)?;
    let end = start + u32_at(bzimage, 0x24C)?;
    let payload = bzimage.get(start..end).context("cut short")?;
    // The last word is the unpacked size, put there by the kernel's build.
    let (size_max, mut rest) = match payload.split_last_chunk() {
        Some((rest, size)) => (u32::from_le_bytes(*size) as usize, rest),
        None => bail!("has no payload"),
    };
    ensure!(rest.starts_with(&LZ4_LEGACY), "is not compressed by LZ4");
    ensure!(size_max <= VMLINUX_SIZE_MAX, "unpacks to {size_max} bytes");
    rest = &rest[LZ4_LEGACY.len()..];
    let mut unpacked = vec![0; LZ4_BLOCK_MAX];
    let mut vmlinux = Vec::with_capacity(size_max);
    while !rest.is_empty() {
        let size = u32_at(rest, 0)?;
        let block = rest.get(4..4 + size).context("cut short")?;
        let used = lz4_flex::block::decompress_into(block, &mut unpacked)?;
        vmlinux.extend_from_slice(&unpacked[..used]);
        ensure!(vmlinux.len() <= size_max, "unpacks to more than it says");
        rest = &rest[4 + size..];
    }
    ensure!(vmlinux.starts_with(b"\x7fELF"), "holds no ELF file");
    Ok(vmlinux)
}
