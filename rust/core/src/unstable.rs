//! The unstable tree: candidates by the tag of their checksum.
//!
//! Page contents change under it, as in the kernel; it is only a way to find two pages that may be equal. An entry is a bare page
//! number; the tag lies in the page's own record, so an entry can be found and removed without a walk. The kernel empties the tree
//! at each full scan and files everything anew; here what the pass before filed stays in the table, *stale*, and nobody finds it. A
//! page that is looked at again and has the checksum it is filed under is *confirmed*, by one bit of its record and without a
//! search: had anybody with the same tag come by meanwhile, the stale entry would have made way. So a pass over memory that nobody
//! writes is a walk through records that lie side by side. Who was filed for want of room on the frames of its content is not
//! confirmed, for they may have some by now; and one time in [`SEARCHED_ANYWAY`] nobody is, for two contents may have one tag.
//!
//! There is one entry of a tag at most. The bit tells a pass from the one before it and no more; who is left out by smart scan is
//! known by its lost Unshared mark; and after a pass that did not come by everybody, the table is emptied. Relies on `page.rs`;
//! never holds a frame.

use crate::checksum::{Checksum, spread};
use crate::page::{Mark, PageNumber, Pages};
use crate::stats::in_tree;
use crate::table::Table;
use std::collections::BTreeSet;

/// In how many looks (most passes, without smart scan) a window is searched for once, whatever can be confirmed.
const SEARCHED_ANYWAY: u32 = 256;

#[derive(Default)]
pub(crate) struct UnstableTree {
    table: Table,
    /// Passes have begun an odd number of times.
    odd: bool,
    /// Whoever bears the Candidate mark is in the table.
    kept: bool,
    /// Pages that this pass should have looked at were not.
    gaps: bool,
    /// This pass came by nobody yet.
    fresh: bool,
    /// Those that were filed though frames have their content: at most one for each content.
    crowded_out: BTreeSet<PageNumber>,
}

impl UnstableTree {
    /// A candidate with this tag. A stale one makes way: it is filed anew when it is looked at.
    pub(crate) fn find(&mut self, pages: &mut Pages, tag: u32) -> Option<PageNumber> {
        let found = self
            .table
            .find(spread(tag), |&page| pages.tag(PageNumber(page)) == tag)
            .map(PageNumber)?;
        if self.is_current(pages, found) {
            return Some(found);
        }
        self.remove(pages, found);
        None
    }

    /// Fetches what a search for this tag will read; see [`Table::warm`].
    pub(crate) fn warm(&self, pages: &Pages, tag: u32) -> u32 {
        self.table.warm(spread(tag), |page| pages.tag(PageNumber(page)))
    }

    /// Whether the page is a candidate in this pass.
    pub(crate) fn has(&self, pages: &Pages, page: PageNumber) -> bool {
        pages.is(page, Mark::Candidate) && self.is_current(pages, page)
    }

    fn is_current(&self, pages: &Pages, page: PageNumber) -> bool {
        pages.is(page, Mark::Odd) == self.odd && pages.is(page, Mark::Unshared)
    }

    /// Files a page, which the caller marks Unshared.
    pub(crate) fn insert(&mut self, pages: &mut Pages, page: PageNumber, tag: u32) {
        debug_assert!(!pages.is(page, Mark::Candidate));
        pages.set_tag(page, tag);
        pages.mark(page, Mark::Candidate, true);
        pages.mark(page, Mark::Odd, self.odd);
        self.fresh = false;
        self.table.insert(spread(tag), page.0, hash_in(pages));
    }

    /// Makes consecutive pages of one window candidates of this pass, all of them or none, if they have memory of their own and are filed
    /// under the tags of these checksums; they are marked Unshared, and how many were not comes back. `None` if one is not filed so, or
    /// if it is time to search.
    pub(crate) fn confirm(
        &mut self,
        pages: &mut Pages,
        first: PageNumber,
        checksums: &[Checksum],
        pass: u16,
    ) -> Option<u32> {
        self.fresh = false;
        let searched = u32::from(pass)
            .wrapping_add(first.window())
            .is_multiple_of(SEARCHED_ANYWAY);
        let mut crowded_out = self.crowded_out.range(first..first.plus(checksums.len() as u32));
        if !self.kept || searched || crowded_out.next().is_some() {
            return None;
        }
        pages.confirm(first, checksums, self.odd)
    }

    /// The candidate of this tag is not to be confirmed: there is a frame, or may be, that has room for it.
    pub(crate) fn crowd_out(&mut self, pages: &Pages, tag: u32) {
        let same = |&page: &u32| pages.tag(PageNumber(page)) == tag;
        self.crowded_out
            .extend(self.table.find(spread(tag), same).map(PageNumber));
    }

    /// The page is not looked at in this pass: it is no candidate, but can be confirmed when it is. Whether it lost its Unshared mark.
    pub(crate) fn leave_out(&mut self, pages: &mut Pages, page: PageNumber) -> bool {
        self.fresh = false;
        if !self.kept {
            self.remove(pages, page);
        }
        pages.mark(page, Mark::Unshared, false)
    }

    /// Takes the page out if it is in.
    pub(crate) fn remove(&mut self, pages: &mut Pages, page: PageNumber) {
        // Where the table was emptied, those of before bear the mark still.
        if pages.mark(page, Mark::Candidate, false) && (self.kept || self.is_current(pages, page)) {
            self.table.remove(spread(pages.tag(page)), page.0, hash_in(pages));
            self.crowded_out.remove(&page);
        }
    }

    /// Pages that should have been looked at were not: what they are filed under is not of this pass.
    pub(crate) fn left_gaps(&mut self) {
        self.gaps = true;
    }

    /// A new pass begins: nobody is a candidate. `whole` says that the last one came to its end; one that came by nobody counts for
    /// nothing.
    pub(crate) fn begin_pass(&mut self, pages: &Pages, whole: bool) {
        if !whole && self.fresh && !self.gaps {
            return;
        }
        self.fresh = true;
        self.odd = !self.odd;
        // Taken in any case: they are of the pass that is over.
        let gaps = std::mem::take(&mut self.gaps);
        self.kept = whole && !gaps;
        if self.kept {
            self.table.fit(hash_in(pages));
        } else {
            self.table.clear();
            self.crowded_out.clear();
        }
    }

    /// Nobody is a candidate, and nothing is kept of it.
    pub(crate) fn empty(&mut self, pages: &Pages) {
        self.gaps = true;
        self.begin_pass(pages, false);
        self.gaps = true;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes() + self.crowded_out.len() * in_tree::<PageNumber>()
    }
}

fn hash_in(pages: &Pages) -> impl Fn(&u32) -> u64 {
    |&page| spread(pages.tag(PageNumber(page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageRange;

    fn world(pages: u32) -> (Pages, UnstableTree) {
        let mut all = Pages::default();
        all.add(PageRange {
            first: PageNumber(0),
            pages,
        });
        (all, UnstableTree::default())
    }

    fn confirm(tree: &mut UnstableTree, pages: &mut Pages, page: PageNumber, tag: u32, pass: u16) -> bool {
        tree.confirm(pages, page, &[Checksum(tag.into())], pass).is_some()
    }

    fn file(tree: &mut UnstableTree, pages: &mut Pages, page: u32, tag: u32) {
        let page = PageNumber(page);
        pages.mark(page, Mark::Item, true);
        pages.mark(page, Mark::Unshared, true);
        tree.insert(pages, page, tag);
    }

    #[test]
    fn finds_by_tag_and_forgets() {
        let (mut pages, mut tree) = world(1000);
        for page in 0..1000 {
            file(&mut tree, &mut pages, page, page * 7);
        }
        assert_eq!(tree.find(&mut pages, 700 * 7), Some(PageNumber(700)));
        tree.remove(&mut pages, PageNumber(700));
        tree.remove(&mut pages, PageNumber(700));
        assert_eq!(tree.find(&mut pages, 700 * 7), None);
        for _ in 0..3 {
            tree.empty(&pages);
            assert_eq!(tree.find(&mut pages, 7), None);
            tree.remove(&mut pages, PageNumber(1));
            tree.insert(&mut pages, PageNumber(1), 7);
            assert_eq!(tree.find(&mut pages, 7), Some(PageNumber(1)));
            // It was in an older tree, under a tag that a page of this one has.
            tree.remove(&mut pages, PageNumber(2));
            assert_eq!(tree.find(&mut pages, 7), Some(PageNumber(1)));
        }
    }

    #[test]
    fn who_is_confirmed_is_found_and_nobody_else() {
        let (mut pages, mut tree) = world(10);
        let page = PageNumber;
        for at in 0..5 {
            file(&mut tree, &mut pages, at, at);
        }
        tree.begin_pass(&pages, true);
        assert!(!tree.has(&pages, page(1)), "not yet looked at");
        assert!(confirm(&mut tree, &mut pages, page(1), 1, 1) && tree.has(&pages, page(1)));
        assert_eq!(tree.find(&mut pages, 1), Some(page(1)));
        assert!(!confirm(&mut tree, &mut pages, page(2), 9, 1), "its bytes are others");
        assert!(
            !confirm(&mut tree, &mut pages, page(2), 2, SEARCHED_ANYWAY as u16),
            "each is searched for now and then"
        );
        tree.crowd_out(&pages, 2);
        assert!(
            !confirm(&mut tree, &mut pages, page(2), 2, 1),
            "it may have an equal frame"
        );
        tree.remove(&mut pages, page(2));
        file(&mut tree, &mut pages, 2, 2);
        assert!(confirm(&mut tree, &mut pages, page(2), 2, 1), "it was looked for");
        // Somebody else with the same bytes comes first.
        assert_eq!(tree.find(&mut pages, 3), None);
        file(&mut tree, &mut pages, 7, 3);
        assert!(
            !confirm(&mut tree, &mut pages, page(3), 3, 1),
            "it has to meet the other"
        );
        assert_eq!(tree.find(&mut pages, 3), Some(page(7)));
        // Left out for some passes, it comes back.
        for passes in 0..3 {
            assert_eq!(tree.leave_out(&mut pages, page(4)), passes == 0);
            tree.begin_pass(&pages, true);
            assert!(!tree.has(&pages, page(4)));
        }
        assert!(confirm(&mut tree, &mut pages, page(4), 4, 1));
        pages.mark(page(4), Mark::Unshared, true);
        assert_eq!(tree.find(&mut pages, 4), Some(page(4)));
        assert_eq!(tree.find(&mut pages, 1), None, "of a pass before");
    }

    #[test]
    fn a_pass_that_came_by_nobody_counts_for_nothing() {
        let (mut pages, mut tree) = world(2);
        file(&mut tree, &mut pages, 1, 5);
        for _ in 0..3 {
            tree.begin_pass(&pages, true);
            tree.begin_pass(&pages, false);
            assert!(!tree.has(&pages, PageNumber(1)));
            assert!(confirm(&mut tree, &mut pages, PageNumber(1), 5, 1));
        }
        tree.begin_pass(&pages, false);
        assert!(
            !confirm(&mut tree, &mut pages, PageNumber(1), 5, 1),
            "the pass was left in the middle"
        );
    }

    #[test]
    fn after_a_pass_with_gaps_all_is_filed_anew() {
        for gap in 0..3 {
            let (mut pages, mut tree) = world(2);
            let page = PageNumber(1);
            file(&mut tree, &mut pages, page.0, 5);
            match gap {
                0 => tree.begin_pass(&pages, false),
                1 => {
                    tree.left_gaps();
                    tree.begin_pass(&pages, true);
                }
                _ => {
                    tree.empty(&pages);
                    tree.begin_pass(&pages, true);
                }
            }
            assert!(!confirm(&mut tree, &mut pages, page, 5, 1));
            tree.leave_out(&mut pages, page);
            tree.begin_pass(&pages, true);
            assert!(!confirm(&mut tree, &mut pages, page, 5, 1), "it is in no table");
            assert_eq!(tree.find(&mut pages, 5), None);
        }
    }
}
