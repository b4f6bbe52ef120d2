//! A region: its memory, its words, and what is done to it while it lives, but for the signal handler.
//!
//! The remapper merges and brings home (`remap.rs`), the scanner checksums (`scan.rs`) and stages, the program's threads unmerge and
//! pin; how a region ends is in `ending.rs`.
//! A lock keeps `close` from the others' runs; the words keep everyone from each other's pages. Nothing here decides what
//! merges, and no lock is held while a fork waits.

use crate::checksum::ChecksumWord;
use crate::error::SysError;
use crate::foreign::{Foreign, Object};
use crate::fork;
use crate::gate::Pass;
use crate::heap;
use crate::holds::{Holds, insert_range, remove_range, within};
use crate::in_use::InUse;
use crate::mapping::{Mapping, View};
use crate::object::PAGE_SIZE;
use crate::page_table::ClientTable;
use crate::parts::Parts;
use crate::protocol::{self, Access, Kind, Memory, Page, Span, Words};
use crate::registry::{self, Area};
use crate::sigmask::Blocked;
use crate::signal;
use crate::staging::Staging;
use crate::tracking::Tracking;
use crate::word::{State, Word};
use crate::words::RegionWords;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

/// Changes with every unmerge on request.
pub(crate) static GIVEN_UP: AtomicU64 = AtomicU64::new(0);

/// A number that changes whenever program threads took pages from their frames.
pub fn given_up() -> u64 {
    GIVEN_UP.load(Ordering::Relaxed)
}

/// A region of this process.
pub struct Region {
    /// The memory, unmapped by `close`.
    pub(crate) mapping: Mapping,
    pub(crate) closed: AtomicBool,
    /// Closed, and still there with all that it shows.
    pub(crate) retired: AtomicBool,
    /// Whether its pages are at home and stay there for now: `recall.rs`.
    pub(crate) recalled: AtomicBool,
    /// Keeps `close` from runs under way. A forked child takes it only once `born.rs` made it new: another thread of the parent may
    /// have held it.
    pub(crate) in_use: InUse,
    pub(crate) view: View,
    pub(crate) words: RegionWords,
    pub(crate) table: &'static ClientTable,
    pub(crate) first_word: u32,
    /// The life that owns its words; a child that is born makes it its own.
    pub(crate) era: AtomicU32,
    pub(crate) holds: Mutex<Holds>,
    pub(crate) tracking: Tracking,
    /// Whether its checksum words have NUMA nodes in them: `scan.rs`.
    pub(crate) with_nodes: AtomicBool,
    /// Which pages take part at all, where not every page does.
    pub(crate) parts: Option<Parts>,
}

impl Region {
    /// Fresh zeroed memory, known to the fault handler. The process has begun its life ([`fork::begin_life`]) and installed the
    /// handler.
    ///
    /// # Errors
    /// No memory, no room in the table, or a child that has not begun its own life.
    pub fn create(table: &'static ClientTable, pages: u32, kind: Kind) -> Result<Region, SysError> {
        let era = era()?;
        Region::over(table, Mapping::create(pages, kind)?, era, false)
    }

    /// Memory that the program made, in place: its bytes, addresses and views stay as they are. It stays the program's: closing the
    /// region leaves it plain, with its bytes. Otherwise as [`Region::create`].
    ///
    /// # Errors
    /// No room in the table, a child that has not begun its own life, or pages that are in a region already.
    pub fn adopt(table: &'static ClientTable, foreign: Foreign) -> Result<Region, SysError> {
        let era = era()?;
        let range = foreign.range();
        if registry::overlaps(&range) {
            return Err(SysError::Unfit {
                mapping: format!("{:#x}-{:#x}", range.start, range.end),
                reason: "part of it is in a region already",
            });
        }
        Region::over(table, Mapping::adopt(foreign)?, era, false)
    }

    /// Memory of a named object, which lives on after the region; the descriptor must stay open for as long as it is to merge.
    /// Otherwise as [`Region::create`].
    ///
    /// # Errors
    /// As there; ENOSPC where the object's file system cannot hold it.
    pub fn named(table: &'static ClientTable, pages: u32, object: BorrowedFd<'_>) -> Result<Region, SysError> {
        let era = era()?;
        Region::over(table, Mapping::named(pages, object)?, era, false)
    }

    pub(crate) fn over(
        table: &'static ClientTable,
        mapping: Mapping,
        era: u32,
        in_parts: bool,
    ) -> Result<Region, SysError> {
        let pages = mapping.view().pages();
        let first_word = match table.take(pages) {
            Ok(first_word) => first_word,
            Err(full) => {
                if mapping.is_adopted() {
                    mapping.give_back();
                } else {
                    mapping.unmap();
                }
                return Err(full);
            }
        };
        let words = RegionWords::new(&table.words()[first_word as usize..(first_word + pages) as usize]);
        let view = mapping.view();
        let lasts = mapping.object().is_some();
        if in_parts {
            // Before anybody knows of them.
            let held = Word::PRIVATE.with_state(State::Held).0;
            words
                .slice()
                .iter()
                .for_each(|word| word.store(held, Ordering::Relaxed));
        }
        registry::add(Area { view, words, era });
        Ok(Region {
            mapping,
            closed: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            // An object that others may have merges once nobody else can see it.
            recalled: AtomicBool::new(lasts),
            in_use: InUse::default(),
            view,
            words,
            table,
            first_word,
            era: AtomicU32::new(era),
            holds: Mutex::default(),
            tracking: Tracking::of(&view),
            with_nodes: AtomicBool::new(false),
            parts: in_parts.then(|| Parts::new(view.pages())),
        })
    }

    /// The first byte.
    pub fn address(&self) -> usize {
        self.view.base()
    }

    /// Whole pages.
    pub fn pages(&self) -> u32 {
        self.view.pages()
    }

    /// Private or shared.
    pub fn kind(&self) -> Kind {
        self.view.kind()
    }

    /// Where its slice of the page table begins.
    pub fn first_word(&self) -> u32 {
        self.first_word
    }

    /// Whether this process registered it, or was born with it. Any other forked child has its parent's regions as ordinary memory.
    pub fn is_ours(&self) -> bool {
        fork::era() == Some(self.era.load(Ordering::Acquire))
    }

    /// The object behind it, if that may live on after the region, or be somebody else's too.
    pub fn object(&self) -> Option<Object> {
        self.mapping.object()
    }

    pub(crate) fn whole(&self) -> Span {
        Span {
            first: Page(0),
            pages: self.pages(),
        }
    }

    /// Runs something on the memory unless the region is closed.
    pub(crate) fn open<T>(&self, run: impl FnOnce(&Mapping) -> T) -> Option<T> {
        let ours = self.is_ours();
        let _in_use = ours.then(|| self.in_use.enter());
        (!self.closed.load(Ordering::Acquire)).then(|| run(&self.mapping))
    }

    /// The same, unless the region's pages are to stay where they are.
    pub(crate) fn merging<T>(&self, run: impl FnOnce(&Mapping) -> T) -> Option<T> {
        self.open(|mapping| (!self.recalled.load(Ordering::Acquire)).then(|| run(mapping)))
            .flatten()
    }

    pub(crate) fn holds(&self) -> std::sync::MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // The scanner; `scan.rs` has the rest.

    /// Copies a page into the staging area; false if the region is closed, or the page is not there.
    pub fn stage(&self, page: Page, staging: &Staging, index: u32) -> bool {
        self.merging(|_| self.view.stage(page, staging, index)).unwrap_or(false)
    }

    /// Highest store numbers that words of this region still hold: bit n of word n / 64.
    pub fn stores_in_use(&self, stores: &mut [u64; 4]) {
        let mut note = || {
            for page in self.whole().iter() {
                if let Some((store, _)) = self.words.load(page).frame() {
                    stores[store.0 as usize / 64] |= 1 << (store.0 % 64);
                }
            }
        };
        if self.retired.load(Ordering::Acquire) {
            return note();
        }
        self.open(|_| note());
    }

    // The program's threads.

    /// Takes pages out of merging: each has memory of its own when this returns. In a forked child, which owns no words, the
    /// kernel is asked for the copies.
    ///
    /// # Errors
    /// No memory for the copies; then nothing is taken out that was not out before.
    pub fn unadvise(&self, pages: Range<u32>) -> Result<(), SysError> {
        if !self.is_ours() {
            return self.hold(pages);
        }
        let before = {
            let mut holds = self.holds();
            let before = within(&holds.unadvised, &pages);
            insert_range(&mut holds.unadvised, pages.clone());
            before
        };
        self.keep_out(pages.clone()).inspect_err(|_| {
            let mut holds = self.holds();
            remove_range(&mut holds.unadvised, pages.clone());
            // What was taken out by an earlier call stays out; whatever others did elsewhere meanwhile, too.
            for range in before {
                insert_range(&mut holds.unadvised, range);
            }
            self.let_go(&holds, pages);
        })
    }

    /// Lets pages take part again, but for those that are pinned.
    ///
    /// # Errors
    /// EPERM in a forked child: regions made before the fork stay ordinary memory there.
    pub fn advise(&self, pages: Range<u32>) -> Result<(), SysError> {
        if !self.is_ours() {
            let errno = rustix::io::Errno::PERM;
            return Err(SysError::Call {
                call: "madvise",
                what: "a region made before the fork",
                errno,
            });
        }
        let mut holds = self.holds();
        if holds.leaving {
            return Err(SysError::Closed);
        }
        remove_range(&mut holds.unadvised, pages.clone());
        self.let_go(&holds, pages.clone());
        drop(holds);
        if self.parts.is_some() {
            let [start, end] = [pages.start, pages.end].map(|page| self.address() + page as usize * PAGE_SIZE);
            heap::open_range(&(start..end));
        }
        Ok(())
    }

    /// Whether the program has opted all of it out.
    pub fn is_unadvised(&self) -> bool {
        let holds = self.holds();
        let mut next = 0;
        for range in &holds.unadvised {
            if range.start != next {
                return false;
            }
            next = range.end;
        }
        next == self.pages()
    }

    /// Like [`Region::unadvise`], counted: each pin needs its unpin.
    ///
    /// # Errors
    /// No memory for the copies; the pin does not count then.
    pub fn pin(&self, pages: Range<u32>) -> Result<(), SysError> {
        if !self.is_ours() {
            return self.hold(pages);
        }
        loop {
            let mut holds = self.holds();
            if !holds.leaving {
                holds.pins.push(pages.clone());
                break;
            }
            drop(holds);
            // It may be copied just now. Once it is plain memory, nobody moves it any more.
            if self.is_closed() {
                return Ok(());
            }
            signal::nap();
        }
        self.keep_out(pages.clone()).inspect_err(|_| self.unpin(pages))
    }

    /// Ends one pin of exactly this range.
    pub fn unpin(&self, pages: Range<u32>) {
        if !self.is_ours() {
            return;
        }
        let mut holds = self.holds();
        if let Some(at) = holds.pins.iter().position(|pin| *pin == pages) {
            holds.pins.swap_remove(at);
            self.let_go(&holds, pages);
        }
    }

    pub(crate) fn hold(&self, pages: Range<u32>) -> Result<(), SysError> {
        let span = Span {
            first: Page(pages.start),
            pages: pages.len() as u32,
        };
        let done = self.open(|_| {
            if !self.is_ours() {
                return self.copy_in_child(span);
            }
            let mut at = span.first;
            while at < span.end() {
                // A run at a time: a fork must not wait for gigabytes.
                let part = Span {
                    first: at,
                    pages: (span.end().0 - at.0).min(protocol::MAX_RUN as u32),
                };
                let _blocked = Blocked::new();
                let _pass = Pass::enter();
                protocol::unmerge(&self.words, &self.view, part)?;
                GIVEN_UP.fetch_add(1, Ordering::Relaxed);
                at = part.end();
            }
            Ok(())
        });
        done.unwrap_or(Ok(()))
            .map_err(SysError::call("madvise(MADV_POPULATE_WRITE)", "region"))
    }

    fn copy_in_child(&self, span: Span) -> Result<(), rustix::io::Errno> {
        self.view.protect(span, Access::ReadWrite)?;
        self.view.copy_own(span)
    }

    /// Reopens the pages of a range that nothing holds any more.
    pub(crate) fn let_go(&self, holds: &Holds, pages: Range<u32>) {
        let _alone = self.parts.as_ref().map(|parts| parts.changing.alone());
        self.reopen_free(holds, pages);
    }

    /// The same for whoever is alone in `changing`, where there are parts.
    pub(crate) fn reopen_free(&self, holds: &Holds, pages: Range<u32>) {
        let held = |page: u32| {
            let kept = holds.unadvised.iter().chain(&holds.pins);
            kept.into_iter().any(|range| range.contains(&page)) || !self.takes_part(Page(page))
        };
        let whole = self.parts.is_none() && holds.unadvised.is_empty() && holds.pins.is_empty();
        self.open(|_| {
            let _blocked = Blocked::new();
            let _pass = Pass::enter();
            if whole {
                let span = Span {
                    first: Page(pages.start),
                    pages: pages.len() as u32,
                };
                return protocol::reopen(&self.words, &self.view, span);
            }
            for page in pages.filter(|page| !held(*page)) {
                protocol::reopen(&self.words, &self.view, Span::one(Page(page)));
            }
        });
    }

    /// Holds again what must stay held: `break_span` may have raced with a pin and reopened it.
    pub(crate) fn hold_again(&self, span: Span) {
        // The lock before the gate and before `in_use`, never the other way: whoever waits there may hold it.
        let holds = self.holds();
        self.open(|_| {
            let _pass = Pass::enter();
            for range in holds.unadvised.iter().chain(&holds.pins) {
                let (start, end) = (range.start.max(span.first.0), range.end.min(span.end().0));
                if start < end {
                    let part = Span {
                        first: Page(start),
                        pages: end - start,
                    };
                    // Their memory is their own already, so this needs none.
                    let _ = protocol::unmerge(&self.words, &self.view, part);
                }
            }
        });
    }

    // For whoever wants to know.

    /// Every page's state.
    pub fn page_states(&self) -> Vec<State> {
        if !self.is_ours() {
            return vec![State::Held; self.pages() as usize];
        }
        self.open(|_| self.whole().iter().map(|page| self.words.load(page).state()).collect())
            .unwrap_or_default()
    }

    /// Pages that show a frame or, as the last scan saw them, have memory of their own: in the kernel those with an rmap_item.
    pub fn items(&self) -> u32 {
        let has_one = |page: &Page| match self.words.load(*page).state() {
            State::Merged => true,
            State::Zero | State::Held | State::Leaving => false,
            _ => self.checksum_word(*page).load(Ordering::Relaxed) != ChecksumWord::NONE.0,
        };
        if !self.is_ours() {
            return 0;
        }
        self.open(|_| self.whole().iter().filter(has_one).count() as u32)
            .unwrap_or_default()
    }

    /// The maximal stretches of a span whose words match now.
    pub(crate) fn stretches_of(&self, span: Span, matching: impl Fn(Word) -> bool) -> Vec<Span> {
        let mut stretches: Vec<Span> = Vec::new();
        for page in span.iter().filter(|page| matching(self.words.load(*page))) {
            match stretches.last_mut() {
                Some(last) if last.end() == page => last.pages += 1,
                _ => stretches.push(Span::one(page)),
            }
        }
        stretches
    }
}

/// This process's life, or why it has none.
pub(crate) fn era() -> Result<u32, SysError> {
    let errno = rustix::io::Errno::PERM;
    fork::era().ok_or(SysError::Call {
        call: "fork",
        what: "unregistered child",
        errno,
    })
}
