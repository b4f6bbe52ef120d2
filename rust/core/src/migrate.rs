//! Migration: frames move to other slots, their pages follow, and runs join.
//!
//! Where pages are neighbours and their frames are not (they were founded in another order by somebody who left, or one by one),
//! each page costs its process a mapping. A pass counts such *rifts* as it goes by. The next one gathers who shows the frames of the
//! pieces with the most: an rmap of a few thousand frames, where one of all would cost as much as everything else that core keeps.
//! What then frees mappings, counted over all clients, is moved: the driver copies the frames, and every page is proposed the new
//! one. Until it shows that, the old frame stays. Whoever was missed (a child, a client that had no time) follows when the scan comes by.
//!
//! Relies on the dense page -> slot array, and on the clients' comparison of what they are asked to show; never gives memory back,
//! that is `rmap.rs` when the last page is gone.

use crate::Core;
use crate::checksum::Checksum;
use crate::frame::Slot;
use crate::order::Decision;
use crate::page::{Mark, PageNumber, PageRange, Pages, Place, WINDOW};
use crate::record::Life;
use crate::region::ClientId;
use crate::stable::Search;
use crate::tunables::run;
use hashbrown::{HashMap, HashSet};
use std::collections::{BTreeSet, VecDeque};

/// Pieces worked on per pass: 128 MiB of frames at most.
const PIECES: usize = 64;
/// Pieces weighed in one step.
const PIECES_AT_ONCE: usize = 8;
/// Pages gathered per pass, about, 4 bytes each.
const MOST_GATHERED: usize = 1 << 16;
/// Pages that show the frames weighed in one step, and moved in one: a few milliseconds for a driver with one thread.
const MOST_AT_ONCE: usize = 1 << 15;
/// Slots, modulo this, whose frames may be among the gathered: asked first, for nearly all pages show others.
const SLOTS_MARKED: usize = 1 << 18;
/// Pages that may be remapped for each mapping that is freed by it: 16 of a few microseconds each, once.
const PAGES_PER_MAPPING: i64 = 16;
/// Passes until a piece of which nothing came is looked at again.
const REST: u16 = 16;
/// Pieces remembered for that.
const MOST_RESTING: usize = 4096;

/// What is known of rifts, and of the pieces (a window of a region, or what it has of one) that are being worked on.
#[derive(Default)]
pub(crate) struct Migration {
    /// Met in this pass, with how many rifts each; the worst only.
    met: BTreeSet<(u32, PageNumber, u32)>,
    /// Chosen at the end of the last pass.
    chosen: Vec<PageRange>,
    /// Who shows the frames of those, as far as this pass came.
    gathered: HashMap<Slot, Vec<PageNumber>>,
    /// A bit for each of those, by `slot % SLOTS_MARKED`; empty while there are none.
    marked: Vec<u64>,
    /// Gathered: to be moved, if that is worth it.
    ready: VecDeque<PageRange>,
    /// Who shows the frames of those.
    shown_by: HashMap<Slot, Vec<PageNumber>>,
    /// Of which nothing came, and in which pass.
    resting: HashMap<PageNumber, u16>,
    /// Being copied.
    moving: Vec<(Slot, Slot)>,
}

impl Migration {
    /// What was met or gathered does not count: no pass completes it.
    pub(crate) fn forget(&mut self) {
        let resting = std::mem::take(&mut self.resting);
        *self = Migration {
            resting,
            ..Migration::default()
        };
    }

    fn meet(&mut self, rifts: u32, piece: PageRange) {
        if rifts == 0 || self.resting.contains_key(&piece.first) {
            return;
        }
        self.met.insert((rifts, piece.first, piece.pages));
        if self.met.len() > PIECES {
            self.met.pop_first();
        }
    }

    fn begin_to_gather(&mut self, slot: Slot, shown: usize) {
        self.gathered.entry(slot).or_insert_with(|| Vec::with_capacity(shown));
        self.marked.resize(SLOTS_MARKED / 64, 0);
        let bit = slot.0 as usize % SLOTS_MARKED;
        self.marked[bit / 64] |= 1 << (bit % 64);
    }

    fn gather(&mut self, slot: Slot, page: PageNumber) {
        let bit = slot.0 as usize % SLOTS_MARKED;
        let marked = self.marked.get(bit / 64);
        if marked.is_some_and(|bits| bits >> (bit % 64) & 1 != 0)
            && let Some(pages) = self.gathered.get_mut(&slot)
        {
            pages.push(page);
        }
    }

    fn rest(&mut self, piece: PageRange, pass: u16) {
        if self.resting.len() >= MOST_RESTING {
            self.resting.clear();
        }
        self.resting.insert(piece.first, pass);
    }

    pub(crate) fn bytes(&self) -> usize {
        let lists = |rmap: &HashMap<Slot, Vec<PageNumber>>| {
            let pages: usize = rmap.values().map(Vec::capacity).sum();
            rmap.allocation_size() + pages * size_of::<PageNumber>()
        };
        let marked = self.marked.capacity() * size_of::<u64>();
        lists(&self.gathered) + lists(&self.shown_by) + self.resting.allocation_size() + marked
    }
}

/// Whether neighbours show frames that are no neighbours.
fn is_rift(before: Place, page: Place) -> bool {
    matches!((before, page), (Place::Merged(_), Place::Merged(_))) && !before.continues_into(page)
}

/// Where frames are to go, with what that frees.
struct Proposal {
    targets: HashMap<Slot, Slot>,
    /// Mappings.
    saved: i64,
    /// Whether some client would need more of them, which it might not have.
    loses: bool,
    /// Pages to be remapped.
    pages: i64,
}

impl Proposal {
    /// Positive if it should be done.
    fn worth(&self) -> i64 {
        if self.loses {
            return i64::MIN;
        }
        self.saved * PAGES_PER_MAPPING - self.pages
    }
}

impl Core {
    /// These pages are about to be looked at: what is to be seen of rifts, and of frames that may move.
    pub(crate) fn look_for_rifts(&mut self, ranges: &[PageRange]) {
        if self.tunables.join_runs == 0 {
            return;
        }
        for range in ranges {
            let Some(region) = self.regions.of(range.first).map(|region| region.range) else {
                continue;
            };
            let mut at = range.first.0;
            while at < range.first.0 + range.pages {
                let window = at / WINDOW * WINDOW;
                let end = (window + WINDOW).min(range.first.0 + range.pages);
                let (mut rifts, mut before) = (0, Place::Own);
                for page in (at..end).map(PageNumber) {
                    let place = self.pages.place(page);
                    rifts += u32::from(is_rift(before, place));
                    if let Place::Merged(slot) = place {
                        self.migration.gather(slot, page);
                    }
                    before = place;
                }
                let first = window.max(region.first.0);
                let pages = (window + WINDOW).min(region.first.0 + region.pages) - first;
                let first = PageNumber(first);
                self.migration.meet(rifts, PageRange { first, pages });
                at = end;
            }
        }
    }

    /// A pass is over: what it gathered may be moved, and of what it met the next one gathers.
    pub(crate) fn choose_moves(&mut self) {
        let pass = self.pass;
        let migration = &mut self.migration;
        migration.resting.retain(|_, since| pass.wrapping_sub(*since) < REST);
        migration.ready = std::mem::take(&mut migration.chosen).into();
        migration.shown_by = std::mem::take(&mut migration.gathered);
        migration.marked.clear();
        for pages in migration.shown_by.values_mut() {
            // A number that a region left and another took meanwhile was met twice.
            pages.sort_unstable();
            pages.dedup();
        }
        let met = std::mem::take(&mut migration.met);
        let busy: HashSet<PageNumber> = migration.ready.iter().map(|piece| piece.first).collect();
        let mut expected = 0;
        for (_, first, pages) in met.into_iter().rev().filter(|(_, first, _)| !busy.contains(first)) {
            let piece = PageRange { first, pages };
            if migration.chosen.contains(&piece) || self.regions.of(first).is_none() || expected > MOST_GATHERED {
                continue;
            }
            let shown = |slot| self.rmap.frames.get(slot).shown() as usize;
            let frames: Vec<(PageNumber, Slot)> = shown_in(&self.pages, piece).collect();
            let all: usize = frames.iter().map(|&(_, slot)| shown(slot)).sum();
            // Of a piece that is too much for one step a part: from its first rift on, with the page before, which the others may join.
            let rift =
                |pair: &[(PageNumber, Slot)]| pair[0].0.plus(1) == pair[1].0 && pair[0].1.stepped(1) != pair[1].1;
            let first = frames
                .windows(2)
                .position(rift)
                .filter(|_| all > MOST_AT_ONCE)
                .unwrap_or(0);
            let mut left = MOST_AT_ONCE;
            for &(_, slot) in &frames[first..] {
                let Some(rest) = left.checked_sub(shown(slot)) else {
                    break;
                };
                left = rest;
                migration.begin_to_gather(slot, shown(slot));
            }
            expected += MOST_AT_ONCE - left;
            migration.chosen.push(piece);
        }
    }

    /// The next piece whose frames are worth moving, among a few.
    pub(crate) fn next_move(&mut self) -> Option<Decision> {
        if self.tunables.run != run::RUN || self.pace.is_requested() || self.tunables.join_runs == 0 {
            self.migration.ready.clear();
        }
        let mut weighed = 0;
        for _ in 0..PIECES_AT_ONCE {
            if weighed >= MOST_AT_ONCE {
                break;
            }
            let piece = self.migration.ready.pop_front()?;
            if self.regions.of(piece.first).is_none() {
                continue;
            }
            self.migration.rest(piece, self.pass);
            let Some(targets) = self.targets(piece, &mut weighed) else {
                continue;
            };
            let mut frames: Vec<(Slot, Slot)> = targets.into_iter().collect();
            frames.sort_unstable_by_key(|&(_, to)| to);
            let (first, last) = (frames.first()?.1, frames.last()?.1);
            let node = self.node_of(frames[0].0);
            let whole = last == first.stepped(WINDOW - 1) && frames.len() == WINDOW as usize;
            if first.0.is_multiple_of(WINDOW) && whole && frames.iter().all(|&(from, _)| self.node_of(from) == node) {
                self.rmap.frames.set_huge(first);
            }
            self.migration.moving = frames.clone();
            return Some(Decision::Move { frames });
        }
        None
    }

    /// The slots to move a piece's frames to, taken, if there are any worth it. Adds the pages that were weighed.
    fn targets(&mut self, piece: PageRange, weighed: &mut usize) -> Option<HashMap<Slot, Slot>> {
        let (mut known, mut movable) = (HashSet::new(), Vec::new());
        for (page, slot) in shown_in(&self.pages, piece) {
            *weighed += self.migration.shown_by.get(&slot).map_or(0, Vec::len);
            if known.insert(slot) && self.may_move(slot) {
                movable.push((page, slot));
            }
        }
        if movable.is_empty() {
            return None;
        }
        let neighbours = self.beside_others(&movable);
        let (fresh, taken) = self.among_themselves(piece, &movable);
        if fresh.worth() > neighbours.worth().max(0) {
            return Some(fresh.targets);
        }
        for slot in taken {
            self.rmap.abandon(slot, false);
        }
        if neighbours.worth() <= 0 {
            return None;
        }
        for &target in neighbours.targets.values() {
            self.rmap.frames.take_free(target);
        }
        Some(neighbours.targets)
    }

    /// Whether everybody who shows the frame is known, and can be asked to show another.
    fn may_move(&self, slot: Slot) -> bool {
        let frame = self.rmap.frames.get(slot);
        let Some(pages) = self.migration.shown_by.get(&slot) else {
            return false;
        };
        frame.life() == Life::Filled
            && pages.len() == frame.shown() as usize
            && pages.iter().all(|&page| {
                let region = self.regions.of(page);
                let client = region.and_then(|region| self.clients.get(&region.client));
                client.is_some_and(|client| client.is_planned())
                    && self.pages.place(page) == Place::Merged(slot)
                    && !self.pages.is(page, Mark::Busy)
            })
    }

    /// Those that stray join the others: to their places in the extent where most of the piece is.
    fn beside_others(&self, movable: &[(PageNumber, Slot)]) -> Proposal {
        let at = |page: PageNumber, extent: u32| Slot(extent * WINDOW + u32::from(page.position()));
        let mut votes: HashMap<u32, u32> = HashMap::new();
        for &(page, slot) in movable.iter().filter(|&&(page, slot)| slot == at(page, slot.extent())) {
            debug_assert_eq!(u32::from(page.position()), slot.0 % WINDOW);
            *votes.entry(slot.extent()).or_default() += 1;
        }
        let most = votes.iter().max_by_key(|&(&extent, &votes)| (votes, extent));
        let strays = movable.iter().filter_map(|&(page, slot)| {
            let target = at(page, *most?.0);
            (slot != target && self.rmap.frames.has_free(target)).then_some((slot, target))
        });
        self.weigh(strays.collect())
    }

    /// All of them go where nobody is yet; the slots taken for that.
    fn among_themselves(&mut self, piece: PageRange, movable: &[(PageNumber, Slot)]) -> (Proposal, Vec<Slot>) {
        let positions: Vec<u16> = movable.iter().map(|(page, _)| page.position()).collect();
        let taken = self.rmap.frames.take(&mut None, piece.first.window(), &positions);
        let targets = movable.iter().zip(&taken);
        let targets = targets.filter_map(|(&(_, slot), target)| Some((slot, (*target)?)));
        let proposal = self.weigh(targets.collect());
        (proposal, taken.into_iter().flatten().collect())
    }

    /// What moving the frames would free, over all who show them.
    fn weigh(&self, targets: HashMap<Slot, Slot>) -> Proposal {
        let shown_by = targets.keys().filter_map(|slot| self.migration.shown_by.get(slot));
        let mut pages: Vec<PageNumber> = shown_by.flatten().copied().collect();
        pages.sort_unstable();
        let after = |place: Place| match place {
            Place::Merged(slot) => Place::Merged(targets.get(&slot).copied().unwrap_or(slot)),
            other => other,
        };
        // What moving frees between this page and the one before it.
        let freed = |page: u32| {
            let (one, next) = (
                self.pages.place(PageNumber(page - 1)),
                self.pages.place(PageNumber(page)),
            );
            let now = i64::from(!one.continues_into(next));
            now - i64::from(!after(one).continues_into(after(next)))
        };
        let mut saved: HashMap<ClientId, i64> = HashMap::new();
        let (mut client, mut first, mut end) = (ClientId(0), 0, 0);
        for (i, page) in pages.iter().enumerate() {
            if !(first..end).contains(&page.0) {
                let Some(region) = self.regions.of(*page) else { continue };
                let range = region.range;
                (client, first, end) = (region.client, range.first.0, range.first.0 + range.pages);
            }
            let saved = saved.entry(client).or_default();
            if page.0 > first {
                *saved += freed(page.0);
            }
            // Behind it too, unless the next one moves as well.
            if page.0 + 1 < end && pages.get(i + 1) != Some(&page.plus(1)) {
                *saved += freed(page.0 + 1);
            }
        }
        Proposal {
            saved: saved.values().sum(),
            loses: saved.values().any(|saved| *saved < 0),
            pages: pages.len() as i64,
            targets,
        }
    }

    /// The frames of a [`Decision::Move`] are copied: the checksum of each *new* frame, in its order, without a node in it;
    /// `None` where it could not be written. Whoever shows an old one is asked to show the new one.
    pub fn moved(&mut self, checksums: &[Option<Checksum>]) {
        let checksums = checksums.iter().copied().chain(std::iter::repeat(None));
        let mut touched: BTreeSet<ClientId> = BTreeSet::new();
        for ((from, to), found) in std::mem::take(&mut self.migration.moving).into_iter().zip(checksums) {
            let Some(pages) = self.migration.shown_by.remove(&from) else {
                self.rmap.abandon(to, true);
                continue;
            };
            if !self.is_of(found, Some(self.rmap.frames.get(from).checksum())) {
                self.rmap.abandon(to, true);
                continue;
            }
            self.rmap.replace(from, to);
            for page in pages {
                if let Some(client) = self.regions.of(page).map(|region| region.client) {
                    self.propose(client, page, to);
                    touched.insert(client);
                }
            }
        }
        for client in touched {
            self.refresh(client);
        }
    }

    /// A page was seen that shows this frame: if that moved, the page is to follow.
    pub(crate) fn follow(&mut self, id: ClientId, page: PageNumber, slot: Slot) {
        let frame = self.rmap.frames.get(slot);
        let planned = self.clients.get(&id).is_some_and(|client| client.is_planned());
        if frame.life() != Life::Moved || !planned || self.tunables.run == run::UNMERGE {
            return;
        }
        let (checksum, most) = (frame.checksum(), self.tunables.max_page_sharing);
        match self.rmap.stable.search(&self.rmap.frames, checksum, most) {
            Search::Room(heir) => self.propose(id, page, heir),
            // Others have it, and no room: until they have, or are gone.
            Search::Full => {}
            // It came back to nobody: this one is the frame of its content again, unless there will be another.
            Search::Absent if self.foundings.find(checksum).is_some() => {}
            Search::Absent => {
                let back = self.rmap.reinstate(slot);
                self.unstable.crowd_out(&self.pages, back.tag());
            }
        }
    }
}

/// The pages of a piece that show frames, with these.
fn shown_in(pages: &Pages, piece: PageRange) -> impl Iterator<Item = (PageNumber, Slot)> {
    piece.iter().filter_map(|page| match pages.place(page) {
        Place::Merged(slot) => Some((page, slot)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limbo::Epoch;
    use crate::region::Kind;

    const CLIENT: ClientId = ClientId(1);

    /// A core in which two pages show a frame that moved to a second slot.
    fn moved() -> (Core, [PageNumber; 2], Slot, Slot) {
        let mut core = Core::new(4096, Checksum(0));
        core.client_joined(CLIENT);
        let (_, first) = core.region_joined(CLIENT, Kind::Private, 2, 0).unwrap();
        let slots = core.rmap.frames.take(&mut None, 0, &[0, 7]);
        let (from, to) = (slots[0].unwrap(), slots[1].unwrap());
        core.rmap.frames.fill(from, Checksum(1));
        core.rmap.stable.insert(&mut core.rmap.frames, from);
        let range = PageRange { first, pages: 2 };
        for page in range.iter() {
            core.move_page(page, Place::Merged(from), range, CLIENT, None);
        }
        core.migration.shown_by.insert(from, range.iter().collect());
        core.migration.moving = vec![(from, to)];
        (core, [first, first.plus(1)], from, to)
    }

    fn listed(core: &mut Core) -> Option<Slot> {
        match core.rmap.stable.search(&core.rmap.frames, Checksum(1), 256) {
            Search::Room(slot) => Some(slot),
            _ => None,
        }
    }

    #[test]
    fn everybody_is_proposed_the_copy() {
        let (mut core, pages, from, to) = moved();
        core.moved(&[Some(Checksum(1))]);
        assert_eq!(listed(&mut core), Some(to));
        assert_eq!(core.clients[&CLIENT].maps, pages.map(|page| (page, to)));
        assert_eq!(core.rmap.next_punch(), None, "{from:?} is still shown");
    }

    #[test]
    fn a_copy_that_is_none_is_nobodys() {
        for found in [None, Some(Checksum(2))] {
            let (mut core, _, from, to) = moved();
            core.moved(&[found]);
            assert_eq!(listed(&mut core), Some(from));
            assert_eq!(core.clients[&CLIENT].maps, []);
            assert_eq!(core.rmap.next_punch(), Some((to, 1)));
            assert_eq!(core.slots_taken(), 1);
        }
    }

    #[test]
    fn a_frame_whose_copy_nobody_took_is_its_contents_again() {
        let (mut core, pages, from, to) = moved();
        core.moved(&[Some(Checksum(1))]);
        let proposals = std::mem::take(&mut core.clients.get_mut(&CLIENT).unwrap().maps);
        core.withdraw(&proposals);
        assert_eq!(core.rmap.next_punch(), Some((to, 1)));
        assert_eq!(listed(&mut core), None);
        core.follow(CLIENT, pages[0], from);
        assert_eq!(listed(&mut core), Some(from));
        core.follow(CLIENT, pages[1], from);
        assert_eq!((core.clients[&CLIENT].maps.len(), core.rmap.next_punch()), (0, None));
    }

    #[test]
    fn a_page_that_was_missed_follows_when_it_is_seen() {
        let (mut core, pages, from, to) = moved();
        core.migration.shown_by.get_mut(&from).unwrap().pop();
        core.moved(&[Some(Checksum(1))]);
        assert_eq!(core.clients[&CLIENT].maps, [(pages[0], to)]);
        core.follow(CLIENT, pages[1], from);
        assert_eq!(core.clients[&CLIENT].maps, [(pages[0], to), (pages[1], to)]);
    }

    #[test]
    fn a_frame_whose_copy_is_full_stays_out_until_that_has_room() {
        let (mut core, pages, from, to) = moved();
        core.moved(&[Some(Checksum(1))]);
        let refused = std::mem::take(&mut core.clients.get_mut(&CLIENT).unwrap().maps);
        // Whoever cannot follow tries again and again; a child lives, so what it refused is kept.
        for _ in 0..core.tunables.max_page_sharing {
            core.rmap.propose(to);
            core.rmap.retire(to, CLIENT, Epoch(1));
        }
        core.withdraw(&refused);
        core.follow(CLIENT, pages[0], from);
        assert_eq!(
            (core.clients[&CLIENT].maps.len(), core.stats().stable_node_chains),
            (0, 0)
        );
        core.sealed(CLIENT, Epoch(1));
        assert_eq!(core.rmap.next_punch(), Some((to, 1)));
        core.follow(CLIENT, pages[0], from);
        assert_eq!(listed(&mut core), Some(from));
    }

    #[test]
    fn a_number_met_twice_stands_for_one_page() {
        let (mut core, pages, from, _) = moved();
        core.migration.begin_to_gather(from, 2);
        for page in [pages[1], pages[1]] {
            core.migration.gather(from, page);
        }
        core.choose_moves();
        assert!(!core.may_move(from), "{:?} was missed", pages[0]);
    }
}
