//! The frame store of a domain: one sparse memfd that the broker fills and clients map read-only.
//!
//! It relies on the seals and the 0400 mode: a client's descriptor cannot write, and the size never changes. It knows slots
//! and bytes; which slot holds what, and when one may be punched, is decided elsewhere. Nobody maps the whole store, the
//! broker only ever an extent at a time, while it writes it (`extent.rs`).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, SealFlags};
use rustix::io::Errno;

use crate::bytes::PageBuffer;
use crate::checksum::Checksummer;
use crate::error::SysError;
use crate::extent::{Extent, Writer};
use crate::object::{self, EXTENT_PAGES, PAGE_SIZE};
use crate::staging::StagingView;
use crate::window::Glass;
use crate::word::Slot;
use std::sync::OnceLock;

pub(crate) const WHAT: &str = "frame store";
/// The smallest store worth having, should RLIMIT_FSIZE allow no larger one: 64 MiB.
const MIN_SLOTS: u64 = 32 * EXTENT_PAGES as u64;
/// Slot numbers are 32 bits and the last one means zero.
const MAX_SLOTS: u64 = (u32::MAX - 2 * EXTENT_PAGES) as u64 / EXTENT_PAGES as u64 * EXTENT_PAGES as u64;

/// Frames read at once, for hashing or copying: 128 KiB, which the second-level cache still holds from being filled.
pub const HASHED_AT_ONCE: u32 = 32;

pub(crate) const fn offset_of(slot: Slot) -> u64 {
    slot.0 as u64 * PAGE_SIZE as u64
}

/// The broker's side: writable.
pub struct Store {
    fd: OwnedFd,
    slots: u32,
    /// Where frames are read to for hashing.
    buffer: PageBuffer,
}

impl Store {
    /// Makes a store of twice the machine's memory, or as much as RLIMIT_FSIZE allows.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn create() -> Result<Store, SysError> {
        // SAFETY: asks for a number, nothing else.
        let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
        let mut slots = u64::try_from(pages).unwrap_or(MIN_SLOTS).saturating_mul(2);
        slots = slots
            .next_multiple_of(u64::from(EXTENT_PAGES))
            .clamp(MIN_SLOTS, MAX_SLOTS);
        loop {
            match Store::with_slots(slots as u32) {
                Err(SysError::Call { errno: Errno::FBIG, .. }) if slots > MIN_SLOTS => {
                    slots = (slots / 2).max(MIN_SLOTS)
                }
                answer => return answer,
            }
        }
    }

    /// Makes a store of this many slots, rounded up to whole extents.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn with_slots(slots: u32) -> Result<Store, SysError> {
        let slots = u64::from(slots)
            .next_multiple_of(u64::from(EXTENT_PAGES))
            .clamp(u64::from(EXTENT_PAGES), MAX_SLOTS) as u32;
        let fd = object::create("ksmrs-store", u64::from(slots) * PAGE_SIZE as u64)?;
        rustix::fs::fchmod(&fd, Mode::RUSR).map_err(SysError::call("fchmod", WHAT))?;
        object::seal_size(&fd, WHAT)?;
        Ok(Store {
            fd,
            slots,
            buffer: PageBuffer::new(HASHED_AT_ONCE),
        })
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// A read-only descriptor of the store, to be sent to a client.
    ///
    /// # Errors
    /// The kernel's errno; ENOENT without /proc.
    pub fn read_only(&self) -> Result<OwnedFd, SysError> {
        // The thread's own table: it may have left the process's.
        let path = format!("/proc/thread-self/fd/{}", self.fd.as_raw_fd());
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(SysError::call("open", WHAT))
    }

    fn check(&self, slot: Slot, pages: u32) {
        let end = slot.0.checked_add(pages);
        assert!(
            end.is_some_and(|end| end <= self.slots),
            "{slot:?}+{pages} is outside the store of {} slots",
            self.slots
        );
    }

    /// Fills frames with copies of consecutive staging pages.
    ///
    /// # Errors
    /// [`SysError::NoRoom`]; some of the frames may have been written then: punch them.
    pub fn fill(&self, slot: Slot, staging: &StagingView, first: u32, pages: u32) -> Result<(), SysError> {
        self.check(slot, pages);
        let source = staging.pages_pointer(first, pages);
        // SAFETY: bytes of the staging mapping, which is alive and cannot shrink; whoever changes them meanwhile changes only what
        // the frame will be, and the frame is hashed afterwards.
        unsafe { object::write_from(&self.fd, WHAT, source, pages as usize * PAGE_SIZE, offset_of(slot)) }
    }

    /// The checksums of frames as they are in the store.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn hash(
        &mut self,
        slot: Slot,
        pages: u32,
        checksummer: &Checksummer,
        into: &mut Vec<u64>,
    ) -> Result<(), SysError> {
        self.read_in_pieces(slot, pages, |_, frames| {
            into.extend(
                frames
                    .as_chunks::<PAGE_SIZE>()
                    .0
                    .iter()
                    .map(|page| checksummer.page(page)),
            );
            Ok(())
        })
    }

    /// Reads frames a piece at a time, and tells each with the number of the frame it begins with, counted from `slot`.
    fn read_in_pieces(
        &mut self,
        slot: Slot,
        pages: u32,
        mut piece: impl FnMut(u32, &[u8]) -> Result<(), SysError>,
    ) -> Result<(), SysError> {
        self.check(slot, pages);
        let mut done = 0;
        while done < pages {
            let now = (pages - done).min(HASHED_AT_ONCE);
            let bytes = now as usize * PAGE_SIZE;
            let frames = &mut self.buffer.bytes_mut()[..bytes];
            object::read(&self.fd, WHAT, frames, offset_of(slot.plus(done)))?;
            piece(done, frames)?;
            done += now;
        }
        Ok(())
    }

    /// Copies frames of the store to consecutive slots from `to` on: one read per run of them, one write for all.
    ///
    /// # Errors
    /// The kernel's errno; some of them may be written then.
    ///
    /// # Panics
    /// If there are more than [`HASHED_AT_ONCE`].
    pub fn copy(&mut self, from: &[Slot], to: Slot) -> Result<(), SysError> {
        assert!(
            from.len() <= HASHED_AT_ONCE as usize,
            "{} frames to be copied at once",
            from.len()
        );
        self.check(to, from.len() as u32);
        let bytes = &mut self.buffer.bytes_mut()[..from.len() * PAGE_SIZE];
        read_frames(&self.fd, from, bytes)?;
        object::write(&self.fd, WHAT, bytes, offset_of(to))
    }

    /// The frames' bytes.
    ///
    /// # Errors
    /// The kernel's errno.
    pub(crate) fn read(&self, from: &[Slot], into: &mut [u8]) -> Result<(), SysError> {
        read_frames(&self.fd, from, into)
    }

    /// Writes frames to an object, from a byte offset on; how many.
    ///
    /// # Errors
    /// [`SysError::NoRoom`] where the object's file system is full, or the kernel's errno.
    pub fn copy_to(&mut self, object: impl AsFd, offset: u64, slot: Slot, pages: u32) -> Result<u32, SysError> {
        self.read_in_pieces(slot, pages, |first, frames| {
            object::write(
                &object,
                "shared object",
                frames,
                offset + u64::from(first) * PAGE_SIZE as u64,
            )
        })?;
        Ok(pages)
    }

    /// The same, but only where the object has holes.
    ///
    /// # Errors
    /// As [`Store::copy_to`].
    pub fn fill_holes(&mut self, object: impl AsFd, offset: u64, slot: Slot, pages: u32) -> Result<u32, SysError> {
        let end = offset + u64::from(pages) * PAGE_SIZE as u64;
        let mut data = object::data_ranges(&object, "shared object", offset..end)?;
        data.push(end..end);
        let (mut filled, mut at) = (0, offset);
        for data in data {
            if at < data.start {
                let (first, hole) = ((at - offset) / PAGE_SIZE as u64, (data.start - at) / PAGE_SIZE as u64);
                filled += self.copy_to(&object, at, slot.plus(first as u32), hole as u32)?;
            }
            at = data.end;
        }
        Ok(filled)
    }

    /// To write frames, those of an extent where it is mapped.
    pub fn writer(&mut self, extent: Option<Extent>) -> Writer<'_> {
        Writer::new(self, extent)
    }

    /// Makes the empty extent that starts at `slot` one huge page, to be filled whole right away.
    ///
    /// One byte is written first, for the kernel does not collapse a wholly empty extent. Where it declines (no memory in one
    /// piece, no huge pages) the extent stays what it was, and filling works all the same.
    ///
    /// # Errors
    /// Why it did not become one.
    pub fn make_huge(&self, slot: Slot) -> Result<Extent, SysError> {
        self.check(slot, EXTENT_PAGES);
        assert!(slot.0.is_multiple_of(EXTENT_PAGES), "{slot:?} does not start an extent");
        rustix::io::pwrite(&self.fd, &[0], offset_of(slot)).map_err(SysError::call("pwrite", WHAT))?;
        Extent::collapse(self.fd.as_fd(), slot)
    }

    /// Gives the memory of frames back. Nobody may show them.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn punch(&self, slot: Slot, pages: u32) -> Result<(), SysError> {
        self.check(slot, pages);
        object::punch(&self.fd, WHAT, offset_of(slot)..offset_of(slot.plus(pages)))
    }

    /// Bytes of memory in the store.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn allocated(&self) -> Result<u64, SysError> {
        object::allocated(&self.fd, WHAT)
    }

    /// Runs of slots that have memory, in order: (first, pages).
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn filled(&self) -> Result<Vec<(Slot, u32)>, SysError> {
        let page = PAGE_SIZE as u64;
        let ranges = object::data_ranges(&self.fd, WHAT, 0..u64::from(self.slots) * page)?;
        Ok(ranges
            .iter()
            .map(|range| {
                (
                    Slot((range.start / page) as u32),
                    ((range.end - range.start) / page) as u32,
                )
            })
            .collect())
    }
}

/// Reads frames, a run of consecutive ones at a time.
fn read_frames(store: &OwnedFd, from: &[Slot], mut into: &mut [u8]) -> Result<(), SysError> {
    for run in from.chunk_by(|one, next| one.0 + 1 == next.0) {
        let (frames, rest) = into.split_at_mut(run.len() * PAGE_SIZE);
        object::read(store, WHAT, frames, offset_of(run[0]))?;
        into = rest;
    }
    Ok(())
}

/// The client's side: a vetted read-only descriptor of a store.
pub struct StoreFile {
    fd: OwnedFd,
    slots: u32,
    /// Of this very store, so that what is compared is what is mapped.
    glass: OnceLock<Glass>,
}

impl StoreFile {
    /// Vets what a broker sent as its store.
    ///
    /// # Errors
    /// [`SysError::Vetting`]: not ours, not sealed, of another size, or writable.
    pub fn vet(fd: OwnedFd, slots: u32) -> Result<StoreFile, SysError> {
        let vetted = object::vet(&fd, WHAT, SealFlags::SHRINK | SealFlags::GROW)?;
        let hostile = |reason: String| SysError::Vetting { what: WHAT, reason };
        if slots == 0 || vetted.size != u64::from(slots) * PAGE_SIZE as u64 {
            return Err(hostile(format!("{} bytes for {slots} slots", vetted.size)));
        }
        let owner = rustix::fs::fstat(&fd).map_err(SysError::call("fstat", WHAT))?.st_uid;
        let ours = rustix::process::geteuid().as_raw();
        if owner != ours {
            return Err(hostile(format!("it belongs to uid {owner}, not {ours}")));
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(SysError::call("F_GETFL", WHAT))?;
        if flags & OFlags::RWMODE != OFlags::RDONLY {
            return Err(hostile(format!("open flags {:#x}, not O_RDONLY", flags.bits())));
        }
        Ok(StoreFile {
            fd,
            slots,
            glass: OnceLock::new(),
        })
    }

    /// Maps the whole store to look at, until [`StoreFile::take_glass_down`]: worth it for many short runs, since they need no window of
    /// their own then. Where that is refused (RLIMIT_AS) they have windows as ever. Whether it is there now.
    pub fn mount_glass(&self) -> bool {
        if self.glass.get().is_none()
            && let Ok(glass) = Glass::mount(self.as_fd(), self.slots)
        {
            let _ = self.glass.set(glass);
        }
        self.glass.get().is_some()
    }

    /// Frees the addresses and page tables that looking took.
    pub fn take_glass_down(&mut self) {
        drop(self.glass.take());
    }

    pub(crate) fn glass(&self) -> Option<&Glass> {
        self.glass.get()
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }
}

impl AsFd for StoreFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::KEY_BYTES;
    use crate::staging::Staging;

    fn small() -> (Store, Staging, StagingView, Checksummer) {
        let (staging, fd) = Staging::create().unwrap();
        let view = StagingView::open(&fd).unwrap();
        (
            Store::with_slots(2048).unwrap(),
            staging,
            view,
            Checksummer::new(&[3; KEY_BYTES]),
        )
    }

    #[test]
    fn frames_hold_what_was_staged_until_punched() {
        let (mut store, staging, view, checksummer) = small();
        let pages: Vec<[u8; PAGE_SIZE]> = (1..=5).map(|byte| [byte; PAGE_SIZE]).collect();
        for (index, page) in pages.iter().enumerate() {
            staging.write_page(index as u32, page);
        }
        store.fill(Slot(700), &view, 0, 5).unwrap();
        let mut hashes = Vec::new();
        store.hash(Slot(700), 5, &checksummer, &mut hashes).unwrap();
        let expected: Vec<u64> = pages.iter().map(|page| checksummer.page(page)).collect();
        assert_eq!(hashes, expected);
        assert_eq!(store.filled().unwrap(), [(Slot(700), 5)]);
        store.punch(Slot(701), 2).unwrap();
        assert_eq!(store.filled().unwrap(), [(Slot(700), 1), (Slot(703), 2)]);
        assert_eq!(store.allocated().unwrap(), 3 * PAGE_SIZE as u64);
    }

    #[test]
    fn frames_are_copied_from_wherever_they_are() {
        let (mut store, staging, view, checksummer) = small();
        for index in 0..6 {
            staging.write_page(index, &[index as u8 + 1; PAGE_SIZE]);
        }
        store.fill(Slot(700), &view, 0, 6).unwrap();
        let from = [703, 700, 701, 702, 705].map(Slot);
        store.copy(&from, Slot(40)).unwrap();
        let mut hashes = Vec::new();
        store.hash(Slot(40), 5, &checksummer, &mut hashes).unwrap();
        assert_eq!(hashes, [4, 1, 2, 3, 6].map(|byte| checksummer.page(&[byte; PAGE_SIZE])));
        assert_eq!(store.filled().unwrap(), [(Slot(40), 5), (Slot(700), 6)]);
    }

    #[test]
    fn clients_get_a_descriptor_that_cannot_write() {
        let (store, ..) = small();
        let file = StoreFile::vet(store.read_only().unwrap(), store.slots()).unwrap();
        assert_eq!(rustix::io::pwrite(&file, &[1], 0), Err(Errno::BADF));
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
        assert!(StoreFile::vet(store.read_only().unwrap(), 4096).is_err());
        assert!(
            StoreFile::vet(store.fd.try_clone().unwrap(), store.slots()).is_err(),
            "a writable one is refused"
        );
    }

    #[test]
    fn a_store_without_a_size_fits_the_machine() {
        let store = Store::create().unwrap();
        assert!(store.slots() >= MIN_SLOTS as u32 && store.slots().is_multiple_of(EXTENT_PAGES));
        assert_eq!(store.allocated().unwrap(), 0);
    }
}
