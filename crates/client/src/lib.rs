//! What a customer's program does with a cluster: buy, boot, send a stream, pay, stop.
//! `onde` and `agent` use it; `broker` shares the API's types.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod api;
pub mod channel;
pub mod echo;
