//! The test of `poll.rs` with the ledger in PostgreSQL, as DATABASE_URL says.

#[path = "poll.rs"]
mod poll;

fn main() {
    poll::main();
}
