//! Where Onde's programs are: beside the running one. Used by the lab and by
//! `xtask`; starts nothing.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The path of the program `name`: in the folder `$ONDE_LIBEXEC` if that is set and has it,
/// else beside the running executable (cargo keeps tests one folder further down).
pub fn find(name: &str) -> Result<PathBuf> {
    let running = std::env::current_exe().context("cannot tell where this program is")?;
    let beside = running.parent().unwrap_or(Path::new("/"));
    let tests = beside.parent().filter(|_| beside.ends_with("deps"));
    let libexec = std::env::var_os("ONDE_LIBEXEC").map(PathBuf::from);
    let folders = libexec.as_deref().into_iter().chain([beside]).chain(tests);
    for folder in folders {
        let program = folder.join(name);
        if program.is_file() {
            return Ok(program);
        }
    }
    bail!("no program `{name}` in {}\nhint: cargo xtask build", beside.display())
}

/// Whether a program of the host, found by `PATH`, is there.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Debian keeps `ip` in a folder that users' PATH lacks.
    let extra = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
    std::env::split_paths(&path)
        .chain(extra)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Like [`on_path`], with a hint where the program is missing.
pub fn required(name: &str) -> Result<PathBuf> {
    on_path(name).with_context(|| format!("{name} is not installed\nhint: cargo xtask setup"))
}
