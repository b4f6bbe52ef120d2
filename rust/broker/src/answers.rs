//! Answers of clients to orders: what their words say now, in core's terms.
//!
//! A report only says *when* to look: the words were stored before it was sent and are loaded after it arrived, and they alone
//! are believed. What a word names is believed only as far as core proposed it.

use std::time::Duration;

use ksmrs_core::{Checksum, Epoch, Observation, Observations, OrderId, RunFailure, Seen, Slot};
use ksmrs_sys::checksum::ChecksumWord;
use ksmrs_sys::failpoint::{self, Failpoint};
use ksmrs_sys::mutant::{self, Mutant};
use ksmrs_sys::{EXTENT_PAGES, State, StoreNumber, Word};

use crate::domain::{Domain, Part, Task};
use crate::offence::Offence;
use crate::session::Session;
use crate::wire::{Bits, Failure, RunOutcome};

/// A word in core's terms. Words of another store are what their memory is: the client's own.
fn seen(word: Word, store: StoreNumber, has_checksum: bool) -> Seen {
    let slot = word
        .frame()
        .filter(|&(number, _)| number == store)
        .map(|(_, slot)| Slot(slot.0));
    match (word.checked_state(), slot) {
        (Some(State::Private), _) if has_checksum => Seen::Own,
        (Some(State::Private), _) => Seen::Unbacked,
        (Some(State::Merged), Some(slot)) => Seen::Merged(slot),
        (Some(State::Broken), Some(slot)) => Seen::Broken(slot),
        (Some(State::Detached), Some(slot)) => Seen::Detached(slot),
        (Some(State::Merged | State::Broken | State::Detached), None) if has_checksum => Seen::Own,
        (Some(State::Merged | State::Broken | State::Detached), None) => Seen::Unbacked,
        // An old store's zero page has no memory either, but it is not this core's doing.
        (Some(State::Zero), _) if word.frame().is_some_and(|(number, _)| number != store) => Seen::Unbacked,
        (Some(State::Zero), _) => Seen::Zero,
        (Some(State::Held), slot) => Seen::Held(slot),
        (Some(State::Freezing | State::Frozen | State::Committing | State::Breaking | State::Homed), _) => Seen::Busy,
        (Some(State::Leaving) | None, _) => Seen::Foreign,
    }
}

/// The words of an order's pages, read when core asks for them.
struct Scanned<'a> {
    session: &'a Session,
    pass: u16,
    /// How many pages come before each part, the part, and whether its words still are its region's.
    parts: Vec<(usize, Part, bool)>,
    pages: usize,
}

impl Scanned<'_> {
    /// The word of a page, and how many of the same part follow it; `None` where it is its region's no more.
    fn word(&self, page: usize) -> Option<(u32, usize)> {
        let part = self
            .parts
            .partition_point(|(before, ..)| *before <= page)
            .checked_sub(1)?;
        let (before, part, there) = &self.parts[part];
        let offset = page - before;
        let left = (part.pages as usize).checked_sub(offset)?;
        there.then_some((part.first_word + offset as u32, left))
    }
}

impl Observations for Scanned<'_> {
    fn pages(&self) -> usize {
        self.pages
    }

    fn of(&self, page: usize) -> Observation {
        self.word(page).map_or(Observation::NONE, |(word, _)| {
            observe(self.session, word, Some(self.pass))
        })
    }

    fn epoch(&self) -> Epoch {
        self.session.epoch()
    }

    fn unchanged(&self, first: usize, checksums: &mut [Checksum]) -> bool {
        let (Some((word, left)), Some(table)) = (self.word(first), &self.session.table) else {
            return false;
        };
        checksums.len() <= left
            && table.unchanged(word, self.pass, checksums.iter_mut().map(|checksum| &mut checksum.0))
    }
}

fn observe(session: &Session, word: u32, pass: Option<u16>) -> Observation {
    let Some(table) = &session.table else {
        return Observation::NONE;
    };
    let (Some(state), Some(checksum)) = (table.word(word), table.checksum(word)) else {
        return Observation::NONE;
    };
    let known = checksum.checksum48();
    let checksum = known.map(|value| (Checksum(value), pass == Some(ChecksumWord::pass16(checksum))));
    Observation {
        seen: seen(state, session.store, known.is_some()),
        checksum,
    }
}

fn expect(message: &'static str, order: u32, found: usize, expected: usize) -> Result<(), Offence> {
    if found == expected {
        Ok(())
    } else {
        Err(Offence::Results {
            message,
            order,
            found,
            expected,
        })
    }
}

impl Domain {
    /// Scanned.
    pub(crate) fn scanned(&mut self, session: &Session, order: u32, now: Duration) -> Result<(), Offence> {
        let is_scan = |task: &Task| matches!(task, Task::Scan { .. });
        let Task::Scan { pass, parts } = self.take_order("Scanned", order, session.id, is_scan)? else {
            return Ok(());
        };
        let mut scanned = Scanned {
            session,
            pass,
            parts: Vec::with_capacity(parts.len()),
            pages: 0,
        };
        for part in parts {
            scanned.parts.push((scanned.pages, part, self.is_there(&part, session)));
            scanned.pages += part.pages as usize;
        }
        self.core.scanned(OrderId(order), &scanned, now);
        Ok(())
    }

    /// Staged: the frames are filled at once, for the client may change its staging area as it likes.
    pub(crate) fn staged(&mut self, session: &Session, order: u32, copied: &Bits) -> Result<(), Offence> {
        let is_stage = |task: &Task| matches!(task, Task::Stage { .. });
        let Task::Stage { pages } = self.take_order("Staged", order, session.id, is_stage)? else {
            return Ok(());
        };
        copied.check(pages as u32)?;
        let fills = self.core.staged(OrderId(order), &|index| copied.get(index as u32));
        if fills.is_empty() {
            return Ok(());
        }
        let mut checksums = Vec::with_capacity(pages);
        for fill in &fills {
            self.fill(session, fill, &mut checksums);
        }
        failpoint::hit(Failpoint::BrokerFilled);
        self.core.filled(OrderId(order), &checksums);
        Ok(())
    }

    /// Mapped.
    pub(crate) fn mapped(&mut self, session: &Session, order: u32, outcomes: &[RunOutcome]) -> Result<(), Offence> {
        let is_map = |task: &Task| matches!(task, Task::Map { .. });
        let Task::Map { parts } = self.take_order("Mapped", order, session.id, is_map)? else {
            return Ok(());
        };
        // Runs whose region had left were never sent, so they have no outcome.
        expect(
            "Mapped",
            order,
            outcomes.len(),
            parts.iter().filter(|part| part.region.is_some()).count(),
        )?;
        let mut reported = outcomes.iter();
        let mut results = Vec::with_capacity(parts.len());
        for part in &parts {
            let outcome = if part.region.is_some() { reported.next() } else { None };
            if let Some(outcome) = outcome {
                outcome.merged.check(part.pages)?;
            }
            let mut result = ksmrs_core::RunOutcome {
                failure: outcome
                    .and_then(|outcome| outcome.failure)
                    .map(|failure| match failure {
                        Failure::Mappings => RunFailure::MappingLimit,
                        Failure::WouldSplit => RunFailure::WouldSplit,
                        Failure::NotAlone => RunFailure::NotAlone,
                        _ => RunFailure::Other,
                    }),
                ..Default::default()
            };
            if self.is_there(part, session) {
                for index in 0..part.pages.min(EXTENT_PAGES) {
                    let (word, bit) = ((index / 64) as usize, 1 << (index % 64));
                    match shown(session, part, index) {
                        Shown::Merged => result.merged[word] |= bit,
                        Shown::Covering => result.covering[word] |= bit,
                        Shown::No => {}
                    }
                }
            }
            results.push(result);
        }
        self.core.mapped(OrderId(order), session.epoch(), &results);
        Ok(())
    }

    /// Unmapped.
    pub(crate) fn unmapped(&mut self, session: &Session, order: u32) -> Result<(), Offence> {
        let is_unmap = |task: &Task| matches!(task, Task::Unmap { .. });
        let Task::Unmap { parts } = self.take_order("Unmapped", order, session.id, is_unmap)? else {
            return Ok(());
        };
        let mut places = Vec::with_capacity(parts.iter().map(|part| part.pages as usize).sum());
        for part in &parts {
            let there = self.is_there(part, session);
            places.extend((0..part.pages).map(|index| {
                if there {
                    observe(session, part.first_word + index, None).seen
                } else {
                    Seen::Foreign
                }
            }));
        }
        self.core.unmapped(OrderId(order), session.epoch(), &places);
        Ok(())
    }

    /// The client did nothing of an order.
    pub(crate) fn failed(&mut self, session: &Session, order: u32, failure: Failure) -> Result<(), Offence> {
        self.take_order("Failed", order, session.id, |_| true)?;
        tracing::info!(
            client = session.id.0,
            order,
            ?failure,
            "the client did not carry out an order"
        );
        self.core.order_refused(OrderId(order), session.epoch());
        Ok(())
    }
}

enum Shown {
    Merged,
    Covering,
    No,
}

/// What a page shows of the slot that was proposed for it.
fn shown(session: &Session, part: &Part, index: u32) -> Shown {
    let Some(word) = session
        .table
        .as_ref()
        .and_then(|table| table.word(part.first_word + index))
    else {
        return Shown::No;
    };
    let zero = part.slot == ksmrs_sys::Slot::ZERO.0;
    let proposed = if zero {
        ksmrs_sys::Slot::ZERO
    } else {
        ksmrs_sys::Slot(part.slot + index)
    };
    let named = word.frame() == Some((session.store, proposed));
    match word.checked_state() {
        Some(State::Zero) if zero => Shown::Merged,
        Some(State::Leaving) if named && mutant::active(Mutant::LeavingCovers) => Shown::Covering,
        Some(State::Merged | State::Detached) if named => Shown::Merged,
        // Whoever is at it may be reading the frame: a break on its way, a page that is copied to leave, a freeze of one that was
        // merged already. Where it ends is seen by the next scan.
        Some(state) if named && state.is_in_motion() => Shown::Merged,
        Some(State::Broken | State::Held) if named && !zero => Shown::Covering,
        _ => Shown::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_another_store_are_the_clients_own() {
        let (ours, other) = (StoreNumber(2), StoreNumber(1));
        let slot = ksmrs_sys::Slot(9);
        for state in [State::Merged, State::Broken, State::Detached] {
            let word = Word::PRIVATE.with_state(state);
            assert_eq!(seen(word.with_frame(other, slot), ours, true), Seen::Own);
            assert_eq!(seen(word.with_frame(other, slot), ours, false), Seen::Unbacked);
        }
        let merged = Word::PRIVATE.with_state(State::Merged).with_frame(ours, slot);
        assert_eq!(seen(merged, ours, false), Seen::Merged(Slot(9)));
        assert_eq!(seen(merged.with_state(State::Held), other, true), Seen::Held(None));
        assert_eq!(seen(merged.with_state(State::Homed), ours, true), Seen::Busy);
        assert_eq!(seen(Word(15), ours, true), Seen::Foreign);
        assert_eq!(seen(Word::PRIVATE, ours, false), Seen::Unbacked);
    }
}
