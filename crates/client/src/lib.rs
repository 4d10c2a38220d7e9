//! What a customer's program does with a cluster: buy, boot, send a stream, pay, stop.
//! `onde` and `agent` use it; `broker` shares the API's types.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod api;
pub mod bootstrap;
pub mod broker;
pub mod channel;
pub mod echo;
pub mod fork;
pub mod home;
pub mod job;
pub mod kernel;
pub mod layout;
pub mod migration;
pub mod mover;
pub mod node;
pub mod receipt;
pub mod session;
pub mod snapshot;
pub mod stream;
pub mod tls;
