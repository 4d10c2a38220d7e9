//! `cargo xtask test`: everything that has to hold before a change lands.
//! `.ci/run` calls exactly this.

use anyhow::Result;

use crate::step::{cargo, root, step};
use crate::{build, fuzz, setup, tcb};

/// Runs all checks; stops at the first that fails.
pub fn run() -> Result<()> {
    step("setup", setup::run)?;
    step("format", || cargo(root(), &["fmt", "--all", "--check"]))?;
    step("lint", || {
        cargo(root(), &["clippy", "--workspace", "--all-targets", "--release", "--", "-Dwarnings"])
    })?;
    step("trusted code", tcb::run)?;
    build::run()?;
    let bare_metal = root().join("mstrap");
    step("format, bare metal", || cargo(&bare_metal, &["fmt", "--check"]))?;
    step("lint, bare metal", || cargo(&bare_metal, &["clippy", "--release", "--", "-Dwarnings"]))?;
    step("tests, bare metal", || cargo(&bare_metal, &["test", "--release", "--lib"]))?;
    // Long enough to show that they run and that no input of the first thousands kills a parser.
    step("fuzz targets", || fuzz::run(None, 1))?;
    // Tests of the lab are among these; each has a lab of its own, or waits for its turn.
    step("tests", || cargo(root(), &["test", "--release", "--workspace", "--all-targets"]))
}
