//! Forks at the worst moments: within a merge of shared memory, with threads inside regions, and against every lock.

mod regions;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ksmrs_broker::client::{self, Kind, Region};
use ksmrs_sys::protocol::{MergeRun, Page, Span, Verdict};
use ksmrs_sys::remap::RemapTools;
use ksmrs_sys::store::{Store, StoreFile};
use ksmrs_sys::{Slot, State, StoreNumber, fork, page_table, protocol, region};
use regions::{PAGE, alone, filled, forked, merge, wait_for, wrong};

/// A shared region straight on `ksmrs_sys`, with a store of zero frames.
struct Bare {
    region: region::Region,
    file: StoreFile,
    run: MergeRun,
    _store: Store,
}

const PAGES: u32 = 64;

impl Bare {
    fn new() -> Bare {
        // Begins this process's life: fork handlers and the fault handler.
        drop(Region::new(PAGE, Kind::Private).unwrap());
        let (table, _) = page_table::ClientTable::create(4096).unwrap();
        let region = region::Region::create(Box::leak(Box::new(table)), PAGES, protocol::Kind::Shared).unwrap();
        let store = Store::with_slots(2048).unwrap();
        let file = StoreFile::vet(store.read_only().unwrap(), store.slots()).unwrap();
        let run = MergeRun {
            span: Span {
                first: Page(0),
                pages: PAGES,
            },
            store: StoreNumber(1),
            slot: Slot(0),
        };
        let bare = Bare {
            region,
            file,
            run,
            _store: store,
        };
        // Memory of its own, equal to the store's holes.
        (0..PAGES).for_each(|page| bare.write(page, 0));
        bare
    }

    fn byte(&self, page: u32) -> *mut u8 {
        assert!(page < PAGES);
        std::ptr::with_exposed_provenance_mut(self.region.address() + page as usize * PAGE + 1024)
    }

    fn write(&self, page: u32, byte: u8) {
        // SAFETY: inside the region, which is mapped and writable as long as it lives.
        unsafe { self.byte(page).write_volatile(byte) }
    }

    fn read(&self, page: u32) -> u8 {
        // SAFETY: as in `write`.
        unsafe { self.byte(page).read_volatile() }
    }

    fn merge(&self, forks: u32) -> Vec<Verdict> {
        let mut verdicts = vec![Verdict::Failed; PAGES as usize];
        let mut tools = RemapTools::new().unwrap();
        self.region
            .merge(self.run, &self.file, forks, &mut tools, &mut verdicts)
            .unwrap()
            .unwrap();
        verdicts
    }

    /// A child that has written to every page and ended.
    fn written_by_a_child(&self, byte: u8) {
        let child = forked(|| {
            (0..PAGES).for_each(|page| self.write(page, byte));
            0
        });
        assert_eq!(child.ended(), 0);
    }

    /// Memory shared with a child: each sees what the other wrote.
    fn check(&self, byte: u8) {
        assert!(
            (0..PAGES).all(|page| self.read(page) == byte),
            "the child's writes are lost"
        );
    }
}

/// The remapper found that nobody shares the memory, then the process forked, then the merge went on.
#[test]
fn shared_pages_do_not_merge_after_a_fork_within_the_order() {
    alone("shared_pages_do_not_merge_after_a_fork_within_the_order", 20, || {
        let bare = Bare::new();
        let forks = fork::count();
        bare.written_by_a_child(0);
        assert!(bare.merge(forks).iter().all(|verdict| *verdict == Verdict::Busy));
        assert!(!bare.region.page_states().contains(&State::Merged));
        assert!(
            bare.merge(fork::count())
                .iter()
                .all(|verdict| *verdict == Verdict::Merged)
        );
    });
}

/// The pages had merged already, and the fork came before their home pages were freed.
#[test]
fn home_pages_stay_when_a_fork_comes_before_they_are_freed() {
    alone("home_pages_stay_when_a_fork_comes_before_they_are_freed", 20, || {
        let bare = Bare::new();
        let forks = fork::count();
        assert!(bare.merge(forks).iter().all(|verdict| *verdict == Verdict::Merged));
        bare.written_by_a_child(77);
        // The remapper looked before the fork: it believes to be alone.
        bare.region.settle(bare.run.span, true, forks).unwrap().unwrap();
        bare.check(77);
        (0..PAGES).for_each(|page| bare.write(page, 78));
        bare.check(78);
    });
}

/// A parent's thread is inside the region at the fork; the child lets the region go and must not wait for that thread.
#[test]
fn a_child_closes_regions_that_its_parent_is_in() {
    alone("a_child_closes_regions_that_its_parent_is_in", 60, || {
        let mut regions: Vec<_> = (0..4).map(|_| filled(1024, Kind::Private, 1)).collect();
        std::thread::spawn(|| {
            loop {
                merge();
            }
        });
        for round in 0..25 {
            std::thread::sleep(Duration::from_micros(round * 211 % 5000));
            let child = forked(|| {
                let wrong = regions.iter().map(|region| wrong(region, 1)).sum::<usize>();
                regions.clear();
                i32::from(wrong > 0)
            });
            // 14 is SIGALRM: it hung.
            assert_eq!(child.ended(), 0, "round {round}");
        }
    });
}

/// Pins hold a region's pins and wait at the gate, unmerges are in the gate and want pins, forks close the gate: in one order only.
#[test]
fn pins_unmerges_and_forks_never_wait_in_a_circle() {
    alone("pins_unmerges_and_forks_never_wait_in_a_circle", 60, || {
        let both = [1, 2].map(|_| filled(2048, Kind::Private, 1));
        merge();
        let ticks: Arc<[AtomicU64; 3]> = Arc::default();
        let count = |which: usize, mut step: Box<dyn FnMut() + Send>| {
            let ticks = ticks.clone();
            std::thread::spawn(move || {
                loop {
                    step();
                    ticks[which].fetch_add(1, Ordering::Relaxed);
                }
            });
        };
        for page in 0..2 {
            let region = both[0].clone();
            count(
                0,
                Box::new(move || {
                    region.pin(page..page + 1).unwrap();
                    region.unpin(page..page + 1);
                }),
            );
        }
        count(1, Box::new(|| assert_eq!(forked(|| 0).ended(), 0)));
        count(
            2,
            Box::new(|| {
                client::set("run", "2").unwrap();
                client::set("run", "1").unwrap();
                merge();
            }),
        );
        let enough = [300, 120, 3];
        wait_for("pins, forks and unmerges", || {
            let now: Vec<u64> = ticks.iter().map(|count| count.load(Ordering::Relaxed)).collect();
            now.iter().zip(enough).all(|(now, enough)| *now >= enough)
        });
        assert!(both.iter().all(|region| wrong(region, 1) == 0));
    });
}
