//! The heap on real memory, with failpoints that hold somebody in the middle of a step while its block is freed and lent again.
//!
//! Each scene runs in a process of its own (this program again), for there is one heap to a process. It waits until the step is
//! reached, never for a while.
#![cfg(feature = "mutants")]

mod tracked;

use ksmrs_sys::checksum::Checksummer;
use ksmrs_sys::failpoint::{self, Failpoint};
use ksmrs_sys::heap::{self, Supply};
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::pagemap::Pagemap;
use ksmrs_sys::protocol::{Page, Span};
use ksmrs_sys::region::Region;
use ksmrs_sys::scan::ScanTools;
use ksmrs_sys::tracking::Userfault;
use ksmrs_sys::{PAGE_SIZE, State};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use tracked::{Frames, PASS, STORE, UNIT, no_huge_pages, states, word};

const WHOLE: Span = Span {
    first: Page(0),
    pages: UNIT,
};
/// More than the heap keeps the memory of.
const LARGE: usize = 40 << 20;

fn table() -> &'static ClientTable {
    static TABLE: OnceLock<ClientTable> = OnceLock::new();
    TABLE.get_or_init(|| ClientTable::create(1 << 16).unwrap().0)
}

fn make(pages: u32) -> Option<Arc<Region>> {
    Region::arena(table(), pages).ok().map(Arc::new)
}

fn end(arena: Arc<Region>) {
    arena.close();
}

/// A block at the beginning of the first arena, which takes part, and holds what frames hold.
fn begin_with(bytes: usize) -> (usize, Arc<Region>) {
    failpoint::configure().unwrap();
    tracked::begin();
    assert!(heap::begin(Supply { make, end }));
    let address = heap::lend(bytes).unwrap().address;
    let arena = heap::region_at(address).unwrap();
    assert_eq!(arena.address(), address, "the first block of all");
    no_huge_pages(address, arena.pages() as usize * PAGE_SIZE);
    (0..UNIT).for_each(|page| word(address, page).store(u64::from(page) + 1, std::sync::atomic::Ordering::Relaxed));
    (address, arena)
}

fn reach(point: Failpoint, before: u32) {
    while failpoint::hits(point) == before {
        std::thread::yield_now();
    }
}

/// A page is compared, with the kernel for a witness of writes; before it is claimed its memory is given back, and lent as zeros.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_discarded_while_compared() {
    let (address, arena) = begin_with(LARGE);
    heap::open_all();
    let (fault, pagemap) = (Userfault::open().unwrap(), Pagemap::open().unwrap());
    let mut tools = ScanTools::new(Checksummer::new(&[1; 16]), STORE, Some(Pagemap::open().unwrap()));
    tools.tracks = true;
    for _ in 0..4 {
        arena.scan(WHOLE, PASS, &mut tools).unwrap().unwrap();
        for wish in tools.wishes.drain(..) {
            arena.fulfil(wish, &fault, &pagemap).unwrap();
        }
    }
    let mut frames = Frames::of_pages(UNIT);
    // Freed, the whole 2 MiB is then mapped anew, and not only emptied: the kernel has no page table there.
    assert_eq!(frames.merge(&arena, Span::one(Page(UNIT - 1))), 1);
    let before = failpoint::hits(Failpoint::MergeCompared);
    std::thread::scope(|threads| {
        threads.spawn(|| frames.merge(&arena, WHOLE));
        reach(Failpoint::MergeCompared, before);
        assert!(heap::free(address));
        let again = heap::lend(LARGE).unwrap();
        assert_eq!((again.address, again.zeros), (address, true));
        heap::open_all();
    });
    for page in 0..UNIT {
        let now = word(address, page).load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(now, 0, "page {page}, lent as zeros");
    }
}

/// A block is freed when it counts as taking part and its pages are just about to.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_freed_while_it_opens() {
    let (address, arena) = begin_with(UNIT as usize * PAGE_SIZE);
    let before = failpoint::hits(Failpoint::BlockOpens);
    std::thread::scope(|threads| {
        threads.spawn(heap::open_all);
        reach(Failpoint::BlockOpens, before);
        assert!(heap::free(address));
    });
    assert_eq!(
        states(&arena, State::Held),
        arena.pages() as usize,
        "free pages take part"
    );
}

fn run(scene: &str, failpoints: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", scene, "--ignored"])
        .env("KSMRS_FAILPOINTS", failpoints);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
}

#[test]
fn what_was_compared_before_it_was_given_back_counts_no_more() {
    run("scene_discarded_while_compared", "merge-compared=delay:1000000");
}

#[test]
fn a_free_waits_for_whoever_opens_the_block() {
    run("scene_freed_while_it_opens", "block-opens=delay:300000");
}
