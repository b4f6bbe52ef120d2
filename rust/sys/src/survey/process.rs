//! Another process's memory, looked at from outside: its mappings, which of their pages have memory, and the bytes of those.
//!
//! Relies on /proc/PID, opened once: all files are that process's, even when its number is another's by now. Pages are asked for in
//! pagemap first and only those with a frame are read, for reading any other would give it one. They are read through /proc/PID/mem
//! and never with `process_vm_readv`: that pins pages, and the kernel gives a page that a fork or kernel KSM shares a copy before it
//! is pinned (6.18: all pages of a child read so were its own afterwards), so looking would take away what was saved. Nothing
//! is stopped or attached to. What does change is the kernel's idea of how lately a page was used.

use crate::error::SysError;
use crate::foreign;
use crate::maps::{self, Mapped};
use crate::object::PAGE_SIZE;
use crate::pagemap;
use core::ops::Range;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// What a mapping is made of, as far as merging goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Private and anonymous.
    Anonymous,
    /// The heap below the program break.
    Heap,
    /// The first thread's stack.
    Stack,
    /// Shared memory without a file on a disk: anonymous, a memfd, a file on tmpfs.
    Shared,
    /// A private mapping of a file; pages that were written are anonymous memory.
    PrivateFile,
    /// Frames of ksmrs, and the copies that were made of them.
    Frames,
    /// The page cache's, and so shared already.
    File,
    /// Made of hugetlb pages.
    HugeTlb,
    /// The kernel's, a device's, ksmrs's own: nobody reads it.
    Special,
}

impl Kind {
    /// All of them, in the order in which they are told.
    pub const ALL: [Kind; 9] = [
        Kind::Anonymous,
        Kind::Heap,
        Kind::Stack,
        Kind::Shared,
        Kind::PrivateFile,
        Kind::Frames,
        Kind::File,
        Kind::HugeTlb,
        Kind::Special,
    ];

    /// For people and files.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Anonymous => "anonymous",
            Kind::Heap => "heap",
            Kind::Stack => "stack",
            Kind::Shared => "shared memory",
            Kind::PrivateFile => "private file",
            Kind::Frames => "frames of ksmrs",
            Kind::File => "file",
            Kind::HugeTlb => "hugetlb",
            Kind::Special => "special",
        }
    }
}

/// One mapping, and what may be done with its pages.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) pages: Range<u64>,
    pub(super) kind: Kind,
    /// Why ksmrs could not take it; `None` if it could.
    pub(super) unfit: Option<&'static str>,
    /// Whether MADV_MERGEABLE would take its anonymous pages.
    pub(super) kernel: bool,
    pub(super) resident: u64,
    pub(super) swapped: u64,
    /// The object of shared memory, by device and inode.
    pub(super) object: Option<((u32, u32), u64)>,
}

impl Place {
    /// Whether any of its pages could be worth a look.
    pub(super) fn is_read(&self, least_pages: u64) -> bool {
        let kind = !matches!(self.kind, Kind::File | Kind::HugeTlb | Kind::Special);
        kind && self.resident > 0 && self.pages.end - self.pages.start >= least_pages
    }
}

/// Less than this is not opted in: `ksmrs.madvise` refuses it as not worth its bookkeeping.
pub(super) const LEAST_BYTES: usize = 64 << 10;
/// What `madvise(MADV_MERGEABLE)` passes over, by smaps' flags: device memory and what may not grow.
const NOT_THE_KERNELS: [&[u8; 2]; 5] = [b"io", b"pf", b"mm", b"ht", b"de"];

fn place(mapped: &Mapped, is_client: bool) -> Place {
    let device = [b"io", b"pf", b"mm"].into_iter().any(|flag| mapped.has(flag));
    let path = mapped.path.as_str();
    let named = |name: &str| path.starts_with(&format!("/memfd:ksmrs-{name}"));
    let special = path.starts_with('[') && !path.starts_with("[anon");
    let mut unfit = foreign::is_fit(mapped, true).err();
    // Its own regions, which the merging engine registered itself.
    if is_client && unfit.is_some_and(|reason| reason.contains("userfaultfd")) {
        unfit = None;
    }
    let kind = if device || path == "[vvar]" || path == "[vdso]" || path == "[vsyscall]" {
        Kind::Special
    } else if path == "[heap]" {
        Kind::Heap
    } else if path == "[stack]" {
        Kind::Stack
    } else if special {
        Kind::Special
    } else if mapped.has(b"ht") {
        Kind::HugeTlb
    } else if named("store") && !mapped.shared {
        // The copies lie in a region already.
        unfit = None;
        Kind::Frames
    } else if named("") && !named("region") {
        Kind::Special
    } else if mapped.shared {
        if unfit.is_none() { Kind::Shared } else { Kind::File }
    } else if mapped.inode != 0 {
        Kind::PrivateFile
    } else {
        Kind::Anonymous
    };
    if unfit.is_none() && kind != Kind::Frames && mapped.range.len() < LEAST_BYTES {
        unfit = Some("it is smaller than 64 KiB, which costs more than it saves");
    }
    Place {
        pages: (mapped.range.start / PAGE_SIZE) as u64..(mapped.range.end / PAGE_SIZE) as u64,
        kind,
        unfit,
        kernel: !mapped.shared && !NOT_THE_KERNELS.into_iter().any(|flag| mapped.has(flag)),
        resident: mapped.resident / PAGE_SIZE as u64,
        swapped: mapped.swapped / PAGE_SIZE as u64,
        object: (kind == Kind::Shared).then_some((mapped.device, mapped.inode)),
    }
}

/// What pagemap says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    const PRESENT: u64 = 1 << 63;
    const FILE: u64 = 1 << 61;
    const EXCLUSIVE: u64 = 1 << 56;

    pub(super) fn is_present(self) -> bool {
        self.0 & Entry::PRESENT != 0
    }

    /// Its frame belongs to a file or an object, not to anonymous memory.
    pub(super) fn is_file(self) -> bool {
        self.0 & Entry::FILE != 0
    }

    /// No other page table shows its frame.
    pub(super) fn is_exclusive(self) -> bool {
        self.0 & Entry::EXCLUSIVE != 0
    }
}

/// The process is gone, or has another program's memory now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended;

/// A process that is looked at.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    memory: OwnedFd,
    pagemap: OwnedFd,
    pub(super) places: Vec<Place>,
    pub(super) ended: bool,
}

impl Process {
    /// Opens what is needed of a process, and reads which mappings it has.
    ///
    /// # Errors
    /// ESRCH or ENOENT for a process that is none (any more), EACCES or EPERM for one that may not be looked at.
    pub(super) fn open(pid: u32) -> Result<Process, SysError> {
        let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(format!("/proc/{pid}"), folder, Mode::empty())
            .map_err(SysError::call("open", "/proc/PID"))?;
        let file = |name: &'static str| {
            rustix::fs::openat(&folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(SysError::call("open", name))
        };
        // What needs most is asked for first.
        let (memory, pagemap, smaps) = (file("mem")?, file("pagemap")?, file("smaps")?);
        let mapped = maps::all(smaps.into())?;
        let is_client = mapped
            .iter()
            .any(|mapped| mapped.path.starts_with("/memfd:ksmrs-table"));
        Ok(Process {
            pid: pid.cast_signed(),
            memory,
            pagemap,
            places: mapped.iter().map(|mapped| place(mapped, is_client)).collect(),
            ended: false,
        })
    }

    /// What pagemap says of the pages from `first` on, as many as there is room for; an unmapped page is not present.
    pub(super) fn entries(&self, first: u64, room: &mut [Entry]) -> Result<(), Ended> {
        const AT_ONCE: usize = 512;
        let mut bytes = [0_u8; AT_ONCE * 8];
        for (index, part) in room.chunks_mut(AT_ONCE).enumerate() {
            let wanted = &mut bytes[..part.len() * 8];
            let at = (first + (index * AT_ONCE) as u64) * 8;
            match read_all(&self.pagemap, wanted, at) {
                Ok(read) if read == wanted.len() => {}
                _ => return Err(Ended),
            }
            for (entry, bytes) in part.iter_mut().zip(wanted.as_chunks::<8>().0) {
                *entry = Entry(u64::from_ne_bytes(*bytes));
            }
        }
        Ok(())
    }

    /// The first of some pages that is in RAM, or the end of them; their first one where the kernel cannot tell.
    pub(super) fn first_present(&self, pages: Range<u64>) -> u64 {
        let (first, end) = (pages.start, pages.end);
        pagemap::first_present(&self.pagemap, pages).map_or(first, |found| found.unwrap_or(end))
    }

    /// Whether two processes have one and the same memory, as threads have, and a child of vfork.
    pub(super) fn has_memory_of(&self, other: &Process) -> bool {
        const VM: libc::c_long = 1;
        let (ours, theirs) = (libc::c_long::from(self.pid), libc::c_long::from(other.pid));
        // SAFETY: numbers only; two processes are compared, and nothing is changed.
        self.layout() == other.layout()
            && unsafe { libc::syscall(libc::SYS_kcmp, ours, theirs, VM, 0_usize, 0_usize) } == 0
    }

    /// Equal where the memory is the same.
    fn layout(&self) -> (usize, Option<u64>, Option<u64>) {
        let ends = (self.places.first(), self.places.last());
        (
            self.places.len(),
            ends.0.map(|place| place.pages.start),
            ends.1.map(|place| place.pages.start),
        )
    }

    /// Reads bytes at an address; how many could be: fewer where a mapping ended meanwhile.
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<usize, Ended> {
        match read_all(&self.memory, bytes, address) {
            Ok(0) => Err(Ended),
            Ok(read) => Ok(read),
            // The kernel's word for a page that is mapped no more.
            Err(Errno::IO | Errno::FAULT) => Ok(0),
            Err(_) => Err(Ended),
        }
    }
}

fn read_all(file: &OwnedFd, bytes: &mut [u8], at: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(file, &mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// An empty entry, to begin with.
pub(super) const NOTHING: Entry = Entry(0);
