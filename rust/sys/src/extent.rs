//! An extent of the store while it is written whole: one huge page, mapped for as long.
//!
//! Frames written by system calls go through the page cache one by one, twice: to be written, and to be read back and hashed. A
//! huge page takes one mapping and one fault, is copied to and hashed where it is, and each frame while the nearest cache still
//! has it. It relies on the broker being the only one that can write to its store. Never mapped longer than it takes, and never
//! an extent that has no memory yet.

use crate::aligned::Aligned;
use crate::bytes;
use crate::checksum::Checksummer;
use crate::error::{SysError, last_errno};
use crate::object::{EXTENT_PAGES, EXTENT_SIZE, PAGE_SIZE};
use crate::staging::StagingView;
use crate::store::{Store, WHAT, offset_of};
use crate::word::Slot;
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::BorrowedFd;

/// A huge page of the store, mapped writable until dropped.
pub struct Extent {
    place: Aligned,
    first: Slot,
}

impl Extent {
    /// Maps the extent of a store that starts at `first`, which has a page at least, and makes it one huge page.
    pub(crate) fn collapse(store: BorrowedFd<'_>, first: Slot) -> Result<Extent, SysError> {
        let place = Aligned::reserve(EXTENT_SIZE)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: addresses that nobody but `place` knows, as many as are mapped; it unmaps them.
        let collapsed = unsafe {
            rustix::mm::mmap(place.start(), EXTENT_SIZE, protection, flags, store, offset_of(first))
                .map_err(SysError::call("mmap", WHAT))?;
            let advice = linux_raw_sys::general::MADV_COLLAPSE as libc::c_int;
            libc::madvise(place.start(), EXTENT_SIZE, advice)
        };
        if collapsed == 0 {
            Ok(Extent { place, first })
        } else {
            let errno = last_errno();
            Err(SysError::Call {
                call: "madvise(MADV_COLLAPSE)",
                what: WHAT,
                errno,
            })
        }
    }

    /// Where these frames are in the mapping, if they are.
    fn offset(&self, slot: Slot, pages: u32) -> usize {
        let at = slot.0.wrapping_sub(self.first.0);
        assert!(
            at < EXTENT_PAGES && pages <= EXTENT_PAGES - at,
            "{slot:?}+{pages} is not in the extent at {:?}",
            self.first
        );
        at as usize * PAGE_SIZE
    }

    fn frames(&self, slot: Slot, pages: u32) -> &[[u8; PAGE_SIZE]] {
        let start = self.offset(slot, pages);
        // SAFETY: inside the mapping. The broker alone writes to its store, and this extent only through `&mut self`; a file of
        // fixed size, so no page of it is beyond the end.
        unsafe { core::slice::from_raw_parts(self.place.start().byte_add(start).cast(), pages as usize) }
    }

    fn frames_mut(&mut self, slot: Slot, pages: u32) -> &mut [[u8; PAGE_SIZE]] {
        let start = self.offset(slot, pages);
        // SAFETY: as above; any bytes make a frame.
        unsafe { core::slice::from_raw_parts_mut(self.place.start().byte_add(start).cast(), pages as usize) }
    }
}

/// Writes consecutive frames: through the mapping of their extent if they are one huge page, else by system calls.
pub struct Writer<'s> {
    store: &'s mut Store,
    extent: Option<Extent>,
}

impl Writer<'_> {
    pub(crate) fn new(store: &mut Store, extent: Option<Extent>) -> Writer<'_> {
        Writer { store, extent }
    }

    /// Fills frames with copies of consecutive staging pages.
    ///
    /// # Errors
    /// As [`Store::fill`].
    ///
    /// # Panics
    /// If there is an extent, and the frames are not in it; likewise below.
    pub fn fill(&mut self, slot: Slot, staging: &StagingView, first: u32, pages: u32) -> Result<(), SysError> {
        let Some(extent) = &mut self.extent else {
            return self.store.fill(slot, staging, first, pages);
        };
        let mut source = staging.pages_pointer(first, pages);
        for frame in extent.frames_mut(slot, pages) {
            // SAFETY: a page of the staging mapping, which is alive and cannot shrink; what its client gave back reads as zeros.
            // Whoever changes it meanwhile changes only what the frame will be, and the frame is hashed afterwards.
            unsafe {
                bytes::copy_out(source, frame);
                source = source.add(PAGE_SIZE);
            }
        }
        Ok(())
    }

    /// Copies frames of the store to consecutive slots from `to` on.
    ///
    /// # Errors
    /// As [`Store::copy`].
    pub fn copy(&mut self, from: &[Slot], to: Slot) -> Result<(), SysError> {
        match &mut self.extent {
            Some(extent) => {
                let frames = extent.frames_mut(to, from.len() as u32);
                self.store.read(from, frames.as_flattened_mut())
            }
            None => self.store.copy(from, to),
        }
    }

    /// The checksums of frames as they are in the store.
    ///
    /// # Errors
    /// As [`Store::hash`].
    pub fn hash(
        &mut self,
        slot: Slot,
        pages: u32,
        checksummer: &Checksummer,
        into: &mut Vec<u64>,
    ) -> Result<(), SysError> {
        match &self.extent {
            Some(extent) => {
                into.extend(extent.frames(slot, pages).iter().map(|frame| checksummer.page(frame)));
                Ok(())
            }
            None => self.store.hash(slot, pages, checksummer, into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::KEY_BYTES;
    use crate::staging::Staging;

    fn page_of(index: u32) -> [u8; PAGE_SIZE] {
        let mut page = [index as u8; PAGE_SIZE];
        page[..4].copy_from_slice(&(index + 1).to_le_bytes());
        page
    }

    #[test]
    fn a_whole_extent_is_the_same_huge_or_not() {
        let (staging, fd) = Staging::create().unwrap();
        let (view, checksummer) = (StagingView::open(&fd).unwrap(), Checksummer::new(&[3; KEY_BYTES]));
        (0..EXTENT_PAGES).for_each(|index| staging.write_page(index, &page_of(index)));
        let expected: Vec<u64> = (0..EXTENT_PAGES)
            .map(|index| checksummer.page(&page_of(index)))
            .collect();
        for huge in [true, false] {
            let mut store = Store::with_slots(4 * EXTENT_PAGES).unwrap();
            let made = |store: &Store, first| if huge { store.make_huge(first).ok() } else { None };
            let extent = made(&store, Slot(EXTENT_PAGES));
            if extent.is_some() {
                assert_eq!(store.allocated().unwrap(), EXTENT_SIZE as u64);
            }
            let mut writer = store.writer(extent);
            writer.fill(Slot(EXTENT_PAGES), &view, 0, 100).unwrap();
            writer
                .fill(Slot(EXTENT_PAGES + 100), &view, 100, EXTENT_PAGES - 100)
                .unwrap();
            let mut hashes = Vec::new();
            writer
                .hash(Slot(EXTENT_PAGES), EXTENT_PAGES, &checksummer, &mut hashes)
                .unwrap();
            assert_eq!(hashes, expected);
            drop(writer);
            // As whoever maps them sees them, and from there on to another extent, in another order.
            hashes.clear();
            store
                .hash(Slot(EXTENT_PAGES), EXTENT_PAGES, &checksummer, &mut hashes)
                .unwrap();
            assert_eq!(hashes, expected);
            let from: Vec<Slot> = (0..16).chain(20..24).rev().map(|at| Slot(EXTENT_PAGES + at)).collect();
            let extent = made(&store, Slot(0));
            let mut writer = store.writer(extent);
            writer.copy(&from, Slot(7)).unwrap();
            hashes.clear();
            writer.hash(Slot(7), 20, &checksummer, &mut hashes).unwrap();
            let copied: Vec<u64> = from
                .iter()
                .map(|slot| expected[(slot.0 - EXTENT_PAGES) as usize])
                .collect();
            assert_eq!(hashes, copied);
            drop(writer);
            store.punch(Slot(0), 2 * EXTENT_PAGES).unwrap();
            assert_eq!(store.allocated().unwrap(), 0);
        }
    }

    #[test]
    #[should_panic(expected = "is not in the extent")]
    fn frames_beside_the_extent_are_not_written() {
        let (_staging, fd) = Staging::create().unwrap();
        let view = StagingView::open(&fd).unwrap();
        let mut store = Store::with_slots(4 * EXTENT_PAGES).unwrap();
        let place = Aligned::reserve(EXTENT_SIZE).unwrap();
        let extent = Extent {
            place,
            first: Slot(EXTENT_PAGES),
        };
        let _ = store.writer(Some(extent)).fill(Slot(2 * EXTENT_PAGES - 1), &view, 0, 2);
    }
}
