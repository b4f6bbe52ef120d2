//! Regions of forked children: their pages lie where their parent's lay, without ever having been proposed.
//!
//! A child comes with words that its parent's remapper wrote. A page that shows a frame there shows it here, too, and from now on
//! on the child's own account. That the slot still is what it was at the fork is the driver's to promise, for honest children:
//! they keep their parent's life pages mapped until they hear how many pages were counted, so what the parent gave up since is
//! in limbo. A child that lies is believed no further than this: a reference is added to what is a frame anyway, never to a slot that is
//! free, being filled, or about to lose its memory.

use crate::Core;
use crate::frame::Slot;
use crate::limbo::Epoch;
use crate::member::CoreError;
use crate::mutant::{self, Mutant};
use crate::observe::Seen;
use crate::page::{PageNumber, PageRange, Place};
use crate::record::Life;
use crate::region::{ClientId, Kind, RegionId};
use crate::rmap::Rmap;

/// A frame with so many references takes no children's any more: all that can become of them before their epochs are
/// sealed (two in limbo and one over the slot each) still fits the 16 bits of each count.
const REFERENCES_AT_MOST: u32 = 16_384;

/// What became of a region that came by a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Birth {
    /// The region.
    pub region: RegionId,
    /// Its first page.
    pub first: PageNumber,
    /// Pages that name a frame and were not counted: nothing keeps what they show but their parent's life pages.
    pub uncounted: u32,
}

impl Core {
    /// A private region of a forked child is opted in, with one entry in `seen` per page; otherwise as [`Core::region_joined`].
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn region_born(&mut self, client: ClientId, seen: &[Seen], position: u16) -> Result<Birth, CoreError> {
        let pages = u32::try_from(seen.len()).unwrap_or(u32::MAX);
        let (id, first) = self.region_joined(client, Kind::Private, pages, position)?;
        let range = PageRange { first, pages };
        let mut uncounted = 0;
        for (page, &seen) in range.iter().zip(seen) {
            let place = match seen {
                Seen::Merged(slot) => Place::Merged(slot),
                Seen::Broken(slot) | Seen::Detached(slot) | Seen::Held(Some(slot)) => Place::Covering(slot),
                Seen::Zero => Place::Zero,
                Seen::Own | Seen::Unbacked | Seen::Held(None) | Seen::Busy | Seen::Foreign => continue,
            };
            if mutant::active(Mutant::BornUncounted) {
                continue;
            }
            // A page on its way may lie over a slot that has no memory any more. An honest child never shows such a one: its parent's
            // life pages, which it has, keep what it shows.
            let over = match place {
                Place::Merged(slot) => Place::Covering(slot),
                place => place,
            };
            match [place, over].into_iter().find(|place| self.rmap.takes(*place)) {
                Some(place) => self.move_page(page, place, range, client, None),
                None => {
                    uncounted += 1;
                    self.events.disbelieved += 1;
                }
            }
        }
        if mutant::active(Mutant::UnregisteredForgotten) {
            self.clients
                .keys()
                .for_each(|id| self.rmap.sealed(*id, Epoch(u32::MAX)));
        }
        self.refresh(client);
        Ok(Birth {
            region: id,
            first,
            uncounted,
        })
    }
}

impl Rmap {
    /// Whether a page that was never proposed to be there may be counted there.
    fn takes(&self, place: Place) -> bool {
        let Some(slot) = place.slot().filter(|slot| *slot != Slot::ZERO) else {
            return place == Place::Zero;
        };
        self.frames.find(slot).is_some_and(|frame| {
            let fits = match (place, frame.life()) {
                (Place::Merged(_), Life::Filled | Life::Moved | Life::Stale) => true,
                // Its memory may be gone already, but the slot is somebody's.
                (Place::Covering(_), Life::Filled | Life::Moved | Life::Stale | Life::Doomed | Life::Punched) => true,
                _ => false,
            };
            fits && self.frames.references(slot, frame) < REFERENCES_AT_MOST
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;

    const PARENT: ClientId = ClientId(1);
    const CHILD: ClientId = ClientId(2);

    /// A core in which a page of the parent shows a frame.
    fn merged() -> (Core, RegionId, Slot) {
        let mut core = Core::new(4096, Checksum(0));
        core.client_joined(PARENT);
        core.client_joined(CHILD);
        let (region, first) = core.region_joined(PARENT, Kind::Private, 4, 0).unwrap();
        let slot = core.rmap.frames.take(&mut None, 0, &[0])[0].unwrap();
        core.rmap.frames.fill(slot, Checksum(1));
        core.rmap.stable.insert(&mut core.rmap.frames, slot);
        let range = PageRange { first, pages: 4 };
        core.move_page(first, Place::Merged(slot), range, PARENT, None);
        (core, region, slot)
    }

    #[test]
    fn a_frame_lives_on_for_the_child_when_its_parent_is_gone() {
        let (mut core, region, slot) = merged();
        // The parent gave it up since the fork; the child still maps its life page.
        core.region_left(region, Epoch(3));
        assert_eq!(core.stats().pages_shared, 0);
        let birth = core
            .region_born(CHILD, &[Seen::Merged(slot), Seen::Own, Seen::Zero], 5)
            .unwrap();
        assert_eq!(birth.uncounted, 0);
        let stats = core.stats();
        assert_eq!(
            (stats.pages_shared, stats.ksm_zero_pages, stats.references_in_limbo),
            (1, 1, 1)
        );
        core.sealed(PARENT, Epoch(3));
        core.client_gone(PARENT);
        assert_eq!((core.rmap.next_punch(), core.stats().frames), (None, 1));
        core.client_gone(CHILD);
        assert_eq!(core.rmap.next_punch(), Some((slot, 1)));
        assert_eq!(core.slots_taken(), 0);
    }

    #[test]
    fn a_child_is_believed_only_about_what_is_a_frame() {
        let (mut core, _, slot) = merged();
        let filling = core.rmap.frames.take(&mut None, 0, &[1])[0].unwrap();
        let lies = [
            Seen::Merged(filling),
            Seen::Broken(filling),
            Seen::Merged(slot.stepped(7)),
            Seen::Held(Some(slot.stepped(7))),
            Seen::Broken(Slot(4095)),
            Seen::Merged(Slot(4096)),
            Seen::Merged(Slot(u32::MAX - 1)),
            Seen::Merged(Slot::ZERO),
            Seen::Broken(Slot::ZERO),
        ];
        let birth = core.region_born(CHILD, &lies, 0).unwrap();
        assert_eq!(birth.uncounted as usize, lies.len());
        assert_eq!(core.rmap.frames.references(filling, core.rmap.frames.get(filling)), 0);
        core.client_gone(CHILD);
        assert_eq!((core.rmap.next_punch(), core.stats().frames), (None, 1));
    }

    #[test]
    fn a_slot_without_memory_can_be_covered_and_not_shown() {
        let (mut core, region, slot) = merged();
        let page = core.regions.get(region).unwrap().range.first;
        let range = core.regions.get(region).unwrap().range;
        core.move_page(page, Place::Covering(slot), range, PARENT, Some(Epoch(1)));
        core.sealed(PARENT, Epoch(1));
        assert_eq!(core.rmap.next_punch(), Some((slot, 1)));
        let birth = core
            .region_born(CHILD, &[Seen::Broken(slot), Seen::Merged(slot)], 0)
            .unwrap();
        // What is on its way may be a copy by now.
        assert_eq!((birth.uncounted, core.stats().pages_shared), (0, 0));
        core.client_gone(PARENT);
        assert_eq!(core.slots_taken(), 1);
        core.client_gone(CHILD);
        assert_eq!(core.slots_taken(), 0);
    }

    #[test]
    fn children_beyond_what_a_record_can_count_are_told() {
        let (mut core, _, slot) = merged();
        let crowd = vec![Seen::Merged(slot); 1000];
        let uncounted: u32 = (0..20)
            .map(|_| core.region_born(CHILD, &crowd, 0).unwrap().uncounted)
            .sum();
        assert_eq!(uncounted, 20_000 + 1 - REFERENCES_AT_MOST);
        core.client_gone(CHILD);
        core.client_gone(PARENT);
        assert_eq!(core.rmap.next_punch(), Some((slot, 1)));
    }
}
