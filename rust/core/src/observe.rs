//! What was seen of pages: observations, and where each of them leads.
//!
//! Pages that nobody wrote since they became candidates are asked for a few dozen at a time and confirmed together, by a comparison of
//! their tags with those of their records; only where that does not hold is each of them looked at.
//!
//! Per page looked at, as the kernel's `cmp_and_merge_page`: still where it was? changed in this pass? zero? in the stable
//! tree? waiting to be founded? in the unstable tree? else a candidate. Relies on the driver to have read the words after the report
//! arrived; believes only what core itself proposed.

use crate::ahead::Found;
use crate::checksum::Checksum;
use crate::frame::Slot;
use crate::limbo::Epoch;
use crate::mutant::{self, Mutant};
use crate::order::{OrderId, Task};
use crate::page::{Mark, PageNumber, PageRange, Place};
use crate::region::{ClientId, Kind, RegionId};
use crate::stable::Search;
use crate::table::TOGETHER;
use crate::{Core, tunables};
use std::time::Duration;

/// A page's state word in core's terms, words of old stores read as their origin would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Private without any memory: nothing to merge.
    Unbacked,
    /// Private, or showing a frame of an old store: mergeable.
    Own,
    /// Shows this frame.
    Merged(Slot),
    /// All zero, without memory.
    Zero,
    /// Own memory inside a mapping of this slot: mergeable.
    Broken(Slot),
    /// A private copy over this slot: mergeable.
    Detached(Slot),
    /// Out of the protocol on request, inside a mapping of this slot if any.
    Held(Option<Slot>),
    /// On its way; the next scan sees where it went.
    Busy,
    /// Means nothing here: its region is ending, or the word is damaged.
    Foreign,
}

/// What the driver read of one page after a report arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Where the page is.
    pub seen: Seen,
    /// Its checksum, and whether that took its value in this pass; `None` if it was not read.
    pub checksum: Option<(Checksum, bool)>,
}

impl Observation {
    /// Of a page that tells nothing.
    pub const NONE: Observation = Observation {
        seen: Seen::Foreign,
        checksum: None,
    };
}

/// What the driver can read of an order's pages after its report arrived. Pages are numbered as the order has them.
pub trait Observations {
    /// How many there are; the order's others were not looked at.
    fn pages(&self) -> usize;

    /// What was seen of one.
    fn of(&self, page: usize) -> Observation;

    /// Tells the checksums of consecutive pages if each of them is [`Seen::Own`] and has one that did not change in this pass; else what is
    /// written there means nothing.
    fn unchanged(&self, first: usize, checksums: &mut [Checksum]) -> bool;

    /// The client's epoch, read after all that was told so far: what the pages gave up before was given up in this epoch or an earlier one.
    fn epoch(&self) -> Epoch;
}

/// What was read beforehand, and then the epoch.
impl Observations for (Epoch, &[Observation]) {
    fn pages(&self) -> usize {
        self.1.len()
    }

    fn of(&self, page: usize) -> Observation {
        self.1[page]
    }

    fn epoch(&self) -> Epoch {
        self.0
    }

    fn unchanged(&self, first: usize, checksums: &mut [Checksum]) -> bool {
        checksums.iter_mut().zip(&self.1[first..]).all(|(known, observation)| {
            let (checksum, changed) = observation.checksum.unwrap_or((Checksum(0), true));
            *known = checksum;
            observation.seen == Seen::Own && !changed
        })
    }
}

/// What is the same for all pages of a report that belong to one region.
struct Report {
    client: ClientId,
    region: PageRange,
    /// The region rests, and nobody asked for a merge.
    rests: bool,
    /// Equals are looked for.
    searches: bool,
    /// Its checksums are of the kind that is in the trees.
    comparable: bool,
}

impl Report {
    /// The content of a page that has memory of its own, all of it, and the same as before.
    fn same(&self, observation: &Observation) -> Option<Checksum> {
        let own = observation.seen == Seen::Own && self.comparable;
        observation
            .checksum
            .filter(|&(_, changed)| own && !changed)
            .map(|(checksum, _)| checksum.masked())
    }

    /// The content that an equal is looked for of; `even_if_changed` in this pass.
    fn content(&self, observation: &Observation, even_if_changed: bool) -> Option<Checksum> {
        let own = matches!(observation.seen, Seen::Own | Seen::Broken(_) | Seen::Detached(_));
        let searched = own && self.searches && self.comparable;
        observation
            .checksum
            .filter(|&(_, changed)| searched && (!changed || even_if_changed))
            .map(|(checksum, _)| checksum.masked())
    }
}

impl Core {
    /// The answer to a Scan.
    pub fn scanned(&mut self, order: OrderId, observations: &impl Observations, now: Duration) {
        self.now = self.now.max(now);
        let is_scan = |task: &Task| matches!(task, Task::Scan { .. });
        let Some((id, Task::Scan { ranges, nodes, again })) = self.close(order, is_scan) else {
            return;
        };
        let asked: usize = ranges.iter().map(|range| range.pages as usize).sum();
        let seen = observations.pages().min(asked);
        if again {
            self.events.again += seen as u64;
        }
        if seen < asked {
            self.unstable.left_gaps();
        }
        // Of an order that left before the knob changed, the checksums are others.
        let comparable = nodes == self.tunables.nodes_count();
        let (now, requested) = (self.now, self.pace.is_requested());
        let searches = self.tunables.run != tunables::run::UNMERGE
            && self.clients.get(&id).is_some_and(|client| client.is_planned());
        let mut looked_at: Vec<RegionId> = Vec::new();
        let mut settled = true;
        let mut end = 0;
        for &range in &ranges {
            let begin = end;
            end += range.pages as usize;
            let Some(region) = self.regions.of(range.first) else {
                continue;
            };
            let report = Report {
                client: id,
                region: region.range,
                rests: region.rests(now) && !requested,
                searches,
                comparable,
            };
            let found = self.observe_range(&report, range.first, begin..end.min(seen), observations);
            self.events.changed += u64::from(found.changed);
            settled &= found.changed == 0;
            if let Some(region) = self.regions.found(range.first, &found)
                && looked_at.last() != Some(&region)
            {
                looked_at.push(region);
            }
        }
        for region in looked_at {
            self.judge(region);
        }
        self.unpin(&Task::Scan { ranges, nodes, again });
        if self.pace.wake.is_some() {
            self.pace.wake = Some(self.now + self.pause());
        }
        if let Some(client) = self.clients.get_mut(&id) {
            client.settled = settled;
        }
        self.refresh(id);
    }

    /// What was seen of a range, as far as it was looked at.
    fn observe_range(
        &mut self,
        report: &Report,
        first: PageNumber,
        seen: std::ops::Range<usize>,
        observations: &impl Observations,
    ) -> Found {
        let mut found = Found::default();
        let (mut each, mut checksums) = ([Observation::NONE; TOGETHER], [Checksum(0); TOGETHER]);
        let (mut page, mut at) = (first, seen.start);
        while at < seen.end {
            // Never of two windows.
            let pages = (TOGETHER - page.0 as usize % TOGETHER).min(seen.end - at);
            let checksums = &mut checksums[..pages];
            let unchanged = !report.rests && report.comparable && observations.unchanged(at, checksums);
            self.events.scanned += pages as u64;
            if !unchanged || !self.are_candidates_still(page, checksums) {
                let each = &mut each[..pages];
                for (i, observation) in each.iter_mut().enumerate() {
                    *observation = observations.of(at + i);
                    found.note(observation);
                }
                let epoch = self.raise_epoch(report.client, observations.epoch());
                self.observe_together(report, page, each, epoch);
            }
            page = page.plus(pages as u32);
            at += pages;
        }
        found
    }

    /// What was seen of a few consecutive pages. Those of which nothing is new need no search; the others' searches begin together.
    fn observe_together(&mut self, report: &Report, first: PageNumber, observations: &[Observation], epoch: Epoch) {
        let mut unsettled = [false; TOGETHER];
        let mut touched = 0;
        for (i, observation) in observations.iter().enumerate() {
            let page = first.plus(i as u32);
            let same = report.same(observation).filter(|_| !report.rests);
            unsettled[i] = !same.is_some_and(|content| self.are_candidates_still(page, &[content]));
        }
        for (observation, _) in observations.iter().zip(unsettled).filter(|&(_, unsettled)| unsettled) {
            if let Some(checksum) = report.content(observation, self.pace.is_requested()) {
                touched ^= self.rmap.stable.warm(&self.rmap.frames, checksum)
                    ^ self.foundings.warm(checksum)
                    ^ self.unstable.warm(&self.pages, checksum.tag());
            }
        }
        std::hint::black_box(touched);
        for (i, observation) in observations.iter().enumerate().filter(|&(i, _)| unsettled[i]) {
            self.observe(report, first.plus(i as u32), observation, epoch);
        }
    }

    fn observe(&mut self, report: &Report, page: PageNumber, observation: &Observation, epoch: Epoch) {
        let was_zero = self.pages.place(page) == Place::Zero;
        if self.pages.is(page, Mark::Busy) {
            return;
        }
        self.unstable.remove(&mut self.pages, page);
        let (id, seen) = (report.client, observation.seen);
        if !self.relocate(id, report.region, page, seen, epoch, true) {
            return;
        }
        self.mark(page, Mark::Unshared, false);
        // What is unmerged on request is nobody's business any more, as where the kernel's VM_MERGEABLE is off.
        let counts = !matches!(seen, Seen::Unbacked | Seen::Zero | Seen::Held(_));
        let is_item = counts && self.tunables.run != tunables::run::UNMERGE;
        if is_item && !was_zero && !self.pages.is(page, Mark::Item) {
            // It got memory, or was opted in again: the kernel has a new rmap_item for it.
            let (age, _) = self.pages.age(page);
            self.pages.set_age(page, age.min(1), 0);
        }
        self.mark_item(id, page, is_item);
        if let Seen::Merged(slot) = seen {
            if !report.rests {
                self.follow(id, page, slot);
            }
        } else if let Some(checksum) = report.content(observation, self.pace.is_requested()) {
            if report.rests {
                // Who knows whether it has an equal: it would not merge with it.
                self.mark(page, Mark::Unshared, true);
            } else {
                self.place(id, page, checksum);
            }
        }
    }

    /// Brings the page's place in line with what was seen; `false` if that tells nothing or cannot be.
    pub(crate) fn relocate(
        &mut self,
        id: ClientId,
        region: PageRange,
        page: PageNumber,
        seen: Seen,
        epoch: Epoch,
        writes_count: bool,
    ) -> bool {
        let from = self.pages.place(page);
        let known = from.slot();
        let to = match seen {
            Seen::Busy | Seen::Foreign => return false,
            Seen::Own | Seen::Unbacked | Seen::Held(None) => Place::Own,
            Seen::Merged(slot) if from == Place::Merged(slot) => from,
            // It names no frame, so it need not have been proposed by this core: a client keeps such pages over its brokers.
            Seen::Zero if matches!(from, Place::Own | Place::Zero) => Place::Zero,
            Seen::Broken(slot) | Seen::Held(Some(slot)) if known == Some(slot) => self.over(page, slot),
            Seen::Detached(slot) if matches!(from, Place::Merged(_) | Place::Detached(_)) && known == Some(slot) => {
                Place::Detached(slot)
            }
            _ => {
                self.events.disbelieved += 1;
                return false;
            }
        };
        let was_written = matches!(seen, Seen::Own | Seen::Broken(_) | Seen::Detached(_));
        if writes_count && was_written && matches!(from, Place::Merged(_)) && to != from {
            self.broke(page);
        }
        self.move_page(page, to, region, id, Some(epoch));
        true
    }

    /// The place of a page that is said to cover a slot. In shared memory it was Detached before, and shows the frame still where it was
    /// never written.
    pub(crate) fn over(&self, page: PageNumber, slot: Slot) -> Place {
        match self.regions.of(page).map(|region| region.kind) {
            Some(Kind::Shared) if !mutant::active(Mutant::HeldCovers) => Place::Detached(slot),
            _ => Place::Covering(slot),
        }
    }

    /// A merged page was written.
    pub(crate) fn broke(&mut self, page: PageNumber) {
        self.events.cow += 1;
        let now = self.now;
        let rests = self.regions.of_mut(page).is_some_and(|region| region.broke(now));
        self.events.rests += u64::from(rests);
    }

    /// Whether a page of this content needs no memory at all.
    fn is_zero(&self, checksum: Checksum) -> bool {
        let nodes = self.tunables.nodes_count();
        // As in the kernel, the page of zeros is every node's.
        checksum.content(nodes) == self.zero.content(nodes) && self.tunables.use_zero_pages == 1
    }

    /// Whether consecutive pages of one window, their own and with these contents, were candidates in the pass before and nobody came by
    /// who is equal to one of them: then all are in this pass.
    fn are_candidates_still(&mut self, first: PageNumber, contents: &[Checksum]) -> bool {
        if contents.iter().any(|&checksum| self.is_zero(checksum)) {
            return false;
        }
        let Some(unmarked) = self.unstable.confirm(&mut self.pages, first, contents, self.pass) else {
            return false;
        };
        self.events.unshared += u64::from(unmarked);
        debug_assert!(
            !contents.iter().any(|checksum| self.has_an_equal(checksum.masked())),
            "{first:?}"
        );
        true
    }

    /// Whether a page of this content would not become a candidate.
    fn has_an_equal(&mut self, checksum: Checksum) -> bool {
        let most = self.tunables.max_page_sharing;
        let found = self.rmap.stable.search(&self.rmap.frames, checksum, most);
        matches!(found, Search::Room(_)) || self.foundings.find(checksum).is_some()
    }

    /// Finds an equal for a page with this content, or files it as a candidate.
    fn place(&mut self, id: ClientId, page: PageNumber, checksum: Checksum) {
        let nodes = self.tunables.nodes_count();
        if self.is_zero(checksum) {
            return self.propose(id, page, Slot::ZERO);
        }
        if nodes && checksum.node() == Checksum::NO_NODE {
            return self.mark(page, Mark::Unshared, true);
        }
        let most = self.tunables.max_page_sharing;
        let crowded_out = match self.rmap.stable.search(&self.rmap.frames, checksum, most) {
            Search::Room(slot) => return self.propose(id, page, slot),
            Search::Full => true,
            Search::Absent => false,
        };
        if let Some(founding) = self.foundings.find(checksum) {
            self.pages.mark(page, Mark::Busy, true);
            return self.foundings.wait(founding, page, most);
        }
        let tag = checksum.tag();
        if let Some(other) = self.unstable.find(&mut self.pages, tag) {
            self.unstable.remove(&mut self.pages, other);
            let partner = self.regions.of(other).map(|region| region.client);
            if partner
                .and_then(|id| self.clients.get(&id))
                .is_some_and(|client| client.is_planned())
            {
                self.mark(other, Mark::Unshared, false);
                let founding = self.foundings.begin(checksum, page);
                for page in [other, page] {
                    self.pages.mark(page, Mark::Busy, true);
                    self.foundings.wait(founding, page, most);
                }
                if let Some(client) = self.clients.get_mut(&id) {
                    client.stages.push((page, founding));
                }
                return;
            }
        }
        self.unstable.insert(&mut self.pages, page, tag);
        self.mark(page, Mark::Unshared, true);
        if crowded_out {
            self.unstable.crowd_out(&self.pages, tag);
        }
    }
}
