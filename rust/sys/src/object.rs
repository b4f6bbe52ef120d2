//! Shared memory objects: memfds with names, sizes, seals and holes, and plain mappings of them.
//!
//! It relies on memfd seals for everything that two processes must be able to count on (an object sealed against shrinking
//! cannot turn a mapped read into a SIGBUS). It never maps at a chosen address and never hands out a reference to bytes that
//! somebody else may write: a [`SharedMapping`] gives pointers and atomics only.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::error::{SysError, last_errno};

/// Bytes of a page; ksmrs merges on machines with this page size only.
pub const PAGE_SIZE: usize = 4096;
/// Pages of an extent: what can be one huge page.
pub const EXTENT_PAGES: u32 = 512;
/// Bytes of an extent.
pub const EXTENT_SIZE: usize = EXTENT_PAGES as usize * PAGE_SIZE;

/// The file system that memfds live on (`TMPFS_MAGIC`); hugetlbfs would answer the same seals.
pub(crate) const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Makes a memfd of `bytes` bytes, all holes. `name` shows in /proc/PID/maps as `/memfd:name`.
///
/// # Errors
/// The kernel's errno; EFBIG beyond RLIMIT_FSIZE (without its signal).
pub fn create(name: &'static str, bytes: u64) -> Result<OwnedFd, SysError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 don't know the flag; later ones may insist on it (vm.memfd_noexec).
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        answer => answer,
    }
    .map_err(SysError::call("memfd_create", name))?;
    if bytes > 0 {
        without_file_size_signal(|| rustix::fs::ftruncate(&fd, bytes)).map_err(SysError::call("ftruncate", name))?;
    }
    Ok(fd)
}

/// Adds seals for good.
///
/// # Errors
/// The kernel's errno: EBUSY for a write seal while the object is mapped writable.
pub fn seal(fd: impl AsFd, what: &'static str, seals: SealFlags) -> Result<(), SysError> {
    rustix::fs::fcntl_add_seals(fd, seals).map_err(SysError::call("F_ADD_SEALS", what))
}

/// Fixes the size of an object: nothing can shrink or grow it, and nobody can add a seal to it any more.
///
/// # Errors
/// The kernel's errno.
pub fn seal_size(fd: impl AsFd, what: &'static str) -> Result<(), SysError> {
    seal(fd, what, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

/// Allocates a range of the object now, so that touching it later cannot fail.
///
/// A memfd has no limit of its own: the kernel would rather kill processes than say ENOSPC, so what the machine cannot hold
/// is refused here.
///
/// # Errors
/// [`SysError::NoRoom`] when there is none.
pub fn reserve(fd: impl AsFd, what: &'static str, range: Range<u64>) -> Result<(), SysError> {
    let bytes = range.end - range.start;
    if memory_left().is_some_and(|left| bytes > left) {
        return Err(SysError::NoRoom {
            what,
            bytes,
            errno: Errno::NOSPC,
        });
    }
    loop {
        let fd = fd.as_fd();
        match without_file_size_signal(|| rustix::fs::fallocate(fd, FallocateFlags::empty(), range.start, bytes)) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(SysError::NoRoom { what, bytes, errno }),
        }
    }
}

/// What the machine can still hold (MemAvailable and SwapFree); `None` without /proc.
fn memory_left() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kibibytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    Some((kibibytes("MemAvailable:")? + kibibytes("SwapFree:").unwrap_or(0)) * 1024)
}

/// Gives the memory of a range of the object back; it reads as zeros afterwards.
///
/// # Errors
/// The kernel's errno.
pub fn punch(fd: impl AsFd, what: &'static str, range: Range<u64>) -> Result<(), SysError> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match rustix::fs::fallocate(&fd, flags, range.start, range.end - range.start) {
            Err(Errno::INTR) => continue,
            answer => return answer.map_err(SysError::call("fallocate(PUNCH_HOLE)", what)),
        }
    }
}

/// Writes all of some bytes at an offset.
///
/// # Errors
/// [`SysError::NoRoom`]; some of them may have been written then.
pub(crate) fn write(fd: impl AsFd, what: &'static str, bytes: &[u8], offset: u64) -> Result<(), SysError> {
    // SAFETY: the slice is borrowed meanwhile.
    unsafe { write_from(fd, what, bytes.as_ptr(), bytes.len(), offset) }
}

/// The same for bytes that others may be changing: no reference is made to them.
///
/// # Errors
/// As [`write`].
///
/// # Safety
/// `source` is mapped readable for `bytes` bytes until this returns.
pub(crate) unsafe fn write_from(
    fd: impl AsFd,
    what: &'static str,
    source: *const u8,
    bytes: usize,
    offset: u64,
) -> Result<(), SysError> {
    let mut done = 0;
    while done < bytes {
        // SAFETY: the kernel reads within the source, which is the caller's promise.
        let wrote = without_file_size_signal(|| unsafe {
            let at = (offset + done as u64) as i64;
            libc::pwrite64(fd.as_fd().as_raw_fd(), source.add(done).cast(), bytes - done, at)
        });
        let errno = match wrote {
            1.. => {
                done += wrote as usize;
                continue;
            }
            0 => Errno::NOSPC,
            _ => last_errno(),
        };
        if errno != Errno::INTR {
            let bytes = bytes as u64;
            return Err(SysError::NoRoom { what, bytes, errno });
        }
    }
    Ok(())
}

/// Reads as many bytes as there is room for, from an offset on.
///
/// # Errors
/// The kernel's errno; EIO beyond the end.
pub(crate) fn read(fd: impl AsFd, what: &'static str, mut into: &mut [u8], mut offset: u64) -> Result<(), SysError> {
    while !into.is_empty() {
        match rustix::io::pread(&fd, &mut *into, offset) {
            Ok(0) => return Err(SysError::call("pread", what)(Errno::IO)),
            Ok(read) => {
                into = &mut into[read..];
                offset += read as u64;
            }
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(SysError::call("pread", what)(errno)),
        }
    }
    Ok(())
}

/// Bytes of memory that the object really has (`st_blocks`), swapped ones included.
///
/// # Errors
/// The kernel's errno.
pub fn allocated(fd: impl AsFd, what: &'static str) -> Result<u64, SysError> {
    let stat = rustix::fs::fstat(fd).map_err(SysError::call("fstat", what))?;
    Ok(stat.st_blocks as u64 * 512)
}

/// The ranges inside `within` that were written, in order (SEEK_DATA, SEEK_HOLE); memory that is only reserved counts as a
/// hole, though [`allocated`] has it. Moves the file offset.
///
/// # Errors
/// The kernel's errno.
pub fn data_ranges(fd: impl AsFd, what: &'static str, within: Range<u64>) -> Result<Vec<Range<u64>>, SysError> {
    let mut found = Vec::new();
    let mut at = within.start;
    while at < within.end {
        let data = match rustix::fs::seek(&fd, SeekFrom::Data(at)) {
            Ok(data) if data < within.end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => {
                return Err(SysError::Call {
                    call: "lseek(SEEK_DATA)",
                    what,
                    errno,
                });
            }
        };
        let hole = rustix::fs::seek(&fd, SeekFrom::Hole(data)).map_err(SysError::call("lseek(SEEK_HOLE)", what))?;
        let end = hole.min(within.end);
        found.push(data..end);
        at = end;
    }
    Ok(found)
}

/// What a vetted object turned out to be.
#[derive(Clone, Copy, Debug)]
pub struct Vetted {
    /// Its size in bytes.
    pub size: u64,
    /// Its seals.
    pub seals: SealFlags,
}

/// Looks at a descriptor from a peer before anything else is done with it: a memfd on tmpfs, with at least these seals.
///
/// # Errors
/// [`SysError::Vetting`] with the number that is wrong.
pub fn vet(fd: impl AsFd, what: &'static str, wanted: SealFlags) -> Result<Vetted, SysError> {
    let hostile = |reason: String| SysError::Vetting { what, reason };
    let stat = rustix::fs::fstat(&fd).map_err(SysError::call("fstat", what))?;
    if stat.st_mode & 0o170_000 != 0o100_000 {
        return Err(hostile(format!("file mode {:o}", stat.st_mode)));
    }
    let system = rustix::fs::fstatfs(&fd).map_err(SysError::call("fstatfs", what))?;
    if system.f_type as u64 != TMPFS_MAGIC {
        return Err(hostile(format!("file system {:#x}, not tmpfs", system.f_type)));
    }
    let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|errno| hostile(format!("F_GET_SEALS says {errno}")))?;
    if !seals.contains(wanted) {
        return Err(hostile(format!(
            "seals {:#x}, wanted {:#x}",
            seals.bits(),
            wanted.bits()
        )));
    }
    let size = u64::try_from(stat.st_size).map_err(|_| hostile(format!("size {}", stat.st_size)))?;
    Ok(Vetted { size, seals })
}

/// Runs a call that may exceed RLIMIT_FSIZE, whose default signal would kill the process: EFBIG is answer enough.
pub(crate) fn without_file_size_signal<T>(call: impl FnOnce() -> T) -> T {
    // SAFETY: sigset_t is plain data for which all zeros is a valid value; the calls get pointers to live locals, and the
    // wait takes with a zero timeout only the SIGXFSZ that this thread's own call may have raised.
    unsafe {
        let mut blocked: libc::sigset_t = core::mem::zeroed();
        let mut before: libc::sigset_t = core::mem::zeroed();
        libc::sigemptyset(&mut blocked);
        libc::sigaddset(&mut blocked, libc::SIGXFSZ);
        libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, &mut before);
        let answer = call();
        if libc::sigismember(&before, libc::SIGXFSZ) == 0 {
            let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            libc::sigtimedwait(&blocked, core::ptr::null_mut(), &zero);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, core::ptr::null_mut());
        answer
    }
}

/// How a [`SharedMapping`] may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nothing may be touched; the mapping only exists.
    None,
    Read,
    ReadWrite,
}

/// A shared mapping of an object at an address of the kernel's choice, unmapped when dropped.
pub(crate) struct SharedMapping {
    address: NonNull<u8>,
    length: usize,
    access: Access,
}

// SAFETY: the mapping is process-wide memory that lives until drop; what is reachable through `&self` is a pointer (whose
// users argue for themselves) or atomics.
unsafe impl Send for SharedMapping {}
// SAFETY: as above.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps `length` bytes from the start of the object.
    pub(crate) fn of(fd: impl AsFd, what: &'static str, length: usize, access: Access) -> Result<Self, SysError> {
        let protection = match access {
            Access::None => ProtFlags::empty(),
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let address = unsafe { rustix::mm::mmap(core::ptr::null_mut(), length, protection, MapFlags::SHARED, fd, 0) }
            .map_err(SysError::call("mmap", what))?;
        // SAFETY: the range was mapped just above and is ours. The advice only keeps it out of core dumps; a kernel that
        // declines changes nothing.
        let _ = unsafe { rustix::mm::madvise(address, length, Advice::LinuxDontDump) };
        let address = NonNull::new(address.cast()).ok_or(SysError::Call {
            call: "mmap",
            what,
            errno: Errno::FAULT,
        })?;
        Ok(SharedMapping {
            address,
            length,
            access,
        })
    }

    /// Fresh zeroed memory of this process alone, without a promise that there is room for all of it.
    pub(crate) fn anonymous(what: &'static str, length: usize) -> Result<Self, SysError> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let address = unsafe {
            rustix::mm::mmap_anonymous(core::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags)
        }
        .map_err(SysError::call("mmap", what))?;
        // SAFETY: just mapped and ours. A few words in a huge page would cost 2 MiB; a kernel that declines has none.
        let _ = unsafe { rustix::mm::madvise(address, length, Advice::LinuxNoHugepage) };
        // SAFETY: mapped above, readable and writable, owned by nobody else.
        Ok(unsafe { SharedMapping::of_range(address.cast(), length, Access::ReadWrite) })
    }

    /// Owns a mapping that exists.
    ///
    /// # Safety
    /// A non-null mapping of this length with this access, which nobody else unmaps as long as this lives, or whose owner never does.
    pub(crate) unsafe fn of_range(address: *mut u8, length: usize, access: Access) -> Self {
        SharedMapping {
            // SAFETY: the caller's promise.
            address: unsafe { NonNull::new_unchecked(address) },
            length,
            access,
        }
    }

    pub(crate) fn length(&self) -> usize {
        self.length
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// The `count` words that start `offset` bytes into the mapping; a read-only mapping must only be loaded from.
    pub(crate) fn words(&self, offset: usize, count: usize) -> &[AtomicU64] {
        let end = count.checked_mul(8).and_then(|bytes| bytes.checked_add(offset));
        assert!(
            offset.is_multiple_of(8) && end.is_some_and(|end| end <= self.length),
            "words outside the mapping"
        );
        assert!(self.access != Access::None, "the mapping is not for touching");
        // SAFETY: inside the mapping by the check above, aligned, mapped until self is dropped; every process reaches these
        // words by atomics only, and any bit pattern is a u64. Loads from a read-only mapping are plain loads on x86-64 and aarch64.
        unsafe { core::slice::from_raw_parts(self.address.as_ptr().add(offset).cast::<AtomicU64>(), count) }
    }

    /// Gives the memory of whole pages of the object back through the mapping, without a descriptor (MADV_REMOVE).
    pub(crate) fn punch(&self, what: &'static str, range: Range<usize>) -> Result<(), SysError> {
        assert!(
            range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE) && range.end <= self.length
        );
        if range.is_empty() {
            return Ok(());
        }
        // SAFETY: inside our mapping; its contents are atomics or bytes that are read as whatever they are.
        unsafe {
            rustix::mm::madvise(
                self.address.as_ptr().add(range.start).cast(),
                range.end - range.start,
                Advice::LinuxRemove,
            )
        }
        .map_err(SysError::call("madvise(MADV_REMOVE)", what))
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, unmapped only here, and every pointer out of it is used under a borrow of self.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_data_are_told_apart() {
        let fd = create("ksmrs-test", 16 * PAGE_SIZE as u64).unwrap();
        let page = PAGE_SIZE as u64;
        reserve(&fd, "test", 4 * page..8 * page).unwrap();
        assert!(data_ranges(&fd, "test", 0..16 * page).unwrap().is_empty());
        rustix::io::pwrite(&fd, &[1; 4 * PAGE_SIZE], 4 * page).unwrap();
        assert_eq!(allocated(&fd, "test").unwrap(), 4 * page);
        let data = |within| {
            data_ranges(&fd, "test", within)
                .unwrap()
                .iter()
                .map(|range| (range.start, range.end))
                .collect::<Vec<_>>()
        };
        assert_eq!(data(0..16 * page), [(4 * page, 8 * page)]);
        assert_eq!(data(5 * page..6 * page), [(5 * page, 6 * page)]);
        punch(&fd, "test", 5 * page..6 * page).unwrap();
        assert_eq!(data(0..16 * page), [(4 * page, 5 * page), (6 * page, 8 * page)]);
        assert_eq!(allocated(&fd, "test").unwrap(), 3 * page);
    }

    #[test]
    fn vetting_names_what_is_missing() {
        let fd = create("ksmrs-test", PAGE_SIZE as u64).unwrap();
        let size = SealFlags::SHRINK | SealFlags::GROW;
        let error = vet(&fd, "page table", size).unwrap_err();
        assert!(error.to_string().contains("page table"), "{error}");
        seal_size(&fd, "test").unwrap();
        assert_eq!(vet(&fd, "page table", size).unwrap().size, PAGE_SIZE as u64);
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        assert!(vet(&pipe, "page table", size).is_err());
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(vet(&null, "page table", size).is_err());
    }

    #[test]
    fn an_impossible_size_is_an_error_and_no_signal() {
        assert!(create("ksmrs-test", u64::MAX).is_err());
        let fd = create("ksmrs-test", 0).unwrap();
        let error = reserve(&fd, "test", 0..1 << 50).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOSPC.raw_os_error()), "{error}");
    }
}
