//! Regions: who owns which page numbers.
//!
//! Hands out ranges of page numbers so that `number % 512` is the page's position in its 2 MiB window, and takes a range back
//! only when its region left *and* no open order names a page of it any more. Relies on nothing; never looks at a page.

use crate::ahead::{Found, Look};
use crate::page::{PageNumber, PageRange, WINDOW};
use crate::stats::in_tree;
use hashbrown::HashMap;
use std::collections::BTreeMap;
use std::time::Duration;

/// A process with regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub u32);

/// An address range that a client opted in; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u32);

/// What kind of memory a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Private,
    /// A MAP_SHARED object.
    Shared,
}

/// Which extent served a region last, so that the next frames continue it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    /// The window of pages that the extent was taken for.
    pub window: u32,
    /// The extent.
    pub extent: u32,
}

/// How long a region rests at first, and at most: with a doubling for each time in a row what is in vain costs next to nothing in
/// the long run, and what is over soon hardly any merges.
const REST: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(16));

/// Holes between page numbers that are looked at for a region: those that small regions leave may fit none for ever.
const HOLES_ASKED: usize = 64;

/// Breaks after which it is asked whether merging pays: 4 MiB that were copied back.
const MANY_BREAKS: u32 = 1024;

/// A time in which nothing of a region is proposed.
#[derive(Clone, Copy, Debug)]
struct Rest {
    until: Duration,
    length: Duration,
}

impl Rest {
    /// The next in a row.
    fn after(last: Option<Rest>, now: Duration) -> Rest {
        let length = last.map_or(REST.0, |last| (last.length * 2).min(REST.1));
        Rest {
            until: now + length,
            length,
        }
    }

    fn lasts(self, now: Duration) -> bool {
        now < self.until
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub client: ClientId,
    pub kind: Kind,
    pub range: PageRange,
    pub hint: Option<Hint>,
    /// Open orders that name pages of it.
    pub pins: u32,
    pub left: bool,
    /// Its client is not alone with its memory.
    accompanied: Option<Rest>,
    /// Its pages are written as fast as they merge.
    restless: Option<Rest>,
    /// What merged and what broke; what lies before the last time that it was asked whether merging pays counts half, and half of that
    /// what lies before the time before.
    merges: u32,
    breaks: u32,
    /// Those of the breaks that came since, and not while it rested.
    breaks_tried: u32,
    pub look: Look,
}

impl Region {
    /// Whether nothing of it is proposed now, unless a merge is requested.
    pub(crate) fn rests(&self, now: Duration) -> bool {
        let mut rests = self.accompanied.iter().chain(&self.restless);
        rests.any(|rest| rest.lasts(now))
    }

    /// Its client was asked to map pages of it, and was alone with its memory or was not; how many of them merged.
    pub(crate) fn answered(&mut self, now: Duration, alone: bool, merged: u32) {
        self.merges = self.merges.saturating_add(merged);
        self.look.merged(merged);
        if alone {
            self.accompanied = None;
        } else if !self.accompanied.is_some_and(|rest| rest.lasts(now)) {
            // Not for each run that was under way: one answer says it for all of them.
            self.accompanied = Some(Rest::after(self.accompanied, now));
        }
    }

    /// One of its merged pages was written. Whether it rests from now on, for a merge that is undone at once costs two copies.
    pub(crate) fn broke(&mut self, now: Duration) -> bool {
        self.breaks = self.breaks.saturating_add(1);
        if self.restless.is_some_and(|rest| rest.lasts(now)) {
            // Tells what became of the merges before, but not yet what would become of others.
            return false;
        }
        self.breaks_tried += 1;
        if self.breaks_tried < MANY_BREAKS {
            return false;
        }
        let pays = self.merges / 2 > self.breaks;
        (self.merges, self.breaks, self.breaks_tried) = (self.merges / 2, self.breaks / 2, 0);
        self.restless = (!pays).then(|| Rest::after(self.restless, now));
        !pays
    }
}

#[derive(Default)]
pub(crate) struct Regions {
    all: HashMap<RegionId, Region>,
    by_first: BTreeMap<u32, RegionId>,
    free: BTreeMap<u32, u32>,
    /// Where the next search for a hole begins.
    next_hole: u32,
    end: u32,
    next: u32,
    /// Regions of each kind that have not left.
    pub private: u64,
    pub shared: u64,
}

impl Regions {
    /// Takes page numbers for a region; `None` when 2^32 are not enough.
    pub(crate) fn join(
        &mut self,
        client: ClientId,
        kind: Kind,
        pages: u32,
        position: u16,
    ) -> Option<(RegionId, PageNumber)> {
        let first = self.take_numbers(pages, u32::from(position) % WINDOW)?;
        self.next += 1;
        let id = RegionId(self.next);
        let range = PageRange {
            first: PageNumber(first),
            pages,
        };
        self.all.insert(
            id,
            Region {
                client,
                kind,
                range,
                hint: None,
                pins: 0,
                left: false,
                accompanied: None,
                restless: None,
                merges: 0,
                breaks: 0,
                breaks_tried: 0,
                look: Look::default(),
            },
        );
        self.by_first.insert(first, id);
        *self.count(kind) += 1;
        Some((id, PageNumber(first)))
    }

    fn count(&mut self, kind: Kind) -> &mut u64 {
        match kind {
            Kind::Private => &mut self.private,
            Kind::Shared => &mut self.shared,
        }
    }

    fn take_numbers(&mut self, pages: u32, position: u32) -> Option<u32> {
        let up = |from: u32| from.checked_add(position.wrapping_sub(from) % WINDOW);
        let mut last = self.next_hole;
        let holes = self.free.range(last..).chain(self.free.range(..last));
        let mut asked = holes.take(HOLES_ASKED).inspect(|(from, _)| last = **from);
        let hole = asked.find_map(|(&from, &length)| {
            let first = up(from)?;
            (first.checked_add(pages)? <= from + length).then_some((from, length, first))
        });
        self.next_hole = last + 1;
        if let Some((from, length, first)) = hole {
            self.free.remove(&from);
            self.give_numbers(from, first - from);
            self.give_numbers(first + pages, from + length - first - pages);
            return Some(first);
        }
        let first = up(self.end)?;
        // The last number is left out, so that `first + pages` of every range is a u32.
        let end = first.checked_add(pages).filter(|&end| end < u32::MAX)?;
        self.give_numbers(self.end, first - self.end);
        self.end = end;
        Some(first)
    }

    fn give_numbers(&mut self, mut first: u32, mut length: u32) {
        if length == 0 {
            return;
        }
        if let Some((&before, &pages)) = self.free.range(..first).next_back()
            && before + pages == first
        {
            self.free.remove(&before);
            first = before;
            length += pages;
        }
        if let Some(pages) = self.free.remove(&(first + length)) {
            length += pages;
        }
        self.free.insert(first, length);
    }

    /// Bytes spent on regions, not on their pages.
    pub(crate) fn bytes(&self) -> usize {
        let numbers = self.by_first.len() + self.free.len();
        self.all.allocation_size() + numbers * in_tree::<(u32, RegionId)>()
    }

    pub(crate) fn get(&self, id: RegionId) -> Option<&Region> {
        self.all.get(&id).filter(|region| !region.left)
    }

    pub(crate) fn get_mut(&mut self, id: RegionId) -> Option<&mut Region> {
        self.all.get_mut(&id).filter(|region| !region.left)
    }

    fn id_of(&self, page: PageNumber) -> Option<RegionId> {
        self.holder(page).map(|(id, _)| id)
    }

    fn holder(&self, page: PageNumber) -> Option<(RegionId, &Region)> {
        let (_, &id) = self.by_first.range(..=page.0).next_back()?;
        let region = self.all.get(&id)?;
        (page.0 - region.range.first.0 < region.range.pages).then_some((id, region))
    }

    /// The regions that have not left and end behind a page, in the order of their pages.
    pub(crate) fn from(&self, page: PageNumber) -> impl Iterator<Item = (RegionId, &Region)> {
        let first = self
            .by_first
            .range(..=page.0)
            .next_back()
            .map_or(page.0, |(&first, _)| first);
        let ids = self.by_first.range(first..).map(|(_, &id)| id);
        ids.filter_map(|id| Some((id, self.get(id)?)))
            .filter(move |(_, region)| page.0 < region.range.first.0 + region.range.pages)
    }

    /// The region that a page belongs to, unless it left.
    pub(crate) fn of(&self, page: PageNumber) -> Option<&Region> {
        let (_, region) = self.holder(page)?;
        (!region.left).then_some(region)
    }

    pub(crate) fn of_mut(&mut self, page: PageNumber) -> Option<&mut Region> {
        let id = self.id_of(page)?;
        self.get_mut(id)
    }

    /// Something was found of pages of a region, the first of which is this; which region.
    pub(crate) fn found(&mut self, first: PageNumber, found: &Found) -> Option<RegionId> {
        let id = self.id_of(first)?;
        self.get_mut(id)?.look.found(found);
        Some(id)
    }

    /// An order names this page: its number stays taken.
    pub(crate) fn pin(&mut self, page: PageNumber) {
        if let Some(id) = self.id_of(page)
            && let Some(region) = self.all.get_mut(&id)
        {
            region.pins += 1;
        }
    }

    /// That order is over; returns the numbers that became free by it.
    pub(crate) fn unpin(&mut self, page: PageNumber) -> Option<PageRange> {
        let id = self.id_of(page)?;
        let region = self.all.get_mut(&id)?;
        region.pins -= 1;
        self.forget_if_over(id)
    }

    /// The region is over; returns its numbers if they became free at once.
    pub(crate) fn leave(&mut self, id: RegionId) -> Option<PageRange> {
        let region = self.all.get_mut(&id).filter(|region| !region.left)?;
        region.left = true;
        let kind = region.kind;
        *self.count(kind) -= 1;
        self.forget_if_over(id)
    }

    fn forget_if_over(&mut self, id: RegionId) -> Option<PageRange> {
        let region = self.all.get(&id)?;
        if !region.left || region.pins > 0 {
            return None;
        }
        let range = region.range;
        self.all.remove(&id);
        self.by_first.remove(&range.first.0);
        self.give_numbers(range.first.0, range.pages);
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_the_position_and_are_taken_again() {
        let mut regions = Regions::default();
        let (a, first_a) = regions.join(ClientId(1), Kind::Private, 1000, 0).unwrap();
        let (_, first_b) = regions.join(ClientId(1), Kind::Private, 10, 5).unwrap();
        assert_eq!((first_a.position(), first_b.position()), (0, 5));
        regions.pin(first_a.plus(999));
        assert_eq!(regions.leave(a), None);
        assert!(regions.of(first_a).is_none());
        assert_eq!(
            regions.unpin(first_a.plus(999)),
            Some(PageRange {
                first: first_a,
                pages: 1000
            })
        );
        let (_, first_c) = regions.join(ClientId(2), Kind::Shared, 600, 3).unwrap();
        assert_eq!(first_c, PageNumber(3));
        assert_eq!(regions.of(PageNumber(602)).unwrap().client, ClientId(2));
        assert!(regions.of(PageNumber(603)).is_none());
    }

    #[test]
    fn a_region_rests_longer_each_time_that_its_client_is_not_alone() {
        let mut regions = Regions::default();
        let (id, _) = regions.join(ClientId(1), Kind::Shared, 10, 0).unwrap();
        let region = regions.get_mut(id).unwrap();
        let mut now = Duration::from_secs(1);
        let mut rests = Vec::new();
        for _ in 0..9 {
            region.answered(now, false, 0);
            region.answered(now, false, 0);
            let since = now;
            while region.rests(now) {
                now += Duration::from_millis(50);
            }
            rests.push((now - since).as_millis());
        }
        assert_eq!(rests, [250, 500, 1000, 2000, 4000, 8000, 16_000, 16_000, 16_000]);
        region.answered(now, false, 0);
        region.answered(now, true, 0);
        assert!(!region.rests(now), "alone again");
        region.answered(now, false, 0);
        assert!(!region.rests(now + REST.0), "and afterwards as if for the first time");
    }

    #[test]
    fn a_region_rests_where_merges_do_not_last() {
        let mut regions = Regions::default();
        let (id, _) = regions.join(ClientId(1), Kind::Private, 10, 0).unwrap();
        let region = regions.get_mut(id).unwrap();
        let mut now = Duration::from_secs(1);
        // A large part merges for good: a few thousand breaks beside it are nothing.
        region.answered(now, true, 100_000);
        assert!((0..4 * MANY_BREAKS).all(|_| !region.broke(now)));
        // As much again merges after each rest, and all of it is written, most of it while the region rests.
        let hot = 8 * MANY_BREAKS;
        while !region.rests(now) {
            region.answered(now, true, hot);
            (0..hot).for_each(|_| _ = region.broke(now));
        }
        let mut rests = Vec::new();
        for _ in 0..8 {
            let since = now;
            while region.rests(now) {
                now += Duration::from_millis(50);
            }
            rests.push((now - since).as_millis());
            region.answered(now, true, hot);
            assert_eq!((1..MANY_BREAKS).filter(|_| region.broke(now)).count(), 0);
            assert!(region.broke(now), "it is asked after as many breaks as ever");
            assert!((MANY_BREAKS..hot).all(|_| !region.broke(now)));
        }
        assert_eq!(rests, [250, 500, 1000, 2000, 4000, 8000, 16_000, 16_000]);
        now += REST.1;
        region.answered(now, true, 4 * hot);
        assert!((0..MANY_BREAKS).all(|_| !region.broke(now)), "it pays");
        while !region.rests(now) {
            region.answered(now, true, MANY_BREAKS);
            (0..MANY_BREAKS).for_each(|_| _ = region.broke(now));
        }
        assert!(!region.rests(now + REST.0), "and afterwards as if for the first time");
    }

    #[test]
    fn too_many_pages_are_refused() {
        let mut regions = Regions::default();
        assert!(regions.join(ClientId(1), Kind::Private, u32::MAX - 1, 0).is_some());
        assert!(regions.join(ClientId(1), Kind::Private, 1, 0).is_none());
    }
}
