//! What a forked child does to go on as a client of its own; called by whoever knows of the fork, in the child, first thing.
//!
//! Relies on the child having one thread: nothing of ksmrs may happen between the fork and `born`. Where anything is missing the
//! child stays unregistered, which is safe; it never fails and never waits for a broker.

use super::{Client, LIFE, MAX_LIVES, in_child, lock, process, remapper};
use ksmrs_sys::{born, fork};
use std::sync::atomic::Ordering;

/// Says that children of fork() will call [`born()`]; without that a fork keeps nothing for them. For the beginning of a program, when no
/// other thread knows of ksmrs: what another one is at when the program forks is safe from here on.
pub fn expect_births() {
    born::expect();
    process();
    // Where it fails, beginning says so.
    if let Err(error) = fork::expect_children(in_child) {
        tracing::info!(%error, "a child may find locks taken");
    }
}

/// In a child of fork(), before anything else: makes its parent's private regions its own. The broker is met after a second, or at
/// the first call that needs it.
pub fn born() {
    let process = process();
    let options = (**process.options.load()).clone();
    // An embedded broker is a thread of the parent, and out of reach.
    if options.embedded || options.broker_command.is_empty() || LIFE.load(Ordering::Acquire) >= MAX_LIVES {
        return born::forget();
    }
    let Some(inheritance) = born::inherit() else { return };
    let table = inheritance.table();
    let begun = remapper::born::begin(options, &process.bequest, table, inheritance.regions().to_vec());
    let Ok((mailbox, go)) = begun.inspect_err(|error| tracing::info!(%error, "no thread for a forked child")) else {
        return;
    };
    if let Ok(era) = inheritance.begin(in_child) {
        *lock(&process.client) = Some(Box::leak(Box::new(Client { table, mailbox, era })));
        // The thread is there: it waits for this.
        let _ = go.send(());
    }
}
