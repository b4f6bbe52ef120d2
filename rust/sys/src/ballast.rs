//! Mappings held back for a break at the mapping limit.
//!
//! A break of one page may need two mappings more than there were. So each client keeps a few of its own that do nothing; the
//! fault handler gives them up when the kernel has none left, and the remapper takes new ones when it can. Async-signal-safe
//! on the giving side.

use crate::object::PAGE_SIZE;
use core::sync::atomic::{AtomicUsize, Ordering};
use rustix::mm::{MapFlags, ProtFlags};
use std::ptr;

/// Every second page has another protection, so that no two pages share a mapping: 8 mappings of 1 page to give up.
const PAGES: usize = 8;

/// The ballast's address; 0 while there is none.
static BALLAST: AtomicUsize = AtomicUsize::new(0);

/// Takes the mappings if they are not there. Failure is no news: the next call tries again.
pub(crate) fn take() {
    if BALLAST.load(Ordering::Acquire) != 0 {
        return;
    }
    // SAFETY: fresh inaccessible pages where the kernel likes, nobody ever touches them.
    let area = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            PAGES * PAGE_SIZE,
            ProtFlags::empty(),
            MapFlags::PRIVATE,
        )
    };
    let Ok(area) = area else { return };
    for page in (0..PAGES).step_by(2) {
        // SAFETY: pages of the area mapped above. Should it fail there are fewer mappings, that is all.
        let _ = unsafe {
            let page = area.byte_add(page * PAGE_SIZE);
            rustix::mm::mprotect(page, PAGE_SIZE, rustix::mm::MprotectFlags::READ)
        };
    }
    if BALLAST
        .compare_exchange(0, area.expose_provenance(), Ordering::AcqRel, Ordering::Relaxed)
        .is_err()
    {
        // SAFETY: mapped above and not published.
        let _ = unsafe { rustix::mm::munmap(area, PAGES * PAGE_SIZE) };
    }
}

/// Gives the mappings up; false if there were none.
pub(crate) fn give_up() -> bool {
    let area = BALLAST.swap(0, Ordering::AcqRel);
    if area == 0 {
        return false;
    }
    // SAFETY: the swap made the whole area ours alone.
    unsafe { rustix::mm::munmap(ptr::with_exposed_provenance_mut(area), PAGES * PAGE_SIZE) }.is_ok()
}
