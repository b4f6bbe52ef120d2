//! Pages: their numbers, and what core remembers of each of them.
//!
//! Every page of every region of a domain has a number of its own; a region owns a contiguous range of them, laid so that
//! `number % 512` is the page's position in its 2 MiB window. Six bytes per page are kept, in arrays of one window each: a
//! slot (or, while an uncovered page is a candidate, the tag of its checksum) and two bytes of state and age. Relies on
//! `region.rs` to hand numbers out; never looks at a frame and never decides.

use crate::checksum::Checksum;
use crate::frame::Slot;

/// Pages in a window, and slots in an extent: 2 MiB of 4 KiB pages.
pub const WINDOW: u32 = 512;

/// A page of a domain; dense, and taken again after its region left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageNumber(pub u32);

impl PageNumber {
    /// The page `pages` further on.
    #[must_use]
    pub const fn plus(self, pages: u32) -> PageNumber {
        PageNumber(self.0 + pages)
    }

    /// The page's position in its 2 MiB window.
    pub const fn position(self) -> u16 {
        (self.0 % WINDOW) as u16
    }

    pub(crate) const fn window(self) -> u32 {
        self.0 / WINDOW
    }
}

/// Consecutive pages of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// The first of them.
    pub first: PageNumber,
    /// How many.
    pub pages: u32,
}

impl PageRange {
    /// The pages, in order.
    pub fn iter(self) -> impl Iterator<Item = PageNumber> {
        (self.first.0..self.first.0 + self.pages).map(PageNumber)
    }
}

/// Consecutive pages of one region and the consecutive slots that they are to show ([`Slot::ZERO`]: all of them zero).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: PageNumber,
    /// At most 512.
    pub pages: u16,
    /// The slot of the first page.
    pub slot: Slot,
}

impl Run {
    /// Each page with its slot.
    pub fn iter(self) -> impl Iterator<Item = (PageNumber, Slot)> {
        (0..u32::from(self.pages)).map(move |i| (self.first.plus(i), self.slot.stepped(i)))
    }
}

/// What a page lies over, as far as core was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its own memory.
    Own,
    /// It shows this frame.
    Merged(Slot),
    /// All zero, no memory.
    Zero,
    /// Own memory inside a mapping of this slot (Broken, Held).
    Covering(Slot),
    /// A private copy over this slot, which keeps the frame's memory too.
    Detached(Slot),
}

impl Place {
    /// Whether the kernel could map a page at `next` in the same VMA as the page at `self` before it.
    pub(crate) fn continues_into(self, next: Place) -> bool {
        match (self.slot(), next.slot()) {
            (None, None) => (self == Place::Zero) == (next == Place::Zero),
            (Some(slot), Some(next)) => slot.0 + 1 == next.0,
            _ => false,
        }
    }

    pub(crate) fn slot(self) -> Option<Slot> {
        match self {
            Place::Own | Place::Zero => None,
            Place::Merged(slot) | Place::Covering(slot) | Place::Detached(slot) => Some(slot),
        }
    }

    /// The place of a page that was proposed `slot` and took it.
    pub(crate) fn showing(slot: Slot) -> Place {
        if slot == Slot::ZERO {
            Place::Zero
        } else {
            Place::Merged(slot)
        }
    }
}

/// Two bytes: place 3 bits, four marks, age 4 bits, passes still to skip 4 bits, a fifth mark.
#[derive(Clone, Copy, Default)]
struct Meta(u16);

impl Meta {
    /// Whether it is of a candidate with memory of its own, of which nothing is on its way.
    fn is_filed(self) -> bool {
        const IS: u16 = Mark::Candidate as u16 | Mark::Item as u16;
        const IS_NOT: u16 = PLACE_MASK | Mark::Busy as u16;
        self.0 & (IS | IS_NOT) == IS
    }
}

const PLACE_MASK: u16 = 0b111;
const AGE_SHIFT: u32 = 7;
const SKIPS_SHIFT: u32 = 11;
const NIBBLE: u16 = 0xf;

/// A yes-or-no fact about a page.
#[derive(Clone, Copy)]
#[repr(u16)]
pub(crate) enum Mark {
    /// It is in the unstable tree.
    Candidate = 1 << 3,
    /// It was a candidate at its last visit (what `pages_unshared` counts, as the kernel does).
    Unshared = 1 << 4,
    /// It had memory at its last visit: the kernel would keep an rmap_item for it.
    Item = 1 << 5,
    /// It waits for a frame or is part of an unanswered order: nothing is planned for it.
    Busy = 1 << 6,
    /// The pass in which it was filed last, or confirmed, had an odd number.
    Odd = 1 << 15,
}

struct Window {
    slots: [u32; WINDOW as usize],
    metas: [Meta; WINDOW as usize],
    /// Tags of candidates whose slot field is taken, that is of broken pages; rare.
    covered_tags: Option<Box<[u32; WINDOW as usize]>>,
    live: u16,
}

/// Makes a list of boxes longer, by an eighth when it has to move: doubled, it would be half empty, for a hundredth of a byte a page.
pub(crate) fn lengthen<T>(list: &mut Vec<Option<Box<T>>>, length: usize) {
    if length > list.capacity() {
        list.reserve_exact(length + length / 8 - list.len());
    }
    list.resize_with(length, || None);
}

/// What is remembered of all pages of a domain.
#[derive(Default)]
pub(crate) struct Pages {
    windows: Vec<Option<Box<Window>>>,
}

impl Pages {
    /// Makes room for a region's pages, all of them Own.
    pub(crate) fn add(&mut self, range: PageRange) {
        for page in range.iter() {
            let index = page.window() as usize;
            if self.windows.len() <= index {
                lengthen(&mut self.windows, index + 1);
            }
            let window = self.windows[index].get_or_insert_with(|| {
                Box::new(Window {
                    slots: [0; WINDOW as usize],
                    metas: [Meta::default(); WINDOW as usize],
                    covered_tags: None,
                    live: 0,
                })
            });
            window.slots[page.position() as usize] = 0;
            window.metas[page.position() as usize] = Meta::default();
            window.live += 1;
        }
    }

    /// Forgets a region's pages.
    pub(crate) fn remove(&mut self, range: PageRange) {
        for page in range.iter() {
            let place = &mut self.windows[page.window() as usize];
            let Some(window) = place else { continue };
            window.live -= 1;
            if window.live == 0 {
                *place = None;
            }
        }
    }

    fn window(&self, page: PageNumber) -> (&Window, usize) {
        let window = self.windows[page.window() as usize].as_ref();
        (
            window.expect("a page of a region has a window"),
            page.position() as usize,
        )
    }

    fn window_mut(&mut self, page: PageNumber) -> (&mut Window, usize) {
        let window = self.windows[page.window() as usize].as_mut();
        (
            window.expect("a page of a region has a window"),
            page.position() as usize,
        )
    }

    pub(crate) fn place(&self, page: PageNumber) -> Place {
        let (window, i) = self.window(page);
        let slot = Slot(window.slots[i]);
        match window.metas[i].0 & PLACE_MASK {
            0 => Place::Own,
            1 => Place::Merged(slot),
            2 => Place::Zero,
            3 => Place::Covering(slot),
            _ => Place::Detached(slot),
        }
    }

    pub(crate) fn set_place(&mut self, page: PageNumber, place: Place) {
        debug_assert!(
            !self.is(page, Mark::Candidate),
            "{page:?} is moved while its slot field may hold a tag"
        );
        let (window, i) = self.window_mut(page);
        let (kind, slot) = match place {
            Place::Own => (0, 0),
            Place::Merged(slot) => (1, slot.0),
            Place::Zero => (2, 0),
            Place::Covering(slot) => (3, slot.0),
            Place::Detached(slot) => (4, slot.0),
        };
        window.metas[i].0 = window.metas[i].0 & !PLACE_MASK | kind;
        window.slots[i] = slot;
    }

    pub(crate) fn is(&self, page: PageNumber, mark: Mark) -> bool {
        let (window, i) = self.window(page);
        window.metas[i].0 & mark as u16 != 0
    }

    /// How many of so many pages of one window come before the first that is Busy.
    pub(crate) fn not_busy(&self, first: PageNumber, pages: u32) -> u32 {
        let (window, i) = self.window(first);
        let metas = &window.metas[i..][..pages as usize];
        let busy = metas.iter().position(|meta| meta.0 & Mark::Busy as u16 != 0);
        busy.map_or(pages, |at| at as u32)
    }

    /// Sets or clears a mark; returns whether that changed anything.
    pub(crate) fn mark(&mut self, page: PageNumber, mark: Mark, on: bool) -> bool {
        let (window, i) = self.window_mut(page);
        let before = window.metas[i].0;
        window.metas[i].0 = if on {
            before | mark as u16
        } else {
            before & !(mark as u16)
        };
        window.metas[i].0 != before
    }

    /// Sets the bit that tells passes apart to `odd` on consecutive pages of one window, all of them or none, if they have memory of their
    /// own and are filed under the tags of these checksums. Marks them Unshared and tells how many were not.
    pub(crate) fn confirm(&mut self, first: PageNumber, checksums: &[Checksum], odd: bool) -> Option<u32> {
        let (window, i) = self.window_mut(first);
        let tags = &window.slots[i..][..checksums.len()];
        let metas = &mut window.metas[i..][..checksums.len()];
        // Neither loop ends early: so the compiler can do many pages at a time.
        let others = tags
            .iter()
            .zip(checksums)
            .map(|(tag, checksum)| tag ^ checksum.masked().tag());
        let filed = metas.iter().fold(true, |filed, meta| filed & meta.is_filed());
        if !filed || others.fold(0, |any, other| any | other) != 0 {
            return None;
        }
        let mut unmarked = 0;
        for meta in metas {
            unmarked += u32::from(meta.0 & Mark::Unshared as u16 == 0);
            meta.0 = meta.0 & !(Mark::Odd as u16) | Mark::Unshared as u16 | if odd { Mark::Odd as u16 } else { 0 };
        }
        Some(unmarked)
    }

    /// The tag that a candidate is filed under.
    pub(crate) fn tag(&self, page: PageNumber) -> u32 {
        let (window, i) = self.window(page);
        if window.metas[i].0 & PLACE_MASK == 0 {
            return window.slots[i];
        }
        window.covered_tags.as_ref().map_or(0, |tags| tags[i])
    }

    pub(crate) fn set_tag(&mut self, page: PageNumber, tag: u32) {
        let (window, i) = self.window_mut(page);
        if window.metas[i].0 & PLACE_MASK == 0 {
            window.slots[i] = tag;
        } else {
            window
                .covered_tags
                .get_or_insert_with(|| Box::new([0; WINDOW as usize]))[i] = tag;
        }
    }

    /// How often the page was looked at unmerged, up to 15, and how many passes it still sits out.
    pub(crate) fn age(&self, page: PageNumber) -> (u8, u8) {
        let (window, i) = self.window(page);
        let meta = window.metas[i].0;
        (
            ((meta >> AGE_SHIFT) & NIBBLE) as u8,
            ((meta >> SKIPS_SHIFT) & NIBBLE) as u8,
        )
    }

    pub(crate) fn set_age(&mut self, page: PageNumber, age: u8, skips: u8) {
        let (window, i) = self.window_mut(page);
        let rest = window.metas[i].0 & !(NIBBLE << AGE_SHIFT | NIBBLE << SKIPS_SHIFT);
        let age = u16::from(age).min(NIBBLE);
        window.metas[i].0 = rest | age << AGE_SHIFT | (u16::from(skips) & NIBBLE) << SKIPS_SHIFT;
    }

    /// Bytes spent on pages.
    pub(crate) fn bytes(&self) -> usize {
        let window = |w: &Window| size_of::<Window>() + w.covered_tags.as_ref().map_or(0, |tags| size_of_val(&**tags));
        self.windows.capacity() * size_of::<Option<Box<Window>>>()
            + self.windows.iter().flatten().map(|w| window(w)).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_age_and_tag_do_not_disturb_each_other() {
        let mut pages = Pages::default();
        let range = PageRange {
            first: PageNumber(510),
            pages: 4,
        };
        pages.add(range);
        let page = PageNumber(512);
        pages.set_place(page, Place::Covering(Slot(77)));
        pages.set_age(page, 200, 8);
        assert!(pages.mark(page, Mark::Candidate, true));
        assert!(!pages.mark(page, Mark::Candidate, true));
        pages.set_tag(page, 0xdead_beef);
        assert_eq!(pages.tag(page), 0xdead_beef);
        assert_eq!(pages.place(page), Place::Covering(Slot(77)));
        assert_eq!(pages.age(page), (15, 8));
        assert!(pages.mark(page, Mark::Candidate, false));
        pages.set_place(page, Place::Own);
        assert_eq!(pages.place(page), Place::Own);
        pages.remove(range);
        assert!(pages.windows.iter().all(Option::is_none));
    }

    #[test]
    fn neighbours_share_a_mapping_only_where_offsets_go_on() {
        assert!(Place::Own.continues_into(Place::Own));
        assert!(Place::Zero.continues_into(Place::Zero));
        assert!(!Place::Own.continues_into(Place::Zero));
        assert!(Place::Merged(Slot(4)).continues_into(Place::Covering(Slot(5))));
        assert!(!Place::Merged(Slot(4)).continues_into(Place::Merged(Slot(4))));
        assert!(!Place::Merged(Slot(4)).continues_into(Place::Own));
    }
}
