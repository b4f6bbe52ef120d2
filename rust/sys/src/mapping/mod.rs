//! The memory of regions: the only place that maps at chosen addresses.
//!
//! A [`Mapping`] owns the address ranges of one region (the view that the program uses and, for shared memory, the home view): it makes
//! them, or takes charge of the program's, and unmaps or gives back what is left. What the protocol does to pages in between is in
//! `view.rs`.
//!
//! ```text
//!   view   [ own ][ own ][ frame 7 ][ frame 8 ][ own ]      what the program reads and writes, 2 MiB-aligned
//!   home   [ own ][ own ][  hole   ][  hole   ][ own ]      shared regions: the object, never remapped, never protected
//! ```

mod view;

pub(crate) use view::{View, insist, is_mapped, map_whole};

use crate::aligned::Aligned;
use crate::error::SysError;
use crate::foreign::{Advised, Foreign, Object};
use crate::object::{self, EXTENT_SIZE, PAGE_SIZE};
use crate::protocol::Kind;
use crate::sharers::ObjectId;
use crate::{ballast, signal};
use core::ffi::c_void;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MremapFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use view::{READ_WRITE, map_anonymous};

/// Maps a shared range's object a second time, where the kernel likes: an old length of 0 asks for that. Of an object that may live on,
/// whoever comes after this process takes a page that is there for a complete one: so memory comes to its holes page by page, never as a
/// huge page that brings zeros to the holes beside. The view is advised like the home, or what is mapped from there would be a mapping apart.
fn map_home_of(view: usize, bytes: usize, lasting: bool) -> Result<usize, SysError> {
    let view = ptr::with_exposed_provenance_mut(view);
    // SAFETY: nothing that is mapped is touched: the kernel chooses fresh addresses.
    let home = unsafe { rustix::mm::mremap(view, 0, bytes, MremapFlags::MAYMOVE) }
        .map_err(SysError::call("mremap", "home view"))?;
    if lasting {
        for start in [home, view] {
            // SAFETY: both show the object, and the advice changes no byte. A kernel that declines has no huge pages.
            let _ = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxNoHugepage) };
        }
    }
    Ok(home.expose_provenance())
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
            view.home = map_home_of(view.base, bytes, lasting.is_some())?;
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

    /// The same, of which parts may be asked to become huge pages ([`View::want_huge`]).
    pub(crate) fn maybe_huge(mut self) -> Mapping {
        self.view.huge = self.view.kind == Kind::Private;
        self
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
            Some(_) => map_home_of(address, pages as usize * PAGE_SIZE, true)?,
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
