//! `cargo xtask sim`: many more schedules of the simulations in `crates/lab/tests/sim` than an ordinary test run plays.

use anyhow::Result;

use crate::step::{cargo_with, root};

/// Plays schedules number 0 to `schedules`, or only the one of `seed` and prints it.
pub fn run(schedules: u64, seed: Option<u64>) -> Result<()> {
    let (name, value) = seed.map_or(("SCHEDULES", schedules), |seed| ("SEED", seed));
    let test = ["test", "--release", "-p", "onde-lab", "--test", "sim", "--", "--nocapture"];
    cargo_with(root(), &test, &[(name, &value.to_string())])
}
