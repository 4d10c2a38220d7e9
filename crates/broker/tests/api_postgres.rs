//! The suite of `api.rs` over PostgreSQL.

#[path = "api.rs"]
mod api;
