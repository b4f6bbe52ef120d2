//! Frames: the slots of the store, and which of them are taken.
//!
//! A slot is taken at the position modulo 512 of the page it first serves, neighbours in neighbouring slots, so that
//! merges leave as runs and whole windows become huge frames. A record of eleven bytes (`record.rs`) per slot is kept, in extents of
//! 512, and only for extents in use. Relies on `rmap.rs` for who needs a frame; never decides by itself that one is free.

use crate::checksum::Checksum;
use crate::page::{WINDOW, lengthen};
use crate::record::{CROWDED, Frame, Life};
use crate::region::Hint;
use hashbrown::HashMap;
use std::collections::BTreeSet;

/// A page of a domain's frame store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

impl Slot {
    /// The all-zero content, which has no frame.
    pub const ZERO: Slot = Slot(u32::MAX);

    /// The slot of the `pages`th page of a run that begins here.
    #[must_use]
    pub const fn stepped(self, pages: u32) -> Slot {
        if self.0 == Slot::ZERO.0 {
            self
        } else {
            Slot(self.0 + pages)
        }
    }

    pub(crate) const fn extent(self) -> u32 {
        self.0 / WINDOW
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if *self == Slot::ZERO {
            f.write_str("Slot(zero)")
        } else {
            write!(f, "Slot({})", self.0)
        }
    }
}

/// Frames whose records are allocated together.
const PART: usize = 64;

struct Extent {
    /// In parts, for a scattered extent has few: what was never taken has no record.
    parts: [Option<Box<[Frame; PART]>>; WINDOW as usize / PART],
    free: [u64; WINDOW as usize / 64],
    free_count: u32,
    /// Filled as a whole since it was fresh, as one huge page unless whoever fills it said otherwise.
    huge: bool,
}

impl Extent {
    fn bytes(&self) -> usize {
        size_of::<Extent>() + self.parts.iter().flatten().count() * size_of::<[Frame; PART]>()
    }

    fn frame(&self, slot: Slot) -> &Frame {
        let position = (slot.0 % WINDOW) as usize;
        let part = self.parts[position / PART].as_ref();
        &part.expect("a slot in use has a record")[position % PART]
    }

    fn frame_mut(&mut self, slot: Slot) -> &mut Frame {
        let position = (slot.0 % WINDOW) as usize;
        let part = self.parts[position / PART].get_or_insert_with(|| Box::new([Frame::FREE; PART]));
        &mut part[position % PART]
    }

    fn is_free(&self, position: u16) -> bool {
        self.free[position as usize / 64] >> (position % 64) & 1 != 0
    }
}

/// The slots of a store.
pub(crate) struct Frames {
    extents: Vec<Option<Box<Extent>>>,
    capacity: u32,
    /// The first extent that was never taken.
    untouched: u32,
    /// Extents that were taken and are wholly free again.
    whole: BTreeSet<u32>,
    /// Extents in use with free slots.
    partial: BTreeSet<u32>,
    /// Where the search through `partial` goes on.
    next_partial: u32,
    /// How many pages lie over slots with more of them than a record can say.
    crowded: HashMap<Slot, u32>,
    pub filled: u32,
    pub huge: u32,
}

/// Windows with fewer pages than this share extents that others began; a fresh extent for a few pages is a waste.
const WORTH_AN_EXTENT: usize = 64;
/// How many extents in use are asked for room before a fresh one is taken.
const EXTENTS_ASKED: usize = 8;

impl Frames {
    pub(crate) fn new(capacity: u32) -> Frames {
        Frames {
            extents: Vec::new(),
            // The last slot number means zero.
            capacity: capacity.min(u32::MAX - WINDOW),
            untouched: 0,
            whole: BTreeSet::new(),
            partial: BTreeSet::new(),
            next_partial: 0,
            crowded: HashMap::new(),
            filled: 0,
            huge: 0,
        }
    }

    fn slots_of(&self, extent: u32) -> u32 {
        (self.capacity - extent * WINDOW).min(WINDOW)
    }

    pub(crate) fn get(&self, slot: Slot) -> &Frame {
        let extent = self.extents[slot.extent() as usize].as_ref();
        extent.expect("a slot in use has an extent").frame(slot)
    }

    /// The record of a slot that somebody else named, if there is one.
    pub(crate) fn find(&self, slot: Slot) -> Option<&Frame> {
        let extent = self.extents.get(slot.extent() as usize)?.as_ref()?;
        let position = (slot.0 % WINDOW) as usize;
        Some(&extent.parts[position / PART].as_ref()?[position % PART])
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> &mut Frame {
        let extent = self.extents[slot.extent() as usize].as_mut();
        extent.expect("a slot in use has an extent").frame_mut(slot)
    }

    /// Pages with memory of their own inside a mapping of it.
    fn covered(&self, slot: Slot, frame: &Frame) -> u32 {
        match frame.covered() {
            CROWDED => self.crowded.get(&slot).copied().unwrap_or(CROWDED),
            few => few,
        }
    }

    /// One more, or one less, page lies over the slot.
    pub(crate) fn cover(&mut self, slot: Slot, on: bool) {
        let before = self.covered(slot, self.get(slot));
        let now = if on { before + 1 } else { before - 1 };
        self.get_mut(slot).set_covered(now.min(CROWDED));
        if now > CROWDED {
            self.crowded.insert(slot, now);
        } else if before > CROWDED {
            self.crowded.remove(&slot);
            if self.crowded.is_empty() {
                self.crowded = HashMap::new();
            }
        }
    }

    /// Everything that refers to a slot, whose record this is. Nobody is sent to a frame with `MOST_SHARING`, which keeps the counts
    /// within their bits.
    pub(crate) fn references(&self, slot: Slot, frame: &Frame) -> u32 {
        frame.sharing() + self.covered(slot, frame)
    }

    /// Takes a slot for each page of one window, positions ascending; all in one extent at these very positions if the store
    /// has room for that, otherwise wherever it has room.
    pub(crate) fn take(&mut self, hint: &mut Option<Hint>, window: u32, positions: &[u16]) -> Vec<Option<Slot>> {
        match self.extent_for(*hint, window, positions) {
            Some(extent) => {
                *hint = Some(Hint { window, extent });
                positions
                    .iter()
                    .map(|&position| Some(self.take_at(extent, position)))
                    .collect()
            }
            None => positions.iter().map(|&position| self.take_anywhere(position)).collect(),
        }
    }

    fn extent_for(&mut self, hint: Option<Hint>, window: u32, positions: &[u16]) -> Option<u32> {
        let whole = positions.len() == WINDOW as usize;
        if let Some(hint) = hint.filter(|_| !whole) {
            let fits = self.fits(hint.extent, positions);
            if fits && (hint.window == window || positions.len() < WORTH_AN_EXTENT) {
                return Some(hint.extent);
            }
        }
        if positions.len() < WORTH_AN_EXTENT {
            let found = self
                .partials()
                .take(EXTENTS_ASKED)
                .find(|&extent| self.fits(extent, positions));
            if let Some(extent) = found {
                self.next_partial = extent;
                return Some(extent);
            }
            self.next_partial = self.next_partial.wrapping_add(1);
        }
        let fresh = self.begin_extent(hint.map(|hint| hint.extent + 1))?;
        self.fits(fresh, positions).then_some(fresh)
    }

    fn partials(&self) -> impl Iterator<Item = u32> {
        let from = self.next_partial;
        self.partial.range(from..).chain(self.partial.range(..from)).copied()
    }

    fn fits(&self, extent: u32, positions: &[u16]) -> bool {
        let extent = self.extents.get(extent as usize).and_then(Option::as_ref);
        extent.is_some_and(|extent| positions.iter().all(|&position| extent.is_free(position)))
    }

    fn begin_extent(&mut self, preferred: Option<u32>) -> Option<u32> {
        let again = preferred.filter(|extent| self.whole.remove(extent));
        let untouched = |frames: &Frames| frames.untouched * WINDOW < frames.capacity;
        let extent = if let Some(extent) = again {
            extent
        } else if preferred == Some(self.untouched) && untouched(self) {
            self.touch()
        } else if let Some(extent) = self.whole.pop_first() {
            extent
        } else if untouched(self) {
            self.touch()
        } else {
            return None;
        };
        let slots = self.slots_of(extent);
        let mut free = [0; WINDOW as usize / 64];
        for slot in 0..slots as usize {
            free[slot / 64] |= 1 << (slot % 64);
        }
        self.extents[extent as usize] = Some(Box::new(Extent {
            parts: Default::default(),
            free,
            free_count: slots,
            huge: false,
        }));
        self.partial.insert(extent);
        Some(extent)
    }

    fn touch(&mut self) -> u32 {
        self.untouched += 1;
        lengthen(&mut self.extents, self.untouched as usize);
        self.untouched - 1
    }

    fn take_at(&mut self, number: u32, position: u16) -> Slot {
        let extent = self.extents[number as usize]
            .as_mut()
            .expect("an extent with room is in use");
        extent.free[position as usize / 64] &= !(1 << (position % 64));
        let frame = extent.frame_mut(Slot(u32::from(position)));
        *frame = Frame::FREE;
        frame.set_life(Life::Filling);
        extent.free_count -= 1;
        if extent.free_count == 0 {
            self.partial.remove(&number);
        }
        Slot(number * WINDOW + u32::from(position))
    }

    /// Whether this very slot, in an extent that is in use, could be taken.
    pub(crate) fn has_free(&self, slot: Slot) -> bool {
        self.fits(slot.extent(), &[(slot.0 % WINDOW) as u16])
    }

    /// Takes this very slot, which [`has_free`](Frames::has_free).
    pub(crate) fn take_free(&mut self, slot: Slot) {
        self.take_at(slot.extent(), (slot.0 % WINDOW) as u16);
    }

    /// The store is nearly full: a slot at the same position in some extent, else any slot.
    fn take_anywhere(&mut self, position: u16) -> Option<Slot> {
        let fitting = self
            .partials()
            .take(EXTENTS_ASKED)
            .find(|&extent| self.fits(extent, &[position]));
        if let Some(extent) = fitting {
            return Some(self.take_at(extent, position));
        }
        let in_use = self.partials().next();
        let extent = match in_use {
            Some(extent) => extent,
            None => self.begin_extent(None)?,
        };
        let free = &self.extents[extent as usize].as_ref()?.free;
        let (word, bits) = free.iter().enumerate().find(|(_, bits)| **bits != 0)?;
        let position = word as u16 * 64 + bits.trailing_zeros() as u16;
        Some(self.take_at(extent, position))
    }

    /// The broker is about to write this whole extent.
    pub(crate) fn set_huge(&mut self, slot: Slot) {
        if let Some(extent) = self.extents[slot.extent() as usize].as_mut() {
            self.huge += u32::from(!extent.huge);
            extent.huge = true;
        }
    }

    /// The kernel declined to make this extent one huge page.
    pub(crate) fn set_small(&mut self, slot: Slot) {
        if let Some(extent) = self.extents[slot.extent() as usize].as_mut() {
            self.huge -= u32::from(extent.huge);
            extent.huge = false;
        }
    }

    /// The frame has its content.
    pub(crate) fn fill(&mut self, slot: Slot, checksum: Checksum) {
        let frame = self.get_mut(slot);
        debug_assert_eq!(frame.life(), Life::Filling);
        frame.set_life(Life::Filled);
        frame.set_checksum(checksum);
        self.filled += 1;
    }

    /// The frame's memory is to be given back.
    pub(crate) fn doom(&mut self, slot: Slot) {
        let frame = self.get_mut(slot);
        let was_filled = matches!(frame.life(), Life::Filled | Life::Moved | Life::Stale);
        debug_assert!(was_filled || frame.life() == Life::Filling);
        frame.set_life(Life::Doomed);
        self.filled -= u32::from(was_filled);
        let extent = self.extents[slot.extent() as usize]
            .as_mut()
            .expect("a slot in use has an extent");
        self.huge -= u32::from(extent.huge);
        extent.huge = false;
    }

    /// Nothing lies over the slot any more, and it has no memory.
    pub(crate) fn free(&mut self, slot: Slot) {
        let number = slot.extent();
        let Some(extent) = self.extents[number as usize].as_mut() else {
            return;
        };
        let position = (slot.0 % WINDOW) as usize;
        debug_assert!(!extent.frame(slot).is_wanted() && extent.frame(slot).covered() == 0);
        debug_assert_eq!(
            extent.free[position / 64] >> (position % 64) & 1,
            0,
            "{slot:?} is freed twice"
        );
        self.huge -= u32::from(extent.huge);
        extent.huge = false;
        *extent.frame_mut(slot) = Frame::FREE;
        extent.free[position / 64] |= 1 << (position % 64);
        extent.free_count += 1;
        if extent.free_count == self.capacity.saturating_sub(number * WINDOW).min(WINDOW) {
            self.extents[number as usize] = None;
            self.partial.remove(&number);
            self.whole.insert(number);
        } else {
            self.partial.insert(number);
        }
    }

    /// Slots that are not free, in any state.
    pub(crate) fn taken(&self) -> u32 {
        let taken = |(number, extent): (usize, &Option<Box<Extent>>)| {
            extent
                .as_ref()
                .map_or(0, |extent| self.slots_of(number as u32) - extent.free_count)
        };
        self.extents.iter().enumerate().map(taken).sum()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.extents.capacity() * size_of::<Option<Box<Extent>>>()
            + self.crowded.allocation_size()
            + self
                .extents
                .iter()
                .flatten()
                .map(|extent| extent.bytes())
                .sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole_window() -> Vec<u16> {
        (0..WINDOW as u16).collect()
    }

    #[test]
    fn many_pages_may_lie_over_a_slot() {
        let mut frames = Frames::new(4 * WINDOW);
        let slot = frames.take(&mut None, 0, &[3])[0].unwrap();
        for pages in 1..=30_000 {
            frames.cover(slot, true);
            assert_eq!(frames.references(slot, frames.get(slot)), pages);
        }
        for pages in (0..30_000).rev() {
            frames.cover(slot, false);
            assert_eq!(frames.references(slot, frames.get(slot)), pages);
        }
        assert!(frames.crowded.is_empty());
        frames.free(slot);
        assert_eq!(frames.taken(), 0);
    }

    #[test]
    fn a_whole_window_takes_a_fresh_extent_after_the_last() {
        let mut frames = Frames::new(4 * WINDOW);
        let mut hint = None;
        let first = frames.take(&mut hint, 7, &whole_window());
        assert_eq!(first[0], Some(Slot(0)));
        assert_eq!(first[511], Some(Slot(511)));
        let second = frames.take(&mut hint, 8, &whole_window());
        assert_eq!(second[0], Some(Slot(512)));
        assert_eq!(hint, Some(Hint { window: 8, extent: 1 }));
    }

    #[test]
    fn batches_of_one_window_continue_one_extent() {
        let mut frames = Frames::new(8 * WINDOW);
        let mut hint = None;
        let low: Vec<u16> = (0..100).collect();
        let high: Vec<u16> = (100..300).collect();
        assert_eq!(frames.take(&mut hint, 3, &low)[99], Some(Slot(99)));
        assert_eq!(frames.take(&mut hint, 3, &high)[0], Some(Slot(100)));
        // Another window that needs the same positions does not fit.
        assert_eq!(frames.take(&mut hint, 4, &low)[0], Some(Slot(512)));
        // A few pages go where positions are free.
        assert_eq!(
            frames.take(&mut hint, 5, &[300, 301]),
            [Some(Slot(812)), Some(Slot(813))]
        );
    }

    #[test]
    fn a_full_store_gives_any_slot_and_then_none() {
        let mut frames = Frames::new(3);
        let mut hint = None;
        let taken = frames.take(&mut hint, 0, &[500, 501, 502, 503]);
        assert_eq!(taken.iter().flatten().count(), 3);
        assert_eq!(taken[3], None);
        for slot in 0..3 {
            frames.free(Slot(slot));
        }
        assert_eq!(frames.taken(), 0);
        assert_eq!(frames.take(&mut hint, 0, &[1]), [Some(Slot(1))]);
    }
}
