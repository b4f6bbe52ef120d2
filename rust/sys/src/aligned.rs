//! Reserved addresses, 2 MiB-aligned: where regions, scratch areas and windows are mapped.
//!
//! Nothing is ever mapped here but by `MAP_FIXED` of whoever holds the range. It never touches memory.

use crate::error::SysError;
use crate::object::EXTENT_SIZE;
use core::ffi::c_void;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::ptr;

/// A 2 MiB-aligned range of reserved addresses, given back when dropped unless kept.
pub(crate) struct Aligned {
    start: *mut c_void,
    bytes: usize,
    kept: bool,
}

impl Aligned {
    pub(crate) fn reserve(bytes: usize) -> Result<Aligned, SysError> {
        const WHAT: &str = "address space";
        let whole = bytes.checked_add(EXTENT_SIZE).ok_or(SysError::NoRoom {
            what: WHAT,
            bytes: bytes as u64,
            errno: Errno::NOMEM,
        })?;
        // SAFETY: fresh inaccessible addresses where the kernel likes.
        let area = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(ptr::null_mut(), whole, ProtFlags::empty(), flags)
        }
        .map_err(|errno| SysError::NoRoom {
            what: WHAT,
            bytes: bytes as u64,
            errno,
        })?;
        let before = area.addr().next_multiple_of(EXTENT_SIZE) - area.addr();
        let after = EXTENT_SIZE - before;
        // SAFETY: the ends of the range reserved above, which nobody has seen.
        unsafe {
            if before > 0 {
                let _ = rustix::mm::munmap(area, before);
            }
            if after > 0 {
                let _ = rustix::mm::munmap(area.byte_add(before + bytes), after);
            }
            Ok(Aligned {
                start: area.byte_add(before),
                bytes,
                kept: false,
            })
        }
    }

    pub(crate) fn start(&self) -> *mut c_void {
        self.start
    }

    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }
}

// SAFETY: addresses that it alone owns; nothing in it is tied to a thread.
unsafe impl Send for Aligned {}

impl Drop for Aligned {
    fn drop(&mut self) {
        if !self.kept {
            // SAFETY: reserved by us, seen by nobody else.
            let _ = unsafe { rustix::mm::munmap(self.start, self.bytes) };
        }
    }
}
