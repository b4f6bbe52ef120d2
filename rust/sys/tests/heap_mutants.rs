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
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
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
    (0..UNIT).for_each(|page| word(address, page).store(u64::from(page) + 1, Ordering::Relaxed));
    (address, arena)
}

fn reach(point: Failpoint, before: u32) {
    while failpoint::hits(point) == before {
        std::thread::yield_now();
    }
}

fn none_takes_part(arena: &Region, why: &str) {
    assert_eq!(states(arena, State::Held), arena.pages() as usize, "{why}");
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
        let now = word(address, page).load(Ordering::Relaxed);
        assert_eq!(now, 0, "page {page}, lent as zeros");
    }
}

/// A block is freed when it was chosen to take part, and its place is lent as something else.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_freed_while_it_is_chosen() {
    let (address, arena) = begin_with(LARGE);
    let before = failpoint::hits(Failpoint::BlockChosen);
    std::thread::scope(|threads| {
        threads.spawn(|| heap::pass_began(1));
        reach(Failpoint::BlockChosen, before);
        assert!(heap::free(address));
        // Lent in the pass that is under way.
        let other = heap::lend(PAGE_SIZE).unwrap();
        assert_eq!((other.address, other.zeros), (address, true));
    });
    assert_eq!(heap::held().open, 0);
    none_takes_part(&arena, "pages take part that nobody opened");
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
    none_takes_part(&arena, "free pages take part");
}

/// What was pinned is freed, and the pin ends after that; whoever pins memory must not free it, but no other block may pay for it.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_freed_while_pinned() {
    let (address, arena) = begin_with(UNIT as usize * PAGE_SIZE);
    heap::open_all();
    arena.pin(0..UNIT).unwrap();
    assert!(heap::free(address));
    arena.unpin(0..UNIT);
    none_takes_part(&arena, "free pages take part");
}

/// Nothing is to take part any more when a block is just about to.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_withdrawn_while_it_is_chosen() {
    withdrawn_at(Failpoint::BlockChosen);
}

#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_withdrawn_while_it_is_wanted() {
    withdrawn_at(Failpoint::BlockWanted);
}

fn withdrawn_at(point: Failpoint) {
    let (address, arena) = begin_with(UNIT as usize * PAGE_SIZE);
    let before = failpoint::hits(point);
    std::thread::scope(|threads| {
        threads.spawn(heap::open_all);
        reach(point, before);
        heap::withdraw_all().unwrap();
    });
    assert_eq!(heap::held().open, 0, "nothing takes part");
    none_takes_part(&arena, "nothing takes part");
    assert!(heap::begin(Supply { make, end }));
    heap::open_all();
    assert_eq!(states(&arena, State::Private), UNIT as usize);
    assert!(heap::free(address));
}

/// Who pinned memory has given it to a device: it stays where it is when all is withdrawn, and is given up when it is freed.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_withdrawn_while_pinned() {
    let (address, arena) = begin_with(LARGE);
    heap::open_all();
    assert_eq!(Frames::of_pages(UNIT).merge(&arena, WHOLE), UNIT as usize);
    arena.pin(3..5).unwrap();
    let pinned = InPipe::of(address + 3 * PAGE_SIZE);
    heap::withdraw_all().unwrap();
    assert_eq!((heap::held().open, states(&arena, State::Merged)), (0, 0));
    for page in 0..UNIT {
        assert_eq!(word(address, page).load(Ordering::Relaxed), u64::from(page) + 1);
    }
    word(address, 3).store(77, Ordering::Relaxed);
    assert_eq!(pinned.first_word(), 77, "what a device sees is what the program wrote");
    arena.unpin(3..5);
    none_takes_part(&arena, "nothing takes part");
    assert!(heap::begin(Supply { make, end }));
    heap::open_all();
    let back = [State::Private, State::Broken].map(|state| states(&arena, state));
    assert_eq!((heap::held().open, back), (LARGE, [LARGE / PAGE_SIZE - 2, 2]));
    arena.pin(3..5).unwrap();
    heap::withdraw_all().unwrap();
    arena.unpin(3..5);
    assert!(heap::free(address));
    let again = heap::lend(LARGE).unwrap();
    assert_eq!((again.address, again.zeros), (address, true));
    for page in 0..UNIT {
        assert_eq!(
            word(address, page).load(Ordering::Relaxed),
            0,
            "page {page}, lent as zeros"
        );
    }
}

static MAKING: AtomicBool = AtomicBool::new(false);
static FORKING: AtomicBool = AtomicBool::new(false);

/// With the heap's lock, as every arena is made: long enough for a fork that does not wait for it.
fn make_while_forking(pages: u32) -> Option<Arc<Region>> {
    MAKING.store(true, Ordering::SeqCst);
    while !FORKING.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(300));
    make(pages)
}

/// A thread that the child does not have is at the heap when the process forks.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_forked_while_an_arena_is_made() {
    begin_with(UNIT as usize * PAGE_SIZE);
    let make = make_while_forking;
    assert!(heap::begin(Supply { make, end }));
    std::thread::scope(|threads| {
        let lend = threads.spawn(|| heap::lend(2 * LARGE).is_some());
        while !MAKING.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        FORKING.store(true, Ordering::SeqCst);
        // SAFETY: the child asks the heap, which takes its lock, and ends, or is ended.
        let child = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::alarm(10);
                heap::held();
                libc::_exit(0);
            }
            child
        };
        let mut status = 0;
        // SAFETY: a place for the status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child found the heap locked for ever");
        assert!(lend.join().unwrap());
    });
}

/// A page that a pipe has a reference to, as a device would.
struct InPipe(std::fs::File);

impl InPipe {
    fn of(address: usize) -> InPipe {
        let (reader, writer) = std::io::pipe().unwrap();
        let page = libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(address),
            iov_len: PAGE_SIZE,
        };
        // SAFETY: a page of the arena, which is mapped for as long as the pipe is; nothing is written.
        let put = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const page, 1, 0) };
        assert_eq!(put, PAGE_SIZE as isize);
        InPipe(OwnedFd::from(reader).into())
    }

    fn first_word(mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact(&mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }
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

#[test]
fn the_end_of_a_pin_opens_no_free_page() {
    run("scene_freed_while_pinned", "");
}

#[test]
fn a_fork_waits_for_whoever_is_at_the_heap() {
    run("scene_forked_while_an_arena_is_made", "");
}

#[test]
fn a_block_that_was_freed_is_not_opened() {
    run("scene_freed_while_it_is_chosen", "block-chosen=delay:300000");
}

#[test]
fn a_withdrawal_waits_for_whoever_opens_a_block() {
    run("scene_withdrawn_while_it_is_chosen", "block-chosen=delay:300000");
    run("scene_withdrawn_while_it_is_wanted", "block-wanted=delay:300000");
}

#[test]
fn a_withdrawal_leaves_pinned_pages_where_they_are() {
    run("scene_withdrawn_while_pinned", "");
}
