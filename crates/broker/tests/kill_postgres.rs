//! The test of `kill.rs` over PostgreSQL.

#[path = "kill.rs"]
mod kill;

fn main() {
    kill::main();
}
