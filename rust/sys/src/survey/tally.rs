//! The arithmetic of a survey: from pages with checksums to what merging would give.
//!
//! Pages are records of 16 bytes that are sorted twice, by content and by place; nothing else grows with their number. Relies on
//! checksums alone: of 10 million pages, two with different bytes have the same one with probability 1/6, which makes a figure wrong by a page.
//! No system call is made here, and no page is read.

/// A page that was read, or, with a key of its own kind, a place in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// The checksum of its bytes; [`ZEROS`] for a page of zeros. After [`tally`], of a page that merges: the page whose frame it shows.
    pub(super) key: u64,
    /// From the highest bit: 12 bits the process, 44 the page's number in it, 8 flags.
    pub(super) place: u64,
}

/// The key of a page of zeros, which no checksum is.
pub(super) const ZEROS: u64 = 0;
/// The key of a page of zeros that would have no memory.
const NO_FRAME: u64 = u64::MAX;
/// In the key of a page that merges: its frame is there already.
const FRAME_IS_THERE: u64 = 1 << 63;
/// Processes that one survey can hold.
pub const MOST_PROCESSES: usize = 1 << 12;
const FLAG_BITS: u32 = 8;
const PAGE_BITS: u32 = 44;

/// ksmrs could take it.
pub(super) const KSMRS: u64 = 1;
/// Kernel KSM could take it.
pub(super) const KERNEL: u64 = 1 << 1;
/// It shows a frame of ksmrs.
pub(super) const SHOWN: u64 = 1 << 2;
/// There is another page with its content.
pub(super) const DUPLICATE: u64 = 1 << 3;
/// It was written between two looks.
pub(super) const VOLATILE: u64 = 1 << 4;
/// ksmrs would merge it.
pub(super) const MERGES: u64 = 1 << 5;
/// There is one in another process.
pub(super) const BETWEEN: u64 = 1 << 6;
/// Its bytes are elsewhere at another offset within a page.
pub(super) const SHIFTED: u64 = 1 << 7;

impl Seen {
    pub(super) fn new(key: u64, process: usize, page: u64, flags: u64) -> Seen {
        debug_assert!(process < MOST_PROCESSES && page >> PAGE_BITS == 0);
        Seen {
            key,
            place: (process as u64) << (PAGE_BITS + FLAG_BITS) | page << FLAG_BITS | flags,
        }
    }

    pub(super) fn process(self) -> usize {
        (self.place >> (PAGE_BITS + FLAG_BITS)) as usize
    }

    pub(super) fn page(self) -> u64 {
        self.where_it_is() & ((1 << PAGE_BITS) - 1)
    }

    /// Process and page in one number, in their order.
    pub(super) fn where_it_is(self) -> u64 {
        self.place >> FLAG_BITS
    }

    pub(super) fn has(self, flags: u64) -> bool {
        self.place & flags != 0
    }

    pub(super) fn set(&mut self, flags: u64, on: bool) {
        self.place = if on { self.place | flags } else { self.place & !flags };
    }
}

/// The class of a page, for pictures; `CLASSES` in `python/ksmrs/_survey_report.py` has the same order.
pub(super) fn class(seen: Seen) -> u8 {
    match seen {
        seen if seen.has(VOLATILE) => 6,
        seen if seen.has(SHOWN) => 4,
        seen if seen.has(BETWEEN) => 3,
        seen if seen.has(DUPLICATE) => 2,
        seen if seen.key == ZEROS || seen.key == NO_FRAME => 1,
        seen if seen.has(SHIFTED) => 5,
        _ => 0,
    }
}

/// The knobs that decide how much of equal pages is saved.
#[derive(Clone, Copy, Debug)]
pub struct Knobs {
    /// Pages that one frame serves, at least 2.
    pub max_page_sharing: u64,
    /// Whether pages of zeros need no frame.
    pub use_zero_pages: bool,
}

/// What one engine would have merged, under the names of `/sys/kernel/mm/ksm`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Pages that it could take, those that were written between two looks included.
    pub pages: u64,
    /// Frames that it would make.
    pub pages_shared: u64,
    /// Pages saved with them.
    pub pages_sharing: u64,
    /// Pages of zeros that would have no memory.
    pub ksm_zero_pages: u64,
    /// Pages among `pages` that were written between two looks.
    pub pages_volatile: u64,
    /// The sum of the squares of what each content saves, for the error of an estimate.
    pub squares: f64,
}

/// What was found of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Pages of zeros.
    pub pages_zero: u64,
    /// Pages beyond the first with their content in this process.
    pub duplicates_within: u64,
    /// Contents that another process has as well.
    pub duplicates_between: u64,
    /// Pages that were written between two looks.
    pub pages_volatile: u64,
    /// Pages of it that ksmrs would merge, as ksm_merging_pages counts them: with a frame or as zeros.
    pub ksm_merging_pages: u64,
    /// Those of them that the budget of mappings does not allow.
    pub pages_unmerged_by_budget: u64,
    /// Whole pages whose bytes are elsewhere at another offset within a page.
    pub pages_out_of_phase: u64,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// ksmrs with its knobs.
    pub ksmrs: Outcome,
    /// Kernel KSM with its own.
    pub kernel: Outcome,
    /// Contents in more than one process, counted once for each process but one.
    pub duplicates_between: u64,
    /// Each process's.
    pub shares: Vec<Share>,
}

/// Frames made, and pages that merge, of `pages` with one content of which `shown` show frames already. A page left over when all
/// frames are full merges with nobody.
fn merge(pages: u64, shown: u64, most: u64) -> (u64, u64) {
    let into = pages.min(shown.next_multiple_of(most) - shown);
    let (full, left) = ((pages - into) / most, (pages - into) % most);
    (full + u64::from(left > 1), pages - u64::from(left == 1))
}

fn by_content(seen: &Seen) -> (u64, u64) {
    (seen.key, seen.place)
}

/// Marks the pages whose content there is twice, and those of zeros: those that a second look must confirm. Leaves them in the order
/// of their places.
pub(super) fn mark(pages: &mut [Seen]) {
    pages.sort_unstable_by_key(by_content);
    for group in pages.chunk_by_mut(|one, other| one.key == other.key) {
        if group.len() > 1 || group[0].key == ZEROS {
            group.iter_mut().for_each(|seen| seen.set(DUPLICATE, true));
        }
    }
    pages.sort_unstable_by_key(|seen| seen.place);
}

/// Counts, and leaves the pages in the order of their places, with the flags that say what becomes of each.
pub(super) fn tally(pages: &mut [Seen], processes: usize, ksmrs: Knobs, kernel: Knobs) -> Tally {
    let mut found = Tally {
        shares: vec![Share::default(); processes],
        ..Tally::default()
    };
    pages.sort_unstable_by_key(by_content);
    for group in pages.chunk_by_mut(|one, other| one.key == other.key) {
        count_group(group, &mut found, ksmrs, kernel);
    }
    pages.sort_unstable_by_key(|seen| seen.place);
    found
}

fn count_group(group: &mut [Seen], found: &mut Tally, ksmrs: Knobs, kernel: Knobs) {
    let still = |seen: &Seen| !seen.has(VOLATILE);
    let count = |flag: u64| group.iter().filter(|seen| seen.has(flag) && still(seen)).count() as u64;
    let (mine, the_kernels, shown) = (count(KSMRS), count(KERNEL), count(SHOWN));
    let zeros = group[0].key == ZEROS;
    let founder = group.iter().find(|seen| seen.has(SHOWN)).map(|seen| seen.where_it_is());

    for (outcome, flag, pages, shown, knobs) in [
        (&mut found.ksmrs, KSMRS, mine, shown, ksmrs),
        (&mut found.kernel, KERNEL, the_kernels, 0, kernel),
    ] {
        outcome.pages += group.iter().filter(|seen| seen.has(flag)).count() as u64;
        outcome.pages_volatile += group.iter().filter(|seen| seen.has(flag) && !still(seen)).count() as u64;
        if zeros && knobs.use_zero_pages {
            outcome.ksm_zero_pages += pages;
            continue;
        }
        let (frames, merged) = merge(pages, shown, knobs.max_page_sharing);
        outcome.pages_shared += frames;
        outcome.pages_sharing += merged - frames;
        outcome.squares += ((merged - frames) as f64).powi(2);
    }

    let no_frame = zeros && ksmrs.use_zero_pages;
    let mut merging = if no_frame {
        mine
    } else {
        merge(mine, shown, ksmrs.max_page_sharing).1
    };
    let own = group.iter().filter(|seen| still(seen) && !seen.has(SHOWN)).count();
    let mut processes = 0;
    for of_process in group.chunk_by(|one, other| one.process() == other.process()) {
        let share = &mut found.shares[of_process[0].process()];
        let own = of_process.iter().filter(|seen| still(seen) && !seen.has(SHOWN)).count() as u64;
        share.pages_volatile += of_process.iter().filter(|seen| !still(seen)).count() as u64;
        if zeros {
            share.pages_zero += own;
        } else if own > 0 {
            share.duplicates_within += own - 1;
            processes += 1;
        }
    }
    if processes > 1 {
        found.duplicates_between += processes - 1;
    }
    let room = shown.next_multiple_of(ksmrs.max_page_sharing) - shown;
    let (mut last, mut taken, mut frame) = (None, 0, founder.unwrap_or_default());
    for seen in group {
        let is_own = still(seen) && !seen.has(SHOWN);
        seen.set(DUPLICATE, is_own && !zeros && own > 1);
        seen.set(BETWEEN, is_own && processes > 1);
        let share = &mut found.shares[seen.process()];
        if is_own && processes > 1 && last.replace(seen.process()) != Some(seen.process()) {
            share.duplicates_between += 1;
        }
        if seen.has(KSMRS) && still(seen) && merging > 0 {
            merging -= 1;
            share.ksm_merging_pages += 1;
            seen.set(MERGES, true);
            // The first ones go into frames that are there; of the rest each so many have a frame of their own.
            if taken >= room && (taken - room) % ksmrs.max_page_sharing == 0 {
                frame = seen.where_it_is();
            }
            taken += 1;
            let there = if founder.is_some() && taken <= room {
                FRAME_IS_THERE
            } else {
                0
            };
            seen.key = if no_frame { NO_FRAME } else { frame | there };
        }
    }
}

/// Takes out of what ksmrs saves what a budget of mappings for each process leaves unmerged: the shortest runs, of equal ones the last.
/// For pages in the order of their places, and leaves them so. A mapping's own ends, which cost nothing, count here as well.
pub(super) fn spend(pages: &mut [Seen], budget: u64, found: &mut Tally) {
    let mut over = 0;
    for process in pages.chunk_by_mut(|one, other| one.process() == other.process()) {
        let share = &mut found.shares[process[0].process()];
        share.pages_unmerged_by_budget = drop_runs(process, budget);
        over += share.pages_unmerged_by_budget;
    }
    if over > 0 {
        count_again(pages, found);
    }
}

fn goes_on(one: &Seen, other: &Seen) -> bool {
    let next_frame = one.key == NO_FRAME && other.key == NO_FRAME || one.key.wrapping_add(1) == other.key;
    one.has(MERGES) && other.has(MERGES) && one.where_it_is() + 1 == other.where_it_is() && next_frame
}

/// Lets the pages of one process be that are too scattered for its budget; how many.
fn drop_runs(pages: &mut [Seen], budget: u64) -> u64 {
    let (mut boundaries, mut end) = (0_u64, None);
    let mut lengths: Vec<u32> = Vec::new();
    for run in pages.chunk_by(goes_on).filter(|run| run[0].has(MERGES)) {
        // A run that follows another begins where that one ends.
        boundaries += 1 + u64::from(end != Some(run[0].where_it_is()));
        end = Some(run[0].where_it_is() + run.len() as u64);
        lengths.push(run.len() as u32);
    }
    if boundaries <= budget {
        return 0;
    }
    lengths.sort_unstable_by_key(|length| core::cmp::Reverse(*length));
    // Two mappings for each; there are more runs than half of the budget, for each has two boundaries at most.
    let affordable = (budget / 2) as usize;
    let Some(shortest) = lengths.get(affordable).copied() else {
        return 0;
    };
    let mut as_short = lengths[..affordable]
        .iter()
        .filter(|length| **length == shortest)
        .count();
    let mut over = 0;
    for run in pages.chunk_by_mut(goes_on).filter(|run| run[0].has(MERGES)) {
        let length = run.len() as u32;
        if length > shortest {
            continue;
        }
        if length == shortest && as_short > 0 {
            as_short -= 1;
            continue;
        }
        over += run.len() as u64;
        run.iter_mut().for_each(|seen| seen.set(MERGES, false));
    }
    over
}

/// Counts what is saved by the pages that still merge; of two equal ones whose other was let be none does.
fn count_again(pages: &mut [Seen], found: &mut Tally) {
    pages.sort_unstable_by_key(by_content);
    let outcome = &mut found.ksmrs;
    (outcome.pages_shared, outcome.pages_sharing, outcome.ksm_zero_pages) = (0, 0, 0);
    found.shares.iter_mut().for_each(|share| share.ksm_merging_pages = 0);
    for group in pages.chunk_by_mut(|one, other| one.key == other.key) {
        let key = group[0].key;
        let merging = group.iter().filter(|seen| seen.has(MERGES)).count() as u64;
        let there = key & FRAME_IS_THERE != 0;
        if merging == 1 && !there {
            group.iter_mut().for_each(|seen| seen.set(MERGES, false));
        } else if key == NO_FRAME {
            outcome.ksm_zero_pages += merging;
        } else if there {
            outcome.pages_sharing += merging;
        } else if merging > 0 {
            outcome.pages_shared += 1;
            outcome.pages_sharing += merging - 1;
        }
        for seen in group.iter().filter(|seen| seen.has(MERGES)) {
            found.shares[seen.process()].ksm_merging_pages += 1;
        }
    }
    pages.sort_unstable_by_key(|seen| seen.place);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Knobs = Knobs {
        max_page_sharing: 256,
        use_zero_pages: true,
    };

    fn seen(key: u64, process: usize, page: u64, flags: u64) -> Seen {
        Seen::new(key, process, page, flags)
    }

    fn count(mut pages: Vec<Seen>, processes: usize, ksmrs: Knobs) -> (Tally, Vec<Seen>) {
        let found = tally(&mut pages, processes, ksmrs, PLAIN);
        (found, pages)
    }

    #[test]
    fn a_place_keeps_its_three_parts() {
        let mut one = seen(9, MOST_PROCESSES - 1, (1 << 44) - 1, KSMRS | SHIFTED);
        assert_eq!((one.process(), one.page()), (MOST_PROCESSES - 1, (1 << 44) - 1));
        one.set(SHIFTED, false);
        assert!(one.has(KSMRS) && !one.has(SHIFTED | KERNEL));
    }

    #[test]
    fn frames_are_full_before_others_are_made() {
        assert_eq!(merge(1, 0, 256), (0, 0));
        assert_eq!(merge(2, 0, 256), (1, 2));
        assert_eq!(merge(7, 0, 3), (2, 6), "the seventh finds no other");
        assert_eq!(merge(8, 0, 3), (3, 8));
        assert_eq!(merge(1, 5, 256), (0, 1), "into the frame that is there");
        assert_eq!(merge(4, 2, 3), (1, 4));
        assert_eq!(merge(2, 3, 3), (1, 2));
        assert_eq!(merge(1, 3, 3), (0, 0));
    }

    #[test]
    fn within_and_between_are_told_apart() {
        let both = KSMRS | KERNEL;
        let pages = vec![
            seen(5, 0, 10, both),
            seen(5, 0, 11, both),
            seen(5, 1, 10, both),
            seen(6, 1, 11, both),
            seen(7, 1, 12, KSMRS),
            seen(7, 1, 13, KSMRS),
            seen(ZEROS, 0, 12, both),
            seen(5, 1, 14, both | VOLATILE),
        ];
        let (found, pages) = count(pages, 2, PLAIN);
        assert_eq!((found.ksmrs.pages_shared, found.ksmrs.pages_sharing), (2, 3));
        assert_eq!((found.kernel.pages_shared, found.kernel.pages_sharing), (1, 2));
        assert_eq!((found.ksmrs.ksm_zero_pages, found.ksmrs.pages_volatile), (1, 1));
        assert_eq!((found.ksmrs.pages, found.kernel.pages), (8, 6));
        let shares = &found.shares;
        assert_eq!((shares[0].duplicates_within, shares[0].duplicates_between), (1, 1));
        assert_eq!((shares[1].duplicates_within, shares[1].duplicates_between), (1, 1));
        assert_eq!((found.duplicates_between, shares[0].pages_zero), (1, 1));
        assert_eq!((shares[0].ksm_merging_pages, shares[1].ksm_merging_pages), (3, 3));
        let classes: Vec<u8> = pages.iter().copied().map(class).collect();
        assert_eq!(classes, [3, 3, 1, 3, 0, 2, 2, 6]);
    }

    #[test]
    fn zeros_take_a_frame_where_the_knob_says_so() {
        let pages = (0..5).map(|page| seen(ZEROS, 0, page, KSMRS)).collect();
        let knobs = Knobs {
            use_zero_pages: false,
            max_page_sharing: 2,
        };
        let (found, _) = count(pages, 1, knobs);
        let (shared, sharing) = (found.ksmrs.pages_shared, found.ksmrs.pages_sharing);
        assert_eq!((shared, sharing, found.ksmrs.ksm_zero_pages), (2, 2, 0));
        assert_eq!(found.shares[0].ksm_merging_pages, 4);
    }

    #[test]
    fn pages_join_frames_that_are_there() {
        let pages = vec![seen(5, 0, 1, SHOWN), seen(5, 0, 2, KSMRS), seen(6, 0, 3, KSMRS)];
        let (found, _) = count(pages, 1, PLAIN);
        assert_eq!((found.ksmrs.pages_shared, found.ksmrs.pages_sharing), (0, 1));
        assert_eq!(found.shares[0].duplicates_within, 0, "what shows a frame needs none");
    }

    #[test]
    fn a_budget_takes_the_longest_runs() {
        // Process 0 founds; in 1 a run of eight, and four pages that are alone.
        let mut pages: Vec<Seen> = (0..40).map(|page| seen(100 + page, 0, page, KSMRS)).collect();
        pages.extend((0..8).map(|page| seen(100 + page, 1, page, KSMRS)));
        pages.extend((0..4).map(|page| seen(110 + 2 * page, 1, 10 + 2 * page, KSMRS)));
        let (mut found, mut pages) = count(pages, 2, PLAIN);
        assert_eq!(found.ksmrs.pages_sharing, 12);
        let before = (found.shares.clone(), found.ksmrs);
        spend(&mut pages, 10, &mut found);
        assert_eq!(
            (&found.shares, found.ksmrs),
            (&before.0, before.1),
            "2 for each run is 10 at most"
        );
        spend(&mut pages, 6, &mut found);
        let over = |process: usize| found.shares[process].pages_unmerged_by_budget;
        // The long run and the first two alone, in both: what is left has its other.
        assert_eq!((over(0), over(1)), (2, 2));
        assert_eq!((found.ksmrs.pages_sharing, found.ksmrs.pages_shared), (10, 10));
        assert_eq!(
            (found.shares[0].ksm_merging_pages, found.shares[1].ksm_merging_pages),
            (10, 10)
        );
    }

    #[test]
    fn who_is_left_over_merges_no_more() {
        // Process 1 has pairs of its own beside those of process 0, in another order, and no room for all.
        let mut pages: Vec<Seen> = (0..4).map(|page| seen(100 + page, 0, 2 * page, KSMRS)).collect();
        pages.extend((0..4).map(|page| seen(103 - page, 1, 2 * page, KSMRS)));
        pages.extend([seen(ZEROS, 1, 20, KSMRS), seen(7, 1, 30, SHOWN), seen(7, 1, 32, KSMRS)]);
        let (mut found, mut pages) = count(pages, 2, PLAIN);
        assert_eq!((found.ksmrs.pages_sharing, found.ksmrs.ksm_zero_pages), (4 + 1, 1));
        spend(&mut pages, 8, &mut found);
        // Process 1 has six runs and room for four: its zeros and the page with a frame that is there are last.
        assert_eq!((found.ksmrs.pages_sharing, found.ksmrs.ksm_zero_pages), (4, 0));
        spend(&mut pages, 4, &mut found);
        // 0 keeps its first two, 1 the others.
        assert_eq!((found.ksmrs.pages_sharing, found.shares[0].ksm_merging_pages), (0, 0));
    }
}
