//! A forked child's regions join: where their pages are is read from its words, which its parent wrote.
//!
//! Relies on core to believe them only about slots that are frames. For an honest child each of them is the frame that it was at the
//! fork, whatever its parent did since (unmerged it, closed the region, disconnected, died): what a client gives up waits for
//! the seal of the epoch's life page, and the child keeps those of its parent mapped until it hears Joined for all of its regions.

use ksmrs_core::{Seen, Slot};
use ksmrs_sys::{State, StoreNumber, Word};

use crate::domain::Domain;
use crate::session::{Seat, Session};
use crate::wire::Kind;

impl Domain {
    /// As `join`, for a region that came by a fork.
    pub(crate) fn join_born(
        &mut self,
        session: &mut Session,
        region: u32,
        kind: Kind,
        (first_word, pages): (u32, u32),
        position: u16,
    ) -> Result<u32, String> {
        if !session.is_born {
            return Err("its client was not born of one of this store".to_owned());
        }
        if kind != Kind::Private {
            return Err("shared regions are not born".to_owned());
        }
        let Some(table) = &session.table else {
            return Err("there is no table".to_owned());
        };
        let words = (first_word..first_word + pages).map(|word| table.word(word).unwrap_or_default());
        let seen: Vec<Seen> = words.map(|word| named(word, session.store)).collect();
        let birth = self.core.region_born(session.id, &seen, position);
        let birth = birth.map_err(|error| error.to_string())?;
        if birth.uncounted > 0 {
            tracing::info!(
                client = session.id.0,
                region,
                uncounted = birth.uncounted,
                "pages of a child stay on its parent's account"
            );
        }
        let seat = Seat {
            region: birth.region,
            first_word,
            pages,
            first_page: birth.first,
        };
        self.seat(session, region, seat);
        Ok(birth.uncounted)
    }
}

/// What a word of a child names. A page on its way (an unmerge, the end of its region) still lies over its slot, and shows the
/// frame at worst; the next scan, or Leave, tells where it went.
fn named(word: Word, store: StoreNumber) -> Seen {
    let slot = word
        .frame()
        .filter(|&(number, _)| number == store)
        .map(|(_, slot)| Slot(slot.0));
    match (word.checked_state(), slot) {
        (Some(State::Broken | State::Detached), Some(slot)) => Seen::Broken(slot),
        (Some(State::Held), Some(slot)) => Seen::Held(Some(slot)),
        (_, Some(slot)) => Seen::Merged(slot),
        (Some(State::Zero), None) if word.frame().is_none() => Seen::Zero,
        _ => Seen::Own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_names_its_slot_whatever_happens_to_its_page() {
        let (store, other) = (StoreNumber(3), StoreNumber(4));
        let over = |state| Word::PRIVATE.with_state(state).with_frame(store, ksmrs_sys::Slot(7));
        for state in [State::Merged, State::Breaking, State::Leaving, State::Frozen] {
            assert_eq!(named(over(state), store), Seen::Merged(Slot(7)));
            assert_eq!(named(over(state), other), Seen::Own);
        }
        assert_eq!(named(over(State::Broken), store), Seen::Broken(Slot(7)));
        assert_eq!(named(over(State::Held), store), Seen::Held(Some(Slot(7))));
        assert_eq!(named(over(State::Held).without_frame(), store), Seen::Own);
        assert_eq!(named(Word::PRIVATE.with_state(State::Zero), store), Seen::Zero);
        assert_eq!(
            named(
                Word::PRIVATE
                    .with_state(State::Zero)
                    .with_frame(other, ksmrs_sys::Slot::ZERO),
                store
            ),
            Seen::Own
        );
    }
}
