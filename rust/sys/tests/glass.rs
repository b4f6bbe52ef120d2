//! Short runs that are compared through a mapping of the whole store: it shows this store, leaves with it, and is not needed.

mod tracked;

use ksmrs_sys::protocol::{Kind, Page, Span};
use std::sync::atomic::Ordering;
use tracked::{Frames, Tracked, UNIT};

/// Every other page alone, so that there are none but short runs.
fn merges_scattered(frames: &mut Frames, tracked: &Tracked) -> usize {
    let pages = (0..UNIT).step_by(2);
    pages
        .map(|page| frames.merge(&tracked.region, Span::one(Page(page))))
        .sum()
}

/// Shared mappings of its store, which nothing else is; other tests of this process have others.
fn glasses(frames: &Frames) -> usize {
    let inode = rustix::fs::fstat(&frames.file).unwrap().st_ino.to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let is = |line: &&str| line.contains(" r--s ") && line.split_whitespace().nth(4) == Some(&inode);
    maps.lines().filter(is).count()
}

#[test]
fn scattered_pages_merge_through_it_and_it_leaves() {
    for kind in [Kind::Private, Kind::Shared] {
        let tracked = Tracked::make(UNIT, kind);
        tracked.fill();
        let mut frames = Frames::of(&tracked);
        assert!(frames.file.mount_glass());
        assert_eq!(glasses(&frames), 1);
        // One that is not equal is told from the others all the same.
        tracked.word(8).store(0, Ordering::Relaxed);
        assert_eq!(merges_scattered(&mut frames, &tracked), UNIT as usize / 2 - 1);
        frames.file.take_glass_down();
        assert_eq!(glasses(&frames), 0);
        tracked.word(8).store(9, Ordering::Relaxed);
        assert_eq!(frames.merge(&tracked.region, Span::one(Page(8))), 1, "without it");
        for page in 0..UNIT {
            assert_eq!(tracked.word(page).load(Ordering::Relaxed), u64::from(page) + 1);
        }
    }
}

#[test]
fn each_store_has_its_own() {
    let tracked = Tracked::make(UNIT, Kind::Private);
    tracked.fill();
    let mut old = Frames::of(&tracked);
    assert!(old.file.mount_glass());
    // In the new one, the frames of two pages hold what nobody has.
    let mut new = Frames::of(&tracked);
    assert!(new.file.mount_glass());
    for slot in [4, 6] {
        new.punch(slot);
    }
    assert_eq!(merges_scattered(&mut new, &tracked), UNIT as usize / 2 - 2);
    for page in 0..UNIT {
        assert_eq!(tracked.word(page).load(Ordering::Relaxed), u64::from(page) + 1);
    }
    assert_eq!(merges_scattered(&mut old, &tracked), UNIT as usize / 2);
}

#[test]
fn a_child_does_not_inherit_it() {
    let tracked = Tracked::make(UNIT, Kind::Private);
    let frames = Frames::of(&tracked);
    assert!(frames.file.mount_glass());
    // SAFETY: the child looks at its mappings and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let none = glasses(&frames) == 0;
        // SAFETY: ends the child, without what this process would do at its end.
        unsafe { libc::_exit(i32::from(!none)) };
    }
    let mut status = 0;
    // SAFETY: a place for the status.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "a child has it");
}
