//! Running other programs, a step at a time, and saying so. Used by all
//! commands of `xtask`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Where every program is built for, and so where cargo puts it.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// The folder of finished programs.
pub fn release_dir() -> PathBuf {
    root().join("target").join(TARGET).join("release")
}

/// Runs `work` under a header, and says how long it took.
pub fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("==> {name}");
    let started = Instant::now();
    work().with_context(|| format!("{name} failed"))?;
    eprintln!("<== {name}: {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Cargo, in `dir` with `args`, as if called from a fresh shell: what this cargo run put into the
/// environment would override the folder's own configuration.
pub fn cargo(dir: &Path, args: &[&str]) -> Result<()> {
    cargo_with(dir, args, &[])
}

/// [`cargo`] with more in its environment.
pub fn cargo_with(dir: &Path, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(args).current_dir(dir);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let ours = text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_");
        if ours || matches!(&*text, "RUSTFLAGS" | "CARGO_ENCODED_RUSTFLAGS" | "CARGO_BUILD_TARGET")
        {
            cargo.env_remove(name);
        }
    }
    cargo.envs(env.iter().copied());
    show(&mut cargo)
}

/// Runs `command` with its output shown; an error where it fails.
pub fn show(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", line(command)))?;
    if !status.success() {
        bail!("{}: {status}", line(command));
    }
    Ok(())
}

/// Runs `command` and returns what it printed; an error where it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let done = command.output().with_context(|| format!("cannot run {}", line(command)))?;
    if !done.status.success() {
        let complaint = String::from_utf8_lossy(&done.stderr);
        bail!("{}: {}", line(command), complaint.trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
