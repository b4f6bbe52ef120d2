//! Taking pages out of the protocol: unmerge and pin (they end in Held), leave (plain memory again) and abandon.
//!
//! The program's own threads run this, without scanner or broker. They wait for transient words, but only while they own none
//! themselves; a stretch is claimed as far as it can be had at once, finished, and then the next begins.

use super::fault::{Bridge, break_around};
use super::lend::{is_being_lent, take_lent};
use super::merge::private_again;
use super::{Access, Kind, MAX_RUN, Memory, Page, Span, Words};
use crate::failpoint::{self, Failpoint};
use crate::word::{Origin, State, Word};
use rustix::io::Errno;

/// Gives every page of the span memory of its own and holds it out of the protocol. On an error the pages before the failing
/// one are Held, the others as they were.
pub fn unmerge<W: Words, M: Memory>(words: &W, memory: &M, span: Span) -> Result<(), Errno> {
    let mut page = span.first;
    while page < span.end() {
        let room = (span.end().0 - page.0).min(MAX_RUN as u32);
        page = page.plus(unmerge_from(words, memory, page, room)?);
    }
    Ok(())
}

/// Holds the page, and as many after it as can be handled along; how many, 0 to look again.
fn unmerge_from<W: Words, M: Memory>(words: &W, memory: &M, page: Page, room: u32) -> Result<u32, Errno> {
    let word = words.load(page);
    match (word.state(), memory.kind()) {
        (State::Held, _) => Ok(1),
        (State::Private | State::Broken | State::Detached, _) | (State::Zero, Kind::Private) => {
            Ok(u32::from(words.cas(page, word, word.with_state(State::Held))))
        }
        (State::Merged, Kind::Private) => copy_from(words, memory, page, word, room),
        (State::Merged | State::Zero, Kind::Shared) => {
            let held = |word| private_again(word).with_state(State::Held);
            let rest = Span {
                first: page,
                pages: room,
            };
            break_around(words, memory, page, word, rest, Bridge::Nothing, held)
                .map_or(Ok(0), |broken| broken.map(|broken| broken.pages))
        }
        // A writer's mark is for the remapper to answer.
        (State::Frozen, _) if word.is_cancelled() => {
            words.wait(page, word);
            Ok(0)
        }
        (State::Frozen, kind) => {
            let resting = word
                .uncancelled()
                .with_state(word.origin().state())
                .with_origin(Origin::Private);
            if !words.cas(page, word, word.with_state(State::Breaking)) {
                return Ok(0);
            }
            // A shared page frozen while it showed a frame is read-only at rest too.
            let thawed = if kind == Kind::Shared && resting.state() == State::Merged {
                Ok(())
            } else {
                memory.protect(Span::one(page), Access::ReadWrite)
            };
            words.store(page, if thawed.is_ok() { resting } else { word.cancelled() });
            if thawed.is_err() {
                words.wait(page, word.cancelled());
            }
            Ok(0)
        }
        (State::Homed, Kind::Shared) if word.is_lent() => {
            let held = |word: Word| word.with_state(State::Held);
            take_lent(words, memory, page, word, room, held).unwrap_or(Ok(0))
        }
        (State::Freezing | State::Committing | State::Breaking | State::Homed | State::Leaving, _) => {
            words.wait(page, word);
            Ok(0)
        }
    }
}

/// Copies merged private pages from `page` on, as a write to each would, and holds them over their slots.
fn copy_from<W: Words, M: Memory>(words: &W, memory: &M, page: Page, word: Word, room: u32) -> Result<u32, Errno> {
    if !words.cas(page, word, word.with_state(State::Breaking)) {
        return Ok(0);
    }
    let mut span = Span::one(page);
    while span.pages < room {
        let next = words.load(span.end());
        if next.state() != State::Merged || !words.cas(span.end(), next, next.with_state(State::Breaking)) {
            break;
        }
        span.pages += 1;
    }
    failpoint::hit(Failpoint::UnmergeClaimed);
    let done = memory.copy_own(span);
    let rests = if done.is_ok() { State::Held } else { State::Merged };
    for page in span.iter() {
        words.store(page, words.load(page).with_state(rests));
    }
    done.map(|()| span.pages)
}

/// Lets held pages take part again.
pub fn reopen<W: Words, M: Memory>(words: &W, memory: &M, span: Span) {
    for page in span.iter() {
        let word = words.load(page);
        if word.state() != State::Held {
            continue;
        }
        let state = match (word.frame(), memory.kind()) {
            (None, _) => State::Private,
            (Some(_), Kind::Private) => State::Broken,
            (Some(_), Kind::Shared) => State::Detached,
        };
        words.cas(page, word, word.with_state(state));
    }
}

/// Whether a resting private page is anonymous memory already.
fn is_plain(word: Word) -> bool {
    match word.state() {
        State::Private | State::Zero | State::Held => word.frame().is_none(),
        State::Frozen => word.frame().is_none(),
        _ => false,
    }
}

/// Ends the protocol for the span: all of it is plain memory again (anonymous, or the object's), with its bytes, Held and
/// over no slot. `before` is room for the words that a run was claimed from. EAGAIN: the broker owns a page, shared regions only. On an error the pages before the failing stretch are plain, the others as they were.
pub fn leave<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    span: Span,
    before: &mut [Word; MAX_RUN],
) -> Result<(), Errno> {
    let mut page = span.first;
    while page < span.end() {
        let room = (span.end().0 - page.0).min(MAX_RUN as u32);
        let gone = match memory.kind() {
            Kind::Private => leave_private(
                words,
                memory,
                Span {
                    first: page,
                    pages: room,
                },
                before,
            )?,
            Kind::Shared => leave_shared(words, memory, page, room)?,
        };
        page = page.plus(gone);
    }
    Ok(())
}

fn leave_shared<W: Words, M: Memory>(words: &W, memory: &M, page: Page, room: u32) -> Result<u32, Errno> {
    let word = words.load(page);
    if word.state() == State::Held && word.frame().is_some() {
        // Detached before it was held: bring it home, which needs it in the protocol for that long.
        words.cas(page, word, word.with_state(State::Detached));
        return Ok(0);
    }
    if word.state() == State::Detached {
        super::bring_home(words, memory, page)?;
        return Ok(0);
    }
    if is_being_lent(word) {
        // Whoever leaves may be the one to find out that the broker is gone.
        return Err(Errno::AGAIN);
    }
    unmerge_from(words, memory, page, room)
}

fn leave_private<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    span: Span,
    before: &mut [Word; MAX_RUN],
) -> Result<u32, Errno> {
    let mut claimed = Span {
        first: span.first,
        pages: 0,
    };
    let mut plain = true;
    while claimed.end() < span.end() {
        let page = claimed.end();
        let word = words.load(page);
        if word.state().is_transient() {
            if claimed.pages == 0 {
                words.wait(page, word);
                return Ok(0);
            }
            break;
        }
        if !words.cas(page, word, word.uncancelled().with_state(State::Leaving)) {
            break;
        }
        before[claimed.pages as usize] = word;
        plain &= is_plain(word);
        claimed.pages += 1;
    }
    failpoint::hit(Failpoint::LeaveClaimed);
    let done = if !plain {
        memory
            .protect(claimed, Access::ReadOnly)
            .and_then(|()| memory.make_plain(claimed))
    } else if before[..claimed.pages as usize]
        .iter()
        .any(|word| word.state() == State::Frozen)
    {
        memory.protect(claimed, Access::ReadWrite)
    } else {
        Ok(())
    };
    if done.is_err() {
        memory.protect(claimed, Access::ReadWrite).ok();
    }
    for (page, word) in claimed.iter().zip(before.iter().copied()) {
        let thawed = if word.state() == State::Frozen {
            word.with_state(word.origin().state())
        } else {
            word
        };
        let plain = private_again(word).with_state(State::Held);
        words.store(page, if done.is_ok() { plain } else { thawed.uncancelled() });
    }
    done.map(|()| claimed.pages)
}

/// Takes every page for good, waiting for those that somebody owns: the memory is about to be unmapped, nothing is copied.
pub fn claim_all<W: Words>(words: &W, span: Span) {
    for page in span.iter() {
        loop {
            let word = words.load(page);
            if word.is_owned() {
                words.wait(page, word);
            } else if words.cas(page, word, word.with_state(State::Leaving)) {
                break;
            }
        }
    }
}
