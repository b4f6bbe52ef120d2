//! Where free pages of the arenas are: pure bookkeeping, by size and by place.
//!
//! Free runs hold no memory and read as zeros; neighbours are always one run. Blocks that were returned with their memory wait in bins, by
//! size, last in first out, for the next block of that size; those at the bottom that nobody came for are surplus. Nothing here looks at
//! a page.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Pages of a 2 MiB unit. Blocks of that size and more begin with one, so that equal ones can be equal huge pages.
pub(super) const UNIT: u32 = crate::object::EXTENT_PAGES;

/// Where a run or a block is: its arena, and its first page there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) arena: u32,
    pub(super) first: u32,
}

/// The size that blocks for so many pages have: eight sizes to each power of two, so that few are unlike.
pub(super) fn size_of(pages: u32) -> u32 {
    let step = 1 << pages.ilog2().saturating_sub(3);
    pages.next_multiple_of(step)
}

/// Free pages.
#[derive(Default)]
pub(super) struct Room {
    by_size: BTreeSet<(u32, Place)>,
    by_place: BTreeMap<Place, u32>,
}

impl Room {
    pub(super) const fn new() -> Room {
        Room {
            by_size: BTreeSet::new(),
            by_place: BTreeMap::new(),
        }
    }

    fn insert(&mut self, place: Place, pages: u32) {
        if pages > 0 {
            self.by_size.insert((pages, place));
            self.by_place.insert(place, pages);
        }
    }

    fn remove(&mut self, place: Place, pages: u32) {
        self.by_size.remove(&(pages, place));
        self.by_place.remove(&place);
    }

    /// Takes pages out of the shortest run that has them.
    pub(super) fn take(&mut self, pages: u32) -> Option<Place> {
        let before = |place: &Place| match pages {
            ..UNIT => 0,
            _ => place.first.next_multiple_of(UNIT) - place.first,
        };
        let smallest = Place { arena: 0, first: 0 };
        let fits = |&&(length, place): &&(u32, Place)| before(&place) + pages <= length;
        let &(length, place) = self.by_size.range((pages, smallest)..).find(fits)?;
        self.remove(place, length);
        let skipped = before(&place);
        let first = place.first + skipped;
        self.insert(place, skipped);
        let rest = Place {
            first: first + pages,
            ..place
        };
        self.insert(rest, length - skipped - pages);
        Some(Place { first, ..place })
    }

    /// Gives pages back; how many are free in a row there now.
    pub(super) fn give(&mut self, place: Place, pages: u32) -> u32 {
        let (mut place, mut pages) = (place, pages);
        let before = self
            .by_place
            .range(..place)
            .next_back()
            .map(|(at, length)| (*at, *length));
        if let Some((at, length)) = before
            && at.arena == place.arena
            && at.first + length == place.first
        {
            self.remove(at, length);
            (place, pages) = (at, length + pages);
        }
        let after = Place {
            first: place.first + pages,
            ..place
        };
        if let Some(&length) = self.by_place.get(&after) {
            self.remove(after, length);
            pages += length;
        }
        self.insert(place, pages);
        pages
    }

    /// How many free pages the run has that begins there.
    pub(super) fn run_at(&self, place: Place) -> Option<u32> {
        self.by_place.get(&place).copied()
    }

    /// Forgets what an arena has.
    pub(super) fn forget(&mut self, arena: u32) {
        let theirs = |place: &Place| place.arena == arena;
        self.by_size.retain(|(_, place)| !theirs(place));
        self.by_place.retain(|place, _| !theirs(place));
    }
}

/// Blocks that were returned and keep their memory.
pub(super) struct Bins {
    by_size: BTreeMap<u32, Bin>,
    pages: u32,
}

/// Those of one size.
#[derive(Default)]
struct Bin {
    places: VecDeque<Place>,
    /// The fewest that waited at a time since the last look: so many were not needed.
    least: usize,
}

impl Bins {
    pub(super) const fn new() -> Bins {
        Bins {
            by_size: BTreeMap::new(),
            pages: 0,
        }
    }

    /// How many pages wait.
    pub(super) fn pages(&self) -> u32 {
        self.pages
    }

    pub(super) fn push(&mut self, place: Place, pages: u32) {
        self.by_size.entry(pages).or_default().places.push_back(place);
        self.pages += pages;
    }

    pub(super) fn pop(&mut self, pages: u32) -> Option<Place> {
        let bin = self.by_size.get_mut(&pages)?;
        let place = bin.places.pop_back()?;
        bin.least = bin.least.min(bin.places.len());
        self.pages -= pages;
        Some(place)
    }

    /// All of them, neighbours as one, with their sizes.
    pub(super) fn drain(&mut self) -> Vec<(Place, u32)> {
        self.pages = 0;
        let bins = core::mem::take(&mut self.by_size).into_iter();
        as_runs(bins.flat_map(|(pages, bin)| bin.places.into_iter().map(move |place| (place, pages))))
    }

    /// Those that nobody needed since this was last asked, in the same way.
    pub(super) fn drain_surplus(&mut self) -> Vec<(Place, u32)> {
        let mut surplus = Vec::new();
        for (pages, bin) in &mut self.by_size {
            surplus.extend(bin.places.drain(..bin.least).map(|place| (place, *pages)));
            bin.least = bin.places.len();
        }
        self.by_size.retain(|_, bin| !bin.places.is_empty());
        self.pages -= surplus.iter().map(|(_, pages)| pages).sum::<u32>();
        as_runs(surplus.into_iter())
    }

    /// Forgets what an arena has.
    pub(super) fn forget(&mut self, arena: u32) {
        for (pages, bin) in &mut self.by_size {
            let before = bin.places.len();
            bin.places.retain(|place| place.arena != arena);
            bin.least = bin.least.min(bin.places.len());
            self.pages -= pages * (before - bin.places.len()) as u32;
        }
    }
}

/// Neighbours as one.
fn as_runs(blocks: impl Iterator<Item = (Place, u32)>) -> Vec<(Place, u32)> {
    let mut runs: Vec<(Place, u32)> = blocks.collect();
    runs.sort_unstable();
    runs.dedup_by(|(next, length), (place, pages)| {
        let touches = next.arena == place.arena && next.first == place.first + *pages;
        *pages += if touches { *length } else { 0 };
        touches
    });
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_waste_an_eighth_at_most() {
        for pages in 1..20_000 {
            let size = size_of(pages);
            assert!(size >= pages && (size - pages) * 8 <= pages, "{pages} in {size}");
            assert_eq!(size_of(size), size);
        }
        assert_eq!((size_of(16), size_of(17), size_of(2048)), (16, 18, 2048));
    }

    proptest! {
        #[test]
        fn nothing_is_lent_twice_and_all_comes_back(steps in proptest::collection::vec((1u32..700, any::<u16>()), 1..80)) {
            let sizes = [2048u32, 1024, 512];
            let mut room = Room::new();
            for (arena, pages) in sizes.iter().enumerate() {
                room.give(Place { arena: arena as u32, first: 0 }, *pages);
            }
            let mut lent: Vec<(Place, u32)> = Vec::new();
            for (pages, choice) in steps {
                if choice % 2 == 0 && !lent.is_empty() {
                    let (place, pages) = lent.swap_remove(choice as usize / 2 % lent.len());
                    room.give(place, pages);
                } else if let Some(place) = room.take(pages) {
                    prop_assert!(place.first + pages <= sizes[place.arena as usize]);
                    prop_assert!(pages < UNIT || place.first % UNIT == 0);
                    for (other, length) in &lent {
                        prop_assert!(other.arena != place.arena || place.first + pages <= other.first || other.first + length <= place.first);
                    }
                    lent.push((place, pages));
                } else {
                    // Then it is full, or in pieces: nothing of this size lies free.
                    let most = room.by_size.last().map_or(0, |(length, _)| *length);
                    prop_assert!(most < pages + UNIT);
                }
            }
            for (place, pages) in lent {
                room.give(place, pages);
            }
            let whole: Vec<u32> = room.by_place.values().copied().collect();
            prop_assert_eq!(whole, sizes);
            room.forget(1);
            prop_assert_eq!(room.by_size.len(), 2);
        }
    }

    #[test]
    fn bins_give_back_what_came_last() {
        let mut bins = Bins::new();
        let place = |arena, first| Place { arena, first };
        bins.push(place(0, 0), 16);
        bins.push(place(1, 64), 16);
        bins.push(place(1, 32), 24);
        assert_eq!(
            (bins.pages(), bins.pop(24), bins.pop(24)),
            (56, Some(place(1, 32)), None)
        );
        bins.forget(1);
        assert_eq!((bins.pages(), bins.pop(16), bins.pages()), (16, Some(place(0, 0)), 0));
        for (first, pages) in [(8, 16), (0, 8), (32, 8)] {
            bins.push(place(2, first), pages);
        }
        let drained = vec![(place(2, 0), 24), (place(2, 32), 8)];
        assert_eq!((bins.drain(), bins.pages()), (drained, 0));
    }

    #[test]
    fn what_nobody_came_for_is_surplus() {
        let mut bins = Bins::new();
        let place = |first| Place { arena: 0, first };
        for first in [0, 100, 200] {
            bins.push(place(first), 16);
        }
        bins.push(place(300), 24);
        assert_eq!(bins.drain_surplus(), []);
        // Two at a time were needed since, and one of the other size came back meanwhile.
        for _ in 0..3 {
            let (one, other) = (bins.pop(16).unwrap(), bins.pop(16).unwrap());
            bins.push(one, 16);
            bins.push(other, 16);
        }
        assert_eq!(bins.drain_surplus(), [(place(0), 16), (place(300), 24)]);
        assert_eq!(bins.pages(), 32);
        // One was away when this was asked.
        let away = bins.pop(16).unwrap();
        assert_eq!(bins.drain_surplus().len(), 1);
        bins.push(away, 16);
        assert_eq!(bins.drain_surplus(), []);
        bins.forget(0);
        assert_eq!((bins.drain_surplus(), bins.pages()), (vec![], 0));
        bins.push(place(8), 8);
        bins.push(place(0), 8);
        assert_eq!(bins.drain_surplus(), []);
        assert_eq!(bins.drain_surplus(), [(place(0), 16)]);
        assert_eq!(bins.pages(), 0);
    }
}
