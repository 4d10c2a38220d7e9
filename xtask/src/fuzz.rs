//! `cargo xtask fuzz`: attacks every parser of bytes from outside with libFuzzer, on the stable toolchain. The
//! targets are `fuzz/fuzz_targets`; what they found stays in `fuzz/corpus` for the next time.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use onde_lab::progress::Step;

use crate::step::{TARGET, cargo_with, root, step};

/// What `cargo fuzz` gives the compiler: counters that show the fuzzer where its input led. They take the place
/// of the workspace's flags, as libFuzzer does not run in a static program.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";

/// Bytes of input: four times the largest packet, and enough for every message of the channel's heads.
const INPUT_SIZE_MAX: &str = "-max_len=4096";
/// Lines of a crash that are shown.
const CRASH_LINES: usize = 16;

/// Builds the targets and runs `target`, or each one after another, for so many seconds.
pub fn run(target: Option<&str>, seconds: u64) -> Result<()> {
    let mut targets = targets()?;
    if let Some(target) = target {
        targets.retain(|name| name == target);
        ensure!(!targets.is_empty(), "no target `{target}`\nhint: ls fuzz/fuzz_targets");
    }
    let package = root().join("fuzz");
    step("build the fuzz targets", || {
        cargo_with(&package, &["build", "--release"], &[("RUSTFLAGS", RUSTFLAGS)])
    })?;
    let crashed: Vec<_> = targets
        .iter()
        .filter_map(|name| attack(name, seconds).err())
        .map(|e| e.to_string())
        .collect();
    ensure!(crashed.is_empty(), "{}", crashed.join("\n"));
    Ok(())
}

/// Names of the targets.
fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root().join("fuzz/fuzz_targets")).context("no fuzz targets")? {
        let file = entry?.path();
        names.extend(file.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Runs one target; an error says where the input lies that it did not survive.
fn attack(name: &str, seconds: u64) -> Result<()> {
    let (corpus, artifacts) = (format!("fuzz/corpus/{name}"), format!("fuzz/artifacts/{name}/"));
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(root().join(folder))?;
    }
    let program = format!("fuzz/target/{TARGET}/release/{name}");
    let progress = Step::new(&format!("fuzz {name}, {seconds} s"));
    let done = Command::new(Path::new(".").join(&program))
        .arg(format!("-max_total_time={seconds}"))
        .args([INPUT_SIZE_MAX, "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={artifacts}"))
        .arg(&corpus)
        .current_dir(root())
        // Running the input again, as the hint says, shows it.
        .env("RUST_BACKTRACE", "0")
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let told = String::from_utf8_lossy(&done.stderr);
    if done.status.success() {
        let runs =
            told.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        progress.done(&format!("fuzz {name}: {} inputs survived", runs.unwrap_or("?").trim()));
        return Ok(());
    }
    progress.done(&format!("fuzz {name}: FAILED"));
    let lines: Vec<_> = told.lines().collect();
    lines[lines.len().saturating_sub(CRASH_LINES)..].iter().for_each(|line| eprintln!("  {line}"));
    let input = told.lines().find_map(|line| line.split_once("Test unit written to "));
    match input {
        Some((_, file)) => bail!("{name} does not survive {file}\nhint: {program} {file}"),
        None => bail!("{name}: {}", done.status),
    }
}
