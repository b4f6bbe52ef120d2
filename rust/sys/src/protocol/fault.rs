//! A write that faulted: what the signal handler does about it, and how a shared page gets its memory back.
//!
//! Everything here runs inside a SIGSEGV handler. It relies on nothing but the words and the memory of the region: no
//! allocation, no locks, no waiting while a word is owned. Where there is no room the caller is told so, and comes back after
//! it made some: a break never fails.

use super::lend::take_lent;
use super::merge::{private_again, showing};
use super::{Access, Kind, Memory, Page, Span, Words};
use crate::failpoint::{self, Failpoint};
use crate::mutant::{self, Mutant};
use crate::word::{Origin, Slot, State, StoreNumber, Word};
use rustix::io::Errno;

/// What became of a write fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The write can be tried again.
    Retry,
    /// So it can, and pages, the faulting one among them, have been given their own memory.
    Broken(Broken),
    /// Somebody owns the word: wait until it is no longer this one, then look again.
    Wait(Word),
    /// The kernel had no memory or no mapping left: make room, then look again.
    NoRoom(Errno),
}

/// How much a fault gave memory of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// How many pages.
    pub pages: u32,
    /// The page after the last one.
    pub end: Page,
}

impl Broken {
    const fn all_of(span: Span) -> Broken {
        Broken {
            pages: span.pages,
            end: span.end(),
        }
    }
}

/// Looks once at a page that a write faulted on. `repeated` says that the same thread already came back to the same page and
/// word: then the mapping is made writable even where it should be already. A break may take the pages `around` it along.
pub fn write_fault<W: Words, M: Memory>(words: &W, memory: &M, page: Page, repeated: bool, around: Span) -> Resolution {
    let word = words.load(page);
    match (word.state(), memory.kind()) {
        _ if mutant::active(Mutant::HandlerWithoutClaim) && word.state() == State::Frozen => {
            memory.protect(Span::one(page), Access::ReadWrite).ok();
            Resolution::Retry
        }
        (State::Merged | State::Zero, Kind::Shared) => break_page(words, memory, page, word, around),
        (State::Private | State::Broken | State::Detached | State::Held | State::Merged | State::Zero, _) => {
            // Without Freezing a page can rest, by its word, and be read-only for good; the second look would hide that.
            if repeated && !mutant::active(Mutant::NoFreezing) {
                rewrite(words, memory, page, word)
            } else {
                Resolution::Retry
            }
        }
        (State::Frozen, _) => take_back(words, memory, page, word),
        (State::Homed, Kind::Shared) if word.is_lent() => {
            let most = around.end().0 - page.0;
            match take_lent(words, memory, page, word, most, core::convert::identity) {
                Some(Ok(pages)) => Resolution::Broken(Broken::all_of(Span { first: page, pages })),
                Some(Err(errno)) => Resolution::NoRoom(errno),
                None => Resolution::Retry,
            }
        }
        (State::Freezing | State::Committing | State::Breaking | State::Homed | State::Leaving, _) => {
            Resolution::Wait(word)
        }
    }
}

/// A page that should be writable is not: owns the word and sees to it.
fn rewrite<W: Words, M: Memory>(words: &W, memory: &M, page: Page, word: Word) -> Resolution {
    if !words.cas(page, word, word.with_state(State::Breaking)) {
        return Resolution::Retry;
    }
    let done = memory.protect(Span::one(page), Access::ReadWrite);
    words.store(page, word);
    match done {
        Ok(()) => Resolution::Retry,
        Err(errno) => Resolution::NoRoom(errno),
    }
}

/// Takes a frozen page back from the remapper: its merge is off.
fn take_back<W: Words, M: Memory>(words: &W, memory: &M, page: Page, word: Word) -> Resolution {
    if word.is_cancelled() {
        return Resolution::Wait(word);
    }
    let resting = word.with_state(word.origin().state()).with_origin(Origin::Private);
    if resting.state() == State::Merged && memory.kind() == Kind::Shared {
        // It shows its frame read-only, frozen or not: back to Merged, and then it is broken like any other.
        words.cas(page, word, resting);
        return Resolution::Retry;
    }
    if !words.cas(page, word, word.with_state(State::Breaking)) {
        return Resolution::Retry;
    }
    failpoint::hit(Failpoint::TakeBack);
    match memory.protect(Span::one(page), Access::ReadWrite) {
        Ok(()) => {
            words.store(page, resting);
            Resolution::Broken(Broken::all_of(Span::one(page)))
        }
        Err(_) => {
            // One page cannot be split off at the mapping limit; the remapper thaws its whole range.
            words.store(page, word.cancelled());
            Resolution::Wait(word.cancelled())
        }
    }
}

fn break_page<W: Words, M: Memory>(words: &W, memory: &M, page: Page, word: Word, around: Span) -> Resolution {
    let bridge = if around.pages <= u64::BITS {
        Bridge::Own
    } else {
        Bridge::Nothing
    };
    match break_around(words, memory, page, word, around, bridge, private_again) {
        Some(Ok(broken)) => Resolution::Broken(broken),
        Some(Err(errno)) => Resolution::NoRoom(errno),
        None => Resolution::Retry,
    }
}

/// What a break does about pages that have their own memory and lie between merged ones.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bridge {
    /// It ends there.
    Nothing,
    /// It maps their home over them once more, which changes nothing that anyone can read, so that one mapping does for all. Of 64
    /// pages at most, for each needs a bit.
    Own,
}

/// Breaks a shared page seen as `word`, and the merged pages on both sides of it as far as `around` goes; `rest` makes the word that
/// each ends in. `None`: the word moved meanwhile.
pub(super) fn break_around<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    page: Page,
    word: Word,
    around: Span,
    bridge: Bridge,
    rest: impl Fn(Word) -> Word,
) -> Option<Result<Broken, Errno>> {
    if !words.cas(page, word, word.with_state(State::Breaking)) {
        return None;
    }
    let mut claimed = Claimed {
        span: Span::one(page),
        own: 0,
        written: page,
    };
    claimed.reach_up(words, around.end(), bridge);
    claimed.reach_down(words, around.first, bridge);
    let broken = Broken {
        pages: claimed.span.pages - claimed.own.count_ones(),
        end: claimed.span.end(),
    };
    Some(give_home(words, memory, &claimed, rest).map(|()| broken))
}

/// Pages that a break owns: those that are to get their memory are Breaking; those that had it all along are Homed, which is true of them.
struct Claimed {
    span: Span,
    /// The latter, one bit each, counted from the first page.
    own: u64,
    /// The page that the break is for.
    written: Page,
}

impl Claimed {
    fn is_own(&self, page: Page) -> bool {
        self.own.checked_shr(page.0 - self.span.first.0).unwrap_or(0) & 1 != 0
    }

    /// Claims one more page, if it can be had: whether its memory is its own.
    fn claim<W: Words>(words: &W, page: Page, bridge: Bridge) -> Option<bool> {
        let word = words.load(page);
        let (own, claimed) = match word.state() {
            State::Merged | State::Zero => (false, State::Breaking),
            State::Private if bridge == Bridge::Own => (true, State::Homed),
            _ => return None,
        };
        words.cas(page, word, word.with_state(claimed)).then_some(own)
    }

    fn reach_up<W: Words>(&mut self, words: &W, end: Page, bridge: Bridge) {
        let mut merged = self.span.pages;
        while self.span.end() < end
            && let Some(own) = Claimed::claim(words, self.span.end(), bridge)
        {
            if own {
                self.own |= 1 << self.span.pages;
            }
            self.span.pages += 1;
            if !own {
                merged = self.span.pages;
            }
        }
        // Beyond the last merged page there is nothing to bridge.
        while self.span.pages > merged {
            self.span.pages -= 1;
            self.own &= !(1 << self.span.pages);
            give_back(words, self.span.end());
        }
    }

    fn reach_down<W: Words>(&mut self, words: &W, first: Page, bridge: Bridge) {
        let mut merged = self.span.first;
        while self.span.first > first
            && let Some(own) = Claimed::claim(words, Page(self.span.first.0 - 1), bridge)
        {
            self.span = Span {
                first: Page(self.span.first.0 - 1),
                pages: self.span.pages + 1,
            };
            self.own = self.own << 1 | u64::from(own);
            if !own {
                merged = self.span.first;
            }
        }
        while self.span.first < merged {
            give_back(words, self.span.first);
            self.span = Span {
                first: self.span.first.plus(1),
                pages: self.span.pages - 1,
            };
            self.own >>= 1;
        }
    }

    /// The stretches that are to get their memory, in the order in which they get it: what was written comes first, for there may not be room
    /// for all.
    fn by_need(&self) -> impl Iterator<Item = Span> {
        let has = |span: &Span| (span.first..span.end()).contains(&self.written);
        let mine = self.merged().find(has);
        let halves = mine.map(|span| {
            let before = self.written.0 - span.first.0;
            let from = Span {
                first: self.written,
                pages: span.pages - before,
            };
            [
                from,
                Span {
                    first: span.first,
                    pages: before,
                },
            ]
        });
        let others = self.merged().filter(move |span| !has(span));
        halves.into_iter().flatten().filter(|span| span.pages > 0).chain(others)
    }

    /// The stretches that are to get their memory, from the first on.
    fn merged(&self) -> impl Iterator<Item = Span> {
        let is_own = |page| self.is_own(page) && !mutant::active(Mutant::BridgeFilled);
        let mut at = self.span.first;
        core::iter::from_fn(move || {
            while at < self.span.end() && is_own(at) {
                at = at.plus(1);
            }
            let first = at;
            while at < self.span.end() && !is_own(at) {
                at = at.plus(1);
            }
            (first < at).then(|| Span {
                first,
                pages: at.0 - first.0,
            })
        })
    }
}

/// A page that had its own memory all along is let go.
fn give_back<W: Words>(words: &W, page: Page) {
    words.store(page, private_again(words.load(page)));
}

/// The block around a page, if with this page half of it or more has memory of its own: who writes there, in whatever order, is
/// about to write the rest. So a break never takes more along than was written before it, but for pages that did not merge.
pub fn dense_block<W: Words>(words: &W, page: Page) -> Option<Span> {
    const BLOCK: u32 = 16;
    let first = page.0 / BLOCK * BLOCK;
    let block = Span {
        first: Page(first),
        pages: BLOCK.min(words.pages() - first),
    };
    let own = |&other: &Page| other == page || words.load(other).state() == State::Private;
    let own = block.iter().filter(own).count() as u32;
    (2 * own >= block.pages).then_some(block)
}

/// Fills the home pages that are to be filled, and maps all; on failure each shows what it showed.
fn give_home<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    claimed: &Claimed,
    rest: impl Fn(Word) -> Word,
) -> Result<(), Errno> {
    failpoint::hit(Failpoint::BreakClaimed);
    let filled = claimed.by_need().try_for_each(|part| memory.fill_home(part));
    let done = filled.and_then(|()| {
        failpoint::hit(Failpoint::BreakFilled);
        for page in claimed.merged().flat_map(Span::iter) {
            words.store(page, words.load(page).with_state(State::Homed));
        }
        memory.map_home(claimed.span)
    });
    failpoint::hit(Failpoint::BreakMapped);
    for page in claimed.span.iter() {
        let word = words.load(page);
        let now = if claimed.is_own(page) {
            private_again(word)
        } else if done.is_ok() {
            rest(word)
        } else {
            showing(word)
        };
        words.store(page, now);
    }
    done
}

/// The slots of a stretch that one mapping covers continue each other.
pub(super) fn continues(before: Word, after: Word) -> bool {
    match (before.frame(), after.frame()) {
        (Some((store, slot)), Some((other, next))) => store == other && slot != Slot::ZERO && next == slot.plus(1),
        (None, None) => true,
        _ => false,
    }
}

/// Claims the whole stretch of pages around `page` that one mapping of frames (or of zeros) covers; gives everything back and
/// returns `None` if any of it belongs to somebody else.
pub(crate) fn claim_stretch<W: Words>(words: &W, page: Page) -> Option<Span> {
    let state = words.load(page).state();
    if !matches!(state, State::Merged | State::Zero) {
        return None;
    }
    let mut first = page;
    while first.0 > 0 {
        let before = words.load(Page(first.0 - 1));
        if before.state().is_in_motion() {
            return None;
        }
        if !goes_on(before, words.load(first)) {
            break;
        }
        first = Page(first.0 - 1);
    }
    let mut span = Span { first, pages: 0 };
    let mut last: Option<Word> = None;
    while span.end().0 < words.pages() {
        let word = words.load(span.end());
        if word.state().is_in_motion() {
            end_claim(words, span, false);
            return None;
        }
        if word.state() != state || last.is_some_and(|last| !continues(last, word)) {
            break;
        }
        if !words.cas(span.end(), word, word.with_state(State::Breaking)) {
            end_claim(words, span, false);
            return None;
        }
        last = Some(word);
        span.pages += 1;
    }
    if page >= span.end() {
        end_claim(words, span, false);
        return None;
    }
    Some(span)
}

/// Whether one mapping may cover two neighbouring pages that show what their words say.
pub(crate) fn goes_on(before: Word, after: Word) -> bool {
    before.state() == after.state() && continues(before, after)
}

/// Ends the claim of a stretch, whose pages are writable copies from now on, or show what they showed.
pub(crate) fn end_claim<W: Words>(words: &W, span: Span, detached: bool) {
    for page in span.iter() {
        let word = words.load(page);
        let next = match (detached, word.frame()) {
            (false, _) => showing(word),
            (true, Some(_)) => word.with_state(State::Detached),
            // A page of zeros lies over no frame; it must not be taken for the object's own page when it is held.
            (true, None) => word.with_state(State::Detached).with_frame(NO_STORE, Slot::ZERO),
        };
        words.store(page, next);
    }
}

/// Breaks everything that the faulting page's mapping covers, so that no mapping is split.
/// `Ok(0)`: somebody else was at it; look again.
pub fn break_stretch<W: Words, M: Memory>(words: &W, memory: &M, page: Page) -> Result<u32, Errno> {
    match claim_stretch(words, page) {
        Some(span) => {
            let claimed = Claimed {
                span,
                own: 0,
                written: page,
            };
            give_home(words, memory, &claimed, private_again).map(|()| span.pages)
        }
        None => Ok(0),
    }
}

/// The emergency: makes the faulting page's whole mapping writable, so that the kernel copies what is written, and marks its
/// pages Detached. It needs neither a mapping nor a page of the object. `Ok(0)`: somebody else was at it; look again.
pub fn detach_stretch<W: Words, M: Memory>(words: &W, memory: &M, page: Page) -> Result<u32, Errno> {
    let Some(span) = claim_stretch(words, page) else {
        return Ok(0);
    };
    let done = memory.protect(span, Access::ReadWrite);
    end_claim(words, span, done.is_ok());
    done.map(|()| span.pages)
}

/// Stands for "outside the object, over no frame" in the word of a Detached page of zeros. Brokers are told that the number is in
/// use as long as a word holds it.
const NO_STORE: StoreNumber = StoreNumber(u8::MAX);
