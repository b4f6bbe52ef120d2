//! What happened: answers to orders, and what each says about pages (of a Scan: `observe.rs`).
//!
//! Answers to unknown orders are ignored, for a client may be gone when its answer is read. Relies on the driver to have read the
//! words after the report arrived; believes only what core itself proposed.

use crate::checksum::Checksum;
use crate::frame::Slot;
use crate::limbo::Epoch;
use crate::observe::Seen;
use crate::order::{OrderId, Task};
use crate::page::{Mark, PageNumber, PageRange, Place, Run, WINDOW};
use crate::region::ClientId;
use crate::table::TOGETHER;
use crate::{Core, FoundingId};

/// What became of one run of a Map order; bit `i % 64` of word `i / 64` is its `i`th page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunOutcome {
    /// Pages whose word is Merged, Zero or Detached with the slot proposed, or on its way from there: somebody may still read the frame.
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
    /// Ends an order of the expected kind; its client may be asked again.
    pub(crate) fn close(&mut self, order: OrderId, expected: impl Fn(&Task) -> bool) -> Option<(ClientId, Task)> {
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
        let mut waiters = Vec::new();
        let mut checksums = checksums.iter().copied().chain(std::iter::repeat(None));
        for filling in filling.chunks(TOGETHER) {
            self.warm_foundings(filling);
            for (&(founding, slot), found) in filling.iter().zip(checksums.by_ref()) {
                self.founded(founding, slot, found, &mut waiters, &mut touched);
            }
        }
        touched.sort_unstable();
        touched.dedup();
        for client in touched {
            self.refresh(client);
        }
    }

    /// Begins what the end of each of these foundings looks for.
    fn warm_foundings(&self, filling: &[(FoundingId, Slot)]) {
        let live = filling
            .iter()
            .filter(|&&(founding, _)| self.foundings.is_live(founding));
        let touched = live.fold(0, |touched, &(founding, _)| {
            let checksum = self.foundings.checksum(founding);
            touched ^ self.foundings.warm(checksum) ^ self.rmap.stable.warm(&self.rmap.frames, checksum)
        });
        std::hint::black_box(touched);
    }

    /// A frame is filled, or could not be: who waited for it is asked to show it, or goes its own way.
    fn founded(
        &mut self,
        founding: FoundingId,
        slot: Slot,
        found: Option<Checksum>,
        waiters: &mut Vec<PageNumber>,
        touched: &mut Vec<ClientId>,
    ) {
        let expected = self
            .foundings
            .is_live(founding)
            .then(|| self.foundings.checksum(founding));
        waiters.clear();
        // Closed once, it turned pages away, whoever left it since and whatever the knob is now.
        let is_full = expected.is_some() && !self.foundings.end_into(founding, waiters);
        self.foundings.forget(founding);
        let first = touched.len();
        waiters.retain(|&page| {
            self.pages.mark(page, Mark::Busy, false);
            let client = self.regions.of(page).map(|region| region.client);
            let planned = client.filter(|id| self.clients.get(id).is_some_and(|client| client.is_planned()));
            touched.extend(planned);
            planned.is_some()
        });
        // A frame for one page saves nothing; a frame of another content was staged from a page that changed.
        if waiters.len() < 2 || !self.is_of(found, expected) {
            touched.truncate(first);
            return self.rmap.abandon(slot, true);
        }
        let checksum = expected.unwrap_or(self.zero);
        self.rmap.frames.fill(slot, checksum);
        self.rmap.stable.insert(&mut self.rmap.frames, slot);
        if is_full {
            // Whoever came after them was filed as if there were no frame.
            self.unstable.crowd_out(&self.pages, checksum.tag());
        }
        for (i, &page) in waiters.iter().enumerate() {
            self.propose(touched[first + i], page, slot);
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
                self.move_proposed(id, region, page, slot, self.over(page, slot), epoch);
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
