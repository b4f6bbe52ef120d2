//! *broker* conducts: it carries words and memory between clients and `ksmrs-core`, which decides.
//!
//! `wire.rs` is what both sides speak and `runtime_dir.rs` where they meet. The broker: `serve.rs` starts it, `conduct.rs` is its
//! loop, `session.rs`, `lives.rs` and `departed.rs` are what it knows of a client, `domain.rs`, `answers.rs` and `questions.rs` stand between
//! clients and core, `frames.rs` between core and the store, `objects.rs` keeps named objects whole, `sweep.rs` keeps the store small, `cpu.rs` counts what it all takes (on both sides), `offence.rs` says why a client is dropped. It relies on `ksmrs-sys` for
//! everything that touches the kernel and trusts no client.
#![forbid(unsafe_code)]

mod answers;
mod born;
pub mod client;
mod conduct;
mod cpu;
mod departed;
mod domain;
mod frames;
mod lives;
mod objects;
mod offence;
mod process;
mod questions;
pub mod runtime_dir;
pub mod serve;
mod session;
mod sweep;
pub mod wire;

pub use ksmrs_core::METADATA_PER_PAGE;
pub use ksmrs_sys::survey;
pub use offence::Offence;
pub use serve::{BrokerError, BrokerOptions, Started, run_broker, serve_embedded, start_daemon};
