//! The memory of regions: the only place that maps at chosen addresses.
//!
//! A [`Mapping`] owns the address ranges of one region (the view that the program uses and, for shared memory, the home view);
//! a [`View`] is a copyable description of them on which the protocol acts. Every call here takes pages of such a region, never
//! an address, and may be made by whoever owns the words of those pages and by nobody else. Raw system calls only: the signal
//! handler runs this.
//!
//! ```text
//!   view   [ own ][ own ][ frame 7 ][ frame 8 ][ own ]      what the program reads and writes, 2 MiB-aligned
//!   home   [ own ][ own ][  hole   ][  hole   ][ own ]      shared regions: the object, never remapped, never protected
//! ```

use crate::aligned::Aligned;
use crate::bytes::PageBytes;
use crate::error::SysError;
use crate::foreign::{Advised, Foreign, Object};
use crate::object::{self, EXTENT_SIZE, PAGE_SIZE};
use crate::protocol::{Access, Kind, Memory, Page, Span};
use crate::sharers::ObjectId;
use crate::staging::Staging;
use crate::window::Window;
use crate::{ballast, bytes, careful, signal};
use core::ffi::c_void;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Where a region's memory lies. Valid as long as the [`Mapping`] it came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    base: usize,
    /// 0 for private regions.
    home: usize,
    /// An area as long as the region to assemble plain memory in; 0 but while leaving.
    scratch: usize,
    pages: u32,
    kind: Kind,
    /// Whether its own memory may be huge pages, which partial replacement must split first.
    huge: bool,
    /// Whether its object may be cut short, so that mapped reads of it are not safe.
    vanishing: bool,
    /// Whether nobody wants the bytes of pages that are made plain.
    abandoned: bool,
    /// Which 2 MiB has no huge page any more, see [`View::extent_of`]; 0 where none is known.
    split: usize,
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
    fn with_scratch(self, scratch: usize) -> View {
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

    /// Maps fresh memory over private pages.
    pub(crate) fn refresh(&self, span: Span) -> Result<(), Errno> {
        debug_assert!(self.kind == Kind::Private, "only arenas are abandoned");
        self.split_huge(span);
        let (start, bytes) = self.range(span);
        // SAFETY: pages of our view, owned by the caller (or out of the protocol in a process whose words they are not), who wants
        // their bytes no more.
        let map = || unsafe { map_anonymous(start, bytes, READ_WRITE) };
        match map() {
            Err(_) if !is_mapped(start, bytes) => insist(map),
            answer => answer,
        }
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
        unsafe { map_anonymous(start, bytes, access) }
    }

    fn fill_home(&self, span: Span) -> Result<(), Errno> {
        let (home, bytes) = self.home_range(span);
        let (view, _) = self.range(span);
        // SAFETY: the home view is ours, mapped writable, and these home pages are holes (or copies nobody looks at) while the
        // caller owns the words. The view shows frames or detached copies that nobody writes meanwhile (all of the pages are
        // read-only), so a plain copy is sound. Populating first turns a full object into an error instead of a SIGBUS.
        unsafe {
            rustix::mm::madvise(home, bytes, Advice::LinuxPopulateWrite)?;
            ptr::copy_nonoverlapping(view.cast::<u8>().cast_const(), home.cast::<u8>(), bytes);
        }
        Ok(())
    }

    fn map_home(&self, span: Span) -> Result<(), Errno> {
        let (home, bytes) = self.home_range(span);
        let (view, _) = self.range(span);
        // SAFETY: an old length of 0 maps the shared object's same pages a second time, over pages of our view that the caller owns.
        let map = || unsafe { rustix::mm::mremap_fixed(home, 0, bytes, MremapFlags::MAYMOVE, view) }.map(|_| ());
        match map() {
            Err(_) if !is_mapped(view, bytes) => insist(map),
            answer => answer,
        }
    }

    fn punch_home(&self, span: Span) -> Result<(), Errno> {
        let (home, bytes) = self.home_range(span);
        // SAFETY: home pages that no view shows any more (their words are owned and the frames are mapped): nobody reads them.
        unsafe { rustix::mm::madvise(home, bytes, Advice::LinuxRemove) }
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

/// Maps a shared range's object a second time, where the kernel likes: an old length of 0 asks for that.
fn map_home_of(view: usize, bytes: usize) -> Result<usize, SysError> {
    let view = ptr::with_exposed_provenance_mut(view);
    // SAFETY: nothing that is mapped is touched: the kernel chooses fresh addresses.
    let home = unsafe { rustix::mm::mremap(view, 0, bytes, MremapFlags::MAYMOVE) };
    home.map(|home| home.expose_provenance())
        .map_err(SysError::call("mremap", "home view"))
}

/// Maps fresh private anonymous memory over a range.
///
/// # Safety
/// The range is ours and whatever it held may be forgotten.
unsafe fn map_anonymous(start: *mut c_void, bytes: usize, access: ProtFlags) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { rustix::mm::mmap_anonymous(start, bytes, access, MapFlags::PRIVATE | MapFlags::FIXED) }.map(|_| ())
}

/// The address ranges of one region, unmapped by whoever closes it.
#[derive(Debug)]
pub(crate) struct Mapping {
    view: View,
    /// How adopted memory was advised; `None` for memory of our own making.
    advised: Option<Vec<Advised>>,
    /// The object of shared memory that may live on after the region.
    object: Option<Object>,
}

impl Mapping {
    /// Fresh zeroed memory for a region, 2 MiB-aligned. Shared memory is reserved now.
    ///
    /// # Errors
    /// ENOMEM or, for shared memory that the machine cannot hold, ENOSPC.
    pub(crate) fn create(pages: u32, kind: Kind) -> Result<Mapping, SysError> {
        const WHAT: &str = "region";
        let bytes = pages as usize * PAGE_SIZE;
        let object = match kind {
            Kind::Private => None,
            Kind::Shared => {
                let object = object::create("ksmrs-region", bytes as u64)?;
                object::reserve(&object, WHAT, 0..bytes as u64)?;
                object::seal_size(&object, WHAT)?;
                Some(object)
            }
        };
        Mapping::over(pages, object.as_ref().map(AsFd::as_fd), None)
    }

    /// Memory of an object that has a name, or whatever else may live on after the region; the descriptor is needed no more.
    ///
    /// # Errors
    /// ENOMEM, or ENOSPC where its file system cannot hold it.
    pub(crate) fn named(pages: u32, object: BorrowedFd<'_>) -> Result<Mapping, SysError> {
        const WHAT: &str = "named region";
        object::reserve(object, WHAT, 0..u64::from(pages) * PAGE_SIZE as u64)?;
        let lasting = Object {
            id: ObjectId::of(object)?,
            offset: 0,
            opens: true,
        };
        Mapping::over(pages, Some(object), Some(lasting))
    }

    /// Maps fresh private memory, or an object, where huge pages fit.
    fn over(pages: u32, object: Option<BorrowedFd<'_>>, lasting: Option<Object>) -> Result<Mapping, SysError> {
        let bytes = pages as usize * PAGE_SIZE;
        let mut area = Aligned::reserve(bytes)?;
        let start = area.start();
        // SAFETY: the range was reserved just above, with no access, and is ours alone.
        let mapped = unsafe {
            match object {
                None => rustix::mm::mmap_anonymous(start, bytes, READ_WRITE, MapFlags::PRIVATE | MapFlags::FIXED),
                Some(object) => {
                    rustix::mm::mmap(start, bytes, READ_WRITE, MapFlags::SHARED | MapFlags::FIXED, object, 0)
                }
            }
        };
        mapped.map_err(SysError::call("mmap", "region"))?;
        let mut view = View {
            base: start.expose_provenance(),
            home: 0,
            scratch: 0,
            pages,
            kind: if object.is_some() { Kind::Shared } else { Kind::Private },
            huge: object.is_none() && transparent_huge_pages_always(),
            vanishing: lasting.is_some(),
            abandoned: false,
            split: 0,
        };
        if object.is_some() {
            view.home = map_home_of(view.base, bytes)?;
            // SAFETY: just mapped, ours; the advice only keeps the same bytes from being dumped twice.
            let _ = unsafe {
                let home = ptr::with_exposed_provenance_mut(view.home);
                rustix::mm::madvise(home, bytes, Advice::LinuxDontDump)
            };
        }
        area.keep();
        Ok(Mapping {
            view,
            advised: None,
            object: lasting,
        })
    }

    /// Takes charge of memory that the program made. Nothing of it is changed yet.
    ///
    /// # Errors
    /// No room for the home view of shared memory.
    pub(crate) fn adopt(foreign: Foreign) -> Result<Mapping, SysError> {
        let Foreign {
            address,
            pages,
            advised,
            huge,
            object,
        } = foreign;
        let home = match object {
            Some(_) => map_home_of(address, pages as usize * PAGE_SIZE)?,
            None => 0,
        };
        let view = View {
            base: address,
            home,
            scratch: 0,
            pages,
            kind: if object.is_some() { Kind::Shared } else { Kind::Private },
            huge: object.is_none() && (huge || transparent_huge_pages_always()),
            vanishing: object.is_some(),
            abandoned: false,
            split: 0,
        };
        Ok(Mapping {
            view,
            advised: Some(advised),
            object,
        })
    }

    /// The object of shared memory that may live on after the region.
    pub(crate) fn object(&self) -> Option<Object> {
        self.object
    }

    /// Whether the memory is the program's own, to be given back and never unmapped.
    pub(crate) fn is_adopted(&self) -> bool {
        self.advised.is_some()
    }

    /// Gives adopted memory its advice again, for what was mapped anew in it; `base` is the region's address or that of an area as long.
    fn advise_again(&self, base: usize) {
        for Advised { bytes, advice } in self.advised.iter().flatten() {
            let start = ptr::with_exposed_provenance_mut::<c_void>(base + bytes.start);
            // SAFETY: a range of the region or of its scratch area; such advice changes no byte. A kernel that declines (no huge
            // pages, say) declined the first time too.
            let _ = unsafe { rustix::mm::madvise(start, bytes.len(), *advice) };
        }
    }

    /// Gives adopted memory back as its owner made it: it has left, and every page is plain.
    pub(crate) fn give_back(&self) {
        self.advise_again(self.view.base);
        self.unmap_home();
    }

    /// Unmaps the home view of adopted memory; once only, when all its pages are at home.
    fn unmap_home(&self) {
        if self.view.home != 0 {
            let home = ptr::with_exposed_provenance_mut(self.view.home);
            // SAFETY: mapped by `adopt` and ours; its region reaches it no more.
            let _ = unsafe { rustix::mm::munmap(home, self.view.bytes()) };
        }
    }

    /// Maps fresh memory over all of an adopted region that its owner is about to free.
    pub(crate) fn abandon(&self) {
        let (start, bytes) = (ptr::with_exposed_provenance_mut(self.view.base), self.view.bytes());
        const TRIES: u32 = 100;
        for _ in 0..TRIES {
            // SAFETY: the region's whole range, which its owner keeps mapped, and whose contents nobody wants any more; all its words
            // are owned. Whole, so that at the mapping limit no mapping is split but those at the ends.
            if unsafe { map_anonymous(start, bytes, READ_WRITE) }.is_ok() {
                break;
            }
            if !ballast::give_up() {
                signal::nap();
            }
        }
        self.give_back();
    }

    /// The description that the protocol acts on.
    pub(crate) fn view(&self) -> View {
        self.view
    }

    /// Unmaps everything. Once only, when no thread uses the memory any more: the addresses may be a stranger's at once.
    pub(crate) fn unmap(&self) {
        for base in [self.view.base, self.view.home].into_iter().filter(|base| *base != 0) {
            // SAFETY: ranges that this mapping made; its region calls this once, when it is closed, and reaches them no more.
            let _ = unsafe { rustix::mm::munmap(ptr::with_exposed_provenance_mut(base), self.view.bytes()) };
        }
    }

    /// Runs `leave` on a view that can assemble plain memory, and gives back the area it used for that. The area lies as the region
    /// does within 2 MiB, so that huge pages made in it move as such.
    pub(crate) fn with_scratch<T>(&self, leave: impl FnOnce(View) -> Result<T, Errno>) -> Result<T, Errno> {
        if self.view.kind == Kind::Shared {
            return leave(self.view);
        }
        let position = self.view.base % EXTENT_SIZE;
        let bytes = self.view.bytes() + position;
        let area = Aligned::reserve(bytes).map_err(|_| Errno::NOMEM)?;
        // SAFETY: the range reserved just above. Accounted, as what it replaces was, unless the kernel has not so much to promise:
        // only as much of it is used as gets moved over the region.
        let map = |flags: MapFlags| unsafe {
            let flags = flags | MapFlags::PRIVATE | MapFlags::FIXED;
            rustix::mm::mmap_anonymous(area.start(), bytes, READ_WRITE, flags)
        };
        let scratch = map(MapFlags::empty()).or_else(|_| map(MapFlags::NORESERVE))?;
        let scratch = scratch.expose_provenance() + position;
        self.advise_again(scratch);
        // What was moved out of the area left its range mapped (DONTUNMAP), so all of it is still ours when it is dropped.
        leave(self.view.with_scratch(scratch))
    }
}

/// Whether the kernel gives huge pages to memory that did not ask.
fn transparent_huge_pages_always() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok_and(|text| text.contains("[always]"))
}
