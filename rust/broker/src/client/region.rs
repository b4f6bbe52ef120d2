//! Regions as the program holds them: `ksmrs-sys` does everything; here a region only gets known to the remapper, and is let go.

use super::mailbox::Event;
use super::{Client, Error, Kind, client, client_if_begun};
use ksmrs_sys::foreign::Foreign;
use ksmrs_sys::region::Region as Memory;
use ksmrs_sys::{PAGE_SIZE, born};
use std::ops::Range;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Memory that takes part in merging. Dropping it unmaps memory of our own, without a copy, and gives adopted memory back.
pub struct Region {
    memory: Arc<Memory>,
    nbytes: usize,
    /// Whether the remapper knows that it ended.
    told: AtomicBool,
    /// Whether it is the heap's, which ends it.
    arena: bool,
}

impl Region {
    /// Makes zeroed, 2 MiB-aligned memory of at least `nbytes` bytes and opts it in. The broker is met in the background; without
    /// one the memory is as good.
    ///
    /// # Errors
    /// [`Error::Size`], no memory (ENOMEM), or no room for a shared object (ENOSPC).
    pub fn new(nbytes: usize, kind: Kind) -> Result<Arc<Region>, Error> {
        let pages = pages_of(nbytes)?;
        let client = client()?;
        let memory_kind = match kind {
            Kind::Private => ksmrs_sys::protocol::Kind::Private,
            Kind::Shared => ksmrs_sys::protocol::Kind::Shared,
        };
        let memory = born::known(Memory::create(client.table, pages, memory_kind)?);
        Ok(Region::joined(memory, client, nbytes))
    }

    /// Memory of a named object that the program has open under this number, and keeps open: fresh, of at least `nbytes` bytes,
    /// which must be the object's size. The object lives on.
    ///
    /// # Errors
    /// As [`Region::new`]; EBADF.
    pub fn named(nbytes: usize, number: RawFd) -> Result<Arc<Region>, Error> {
        let pages = pages_of(nbytes)?;
        let client = client()?;
        let object = ksmrs_sys::descriptors::copy_of(number)?;
        let memory = Arc::new(Memory::named(client.table, pages, object.as_fd())?);
        Ok(Region::joined(memory, client, nbytes))
    }

    /// Opts in memory that the program made, in place.
    ///
    /// # Errors
    /// No room in the page table, or part of it is in a region already.
    pub fn adopt(foreign: Foreign) -> Result<Arc<Region>, Error> {
        let client = client()?;
        let memory = born::known(Memory::adopt(client.table, foreign)?);
        let nbytes = memory.pages() as usize * PAGE_SIZE;
        Ok(Region::joined(memory, client, nbytes))
    }

    fn joined(memory: Arc<Memory>, client: &'static Client, nbytes: usize) -> Arc<Region> {
        client.mailbox.push(Event::Join(memory.clone()));
        Arc::new(Region {
            memory,
            nbytes,
            told: AtomicBool::new(false),
            arena: false,
        })
    }

    /// An arena, for whoever advises or pins parts of it; dropping that changes nothing.
    pub(super) fn of_arena(memory: Arc<Memory>) -> Arc<Region> {
        Arc::new(Region {
            nbytes: memory.pages() as usize * PAGE_SIZE,
            memory,
            told: AtomicBool::new(false),
            arena: true,
        })
    }

    /// Whether the program made the memory.
    pub fn is_adopted(&self) -> bool {
        self.memory.is_adopted()
    }

    /// Whether the program has opted all of it out.
    pub fn is_unadvised(&self) -> bool {
        self.memory.is_unadvised()
    }

    /// Whether its memory is a region no more.
    pub fn is_ended(&self) -> bool {
        self.memory.is_closed()
    }

    /// Ends an adopted region: the memory is as its owner made it, with its bytes. Idempotent.
    ///
    /// # Errors
    /// No memory for the copies; then it stays a region, out of merging.
    pub fn give_back(&self) -> Result<(), Error> {
        self.untrack();
        self.memory.give_back().inspect_err(|_| self.memory.resume_tracking())?;
        self.ended();
        Ok(())
    }

    /// Returns when nothing of it is registered for dirty tracking any more.
    fn untrack(&self) {
        // In a child, the child's own, which is at nothing of its parent's.
        if let Some(client) = client_if_begun() {
            client.mailbox.tracker.untrack(&self.memory);
        }
    }

    /// Ends an adopted region whose private memory the owner is freeing: its bytes are lost. Shared memory keeps its bytes, for its
    /// object may live on. Idempotent.
    ///
    /// # Errors
    /// As for [`Region::give_back`], for shared memory only.
    pub fn abandon(&self) -> Result<(), Error> {
        if self.kind() == Kind::Shared {
            return self.give_back();
        }
        self.memory.close();
        self.ended();
        Ok(())
    }

    /// No thread of ours touches the memory any more, which stays as it is until the process ends, or the region does.
    pub fn retire(&self) {
        self.memory.retire();
    }

    /// Whether it was, and did not end since.
    pub fn is_retired(&self) -> bool {
        self.memory.is_retired()
    }

    /// Tells the remapper once that the region ended.
    fn ended(&self) {
        if self.memory.is_ours() && !self.told.swap(true, Ordering::AcqRel) {
            // In a child that was born with it, the child's own.
            if let Some(client) = client_if_begun() {
                client.mailbox.push(Event::Leave(self.memory.clone()));
            }
        }
    }

    /// Address of the first byte.
    pub fn address(&self) -> usize {
        self.memory.address()
    }

    /// Bytes, as asked for.
    #[allow(clippy::len_without_is_empty, reason = "no region is empty")]
    pub fn len(&self) -> usize {
        self.nbytes
    }

    /// Private or shared.
    pub fn kind(&self) -> Kind {
        kind_of(&self.memory)
    }

    fn pages(&self, range: Range<usize>) -> Result<Range<u32>, Error> {
        let pages = self.memory.pages();
        let fits = range.start <= range.end && range.end <= pages as usize;
        if fits {
            Ok(range.start as u32..range.end as u32)
        } else {
            Err(Error::Range {
                start: range.start,
                end: range.end,
                pages,
            })
        }
    }

    /// Lets pages take part (again).
    ///
    /// # Errors
    /// [`Error::Range`]; EPERM in a forked child.
    pub fn advise_mergeable(&self, pages: Range<usize>) -> Result<(), Error> {
        Ok(self.memory.advise(self.pages(pages)?)?)
    }

    /// Gives pages memory of their own, and keeps them out. Needs no broker; done when it returns.
    ///
    /// # Errors
    /// [`Error::Range`]; no memory for the copies.
    pub fn advise_unmergeable(&self, pages: Range<usize>) -> Result<(), Error> {
        Ok(self.memory.unadvise(self.pages(pages)?)?)
    }

    /// Like [`Region::advise_unmergeable`], until the matching [`Region::unpin`].
    ///
    /// # Errors
    /// As there.
    pub fn pin(&self, pages: Range<usize>) -> Result<(), Error> {
        Ok(self.memory.pin(self.pages(pages)?)?)
    }

    /// Ends one pin of this very range.
    pub fn unpin(&self, pages: Range<usize>) {
        if let Ok(pages) = self.pages(pages) {
            self.memory.unpin(pages);
        }
    }

    /// One byte per page: the numbers of `ksmrs_sys::State`.
    pub fn page_states(&self) -> Vec<u8> {
        self.memory.page_states().into_iter().map(|state| state as u8).collect()
    }

    /// Pages that show a frame or, as the last scan saw them, have memory.
    pub fn items(&self) -> u32 {
        self.memory.items()
    }

    /// Ends merging for good; the memory stays, plain, with its bytes.
    ///
    /// # Errors
    /// No memory for the copies.
    pub fn leave(&self) -> Result<(), Error> {
        self.untrack();
        Ok(self.memory.leave().inspect_err(|_| self.memory.resume_tracking())?)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // What is retired shows its frames to the end of the process.
        if self.arena || self.memory.is_retired() {
            return;
        }
        if self.memory.is_adopted() && !self.memory.is_closed() {
            self.untrack();
        }
        match self.memory.release() {
            Ok(()) => self.ended(),
            // Its owner may still read it: it stays a region for as long as there is no memory for the copies.
            Err(error) => tracing::error!(%error, address = self.memory.address(), "no room to give memory back"),
        }
    }
}

/// What a region's memory is, on the wire.
pub(super) fn kind_of(memory: &Memory) -> Kind {
    match memory.kind() {
        ksmrs_sys::protocol::Kind::Private => Kind::Private,
        ksmrs_sys::protocol::Kind::Shared => Kind::Shared,
    }
}

fn pages_of(nbytes: usize) -> Result<u32, Error> {
    let size = |reason: &str| Error::Size {
        nbytes,
        reason: reason.to_owned(),
    };
    if nbytes == 0 {
        return Err(size("at least one byte is needed"));
    }
    u32::try_from(nbytes.div_ceil(PAGE_SIZE)).map_err(|_| size("at most 16 TiB are possible"))
}
