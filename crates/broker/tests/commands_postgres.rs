//! The tests of `commands.rs` over PostgreSQL.

#[path = "commands.rs"]
mod commands;
