//! The test of `faults.rs` over PostgreSQL.

#[path = "faults.rs"]
mod faults;

fn main() {
    faults::main();
}
