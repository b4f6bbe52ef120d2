//! What the program keeps out of merging, on real memory.

mod tracked;

use ksmrs_sys::protocol::{Kind, Page, Span};
use ksmrs_sys::{PAGE_SIZE, State};
use tracked::*;

#[test]
fn what_was_opted_out_before_stays_out_when_more_cannot_be() {
    let tracked = Tracked::make(UNIT, Kind::Private);
    tracked.fill();
    let whole = Span {
        first: Page(0),
        pages: UNIT,
    };
    assert_eq!(Frames::of(&tracked).merge(&tracked.region, whole), UNIT as usize);
    for pages in [0..2, 7..9] {
        tracked.region.unadvise(pages).unwrap();
    }
    // The kernel has no memory for the copy of a page that is not there.
    let hole = std::ptr::with_exposed_provenance_mut(tracked.region.address() + 4 * PAGE_SIZE);
    // SAFETY: a page of the region, which nobody touches until it is back.
    assert_eq!(unsafe { libc::munmap(hole, PAGE_SIZE) }, 0);
    tracked.region.unadvise(1..8).unwrap_err();
    let held = |page: &usize| tracked.region.page_states()[*page] == State::Held;
    let out: Vec<usize> = (0..UNIT as usize).filter(held).collect();
    // SAFETY: fresh memory where there is none.
    let back = unsafe {
        let (access, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
        );
        libc::mmap(hole, PAGE_SIZE, access, flags, -1, 0)
    };
    assert_eq!(back, hole);
    assert_eq!(out, [0, 1, 7, 8]);
    // They are let take part again by nobody but the program.
    tracked.region.advise(0..UNIT).unwrap();
    assert_eq!(states(&tracked.region, State::Held), 0);
}
