//! Where a region's memory lies, and what the protocol does to it there.
//!
//! A [`View`] is a copyable description of the ranges that a [`Mapping`](super::Mapping) owns. Every call here takes pages of such a
//! region, never an address, and may be made by whoever owns the words of those pages and by nobody else. Raw system calls only: the
//! signal handler runs this.

use crate::bytes::PageBytes;
use crate::object::{EXTENT_SIZE, PAGE_SIZE};
use crate::protocol::{Access, Kind, Memory, Page, Span};
use crate::staging::Staging;
use crate::window::Window;
use crate::{ballast, bytes, careful, signal};
use core::ffi::c_void;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use std::ptr;

pub(super) const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Where a region's memory lies. Valid as long as the [`Mapping`] it came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub(super) base: usize,
    /// 0 for private regions.
    pub(super) home: usize,
    /// An area as long as the region to assemble plain memory in; 0 but while leaving.
    pub(super) scratch: usize,
    pub(super) pages: u32,
    pub(super) kind: Kind,
    /// Whether its own memory may be huge pages, which partial replacement must split first.
    pub(super) huge: bool,
    /// Whether its object may be cut short, so that mapped reads of it are not safe.
    pub(super) vanishing: bool,
    /// Whether nobody wants the bytes of pages that are made plain.
    pub(super) abandoned: bool,
    /// Which 2 MiB has no huge page any more, see [`View::extent_of`]; 0 where none is known.
    pub(super) split: usize,
}

impl View {
    pub(crate) fn base(&self) -> usize {
        self.base
    }

    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }

    /// The page that an address lies in.
    pub(crate) fn page_at(&self, address: usize) -> Option<Page> {
        let offset = address.checked_sub(self.base)? / PAGE_SIZE;
        (offset < self.pages as usize).then_some(Page(offset as u32))
    }

    /// The address of a span in the view, and its length in bytes.
    fn range(&self, span: Span) -> (*mut c_void, usize) {
        self.within(self.base, span)
    }

    fn home_range(&self, span: Span) -> (*mut c_void, usize) {
        debug_assert!(self.kind == Kind::Shared, "only shared regions have a home view");
        self.within(self.home, span)
    }

    fn within(&self, base: usize, span: Span) -> (*mut c_void, usize) {
        assert!(
            span.end().0 <= self.pages && base != 0,
            "{span:?} of a region of {} pages",
            self.pages
        );
        let start = base + span.first.0 as usize * PAGE_SIZE;
        (ptr::with_exposed_provenance_mut(start), span.pages as usize * PAGE_SIZE)
    }

    /// A page as the program sees it.
    pub(crate) fn page(&self, page: Page) -> *const u8 {
        self.range(Span::one(page)).0.cast()
    }

    /// Whether mapped reads of it might end in a SIGBUS: then `careful.rs` has to read it.
    pub(crate) fn is_vanishing(&self) -> bool {
        self.vanishing
    }

    /// Makes a range writable that reaches beyond the view, into regions that adjoin it.
    pub(crate) fn make_writable(&self, address: usize, bytes: usize) -> Result<(), Errno> {
        let start = ptr::with_exposed_provenance_mut(address);
        // SAFETY: pages of shared regions whose words the caller owns, all of which show frames or zeros privately, so that the kernel
        // copies what is written.
        unsafe { rustix::mm::mprotect(start, bytes, MprotectFlags::READ | MprotectFlags::WRITE) }
    }

    /// Copies a page out of the view, whatever is written meanwhile. Only for pages that are backed or may become so.
    pub(crate) fn copy_out(&self, page: Page, into: &mut [u8; PAGE_SIZE]) {
        debug_assert!(!self.vanishing, "this memory is to be read with care");
        // SAFETY: the page is inside the view, which is always mapped readable while the region lives, and its object can't shrink.
        unsafe { bytes::copy_out(self.page(page), into) }
    }

    /// Copies a page into the staging area, whatever is written meanwhile; false if it is there no more.
    pub(crate) fn stage(&self, page: Page, staging: &Staging, index: u32) -> bool {
        // SAFETY: as for `copy_out`, where it cannot vanish; the staging page is good for a page of writes, and never a region's.
        unsafe {
            if self.vanishing {
                return careful::copy_to(self.page(page), staging.page_pointer(index), PAGE_SIZE) == PAGE_SIZE;
            }
            bytes::copy_to(self.page(page), staging.page_pointer(index));
        }
        true
    }

    /// The same view with an area to assemble plain memory in.
    pub(super) fn with_scratch(self, scratch: usize) -> View {
        View { scratch, ..self }
    }

    /// The same view for pages whose bytes nobody wants: they are made plain by fresh memory.
    pub(crate) fn abandoned(self) -> View {
        View {
            abandoned: true,
            ..self
        }
    }

    /// Gives the memory of private pages back that are anonymous and out of the protocol: they read as zeros.
    pub(crate) fn discard(&self, span: Span) -> Result<(), Errno> {
        debug_assert!(self.kind == Kind::Private, "only arenas are discarded");
        let (start, bytes) = self.range(span);
        // SAFETY: pages of our view that show no frame and that nobody else touches; the caller wants their bytes no more.
        unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxDontNeed) }
    }

    /// Asks for huge pages where whole ones fit into private pages that have no memory yet.
    pub(crate) fn want_huge(&self, span: Span) {
        let (start, bytes) = self.range(span);
        let first = start.addr().next_multiple_of(EXTENT_SIZE);
        let end = (start.addr() + bytes) / EXTENT_SIZE * EXTENT_SIZE;
        if !self.huge || end <= first {
            return;
        }
        // SAFETY: pages of our view; the advice changes no byte. A kernel that declines gives small ones.
        let _ = unsafe { rustix::mm::madvise(start.with_addr(first), end - first, Advice::LinuxHugepage) };
    }

    /// Maps fresh memory over private pages.
    pub(crate) fn refresh(&self, span: Span) -> Result<(), Errno> {
        debug_assert!(self.kind == Kind::Private, "only arenas are abandoned");
        self.split_huge(span);
        let (start, bytes) = self.range(span);
        // SAFETY: pages of our view, owned by the caller (or out of the protocol in a process whose words they are not), who wants
        // their bytes no more.
        map_whole(start, bytes, || unsafe { map_anonymous(start, bytes, READ_WRITE) })
    }

    /// The same view where a 2 MiB is known to be of small pages.
    pub(crate) fn with_split(self, split: usize) -> View {
        View { split, ..self }
    }

    /// Which 2 MiB a page lies in, counted from address 0, where no page of a view is.
    pub(crate) fn extent_of(&self, page: Page) -> usize {
        self.page(page).addr() / EXTENT_SIZE
    }

    /// Whether no huge page can straddle the ends of the span.
    fn covers_whole_extents(&self, span: Span) -> bool {
        let (start, bytes) = self.range(span);
        (start.expose_provenance()).is_multiple_of(EXTENT_SIZE) && bytes.is_multiple_of(EXTENT_SIZE)
    }

    /// Whether the span may cover a part of a huge page.
    pub(crate) fn may_split(&self, span: Span) -> bool {
        self.huge && self.kind == Kind::Private && !self.covers_whole_extents(span)
    }

    /// Brings a span's page table entries in by the kernel's fault-around, 16 for one fault, where its home was just mapped. Its first
    /// and its last page have memory; what lies between may not, and gets none.
    fn fault_around(&self, span: Span) {
        let ends = if span.pages > 1 {
            [span.first, Page(span.end().0 - 1)]
        } else {
            return;
        };
        for page in ends {
            let (start, bytes) = self.range(Span::one(page));
            // SAFETY: our view; the advice changes no byte, and where the object was cut short it fails. Then the pages fault one by one.
            let _ = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxPopulateRead) };
        }
    }

    /// Splits huge pages that the span covers only in part: the kernel frees nothing of them otherwise.
    fn split_huge(&self, span: Span) {
        let last = Page(span.end().0 - 1);
        let split_already = [span.first, last].map(|page| self.extent_of(page)) == [self.split; 2];
        if self.may_split(span) && !split_already {
            let (start, bytes) = self.range(span);
            // SAFETY: our view; the advice changes no content. A kernel that declines frees the memory later.
            let _ = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxCold) };
        }
    }
}

/// Whether a page of the view, or a copy of one, holds the same bytes as page `at` of the window (`None`: as a page of zeros).
fn same(page: *const u8, window: Option<&Window>, at: u32) -> bool {
    // SAFETY: only called by `equals`, with a page of a view, which is mapped readable while the region lives, or with a copy; the
    // window is borrowed. Neither object shrinks.
    unsafe {
        match window {
            Some(window) => bytes::equal(page, window.page(at)),
            None => bytes::is_zero(page),
        }
    }
}

impl Memory for View {
    type Window = Window;

    fn kind(&self) -> Kind {
        self.kind
    }

    fn protect(&self, span: Span, access: Access) -> Result<(), Errno> {
        if self.abandoned && access == Access::ReadOnly {
            // What nobody wants need not stand still.
            return Ok(());
        }
        let (start, bytes) = self.range(span);
        let flags = match access {
            Access::ReadOnly => MprotectFlags::READ,
            Access::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        // SAFETY: pages of our view whose words the caller owns; both protections keep them readable, and a write that is refused
        // comes to our handler.
        unsafe { rustix::mm::mprotect(start, bytes, flags) }
    }

    fn equals(&self, page: Page, window: Option<&Window>, at: u32) -> bool {
        if !self.vanishing {
            return same(self.page(page), window, at);
        }
        let mut copy = PageBytes::ZEROS;
        careful::copy(self.page(page), &mut copy.0) == PAGE_SIZE && same(copy.0.as_ptr(), window, at)
    }

    fn map_frames(&self, span: Span, window: &Window, at: u32) -> Result<(), Errno> {
        self.split_huge(span);
        let (start, bytes) = self.range(span);
        // SAFETY: pages of our view whose words the caller owns and whose frozen bytes were found equal to the window's frames:
        // replacing the mapping changes nothing that anyone can read.
        unsafe { window.map_over(start, bytes, at) }
    }

    fn map_zero(&self, span: Span, plain: bool) -> Result<(), Errno> {
        self.split_huge(span);
        let (start, bytes) = self.range(span);
        if self.kind == Kind::Private && plain {
            // SAFETY: private anonymous pages, owned and frozen, all found to be zero: dropping them shows zeros again.
            unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxDontNeed) }?;
            // Should the thaw fail at the mapping limit, the merge of the run is off, and its pages are thawed as a whole: private
            // pages that are zero, as they were.
            return self.protect(span, Access::ReadWrite);
        }
        let access = if self.kind == Kind::Private {
            READ_WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: pages of our view, owned and frozen, all found to be zero; fresh anonymous memory reads as zeros.
        map_whole(start, bytes, || unsafe { map_anonymous(start, bytes, access) })
    }

    fn fill_home(&self, span: Span) -> Result<(), Errno> {
        let (home, bytes) = self.home_range(span);
        let (view, _) = self.range(span);
        // SAFETY: the home view is ours, mapped writable, and these home pages are holes (or copies nobody looks at) while the
        // caller owns the words. The view shows frames or detached copies that nobody writes meanwhile (all of the pages are
        // read-only), so a plain copy is sound. Populating first turns a full object into an error instead of a SIGBUS.
        let fill = |at: usize, bytes: usize| unsafe {
            let (home, view) = (home.byte_add(at), view.byte_add(at));
            rustix::mm::madvise(home, bytes, Advice::LinuxPopulateWrite)?;
            ptr::copy_nonoverlapping(view.cast::<u8>().cast_const(), home.cast::<u8>(), bytes);
            Ok(())
        };
        let filled = fill(0, bytes);
        if filled.is_err() {
            // Some of them may have memory now. Whoever writes frames back takes a page that is there for the object's own, newer than
            // its frame: so none is left behind that is not complete.
            let _ = (0..bytes).step_by(PAGE_SIZE).try_for_each(|at| fill(at, PAGE_SIZE));
        }
        filled
    }

    fn map_home(&self, span: Span) -> Result<(), Errno> {
        let (home, bytes) = self.home_range(span);
        let (view, _) = self.range(span);
        // SAFETY: an old length of 0 maps the shared object's same pages a second time, over pages of our view that the caller owns.
        let map = || unsafe { rustix::mm::mremap_fixed(home, 0, bytes, MremapFlags::MAYMOVE, view) }.map(|_| ());
        map_whole(view, bytes, map)?;
        self.fault_around(span);
        Ok(())
    }

    fn punch_home(&self, span: Span) -> Result<(), Errno> {
        let (home, bytes) = self.home_range(span);
        // SAFETY: home pages that no view shows any more (their words are owned and the frames are mapped): nobody reads them.
        unsafe { rustix::mm::madvise(home, bytes, Advice::LinuxRemove) }?;
        if !self.vanishing {
            return Ok(());
        }
        // Of a huge page that somebody refers to (a pipe, a debugger) the kernel only writes zeros to that part, which is still there. What
        // is there has to be complete.
        careful::residency(home, span.pages, |at, resident| {
            if resident {
                let from = self.page(span.first.plus(at));
                // SAFETY: a home page of the span, as above; an object that was cut short is the kernel's to find.
                let _ = unsafe { careful::copy_to(from, home.byte_add(at as usize * PAGE_SIZE).cast(), PAGE_SIZE) };
            }
        })
    }

    fn copy_own(&self, span: Span) -> Result<(), Errno> {
        let (start, bytes) = self.range(span);
        // SAFETY: private mappings of frames, writable: the kernel copies each page, as a write would, and changes no byte.
        unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxPopulateWrite) }
    }

    fn make_plain(&self, span: Span) -> Result<(), Errno> {
        if self.abandoned {
            return self.refresh(span);
        }
        let (scratch, bytes) = self.within(self.scratch, span);
        let (view, _) = self.range(span);
        // SAFETY: the scratch area is ours and as long as the region; the caller owns the words of the span and made it read-only,
        // so the source stands still. DONTUNMAP leaves the scratch range mapped (and empty), so no stranger can move in before
        // the whole area is unmapped.
        unsafe {
            rustix::mm::madvise(scratch, bytes, Advice::LinuxPopulateWrite)?;
            ptr::copy_nonoverlapping(view.cast::<u8>().cast_const(), scratch.cast::<u8>(), bytes);
            let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
            match rustix::mm::mremap_fixed(scratch, bytes, bytes, flags, view) {
                Err(errno) if is_mapped(view, bytes) => return Err(errno),
                // The kernel had unmapped the view when it found that it could not go on: the only copy is in the scratch area.
                Err(_) => {
                    insist(|| map_anonymous(view, bytes, READ_WRITE))?;
                    ptr::copy_nonoverlapping(scratch.cast::<u8>().cast_const(), view.cast::<u8>(), bytes);
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }
}

/// Whether every page of a range is mapped.
pub(crate) fn is_mapped(start: *mut c_void, bytes: usize) -> bool {
    careful::residency(start, (bytes / PAGE_SIZE) as u32, |_, _| {}).is_ok()
}

/// Tries until it works: for ranges that must not stay unmapped, where waiting for room beats losing bytes.
pub(crate) fn insist(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    while call().is_err() {
        if !ballast::give_up() {
            signal::nap();
        }
    }
    Ok(())
}

/// Maps something over a range. Where the kernel had unmapped the range when it found that it could not go on (`mremap`; `mmap` before
/// Linux 6.12), it is tried until it works.
pub(crate) fn map_whole(
    start: *mut c_void,
    bytes: usize,
    mut map: impl FnMut() -> Result<(), Errno>,
) -> Result<(), Errno> {
    match map() {
        Err(_) if !is_mapped(start, bytes) => insist(map),
        answer => answer,
    }
}

/// Maps fresh private anonymous memory over a range.
///
/// # Safety
/// The range is ours and whatever it held may be forgotten.
pub(super) unsafe fn map_anonymous(start: *mut c_void, bytes: usize, access: ProtFlags) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { rustix::mm::mmap_anonymous(start, bytes, access, MapFlags::PRIVATE | MapFlags::FIXED) }.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failed_call_had_unmapped_is_mapped_in_the_end() {
        let bytes = 4 * PAGE_SIZE;
        // Far below where the kernel maps what other tests ask for: the hole stays one.
        let place = ptr::with_exposed_provenance_mut(1 << 44);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: fresh memory of the test's own, where nothing is.
        let start = unsafe { rustix::mm::mmap_anonymous(place, bytes, READ_WRITE, flags) }.unwrap();
        let mut calls = 0;
        let failed = map_whole(start, bytes, || {
            calls += 1;
            Err(Errno::NOMEM)
        });
        assert_eq!((failed, calls), (Err(Errno::NOMEM), 1), "nothing was lost");
        let done = map_whole(start, bytes, || {
            calls += 1;
            // SAFETY: the test's own memory, of which the first call leaves only the first page.
            unsafe {
                if calls < 5 {
                    rustix::mm::munmap(start.byte_add(PAGE_SIZE), bytes - PAGE_SIZE)?;
                    return Err(Errno::NOMEM);
                }
                map_anonymous(start, bytes, READ_WRITE)
            }
        });
        assert_eq!((done, calls, is_mapped(start, bytes)), (Ok(()), 5, true));
        // SAFETY: mapped just above.
        unsafe { rustix::mm::munmap(start, bytes) }.unwrap();
    }
}
