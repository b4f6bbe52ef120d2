//! A mapping of the frames that a run is to show: first to compare with, then, for long runs, the very mapping that moves over
//! the pages. Many short runs look through one mapping of the whole store, the glass, for a window of its own takes a short run as
//! long as all the rest.
//!
//! It relies on the store being read-only for clients and never shrinking. A window never shows more than one run.

use crate::aligned::Aligned;
use crate::error::SysError;
use crate::mapping;
use crate::object::{EXTENT_PAGES, EXTENT_SIZE, PAGE_SIZE};
use crate::protocol::{Kind, MAX_RUN};
use crate::store::StoreFile;
use crate::word::Slot;
use core::cell::Cell;
use core::ffi::c_void;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr;

/// From this many pages on, moving the populated window is cheaper than mapping anew and faulting again.
const MOVE_FROM: u32 = 64;

/// The frames of one run, mapped as they will be in the region.
pub(crate) struct Window {
    base: *mut c_void,
    pages: u32,
    slot: Slot,
    access: ProtFlags,
    /// The store's descriptor; whoever made the window keeps it open for as long, and its glass with it.
    store: RawFd,
    /// Which pages moved over the region: their addresses here may belong to strangers by now.
    moved: [Cell<u64>; MAX_RUN / 64],
    place: Place,
}

/// Where a window is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a mapping of its own, which may move.
    Own,
    /// In a [`Pane`], whose addresses stay reserved: nothing moves out of it.
    Pane,
    /// A part of the [`Glass`].
    Glass,
}

/// The whole store, to look at. Children do not inherit it.
pub(crate) struct Glass {
    base: *mut c_void,
    bytes: usize,
}

impl Glass {
    /// Maps as many slots, from the first on.
    pub(crate) fn mount(store: BorrowedFd<'_>, slots: u32) -> Result<Glass, Errno> {
        let bytes = slots as usize * PAGE_SIZE;
        // SAFETY: fresh addresses of the kernel's choice, of a store that nobody truncates; the advice is about them alone.
        unsafe {
            let base = rustix::mm::mmap(ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, store, 0)?;
            let glass = Glass { base, bytes };
            rustix::mm::madvise(base, bytes, Advice::LinuxDontFork)?;
            Ok(glass)
        }
    }

    fn frame(&self, slot: Slot) -> *mut c_void {
        let offset = slot.0 as usize * PAGE_SIZE;
        assert!(offset < self.bytes, "{slot:?} in a glass of {} bytes", self.bytes);
        // SAFETY: inside the mapping.
        unsafe { self.base.byte_add(offset) }
    }
}

// SAFETY: addresses that it alone owns and that are only read; nothing in it is tied to a thread.
unsafe impl Send for Glass {}
// SAFETY: as above.
unsafe impl Sync for Glass {}

impl Drop for Glass {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no window outlives the borrow of the store that it was opened with.
        let _ = unsafe { rustix::mm::munmap(self.base, self.bytes) };
    }
}

/// Reserved addresses for the window of a whole extent, 2 MiB-aligned: only there can a huge frame be mapped as one.
pub struct Pane(Aligned);

impl Pane {
    /// Reserves the addresses.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn reserve() -> Result<Pane, SysError> {
        Ok(Pane(Aligned::reserve(EXTENT_SIZE)?))
    }
}

impl Window {
    /// Maps `pages` frames from `slot` on, with the protection they will have in a region of this kind, and populates them; a short
    /// run looks through the store's glass, if it is mounted.
    pub(crate) fn open(
        store: &StoreFile,
        slot: Slot,
        pages: u32,
        kind: Kind,
        pane: &mut Pane,
    ) -> Result<Window, SysError> {
        const WHAT: &str = "frames of the store";
        assert!(
            pages as usize <= MAX_RUN && slot != Slot::ZERO,
            "a window of {pages} pages at {slot:?}"
        );
        let end = slot.0.checked_add(pages).filter(|end| *end <= store.slots());
        if end.is_none() {
            return Err(SysError::Vetting {
                what: "run",
                reason: format!("{pages} frames from slot {} in a store of {}", slot.0, store.slots()),
            });
        }
        let access = match kind {
            Kind::Private => ProtFlags::READ | ProtFlags::WRITE,
            Kind::Shared => ProtFlags::READ,
        };
        let bytes = pages as usize * PAGE_SIZE;
        let offset = u64::from(slot.0) * PAGE_SIZE as u64;
        let fd = store.as_fd();
        let window = |base, place| Window {
            base,
            pages,
            slot,
            access,
            store: fd.as_raw_fd(),
            moved: [const { Cell::new(0) }; MAX_RUN / 64],
            place,
        };
        if pages < MOVE_FROM
            && let Some(glass) = store.glass()
        {
            return Ok(window(glass.frame(slot), Place::Glass));
        }
        let (place, start, flags) = if pages == EXTENT_PAGES && slot.0.is_multiple_of(EXTENT_PAGES) {
            (Place::Pane, pane.0.start(), MapFlags::PRIVATE | MapFlags::FIXED)
        } else {
            (Place::Own, ptr::null_mut(), MapFlags::PRIVATE)
        };
        // SAFETY: the pane is ours alone and as long as an extent, and the borrow of it keeps other windows out for as long as this
        // one is made and used by its only caller; else fresh addresses of the kernel's choice. A private mapping of a store that
        // nobody truncates.
        let base = unsafe { rustix::mm::mmap(start, bytes, access, flags, fd, offset) }
            .map_err(SysError::call("mmap", WHAT))?;
        let window = window(base, place);
        // SAFETY: our fresh mapping. A failure shows as a slower comparison, or as the SIGBUS of a store without memory, which
        // filling the frames has ruled out.
        let _ = unsafe { rustix::mm::madvise(base, bytes, Advice::LinuxPopulateRead) };
        Ok(window)
    }

    /// A frame to compare with. Only until it moved.
    pub(crate) fn page(&self, at: u32) -> *const u8 {
        assert!(
            at < self.pages && !self.has_moved(at),
            "page {at} of a window of {}",
            self.pages
        );
        // SAFETY: inside the mapping.
        unsafe { self.base.cast::<u8>().add(at as usize * PAGE_SIZE) }
    }

    fn has_moved(&self, at: u32) -> bool {
        self.moved[at as usize / 64].get() & 1 << (at % 64) != 0
    }

    /// Puts the frames from `at` on over a range of pages: long runs by moving this window, short ones and whole extents (huge
    /// pages do not move in halves, and one fault maps them) by a mapping of their own.
    ///
    /// # Safety
    /// The range belongs to a region whose words the caller owns, and what it shows may be replaced by these frames.
    pub(crate) unsafe fn map_over(&self, target: *mut c_void, bytes: usize, at: u32) -> Result<(), Errno> {
        let pages = (bytes / PAGE_SIZE) as u32;
        assert!(at + pages <= self.pages);
        let slot = self.slot.plus(at);
        let whole_extent =
            pages == EXTENT_PAGES && slot.0.is_multiple_of(EXTENT_PAGES) && target.addr().is_multiple_of(EXTENT_SIZE);
        if pages >= MOVE_FROM && self.place == Place::Own {
            // SAFETY: the source is this window's own mapping, not moved yet (each page is mapped over one target only); the target
            // is the caller's promise.
            let moved = unsafe {
                let source = self.base.byte_add(at as usize * PAGE_SIZE);
                rustix::mm::mremap_fixed(source, bytes, bytes, MremapFlags::MAYMOVE, target)
            };
            match moved {
                Ok(_) => {
                    for page in at..at + pages {
                        let word = &self.moved[page as usize / 64];
                        word.set(word.get() | 1 << (page % 64));
                    }
                    return Ok(());
                }
                Err(errno) if mapping::is_mapped(target, bytes) => return Err(errno),
                // The kernel had unmapped the target when it found that it could not go on. Its bytes are those of the frames.
                Err(_) => {}
            }
            // SAFETY: the caller's range, which has to be filled again whatever it takes.
            return mapping::insist(|| unsafe { self.map_anew(target, bytes, slot, whole_extent) });
        }
        // SAFETY: the caller's promise.
        mapping::map_whole(target, bytes, || unsafe {
            self.map_anew(target, bytes, slot, whole_extent)
        })
    }

    /// Maps frames of the store over a range.
    ///
    /// # Safety
    /// As for `map_over`.
    unsafe fn map_anew(&self, target: *mut c_void, bytes: usize, slot: Slot, whole_extent: bool) -> Result<(), Errno> {
        // SAFETY: the descriptor is open while the window lives; the target is the caller's promise.
        unsafe {
            let store = BorrowedFd::borrow_raw(self.store);
            let flags = MapFlags::PRIVATE | MapFlags::FIXED;
            let offset = u64::from(slot.0) * PAGE_SIZE as u64;
            rustix::mm::mmap(target, bytes, self.access, flags, store, offset)?;
            if whole_extent {
                // One fault, now, instead of one for the first reader.
                let _ = rustix::mm::madvise(target, bytes, Advice::LinuxPopulateRead);
            }
        }
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if self.place == Place::Glass {
            return;
        }
        if self.place == Place::Pane {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            // SAFETY: the pane's own addresses, reserved again. Should that fail, the next window replaces this one.
            let _ = unsafe { rustix::mm::mmap_anonymous(self.base, EXTENT_SIZE, ProtFlags::empty(), flags) };
            return;
        }
        let mut at = 0;
        while at < self.pages {
            let mut end = at;
            while end < self.pages && !self.has_moved(end) {
                end += 1;
            }
            if end > at {
                // SAFETY: pages of our mapping that never moved, so they are still ours.
                unsafe {
                    let start = self.base.byte_add(at as usize * PAGE_SIZE);
                    let _ = rustix::mm::munmap(start, (end - at) as usize * PAGE_SIZE);
                }
            }
            at = end + 1;
        }
    }
}
