//! The tests of `customers.rs` over PostgreSQL.

#[path = "customers.rs"]
mod customers;
