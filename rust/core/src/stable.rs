//! The stable tree: merged frames by content.
//!
//! One frame per content is *listed* in a hash table of bare slot numbers (the checksum lies in the frame's record). Once a
//! frame has `max_page_sharing` pages a further frame of the same content is made; then the content is a chain and its frames
//! are dups, as in the kernel. A dup that has room again becomes the listed one. Relies on `frame.rs`; never frees anything.

use crate::checksum::{Checksum, spread};
use crate::frame::{Frames, Slot};
use crate::table::Table;
use crate::tunables::MOST_SHARING;
use hashbrown::HashMap;

#[derive(Default)]
pub(crate) struct StableTree {
    listed: Table,
    chains: HashMap<Checksum, Vec<Slot>>,
    dups: u32,
}

/// What there is of a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// This frame takes one more page.
    Room(Slot),
    /// No frame that was asked does.
    Full,
    /// There is no frame of it.
    Absent,
}

/// How many dups of a chain are asked for room when the listed one has none.
const DUPS_ASKED: usize = 8;

impl StableTree {
    /// A frame of this content with room for one more page.
    pub(crate) fn search(&mut self, frames: &Frames, checksum: Checksum, max_page_sharing: u32) -> Search {
        let has_room = |slot: Slot| {
            let frame = frames.get(slot);
            frame.sharing() < max_page_sharing && frames.references(slot, frame) < MOST_SHARING
        };
        let Some(listed) = self.listed(frames, checksum) else {
            return Search::Absent;
        };
        if has_room(listed) {
            return Search::Room(listed);
        }
        let Some(dups) = self.chains.get_mut(&checksum) else {
            return Search::Full;
        };
        let asked = dups.len().min(DUPS_ASKED);
        let found = dups[..asked].iter().copied().find(|&dup| has_room(dup));
        // The next search begins with others.
        dups.rotate_left(asked);
        let Some(dup) = found else { return Search::Full };
        self.list(frames, checksum, dup);
        Search::Room(dup)
    }

    /// Fetches what a search for this content will read; see [`Table::warm`].
    pub(crate) fn warm(&self, frames: &Frames, checksum: Checksum) -> u32 {
        self.listed
            .warm(spread(checksum.tag()), |slot| frames.get(Slot(slot)).checksum().tag())
    }

    fn listed(&self, frames: &Frames, checksum: Checksum) -> Option<Slot> {
        let same = |&slot: &u32| frames.get(Slot(slot)).checksum() == checksum;
        self.listed.find(spread(checksum.tag()), same).map(Slot)
    }

    fn list(&mut self, frames: &Frames, checksum: Checksum, slot: Slot) {
        let same = |&slot: &u32| frames.get(Slot(slot)).checksum() == checksum;
        if let Some(listed) = self.listed.find_mut(spread(checksum.tag()), same) {
            *listed = slot.0;
        }
    }

    /// Files a filled frame.
    pub(crate) fn insert(&mut self, frames: &mut Frames, slot: Slot) {
        let checksum = frames.get(slot).checksum();
        let Some(other) = self.listed(frames, checksum) else {
            self.listed.insert(spread(checksum.tag()), slot.0, hash_in(frames));
            return;
        };
        let dups = self.chains.entry(checksum).or_default();
        if dups.is_empty() {
            dups.push(other);
            self.dups += 1;
            frames.get_mut(other).set_dup(true);
        }
        dups.push(slot);
        self.dups += 1;
        frames.get_mut(slot).set_dup(true);
        self.list(frames, checksum, slot);
    }

    /// A dup has room again: the next page of its content goes there.
    pub(crate) fn has_room(&mut self, frames: &Frames, slot: Slot) {
        let frame = frames.get(slot);
        if frame.is_dup() {
            self.list(frames, frame.checksum(), slot);
        }
    }

    /// Takes a frame out; the last dup of a chain is an ordinary node again.
    pub(crate) fn remove(&mut self, frames: &mut Frames, slot: Slot) {
        let checksum = frames.get(slot).checksum();
        if let Some(dups) = self.chains.get_mut(&checksum).filter(|_| frames.get(slot).is_dup()) {
            dups.retain(|&dup| dup != slot);
            self.dups -= 1;
            frames.get_mut(slot).set_dup(false);
            let heir = dups[0];
            if dups.len() == 1 {
                frames.get_mut(heir).set_dup(false);
                self.dups -= 1;
                self.chains.remove(&checksum);
            }
            if self.listed(frames, checksum) == Some(slot) {
                self.list(frames, checksum, heir);
            }
            return;
        }
        self.listed.remove(spread(checksum.tag()), slot.0, hash_in(frames));
    }

    pub(crate) fn chains(&self) -> u32 {
        self.chains.len() as u32
    }

    pub(crate) fn dups(&self) -> u32 {
        self.dups
    }

    pub(crate) fn bytes(&self) -> usize {
        self.listed.bytes() + self.chains.allocation_size() + self.dups as usize * size_of::<Slot>()
    }
}

fn hash_in(frames: &Frames) -> impl Fn(&u32) -> u64 {
    |&slot| spread(frames.get(Slot(slot)).checksum().tag())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(frames: &mut Frames, tree: &mut StableTree, count: u16, checksum: u64) -> Vec<Slot> {
        let positions: Vec<u16> = (0..count).collect();
        let slots: Vec<Slot> = frames.take(&mut None, 0, &positions).into_iter().flatten().collect();
        for &slot in &slots {
            frames.fill(slot, Checksum(checksum));
            tree.insert(frames, slot);
        }
        slots
    }

    #[test]
    fn a_full_frame_is_not_found_and_a_second_makes_a_chain() {
        let (mut frames, mut tree) = (Frames::new(4096), StableTree::default());
        let a = filled(&mut frames, &mut tree, 1, 5)[0];
        assert_eq!(tree.search(&frames, Checksum(5), 2), Search::Room(a));
        assert_eq!(tree.search(&frames, Checksum(6), 2), Search::Absent);
        frames.get_mut(a).set_shown(2);
        assert_eq!(tree.search(&frames, Checksum(5), 2), Search::Full);
        let b = filled(&mut frames, &mut tree, 2, 5)[1];
        assert_eq!((tree.chains(), tree.dups()), (1, 3));
        assert!(matches!(tree.search(&frames, Checksum(5), 2), Search::Room(slot) if slot != a));
        tree.remove(&mut frames, b);
        let Search::Room(c) = tree.search(&frames, Checksum(5), 2) else {
            panic!("one has room")
        };
        frames.get_mut(c).set_shown(2);
        assert_eq!(tree.search(&frames, Checksum(5), 2), Search::Full);
        frames.get_mut(a).set_shown(1);
        tree.has_room(&frames, a);
        assert_eq!(tree.search(&frames, Checksum(5), 2), Search::Room(a));
        for _ in 0..100 {
            frames.cover(a, true);
        }
        assert_eq!(
            tree.search(&frames, Checksum(5), 2),
            Search::Room(a),
            "what was written only lies over it"
        );
        for _ in 100..MOST_SHARING {
            frames.cover(a, true);
        }
        assert_eq!(tree.search(&frames, Checksum(5), 2), Search::Full);
        for _ in 0..MOST_SHARING {
            frames.cover(a, false);
        }
        tree.remove(&mut frames, a);
        assert_eq!((tree.chains(), tree.dups()), (0, 0));
        frames.get_mut(c).set_shown(0);
        assert_eq!(tree.search(&frames, Checksum(5), 2), Search::Room(c));
        tree.remove(&mut frames, c);
        assert_eq!(tree.search(&frames, Checksum(5), 2), Search::Absent);
    }
}
