//! Memory that the program made and ksmrs may adopt: which memory that is, and how it was advised.
//!
//! A [`Foreign`] is a promise (somebody keeps this range mapped) together with a look at what the range is (`maps.rs`). Whatever
//! the merging protocol would not give back as it found it is refused here, with the reason, before anything is changed.

use crate::error::SysError;
use crate::maps::{self, Mapped};
use crate::object::PAGE_SIZE;
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

/// Private anonymous memory of the program, looked at and found fit.
#[derive(Debug)]
pub struct Foreign {
    pub(crate) address: usize,
    pub(crate) pages: u32,
    pub(crate) advised: Vec<Advised>,
    /// Whether it may be made of huge pages.
    pub(crate) huge: bool,
}

impl Foreign {
    /// Looks at whole pages of the program's own private memory.
    ///
    /// # Errors
    /// [`SysError::Unfit`] with the mapping and the reason.
    ///
    /// # Safety
    /// From now until the region made of it has left, whoever owns `range` keeps it mapped, unmoved and with the access it
    /// has now; nothing else replaces parts of it. Its bytes may be read and written by anybody.
    pub unsafe fn private(range: Range<usize>) -> Result<Foreign, SysError> {
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
        let (mut next, mut huge) = (range.start, false);
        for mapped in maps::over(range.clone())? {
            if mapped.range.start > next {
                break;
            }
            next = mapped.range.end;
            is_fit(&mapped).map_err(|reason| SysError::Unfit {
                mapping: mapped.describe(),
                reason,
            })?;
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
        Ok(Foreign {
            address: range.start,
            pages,
            advised,
            huge,
        })
    }
}

/// What the range is, for whoever must decide how to adopt it: whether all of it is private anonymous memory.
///
/// # Errors
/// As for [`maps::over`].
pub fn is_private(range: Range<usize>) -> Result<bool, SysError> {
    Ok(maps::over(range)?.iter().all(is_anonymous))
}

fn is_anonymous(mapped: &Mapped) -> bool {
    !mapped.shared && mapped.inode == 0
}

fn is_fit(mapped: &Mapped) -> Result<(), &'static str> {
    if mapped.inode != 0 && !mapped.shared {
        return Err("it is a private mapping of a file; copy it with ksmrs.array()");
    }
    if mapped.shared {
        return Err("it is shared memory");
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
    if has_memory_policy(mapped.range.start) {
        return Err("it has a memory policy of its own (mbind)");
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
