//! Reading memory that may vanish: an object of the program's, which whoever has a descriptor of it may cut short.
//!
//! A mapped read beyond the end of an object is a SIGBUS, so the kernel is asked for copies of our own memory instead
//! (`process_vm_readv`, which says EFAULT), many pages at a call. It would also give memory to holes that it reads, so
//! holes are asked for first. Nothing here owns a page, and nothing runs in the signal handler.

use crate::bytes::PageBuffer;
use crate::error::{SysError, last_errno};
use crate::mapping::View;
use crate::object::PAGE_SIZE;
use crate::pagemap::Bits;
use crate::protocol::{MAX_RUN, Page, Span};
use core::ffi::c_void;
use rustix::io::Errno;
use std::ptr;

/// Copies bytes of our own memory as far as it is there; how many.
pub(crate) fn copy(from: *const u8, into: &mut [u8]) -> usize {
    // SAFETY: the target is exclusively borrowed and as long as it says.
    unsafe { copy_to(from, into.as_mut_ptr(), into.len()) }
}

/// Copies bytes of our own memory, as far as it is there, to where others may be reading; how many.
///
/// # Safety
/// `to` is good for `bytes` bytes of writes.
pub(crate) unsafe fn copy_to(from: *const u8, to: *mut u8, bytes: usize) -> usize {
    let local = libc::iovec {
        iov_base: to.cast(),
        iov_len: bytes,
    };
    let remote = libc::iovec {
        iov_base: ptr::with_exposed_provenance_mut(from.addr()),
        iov_len: bytes,
    };
    // SAFETY: the kernel checks the source, and writes to the target, which is the caller's promise.
    let copied = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(copied).unwrap_or(0)
}

/// Whether a byte can be read there; holes count as there.
///
/// # Errors
/// The kernel reads nothing for us at all.
pub(crate) fn is_there(address: usize) -> Result<bool, SysError> {
    let read = copy(ptr::with_exposed_provenance(address), &mut [0u8]);
    match last_errno() {
        _ if read == 1 => Ok(true),
        Errno::FAULT => Ok(false),
        refused => Err(SysError::call("process_vm_readv", "an object")(refused)),
    }
}

/// Asks of every page of a range whether it has memory in RAM (mincore), and tells each; fails where something is not mapped.
///
/// # Errors
/// ENOMEM for a range with a gap.
pub(crate) fn residency(start: *const c_void, pages: u32, mut each: impl FnMut(u32, bool)) -> Result<(), Errno> {
    let mut residency = [0u8; MAX_RUN];
    let mut done = 0;
    while done < pages {
        let now = (pages - done).min(MAX_RUN as u32);
        let from = start.wrapping_byte_add(done as usize * PAGE_SIZE).cast_mut();
        // SAFETY: the kernel looks the range up, reads nothing of it, and writes a byte per page into the array, which is long enough.
        if unsafe { libc::mincore(from, now as usize * PAGE_SIZE, residency.as_mut_ptr()) } != 0 {
            return Err(last_errno());
        }
        for (page, resident) in (done..done + now).zip(residency) {
            each(page, resident & 1 != 0);
        }
        done += now;
    }
    Ok(())
}

/// Finds the pages of a span that have memory in RAM: neither holes nor swapped out.
pub(crate) fn resident(view: &View, span: Span, found: &mut Bits) -> Result<(), Errno> {
    found.reset(span.pages);
    residency(view.page(span.first).cast(), span.pages, |page, resident| {
        if resident {
            found.set(page);
        }
    })
}

/// Pages copied ahead at one call.
pub(crate) const AHEAD: u32 = 32;

/// Copies of the pages that a scan is about to look at.
#[derive(Default)]
pub(crate) struct Ahead {
    /// Made when it is first needed.
    buffer: Option<PageBuffer>,
    span: Option<Span>,
}

impl Ahead {
    /// Forgets its copies: what comes must be looked at anew.
    pub(crate) fn forget(&mut self) {
        self.span = None;
    }

    /// A copy of a page, and of as many pages after it as `more` says, at most; `None` if it is not there.
    pub(crate) fn page(&mut self, view: &View, page: Page, more: u32) -> Option<&[u8; PAGE_SIZE]> {
        let buffer = self.buffer.get_or_insert_with(|| PageBuffer::new(AHEAD));
        let held = self.span.filter(|span| span.first <= page && page < span.end());
        let span = match held {
            Some(span) => span,
            None => {
                let pages = (more + 1).min(AHEAD);
                let copied = copy(view.page(page), &mut buffer.bytes_mut()[..pages as usize * PAGE_SIZE]);
                let pages = (copied / PAGE_SIZE) as u32;
                self.span = (pages > 0).then_some(Span { first: page, pages });
                self.span?
            }
        };
        let at = (page.0 - span.first.0) as usize * PAGE_SIZE;
        buffer.bytes()[at..].first_chunk()
    }
}
