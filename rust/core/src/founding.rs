//! Foundings: contents on their way into the stable tree.
//!
//! Two candidates agreed in their checksum; one of them is to be staged, and until the frame is filled and re-hashed further
//! pages of that checksum wait here. Waiters lie in one pool, chained by 32-bit links, so a page costs no allocation. Relies
//! on nothing; never touches a frame.

use crate::checksum::{Checksum, spread};
use crate::page::PageNumber;
use hashbrown::HashTable;

/// A content on its way into the stable tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FoundingId(pub u32);

const NONE: u32 = u32::MAX;

struct Founding {
    checksum: Checksum,
    stager: PageNumber,
    first_waiter: u32,
    waiters: u32,
    live: bool,
}

#[derive(Default)]
pub(crate) struct Foundings {
    all: Vec<Founding>,
    vacant: Vec<u32>,
    /// Those that take further waiters.
    open: HashTable<u32>,
    waiters: Vec<(PageNumber, u32)>,
    vacant_waiters: Vec<u32>,
    live: usize,
}

impl Foundings {
    /// A founding of this content that takes one more page.
    pub(crate) fn find(&self, checksum: Checksum) -> Option<FoundingId> {
        let same = |&id: &u32| self.all[id as usize].checksum == checksum;
        self.open.find(spread(checksum.tag()), same).map(|&id| FoundingId(id))
    }

    /// Fetches what [`Foundings::find`] will read for this content, as [`crate::table::Table::warm`] does.
    pub(crate) fn warm(&self, checksum: Checksum) -> u32 {
        let mut touched = 0;
        self.open.find(spread(checksum.tag()), |&id| {
            touched ^= self.all[id as usize].first_waiter;
            false
        });
        touched
    }

    /// Begins one; `stager` is the page to be copied.
    pub(crate) fn begin(&mut self, checksum: Checksum, stager: PageNumber) -> FoundingId {
        let founding = Founding {
            checksum,
            stager,
            first_waiter: NONE,
            waiters: 0,
            live: true,
        };
        let id = if let Some(id) = self.vacant.pop() {
            self.all[id as usize] = founding;
            id
        } else {
            self.all.push(founding);
            self.all.len() as u32 - 1
        };
        self.live += 1;
        let all = &self.all;
        self.open.insert_unique(spread(checksum.tag()), id, |&id| {
            spread(all[id as usize].checksum.tag())
        });
        FoundingId(id)
    }

    /// Adds a page; at `most` pages the founding takes no more.
    pub(crate) fn wait(&mut self, id: FoundingId, page: PageNumber, most: u32) {
        let founding = &mut self.all[id.0 as usize];
        let waiter = (page, founding.first_waiter);
        founding.first_waiter = if let Some(cell) = self.vacant_waiters.pop() {
            self.waiters[cell as usize] = waiter;
            cell
        } else {
            self.waiters.push(waiter);
            self.waiters.len() as u32 - 1
        };
        founding.waiters += 1;
        if founding.waiters >= most {
            self.close(id);
        }
    }

    /// Whether it was open.
    fn close(&mut self, id: FoundingId) -> bool {
        let tag = self.all[id.0 as usize].checksum.tag();
        let open = self.open.find_entry(spread(tag), |&other| other == id.0);
        open.map(|entry| entry.remove()).is_ok()
    }

    pub(crate) fn checksum(&self, id: FoundingId) -> Checksum {
        self.all[id.0 as usize].checksum
    }

    pub(crate) fn is_live(&self, id: FoundingId) -> bool {
        self.all[id.0 as usize].live
    }

    /// All that are on their way.
    pub(crate) fn live(&self) -> Vec<FoundingId> {
        let ids = self.all.iter().enumerate().filter(|(_, founding)| founding.live);
        ids.map(|(id, _)| FoundingId(id as u32)).collect()
    }

    /// Ends one and tells who waited.
    pub(crate) fn end(&mut self, id: FoundingId) -> Vec<PageNumber> {
        let mut pages = Vec::new();
        self.end_into(id, &mut pages);
        pages
    }

    /// The same, in a list that is there; whether it would have taken more.
    pub(crate) fn end_into(&mut self, id: FoundingId, pages: &mut Vec<PageNumber>) -> bool {
        let was_open = self.close(id);
        let founding = &mut self.all[id.0 as usize];
        founding.live = false;
        let mut cell = founding.first_waiter;
        while cell != NONE {
            self.vacant_waiters.push(cell);
            let (page, next) = self.waiters[cell as usize];
            pages.push(page);
            cell = next;
        }
        self.live -= 1;
        was_open
    }

    /// Its number may be used again: no order names it any more.
    pub(crate) fn forget(&mut self, id: FoundingId) {
        debug_assert!(!self.is_live(id));
        self.vacant.push(id.0);
        if self.vacant.len() == self.all.len() {
            // A burst must not keep its memory for ever.
            *self = Foundings::default();
        }
    }

    /// Takes pages out that nobody can merge any more; returns foundings that lost the page they were to be copied from.
    pub(crate) fn drop_pages(&mut self, gone: impl Fn(PageNumber) -> bool) -> Vec<FoundingId> {
        let mut orphans = Vec::new();
        for (id, founding) in self.all.iter_mut().enumerate().filter(|(_, founding)| founding.live) {
            let mut link = NONE;
            let mut cell = founding.first_waiter;
            while cell != NONE {
                let (page, next) = self.waiters[cell as usize];
                if gone(page) {
                    if link == NONE {
                        founding.first_waiter = next;
                    } else {
                        self.waiters[link as usize].1 = next;
                    }
                    founding.waiters -= 1;
                    self.vacant_waiters.push(cell);
                } else {
                    link = cell;
                }
                cell = next;
            }
            if gone(founding.stager) {
                orphans.push(FoundingId(id as u32));
            }
        }
        orphans
    }

    pub(crate) fn len(&self) -> usize {
        self.live
    }

    pub(crate) fn bytes(&self) -> usize {
        self.all.capacity() * size_of::<Founding>()
            + self.waiters.capacity() * size_of::<(PageNumber, u32)>()
            + (self.vacant.capacity() + self.vacant_waiters.capacity()) * size_of::<u32>()
            + self.open.allocation_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_wait_until_it_is_full_or_they_leave() {
        let mut foundings = Foundings::default();
        let id = foundings.begin(Checksum(3), PageNumber(1));
        foundings.wait(id, PageNumber(1), 3);
        foundings.wait(id, PageNumber(2), 3);
        assert_eq!(foundings.find(Checksum(3)), Some(id));
        assert_eq!(foundings.drop_pages(|page| page.0 == 2), []);
        foundings.wait(id, PageNumber(3), 3);
        foundings.wait(id, PageNumber(4), 3);
        assert_eq!(foundings.find(Checksum(3)), None);
        assert_eq!(foundings.drop_pages(|page| page.0 == 1), [id]);
        assert_eq!(foundings.end(id), [PageNumber(4), PageNumber(3)]);
        foundings.forget(id);
        assert_eq!(foundings.len(), 0);
        assert_eq!(foundings.begin(Checksum(4), PageNumber(9)), id);
    }
}
