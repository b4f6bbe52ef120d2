//! Memory that the program made and ksmrs may adopt: which memory that is, and how it was advised.
//!
//! A [`Foreign`] is a promise (somebody keeps this range mapped) together with a look at what the range is (`maps.rs`). Whatever
//! the merging protocol would not give back as it found it is refused here, with the reason, before anything is changed.

use crate::careful;
use crate::error::SysError;
use crate::maps::{self, Mapped};
use crate::object::{self, PAGE_SIZE};
use crate::sharers::ObjectId;
use rustix::mm::Advice;
use std::ops::Range;

/// Flags that remapping would lose or that make remapping wrong, and what to tell whoever owns such memory.
const REFUSED: [(&[u8; 2], &str); 13] = [
    (b"gd", "it is a stack"),
    (b"lo", "it is locked in memory (mlock); munlock it first"),
    (b"ht", "it is made of hugetlb pages"),
    (b"io", "it is device memory"),
    (b"pf", "it is device memory"),
    (b"mm", "it is device memory"),
    (b"dc", "children must not inherit it (MADV_DONTFORK)"),
    (b"wf", "it is wiped in children (MADV_WIPEONFORK)"),
    (b"sl", "it is sealed (mseal)"),
    (b"ss", "it is a shadow stack"),
    (b"um", "it is registered with userfaultfd"),
    (b"uw", "it is registered with userfaultfd"),
    (b"mt", "its pages are tagged (MTE)"),
];

/// Advice that can be given again, by the flag that shows it.
const ADVICE: [(&[u8; 2], Advice); 4] = [
    (b"hg", Advice::LinuxHugepage),
    (b"nh", Advice::LinuxNoHugepage),
    (b"dd", Advice::LinuxDontDump),
    (b"mg", Advice::LinuxMergeable),
];

/// Advice that a part of adopted memory had, to be given again when it leaves.
#[derive(Clone, Debug)]
pub(crate) struct Advised {
    /// Bytes from the region's first.
    pub(crate) bytes: Range<usize>,
    pub(crate) advice: Advice,
}

/// The object behind shared memory of the program's own making.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// What the kernel knows it by.
    pub id: ObjectId,
    /// Where in it the region begins, in bytes.
    pub offset: u64,
    /// Whether it can be opened by a name, so that a lease must guard it. (The kernel leases no memfd; of those the program says that
    /// nobody else has them.)
    pub opens: bool,
}

/// Memory of the program, private and anonymous or of one shared object, looked at and found fit.
#[derive(Debug)]
pub struct Foreign {
    pub(crate) address: usize,
    pub(crate) pages: u32,
    pub(crate) advised: Vec<Advised>,
    /// Whether it may be made of huge pages.
    pub(crate) huge: bool,
    /// What shared memory is made of.
    pub(crate) object: Option<Object>,
}

impl Foreign {
    /// Its addresses.
    pub(crate) fn range(&self) -> Range<usize> {
        self.address..self.address + self.pages as usize * PAGE_SIZE
    }

    /// Looks at whole pages of the program's own memory. `exclusive` says that nobody else was given a descriptor of a memfd.
    ///
    /// # Errors
    /// [`SysError::Unfit`] with the mapping and the reason.
    ///
    /// # Safety
    /// From now until the region made of it has left, whoever owns `range` keeps it mapped, unmoved and with the access it
    /// has now; nothing else replaces parts of it. Its bytes may be read and written by anybody.
    pub unsafe fn look(range: Range<usize>, exclusive: bool) -> Result<Foreign, SysError> {
        let whole = range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE);
        let pages = u32::try_from(range.len() / PAGE_SIZE).ok();
        let nowhere = |reason| SysError::Unfit {
            mapping: format!("{:#x}-{:#x}", range.start, range.end),
            reason,
        };
        let pages = pages
            .filter(|pages| whole && *pages > 0)
            .ok_or_else(|| nowhere("it is not a number of whole pages"))?;
        let mut advised = Vec::new();
        let mut first: Option<Mapped> = None;
        let (mut next, mut huge) = (range.start, false);
        for mapped in maps::over(range.clone())? {
            if mapped.range.start > next {
                break;
            }
            next = mapped.range.end;
            let unfit = |reason| SysError::Unfit {
                mapping: mapped.describe(),
                reason,
            };
            is_fit(&mapped, exclusive).map_err(unfit)?;
            if has_memory_policy(mapped.range.start) {
                return Err(unfit("it has a memory policy of its own (mbind)"));
            }
            match &first {
                None => first = Some(mapped.clone()),
                Some(first) => continues(first, &mapped).map_err(unfit)?,
            }
            let bytes = mapped.range.start.max(range.start) - range.start..next.min(range.end) - range.start;
            for (flag, advice) in ADVICE.into_iter().filter(|(flag, _)| mapped.has(flag)) {
                let bytes = bytes.clone();
                huge |= flag == b"hg";
                advised.push(Advised { bytes, advice });
            }
        }
        if next < range.end {
            return Err(nowhere("parts of it are not mapped"));
        }
        let first = first.filter(|first| first.shared);
        if let Some(first) = &first
            && let Some(other) = shown_elsewhere(first, &range)?
        {
            return Err(SysError::Unfit {
                mapping: other.describe(),
                reason: "it maps the same object once more, and what merges would be missing there; unmap it first",
            });
        }
        let object = first.map(|first| object_at(&first, range.start));
        if object.is_some() && !(careful::is_there(range.start)? && careful::is_there(range.end - PAGE_SIZE)?) {
            return Err(nowhere("its object ends before it does"));
        }
        Ok(Foreign {
            address: range.start,
            pages,
            advised,
            huge,
            object,
        })
    }
}

/// How the kernel shows mappings of shared anonymous memory, which has no name and cannot be opened.
const SHARED_ANONYMOUS: &str = "/dev/zero (deleted)";
const MEMFD: &str = "/memfd:";

fn object_at(mapped: &Mapped, address: usize) -> Object {
    Object {
        id: ObjectId {
            device: rustix::fs::makedev(mapped.device.0, mapped.device.1),
            inode: mapped.inode,
        },
        offset: mapped.offset + (address - mapped.range.start) as u64,
        opens: mapped.path != SHARED_ANONYMOUS && !mapped.path.starts_with(MEMFD),
    }
}

/// Whether two mappings in a row can be one region: both private, or the same object going on. The home view is made from the
/// first one and takes its advice, so a shared region has the same advice everywhere.
fn continues(first: &Mapped, mapped: &Mapped) -> Result<(), &'static str> {
    if first.shared != mapped.shared {
        return Err("a part of the range is shared, another private");
    }
    if !mapped.shared {
        return Ok(());
    }
    let distance = (mapped.range.start - first.range.start) as u64;
    if (first.device, first.inode, first.offset + distance) != (mapped.device, mapped.inode, mapped.offset) {
        return Err("it is made of several objects, or of one out of order");
    }
    // All of it gets "nh" while it is a region, and parts that were one have it still.
    let mut that_matter = ADVICE.iter().filter(|(flag, _)| *flag != b"nh");
    if that_matter.any(|(flag, _)| first.has(flag) != mapped.has(flag)) {
        return Err("its parts were advised differently");
    }
    Ok(())
}

/// Another mapping of this process that shows some of what the range, which begins in `first`, shows of its object.
fn shown_elsewhere(first: &Mapped, range: &Range<usize>) -> Result<Option<Mapped>, SysError> {
    let begin = object_at(first, range.start).offset;
    let shown = begin..begin + range.len() as u64;
    maps::first_outline(|other| {
        let apart = other.range.end <= range.start || range.end <= other.range.start;
        let same = (other.device, other.inode) == (first.device, first.inode);
        apart && same && other.offset < shown.end && shown.start < other.offset + other.range.len() as u64
    })
}

/// The device that shared anonymous memory lives on, and memfds with it: a mount of the kernel's own.
fn internal_device() -> Option<(u32, u32)> {
    let device = rustix::fs::fstat(object::create("ksmrs-probe", 0).ok()?).ok()?.st_dev;
    Some((rustix::fs::major(device), rustix::fs::minor(device)))
}

/// Whether a shared mapping is of memory that can be merged: shared anonymous, a memfd, or a file on tmpfs. Which it is shows in its
/// path and device; a lease, or the file system's own number, proves it before anything merges.
fn is_memory(mapped: &Mapped, exclusive: bool) -> Result<(), &'static str> {
    if Some(mapped.device) == internal_device() {
        return match mapped.path.as_str() {
            SHARED_ANONYMOUS => Ok(()),
            path if path.starts_with(MEMFD) && exclusive => Ok(()),
            path if path.starts_with(MEMFD) => {
                Err("it is a memfd, which others may have a descriptor of; say exclusive=True if nobody has")
            }
            _ => Err("it is System V shared memory or the like, which others may attach unseen"),
        };
    }
    if is_on_tmpfs(&mapped.path) {
        Ok(())
    } else {
        Err("it is a mapping of a file; copy it with ksmrs.array()")
    }
}

/// Whether a path, which may have been unlinked, lies on a tmpfs.
fn is_on_tmpfs(path: &str) -> bool {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    rustix::fs::statfs(if folder.is_empty() { "/" } else { folder })
        .is_ok_and(|system| system.f_type as u64 == object::TMPFS_MAGIC)
}

/// Whether a mapping is memory that could be opted in, and why not, as far as smaps tells (memory policies are not in it).
pub(crate) fn is_fit(mapped: &Mapped, exclusive: bool) -> Result<(), &'static str> {
    if mapped.inode != 0 && !mapped.shared {
        return Err("it is a private mapping of a file; copy it with ksmrs.array()");
    }
    if mapped.shared {
        is_memory(mapped, exclusive)?;
    }
    if mapped.executable {
        return Err("it is executable");
    }
    if !(mapped.readable && mapped.writable) {
        return Err("it is not readable and writable");
    }
    match mapped.path.as_str() {
        "[stack]" | "[vdso]" | "[vvar]" => return Err("it is the kernel's or a stack"),
        _ => {}
    }
    if mapped.protection_key != 0 {
        return Err("it has a protection key");
    }
    match REFUSED.iter().find(|(flag, _)| mapped.has(flag)) {
        Some((_, reason)) => Err(reason),
        None => Ok(()),
    }
}

/// Whether mbind was called on the mapping at an address. A kernel without NUMA has no policies.
fn has_memory_policy(address: usize) -> bool {
    const OF_ADDRESS: libc::c_ulong = 2;
    let mut mode: libc::c_int = 0;
    // SAFETY: the kernel writes the mode of the mapping at the address, and no node mask, since there is no room for one.
    let answer = unsafe {
        let no_mask = std::ptr::null_mut::<libc::c_ulong>();
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, no_mask, 0, address, OF_ADDRESS)
    };
    answer == 0 && mode != 0
}
