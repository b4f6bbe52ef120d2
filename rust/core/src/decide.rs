//! What next: the driver pulls decisions until it is told to wait.
//!
//! In the order of urgency: memory to give back (before its slots are used again), merges and unmerges that are ready, pages
//! to stage for frames to be, and only then further scanning. Each call does a bounded amount of work. Relies on `plan.rs`,
//! `scan.rs` and `pace.rs` for the choice; never believes anything, that is `answer.rs`.

use crate::ahead::EXTRA;
use crate::founding::FoundingId;
use crate::order::{Decision, MAX_MAP_PAGES, MAX_RANGES, MAX_STAGE_PAGES, MAX_STEP_PAGES, Task, Why};
use crate::page::{Mark, PageNumber, PageRange, Place, Run};
use crate::region::ClientId;
use crate::tunables::run;
use crate::{Core, Queue, idle, plan};
use std::time::Duration;

/// What the driver does now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Carry this out, and ask again.
    Do(Decision),
    /// Ask again at this time, or after the next event.
    WaitUntil(Duration),
    /// Ask again after the next event.
    Idle,
}

/// Choices without any page (smart scan left them out) before the driver gets a turn.
const EMPTY_CHOICES: u32 = 16;
/// When nothing could be unmapped, when to try again; also the shortest wait of a scan that found nothing to look at.
const RETRY: Duration = Duration::from_millis(20);

impl Core {
    /// The next decision. Punches are to be carried out before the next call.
    pub fn next(&mut self, now: Duration) -> Next {
        self.now = self.now.max(now);
        while let Some(client) = self.orders.next_overdue(self.now) {
            if let Some(client) = self.clients.get_mut(&client) {
                client.stalled = true;
            }
            self.unplan(client);
        }
        self.let_go(false);
        if let Some((first, pages)) = self.rmap.next_punch() {
            return Next::Do(Decision::Punch { first, pages });
        }
        if self.unmerge_again.is_some_and(|at| at <= self.now) {
            self.unmerge_again = None;
            self.each_client(|client| client.rests = false);
        }
        while let Some(client) = self.dequeue(Queue::Remap) {
            let unmerging = self.tunables.run == run::UNMERGE;
            let decision = if unmerging {
                self.unmap(client)
            } else {
                self.map(client)
            };
            self.refresh(client);
            if let Some(decision) = decision {
                return Next::Do(decision);
            }
        }
        while let Some(client) = self.dequeue(Queue::Stage) {
            let decision = self.stage(client);
            self.refresh(client);
            if let Some(decision) = decision {
                return Next::Do(decision);
            }
        }
        if let Some(decision) = self.next_move() {
            return Next::Do(decision);
        }
        self.scan_on()
    }

    /// Something to wait for: an answer, a silence that gets too long, a retry.
    fn quiet(&mut self) -> Next {
        let deadline = if self.active > 0 {
            self.orders.next_deadline()
        } else {
            None
        };
        deadline
            .into_iter()
            .chain(self.unmerge_again)
            .chain(
                self.held
                    .first()
                    .map(|&(until, _)| until)
                    .filter(|_| self.has_ceilings()),
            )
            .min()
            .map_or(Next::Idle, Next::WaitUntil)
    }

    fn until(&mut self, wake: Duration) -> Next {
        match self.quiet() {
            Next::WaitUntil(deadline) => Next::WaitUntil(wake.min(deadline)),
            _ => Next::WaitUntil(wake),
        }
    }

    fn each_client(&mut self, mut change: impl FnMut(&mut crate::Client)) {
        let ids: Vec<ClientId> = self.clients.keys().copied().collect();
        for id in ids {
            if let Some(client) = self.clients.get_mut(&id) {
                change(client);
            }
            self.refresh(id);
        }
    }

    pub(crate) fn pause(&self) -> Duration {
        Duration::from_millis(u64::from(self.tunables.sleep_millisecs))
    }

    // --- the remapper's orders

    fn map(&mut self, id: ClientId) -> Option<Decision> {
        let client = self.clients.get_mut(&id)?;
        if client.remapper.is_some() || client.maps.is_empty() {
            return None;
        }
        let mut proposals = std::mem::take(&mut client.maps);
        let vmas = client.vmas_left();
        proposals.sort_unstable_by_key(|&(page, _)| page);
        let nowhere = PageRange {
            first: PageNumber(0),
            pages: 0,
        };
        let region_of = |page| self.regions.of(page).map_or(nowhere, |region| region.range);
        let most = if self.has_ceilings() {
            MAX_STEP_PAGES
        } else {
            MAX_MAP_PAGES
        };
        let plan = plan::choose(&self.pages, plan::runs(&proposals, region_of), vmas, most);
        let each = |runs: &[Run]| runs.iter().flat_map(|run| run.iter()).collect::<Vec<_>>();
        let over_budget = each(&plan.over_budget);
        self.events.over_budget += over_budget.len() as u64;
        self.withdraw(&over_budget);
        if let Some(client) = self.clients.get_mut(&id) {
            client.maps = each(&plan.later);
        }
        if plan.now.is_empty() {
            return None;
        }
        self.waiting_maps -= plan.now.iter().map(|run| u64::from(run.pages)).sum::<u64>();
        let order = self.open(id, Task::Map(plan.now.clone()));
        Some(Decision::Map {
            client: id,
            order,
            runs: plan.now,
        })
    }

    pub(crate) fn open(&mut self, id: ClientId, task: Task) -> crate::OrderId {
        for page in task.pinned() {
            self.regions.pin(page);
        }
        let for_scanner = matches!(task, Task::Scan { .. } | Task::Stage(_));
        let order = self.orders.open(id, task, self.now);
        if let Some(client) = self.clients.get_mut(&id) {
            *(if for_scanner {
                &mut client.scanner
            } else {
                &mut client.remapper
            }) = Some(order);
        }
        order
    }

    /// Nobody is a candidate any more, nor on its way into the stable tree: what comes of it is found anew.
    pub(crate) fn drop_candidates(&mut self) {
        for founding in self.foundings.live() {
            self.end_founding(founding);
        }
        self.unstable.empty(&self.pages);
        let mut stages = Vec::new();
        self.each_client(|client| stages.append(&mut client.stages));
        for (_, founding) in stages {
            self.foundings.forget(founding);
        }
    }

    /// run=2 begins: what is not merged yet is dropped, and counting starts anew.
    pub(crate) fn begin_unmerge(&mut self) {
        self.drop_candidates();
        self.events.full_scans = 0;
        let ids: Vec<ClientId> = self.clients.keys().copied().collect();
        for id in ids {
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            let maps = std::mem::take(&mut client.maps);
            (client.unmap, client.unmapped, client.rests) = Default::default();
            let regions = client.regions.clone();
            self.withdraw(&maps);
            for range in regions
                .into_iter()
                .filter_map(|region| self.regions.get(region).map(|region| region.range))
                .collect::<Vec<_>>()
            {
                for page in range.iter() {
                    self.mark(page, Mark::Unshared, false);
                    self.mark_item(id, page, false);
                    self.pages.set_age(page, 0, 0);
                }
            }
            self.refresh(id);
        }
    }

    fn unmap(&mut self, id: ClientId) -> Option<Decision> {
        let client = self.clients.get_mut(&id)?;
        if client.remapper.is_some() {
            return None;
        }
        let (mut ranges, mut chosen): (Vec<PageRange>, u32) = (Vec::new(), 0);
        while let Some(region) = client
            .regions
            .get(client.unmap.region)
            .and_then(|&id| self.regions.get(id))
        {
            while client.unmap.pages < region.range.pages && chosen < MAX_STEP_PAGES && ranges.len() < MAX_RANGES {
                let page = region.range.first.plus(client.unmap.pages);
                client.unmap.pages += 1;
                let shows = matches!(
                    self.pages.place(page),
                    Place::Merged(_) | Place::Zero | Place::Detached(_)
                );
                if !shows || !self.pages.mark(page, Mark::Busy, true) {
                    continue;
                }
                chosen += 1;
                match ranges.last_mut() {
                    Some(range) if range.first.0 + range.pages == page.0 && range.first >= region.range.first => {
                        range.pages += 1;
                    }
                    _ => ranges.push(PageRange { first: page, pages: 1 }),
                }
            }
            if client.unmap.pages < region.range.pages {
                break;
            }
            client.unmap.region += 1;
            client.unmap.pages = 0;
        }
        if ranges.is_empty() {
            // A sweep is over. Pages may have been busy: sweep again, at once only where that promises something.
            client.unmap = Default::default();
            client.rests = !std::mem::take(&mut client.unmapped);
            if client.rests {
                self.unmerge_again.get_or_insert(self.now + RETRY);
            }
            return None;
        }
        let order = self.open(id, Task::Unmap(ranges.clone()));
        Some(Decision::Unmap {
            client: id,
            order,
            ranges,
            why: Why::Unmerge,
        })
    }

    // --- the scanner's orders

    /// Takes slots for the pages of as many windows as the staging area holds.
    fn stage(&mut self, id: ClientId) -> Option<Decision> {
        let client = self.clients.get_mut(&id)?;
        if client.scanner.is_some() {
            return None;
        }
        let mut waiting = std::mem::take(&mut client.stages);
        waiting.sort_unstable_by_key(|&(page, _)| page);
        let mut entries = Vec::new();
        let mut rest: &[(PageNumber, FoundingId)] = &waiting;
        while let Some(&(first, _)) = rest.first() {
            let in_window = rest
                .iter()
                .take_while(|(page, _)| page.window() == first.window())
                .count();
            if entries.len() + in_window > MAX_STAGE_PAGES {
                break;
            }
            let (group, others) = rest.split_at(in_window);
            self.take_slots(group, &mut entries);
            rest = others;
        }
        if let Some(client) = self.clients.get_mut(&id) {
            client.stages = rest.to_vec();
        }
        if entries.is_empty() {
            return None;
        }
        let pages = entries.iter().map(|&(page, _, _)| page).collect();
        let order = self.open(id, Task::Stage(entries));
        Some(Decision::Stage {
            client: id,
            order,
            pages,
        })
    }

    /// Slots for pages of one window; small regions may share it.
    fn take_slots(
        &mut self,
        group: &[(PageNumber, FoundingId)],
        entries: &mut Vec<(PageNumber, FoundingId, crate::Slot)>,
    ) {
        let mut rest = group;
        while let Some(&(first, _)) = rest.first() {
            let region = self.regions.of(first).map(|region| (region.range, region.hint));
            let Some((range, mut hint)) = region else { break };
            let end = range.first.0 + range.pages;
            let (mine, others) = rest.split_at(rest.iter().take_while(|(page, _)| page.0 < end).count());
            rest = others;
            let mut live = Vec::with_capacity(mine.len());
            for &(page, founding) in mine {
                if self.foundings.is_live(founding) {
                    live.push((page, founding));
                } else {
                    self.foundings.forget(founding);
                }
            }
            if live.is_empty() {
                continue;
            }
            let positions: Vec<u16> = live.iter().map(|(page, _)| page.position()).collect();
            let slots = self.rmap.frames.take(&mut hint, first.window(), &positions);
            if let Some(region) = self.regions.of_mut(first) {
                region.hint = hint;
            }
            for ((page, founding), slot) in live.into_iter().zip(slots) {
                match slot {
                    Some(slot) => entries.push((page, founding, slot)),
                    None => {
                        // The store is full: nothing can be merged until something is freed.
                        self.end_founding(founding);
                        self.foundings.forget(founding);
                    }
                }
            }
        }
    }

    fn scan_on(&mut self) -> Next {
        if self.tunables.run == run::UNMERGE && self.pace.is_requested() {
            self.end_round(true);
        }
        if self.pace.is_requested() && std::mem::take(&mut self.pace.restart) {
            self.begin_round();
        }
        let mut empty = 0;
        // At most one pass ends within a call, so that a pass without a page to look at cannot hold the driver.
        for _ in 0..2 {
            let requested = self.pace.is_requested();
            if !requested && (self.tunables.run != run::RUN || !self.has_anything_to_scan()) {
                self.advisor.stand_still();
                return self.quiet();
            }
            if !requested && let Some(wake) = self.batch_over() {
                return self.until(wake);
            }
            if !requested {
                self.call();
            }
            while let Some((id, ahead)) = self.next_to_scan(requested) {
                let decision = self.scan(id, ahead, requested);
                self.refresh(id);
                if let Some(decision) = decision {
                    return Next::Do(decision);
                }
                empty += 1;
                if empty == EMPTY_CHOICES {
                    return Next::WaitUntil(self.now);
                }
            }
            if self.in_pass > 0 {
                return self.quiet();
            }
            if requested {
                if self.active > 0 || self.foundings.len() > 0 || self.waiting_maps > 0 {
                    return self.quiet();
                }
                let nothing = !self.has_anything_to_scan();
                self.events.full_scans += u64::from(!nothing);
                self.end_round(nothing);
            } else {
                self.events.full_scans += 1;
                self.choose_moves();
                let mut pause = self.pause();
                if self.tunables.is_advised() {
                    if let Some(pages) = self.advisor.end_pass(self.now, &self.tunables) {
                        self.tunables.pages_to_scan = pages;
                    }
                    pause = pause.max(self.idle_pause());
                }
                self.pace.batch_left = 0;
                self.pace.wake = Some(self.now + pause);
            }
            if self.pace.is_requested() {
                self.begin_round()
            } else {
                self.begin_pass()
            }
        }
        self.until(self.now + RETRY)
    }

    fn idle_pause(&mut self) -> Duration {
        let outcome = idle::Outcome {
            looked_at: self.events.scanned - self.at_pass.scanned,
            stirred: self.events.stirred_since(&self.at_pass),
            cpu: self.advisor.spent(),
        };
        let longest = Duration::from_secs(self.tunables.advisor_target_scan_time.into());
        self.idle.end_pass(&outcome, longest)
    }

    fn has_anything_to_scan(&self) -> bool {
        self.in_pass > 0
            || self
                .clients
                .values()
                .any(|client| client.is_planned() && client.pages > 0)
    }

    /// When the next batch begins, if the current one is over.
    fn batch_over(&mut self) -> Option<Duration> {
        if self.pace.batch_left > 0 {
            return None;
        }
        let wake = *self.pace.wake.get_or_insert(self.now + self.pause());
        if wake > self.now {
            return Some(wake);
        }
        self.pace.wake = None;
        self.pace.begin_batch(self.tunables.pages_to_scan, self.pause());
        if self.pace.batch_left > 0 {
            return None;
        }
        // All of it was looked at in advance, or there is nothing to a batch.
        let wait = if self.tunables.pages_to_scan == 0 {
            self.pause().max(RETRY)
        } else {
            self.pause()
        };
        self.pace.wake = Some(self.now + wait);
        self.pace.wake
    }

    fn begin_pass(&mut self) {
        self.pass = (self.pass + 1) % EXTRA;
        self.pass = self.pass.max(1);
        self.advisor.begin_pass();
        self.at_pass = self.events;
        let left_out = |client: &crate::Client| !client.is_planned() && client.pages > 0;
        let whole = self.in_pass == 0 && !self.clients.values().any(left_out);
        self.unstable.begin_pass(&self.pages, whole);
        self.each_client(|client| {
            client.scan = Default::default();
            client.scanned = client.regions.is_empty();
            client.at_limit = false;
        });
    }

    fn begin_round(&mut self) {
        self.begin_pass();
        self.migration.forget();
        self.pace.round += 1;
        (self.pace.merged_at_round, self.pace.disturbed) = (self.events.merges, false);
    }

    fn end_round(&mut self, nothing_to_scan: bool) {
        self.pace
            .end_round(self.now, self.events.merges, self.events.scanned, nothing_to_scan);
    }
}
