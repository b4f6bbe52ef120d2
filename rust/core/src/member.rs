//! Who comes and goes: clients, regions, epochs.
//!
//! What a member leaves behind is given up, never dropped: a region's frames wait in limbo for the epoch, a client's until
//! its death is certain. Relies on the driver for that certainty; never assumes it from a closed socket or a timeout.

use crate::client::Client;
use crate::limbo::Epoch;
use crate::mutant::{self, Mutant};
use crate::order::Task;
use crate::page::{Mark, PageNumber, PageRange, Place};
use crate::region::{ClientId, Kind, RegionId};
use crate::{Core, WINDOW};

/// Why a region was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoreError {
    /// The client never joined, or is gone.
    #[error("client {} is not a member of this domain; it must say Hello first", .0.0)]
    Stranger(ClientId),
    /// A region has at least one page.
    #[error("a region of client {} has no whole page; nothing to merge", .0.0)]
    Empty(ClientId),
    /// A position within a window is below 512.
    #[error("position {position} lies outside a window of {WINDOW} pages; give it modulo {WINDOW}")]
    Position {
        /// As it was given.
        position: u16,
    },
    /// All page numbers are taken.
    #[error("no page numbers left for a region of {pages} pages; use another domain")]
    Full {
        /// The region's pages.
        pages: u32,
    },
}

impl Core {
    /// A process joins the domain. Its regions come next; joining twice changes nothing.
    pub fn client_joined(&mut self, client: ClientId) {
        self.clients.entry(client).or_insert_with(|| Client {
            scanned: true,
            ..Client::default()
        });
    }

    /// A region is opted in, all of its pages Private; `position` is its first page's position in its 2 MiB window, and so
    /// is the first page number's modulo 512.
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn region_joined(
        &mut self,
        client: ClientId,
        kind: Kind,
        pages: u32,
        position: u16,
    ) -> Result<(RegionId, PageNumber), CoreError> {
        let member = self.clients.get_mut(&client).ok_or(CoreError::Stranger(client))?;
        if pages == 0 {
            return Err(CoreError::Empty(client));
        }
        if u32::from(position) >= WINDOW {
            return Err(CoreError::Position { position });
        }
        let (id, first) = self
            .regions
            .join(client, kind, pages, position)
            .ok_or(CoreError::Full { pages })?;
        self.pages.add(PageRange { first, pages });
        member.regions.push(id);
        member.pages += u64::from(pages);
        // The cursor stands before the new region, also when it had reached the end.
        member.scanned = false;
        self.go_ahead(client, id);
        self.disturb();
        Ok((id, first))
    }

    /// A region is over: its words are gone, and what its pages showed or covered was given up in `epoch`. Orders that name
    /// its pages are answered as usual.
    pub fn region_left(&mut self, region: RegionId, epoch: Epoch) {
        let Some(client) = self.regions.get(region).map(|region| region.client) else {
            return;
        };
        let epoch = self.raise_epoch(client, epoch);
        self.end_region(region, Some(epoch));
        self.refresh(client);
    }

    fn end_region(&mut self, id: RegionId, epoch: Option<Epoch>) {
        let Some(region) = self.regions.get(id).cloned() else {
            return;
        };
        let range = region.range;
        let inside = |page: PageNumber| page.0.wrapping_sub(range.first.0) < range.pages;
        for founding in self.foundings.drop_pages(inside) {
            self.end_founding(founding);
        }
        if let Some(client) = self.clients.get_mut(&region.client) {
            let index = client.regions.iter().position(|&other| other == id);
            if let Some(index) = index {
                client.regions.remove(index);
                client.scan -= usize::from(client.scan > index);
                let cursor = &mut client.unmap;
                if cursor.region > index {
                    cursor.region -= 1;
                } else if cursor.region == index {
                    cursor.pages = 0;
                }
            }
            client.pages -= u64::from(range.pages);
            let withdrawn: Vec<_> = client.maps.extract_if(.., |(page, _)| inside(*page)).collect();
            for (_, founding) in client.stages.extract_if(.., |(page, _)| inside(*page)) {
                // Its founding ended above, for the page to be staged is gone.
                self.foundings.forget(founding);
            }
            self.withdraw(&withdrawn);
        }
        for page in range.iter() {
            self.unstable.remove(&mut self.pages, page);
            self.mark(page, Mark::Unshared, false);
            self.mark_item(region.client, page, false);
            self.move_page(page, Place::Own, range, region.client, epoch);
        }
        if let Some(free) = self.regions.leave(id) {
            self.pages.remove(free);
        }
    }

    /// The client's socket is closed. Nothing more is planned for it, and all it holds is kept until [`Core::client_gone`].
    pub fn client_lost(&mut self, client: ClientId) {
        if let Some(member) = self.clients.get_mut(&client) {
            member.lost = true;
            self.unplan(client);
        }
    }

    /// The client is dead and no address space shows anything of it: all it held or was proposed is released at once.
    pub fn client_gone(&mut self, client: ClientId) {
        let Some(member) = self.clients.get_mut(&client) else {
            return;
        };
        member.lost = true;
        let orders = [member.scanner.take(), member.remapper.take()];
        self.unplan(client);
        for order in orders.into_iter().flatten() {
            let Some(order) = self.orders.close(order) else {
                continue;
            };
            match order.task {
                Task::Map(ref runs) => {
                    for (page, slot) in runs.iter().flat_map(|run| run.iter()) {
                        self.clear_busy(page);
                        self.rmap.withdraw(slot);
                    }
                }
                Task::Stage(ref entries) => self.abandon_stage(entries),
                _ => {}
            }
            self.unpin(&order.task);
        }
        let regions = self
            .clients
            .get(&client)
            .map(|member| member.regions.clone())
            .unwrap_or_default();
        for region in regions {
            self.end_region(region, None);
        }
        self.rmap.sealed(client, Epoch(u32::MAX));
        self.refresh(client);
        self.clients.remove(&client);
    }

    /// All life pages of the client up to and including this epoch took their seals.
    pub fn sealed(&mut self, client: ClientId, epoch: Epoch) {
        self.rmap.sealed(client, epoch);
    }

    /// How many VMAs merging may add to the client's mappings; without a word of it there is no limit.
    pub fn set_budget(&mut self, client: ClientId, vmas: u32) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.budget = Some(vmas);
        }
    }

    /// Leaves a client out of planning: what was not sent to it is dropped, what it holds or was sent stays.
    pub(crate) fn unplan(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let (maps, stages) = (std::mem::take(&mut client.maps), std::mem::take(&mut client.stages));
        let (scanner, remapper) = (client.scanner, client.remapper);
        self.pace.disturbed = true;
        self.unstable.left_gaps();
        self.withdraw(&maps);
        for (_, founding) in stages {
            self.end_founding(founding);
            self.foundings.forget(founding);
        }
        // A page that is being staged by a client that sleeps must not keep the others waiting for its content. Its slot
        // was told to nobody.
        if let Some(order) = scanner.and_then(|id| self.orders.get(id))
            && let Task::Stage(entries) = &order.task
        {
            let foundings: Vec<_> = entries.iter().map(|&(_, founding, _)| founding).collect();
            for founding in foundings {
                self.end_founding(founding);
            }
        }
        if mutant::active(Mutant::ProposalFreedOnTimeout)
            && let Some(order) = remapper.and_then(|id| self.orders.get(id))
            && let Task::Map(runs) = &order.task
        {
            let runs = runs.clone();
            for (page, slot) in runs.iter().flat_map(|run| run.iter()) {
                self.clear_busy(page);
                self.rmap.withdraw(slot);
            }
            self.orders
                .replace(remapper.unwrap_or(crate::OrderId(0)), Task::Map(Vec::new()));
        }
        self.refresh(id);
    }

    /// Epochs only rise: the latest one the client was ever in counts.
    pub(crate) fn raise_epoch(&mut self, client: ClientId, epoch: Epoch) -> Epoch {
        let Some(client) = self.clients.get_mut(&client) else {
            return epoch;
        };
        client.epoch = client.epoch.max(epoch);
        client.epoch
    }

    /// The order names its pages no more: numbers of regions that left meanwhile are free.
    pub(crate) fn unpin(&mut self, task: &Task) {
        for page in task.pinned() {
            if let Some(free) = self.regions.unpin(page) {
                self.pages.remove(free);
            }
        }
    }

    /// A page of an order that is over takes part again, if its region is still there.
    pub(crate) fn clear_busy(&mut self, page: PageNumber) {
        if self.regions.of(page).is_some() {
            self.pages.mark(page, Mark::Busy, false);
        }
    }
}
