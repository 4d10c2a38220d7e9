//! `onde broker`: becomes the owner's `broker`, which knows its own words.

use anyhow::{Context, Result};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

pub fn run(args: &[OsString]) -> Result<ExitCode> {
    let program = onde_lab::programs::find("broker")?;
    let error = Command::new(&program).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
