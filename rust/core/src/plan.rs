//! The plan: which proposals leave, with VMAs as money.
//!
//! A run of pages over consecutive slots is one mapping; putting it there adds at most two VMAs, and takes some away where
//! it goes on from its neighbours. Runs leave by pages saved per VMA added, until the client's budget is spent. Relies on
//! the dense page -> slot array for the boundaries as they are; never sends anything.

use crate::frame::Slot;
use crate::order::MAX_RUNS;
use crate::page::{PageNumber, PageRange, Pages, Place, Run, WINDOW};

/// Boundaries that need a VMA each between the pages of `range` and around it, inside `region`.
pub(crate) fn boundaries(pages: &Pages, range: PageRange, region: PageRange) -> u32 {
    let from = range.first.0.max(region.first.0 + 1);
    let to = (range.first.0 + range.pages).min(region.first.0 + region.pages - 1);
    let mut before = if from <= to {
        pages.place(PageNumber(from - 1))
    } else {
        Place::Own
    };
    let mut count = 0;
    for page in from..=to {
        let place = pages.place(PageNumber(page));
        count += u32::from(!before.continues_into(place));
        before = place;
    }
    count
}

/// VMAs that mapping the run would add to its region as it is now.
pub(crate) fn cost(pages: &Pages, run: Run, region: PageRange) -> i64 {
    let range = PageRange {
        first: run.first,
        pages: u32::from(run.pages),
    };
    let (last, end) = (range.pages - 1, region.first.0 + region.pages);
    let mut after = 0;
    if run.first.0 > region.first.0 {
        let before = pages.place(PageNumber(run.first.0 - 1));
        after += i64::from(!before.continues_into(Place::showing(run.slot)));
    }
    if run.first.0 + last + 1 < end {
        let next = pages.place(run.first.plus(last + 1));
        after += i64::from(!Place::showing(run.slot.stepped(last)).continues_into(next));
    }
    after - i64::from(boundaries(pages, range, region))
}

/// Joins proposals, sorted by page, to runs.
pub(crate) fn runs(
    proposals: &[(PageNumber, Slot)],
    region_of: impl Fn(PageNumber) -> PageRange,
) -> Vec<(Run, PageRange)> {
    let mut runs: Vec<(Run, PageRange)> = Vec::new();
    for &(page, slot) in proposals {
        if let Some((run, region)) = runs.last_mut()
            && u32::from(run.pages) < WINDOW
            && page.0 == run.first.0 + u32::from(run.pages)
            && slot == run.slot.stepped(u32::from(run.pages))
            && page.0 < region.first.0 + region.pages
        {
            run.pages += 1;
        } else {
            runs.push((
                Run {
                    first: page,
                    pages: 1,
                    slot,
                },
                region_of(page),
            ));
        }
    }
    runs
}

/// What leaves now, what waits for the next order, and what the budget does not allow.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub now: Vec<Run>,
    pub later: Vec<Run>,
    pub over_budget: Vec<Run>,
}

/// Chooses among runs for a client that may add `vmas` mappings, `most` pages for this order.
pub(crate) fn choose(pages: &Pages, runs: Vec<(Run, PageRange)>, vmas: i64, most: u32) -> Plan {
    let mut plan = Plan::default();
    let mut priced: Vec<(i64, Run)> = runs
        .into_iter()
        .map(|(run, region)| (cost(pages, run, region), run))
        .collect();
    // Free runs first, then most pages per VMA; at equal worth in the order of pages.
    priced.sort_by_key(|&(cost, run)| {
        let worth = if cost <= 0 {
            i64::MAX
        } else {
            i64::from(run.pages) * 1024 / cost
        };
        (std::cmp::Reverse(worth), run.first)
    });
    let (mut left, mut pages_now) = (vmas, 0);
    for (cost, run) in priced {
        if plan.now.len() == MAX_RUNS || pages_now + u32::from(run.pages) > most {
            plan.later.push(run);
        } else if cost > 0 && cost > left {
            plan.over_budget.push(run);
        } else {
            left = left.saturating_sub(cost);
            pages_now += u32::from(run.pages);
            plan.now.push(run);
        }
    }
    plan.now.sort_unstable_by_key(|run| run.first);
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(pages: &mut Pages, count: u32) -> PageRange {
        let range = PageRange {
            first: PageNumber(0),
            pages: count,
        };
        pages.add(range);
        range
    }

    fn run(first: u32, pages: u16, slot: u32) -> Run {
        Run {
            first: PageNumber(first),
            pages,
            slot: Slot(slot),
        }
    }

    #[test]
    fn a_run_costs_what_it_adds_to_its_neighbours() {
        let mut pages = Pages::default();
        let range = region(&mut pages, 20);
        assert_eq!(cost(&pages, run(5, 4, 105), range), 2);
        assert_eq!(cost(&pages, run(0, 4, 100), range), 1);
        assert_eq!(cost(&pages, run(0, 20, 100), range), 0);
        for page in 5..9 {
            pages.set_place(PageNumber(page), Place::Merged(Slot(100 + page)));
        }
        assert_eq!(boundaries(&pages, range, range), 2);
        assert_eq!(cost(&pages, run(9, 2, 109), range), 0);
        assert_eq!(cost(&pages, run(9, 2, 300), range), 1);
        assert_eq!(cost(&pages, run(9, 11, 109), range), -1);
    }

    #[test]
    fn proposals_join_where_pages_and_slots_go_on() {
        let proposals: Vec<_> = [(1, 11), (2, 12), (4, 14), (5, 16), (6, u32::MAX), (7, u32::MAX)]
            .map(|(page, slot)| (PageNumber(page), Slot(slot)))
            .to_vec();
        let whole = PageRange {
            first: PageNumber(0),
            pages: 8,
        };
        let found: Vec<Run> = runs(&proposals, |_| whole).into_iter().map(|(run, _)| run).collect();
        assert_eq!(
            found,
            [run(1, 2, 11), run(4, 1, 14), run(5, 1, 16), run(6, 2, u32::MAX)]
        );
    }

    #[test]
    fn a_small_budget_takes_the_longest_runs() {
        let mut pages = Pages::default();
        let range = region(&mut pages, 100);
        let wanted = vec![
            (run(2, 1, 102), range),
            (run(10, 30, 110), range),
            (run(60, 3, 160), range),
        ];
        let plan = choose(&pages, wanted, 4, 8192);
        assert_eq!(plan.now, [run(10, 30, 110), run(60, 3, 160)]);
        assert_eq!(plan.over_budget, [run(2, 1, 102)]);
    }
}
