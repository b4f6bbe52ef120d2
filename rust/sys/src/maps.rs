//! What the kernel says about addresses, ours or another process's: the mappings with their permissions, files and flags (smaps).
//!
//! A look, not a hold: what it tells is true until somebody maps, unmaps or advises there, so the caller must know that the
//! range's owner keeps it. The kernel walks the pages of every mapping up to the range's end: about a millisecond per
//! 100 MB of resident memory, once per opt-in. Nothing is changed here.

use crate::error::SysError;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::{ControlFlow, Range};

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its addresses.
    pub range: Range<usize>,
    /// Readable now.
    pub readable: bool,
    /// Writable now.
    pub writable: bool,
    /// Executable now.
    pub executable: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// Where in the object or file it begins, in bytes.
    pub offset: u64,
    /// Major and minor number of the object's file system; zeros for private anonymous memory.
    pub device: (u32, u32),
    /// Inode of the object; 0 for private anonymous memory.
    pub inode: u64,
    /// Path, or name in brackets; empty for most anonymous memory.
    pub path: String,
    /// The kernel's two-letter flags (VmFlags).
    pub flags: Vec<[u8; 2]>,
    /// Memory protection key; 0 is nobody's.
    pub protection_key: u32,
    /// Bytes of it that have a page in RAM here.
    pub resident: u64,
    /// Bytes of its anonymous memory that are in swap.
    pub swapped: u64,
}

impl Mapped {
    /// Whether the kernel shows this flag.
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    /// For messages: where, how, and what.
    pub fn describe(&self) -> String {
        let letter = |set, letter| if set { letter } else { '-' };
        let path = if self.path.is_empty() { "anonymous" } else { &self.path };
        format!(
            "{:#x}-{:#x} {}{}{}{} {path}",
            self.range.start,
            self.range.end,
            letter(self.readable, 'r'),
            letter(self.writable, 'w'),
            letter(self.executable, 'x'),
            if self.shared { 's' } else { 'p' },
        )
    }
}

/// The mappings that a range touches, in order. Gaps between them are unmapped.
///
/// # Errors
/// /proc is not there, or says what this does not understand.
pub fn over(range: Range<usize>) -> Result<Vec<Mapped>, SysError> {
    let smaps = File::open("/proc/self/smaps").map_err(|error| failed(&error))?;
    read(BufReader::with_capacity(1 << 16, smaps), range).map_err(|error| failed(&error))
}

/// All mappings of a process, in order, from its opened smaps; none of a process that is ending.
///
/// # Errors
/// The kernel's errno.
pub(crate) fn all(smaps: File) -> Result<Vec<Mapped>, SysError> {
    read(BufReader::with_capacity(1 << 16, smaps), 0..usize::MAX).map_err(|error| failed(&error))
}

/// The first mapping of this process that is wanted, as far as one line tells of each: no flags, no sizes, and no page is walked. Holds
/// one at a time: at the mapping limit a list of all would find no memory.
///
/// # Errors
/// /proc is not there.
pub(crate) fn first_outline(wanted: impl Fn(&Mapped) -> bool) -> Result<Option<Mapped>, SysError> {
    let maps = File::open("/proc/self/maps").map_err(|error| failed(&error))?;
    each_line(BufReader::with_capacity(1 << 16, maps), |text| {
        header(text)
            .filter(&wanted)
            .map_or(ControlFlow::Continue(()), ControlFlow::Break)
    })
    .map_err(|error| failed(&error))
}

/// Tells each line until something is found.
fn each_line<T>(mut lines: impl BufRead, mut tell: impl FnMut(&str) -> ControlFlow<T>) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    while {
        line.clear();
        lines.read_until(b'\n', &mut line)? > 0
    } {
        // Paths may hold any byte but the end of the line.
        let text = String::from_utf8_lossy(&line);
        if let ControlFlow::Break(found) = tell(text.trim_end_matches('\n')) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn failed(error: &io::Error) -> SysError {
    SysError::Call {
        call: "read",
        what: "smaps",
        errno: rustix::io::Errno::from_io_error(error).unwrap_or(rustix::io::Errno::IO),
    }
}

fn read(smaps: impl BufRead, range: Range<usize>) -> io::Result<Vec<Mapped>> {
    let mut found: Vec<Mapped> = Vec::new();
    let mut inside = false;
    each_line(smaps, |text| {
        if let Some(flags) = text.strip_prefix("VmFlags:") {
            if let Some(last) = found.last_mut().filter(|_| inside) {
                let two = |flag: &str| flag.as_bytes().try_into().ok();
                last.flags = flags.split_ascii_whitespace().filter_map(two).collect();
            }
        } else if let Some(key) = text.strip_prefix("ProtectionKey:") {
            if let Some(last) = found.last_mut().filter(|_| inside) {
                last.protection_key = key.trim().parse().unwrap_or(0);
            }
        } else if let Some(size) = text.strip_prefix("Rss:") {
            if let Some(last) = found.last_mut().filter(|_| inside) {
                last.resident = bytes(size);
            }
        } else if let Some(size) = text.strip_prefix("Swap:") {
            if let Some(last) = found.last_mut().filter(|_| inside) {
                last.swapped = bytes(size);
            }
        } else if let Some(mapped) = header(text) {
            if mapped.range.start >= range.end {
                return ControlFlow::Break(());
            }
            inside = mapped.range.end > range.start;
            if inside {
                found.push(mapped);
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// `   48 kB` in bytes.
fn bytes(size: &str) -> u64 {
    let kib = size.trim().strip_suffix(" kB").and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0) << 10
}

/// `7f00-7f10 rw-p 00000000 00:00 0   [name]`; `None` for the lines between headers, which begin with a word and a colon.
fn header(line: &str) -> Option<Mapped> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    let mut fields = rest.splitn(5, ' ');
    let modes = fields.next()?.as_bytes();
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?.trim().parse().ok()?;
    let mode = |at: usize, letter: u8| modes.get(at) == Some(&letter);
    Some(Mapped {
        range: start..end,
        readable: mode(0, b'r'),
        writable: mode(1, b'w'),
        executable: mode(2, b'x'),
        shared: mode(3, b's'),
        offset,
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode,
        path: fields.next().unwrap_or_default().trim_start().to_owned(),
        flags: Vec::new(),
        protection_key: 0,
        resident: 0,
        swapped: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{Advice, MapFlags, ProtFlags};

    #[test]
    fn our_own_memory_is_as_we_made_it() {
        const BYTES: usize = 8 * 4096;
        // SAFETY: fresh memory, advised and unmapped by this test alone.
        let start = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let start = rustix::mm::mmap_anonymous(std::ptr::null_mut(), BYTES, access, MapFlags::SHARED).unwrap();
            rustix::mm::madvise(start, BYTES / 2, Advice::LinuxDontDump).unwrap();
            start
        };
        let base = start.addr();
        let found = over(base + 4096..base + BYTES - 4096).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0].range, base..base + BYTES / 2);
        assert!(found[0].has(b"dd") && !found[1].has(b"dd") && found[0].has(b"rd"));
        assert!(found[0].shared && found[0].writable && !found[0].executable && found[0].inode != 0);
        assert!(found[0].describe().contains("rw-s"), "{}", found[0].describe());
        // SAFETY: as above.
        unsafe { rustix::mm::munmap(start, BYTES) }.unwrap();
        assert!(over(base..base + BYTES).unwrap().is_empty());
    }

    #[test]
    fn paths_may_hold_anything() {
        let text = "00400000-00452000 r-xp 00001000 08:02 173521      /usr/a dir/b - c: (deleted)\nSize: 4 kB\nRss:    8 kB\nSwap:  12 kB\nSwapPss:  4 kB\nVmFlags: rd ex lo\n\
                    7f00000000-7f00001000 rw-p 00000000 00:00 0 \nVmFlags: rd wr\n";
        let found = read(text.as_bytes(), 0..usize::MAX).unwrap();
        assert_eq!(found[0].path, "/usr/a dir/b - c: (deleted)");
        assert_eq!(
            (found[0].offset, found[0].device, found[0].inode),
            (0x1000, (8, 2), 173_521)
        );
        assert_eq!(
            (found[0].resident, found[0].swapped, found[1].resident),
            (8192, 12288, 0)
        );
        assert!(found[0].has(b"lo") && found[1].path.is_empty() && found[1].writable);
        assert_eq!(read(text.as_bytes(), 0..0x40_0001).unwrap().len(), 1);
    }
}
