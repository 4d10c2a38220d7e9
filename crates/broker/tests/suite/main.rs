//! What the broker's library and program do over a ledger in a file: all tests that one process can hold.

mod api;
mod backup;
mod books;
mod commands;
mod customers;
mod doors;
mod openapi;
#[path = "../stage/mod.rs"]
mod stage;
