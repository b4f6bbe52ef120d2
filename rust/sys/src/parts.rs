//! Regions of which only some pages take part: arenas, whose memory is lent out in blocks (`heap.rs`).
//!
//! Every page of such a region begins Held. A bit per page says whether it is to take part; whoever changes bits, or reopens held
//! pages, is alone in `changing`, so that a page which is out stays out: Held, over no slot, and nobody's but its owner's. The memory of
//! such pages may be discarded. Relies on the protocol for everything that happens to a page. The lock comes after the region's holds
//! and before `in_use` and the gate; nobody waits for it while owning a word.

use crate::ballast;
use crate::error::SysError;
use crate::failpoint::{self, Failpoint};
use crate::holds::{Holds, insert_range, remove_range};
use crate::in_use::Alone;
use crate::in_use::InUse;
use crate::mapping::Mapping;
use crate::page_table::ClientTable;
use crate::protocol::{self, Kind, Page, Span, Words};
use crate::region::{GIVEN_UP, Region};
use crate::signal;
use crate::word::State;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::ops::Range;
use std::sync::MutexGuard;

/// Which pages of a region take part.
pub(crate) struct Parts {
    open: Box<[AtomicU64]>,
    /// A forked child makes it new.
    pub(crate) changing: InUse,
    /// Whether any page was ever opted out or pinned: else nobody need look at the holds. Set before `changing` is taken for it.
    holds: AtomicBool,
}

impl Parts {
    pub(crate) fn new(pages: u32) -> Parts {
        Parts {
            open: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            changing: InUse::default(),
            holds: AtomicBool::new(false),
        }
    }

    fn has(&self, page: Page) -> bool {
        self.open[page.0 as usize / 64].load(Ordering::Acquire) & 1 << (page.0 % 64) != 0
    }

    fn set(&self, span: Span, open: bool) {
        for page in span.iter() {
            let (bits, bit) = (&self.open[page.0 as usize / 64], 1 << (page.0 % 64));
            if open {
                bits.fetch_or(bit, Ordering::AcqRel);
            } else {
                bits.fetch_and(!bit, Ordering::AcqRel);
            }
        }
    }
}

impl Region {
    /// Fresh zeroed private memory of which no page takes part. Otherwise as [`Region::create`].
    ///
    /// # Errors
    /// As there.
    pub fn arena(table: &'static ClientTable, pages: u32) -> Result<Region, SysError> {
        let era = crate::region::era()?;
        Region::over(table, Mapping::create(pages, Kind::Private)?.maybe_huge(), era, true)
    }

    /// Whether the program may have the page take part at all.
    pub(crate) fn takes_part(&self, page: Page) -> bool {
        self.parts.as_ref().is_none_or(|parts| parts.has(page))
    }

    /// Nobody else changes which pages take part, or opens any; and the holds, where there are any.
    fn alone<'a>(&'a self, parts: &'a Parts) -> (Option<MutexGuard<'a, Holds>>, Alone<'a>) {
        loop {
            let held = parts.holds.load(Ordering::Acquire);
            let holds = held.then(|| self.holds());
            let alone = parts.changing.alone();
            if held || !parts.holds.load(Ordering::Acquire) {
                return (holds, alone);
            }
        }
    }

    /// Holds pages on request, with nobody opening them meanwhile.
    pub(crate) fn keep_out(&self, pages: Range<u32>) -> Result<(), SysError> {
        let _alone = self.parts.as_ref().map(|parts| {
            parts.holds.store(true, Ordering::Release);
            parts.changing.alone()
        });
        self.hold(pages)
    }

    /// Whether pages of an arena may be opted out or pinned.
    pub(crate) fn has_holds(&self) -> bool {
        self.parts
            .as_ref()
            .is_none_or(|parts| parts.holds.load(Ordering::Acquire))
    }

    /// Lets pages take part, but for those that are opted out or pinned, if they are still to: that is asked when nobody can take them
    /// out any more before they do.
    pub(crate) fn open_pages_if(&self, span: Span, still: impl FnOnce() -> bool) {
        let Some(parts) = self.parts.as_ref().filter(|_| self.is_ours()) else {
            return;
        };
        let (holds, _alone) = self.alone(parts);
        if still() {
            self.open_pages_alone(parts, holds.as_deref(), span);
        }
    }

    fn open_pages_alone(&self, parts: &Parts, holds: Option<&Holds>, span: Span) {
        failpoint::hit(Failpoint::BlockOpens);
        parts.set(span, true);
        let none = Holds::default();
        let mut at = span.first;
        while at < span.end() {
            // A run at a time: a fork must not wait for gigabytes.
            let end = span.end().0.min(at.0 + protocol::MAX_RUN as u32);
            self.reopen_free(holds.unwrap_or(&none), at.0..end);
            at = Page(end);
        }
    }

    /// Takes pages out for good whose bytes nobody wants any more: what shows a frame, or lies over one, is fresh memory afterwards,
    /// the rest keeps its memory. Nothing is copied.
    ///
    /// # Errors
    /// No mapping to be had; then some of the pages may still show frames.
    pub(crate) fn abandon_pages(&self, span: Span) -> Result<(), SysError> {
        const TRIES: u32 = 100;
        let Some(parts) = &self.parts else { return Ok(()) };
        let _alone = parts.changing.alone();
        parts.set(span, false);
        let view = self.view.abandoned();
        let mut left = Ok(());
        for _ in 0..TRIES {
            left = self.open(|_| self.leave_span(&view, span)).unwrap_or(Ok(()));
            if left.is_ok() {
                break;
            }
            if !ballast::give_up() {
                signal::nap();
            }
        }
        GIVEN_UP.fetch_add(1, Ordering::Relaxed);
        left.map_err(SysError::call("mmap", "freed block"))
    }

    /// Returns when nobody opens pages who began before.
    pub(crate) fn await_openings(&self) {
        if let Some(parts) = &self.parts {
            drop(parts.changing.alone());
        }
    }

    /// Takes pages out with their bytes, if they are still to: plain memory of their own again, but for pinned pages, which are not
    /// moved. `done` is called before they can be opened again, and told whether none of them lies over a slot.
    ///
    /// # Errors
    /// No memory for the copies; then they take part as before.
    pub(crate) fn withdraw_pages_if(
        &self,
        span: Span,
        still: impl FnOnce() -> bool,
        done: impl FnOnce(bool),
    ) -> Result<(), SysError> {
        let Some(parts) = self.parts.as_ref().filter(|_| self.is_ours()) else {
            return Ok(());
        };
        let (holds, _alone) = self.alone(parts);
        if !still() {
            return Ok(());
        }
        parts.set(span, false);
        let (pinned, free) = self.pinned_and_free(span, holds.as_deref());
        let left = self.open(|mapping| {
            mapping.with_scratch(|view| free.iter().try_for_each(|part| self.leave_span(&view, *part)))
        });
        GIVEN_UP.fetch_add(1, Ordering::Relaxed);
        let over_slot = |page| self.words.load(page).frame().is_some();
        match left.unwrap_or(Ok(())) {
            Ok(()) => done(!pinned.iter().any(|part| part.iter().any(over_slot))),
            Err(errno) => {
                self.open_pages_alone(parts, holds.as_deref(), span);
                return Err(SysError::call("mremap", "arena")(errno));
            }
        }
        Ok(())
    }

    /// The stretches of a span that are pinned, and those that are not. Whoever pins anything more waits.
    fn pinned_and_free(&self, span: Span, holds: Option<&Holds>) -> (Vec<Span>, Vec<Span>) {
        let (mut free, mut pinned) = (Vec::new(), Vec::new());
        insert_range(&mut free, span.first.0..span.end().0);
        for pin in holds.iter().flat_map(|holds| &holds.pins) {
            let within = pin.start.max(span.first.0)..pin.end.min(span.end().0);
            if within.start < within.end {
                remove_range(&mut free, within.clone());
                pinned.push(within);
            }
        }
        let spans = |ranges: Vec<Range<u32>>| ranges.into_iter().map(span_of).collect();
        (spans(pinned), spans(free))
    }

    /// Gives the memory of pages back that are out; they read as zeros. False where the kernel refuses, and they are as they were.
    pub(crate) fn discard_pages(&self, span: Span) -> bool {
        debug_assert!(span.iter().all(|page| {
            let word = self.words.load(page);
            !self.is_ours() || word.state() == State::Held && word.frame().is_none()
        }));
        // Locked memory cannot be discarded, but replaced.
        self.open(|_| self.view.discard(span).or_else(|_| self.view.refresh(span)).is_ok())
            .unwrap_or(false)
    }

    /// The same for pages that huge ones were asked for: whoever is lent these addresses next is not to have them, unless it asks.
    pub(crate) fn replace_pages(&self, span: Span) -> bool {
        self.open(|_| self.view.refresh(span).is_ok()).unwrap_or(false) || self.discard_pages(span)
    }

    /// Asks for huge pages where whole ones fit into pages that are about to be lent and have no memory.
    pub(crate) fn want_huge_pages(&self, span: Span) {
        self.open(|_| self.view.want_huge(span));
    }

    /// In a child to which the region does not belong: fresh memory over pages that nobody there wants any more.
    pub(crate) fn forget_pages(&self, span: Span) {
        // What is refused keeps its memory, and is never lent again.
        let _ = self.view.refresh(span);
    }

    /// No page of the span is opted out any more: it will be somebody else's.
    pub(crate) fn forget_holds(&self, span: Span) {
        let mut holds = self.holds();
        if !holds.unadvised.is_empty() {
            remove_range(&mut holds.unadvised, span.first.0..span.end().0);
        }
    }
}

fn span_of(pages: Range<u32>) -> Span {
    Span {
        first: Page(pages.start),
        pages: pages.end - pages.start,
    }
}
