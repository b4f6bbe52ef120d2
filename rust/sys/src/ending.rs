//! How a region ends: it leaves, is given back, released, closed or retired.
//!
//! Relies on the words to keep everybody but the signal handler from pages that end, on `in_use` to keep the region's own threads out
//! meanwhile, and on the registry to know when no handler looks any more. Memory is unmapped or handed back once, by
//! whoever set `closed`. Nothing here frees a slice of the page table: the broker has to hear of the end first.

use crate::error::SysError;
use crate::gate::Pass;
use crate::mapping::View;
use crate::object::PAGE_SIZE;
use crate::protocol::{self, Access, Kind, Memory, Span, Words};
use crate::region::{GIVEN_UP, Region};
use crate::registry;
use crate::sigmask::Blocked;
use crate::signal;
use crate::word::{State, Word};
use core::sync::atomic::Ordering;

impl Region {
    /// Ends merging for good: plain memory again, with its bytes, at the same address. Nothing of the store stays mapped.
    ///
    /// # Errors
    /// No memory for the copies, or pins: a page over a slot would be copied away from under whoever it is pinned for. What was opted
    /// in before takes part again.
    pub fn leave(&self) -> Result<(), SysError> {
        if !self.is_ours() {
            return self.hold(0..self.pages());
        }
        let whole = core::iter::once(0..self.pages()).collect();
        let (before, ends) = {
            let mut holds = self.holds();
            let pins = holds.pins.len();
            if pins > 0 {
                return Err(SysError::Pinned { pins });
            }
            // Opted out first, so that nobody lets a page take part again that has left; and no pin begins meanwhile.
            let ends = core::mem::replace(&mut holds.leaving, true);
            (core::mem::replace(&mut holds.unadvised, whole), ends)
        };
        let left = loop {
            let left = self.open(|mapping| mapping.with_scratch(|view| self.leave_on(&view)));
            match left {
                // The broker is at it, or the remapper finds that there is none.
                Some(Err(rustix::io::Errno::AGAIN)) => signal::nap(),
                left => break left,
            }
        };
        GIVEN_UP.fetch_add(1, Ordering::Relaxed);
        self.holds().leaving = ends;
        left.unwrap_or(Ok(()))
            .map_err(|errno| SysError::call("mremap", self.what_leaves(errno))(errno))
            .inspect_err(|_| {
                let mut holds = self.holds();
                holds.unadvised = before;
                self.let_go(&holds, 0..self.pages());
            })
    }

    /// What an error on leaving names. Pages that lie behind an object's end have nowhere to go.
    fn what_leaves(&self, errno: rustix::io::Errno) -> &'static str {
        if errno == rustix::io::Errno::FAULT && self.view.is_vanishing() {
            "leaving region, whose object was cut short: make it as long as it was (ftruncate) and opt out again"
        } else {
            "leaving region"
        }
    }

    pub(crate) fn leave_on(&self, view: &View) -> Result<(), rustix::io::Errno> {
        self.leave_span(view, self.whole())
    }

    /// Runs end where extents do: what is assembled in huge pages then moves as huge pages.
    pub(crate) fn leave_span(&self, view: &View, whole: Span) -> Result<(), rustix::io::Errno> {
        let mut before = Box::new([Word::PRIVATE; protocol::MAX_RUN]);
        let position = (self.address() / PAGE_SIZE % protocol::MAX_RUN) as u32;
        let mut at = whole.first;
        while at < whole.end() {
            let room = protocol::MAX_RUN as u32 - (at.0 + position) % protocol::MAX_RUN as u32;
            let part = Span {
                first: at,
                pages: (whole.end().0 - at.0).min(room),
            };
            let _blocked = Blocked::new();
            let _pass = Pass::enter();
            protocol::leave(&self.words, view, part, &mut before)?;
            at = part.end();
        }
        Ok(())
    }

    /// Whether the program made the memory.
    pub fn is_adopted(&self) -> bool {
        self.mapping.is_adopted()
    }

    /// Ends an adopted region whose owner keeps the memory: plain, with its bytes and its advice, and ksmrs knows nothing of it
    /// any more. Idempotent. The slice of the table is given back as after [`Region::close`]. Nothing of it is tracked: before, see
    /// [`Region::end_tracking`].
    ///
    /// # Errors
    /// No memory for the copies, or [`SysError::Pinned`]; then the region goes on as it was.
    pub fn give_back(&self) -> Result<(), SysError> {
        debug_assert!(self.is_adopted(), "regions of our own are closed");
        self.reinstate();
        if self.is_closed() {
            return Ok(());
        }
        if !self.is_ours() {
            self.end(|_| self.thaw_in_child());
            return Ok(());
        }
        debug_assert!(!self.tracking.any(), "its owner would get it back registered");
        self.holds().leaving = true;
        if let Err(error) = self.leave() {
            self.holds().leaving = false;
            return Err(error);
        }
        self.end(|_| self.mapping.give_back());
        Ok(())
    }

    /// Neither remapper nor scanner touch the region any more; its pages stay as they are, and the fault handler serves them. For
    /// the end of the program, which frees memory in its own order and tells nobody. Whoever ends the region all the same finds it as it
    /// was.
    pub fn retire(&self) {
        if self.is_ours() {
            let _in_use = self.in_use.alone();
            if !self.is_closed() {
                self.retired.store(true, Ordering::Release);
                self.closed.store(true, Ordering::Release);
            }
        }
    }

    /// Whether it was retired, and did not end since: it shows what it shows.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// A retired region is one again, for its memory is there still: what follows ends it.
    fn reinstate(&self) {
        if self.is_ours() && self.is_retired() {
            let _in_use = self.in_use.alone();
            if self.retired.swap(false, Ordering::AcqRel) {
                self.closed.store(false, Ordering::Release);
            }
        }
    }

    /// Whether it ended.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Ends the region: nothing is copied, memory of our own is unmapped; adopted memory, which its owner is freeing, is fresh if
    /// any of it was merged. Not for an object that lives on ([`Region::release`]). Idempotent. Whoever closes it gives its slice of the
    /// table back, once nobody can mistake its words for another region's.
    pub fn close(&self) {
        debug_assert!(
            !(self.is_adopted() && self.kind() == Kind::Shared),
            "its object may live on"
        );
        self.reinstate();
        self.end(|plain| {
            if !self.is_adopted() {
                self.mapping.unmap();
            } else if !self.is_ours() {
                self.thaw_in_child();
            } else if !plain || self.tracking.any() {
                // Fresh memory is registered with no userfaultfd either.
                self.mapping.abandon();
            }
        });
    }

    /// Ends the region, with its bytes wherever somebody may still look for them: in memory whose owner keeps it, and in objects that
    /// live on. Idempotent; the slice of the table is given back as after [`Region::close`].
    ///
    /// # Errors
    /// No memory for the copies; then it stays as it is, words and frames included.
    pub fn release(&self) -> Result<(), SysError> {
        if self.is_adopted() {
            return self.give_back();
        }
        if self.object().is_some() && !self.is_closed() {
            self.leave()?;
        }
        self.close();
        Ok(())
    }

    /// In an unregistered child, whose pages are the kernel's to copy: nothing was frozen when it was forked but for what a thaw
    /// without room left behind.
    fn thaw_in_child(&self) {
        let _ = self.view.protect(self.whole(), Access::ReadWrite);
    }

    /// Whether no page shows, or lies over, a frame, and none is write-protected.
    fn is_plain(&self) -> bool {
        self.whole().iter().all(|page| {
            let word = self.words.load(page);
            word.frame().is_none() && word.state() != State::Frozen
        })
    }

    /// Takes every page for good, lets the memory go (plain, or with frames in it, as it is), and forgets the region.
    fn end(&self, let_go: impl FnOnce(bool)) {
        let ours = self.is_ours();
        let _in_use = ours.then(|| self.in_use.alone());
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        if !ours {
            // A child that is not registered: the words are its parent's.
            registry::remove(self.address(), || let_go(true));
            return;
        }
        // Only handlers are at it now, and in private memory they map no frames.
        let plain = self.is_plain();
        let _blocked = Blocked::new();
        {
            let _pass = Pass::enter();
            protocol::claim_all(&self.words, self.whole());
        }
        registry::remove(self.address(), || {
            let_go(plain);
            self.tracking.forget();
            // Whoever writes to memory that is being closed waits for these words; let it run into its fault.
            for page in self.whole().iter() {
                self.words.store(page, Word::PRIVATE.with_state(State::Held));
            }
        });
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // To copy all of it would be for nothing: the program is ending.
        if !self.is_retired() {
            let _ = self.release();
        }
    }
}
