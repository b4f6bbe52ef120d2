//! The sweep: once a pass, memory that came back to the store without being asked for is given back again.
//!
//! A client that touches a hole through its read-only mapping, or a page that was pinned when it was punched, leaves memory
//! behind that no frame needs. The kernel says where memory is (SEEK_DATA), the marks say where it belongs. A frame that is
//! marked is never punched here, whatever the kernel says.

use std::collections::HashMap;

use ksmrs_sys::store::Store;
use ksmrs_sys::{EXTENT_PAGES, PAGE_SIZE, Slot, SysError};

const WORDS: usize = EXTENT_PAGES as usize / 64;

/// Which slots the broker filled and has not punched since: a bit each, extents without any take nothing.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    extents: HashMap<u32, [u64; WORDS]>,
    marked: u64,
    /// The pass that was swept last.
    swept: u64,
}

impl Sweep {
    /// Notes that slots were filled, or punched.
    pub(crate) fn mark(&mut self, first: Slot, pages: u32, filled: bool) {
        for slot in first.0..first.0 + pages {
            let (extent, bit) = (slot / EXTENT_PAGES, slot % EXTENT_PAGES);
            if !filled && !self.extents.contains_key(&extent) {
                continue;
            }
            let words = self.extents.entry(extent).or_default();
            let (word, mask) = (&mut words[bit as usize / 64], 1 << (bit % 64));
            match (*word & mask != 0, filled) {
                (false, true) => self.marked += 1,
                (true, false) => self.marked -= 1,
                _ => continue,
            }
            *word ^= mask;
            if !filled && words.iter().all(|&word| word == 0) {
                self.extents.remove(&extent);
            }
        }
    }

    fn is_marked(&self, slot: u32) -> bool {
        let bit = slot % EXTENT_PAGES;
        self.extents
            .get(&(slot / EXTENT_PAGES))
            .is_some_and(|words| words[bit as usize / 64] >> (bit % 64) & 1 != 0)
    }

    /// Punches what nobody marked, if a pass ended since the last time and there is more memory than marks. Returns how many
    /// slots that were.
    pub(crate) fn after_pass(&mut self, pass: u64, store: &Store) -> Result<u32, SysError> {
        if pass == self.swept {
            return Ok(0);
        }
        self.swept = pass;
        if store.allocated()? <= self.marked * PAGE_SIZE as u64 {
            return Ok(0);
        }
        let mut punched = 0;
        for (first, pages) in store.filled()? {
            let mut from = first.0;
            let end = first.0 + pages;
            while from < end {
                let stray = !self.is_marked(from);
                let to = (from..end).find(|&slot| self.is_marked(slot) == stray).unwrap_or(end);
                if stray {
                    store.punch(Slot(from), to - from)?;
                    punched += to - from;
                }
                from = to;
            }
        }
        Ok(punched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ksmrs_sys::staging::{Staging, StagingView};

    #[test]
    fn only_what_nobody_marked_is_punched() {
        let store = Store::with_slots(2048).unwrap();
        let (staging, fd) = Staging::create().unwrap();
        staging.write_page(0, &[1; PAGE_SIZE]);
        let view = StagingView::open(&fd).unwrap();
        let mut sweep = Sweep::default();
        store.fill(Slot(500), &view, 0, 40).unwrap();
        store.fill(Slot(2000), &view, 0, 1).unwrap();
        sweep.mark(Slot(505), 10, true);
        sweep.mark(Slot(511), 3, true);
        sweep.mark(Slot(507), 1, false);
        assert_eq!(sweep.after_pass(0, &store).unwrap(), 0, "no pass has ended");
        assert_eq!(sweep.after_pass(1, &store).unwrap(), 5 + 1 + 25 + 1);
        let kept = [(Slot(505), 2), (Slot(508), 7)];
        assert_eq!(store.filled().unwrap(), kept);
        assert_eq!(sweep.after_pass(2, &store).unwrap(), 0);
        sweep.mark(Slot(0), 2048, false);
        assert_eq!((sweep.marked, sweep.extents.len()), (0, 0));
    }
}
