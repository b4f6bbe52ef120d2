//! Which pages of a mapping have memory of their own, asked from the kernel.
//!
//! PAGEMAP_SCAN (Linux 6.7) answers for thousands of pages in one call; older kernels are asked page by page through the same
//! file. A process that is not dumpable may not open it at all: then nobody knows, and the caller compares checksums instead.
//! The same call tells which pages were written since they were armed (`tracking.rs`), and arms them. What is learned here proves two
//! things and nothing else: that the kernel copied a page, and that an armed page of private memory was not written through its mapping.

use crate::error::{SysError, last_errno};
use crate::mapping::View;
use crate::object::PAGE_SIZE;
use crate::protocol::{Kind, Memory, Page, Span};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};
use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};

/// `_IOWR('f', 16, struct pm_scan_arg)`, which the C headers of older systems lack.
const PAGEMAP_SCAN: libc::Ioctl = {
    const READ_WRITE: u64 = 3;
    (READ_WRITE << 30 | (size_of::<raw::pm_scan_arg>() as u64) << 16 | (b'f' as u64) << 8 | 16) as libc::Ioctl
};

/// A span's pages, one bit each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    /// Empties the set and makes room for this many pages.
    pub(crate) fn reset(&mut self, pages: u32) {
        self.0.clear();
        self.0.resize(pages.div_ceil(64) as usize, 0);
    }

    pub(crate) fn set(&mut self, at: u32) {
        self.0[at as usize / 64] |= 1 << (at % 64);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|bits| *bits == 0)
    }

    /// Whether the page, counted from the span's first, is in the set.
    pub(crate) fn has(&self, at: u32) -> bool {
        self.0[at as usize / 64] & 1 << (at % 64) != 0
    }
}

/// Which pages a walk is after, by PAGEMAP_SCAN's categories, and what it does with them.
#[derive(Default)]
struct Ask {
    all_of: u32,
    any_of: u32,
    none_of: u32,
    /// The categories to be told of each.
    tell: u32,
    flags: u32,
}

/// Pages that have memory of their own.
#[derive(Default)]
pub(crate) struct Owned {
    /// All of them.
    pub(crate) pages: Bits,
    /// Those of which that is in swap.
    pub(crate) swapped: Bits,
}

impl Owned {
    /// None of so many.
    pub(crate) fn reset(&mut self, pages: u32) {
        self.pages.reset(pages);
        self.swapped.reset(pages);
    }

    fn set(&mut self, page: u32, swapped: bool) {
        self.pages.set(page);
        if swapped {
            self.swapped.set(page);
        }
    }
}

/// This process's pagemap, opened by the thread that uses it.
pub struct Pagemap {
    fd: OwnedFd,
    /// Whether PAGEMAP_SCAN works here.
    scans: AtomicBool,
}

impl Pagemap {
    /// Opens it. In a thread with a descriptor table of its own; a child must open its own, for this one describes its parent.
    ///
    /// # Errors
    /// EACCES in a process that is not dumpable.
    pub fn open() -> Result<Pagemap, SysError> {
        let fd = rustix::fs::open(
            "/proc/thread-self/pagemap",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(SysError::call("open", "/proc/thread-self/pagemap"))?;
        Ok(Pagemap {
            fd,
            scans: AtomicBool::new(true),
        })
    }

    /// Adds the pages of a span of the view that have anonymous memory of their own, in RAM or in swap, to a set of pages counted
    /// from `from`; the shared page of zeros does not count. Where `no_frames` may be shown, all memory is anonymous.
    pub(crate) fn own_memory(
        &self,
        view: &View,
        span: Span,
        no_frames: bool,
        from: Page,
        found: &mut Owned,
    ) -> Result<(), SysError> {
        if self.scans.load(Ordering::Relaxed) {
            match self.scan(view, span, no_frames, from, found) {
                Err(Errno::NOTTY | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                    self.scans.store(false, Ordering::Relaxed)
                }
                answer => return answer.map_err(SysError::call("ioctl(PAGEMAP_SCAN)", "pagemap")),
            }
        }
        self.read(view, span, from, found)
            .map_err(SysError::call("pread", "pagemap"))
    }

    /// Finds the pages of a span that are not armed (`tracking.rs`), or were written since they were, as far as a quick look tells: where
    /// there is no page table it finds none, and what is being swapped or moved may pass for armed. For who reads pages again, not
    /// for who takes it as proof.
    pub(crate) fn written(&self, view: &View, span: Span, found: &mut Bits) -> Result<(), SysError> {
        found.reset(span.pages);
        // Nothing but this one category, both ways: the kernel then looks at nothing but the page table's entries, 5 ns a page
        // instead of 40.
        let written = Ask {
            all_of: raw::PAGE_IS_WRITTEN,
            tell: raw::PAGE_IS_WRITTEN,
            ..Ask::default()
        };
        self.walk(view, span, written, |pages, _| pages.for_each(|page| found.set(page)))
            .map_err(SysError::call("ioctl(PAGEMAP_SCAN)", "pagemap"))
    }

    /// Finds the pages of a span that are armed: registered, with memory, and neither written through this mapping nor given back since.
    ///
    /// # Errors
    /// The kernel's errno.
    pub(crate) fn armed(&self, view: &View, span: Span, found: &mut Bits) -> Result<(), SysError> {
        found.reset(span.pages);
        let armed = Ask {
            all_of: raw::PAGE_IS_WPALLOWED,
            any_of: raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED,
            none_of: raw::PAGE_IS_WRITTEN,
            tell: raw::PAGE_IS_WPALLOWED,
            ..Ask::default()
        };
        self.walk(view, span, armed, |pages, _| pages.for_each(|page| found.set(page)))
            .map_err(SysError::call("ioctl(PAGEMAP_SCAN)", "pagemap"))
    }

    /// Arms the pages of a span that are registered, in RAM and not armed: from now on they are unwritten until they are
    /// written. Adds them to a set of pages counted from `from`. Never a huge page, which would be split by its first write, and in
    /// private memory none that shows a frame.
    ///
    /// # Errors
    /// Then any of them may have been armed.
    pub(crate) fn arm(&self, view: &View, span: Span, from: Page, armed: &mut Bits) -> Result<(), SysError> {
        let not_ours = match view.kind() {
            Kind::Private => raw::PAGE_IS_FILE,
            Kind::Shared => 0,
        };
        let arm = Ask {
            // What is not in RAM is not read, and a page without memory would get a marker that passes for swapped-out memory.
            all_of: raw::PAGE_IS_WPALLOWED | raw::PAGE_IS_WRITTEN | raw::PAGE_IS_PRESENT,
            none_of: raw::PAGE_IS_HUGE | raw::PAGE_IS_PFNZERO | not_ours,
            tell: raw::PAGE_IS_WRITTEN,
            flags: raw::PM_SCAN_WP_MATCHING,
            ..Ask::default()
        };
        let offset = span.first.0 - from.0;
        self.walk(view, span, arm, |pages, _| {
            pages.for_each(|page| armed.set(offset + page))
        })
        .map_err(SysError::call("ioctl(PAGEMAP_SCAN)", "pagemap"))
    }

    /// Whether a huge page maps any of the span's memory.
    ///
    /// # Errors
    /// ENOTTY or EINVAL from kernels that cannot tell (before Linux 6.7).
    pub(crate) fn any_huge(&self, view: &View, span: Span) -> Result<bool, SysError> {
        let mut any = false;
        let huge = Ask {
            all_of: raw::PAGE_IS_HUGE,
            tell: raw::PAGE_IS_HUGE,
            ..Ask::default()
        };
        self.walk(view, span, huge, |_, _| any = true)
            .map_err(SysError::call("ioctl(PAGEMAP_SCAN)", "pagemap"))?;
        Ok(any)
    }

    fn scan(&self, view: &View, span: Span, no_frames: bool, from: Page, found: &mut Owned) -> Result<(), Errno> {
        let own = Ask {
            any_of: raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED,
            // To tell, the kernel has to look at each page's own record, which takes longer than all the rest.
            none_of: if no_frames { 0 } else { raw::PAGE_IS_FILE },
            tell: raw::PAGE_IS_PFNZERO | raw::PAGE_IS_SWAPPED,
            ..Ask::default()
        };
        let offset = span.first.0 - from.0;
        self.walk(view, span, own, |pages, categories| {
            let is = |category: u32| categories & u64::from(category) != 0;
            if !is(raw::PAGE_IS_PFNZERO) {
                pages.for_each(|page| found.set(offset + page, is(raw::PAGE_IS_SWAPPED)));
            }
        })
    }

    /// Tells `found` the stretches of pages, counted from the span's first, that match, with their categories.
    fn walk(&self, view: &View, span: Span, ask: Ask, mut found: impl FnMut(Range<u32>, u64)) -> Result<(), Errno> {
        const REGIONS: usize = 128;
        let mut regions = [raw::page_region {
            start: 0,
            end: 0,
            categories: 0,
        }; REGIONS];
        let base = view.page(span.first) as u64;
        let end = base + u64::from(span.pages) * PAGE_SIZE as u64;
        let page = |address: u64| ((address - base) / PAGE_SIZE as u64) as u32;
        let mut start = base;
        while start < end {
            let mut argument = raw::pm_scan_arg {
                size: size_of::<raw::pm_scan_arg>() as u64,
                flags: ask.flags.into(),
                start,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                max_pages: 0,
                category_inverted: ask.none_of.into(),
                category_mask: (ask.all_of | ask.none_of).into(),
                category_anyof_mask: ask.any_of.into(),
                return_mask: ask.tell.into(),
            };
            // SAFETY: the argument and the array it names live through the call, which writes at most vec_len entries. It changes no
            // byte and no protection: arming costs the next write of a page a fault that the kernel resolves by itself.
            let answer = unsafe { libc::ioctl(self.fd.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            if answer < 0 {
                let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
                return Err(Errno::from_raw_os_error(errno));
            }
            for region in &regions[..answer as usize] {
                found(page(region.start)..page(region.end), region.categories);
            }
            if argument.walk_end <= start {
                return Err(Errno::INVAL);
            }
            start = argument.walk_end;
        }
        Ok(())
    }

    /// The older way: an entry of 8 bytes a page. It cannot tell the page of zeros from memory of one's own.
    fn read(&self, view: &View, span: Span, from: Page, found: &mut Owned) -> Result<(), Errno> {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const FILE: u64 = 1 << 61;
        let mut entries = [0u8; 8 * 512];
        let mut at = 0;
        while at < span.pages {
            let ask = (span.pages - at).min(512) as usize * 8;
            let offset = (view.page(Page(span.first.0 + at)) as u64 / PAGE_SIZE as u64) * 8;
            let read = rustix::io::pread(&self.fd, &mut entries[..ask], offset)?;
            if read == 0 || !read.is_multiple_of(8) {
                return Err(Errno::IO);
            }
            for entry in entries[..read].as_chunks::<8>().0 {
                let entry = u64::from_ne_bytes(*entry);
                if entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0 {
                    found.set(span.first.0 - from.0 + at, entry & SWAPPED != 0);
                }
                at += 1;
            }
        }
        Ok(())
    }
}

/// The first page in RAM of a range of a process's pages, by its pagemap; `None` if there is none. `Err` where the kernel cannot tell
/// (before 6.7).
pub(crate) fn first_present(pagemap: &OwnedFd, pages: Range<u64>) -> Result<Option<u64>, Errno> {
    let mut region = raw::page_region {
        start: 0,
        end: 0,
        categories: 0,
    };
    let mut argument = raw::pm_scan_arg {
        size: size_of::<raw::pm_scan_arg>() as u64,
        flags: 0,
        start: pages.start * PAGE_SIZE as u64,
        end: pages.end * PAGE_SIZE as u64,
        walk_end: 0,
        vec: &raw mut region as u64,
        vec_len: 1,
        max_pages: 1,
        category_inverted: 0,
        category_mask: raw::PAGE_IS_PRESENT.into(),
        category_anyof_mask: 0,
        return_mask: raw::PAGE_IS_PRESENT.into(),
    };
    // SAFETY: the argument and the one entry it names live through the call, which arms and changes nothing.
    match unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) } {
        0 => Ok(None),
        found if found > 0 => Ok(Some(region.start / PAGE_SIZE as u64)),
        _ => Err(last_errno()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use rustix::mm::Advice;

    #[test]
    fn both_ways_find_the_same_pages() {
        let mapping = Mapping::create(1200, Kind::Private).unwrap();
        let view = mapping.view();
        // SAFETY: the mapping made above; the advice changes no byte. A huge page would bring 512 pages with the one written.
        unsafe {
            rustix::mm::madvise(
                view.page(Page(0)).cast_mut().cast(),
                1200 * PAGE_SIZE,
                Advice::LinuxNoHugepage,
            )
        }
        .unwrap();
        for page in [0, 1, 63, 64, 511, 512, 700, 1199] {
            // SAFETY: a page of the mapping made above, which nobody else knows.
            unsafe { view.page(Page(page)).cast_mut().write_volatile(1) };
        }
        let pagemap = Pagemap::open().unwrap();
        for (first, pages) in [(0, 1200), (1, 63), (512, 688)] {
            let span = Span {
                first: Page(first),
                pages,
            };
            let (mut scanned, mut read) = (Owned::default(), Owned::default());
            scanned.reset(pages);
            read.reset(pages);
            pagemap.scans.store(true, Ordering::Relaxed);
            pagemap
                .own_memory(&view, span, first > 0, span.first, &mut scanned)
                .unwrap();
            pagemap.scans.store(false, Ordering::Relaxed);
            pagemap
                .own_memory(&view, span, first > 0, span.first, &mut read)
                .unwrap();
            for at in 0..pages {
                let written = [0, 1, 63, 64, 511, 512, 700, 1199].contains(&(first + at));
                assert_eq!(
                    (scanned.pages.has(at), read.pages.has(at)),
                    (written, written),
                    "page {}",
                    first + at
                );
            }
        }
        let whole = Span {
            first: Page(0),
            pages: 1200,
        };
        assert!(!pagemap.any_huge(&view, whole).unwrap());
        mapping.unmap();
    }

    #[test]
    fn huge_pages_are_told_apart() {
        let mapping = Mapping::create(1200, Kind::Private).unwrap();
        let view = mapping.view();
        let start: *mut core::ffi::c_void = view.page(Page(0)).cast_mut().cast();
        // SAFETY: the mapping made above, which nobody else knows.
        let collapsed = unsafe {
            start.cast::<u8>().write_volatile(1);
            libc::madvise(start, 512 * PAGE_SIZE, libc::MADV_COLLAPSE) == 0
        };
        let pagemap = Pagemap::open().unwrap();
        let span = |first, pages| Span {
            first: Page(first),
            pages,
        };
        // Where the kernel declines (no memory in one piece, no huge pages), there is none to be found.
        assert_eq!(pagemap.any_huge(&view, span(100, 1)).unwrap(), collapsed);
        assert!(!pagemap.any_huge(&view, span(1024, 176)).unwrap());
        mapping.unmap();
    }
}
