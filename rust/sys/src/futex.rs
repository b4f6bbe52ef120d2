//! Sleeping on a 32-bit value in memory, and waking who sleeps.
//!
//! Async-signal-safe: raw system calls, no allocation, no lock. It never decides anything: a wait may return early, and the
//! caller looks again.

use core::sync::atomic::{AtomicU32, Ordering};
use rustix::thread::futex;
use std::time::Duration;

/// How many threads of this process are about to sleep, or sleep, on a state word. While it is zero, ending a transient state
/// costs a load and no system call.
static WAITERS: AtomicU32 = AtomicU32::new(0);

/// Sleeps until the value is no longer `seen`; may return early. Works on memory shared between processes.
pub(crate) fn wait_shared(value: &AtomicU32, seen: u32) {
    WAITERS.fetch_add(1, Ordering::SeqCst);
    let _ = futex::wait(value, futex::Flags::empty(), seen, None);
    WAITERS.fetch_sub(1, Ordering::SeqCst);
}

/// Wakes everyone who waits for the value, if anyone of this process waits for any. The value was stored, sequentially
/// consistent, before.
#[inline]
pub(crate) fn wake_shared(value: &AtomicU32) {
    if WAITERS.load(Ordering::SeqCst) != 0 {
        let _ = futex::wake(value, futex::Flags::empty(), i32::MAX as u32);
    }
}

/// The same for waiters of other processes, of whom nothing is known here.
pub(crate) fn wake_elsewhere(value: &AtomicU32) {
    let _ = futex::wake(value, futex::Flags::empty(), i32::MAX as u32);
}

/// Sleeps until the value is no longer `seen` or the time is over; process-private.
pub(crate) fn wait(value: &AtomicU32, seen: u32, at_most: Option<Duration>) {
    let timeout = at_most.map(|time| rustix::thread::Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    });
    let _ = futex::wait(value, futex::Flags::PRIVATE, seen, timeout.as_ref());
}

/// Wakes everyone who waits for the value; process-private.
pub(crate) fn wake_all(value: &AtomicU32) {
    let _ = futex::wake(value, futex::Flags::PRIVATE, i32::MAX as u32);
}

/// In a forked child: whoever slept did so in the parent.
pub(crate) fn forget_waiters() {
    WAITERS.store(0, Ordering::SeqCst);
}
