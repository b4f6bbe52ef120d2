//! The unstable tree: candidates by the tag of their checksum, emptied at each full scan.
//!
//! Page contents change under it, as in the kernel; it is only a way to find two pages that may be equal. An entry is a bare page
//! number; the tag lies in the page's own record, so an entry can be found and removed without a walk. A new pass empties the table and not the
//! records: a page says in which tree it was, by one bit, for none is left out of two passes with its mark on. Relies on `page.rs`; never holds
//! a frame.

use crate::checksum::spread;
use crate::page::{Mark, PageNumber, Pages};
use crate::table::Table;

#[derive(Default)]
pub(crate) struct UnstableTree {
    table: Table,
    /// Trees have been emptied an odd number of times.
    odd: bool,
}

impl UnstableTree {
    /// A candidate with this tag.
    pub(crate) fn find(&self, pages: &Pages, tag: u32) -> Option<PageNumber> {
        self.table
            .find(spread(tag), |&page| pages.tag(PageNumber(page)) == tag)
            .map(PageNumber)
    }

    /// Whether the page is a candidate in this pass.
    pub(crate) fn has(&self, pages: &Pages, page: PageNumber) -> bool {
        pages.is(page, Mark::Candidate) && pages.is(page, Mark::Odd) == self.odd
    }

    pub(crate) fn insert(&mut self, pages: &mut Pages, page: PageNumber, tag: u32) {
        debug_assert!(!pages.is(page, Mark::Candidate));
        pages.set_tag(page, tag);
        pages.mark(page, Mark::Candidate, true);
        pages.mark(page, Mark::Odd, self.odd);
        self.table.insert(spread(tag), page.0, hash_in(pages));
    }

    /// Takes the page out if it is in.
    pub(crate) fn remove(&mut self, pages: &mut Pages, page: PageNumber) {
        // Of the tree before this one it may bear the mark still; of one before that too, and is not found then.
        if pages.mark(page, Mark::Candidate, false) && pages.is(page, Mark::Odd) == self.odd {
            self.table.remove(spread(pages.tag(page)), page.0, hash_in(pages));
        }
    }

    /// A new pass begins: nobody is a candidate.
    pub(crate) fn empty(&mut self) {
        self.table.clear();
        self.odd = !self.odd;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes()
    }
}

fn hash_in(pages: &Pages) -> impl Fn(&u32) -> u64 {
    |&page| spread(pages.tag(PageNumber(page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageRange;

    #[test]
    fn finds_by_tag_and_forgets() {
        let mut pages = Pages::default();
        pages.add(PageRange {
            first: PageNumber(0),
            pages: 1000,
        });
        let mut tree = UnstableTree::default();
        for page in 0..1000 {
            tree.insert(&mut pages, PageNumber(page), page * 7);
        }
        assert_eq!(tree.find(&pages, 700 * 7), Some(PageNumber(700)));
        tree.remove(&mut pages, PageNumber(700));
        tree.remove(&mut pages, PageNumber(700));
        assert_eq!(tree.find(&pages, 700 * 7), None);
        for _ in 0..3 {
            tree.empty();
            assert_eq!(tree.find(&pages, 7), None);
            tree.remove(&mut pages, PageNumber(1));
            tree.insert(&mut pages, PageNumber(1), 7);
            assert_eq!(tree.find(&pages, 7), Some(PageNumber(1)));
            // It was in an older tree, under a tag that a page of this one has.
            tree.remove(&mut pages, PageNumber(2));
            assert_eq!(tree.find(&pages, 7), Some(PageNumber(1)));
        }
    }
}
