//! Looks ahead of the pass: who need not wait for its end, and where looking once more pays.
//!
//! A page merges at its second look, and a second look is a second pass, which a newcomer with 10 GiB makes long for everybody.
//! So half of each batch, while anybody wants it, goes to regions that are *ahead*; the other half goes on with the pass. Both halves
//! go round their clients, a window or a client's share each, whatever a client holds. Ahead are
//!
//! - regions that were never looked at. That look is the pass's own, only earlier: each region keeps how far it is in this pass,
//!   and the pass's cursor goes over what is done;
//! - regions that are *called*: an eighth of them changed at their last look, or they had no memory yet, so another look is worth
//!   having. Within the same pass it is an extra one, only at pages that could not be filed; in the next it is that pass's own.
//!   A region is called 100 ms after such a look, and if what merged meanwhile is less than a sixteenth of it twice as
//!   late each time, up to 102 s: that ranks regions by what looking at them yields.
//!
//! What it does not touch: a pass is over when all regions were looked at in it, whoever else wants to go on; it
//! empties the unstable tree, ages pages and ends rounds of a merge on request, which knows no looks ahead. An extra look files into the
//! unstable tree of its pass, where all are that were looked at before and where all come by that are looked at after it.
//!
//! How long a region of `n` pages waits: with `k` clients ahead at that time, both looks are through after `4 k n` pages of batches and
//! 100 ms, however large the others are (`2 n` where it is alone). Never looks at a page; relies on `scan.rs` for the walk.

use crate::observe::{Observation, Seen};
use crate::page::{Mark, WINDOW};
use crate::region::{ClientId, Region, RegionId};
use crate::{Core, Queue, scan};
use std::collections::BTreeSet;
use std::time::Duration;

/// From a look to the next that is called for, at first and at most.
const WAIT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(102_400));

/// Of so many pages one that changed makes another look worth having.
const WORTH: u32 = 8;

/// Of so many pages one that merged pays for a look.
const PAYS: u32 = 16;

/// Numbers of extra looks have this bit, passes have not: what a checksum word says of the one is never said of the other.
pub const EXTRA: u16 = 1 << 15;

/// How far the looks at a region are, and what they found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    pass: u16,
    /// Pages that are done in this pass.
    done: u32,
    /// The extra look that is under way: pages that are done, and its number.
    extra: Option<(u32, u16)>,
    /// What is to be judged was not yet.
    open: bool,
    changed: u32,
    empty: u32,
    had_memory: bool,
    /// Pages that merged since it was called last.
    merged: u32,
    wait: Duration,
    due: Option<Duration>,
    /// Among those of its client that are ahead; and whether it still has a reason to be.
    queued: bool,
    wanted: bool,
}

impl Look {
    /// How far the pass is.
    pub(crate) fn in_pass(&mut self, pass: u16) -> &mut u32 {
        if self.pass != pass {
            (self.pass, self.done, self.extra) = (pass, 0, None);
            self.begin();
        }
        &mut self.done
    }

    fn begin(&mut self) {
        (self.open, self.changed, self.empty) = (true, 0, 0);
    }

    fn is_whole(&self, pages: u32) -> bool {
        self.open && self.done == pages && self.extra.is_none()
    }

    /// An answer said so much.
    pub(crate) fn found(&mut self, found: &Found) {
        self.changed = self.changed.saturating_add(found.changed);
        self.empty = self.empty.saturating_add(found.empty);
    }

    /// So many of its pages merged.
    pub(crate) fn merged(&mut self, pages: u32) {
        self.merged = self.merged.saturating_add(pages);
    }

    /// A look is over: when to look again at the earliest, if that is worth it.
    fn judge(&mut self, pages: u32) -> Option<Duration> {
        (self.open, self.wanted) = (false, false);
        let of = |part: u32, pages: u32| part >= pages.div_ceil(WORTH);
        let is_empty = self.empty > 0 && !of(pages - self.empty.min(pages), pages);
        let worth = of(self.changed, pages) || is_empty && !self.had_memory;
        self.had_memory |= !is_empty;
        if !worth {
            return None;
        }
        let pays = self.merged >= pages.div_ceil(PAYS);
        self.merged = 0;
        self.wait = if pays {
            WAIT.0
        } else {
            (self.wait * 2).clamp(WAIT.0, WAIT.1)
        };
        Some(self.wait)
    }
}

/// Who is called when, and how batches are halved.
#[derive(Default)]
pub(crate) struct Ahead {
    calls: BTreeSet<(Duration, RegionId)>,
    /// Pages that regions ahead had more than the pass, since both want some.
    lead: i64,
    /// The last extra look's.
    number: u16,
}

impl Ahead {
    pub(crate) fn bytes(&self) -> usize {
        self.calls.len() * crate::stats::in_tree::<(Duration, RegionId)>()
    }
}

impl Core {
    /// Whose turn it is to be scanned, and whether that is ahead of the pass.
    pub(crate) fn next_to_scan(&mut self, requested: bool) -> Option<(ClientId, bool)> {
        if requested || self.unscanned == 0 {
            return self.dequeue(Queue::Scan).map(|id| (id, false));
        }
        if self.ahead.lead <= 0 {
            if let Some(id) = self.dequeue(Queue::Ahead) {
                return Some((id, true));
            }
            self.ahead.lead = 0;
            return self.dequeue(Queue::Scan).map(|id| (id, false));
        }
        match self.dequeue(Queue::Scan) {
            Some(id) => Some((id, false)),
            None => self.dequeue(Queue::Ahead).map(|id| (id, true)),
        }
    }

    /// Pages were chosen, ahead of the pass or in it.
    pub(crate) fn halve(&mut self, pages: u32, ahead: bool) {
        let batch = i64::from(self.tunables.pages_to_scan.max(WINDOW));
        let pages = i64::from(pages);
        self.ahead.lead = (self.ahead.lead + if ahead { pages } else { -pages }).clamp(-batch, batch);
    }

    /// Regions whose time has come go ahead.
    pub(crate) fn call(&mut self) {
        let mut numbered = false;
        while let Some(&(due, id)) = self.ahead.calls.first()
            && due <= self.now
        {
            self.ahead.calls.pop_first();
            let Some(region) = self.regions.get_mut(id) else {
                continue;
            };
            region.look.due = None;
            let client = region.client;
            let (pages, rests) = (region.range.pages, region.rests(self.now));
            if rests {
                continue;
            }
            if *region.look.in_pass(self.pass) == pages {
                if !std::mem::replace(&mut numbered, true) {
                    self.ahead.number = self.ahead.number.wrapping_add(1) | EXTRA;
                }
                region.look.begin();
                region.look.extra = Some((0, self.ahead.number));
            }
            self.go_ahead(client, id);
        }
    }

    /// A region need not wait for its turn in the pass.
    pub(crate) fn go_ahead(&mut self, client: ClientId, region: RegionId) {
        let is_new = |region: &mut Region| {
            region.look.wanted = true;
            !std::mem::replace(&mut region.look.queued, true)
        };
        if self.regions.get_mut(region).is_some_and(is_new)
            && let Some(member) = self.clients.get_mut(&client)
        {
            member.ahead.push_back(region);
        }
        self.refresh(client);
    }

    /// The look at a region is over, if all of its pages were chosen and answered.
    pub(crate) fn judge(&mut self, id: RegionId) {
        let Some(region) = self.regions.get_mut(id) else { return };
        if !region.look.is_whole(region.range.pages) {
            return;
        }
        let wait = region.look.judge(region.range.pages);
        let due = wait.map(|wait| self.now + wait);
        if let Some(before) = std::mem::replace(&mut region.look.due, due) {
            self.ahead.calls.remove(&(before, id));
        }
        self.ahead.calls.extend(due.map(|due| (due, id)));
    }

    /// Chooses pages of regions that are ahead, all for one look; its number, or `None` if no page needs it.
    pub(crate) fn choose_ahead(&mut self, id: ClientId, choice: &scan::Choice) -> Option<(u16, Vec<crate::PageRange>)> {
        let mut chosen = scan::Chosen::new(choice.want);
        let mut number = None;
        while let Some(&front) = self.clients.get(&id)?.ahead.front() {
            let Some(region) = self.regions.get_mut(front).filter(|region| region.look.wanted) else {
                // It left, or the pass was there first.
                self.clients.get_mut(&id)?.ahead.pop_front();
                self.regions
                    .get_mut(front)
                    .into_iter()
                    .for_each(|region| region.look.queued = false);
                continue;
            };
            let range = region.range;
            region.look.in_pass(choice.pass);
            let of = region.look.extra.map_or(choice.pass, |(_, number)| number);
            if chosen.pages() > 0 && number != Some(of) {
                break;
            }
            number = Some(of);
            let ended = match &mut region.look.extra {
                Some((done, _)) => {
                    let (pages, unstable) = (&self.pages, &self.unstable);
                    let merged = |page| matches!(pages.place(page), crate::Place::Merged(_) | crate::Place::Zero);
                    chosen.walk(range, done, |page, _| {
                        u32::from(!pages.is(page, Mark::Busy) && !unstable.has(pages, page) && !merged(page))
                    })
                }
                None => {
                    let (pages, unstable, events) = (&mut self.pages, &mut self.unstable, &mut self.events);
                    chosen.walk(range, region.look.in_pass(choice.pass), |page, most| {
                        scan::looked_at(pages, page, most, choice, |pages, page| {
                            events.skip(pages, unstable, page)
                        })
                    })
                }
            };
            if !ended {
                break;
            }
            (region.look.extra, region.look.queued) = (None, false);
            self.clients.get_mut(&id)?.ahead.pop_front();
        }
        let ranges = chosen.into_ranges();
        number.filter(|_| !ranges.is_empty()).map(|number| (number, ranges))
    }
}

/// What an answer says of pages of a region.
#[derive(Default)]
pub(crate) struct Found {
    pub changed: u32,
    empty: u32,
}

impl Found {
    pub(crate) fn note(&mut self, observation: &Observation) {
        self.changed += u32::from(observation.checksum.is_some_and(|(_, changed)| changed));
        self.empty += u32::from(observation.seen == Seen::Unbacked);
    }
}
