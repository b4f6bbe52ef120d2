//! The rmap: who keeps a frame.
//!
//! ```text
//!   proposed --> shown --> limbo --> nobody     while any of these: the memory stays
//!                  `-----> covered --> limbo     while any at all:  the slot stays
//! ```
//!
//! The way from a page to its slot is a dense array (`page.rs`); the way back is counts in the frame's record, one per kind
//! of reference; *which* pages show a frame is asked only where frames move, and found by a pass (`migrate.rs`). Every reference
//! that ends goes through limbo, unless its whole client is gone. Relies on `frame.rs`, `stable.rs`, `limbo.rs`; never frees what a count still refers to.

use crate::checksum::Checksum;
use crate::frame::{Frames, Slot};
use crate::limbo::{Epoch, Limbo};
use crate::mutant::{self, Mutant};
use crate::page::Place;
use crate::record::Life;
use crate::region::ClientId;
use crate::stable::StableTree;

pub(crate) struct Rmap {
    pub frames: Frames,
    pub stable: StableTree,
    pub limbo: Limbo,
    /// Frames whose memory is to be given back, sorted downwards when `sorted`.
    doomed: Vec<Slot>,
    sorted: bool,
    /// Frames that at least one page shows.
    pub shared: u32,
    /// Pages that show a frame.
    pub merged: u64,
}

impl Rmap {
    pub(crate) fn new(slots: u32) -> Rmap {
        Rmap {
            frames: Frames::new(slots),
            stable: StableTree::default(),
            limbo: Limbo::default(),
            doomed: Vec::new(),
            sorted: true,
            shared: 0,
            merged: 0,
        }
    }

    /// A page is to be asked to show the frame: it stays until the answer.
    pub(crate) fn propose(&mut self, slot: Slot) {
        if slot != Slot::ZERO {
            self.frames.get_mut(slot).hold();
        }
    }

    /// A proposal that never left, or whose page now shows or covers the frame by itself.
    pub(crate) fn withdraw(&mut self, slot: Slot) {
        if slot != Slot::ZERO {
            self.frames.get_mut(slot).let_go();
            self.settle(slot);
        }
    }

    /// A proposal was answered and the page does not show the frame; a clone of the client made meanwhile may.
    pub(crate) fn retire(&mut self, slot: Slot, client: ClientId, epoch: Epoch) {
        if slot == Slot::ZERO {
            return;
        }
        if mutant::active(Mutant::FrameFreedEarly) {
            return self.withdraw(slot);
        }
        self.limbo.keep(client, epoch, slot);
    }

    /// A page now lies there; what content is in the stable tree again for that.
    pub(crate) fn enter(&mut self, place: Place) -> Option<Checksum> {
        match place {
            Place::Own | Place::Zero => {}
            Place::Merged(slot) => {
                let frame = self.frames.get_mut(slot);
                frame.set_shown(frame.shown() + 1);
                self.shared += u32::from(frame.shown() == 1);
                self.merged += 1;
                if frame.life() == Life::Stale {
                    return Some(self.reinstate(slot));
                }
            }
            Place::Covering(slot) => self.frames.cover(slot, true),
            Place::Detached(slot) => self.frames.get_mut(slot).hold(),
        }
        None
    }

    /// A page no longer lies there; children of the client may until the epoch is sealed.
    pub(crate) fn leave(&mut self, place: Place, client: ClientId, epoch: Epoch) {
        if let Some(slot) = place.slot()
            && !mutant::active(Mutant::FrameFreedEarly)
        {
            self.frames.get_mut(slot).hold();
            self.limbo.keep(client, epoch, slot);
        }
        self.vanish(place);
    }

    /// A page no longer lies there, and no address space that could have inherited it exists.
    pub(crate) fn vanish(&mut self, place: Place) {
        let Some(slot) = place.slot() else { return };
        let frame = self.frames.get_mut(slot);
        match place {
            Place::Merged(_) => {
                frame.set_shown(frame.shown() - 1);
                self.shared -= u32::from(frame.shown() == 0);
                self.merged -= 1;
                if frame.shown() == 0 && frame.life() == Life::Filled {
                    frame.set_life(Life::Stale);
                    self.stable.remove(&mut self.frames, slot);
                }
            }
            Place::Covering(_) => self.frames.cover(slot, false),
            _ => frame.let_go(),
        }
        self.settle(slot);
    }

    /// All life pages of the client up to this epoch took their seals.
    pub(crate) fn sealed(&mut self, client: ClientId, epoch: Epoch) {
        while let Some((first, slots)) = self.limbo.next_sealed(client, epoch) {
            for i in 0..slots {
                self.withdraw(first.stepped(i));
            }
        }
    }

    /// A frame that was never shown is not wanted after all.
    pub(crate) fn abandon(&mut self, slot: Slot, was_written: bool) {
        if was_written {
            self.doom(slot);
        } else {
            self.frames.free(slot);
        }
    }

    fn settle(&mut self, slot: Slot) {
        let frame = self.frames.get(slot);
        match frame.life() {
            Life::Filled if !frame.is_wanted() => {
                self.stable.remove(&mut self.frames, slot);
                self.doom(slot);
            }
            Life::Filled => self.stable.has_room(&self.frames, slot),
            Life::Moved | Life::Stale if !frame.is_wanted() => self.doom(slot),
            Life::Punched if self.frames.references(slot, frame) == 0 => self.frames.free(slot),
            _ => {}
        }
    }

    fn doom(&mut self, slot: Slot) {
        self.frames.doom(slot);
        self.doomed.push(slot);
        self.sorted = false;
    }

    /// The content of `from` was copied to `to`: that is its frame from here on.
    pub(crate) fn replace(&mut self, from: Slot, to: Slot) {
        let checksum = self.frames.get(from).checksum();
        self.stable.remove(&mut self.frames, from);
        self.frames.get_mut(from).set_life(Life::Moved);
        self.frames.fill(to, checksum);
        self.stable.insert(&mut self.frames, to);
        if mutant::active(Mutant::MovedFrameFreed) {
            self.doom(from);
        }
    }

    /// A frame is its content's again: the one that it moved to is gone, or it is shown again.
    pub(crate) fn reinstate(&mut self, slot: Slot) -> Checksum {
        self.frames.get_mut(slot).set_life(Life::Filled);
        self.stable.insert(&mut self.frames, slot);
        self.frames.get(slot).checksum()
    }

    /// Consecutive frames whose memory is to be given back now; from here on they have none.
    pub(crate) fn next_punch(&mut self) -> Option<(Slot, u32)> {
        if !self.sorted {
            self.doomed.sort_unstable_by(|a, b| b.cmp(a));
            self.sorted = true;
        }
        let first = self.doomed.pop()?;
        let mut slots = 1;
        while self.doomed.pop_if(|next| next.0 == first.0 + slots).is_some() {
            slots += 1;
        }
        for i in 0..slots {
            let slot = first.stepped(i);
            self.frames.get_mut(slot).set_life(Life::Punched);
            self.settle(slot);
        }
        Some((first, slots))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::stable::Search;
    use crate::tunables::MOST_SHARING;

    const CLIENT: ClientId = ClientId(1);

    fn one_frame() -> (Rmap, Slot) {
        let mut rmap = Rmap::new(4096);
        let slot = rmap.frames.take(&mut None, 0, &[9])[0].unwrap();
        rmap.frames.fill(slot, Checksum(1));
        rmap.stable.insert(&mut rmap.frames, slot);
        rmap.propose(slot);
        rmap.enter(Place::Merged(slot));
        rmap.withdraw(slot);
        (rmap, slot)
    }

    #[test]
    fn a_broken_page_keeps_the_slot_and_its_children_keep_the_memory() {
        let (mut rmap, slot) = one_frame();
        rmap.enter(Place::Covering(slot));
        rmap.leave(Place::Merged(slot), CLIENT, Epoch(4));
        assert_eq!(rmap.next_punch(), None);
        rmap.sealed(CLIENT, Epoch(3));
        assert_eq!(rmap.next_punch(), None);
        rmap.sealed(CLIENT, Epoch(4));
        assert_eq!(rmap.next_punch(), Some((slot, 1)));
        assert_eq!((rmap.frames.filled, rmap.frames.taken()), (0, 1));
        rmap.leave(Place::Covering(slot), CLIENT, Epoch(5));
        assert_eq!(rmap.frames.taken(), 1);
        rmap.sealed(CLIENT, Epoch(5));
        assert_eq!(rmap.frames.taken(), 0);
    }

    #[test]
    fn what_nobody_shows_any_more_is_not_found_but_may_be_shown_again() {
        let (mut rmap, slot) = one_frame();
        rmap.propose(slot);
        rmap.leave(Place::Merged(slot), CLIENT, Epoch(4));
        assert_eq!(
            (rmap.shared, rmap.stable.search(&rmap.frames, Checksum(1), 100)),
            (0, Search::Absent)
        );
        rmap.enter(Place::Merged(slot));
        rmap.withdraw(slot);
        assert_eq!(
            (rmap.shared, rmap.stable.search(&rmap.frames, Checksum(1), 100)),
            (1, Search::Room(slot))
        );
        rmap.leave(Place::Merged(slot), CLIENT, Epoch(5));
        assert_eq!(rmap.next_punch(), None, "children may show it still");
        rmap.sealed(CLIENT, Epoch(5));
        assert_eq!(rmap.next_punch(), Some((slot, 1)));
        assert_eq!(rmap.frames.taken(), 0);
    }

    #[test]
    fn a_refused_proposal_waits_for_its_epoch_too() {
        let (mut rmap, slot) = one_frame();
        rmap.propose(slot);
        rmap.vanish(Place::Merged(slot));
        rmap.retire(slot, CLIENT, Epoch(1));
        assert_eq!(rmap.next_punch(), None);
        rmap.sealed(CLIENT, Epoch(1));
        assert_eq!(rmap.next_punch(), Some((slot, 1)));
        assert_eq!(rmap.frames.taken(), 0);
    }

    /// What a client may make of a page that shows a frame, one step a look, while its epochs stay unsealed: each step leaves one
    /// more reference in limbo.
    #[test]
    fn a_record_counts_whatever_becomes_of_as_many_pages_as_may_share_a_frame() {
        let (mut rmap, slot) = one_frame();
        let mut accepted = 0;
        while rmap.stable.search(&rmap.frames, Checksum(1), MOST_SHARING) == Search::Room(slot) {
            rmap.propose(slot);
            rmap.enter(Place::Merged(slot));
            rmap.withdraw(slot);
            accepted += 1;
        }
        assert_eq!(accepted, MOST_SHARING - 1);
        let steps = [
            Place::Merged(slot),
            Place::Detached(slot),
            Place::Covering(slot),
            Place::Own,
        ];
        for step in steps.windows(2) {
            for _ in 0..=accepted {
                rmap.enter(step[1]);
                rmap.leave(step[0], CLIENT, Epoch(1));
            }
        }
        assert_eq!(rmap.limbo.len(), 3 * u64::from(MOST_SHARING));
        rmap.sealed(CLIENT, Epoch(1));
        assert_eq!(rmap.next_punch(), Some((slot, 1)));
        assert_eq!(rmap.frames.taken(), 0);
    }
}
