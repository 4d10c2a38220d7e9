//! The kernel that `cargo xtask setup` left in the cache: nodes of the lab boot
//! it, and customers pack their guests with it. Only reads the cache.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

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
