//! The unstable tree: candidates by the tag of their checksum, emptied at each full scan.
//!
//! Page contents change under it, as in the kernel; it is only a way to find two pages that may be equal. An entry is a bare page
//! number (4 bytes and a control byte); the tag lives in the page's own record, so an entry can be found and removed
//! without a walk. Relies on `page.rs`; never holds a frame.

use crate::checksum::spread;
use crate::page::{Mark, PageNumber, Pages};
use hashbrown::HashTable;

#[derive(Default)]
pub(crate) struct UnstableTree {
    table: HashTable<u32>,
}

impl UnstableTree {
    /// A candidate with this tag.
    pub(crate) fn find(&self, pages: &Pages, tag: u32) -> Option<PageNumber> {
        self.table
            .find(spread(tag), |&page| pages.tag(PageNumber(page)) == tag)
            .map(|&page| PageNumber(page))
    }

    pub(crate) fn insert(&mut self, pages: &mut Pages, page: PageNumber, tag: u32) {
        debug_assert!(!pages.is(page, Mark::Candidate));
        pages.set_tag(page, tag);
        pages.mark(page, Mark::Candidate, true);
        self.table
            .insert_unique(spread(tag), page.0, |&page| spread(pages.tag(PageNumber(page))));
    }

    /// Takes the page out if it is in.
    pub(crate) fn remove(&mut self, pages: &mut Pages, page: PageNumber) {
        if !pages.mark(page, Mark::Candidate, false) {
            return;
        }
        if let Ok(entry) = self.table.find_entry(spread(pages.tag(page)), |&other| other == page.0) {
            entry.remove();
        }
    }

    /// A new pass begins: nobody is a candidate.
    pub(crate) fn empty(&mut self, pages: &mut Pages) {
        let last_pass = self.table.len();
        for page in self.table.drain() {
            pages.mark(PageNumber(page), Mark::Candidate, false);
        }
        // About as many come back; what merged meanwhile does not.
        self.table.shrink_to(last_pass, |_| 0);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.allocation_size()
    }
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
        tree.empty(&mut pages);
        assert_eq!(tree.find(&pages, 7), None);
        assert!(!pages.is(PageNumber(1), Mark::Candidate));
    }
}
