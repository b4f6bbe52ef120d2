//! Dirty tracking on real memory: no write goes unseen, nothing is registered that must not be, and nothing is left registered.

mod tracked;

use ksmrs_sys::checksum::ChecksumWord;
use ksmrs_sys::foreign::Foreign;
use ksmrs_sys::numa::NO_NODE;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::pagemap::Pagemap;
use ksmrs_sys::protocol::{Kind, Page, Span};
use ksmrs_sys::region::Region;
use ksmrs_sys::tracking::{Userfault, Wish};
use ksmrs_sys::{PAGE_SIZE, State, maps};
use std::io::Read;
use std::sync::atomic::Ordering;
use tracked::*;

const BOTH: [Kind; 2] = [Kind::Private, Kind::Shared];

#[test]
fn every_written_page_is_read_again() {
    for kind in BOTH {
        let clean = writes_while_scanning(kind);
        assert!(
            clean > 1000,
            "{kind:?}: {clean} pages were spared, so nothing was tested"
        );
    }
}

#[test]
fn what_nobody_writes_is_read_three_times_and_now_and_then() {
    for kind in BOTH {
        let mut tracked = Tracked::make(3 * UNIT, kind);
        tracked.fill();
        let read: Vec<u32> = (0..6).map(|_| tracked.pass().checksummed).collect();
        let all = 3 * UNIT;
        assert_eq!(read, [all, all, all, 0, 0, 0], "{kind:?}");
        assert_eq!(tracked.mappings(), (1, 1), "one mapping, registered");
        assert_eq!(tracked.region.tracked_pages(), all);
        tracked.word(700).store(9, Ordering::Relaxed);
        let tally = tracked.pass();
        assert_eq!((tally.checksummed, tally.changed, tally.clean), (1, 1, all - 1));
        let at_last: u32 = (0..128).map(|pass| tracked.pass_as(pass).checksummed).sum();
        let turns = if kind == Kind::Private { 1 } else { 2 };
        assert_eq!(at_last, turns * all, "{kind:?}: each page in its turn");
        assert_eq!(tracked.stale(), []);
    }
}

#[test]
fn checksums_with_nodes_and_without_are_never_compared() {
    for kind in BOTH {
        let mut tracked = Tracked::make(UNIT, kind);
        tracked.fill();
        tracked.settle();
        assert_eq!(tracked.pass().clean, UNIT, "{kind:?}");
        for count in [true, false] {
            tracked.tools.count_nodes(count);
            let tally = tracked.pass();
            assert_eq!(
                (tally.checksummed, tally.changed),
                (UNIT, UNIT),
                "{kind:?}, {count}: clean pages too"
            );
            assert_eq!(
                tracked.pass().clean,
                UNIT,
                "{kind:?}, {count}: what is clean keeps its node"
            );
            let checksums = tracked.table.checksums().iter().take(UNIT as usize);
            let nodes = checksums.map(|word| (word.load(Ordering::Relaxed) >> 40) as u8);
            let known = nodes.filter(|node| *node != NO_NODE).count();
            assert!(!count || known == UNIT as usize, "{kind:?}: {known} pages have a node");
            assert_eq!(tracked.stale().is_empty(), !count, "{kind:?}: checksums of bytes alone");
        }
    }
}

#[test]
fn the_kernel_s_own_writes_are_seen() {
    for kind in BOTH {
        let mut tracked = Tracked::make(UNIT, kind);
        tracked.fill();
        tracked.settle();
        let into = tracked.region.address() + 5 * PAGE_SIZE;
        // SAFETY: two pages of the region, which nobody else looks at meanwhile.
        let into =
            unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(into), 2 * PAGE_SIZE) };
        std::fs::File::open("/dev/zero").unwrap().read_exact(into).unwrap();
        let tally = tracked.pass();
        assert_eq!((tally.checksummed, tally.changed), (2, 2), "{kind:?}");
        assert_eq!(tracked.stale(), []);
    }
}

#[test]
fn pages_without_memory_stay_without() {
    let mut tracked = Tracked::make(UNIT, Kind::Private);
    for page in 0..UNIT / 2 {
        tracked.word(page).store(7, Ordering::Relaxed);
    }
    tracked.settle();
    assert_eq!(tracked.region.tracked_pages(), UNIT);
    let tally = tracked.pass();
    assert_eq!(
        (tally.checksummed, tally.clean),
        (0, UNIT / 2),
        "a marker would pass for memory"
    );
    // Zero pages, which have none either, are found when they are written.
    let mut frames = Frames::of(&tracked);
    (0..UNIT / 2).for_each(|page| tracked.word(page).store(0, Ordering::Relaxed));
    let span = Span {
        first: Page(0),
        pages: UNIT / 2,
    };
    frames.merge_zero(&tracked.region, span);
    assert_eq!(states(&tracked.region, State::Zero), 256);
    tracked.settle();
    assert_eq!(states(&tracked.region, State::Zero), 256, "nobody wrote them");
    tracked.word(3).store(3, Ordering::Relaxed);
    tracked.pass();
    assert_eq!(states(&tracked.region, State::Zero), 255);
    assert_eq!(tracked.stale().iter().filter(|page| **page == 3).count(), 0);
}

/// Where a whole unit was mapped anew there is no page table, and a quick look finds nothing written, whatever the words say.
#[test]
fn pages_of_zeros_have_no_checksum_once_they_merged() {
    let mut tracked = Tracked::make(2 * UNIT, Kind::Private);
    let mut frames = Frames::of(&tracked);
    tracked.fill();
    tracked.settle();
    let unit = Span {
        first: Page(0),
        pages: UNIT,
    };
    assert_eq!(frames.merge(&tracked.region, unit), UNIT as usize);
    (0..UNIT).for_each(|page| tracked.word(page).store(0, Ordering::Relaxed));
    tracked.pass();
    assert_eq!(states(&tracked.region, State::Broken), UNIT as usize);
    assert_eq!(tracked.stale(), []);
    assert_eq!(frames.merge_zero(&tracked.region, unit), UNIT as usize);
    tracked.pass();
    let known = |tracked: &Tracked| {
        let checksums = tracked.table.checksums().iter().take(UNIT as usize);
        checksums
            .filter(|word| word.load(Ordering::Relaxed) != ChecksumWord::NONE.0)
            .count()
    };
    assert_eq!(known(&tracked), 0, "they have no memory");
    // Nor have they any when they take part anew: nobody may take them for pages that could merge.
    tracked.region.unadvise(0..UNIT).unwrap();
    tracked.region.advise(0..UNIT).unwrap();
    tracked.pass();
    assert_eq!(states(&tracked.region, State::Private), 2 * UNIT as usize);
    assert_eq!(known(&tracked), 0);
}

#[test]
fn what_merges_is_registered_no_more_and_again_when_it_is_its_own() {
    for kind in BOTH {
        let mut tracked = Tracked::make(2 * UNIT, kind);
        let mut frames = Frames::of(&tracked);
        tracked.fill();
        tracked.settle();
        let middle = Span {
            first: Page(100),
            pages: 200,
        };
        assert_eq!(frames.merge(&tracked.region, middle), 200);
        assert_eq!(tracked.mappings(), (3, 2), "{kind:?}: only what did not merge");
        let tally = tracked.pass();
        assert_eq!((tally.checksummed, tally.clean), (0, 2 * UNIT - 200), "{kind:?}");
        assert_eq!(
            states(&tracked.region, State::Merged),
            200,
            "{kind:?}: none passes for written"
        );
        // Written one after the other: breaks, in whatever manner.
        middle
            .iter()
            .for_each(|page| tracked.word(page.0).store(5, Ordering::Relaxed));
        tracked.settle();
        let tally = tracked.pass();
        assert_eq!((tally.checksummed, tally.clean), (0, 2 * UNIT), "{kind:?}");
        assert_eq!(tracked.stale(), []);
        let (all, registered) = tracked.mappings();
        assert_eq!(all, registered, "{kind:?}");
        assert!(tracked.region.end_tracking());
        tracked.region.untrack(&tracked.fault).unwrap();
        assert_eq!(tracked.mappings().1, 0);
        tracked.settle();
        assert_eq!(tracked.mappings().1, 0, "it ends");
    }
}

#[test]
fn what_lies_between_merged_pages_is_tracked_too() {
    for kind in BOTH {
        let mut tracked = Tracked::make(UNIT, kind);
        let mut frames = Frames::of(&tracked);
        tracked.fill();
        for first in [0, 100, 140, 300] {
            let pages = 5;
            let span = Span {
                first: Page(first),
                pages,
            };
            assert_eq!(frames.merge(&tracked.region, span), 5);
        }
        let (before, _) = tracked.mappings();
        tracked.settle();
        let tally = tracked.pass();
        assert_eq!((tally.checksummed, tally.clean), (0, UNIT - 20), "{kind:?}");
        assert_eq!(tracked.mappings(), (before, 4), "{kind:?}: no mapping was cut");
    }
}

/// Random merges, writes, unmerges and holds, and after each a pass that must know every page that it may look at.
#[test]
fn merged_and_tracked_pages_mixed_at_random() {
    for kind in BOTH {
        let mut tracked = Tracked::make(UNIT + 77, kind);
        let mut frames = Frames::of(&tracked);
        tracked.fill();
        let mut state = 42u64;
        let mut spared = 0;
        for step in 0..120u32 {
            let mut random = |below: u32| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u32 % below
            };
            let first = random(UNIT);
            let span = Span {
                first: Page(first),
                pages: 1 + random(77),
            };
            let range = span.first.0..span.end().0;
            match random(6) {
                0 | 1 => {
                    // Back to what the frames hold, then merged.
                    range.for_each(|page| tracked.word(page).store(u64::from(page) + 1, Ordering::Relaxed));
                    frames.merge(&tracked.region, span);
                }
                2 => range.for_each(|page| tracked.word(page).store(u64::from(step) << 32, Ordering::Relaxed)),
                3 => tracked.region.unadvise(range).unwrap(),
                4 => tracked.region.advise(0..tracked.region.pages()).unwrap(),
                _ => {}
            }
            spared += tracked.pass().clean;
            let seen = tracked.region.page_states();
            let known = |page: &u32| matches!(seen[*page as usize], State::Private | State::Broken | State::Detached);
            let stale: Vec<u32> = tracked.stale().into_iter().filter(known).collect();
            assert_eq!(stale, [], "{kind:?}, step {step}");
        }
        assert!(spared > 2_000, "{kind:?}: {spared}");
    }
}

#[test]
fn a_unit_that_is_always_written_is_left_alone() {
    let mut tracked = Tracked::make(2 * UNIT, Kind::Private);
    tracked.fill();
    tracked.settle();
    assert_eq!(tracked.region.tracked_pages(), 2 * UNIT);
    let mut registered = 0;
    for turn in 0..40u64 {
        (0..UNIT).for_each(|page| tracked.word(page).store(turn << 20, Ordering::Relaxed));
        let tally = tracked.pass();
        assert_eq!(tally.changed, UNIT, "turn {turn}");
        registered += u32::from(tracked.region.tracked_pages() > UNIT);
    }
    assert!(registered <= 1, "registered after {registered} of 40 turns");
    assert_eq!(tracked.region.tracked_pages(), UNIT, "the other one still is");
    for _ in 0..300 {
        tracked.pass();
    }
    assert_eq!(
        tracked.region.tracked_pages(),
        2 * UNIT,
        "and so is the first when it has calmed down"
    );
}

#[test]
fn huge_pages_stay_whole() {
    let mut tracked = Tracked::make_with_huge(2 * UNIT, Kind::Private);
    let start = std::ptr::with_exposed_provenance_mut::<libc::c_void>(tracked.region.address());
    tracked.fill();
    // SAFETY: the region's own pages; the advice changes no byte.
    let collapsed = unsafe { libc::madvise(start, UNIT as usize * PAGE_SIZE, libc::MADV_COLLAPSE) } == 0;
    tracked.settle();
    if collapsed {
        assert!(tracked.region.tracked_pages() <= UNIT);
        let huge = std::fs::read_to_string("/proc/self/smaps").unwrap();
        assert!(
            huge.lines()
                .any(|line| line.starts_with("AnonHugePages:") && !line.contains(" 0 kB"))
        );
    }
    assert_eq!(tracked.stale(), []);
}

/// Adopts memory of this test but for its ends, merges `some` of it with or without tracking, and gives it back. The mappings before
/// and after.
fn adopted_and_given_back(shared: bool, some: u32, tracks: bool) -> [Vec<maps::Mapped>; 2] {
    begin();
    const PAGES: u32 = 2 * UNIT;
    let bytes = PAGES as usize * PAGE_SIZE;
    let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE } | libc::MAP_ANONYMOUS;
    // SAFETY: fresh memory of this test.
    let base = unsafe {
        let start = libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        libc::madvise(start, bytes, libc::MADV_DONTDUMP);
        start.expose_provenance()
    };
    no_huge_pages(base, bytes);
    // As it is mapped, whatever memory it has.
    let look = || -> Vec<maps::Mapped> {
        let found = maps::over(base + PAGE_SIZE..base + bytes - PAGE_SIZE).unwrap();
        let mapped = |mapped| maps::Mapped { resident: 0, ..mapped };
        found.into_iter().map(mapped).collect()
    };
    let before = look();
    // SAFETY: this test keeps the range mapped until the region has left.
    let foreign = unsafe { Foreign::look(base + PAGE_SIZE..base + bytes - PAGE_SIZE, false) }.unwrap();
    let mut tracked = Tracked::adopt(foreign, PAGES - 2);
    tracked.tools.tracks = tracks;
    tracked.region.dismiss();
    tracked.fill();
    tracked.settle();
    assert_eq!(tracked.pass().clean, if tracks { PAGES - 2 } else { 0 });
    if some > 0 {
        let some = Span {
            first: Page(300),
            pages: some,
        };
        assert_eq!(Frames::of(&tracked).merge(&tracked.region, some), some.pages as usize);
    }
    assert_eq!(tracked.region.end_tracking(), tracks);
    tracked.region.untrack(&tracked.fault).unwrap();
    tracked.region.give_back().unwrap();
    let after = look();
    for page in 0..PAGES - 2 {
        assert_eq!(word(base, page + 1).load(Ordering::Relaxed), u64::from(page) + 1);
    }
    // SAFETY: the test's own memory, of no region any more.
    unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(base), bytes) };
    [before, after]
}

#[test]
fn adopted_memory_is_given_back_as_it_was_found() {
    for shared in [false, true] {
        let [before, after] = adopted_and_given_back(shared, 0, true);
        assert_eq!(before, after, "one mapping, with its advice, registered with nothing");
        let [_, tracked] = adopted_and_given_back(shared, 70, true);
        let [_, untracked] = adopted_and_given_back(shared, 70, false);
        let flags = |found: &[maps::Mapped]| found.iter().map(|mapped| mapped.flags.clone()).collect::<Vec<_>>();
        assert_eq!(flags(&tracked), flags(&untracked), "shared: {shared}");
        assert!(flags(&tracked).iter().all(|flags| *flags == before[0].flags));
    }
}

/// Private memory of small pages, as a program makes it.
fn fresh(bytes: usize) -> usize {
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: replaces nothing: the kernel chooses the addresses.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) }.expose_provenance();
    no_huge_pages(base, bytes);
    base
}

/// A wish is being fulfilled while its owner takes the memory back.
#[test]
fn memory_is_given_back_registered_with_nothing_whatever_is_under_way() {
    begin();
    let bytes = UNIT as usize * PAGE_SIZE;
    let (fault, pagemap) = (Userfault::open().unwrap(), Pagemap::open().unwrap());
    for trial in 0..400u32 {
        let base = fresh(bytes);
        (0..UNIT).for_each(|page| word(base, page).store(7, Ordering::Relaxed));
        // SAFETY: this test keeps the range mapped until the region is given back.
        let foreign = unsafe { Foreign::look(base..base + bytes, false) }.unwrap();
        let table: &'static ClientTable = Box::leak(Box::new(ClientTable::create(UNIT).unwrap().0));
        let region = Region::adopt(table, foreign).unwrap();
        let unit = Span {
            first: Page(0),
            pages: UNIT - (base / PAGE_SIZE) as u32 % UNIT,
        };
        let go = std::sync::Barrier::new(2);
        std::thread::scope(|threads| {
            let tracker = threads.spawn(|| {
                go.wait();
                region.fulfil(Wish { unit, track: true }, &fault, &pagemap).unwrap();
            });
            go.wait();
            (0..trial * 20).for_each(|_| std::hint::spin_loop());
            // The thread that fulfils wishes unregisters too, if it is asked to.
            if region.end_tracking() {
                tracker.join().unwrap();
                region.untrack(&fault).unwrap();
            }
            region.give_back().unwrap();
        });
        assert_eq!(mappings(base, UNIT).1, 0, "trial {trial}");
        // SAFETY: the test's own memory, of no region any more.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(base), bytes) };
    }
}

#[test]
fn closing_adopted_memory_ends_its_registration_too() {
    begin();
    let bytes = UNIT as usize * PAGE_SIZE;
    let base = fresh(bytes);
    // SAFETY: this test keeps the range mapped until the region is closed.
    let foreign = unsafe { Foreign::look(base..base + bytes, false) }.unwrap();
    let mut tracked = Tracked::adopt(foreign, UNIT);
    tracked.fill();
    tracked.settle();
    assert_eq!(mappings(base, UNIT).1, 1);
    tracked.region.close();
    assert_eq!(mappings(base, UNIT).1, 0);
    // SAFETY: the test's own memory, of no region any more.
    unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(base), bytes) };
}

#[test]
fn dropping_the_userfaultfd_forgets_everything() {
    let mut tracked = Tracked::make(UNIT, Kind::Private);
    tracked.fill();
    tracked.settle();
    tracked.fault = Userfault::open().unwrap();
    assert_eq!(tracked.mappings(), (1, 0));
    assert_eq!(tracked.pass().checksummed, UNIT, "nothing is known of before");
    tracked.settle();
    assert_eq!((tracked.pass().clean, tracked.mappings()), (UNIT, (1, 1)));
}

#[test]
fn a_child_has_nothing_registered() {
    let mut tracked = Tracked::make(UNIT, Kind::Private);
    tracked.fill();
    tracked.settle();
    let address = tracked.region.address();
    // SAFETY: the child only reads /proc and leaves; other tests of this program run in other threads, so it may wait for their locks:
    // an alarm ends it then.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::alarm(20);
            let found = std::panic::catch_unwind(|| mappings(address, UNIT));
            libc::_exit(i32::from(!matches!(found, Ok((1, 0)))));
        }
        child
    };
    let mut status = 0;
    // SAFETY: a child of ours, and a live integer.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child's memory is registered, or it hung");
    assert_eq!(tracked.pass().clean, UNIT, "the parent's still is");
}
