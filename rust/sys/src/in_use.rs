//! Who is inside a region: a lock of readers and one writer that a forked child can begin anew.
//!
//! The scanner reads for as long as a scan takes, so that a fork finds the lock held as often as not, by a thread that the child
//! does not have. The standard library's lock would stay held there; this one is a number, and `reset` makes it 0. Whoever holds
//! it may wait at the gate, so nobody takes it behind the gate. Never used in a signal handler.

use crate::futex;
use core::sync::atomic::{AtomicU32, Ordering};

/// Set while somebody waits for the readers to leave, or is alone inside.
const CLOSING: u32 = 1 << 31;

/// Readers, and whether somebody wants to be alone.
#[derive(Default)]
pub(crate) struct InUse(AtomicU32);

/// One of the readers, until dropped.
pub(crate) struct Inside<'a>(&'a InUse);

/// Nobody else is inside, until dropped.
pub(crate) struct Alone<'a>(&'a InUse);

impl InUse {
    /// Enters, once nobody is or wants to be alone.
    pub(crate) fn enter(&self) -> Inside<'_> {
        self.change_when_open(|readers| readers + 1);
        Inside(self)
    }

    /// Waits until everyone has left.
    pub(crate) fn alone(&self) -> Alone<'_> {
        self.change_when_open(|readers| readers | CLOSING);
        loop {
            let seen = self.0.load(Ordering::Acquire);
            if seen == CLOSING {
                return Alone(self);
            }
            futex::wait(&self.0, seen, None);
        }
    }

    fn change_when_open(&self, change: impl Fn(u32) -> u32) {
        loop {
            let seen = self.0.load(Ordering::Relaxed);
            if seen & CLOSING != 0 {
                futex::wait(&self.0, seen, None);
                continue;
            }
            let changed = self
                .0
                .compare_exchange_weak(seen, change(seen), Ordering::Acquire, Ordering::Relaxed);
            if changed.is_ok() {
                return;
            }
        }
    }

    /// In a forked child with a single thread: whoever was inside was so in the parent.
    pub(crate) fn reset(&self) {
        self.0.store(0, Ordering::Release);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if self.0.0.fetch_sub(1, Ordering::Release) == CLOSING + 1 {
            futex::wake_all(&self.0.0);
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
        futex::wake_all(&self.0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn nobody_is_inside_with_whoever_is_alone() {
        let (in_use, inside, alone) = (InUse::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for reads in [true, true, true, false, false] {
                let (in_use, inside, alone) = (&in_use, &inside, &alone);
                scope.spawn(move || {
                    for _ in 0..5000 {
                        if reads {
                            let _inside = in_use.enter();
                            inside.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(alone.load(Ordering::SeqCst), 0);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        } else {
                            let _alone = in_use.alone();
                            assert_eq!(alone.fetch_add(1, Ordering::SeqCst), 0);
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                            alone.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert_eq!(in_use.0.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_child_begins_anew() {
        let in_use = InUse::default();
        core::mem::forget(in_use.enter());
        in_use.reset();
        drop(in_use.alone());
        core::mem::forget(in_use.alone());
        in_use.reset();
        drop(in_use.enter());
    }
}
