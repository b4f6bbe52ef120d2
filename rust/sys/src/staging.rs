//! Staging: 2 MiB that a client copies pages into for its broker to fill frames from.
//!
//! The client may change it at any time, even while the broker writes from it: so frames are hashed after they were filled,
//! never the copy here, and neither side ever makes a reference to its bytes.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::SealFlags;

use crate::error::SysError;
use crate::object::{self, Access, EXTENT_PAGES, EXTENT_SIZE, PAGE_SIZE, SharedMapping};

const WHAT: &str = "staging";

/// The client's side, writable.
pub struct Staging {
    mapping: SharedMapping,
}

impl Staging {
    /// Pages that fit.
    pub const PAGES: u32 = EXTENT_PAGES;

    /// Makes the area and the descriptor for the broker.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn create() -> Result<(Staging, OwnedFd), SysError> {
        let fd = object::create("ksmrs-staging", EXTENT_SIZE as u64)?;
        object::seal_size(&fd, WHAT)?;
        let mapping = SharedMapping::of(&fd, WHAT, EXTENT_SIZE, Access::ReadWrite)?;
        Ok((Staging { mapping }, fd))
    }

    /// Where the copy of a page goes: 4096 writable bytes, valid while self lives, which the broker reads when it likes.
    pub(crate) fn page_pointer(&self, index: u32) -> *mut u8 {
        assert!(index < Self::PAGES, "staging has {} pages, not {index}", Self::PAGES);
        self.mapping.pointer().wrapping_add(index as usize * PAGE_SIZE)
    }

    /// Copies one page in.
    pub fn write_page(&self, index: u32, page: &[u8; PAGE_SIZE]) {
        // SAFETY: the pointer is good for a page (see page_pointer), and the source is a reference, so it cannot be staging.
        unsafe { core::ptr::copy_nonoverlapping(page.as_ptr(), self.page_pointer(index), PAGE_SIZE) }
    }

    /// Gives the memory back between uses; the pages read as zeros.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn discard(&self) -> Result<(), SysError> {
        self.mapping.punch(WHAT, 0..EXTENT_SIZE)
    }
}

/// The broker's side, read-only.
pub struct StagingView {
    mapping: SharedMapping,
}

impl StagingView {
    /// Vets the descriptor and maps it.
    ///
    /// # Errors
    /// [`SysError::Vetting`] with what is wrong.
    pub fn open(fd: impl AsFd) -> Result<StagingView, SysError> {
        let vetted = object::vet(&fd, WHAT, SealFlags::SHRINK | SealFlags::GROW)?;
        if vetted.size != EXTENT_SIZE as u64 {
            return Err(SysError::Vetting {
                what: WHAT,
                reason: format!("{} bytes, not {EXTENT_SIZE}", vetted.size),
            });
        }
        Ok(StagingView {
            mapping: SharedMapping::of(fd, WHAT, EXTENT_SIZE, Access::Read)?,
        })
    }

    /// `pages` pages from `index`: for system calls to read from, never for a reference.
    pub(crate) fn pages_pointer(&self, index: u32, pages: u32) -> *const u8 {
        let end = index.checked_add(pages);
        assert!(
            end.is_some_and(|end| end <= EXTENT_PAGES),
            "staging has no pages {index}+{pages}"
        );
        self.mapping.pointer().wrapping_add(index as usize * PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sealed_area_of_the_right_size_is_taken() {
        let (staging, fd) = Staging::create().unwrap();
        let view = StagingView::open(&fd).unwrap();
        staging.write_page(511, &[9; PAGE_SIZE]);
        // SAFETY: the area is mapped and nobody writes it now.
        assert_eq!(unsafe { view.pages_pointer(511, 1).add(4095).read_volatile() }, 9);
        staging.discard().unwrap();
        assert_eq!(object::allocated(&fd, WHAT).unwrap(), 0);
        let small = object::create("ksmrs-staging", 4096).unwrap();
        object::seal_size(&small, WHAT).unwrap();
        assert!(StagingView::open(&small).is_err());
        let unsealed = object::create("ksmrs-staging", EXTENT_SIZE as u64).unwrap();
        assert!(StagingView::open(&unsealed).is_err());
    }
}
