//! What core knows of every page, in stretches, for whoever draws it.
//!
//! Each page belongs to one class, and the pages of a class add up to a counter of `stats.rs`. Relies on `page.rs` and `region.rs`;
//! changes nothing, and looks at a bounded number of pages in one call, for whoever asks may have terabytes.

use crate::Core;
use crate::page::{Mark, PageNumber, Place};
use crate::region::{ClientId, Kind, RegionId};

/// Pages looked at in one call: about a millisecond.
const MOST_PAGES: u32 = 1 << 18;

/// What a page counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// It had no memory at its last visit, was not visited yet, or is opted out: it counts nowhere.
    Uncounted = 0,
    /// It changed, or waits for its second look: `pages_volatile`.
    Volatile = 1,
    /// It held still and has no equal: `pages_unshared`.
    Unshared = 2,
    /// It shows a frame: `pages_shared` and `pages_sharing`.
    Merged = 3,
    /// All zero, without memory: `ksm_zero_pages`.
    Zero = 4,
}

/// Neighbouring pages of one region and one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Whose.
    pub client: ClientId,
    /// Which region of its.
    pub region: RegionId,
    /// What that is made of.
    pub kind: Kind,
    /// The first page, counted from the region's.
    pub first: u32,
    /// How many.
    pub pages: u32,
    /// What they count as.
    pub class: Class,
}

impl Core {
    /// Stretches from a page on, at most so many, and the page to go on with; `None` at the end. What comes and goes between two calls
    /// is seen as it is met.
    pub fn page_map(&self, from: PageNumber, most: usize) -> (Vec<Stretch>, Option<PageNumber>) {
        let mut found: Vec<Stretch> = Vec::new();
        let mut looked = 0;
        for (id, region) in self.regions.from(from) {
            let range = region.range;
            for page in (from.0.max(range.first.0)..range.first.0 + range.pages).map(PageNumber) {
                let class = self.class_of(page);
                let first = page.0 - range.first.0;
                let full = found.len() == most;
                match found.last_mut() {
                    Some(last) if last.region == id && last.class == class => last.pages += 1,
                    _ if full => return (found, Some(page)),
                    _ => found.push(Stretch {
                        client: region.client,
                        region: id,
                        kind: region.kind,
                        first,
                        pages: 1,
                        class,
                    }),
                }
                looked += 1;
                if looked == MOST_PAGES {
                    return (found, Some(page.plus(1)));
                }
            }
        }
        (found, None)
    }

    fn class_of(&self, page: PageNumber) -> Class {
        match self.pages.place(page) {
            Place::Merged(_) => Class::Merged,
            Place::Zero => Class::Zero,
            _ if self.pages.is(page, Mark::Unshared) => Class::Unshared,
            _ if self.pages.is(page, Mark::Item) => Class::Volatile,
            _ => Class::Uncounted,
        }
    }
}
