//! The gate of a fork: closed, nobody begins to own a word, and nobody owns one.
//!
//! Whoever is about to claim words enters first and leaves when it owns none; `fork` closes the gate and waits until everyone
//! is out. The thread that closed it passes. Async-signal-safe, process-private, and reset in a child.

use crate::futex;
use core::sync::atomic::{AtomicU32, Ordering};

/// Who is inside.
static INSIDE: AtomicU32 = AtomicU32::new(0);
/// The thread that closed the gate; 0: open.
static CLOSED_BY: AtomicU32 = AtomicU32::new(0);

/// The calling thread's id; a system call, for the handler may use no thread-local storage.
pub(crate) fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get() as u32
}

/// The right to own words, until dropped. Its owner must never wait for a thread that may be waiting at the gate.
pub(crate) struct Pass {
    counted: bool,
}

impl Pass {
    /// Waits at the gate and enters.
    pub(crate) fn enter() -> Pass {
        loop {
            let closed_by = CLOSED_BY.load(Ordering::SeqCst);
            if closed_by != 0 {
                if closed_by == thread_id() {
                    return Pass { counted: false };
                }
                futex::wait(&CLOSED_BY, closed_by, None);
                continue;
            }
            INSIDE.fetch_add(1, Ordering::SeqCst);
            if CLOSED_BY.load(Ordering::SeqCst) == 0 {
                return Pass { counted: true };
            }
            leave();
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A word may be owned, and whoever waits for it would wait for ever.
            std::process::abort();
        }
        if self.counted {
            leave();
        }
    }
}

fn leave() {
    if INSIDE.fetch_sub(1, Ordering::SeqCst) == 1 && CLOSED_BY.load(Ordering::SeqCst) != 0 {
        futex::wake_all(&INSIDE);
    }
}

/// Closes the gate and waits until nobody owns a word. One thread at a time: the C library serialises forks, and so does this.
pub(crate) fn close() {
    let me = thread_id();
    while let Err(other) = CLOSED_BY.compare_exchange(0, me, Ordering::SeqCst, Ordering::SeqCst) {
        futex::wait(&CLOSED_BY, other, None);
    }
    loop {
        let inside = INSIDE.load(Ordering::SeqCst);
        if inside == 0 {
            return;
        }
        futex::wait(&INSIDE, inside, None);
    }
}

/// Opens the gate again.
pub(crate) fn open() {
    CLOSED_BY.store(0, Ordering::SeqCst);
    futex::wake_all(&CLOSED_BY);
}

/// In a child: nobody is inside, and nobody closed it.
pub(crate) fn reset() {
    INSIDE.store(0, Ordering::SeqCst);
    CLOSED_BY.store(0, Ordering::SeqCst);
}
