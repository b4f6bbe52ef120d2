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
    /// So it can, and this many pages from the faulting one on have been given their own memory.
    Broken(u32),
    /// Somebody owns the word: wait until it is no longer this one, then look again.
    Wait(Word),
    /// The kernel had no memory or no mapping left: make room, then look again.
    NoRoom(Errno),
}

/// Looks once at a page that a write faulted on. `repeated` says that the same thread already came back to the same page and
/// word: then the mapping is made writable even where it should be already. `widen` is how many pages a break may take along.
pub fn write_fault<W: Words, M: Memory>(words: &W, memory: &M, page: Page, repeated: bool, widen: u32) -> Resolution {
    let word = words.load(page);
    match (word.state(), memory.kind()) {
        _ if mutant::active(Mutant::HandlerWithoutClaim) && word.state() == State::Frozen => {
            memory.protect(Span::one(page), Access::ReadWrite).ok();
            Resolution::Retry
        }
        (State::Merged | State::Zero, Kind::Shared) => break_page(words, memory, page, word, widen),
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
            match take_lent(words, memory, page, word, widen, core::convert::identity) {
                Some(Ok(pages)) => Resolution::Broken(pages),
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
            Resolution::Broken(1)
        }
        Err(_) => {
            // One page cannot be split off at the mapping limit; the remapper thaws its whole range.
            words.store(page, word.cancelled());
            Resolution::Wait(word.cancelled())
        }
    }
}

fn break_page<W: Words, M: Memory>(words: &W, memory: &M, page: Page, word: Word, widen: u32) -> Resolution {
    match break_from(words, memory, page, word, widen, private_again) {
        Some(Ok(pages)) => Resolution::Broken(pages),
        Some(Err(errno)) => Resolution::NoRoom(errno),
        None => Resolution::Retry,
    }
}

/// Breaks a shared page seen as `word`, and up to `widen - 1` merged pages after it; `rest` makes the word that each ends in.
/// `None`: the word moved meanwhile.
pub(super) fn break_from<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    page: Page,
    word: Word,
    widen: u32,
    rest: impl Fn(Word) -> Word,
) -> Option<Result<u32, Errno>> {
    if !words.cas(page, word, word.with_state(State::Breaking)) {
        return None;
    }
    let mut span = Span::one(page);
    while span.pages < widen && span.end().0 < words.pages() {
        let next = words.load(span.end());
        if !matches!(next.state(), State::Merged | State::Zero)
            || !words.cas(span.end(), next, next.with_state(State::Breaking))
        {
            break;
        }
        span.pages += 1;
    }
    Some(give_home(words, memory, span, rest).map(|()| span.pages))
}

/// Fills and maps the home pages of a span in Breaking; on failure all of it shows its frames again.
fn give_home<W: Words, M: Memory>(words: &W, memory: &M, span: Span, rest: impl Fn(Word) -> Word) -> Result<(), Errno> {
    failpoint::hit(Failpoint::BreakClaimed);
    let done = memory.fill_home(span).and_then(|()| {
        failpoint::hit(Failpoint::BreakFilled);
        for page in span.iter() {
            words.store(page, words.load(page).with_state(State::Homed));
        }
        memory.map_home(span)
    });
    failpoint::hit(Failpoint::BreakMapped);
    for page in span.iter() {
        let word = words.load(page);
        words.store(page, if done.is_ok() { rest(word) } else { showing(word) });
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

/// Whether a page may lie in the same mapping though its word does not say so now: then nobody knows where the mapping ends.
fn in_motion(word: Word) -> bool {
    word.state().is_transient() || word.state() == State::Frozen
}

/// Claims the whole stretch of pages around `page` that one mapping of frames (or of zeros) covers; gives everything back and
/// returns `None` if any of it belongs to somebody else.
fn claim_stretch<W: Words>(words: &W, page: Page) -> Option<Span> {
    let state = words.load(page).state();
    if !matches!(state, State::Merged | State::Zero) {
        return None;
    }
    let mut first = page;
    while first.0 > 0 {
        let before = words.load(Page(first.0 - 1));
        if in_motion(before) {
            return None;
        }
        if before.state() != state || !continues(before, words.load(first)) {
            break;
        }
        first = Page(first.0 - 1);
    }
    let mut span = Span { first, pages: 0 };
    let mut last: Option<Word> = None;
    while span.end().0 < words.pages() {
        let word = words.load(span.end());
        if in_motion(word) {
            release_stretch(words, span, state);
            return None;
        }
        if word.state() != state || last.is_some_and(|last| !continues(last, word)) {
            break;
        }
        if !words.cas(span.end(), word, word.with_state(State::Breaking)) {
            release_stretch(words, span, state);
            return None;
        }
        last = Some(word);
        span.pages += 1;
    }
    if page >= span.end() {
        release_stretch(words, span, state);
        return None;
    }
    Some(span)
}

fn release_stretch<W: Words>(words: &W, span: Span, state: State) {
    for page in span.iter() {
        words.store(page, words.load(page).with_state(state));
    }
}

/// Breaks everything that the faulting page's mapping covers, so that no mapping is split.
/// `Ok(0)`: somebody else was at it; look again.
pub fn break_stretch<W: Words, M: Memory>(words: &W, memory: &M, page: Page) -> Result<u32, Errno> {
    match claim_stretch(words, page) {
        Some(span) => give_home(words, memory, span, private_again).map(|()| span.pages),
        None => Ok(0),
    }
}

/// The emergency: makes the faulting page's whole mapping writable, so that the kernel copies what is written, and marks its
/// pages Detached. It needs neither a mapping nor a page of the object. `Ok(0)`: somebody else was at it; look again.
pub fn detach_stretch<W: Words, M: Memory>(words: &W, memory: &M, page: Page) -> Result<u32, Errno> {
    let state = words.load(page).state();
    let Some(span) = claim_stretch(words, page) else {
        return Ok(0);
    };
    let done = memory.protect(span, Access::ReadWrite);
    if done.is_err() {
        release_stretch(words, span, state);
    } else {
        for page in span.iter() {
            let word = words.load(page).with_state(State::Detached);
            // A page of zeros lies over no frame; it must not be taken for the object's own page when it is held.
            let marked = if word.frame().is_none() {
                word.with_frame(NO_STORE, Slot::ZERO)
            } else {
                word
            };
            words.store(page, marked);
        }
    }
    done.map(|()| span.pages)
}

/// Stands for "outside the object, over no frame" in the word of a Detached page of zeros. Brokers are told that the number is in
/// use as long as a word holds it.
const NO_STORE: StoreNumber = StoreNumber(u8::MAX);
