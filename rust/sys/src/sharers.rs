//! Who else has a shared object: processes that map it or hold a descriptor of it, asked of /proc.
//!
//! Merging takes an object's pages out of the object, so nobody else may be looking. Life pages tell of children forked since
//! this process began to use ksmrs, a lease of everybody who opens the object anew; this tells of those who had it before. It
//! relies on being asked while no other process can give the object away, and believes in strangers only as far as they
//! cannot have it: a process that may not be looked into, though it is the same user's and may be a relative, counts as one
//! that has it.

use crate::error::SysError;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a shared object is known by: its file system's device number and its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// As in `st_dev`.
    pub device: u64,
    /// As in `st_ino`.
    pub inode: u64,
}

impl ObjectId {
    /// What a descriptor is of.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn of(fd: impl AsFd) -> Result<ObjectId, SysError> {
        let stat = rustix::fs::fstat(fd).map_err(SysError::call("fstat", "shared object"))?;
        Ok(ObjectId {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }

    /// What a link leads to; `None` if it leads nowhere by now.
    pub(crate) fn behind(link: &Path) -> Option<ObjectId> {
        let file = fs::metadata(link).ok()?;
        Some(ObjectId {
            device: file.dev(),
            inode: file.ino(),
        })
    }
}

/// Why an object is not this process's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharer {
    /// That process maps it.
    Maps(u32),
    /// That process holds a descriptor of it.
    Holds(u32),
    /// That process may have it and cannot be looked into.
    Hidden(u32),
    /// This process was forked by one that is not to be seen from here.
    Ancestor,
    /// /proc does not tell.
    NoProc,
}

impl fmt::Display for Sharer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sharer::Maps(pid) => write!(f, "process {pid} maps it too"),
            Sharer::Holds(pid) => write!(f, "process {pid} has it open too"),
            Sharer::Hidden(pid) => write!(f, "process {pid} may have it and cannot be looked into"),
            Sharer::Ancestor => write!(f, "the process that this one was forked from cannot be seen from here"),
            Sharer::NoProc => write!(f, "/proc does not tell who else has it"),
        }
    }
}

/// For each object that any other process has, or may have, the first one found. One look at /proc for all of them. The broker may hold
/// descriptors: it leases objects, and knows which client each is leased for.
pub fn of(objects: &BTreeSet<ObjectId>, broker: u32) -> BTreeMap<ObjectId, Sharer> {
    let mut found = BTreeMap::new();
    if !objects.is_empty() && look(objects, broker, &mut found).is_err() {
        for object in objects {
            found.insert(*object, Sharer::NoProc);
        }
    }
    found
}

/// A process may fork while it is looked for, and end: so this looks until no process is new.
fn look(objects: &BTreeSet<ObjectId>, broker: u32, found: &mut BTreeMap<ObjectId, Sharer>) -> std::io::Result<()> {
    let own = std::process::id();
    let us = Kinship::of(own).ok_or(std::io::ErrorKind::NotFound)?;
    let all = |sharer: Sharer| objects.iter().map(move |object| (*object, sharer.clone()));
    if us.forked && !ancestors_are_seen(&us) {
        found.extend(all(Sharer::Ancestor));
        return Ok(());
    }
    let mut seen = BTreeSet::from([own]);
    loop {
        let before = seen.len();
        for pid in processes()?.into_iter().filter(|pid| seen.insert(*pid)) {
            let mut has = |object, sharer| {
                if objects.contains(&object) && sharer != Sharer::Holds(broker) {
                    found.entry(object).or_insert(sharer);
                }
            };
            if let Err(error) = look_into(pid, &mut has)
                && !is_gone(&error)
                && may_be_relative(pid, &us)
            {
                for (object, sharer) in all(Sharer::Hidden(pid)) {
                    found.entry(object).or_insert(sharer);
                }
            }
        }
        if seen.len() == before || found.len() == objects.len() {
            return Ok(());
        }
    }
}

fn processes() -> std::io::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// Tells what a process maps shared, and what it holds descriptors of.
fn look_into(pid: u32, has: &mut impl FnMut(ObjectId, Sharer)) -> std::io::Result<()> {
    let maps = fs::read(format!("/proc/{pid}/maps"))?;
    for object in maps.split(|byte| *byte == b'\n').filter_map(mapped_object) {
        has(object, Sharer::Maps(pid));
    }
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        if let Some(object) = ObjectId::behind(&descriptor.path()) {
            has(object, Sharer::Holds(pid));
        }
    }
    Ok(())
}

/// The process ended meanwhile.
fn is_gone(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The object of a line of a maps file, `7f00-7f10 rw-s 00000000 00:01 1234   /path`; `None` without one.
fn mapped_object(line: &[u8]) -> Option<ObjectId> {
    let mut fields = line
        .split(|byte| *byte == b' ')
        .map(|field| std::str::from_utf8(field).unwrap_or_default())
        .skip(3);
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?.parse().ok().filter(|inode| *inode != 0)?;
    let (major, minor) = (
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    Some(ObjectId {
        device: rustix::fs::makedev(major, minor),
        inode,
    })
}

/// What decides whether a process can have come to an object of ours by descent.
struct Kinship {
    /// Whether it ended and waits for its parent to ask: it has nothing any more, and may not be looked into.
    ended: bool,
    parent: u32,
    /// Whether it runs the image of the process it was forked from (PF_FORKNOEXEC).
    forked: bool,
    /// In clock ticks since boot.
    started: u64,
}

impl Kinship {
    /// /proc/PID/stat, which anybody may read.
    fn of(pid: u32) -> Option<Kinship> {
        const FORKNOEXEC: u32 = 0x40;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may hold anything.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let flags: u32 = fields.nth(4)?.parse().ok()?;
        let threads: u32 = fields.nth(10)?.parse().ok()?;
        let started = fields.nth(1)?.parse().ok()?;
        Some(Kinship {
            // Its first thread may have ended before the others.
            ended: matches!(state, "Z" | "X") && threads <= 1,
            parent,
            forked: flags & FORKNOEXEC != 0,
            started,
        })
    }
}

/// Whether the process whose image this one runs is to be seen. One that is reparented has a parent that ran exec.
fn ancestors_are_seen(us: &Kinship) -> bool {
    let mut parent = us.parent;
    while parent != 0 {
        match Kinship::of(parent) {
            Some(kin) if kin.forked => parent = kin.parent,
            Some(_) => return true,
            None => return false,
        }
    }
    false
}

/// A process of this user that was started after this one, or that may be this one's parent. Others never had a way to it but to be sent a
/// descriptor, which the program knows of.
fn may_be_relative(pid: u32, us: &Kinship) -> bool {
    let Some(them) = Kinship::of(pid) else { return false };
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
        return false;
    };
    let ours = rustix::process::getuid().as_raw().to_string();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let same = uids.is_some_and(|uids| uids.split_ascii_whitespace().any(|uid| uid == ours));
    // A kernel thread is readable and empty; it does not come here.
    same && !them.ended && (us.forked || them.started >= us.started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_maps_or_holds_it_is_found() {
        let fd = crate::object::create("ksmrs-test", 4096).unwrap();
        let object = ObjectId::of(&fd).unwrap();
        let objects = BTreeSet::from([object]);
        // What another test starts just now has copies of all descriptors until its exec.
        let nobody_but = |broker| {
            let begun = std::time::Instant::now();
            while let Some(sharer) = of(&objects, broker).get(&object) {
                assert!(begun.elapsed().as_secs() < 10, "{sharer}");
            }
        };
        nobody_but(0);
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(fd.try_clone().unwrap())
            .spawn()
            .unwrap();
        nobody_but(child.id());
        assert_eq!(of(&objects, 0).get(&object), Some(&Sharer::Holds(child.id())));
        drop(child.stdin.take());
        child.wait().unwrap();
        nobody_but(0);
    }

    #[test]
    fn a_process_that_ended_has_nothing() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let us = Kinship::of(std::process::id()).unwrap();
        while !Kinship::of(child.id()).unwrap().ended {
            std::thread::yield_now();
        }
        let them = Kinship::of(child.id()).unwrap();
        assert!(them.parent == std::process::id() && them.started >= us.started && !us.ended);
        assert!(!may_be_relative(child.id(), &us));
        child.wait().unwrap();
    }

    #[test]
    fn a_line_of_maps_names_it_by_device_and_inode() {
        let line = b"7f00-7f10 rw-s 00000000 00:1a 1234                   /dev/shm/\xff x";
        let object = ObjectId {
            device: rustix::fs::makedev(0, 0x1a),
            inode: 1234,
        };
        assert_eq!(mapped_object(line), Some(object));
        assert_eq!(mapped_object(b"7f00-7f10 rw-p 00000000 00:00 0 "), None);
        assert_eq!(mapped_object(b""), None);
        let own: Vec<ObjectId> = fs::read("/proc/self/maps")
            .unwrap()
            .split(|byte| *byte == b'\n')
            .filter_map(mapped_object)
            .collect();
        assert!(!own.is_empty(), "this program is mapped from a file");
    }
}
