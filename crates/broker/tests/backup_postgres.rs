//! The tests of `backup.rs` over PostgreSQL.

#[path = "backup.rs"]
mod backup;
