//! What happened: answers to orders, and what each says about pages.
//!
//! Per page looked at, as the kernel's `cmp_and_merge_page`: still where it was? changed in this pass? zero? in the stable
//! tree? waiting to be founded? in the unstable tree? else a candidate. Answers to unknown orders are ignored, for a client may
//! be gone when its answer is read. Relies on the driver to have read the words after the report arrived; believes only what
//! core itself proposed.

use crate::ahead::Found;
use crate::checksum::Checksum;
use crate::frame::Slot;
use crate::limbo::Epoch;
use crate::order::{OrderId, Task};
use crate::page::{Mark, PageNumber, PageRange, Place, Run, WINDOW};
use crate::region::{ClientId, Region, RegionId};
use crate::stable::Search;
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

/// What became of one run of a Map order; bit `i % 64` of word `i / 64` is its `i`th page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunOutcome {
    /// Pages whose word is Merged, Zero or Detached with the slot proposed, or on its way from there.
    pub merged: [u64; 8],
    /// Pages whose word is Broken or Held with the slot proposed: written since they were merged.
    pub covering: [u64; 8],
    /// Why the run was not mapped, if for another reason than its content.
    pub failure: Option<RunFailure>,
}

/// Why a client could not map a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunFailure {
    /// It has as many mappings as the kernel allows: nothing more is proposed to it in this pass.
    MappingLimit,
    /// It would have split a huge page, and `split_huge_pages` is 0.
    WouldSplit,
    /// Another address space has the memory of its shared region mapped: nothing was tried, and the region rests.
    NotAlone,
    /// Anything else.
    Other,
}

/// Pages to be written from the staging area into the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Index of the first of them into the Stage order.
    pub staging_index: u16,
    /// The first slot.
    pub slot: Slot,
    /// How many.
    pub pages: u16,
    /// They are a whole fresh extent, worth making huge before it is written.
    pub whole_extent: bool,
    /// The NUMA node that they belong to, while nodes count.
    pub node: Option<u8>,
}

impl Core {
    /// The answer to a Scan: one observation per page of the order, in its order. Missing ones are pages not looked at.
    pub fn scanned(&mut self, order: OrderId, epoch: Epoch, observations: &[Observation], now: Duration) {
        self.now = self.now.max(now);
        let is_scan = |task: &Task| matches!(task, Task::Scan { .. });
        let Some((id, Task::Scan { ranges, nodes, again })) = self.close(order, is_scan) else {
            return;
        };
        if again {
            self.events.again += observations.len() as u64;
        }
        let asked: usize = ranges.iter().map(|range| range.pages as usize).sum();
        if observations.len() < asked {
            self.unstable.left_gaps();
        }
        // Of an order that left before the knob changed, the checksums are others.
        let comparable = nodes == self.tunables.nodes_count();
        let epoch = self.raise_epoch(id, epoch);
        let mut observations = observations.iter();
        let (now, requested) = (self.now, self.pace.is_requested());
        let rests = |region: &Region| region.rests(now) && !requested;
        let mut looked_at: Vec<RegionId> = Vec::new();
        for &range in &ranges {
            let region = self.regions.of(range.first).map(|region| (region.range, rests(region)));
            let mut found = Found::default();
            for (page, observation) in range.iter().zip(observations.by_ref().take(range.pages as usize)) {
                if let Some((region, rests)) = region {
                    found.note(observation);
                    let checksum = observation.checksum.filter(|_| comparable);
                    let observation = Observation {
                        checksum,
                        ..*observation
                    };
                    self.observe(id, region, page, observation, epoch, rests);
                }
            }
            self.events.changed += u64::from(found.changed);
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
        self.refresh(id);
    }

    /// Ends an order of the expected kind; its client may be asked again.
    fn close(&mut self, order: OrderId, expected: impl Fn(&Task) -> bool) -> Option<(ClientId, Task)> {
        if !expected(&self.orders.get(order)?.task) {
            return None;
        }
        let closed = self.orders.close(order)?;
        self.answered(closed.client, order);
        Some((closed.client, closed.task))
    }

    fn answered(&mut self, id: ClientId, order: OrderId) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        for open in [&mut client.scanner, &mut client.remapper] {
            if *open == Some(order) {
                *open = None;
            }
        }
        let others = [client.scanner, client.remapper];
        client.stalled &= others
            .into_iter()
            .flatten()
            .any(|order| self.orders.is_overdue(order, self.now));
    }

    fn observe(
        &mut self,
        id: ClientId,
        region: PageRange,
        page: PageNumber,
        observation: Observation,
        epoch: Epoch,
        rests: bool,
    ) {
        self.events.scanned += 1;
        if observation.seen == Seen::Own
            && let Some((checksum, false)) = observation.checksum
            && !rests
            && self.is_candidate_still(page, checksum.masked())
        {
            self.mark(page, Mark::Unshared, true);
            return;
        }
        let was_zero = self.pages.place(page) == Place::Zero;
        if self.pages.is(page, Mark::Busy) {
            return;
        }
        self.unstable.remove(&mut self.pages, page);
        if !self.relocate(id, region, page, observation.seen, epoch, true) {
            return;
        }
        self.mark(page, Mark::Unshared, false);
        // What is unmerged on request is nobody's business any more, as where the kernel's VM_MERGEABLE is off.
        let counts = !matches!(observation.seen, Seen::Unbacked | Seen::Zero | Seen::Held(_));
        let is_item = counts && self.tunables.run != tunables::run::UNMERGE;
        if is_item && !was_zero && !self.pages.is(page, Mark::Item) {
            // It got memory, or was opted in again: the kernel has a new rmap_item for it.
            let (age, _) = self.pages.age(page);
            self.pages.set_age(page, age.min(1), 0);
        }
        self.mark_item(id, page, is_item);
        if let Seen::Merged(slot) = observation.seen {
            if !rests {
                self.follow(id, page, slot);
            }
            return;
        }
        if !matches!(observation.seen, Seen::Own | Seen::Broken(_) | Seen::Detached(_)) {
            return;
        }
        if let Some((checksum, changed)) = observation.checksum
            && self.tunables.run != tunables::run::UNMERGE
            && self.clients.get(&id).is_some_and(|client| client.is_planned())
            && (!changed || self.pace.is_requested())
        {
            if rests {
                // Who knows whether it has an equal: it would not merge with it.
                self.mark(page, Mark::Unshared, true);
            } else {
                self.place(id, page, checksum.masked());
            }
        }
    }

    /// Brings the page's place in line with what was seen; `false` if that tells nothing or cannot be.
    fn relocate(
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
            Seen::Broken(slot) | Seen::Held(Some(slot)) if known == Some(slot) => Place::Covering(slot),
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

    /// A merged page was written.
    fn broke(&mut self, page: PageNumber) {
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

    /// Whether the page, its own and with this content, was a candidate in the pass before and nobody came by who is equal: then it
    /// is one in this pass.
    fn is_candidate_still(&mut self, page: PageNumber, checksum: Checksum) -> bool {
        !self.is_zero(checksum) && self.unstable.confirm(&mut self.pages, page, checksum.tag(), self.pass)
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

    /// The answer to a Stage: which of its pages were copied. Fill the frames, then tell [`Core::filled`]; nothing to fill
    /// needs no such call.
    pub fn staged(&mut self, order: OrderId, copied: &dyn Fn(usize) -> bool) -> Vec<Fill> {
        let is_stage = |task: &Task| matches!(task, Task::Stage(_));
        let Some(open) = self.orders.get(order).filter(|order| is_stage(&order.task)) else {
            return Vec::new();
        };
        let id = open.client;
        let Task::Stage(entries) = self.orders.replace(order, Task::Fill(Vec::new())) else {
            return Vec::new();
        };
        let (mut fills, mut filling): (Vec<Fill>, Vec<_>) = (Vec::new(), Vec::new());
        let nodes = self.tunables.nodes_count();
        for (index, (_, founding, slot)) in entries.into_iter().enumerate() {
            if !copied(index) || !self.foundings.is_live(founding) {
                self.end_founding(founding);
                self.foundings.forget(founding);
                self.rmap.abandon(slot, false);
                continue;
            }
            filling.push((founding, slot));
            let node = nodes.then(|| self.foundings.checksum(founding).node());
            match fills.last_mut() {
                Some(fill)
                    if usize::from(fill.staging_index + fill.pages) == index
                        && fill.slot.0 + u32::from(fill.pages) == slot.0
                        && fill.node == node =>
                {
                    fill.pages += 1;
                }
                _ => fills.push(Fill {
                    staging_index: index as u16,
                    slot,
                    pages: 1,
                    whole_extent: false,
                    node,
                }),
            }
        }
        for fill in &mut fills {
            fill.whole_extent = u32::from(fill.pages) == WINDOW && fill.slot.0.is_multiple_of(WINDOW);
            if fill.whole_extent {
                self.rmap.frames.set_huge(fill.slot);
            }
        }
        if filling.is_empty() {
            self.orders.close(order);
        } else {
            self.orders.replace(order, Task::Fill(filling));
        }
        self.answered(id, order);
        self.refresh(id);
        fills
    }

    /// An extent that is about to be written whole did not become one huge page.
    pub fn stays_small(&mut self, first: Slot) {
        self.rmap.frames.set_small(first);
        self.events.huge_declined += 1;
    }

    /// Whether a frame that was written holds what was expected; its checksum has no node in it.
    pub(crate) fn is_of(&self, found: Option<Checksum>, expected: Option<Checksum>) -> bool {
        let content = |checksum: Checksum| checksum.content(self.tunables.nodes_count());
        found.map(content) == expected.map(content)
    }

    /// The frames of a Stage are filled: the checksum of each *frame*, in the order of the fills, without a node in it; `None`
    /// where it could not be written.
    pub fn filled(&mut self, order: OrderId, checksums: &[Option<Checksum>]) {
        if !self
            .orders
            .get(order)
            .is_some_and(|order| matches!(order.task, Task::Fill(_)))
        {
            return;
        }
        let Some(Task::Fill(filling)) = self.orders.close(order).map(|order| order.task) else {
            return;
        };
        let mut touched: Vec<ClientId> = Vec::new();
        let checksums = checksums.iter().copied().chain(std::iter::repeat(None));
        for ((founding, slot), found) in filling.into_iter().zip(checksums) {
            let expected = self
                .foundings
                .is_live(founding)
                .then(|| self.foundings.checksum(founding));
            let waiters = if expected.is_some() {
                self.foundings.end(founding)
            } else {
                Vec::new()
            };
            self.foundings.forget(founding);
            let client_of = |core: &Core, page| {
                let client = core.regions.of(page)?.client;
                core.clients.get(&client)?.is_planned().then_some(client)
            };
            let planned = waiters.iter().filter(|&&page| client_of(self, page).is_some()).count();
            for &page in &waiters {
                self.pages.mark(page, Mark::Busy, false);
            }
            // A frame for one page saves nothing; a frame of another content was staged from a page that changed.
            if planned < 2 || !self.is_of(found, expected) {
                self.rmap.abandon(slot, true);
                continue;
            }
            let checksum = expected.unwrap_or(self.zero);
            self.rmap.frames.fill(slot, checksum);
            self.rmap.stable.insert(&mut self.rmap.frames, slot);
            if waiters.len() as u32 >= self.tunables.max_page_sharing {
                // Whoever came after them was filed as if there were no frame.
                self.unstable.crowd_out(&self.pages, checksum.tag());
            }
            for page in waiters {
                if let Some(client) = client_of(self, page) {
                    self.propose(client, page, slot);
                    touched.push(client);
                }
            }
        }
        touched.sort_unstable();
        touched.dedup();
        for client in touched {
            self.refresh(client);
        }
    }

    /// The answer to a Map: what became of each run, read from the words after the report arrived.
    pub fn mapped(&mut self, order: OrderId, epoch: Epoch, outcomes: &[RunOutcome]) {
        let is_map = |task: &Task| matches!(task, Task::Map(_));
        let Some((id, Task::Map(runs))) = self.close(order, is_map) else {
            return;
        };
        let epoch = self.raise_epoch(id, epoch);
        for (index, &run) in runs.iter().enumerate() {
            let outcome = outcomes.get(index).copied().unwrap_or_default();
            self.run_mapped(id, run, &outcome, epoch);
            if outcome.failure == Some(RunFailure::WouldSplit) {
                self.events.would_split += u64::from(run.pages);
            }
            if outcome.failure == Some(RunFailure::MappingLimit)
                && let Some(client) = self.clients.get_mut(&id)
            {
                client.at_limit = true;
            }
        }
        self.unpin(&Task::Map(runs));
        self.refresh(id);
    }

    fn run_mapped(&mut self, id: ClientId, run: Run, outcome: &RunOutcome, epoch: Epoch) {
        let (now, was_tried) = (self.now, outcome.failure != Some(RunFailure::NotAlone));
        let region = self.regions.of_mut(run.first).map(|region| {
            let merged = outcome.merged.iter().map(|bits| bits.count_ones()).sum();
            region.answered(now, was_tried, merged);
            region.range
        });
        let has = |bits: &[u64; 8], i: usize| bits[i / 64] >> (i % 64) & 1 != 0;
        for (i, (page, slot)) in run.iter().enumerate() {
            let Some(region) = region else {
                // It left, so its page shows nothing now; a child made on the way may.
                self.rmap.retire(slot, id, epoch);
                continue;
            };
            self.pages.mark(page, Mark::Busy, false);
            if has(&outcome.merged, i) {
                match self.pages.place(page) {
                    Place::Merged(_) => self.events.migrated += 1,
                    _ => self.events.merges += 1,
                }
                self.pages.set_age(page, 0, 0);
                self.move_proposed(id, region, page, slot, Place::showing(slot), epoch);
            } else if has(&outcome.covering, i) && slot != Slot::ZERO {
                self.events.merges += 1;
                self.broke(page);
                self.move_proposed(id, region, page, slot, Place::Covering(slot), epoch);
            } else if !was_tried {
                // So nobody's clone shows it. To keep it for the next epoch would pile frames up for as long as
                // the other address space lives.
                self.rmap.withdraw(slot);
            } else {
                self.rmap.retire(slot, id, epoch);
            }
        }
    }

    fn move_proposed(
        &mut self,
        id: ClientId,
        region: PageRange,
        page: PageNumber,
        slot: Slot,
        to: Place,
        epoch: Epoch,
    ) {
        // The same place again (a broken page merged and broken again on the way): only the proposal is over.
        self.move_page(page, to, region, id, Some(epoch));
        if to == Place::showing(slot) {
            self.rmap.withdraw(slot);
        } else {
            self.rmap.retire(slot, id, epoch);
        }
    }

    /// The answer to an Unmap: where each page of the order is now.
    pub fn unmapped(&mut self, order: OrderId, epoch: Epoch, seen: &[Seen]) {
        let is_unmap = |task: &Task| matches!(task, Task::Unmap(_));
        let Some((id, Task::Unmap(ranges))) = self.close(order, is_unmap) else {
            return;
        };
        let epoch = self.raise_epoch(id, epoch);
        let mut seen = seen.iter();
        for &range in &ranges {
            let region = self.regions.of(range.first).map(|region| region.range);
            let mut seen = seen.by_ref().take(range.pages as usize);
            for page in range.iter() {
                let seen = seen.next().copied();
                let Some(region) = region else { continue };
                self.pages.mark(page, Mark::Busy, false);
                let before = self.pages.place(page);
                self.relocate(id, region, page, seen.unwrap_or(Seen::Busy), epoch, false);
                if self.pages.place(page) != before
                    && let Some(client) = self.clients.get_mut(&id)
                {
                    client.unmapped = true;
                }
            }
        }
        self.unpin(&Task::Unmap(ranges));
        self.refresh(id);
    }

    /// The client refused a whole order: nothing of it was done.
    pub fn order_refused(&mut self, order: OrderId, epoch: Epoch) {
        let Some((id, task)) = self.close(order, |task| !matches!(task, Task::Fill(_))) else {
            return;
        };
        let epoch = self.raise_epoch(id, epoch);
        match &task {
            Task::Scan { .. } => self.unstable.left_gaps(),
            Task::Fill(_) => {}
            Task::Stage(entries) => self.abandon_stage(entries),
            Task::Map(runs) => {
                for (page, slot) in runs.iter().flat_map(|run| run.iter()) {
                    self.clear_busy(page);
                    self.rmap.retire(slot, id, epoch);
                }
            }
            Task::Unmap(ranges) => {
                for page in ranges.iter().flat_map(|range| range.iter()) {
                    self.clear_busy(page);
                }
            }
        }
        self.unpin(&task);
        self.refresh(id);
    }

    /// Nothing of a Stage order was copied: its slots were never written.
    pub(crate) fn abandon_stage(&mut self, entries: &[(PageNumber, crate::FoundingId, Slot)]) {
        for &(_, founding, slot) in entries {
            self.end_founding(founding);
            self.foundings.forget(founding);
            self.rmap.abandon(slot, false);
        }
    }
}
