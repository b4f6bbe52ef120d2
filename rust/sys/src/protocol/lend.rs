//! Lent pages: what a broker does for others while a client stands still, and how its pages come back.
//!
//! Somebody waits to open an object, and the client that took pages out of it does not answer: it is stopped. Its broker then
//! completes the home pages from their frames (`lend`), owning each word meanwhile as a writer would, and leaves it Homed with the
//! lent mark: complete, perhaps newer than what the client's view still shows, and owned by nobody. Whoever needs such a page
//! in the client, when it runs again, maps the home over it (`take_lent`). The client never needs to know when it was stopped.

use super::fault::continues;
use super::merge::{private_again, showing};
use super::{Memory, Page, Span, Words};
use crate::failpoint::{self, Failpoint};
use crate::word::{Origin, State, Word};
use rustix::io::Errno;

/// The broker's side: makes sure that every home page of a shared span is complete. `complete` fills the home pages of a stretch
/// whose first word is given, frames in consecutive slots (or none: zeros), where they are holes. Pages whose frame is not `known`
/// and pages that a thread of the client owns are left alone: `false`, try again.
///
/// # Errors
/// What `complete` failed with; its pages show their frames again.
pub fn lend<W: Words, E>(
    words: &W,
    span: Span,
    known: impl Fn(Word) -> bool,
    mut complete: impl FnMut(Span, Word) -> Result<(), E>,
) -> Result<bool, E> {
    let mut whole = true;
    let mut page = span.first;
    while page < span.end() {
        let first = words.load(page);
        if !matches!(first.state(), State::Merged | State::Zero) {
            whole &= is_home(first);
            page = page.plus(1);
            continue;
        }
        if !known(first) {
            whole = false;
            page = page.plus(1);
            continue;
        }
        let claimed = claim(words, page, first, span.end());
        if claimed.pages == 0 {
            continue;
        }
        failpoint::hit(Failpoint::BrokerLends);
        let done = complete(claimed, first);
        for page in claimed.iter() {
            let word = words.load(page);
            words.store(
                page,
                if done.is_ok() {
                    word.with_state(State::Homed)
                } else {
                    showing(word)
                },
            );
        }
        done?;
        page = claimed.end();
    }
    Ok(whole)
}

/// Owns the page seen as `word`, and those after it that one stretch of frames, or of zeros, goes on with.
fn claim<W: Words>(words: &W, page: Page, word: Word, end: Page) -> Span {
    let mut span = Span { first: page, pages: 0 };
    let (mut next, mut last) = (word, None);
    while span.end() < end {
        let goes_on = next.state() == word.state() && last.is_none_or(|last| continues(last, next));
        if !goes_on || !words.cas(span.end(), next, next.with_state(State::Breaking).lent()) {
            break;
        }
        last = Some(next);
        span.pages += 1;
        if span.end() < end {
            next = words.load(span.end());
        }
    }
    span
}

/// Whether the page's bytes are in the object, and nobody is about to take them out: a merge under way finds the lease broken before it frees anything.
fn is_home(word: Word) -> bool {
    match word.state() {
        State::Private => true,
        State::Held => word.frame().is_none(),
        State::Freezing | State::Frozen => word.origin() == Origin::Private && word.frame().is_none(),
        State::Homed => word.is_lent(),
        _ => false,
    }
}

/// The client's side, when its broker ended: pages that it owned show their frames again.
pub fn reclaim<W: Words>(words: &W, span: Span) {
    for page in span.iter() {
        let word = words.load(page);
        if is_being_lent(word) {
            words.store(page, showing(word));
        }
    }
}

/// Whether a broker owns the page.
pub fn is_being_lent(word: Word) -> bool {
    word.state() == State::Breaking && word.is_lent()
}

/// Maps the home over a page seen as the lent `word`, and over up to `most - 1` lent pages after it; `rest` makes the word that
/// each ends in. `None`: the word moved meanwhile.
pub(super) fn take_lent<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    page: Page,
    word: Word,
    most: u32,
    rest: impl Fn(Word) -> Word,
) -> Option<Result<u32, Errno>> {
    if !words.cas(page, word, word.unlent()) {
        return None;
    }
    let mut span = Span::one(page);
    while span.pages < most && span.end().0 < words.pages() {
        let next = words.load(span.end());
        if next.state() != State::Homed || !next.is_lent() || !words.cas(span.end(), next, next.unlent()) {
            break;
        }
        span.pages += 1;
    }
    let done = memory.map_home(span);
    for page in span.iter() {
        let word = words.load(page);
        words.store(
            page,
            if done.is_ok() {
                rest(private_again(word))
            } else {
                word.lent()
            },
        );
    }
    Some(done.map(|()| span.pages))
}
