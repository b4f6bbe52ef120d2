//! Life pages: how a broker knows that no address space shows what a client gave up, without /proc and without trust.
//!
//! A life page is a memfd of size 0 that its client maps shared and maywrite. The kernel refuses `F_SEAL_WRITE` with EBUSY as
//! long as any address space has it mapped, forked children included, and grants it once none has. It relies on that alone;
//! nobody ever touches the mapping, which has no memory behind it, and the broker never maps it.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::error::SysError;
use crate::fork;
use crate::gate::Pass;
use crate::object::{self, Access, PAGE_SIZE, SharedMapping};
use crate::word::StoreNumber;

const WHAT: &str = "life page";

/// A life page of this process, mapped until it is dropped. Forked children keep theirs.
pub struct LifePage {
    mapping: Option<SharedMapping>,
    entry: Option<&'static Entry>,
}

/// A mapped life page as a child finds it. Entries change only inside the gate, together with the mapping, so that a child inherits
/// exactly the pages that are listed.
struct Entry {
    /// 0: free.
    address: AtomicUsize,
    /// The store whose frames it keeps, by the number in this process's words.
    store: AtomicU32,
    /// The life in which it is known; a child that is not born leaves its parent's pages alone for good.
    era: AtomicU32,
}

/// Pages that one process keeps mapped and knows of: one or two per store that its words name.
const MOST_LISTED: usize = 64;
static LISTED: [Entry; MOST_LISTED] = [const {
    Entry {
        address: AtomicUsize::new(0),
        store: AtomicU32::new(0),
        era: AtomicU32::new(0),
    }
}; MOST_LISTED];

/// The pages that a forked child inherited belong to its own life from now on.
pub(crate) fn inherit(from: u32, to: u32) {
    for entry in LISTED.iter().filter(|entry| entry.era.load(Ordering::Relaxed) == from) {
        entry.era.store(to, Ordering::Relaxed);
    }
}

/// What [`inherit`] made ours: to be called once in a life, before it has pages of its own.
pub fn inherited() -> Vec<(StoreNumber, LifePage)> {
    let era = fork::era().unwrap_or(0);
    let ours = |entry: &&Entry| {
        entry.address.load(Ordering::Relaxed) != 0 && entry.era.load(Ordering::Relaxed) == era && era != 0
    };
    LISTED.iter().filter(ours).map(Entry::page).collect()
}

/// Unmaps the pages of a parent in a child that shows nothing they keep, and has one thread.
pub(crate) fn let_go(era: u32) {
    let theirs =
        |entry: &&Entry| entry.address.load(Ordering::Relaxed) != 0 && entry.era.load(Ordering::Relaxed) == era;
    LISTED.iter().filter(theirs).for_each(|entry| drop(entry.page()));
}

impl Entry {
    fn page(&'static self) -> (StoreNumber, LifePage) {
        let address = core::ptr::with_exposed_provenance_mut(self.address.load(Ordering::Relaxed));
        // SAFETY: listed while mapped; the page's owner was a thread of the parent, which does not exist in this process.
        let mapping = unsafe { SharedMapping::of_range(address, PAGE_SIZE, Access::None) };
        let page = LifePage {
            mapping: Some(mapping),
            entry: Some(self),
        };
        (StoreNumber(self.store.load(Ordering::Relaxed) as u8), page)
    }
}

impl LifePage {
    /// Makes a life page and maps it; the descriptor is for whoever asks about it. Children keep it for good.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn new() -> Result<(LifePage, OwnedFd), SysError> {
        LifePage::make(None)
    }

    /// The same, for the broker whose store has this number in our words: a child that is born can let it go.
    ///
    /// # Errors
    /// The kernel's errno; ENOMEM where 64 are mapped already.
    pub fn for_store(store: StoreNumber) -> Result<(LifePage, OwnedFd), SysError> {
        // Only this thread takes entries: a client has one that turns life pages.
        let free = LISTED.iter().find(|entry| entry.address.load(Ordering::Relaxed) == 0);
        let entry = free.ok_or(SysError::Call {
            call: "mmap",
            what: WHAT,
            errno: Errno::NOMEM,
        })?;
        LifePage::make(Some((entry, store)))
    }

    fn make(listed: Option<(&'static Entry, StoreNumber)>) -> Result<(LifePage, OwnedFd), SysError> {
        let fd = object::create("ksmrs-life", 0)?;
        object::seal(&fd, WHAT, SealFlags::SHRINK | SealFlags::GROW)?;
        let _pass = listed.map(|_| Pass::enter());
        let mapping = SharedMapping::of(&fd, WHAT, PAGE_SIZE, Access::None)?;
        if let Some((entry, store)) = listed {
            entry.store.store(store.0.into(), Ordering::Relaxed);
            entry.era.store(fork::era().unwrap_or(0), Ordering::Relaxed);
            entry
                .address
                .store(mapping.pointer().expose_provenance(), Ordering::Relaxed);
        }
        let page = LifePage {
            mapping: Some(mapping),
            entry: listed.map(|(entry, _)| entry),
        };
        Ok((page, fd))
    }

    /// Keeps the page mapped as long as this process lives, and in every child of it.
    pub fn keep(self) {
        if let Some(entry) = self.entry {
            entry.era.store(0, Ordering::Relaxed);
        }
        core::mem::forget(self);
    }
}

impl Drop for LifePage {
    fn drop(&mut self) {
        let _pass = self.entry.map(|_| Pass::enter());
        drop(self.mapping.take());
        if let Some(entry) = self.entry {
            entry.address.store(0, Ordering::Relaxed);
        }
    }
}

/// What trying to seal a life page said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seal {
    /// No address space maps it any more, and none ever will.
    Taken,
    /// Somebody still maps it.
    Busy,
    /// Not a life page at all: the errno.
    Hostile(i32),
}

/// Vets a descriptor that a client calls its life page.
///
/// # Errors
/// [`SysError::Vetting`]: it has a size, or seals that would make the question meaningless.
pub fn vet(fd: impl AsFd) -> Result<(), SysError> {
    let vetted = object::vet(&fd, WHAT, SealFlags::SHRINK | SealFlags::GROW)?;
    let spoiled = SealFlags::SEAL | SealFlags::WRITE | SealFlags::FUTURE_WRITE;
    if vetted.size != 0 || vetted.seals.intersects(spoiled) {
        let reason = format!("size {}, seals {:#x}", vetted.size, vetted.seals.bits());
        return Err(SysError::Vetting { what: WHAT, reason });
    }
    let mode = rustix::fs::fcntl_getfl(&fd).map_err(SysError::call("F_GETFL", WHAT))?;
    if mode & rustix::fs::OFlags::RWMODE != rustix::fs::OFlags::RDWR {
        return Err(SysError::Vetting {
            what: WHAT,
            reason: format!("open flags {:#x}, not O_RDWR", mode.bits()),
        });
    }
    Ok(())
}

/// Asks the kernel whether any address space still maps the life page (0.2 us).
pub fn try_seal(fd: impl AsFd) -> Seal {
    match rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE) {
        Ok(()) => Seal::Taken,
        Err(Errno::BUSY) => Seal::Busy,
        Err(errno) => Seal::Hostile(errno.raw_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seal_is_refused_while_mapped() {
        let (life, fd) = LifePage::new().unwrap();
        vet(&fd).unwrap();
        assert_eq!(try_seal(&fd), Seal::Busy);
        drop(life);
        assert_eq!(try_seal(&fd), Seal::Taken);
        assert_eq!(try_seal(&fd), Seal::Taken);
        assert!(vet(&fd).is_err(), "a page that took the seal proves nothing any more");
    }

    #[test]
    fn a_forked_child_keeps_the_page_busy() {
        let (life, fd) = LifePage::new().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        // SAFETY: the child makes raw system calls only (close, read, _exit), which is allowed after fork of a threaded process.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut byte = 0u8;
            // SAFETY: as above; the buffer is a live local.
            unsafe {
                libc::close(rustix::fd::AsRawFd::as_raw_fd(&write));
                libc::read(rustix::fd::AsRawFd::as_raw_fd(&read), (&raw mut byte).cast(), 1);
                libc::_exit(0);
            }
        }
        assert!(child > 0);
        drop(life);
        assert_eq!(try_seal(&fd), Seal::Busy, "the child still maps it");
        drop(write);
        let mut status = 0;
        // SAFETY: waits for the child made above; the status is a live local.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(try_seal(&fd), Seal::Taken);
    }

    #[test]
    fn other_things_are_no_life_pages() {
        let sized = object::create("ksmrs-life", 4096).unwrap();
        object::seal(&sized, WHAT, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        assert!(vet(&sized).is_err());
        let unsealed = object::create("ksmrs-life", 0).unwrap();
        assert!(vet(&unsealed).is_err());
        let (_life, fd) = LifePage::new().unwrap();
        object::seal(&fd, WHAT, SealFlags::SEAL).unwrap();
        assert!(vet(&fd).is_err());
        assert!(matches!(try_seal(&fd), Seal::Hostile(_)));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(try_seal(&null), Seal::Hostile(_)));
    }
}
