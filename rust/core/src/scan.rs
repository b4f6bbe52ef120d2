//! The scan: which pages a client is asked to look at next.
//!
//! A cursor walks the client's regions, one window after the other; how far each is, the region knows. Smart scan leaves out pages that were looked at often and
//! never merged, with the kernel's back-off: ages 0 to 2 always, then 1, 2, 4 and 8 passes out. Who sits out 8 comes back in the
//! same pass as all others who do: in the kernel two equal pages that were opted in at different times may take turns for
//! ever and never meet. Merged pages are never left out, for that is how breaks are found. Relies on `page.rs` for ages; never changes a tree.

use crate::client::Client;
use crate::order::{Decision, MAX_RANGES, MAX_SCAN_PAGES, MAX_STEP_PAGES, Task};
use crate::page::{Mark, PageNumber, PageRange, Pages, Place, WINDOW};
use crate::region::{ClientId, Regions};
use crate::{Core, Queue};

/// How a client's next pages are chosen.
pub(crate) struct Choice {
    /// About how many.
    pub want: u32,
    /// Whether smart scan may leave pages out.
    pub smart: bool,
    /// The number of the pass.
    pub pass: u16,
}

/// Passes between two looks at a page that never merged.
const LONGEST_ROUND: u16 = 9;

/// Pages walked over per page wanted before a choice ends short: keeps a step bounded where smart scan leaves out most.
const WALK: u32 = 8;

/// Pages per Scan order of a merge on request while pages merge: whole windows, few enough for the processors' caches to hold what
/// was read until it is copied and compared, and for several clients to keep in step.
const MERGING_SCAN: u32 = 2 * WINDOW;

impl Core {
    /// How many pages a client's turn has.
    fn turn(&self, id: ClientId, ahead: bool, requested: bool) -> u32 {
        if requested {
            let merges = self.foundings.len() > 0 || self.waiting_maps > 0;
            let settled = self.clients.get(&id).is_some_and(|client| client.settled);
            return match (merges, settled) {
                (true, _) => MERGING_SCAN,
                // Where writes are tracked most of it will be looked up, not read.
                (false, true) => MAX_SCAN_PAGES,
                (false, false) => MAX_STEP_PAGES,
            };
        }
        let batch = self.tunables.pages_to_scan;
        let share = if ahead {
            batch / 2 / (self.queues[Queue::Ahead as usize].len() as u32 + 1)
        } else {
            batch / self.in_pass.max(1)
        };
        let want = self.pace.batch_left.min(share.max(WINDOW)).min(MAX_STEP_PAGES);
        if self.tunables.is_advised() && want > 0 {
            // Whoever sets the knob may want windows cut; the advisor, which knows no windows, looks at whole ones in advance.
            want.max(WINDOW)
        } else {
            want
        }
    }

    pub(crate) fn scan(&mut self, id: ClientId, ahead: bool, requested: bool) -> Option<Decision> {
        let want = self.turn(id, ahead, requested);
        let client = self.clients.get_mut(&id)?;
        if client.scanner.is_some() || client.scanned && !ahead || want == 0 {
            return None;
        }
        let choice = Choice {
            want,
            smart: self.tunables.smart_scan == 1 && !requested,
            pass: self.pass,
        };
        let (number, ranges) = if ahead {
            self.choose_ahead(id, &choice)?
        } else {
            let (unstable, events) = (&mut self.unstable, &mut self.events);
            let ranges = next_ranges(client, &mut self.regions, &mut self.pages, &choice, |pages, page| {
                events.skip(pages, unstable, page);
            });
            (self.pass, ranges)
        };
        let chosen: u32 = ranges.iter().map(|range| range.pages).sum();
        if chosen == 0 {
            return None;
        }
        let again = number != self.pass;
        if !requested {
            self.pace.spend(chosen, self.tunables.pages_to_scan);
            self.halve(chosen, ahead);
            self.advisor.look(self.now, self.pause());
            if !again {
                self.look_for_rifts(&ranges);
            }
        }
        let (nodes, asked) = (self.tunables.nodes_count(), ranges.clone());
        let task = Task::Scan {
            ranges: asked,
            nodes,
            again,
        };
        let order = self.open(id, task);
        Some(Decision::Scan {
            client: id,
            order,
            pass: number,
            nodes,
            ranges,
        })
    }
}

/// Pages chosen for one order.
pub(crate) struct Chosen {
    want: u32,
    ranges: Vec<PageRange>,
    pages: u32,
    walked: u32,
}

impl Chosen {
    pub(crate) fn new(want: u32) -> Chosen {
        Chosen {
            want: want.clamp(1, MAX_SCAN_PAGES),
            ranges: Vec::new(),
            pages: 0,
            walked: 0,
        }
    }

    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    pub(crate) fn into_ranges(self) -> Vec<PageRange> {
        self.ranges
    }

    /// Goes on in a region of which so many pages are done; whether its end was reached. `wanted` is told a page and how many from it
    /// on could be taken, at least one and all of one window; it says how many of them are wanted before the first that is not, or may
    /// not be.
    pub(crate) fn walk(
        &mut self,
        region: PageRange,
        done: &mut u32,
        mut wanted: impl FnMut(PageNumber, u32) -> u32,
    ) -> bool {
        while *done < region.pages {
            let page = region.first.plus(*done);
            // Whole windows where the batch is large enough: they leave as whole runs later.
            let window = (WINDOW - u32::from(page.position())).min(region.pages - *done);
            let would_split =
                self.want >= WINDOW && page.position() == 0 && self.pages > 0 && self.pages + window > self.want;
            if self.pages >= self.want || self.walked >= self.want.saturating_mul(WALK) || would_split {
                return false;
            }
            let extends = self
                .ranges
                .last()
                .is_some_and(|range| range.first.0 + range.pages == page.0 && range.first.0 >= region.first.0);
            if !extends && self.ranges.len() == MAX_RANGES {
                return false;
            }
            let pages = wanted(page, window.min(self.want - self.pages));
            *done += pages.max(1);
            self.walked += pages.max(1);
            if pages == 0 {
                continue;
            }
            self.pages += pages;
            match self.ranges.last_mut() {
                Some(range) if extends => range.pages += pages,
                _ => self.ranges.push(PageRange { first: page, pages }),
            }
        }
        true
    }
}

/// How many of at most so many pages of one window the pass looks at before the first that it does not, or that is not yet chosen.
/// `left_out` is told of the first if smart scan leaves it out.
pub(crate) fn looked_at(
    pages: &mut Pages,
    first: PageNumber,
    most: u32,
    choice: &Choice,
    left_out: impl FnOnce(&mut Pages, PageNumber),
) -> u32 {
    if !choice.smart {
        return pages.not_busy(first, most);
    }
    if pages.is(first, Mark::Busy) {
        return 0;
    }
    if sits_out(pages, first, choice.pass) {
        left_out(pages, first);
        return 0;
    }
    1
}

/// Moves the client's cursor on; returns the pages chosen and how many smart scan left out. `left_out` is told their numbers.
pub(crate) fn next_ranges(
    client: &mut Client,
    regions: &mut Regions,
    pages: &mut Pages,
    choice: &Choice,
    mut left_out: impl FnMut(&mut Pages, PageNumber),
) -> Vec<PageRange> {
    let mut chosen = Chosen::new(choice.want);
    while let Some(region) = client.regions.get(client.scan).and_then(|&id| regions.get_mut(id)) {
        let range = region.range;
        let done = region.look.in_pass(choice.pass);
        let wanted = |page, most| looked_at(pages, page, most, choice, &mut left_out);
        if !chosen.walk(range, done, wanted) {
            return chosen.ranges;
        }
        client.scan += 1;
    }
    client.scanned = true;
    chosen.ranges
}

/// The kernel's `should_skip_rmap_item`: ages the page and says whether it sits this pass out.
fn sits_out(pages: &mut Pages, page: PageNumber, pass: u16) -> bool {
    if matches!(pages.place(page), Place::Merged(_) | Place::Zero) {
        return false;
    }
    let (age, skips) = pages.age(page);
    if age < 3 || skips == 0 {
        let passes_out = match age {
            0..3 => 0,
            3 => 1,
            4..=5 => 2,
            6..=8 => 4,
            // 8, but for the first time: until the next pass in which all of these are looked at.
            _ => (LONGEST_ROUND - 1 - pass % LONGEST_ROUND) as u8,
        };
        pages.set_age(page, age.saturating_add(1), passes_out);
        return false;
    }
    pages.set_age(page, age.saturating_add(1), skips - 1);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Slot;
    use crate::region::{ClientId, Kind};

    fn world(sizes: &[(u32, u16)]) -> (Client, Regions, Pages) {
        let (mut client, mut regions, mut pages) = (Client::default(), Regions::default(), Pages::default());
        for &(size, position) in sizes {
            let (id, first) = regions.join(ClientId(1), Kind::Private, size, position).unwrap();
            pages.add(PageRange { first, pages: size });
            client.regions.push(id);
        }
        (client, regions, pages)
    }

    #[test]
    fn a_pass_covers_each_page_once_in_whole_windows() {
        let (mut client, mut regions, mut pages) = world(&[(1500, 100), (3, 0)]);
        let choice = Choice {
            want: 1024,
            smart: false,
            pass: 1,
        };
        let mut sizes = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        while !client.scanned {
            let ranges = next_ranges(&mut client, &mut regions, &mut pages, &choice, |_, _| ());
            sizes.push(ranges.iter().map(|range| range.pages).sum::<u32>());
            for page in ranges.into_iter().flat_map(PageRange::iter) {
                assert!(seen.insert(page));
            }
        }
        assert_eq!(seen.len(), 1503);
        assert_eq!(sizes, [924, 579]);
    }

    #[test]
    fn smart_scan_backs_off_like_the_kernel() {
        let (mut client, mut regions, mut pages) = world(&[(2, 0)]);
        pages.set_place(PageNumber(1), Place::Merged(Slot(3)));
        let mut out = String::new();
        for pass in 5..37 {
            client.scan = Default::default();
            let choice = Choice {
                want: 10,
                smart: true,
                pass,
            };
            let mut skipped = 0;
            next_ranges(&mut client, &mut regions, &mut pages, &choice, |_, page| {
                assert_eq!(page, PageNumber(0));
                skipped += 1;
            });
            out.push(if skipped == 0 { 'x' } else { '.' });
        }
        // Passes 5, 6, 7, 8, 10, 13, 18, and from there on those that 9 divides.
        assert_eq!(out, "xxxx.x..x....x........x........x");
    }

    #[test]
    fn whoever_sits_out_long_meets_all_others_who_do() {
        let looks = |first: u16| -> Vec<u16> {
            let (mut client, mut regions, mut pages) = world(&[(1, 0)]);
            let mut looks = Vec::new();
            for pass in first..first + 60 {
                client.scan = Default::default();
                let choice = Choice {
                    want: 10,
                    smart: true,
                    pass,
                };
                if !next_ranges(&mut client, &mut regions, &mut pages, &choice, |_, _| ()).is_empty() {
                    looks.push(pass);
                }
            }
            looks
        };
        let old = looks(1);
        for first in 2..11 {
            let meets = looks(first).iter().filter(|pass| old.contains(pass)).count();
            assert!(
                meets >= 4,
                "opted in {} passes later: they meet {meets} times",
                first - 1
            );
        }
    }
}
