//! The tests of `suite` over PostgreSQL, and what only a server can do to a broker.

#[path = "../suite/api.rs"]
mod api;
#[path = "../suite/backup.rs"]
mod backup;
#[path = "../suite/books.rs"]
mod books;
#[path = "../suite/commands.rs"]
mod commands;
#[path = "../suite/customers.rs"]
mod customers;
mod restarts;
#[path = "../stage/mod.rs"]
mod stage;
