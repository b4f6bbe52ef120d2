//! Mutants on real memory that no honest broker can lead into their error: driven here without one.
//!
//! Each scene runs in a process of its own (this program again), since a mutant may crash it, with the failpoints that widen its
//! window. Expected contents are kept outside of the region. Without the mutant every scene passes.
#![cfg(feature = "mutants")]

mod tracked;

use ksmrs_sys::checksum::Checksummer;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::pagemap::Pagemap;
use ksmrs_sys::protocol::{Kind, MergeRun, Page, Span, Verdict};
use ksmrs_sys::region::Region;
use ksmrs_sys::remap::RemapTools;
use ksmrs_sys::scan::ScanTools;
use ksmrs_sys::staging::{Staging, StagingView};
use ksmrs_sys::store::{Store, StoreFile};
use ksmrs_sys::{PAGE_SIZE, Slot, State, StoreNumber, failpoint, fork, mutant, signal};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const STORE: StoreNumber = StoreNumber(1);
const PAUSE: Duration = Duration::from_millis(700);
const MUTANT: &str = "KSMRS_SCENE_MUTANT";

/// A region, and a store with a frame for each of its pages.
struct Stage {
    region: Region,
    store: Store,
    file: StoreFile,
}

impl Stage {
    fn set(page: u8, frame: u8) -> Stage {
        Stage::of(Kind::Private, 1, page, frame)
    }

    fn of(kind: Kind, pages: u32, page: u8, frame: u8) -> Stage {
        failpoint::configure().unwrap();
        assert!(mutant::choose(std::env::var(MUTANT).ok().as_deref()));
        fork::begin_life(|_| ()).unwrap();
        signal::install().unwrap();
        let table: &'static ClientTable = Box::leak(Box::new(ClientTable::create(512).unwrap().0));
        let region = Region::create(table, pages, kind).unwrap();
        let store = Store::with_slots(512).unwrap();
        let (staging, fd) = Staging::create().unwrap();
        for at in 0..pages {
            staging.write_page(at, &[frame; PAGE_SIZE]);
        }
        store.fill(Slot(0), &StagingView::open(&fd).unwrap(), 0, pages).unwrap();
        let file = StoreFile::vet(store.read_only().unwrap(), store.slots()).unwrap();
        let stage = Stage { region, store, file };
        for at in 0..stage.region.pages() as usize * PAGE_SIZE {
            stage.write(at, page);
        }
        stage
    }

    fn byte(&self, at: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.region.address() + at)
    }

    fn write(&self, at: usize, value: u8) {
        // SAFETY: a byte of the region, which is mapped, readable and writable, while the stage lives.
        unsafe { self.byte(at).write_volatile(value) }
    }

    fn read(&self, at: usize) -> u8 {
        // SAFETY: as above.
        unsafe { self.byte(at).read_volatile() }
    }

    fn merge(&self, tools: &mut RemapTools) -> Verdict {
        self.merge_all(tools)[0]
    }

    fn merge_all(&self, tools: &mut RemapTools) -> Vec<Verdict> {
        let span = Span {
            first: Page(0),
            pages: self.region.pages(),
        };
        let run = MergeRun {
            span,
            store: STORE,
            slot: Slot(0),
        };
        let mut verdicts = vec![Verdict::Busy; span.pages as usize];
        let merged = self.region.merge(run, &self.file, fork::count(), tools, &mut verdicts);
        merged.unwrap().unwrap();
        let settles = |page: &Page| self.region.kind() == Kind::Shared && verdicts[page.0 as usize] == Verdict::Merged;
        for page in span.iter().filter(settles) {
            self.region
                .settle(Span::one(page), true, fork::count())
                .unwrap()
                .unwrap();
        }
        verdicts
    }
}

/// A page that never equals its frame is frozen and thawed in bursts, while a writer whose handler is slow keeps writing it.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_slow_handler() {
    let stage = Stage::set(1, 2);
    let until = Instant::now() + Duration::from_secs(6);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut tools = RemapTools::new().unwrap();
            while Instant::now() < until - PAUSE {
                for _ in 0..5 {
                    stage.merge(&mut tools);
                }
                // Long enough for a writer that finds its page read-only for good to give up.
                std::thread::sleep(PAUSE);
            }
        });
        let mut value = 0u8;
        while Instant::now() < until {
            value = value.wrapping_add(1);
            stage.write(7, value);
            assert_eq!(stage.read(7), value);
        }
    });
}

/// A scan has seen that the page was written; before it says so the page is unmerged, restored and merged again.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_old_evidence() {
    let stage = Stage::set(3, 3);
    let mut tools = RemapTools::new().unwrap();
    assert_eq!(stage.merge(&mut tools), Verdict::Merged);
    stage.write(9, 4);
    std::thread::scope(|threads| {
        let (began, scan) = std::sync::mpsc::channel();
        let stage = &stage;
        threads.spawn(move || {
            let mut tools = ScanTools::new(Checksummer::new(&[1; 16]), STORE, Some(Pagemap::open().unwrap()));
            began.send(()).unwrap();
            stage.region.scan(Span::one(Page(0)), 1, &mut tools).unwrap().unwrap();
        });
        scan.recv().unwrap();
        // The failpoint holds the scan for a second at its evidence: half of that is soon enough to have it, and early enough.
        std::thread::sleep(Duration::from_millis(300));
        stage.region.unadvise(0..1).unwrap();
        stage.write(9, 3);
        stage.region.advise(0..1).unwrap();
        assert_eq!(stage.merge(&mut tools), Verdict::Moved);
    });
    // Whoever frees frames believes the words.
    if stage.region.page_states()[0] != State::Merged {
        stage.store.punch(Slot(0), 1).unwrap();
    }
    assert!(
        (0..PAGE_SIZE).all(|at| stage.read(at) == 3),
        "the page shows a frame that was freed"
    );
}

/// A block of a shared region breaks around a page that somebody writes all the time, which is never merged.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_bridges_under_a_writer() {
    const WRITTEN: usize = 7;
    let stage = Stage::of(Kind::Shared, 16, 3, 3);
    for at in 0..PAGE_SIZE {
        stage.write(WRITTEN * PAGE_SIZE + at, 0);
    }
    let ended = AtomicBool::new(false);
    /// Ends the writer, also where the scene fails.
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|threads| {
        let _ends = Ends(&ended);
        threads.spawn(|| {
            let page = stage.byte(WRITTEN * PAGE_SIZE).cast::<u64>();
            for value in 1.. {
                for lane in 0..PAGE_SIZE / 8 {
                    // SAFETY: within a page of the region, which is mapped, readable and writable, while the stage lives.
                    let before = unsafe { page.add(lane).read_volatile() };
                    assert_eq!(before, value - 1, "a write to lane {lane} is lost");
                    // SAFETY: as above.
                    unsafe { page.add(lane).write_volatile(value) };
                }
                if ended.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let mut tools = RemapTools::new().unwrap();
        for _ in 0..3000 {
            let merged = stage.merge_all(&mut tools);
            assert_ne!(merged[WRITTEN], Verdict::Merged);
            assert_eq!(merged.iter().filter(|verdict| **verdict == Verdict::Merged).count(), 15);
            // Seven have memory of their own, then half.
            for page in [9, 2, 14, 5, 0, 11, 12] {
                stage.write(page * PAGE_SIZE, 4);
            }
            let states = stage.region.page_states();
            // A late fault of the writer may own its page for a moment.
            let at_rest = |page: usize| page == WRITTEN || states[page] == State::Private;
            assert!((0..16).all(at_rest), "{states:?}");
            for page in (0..16).filter(|page| *page != WRITTEN) {
                let expected = if [9, 2, 14, 5, 0, 11, 12].contains(&page) { 4 } else { 3 };
                assert_eq!(stage.read(page * PAGE_SIZE), expected, "page {page}");
                stage.write(page * PAGE_SIZE, 3);
            }
        }
    });
}

/// As at the mapping limit: the kernel unmapped a page that breaks, and somebody reads it before it is mapped anew.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_reads_a_hole() {
    let stage = Stage::of(Kind::Shared, 3, 3, 3);
    let merged = stage.merge_all(&mut RemapTools::new().unwrap());
    assert_eq!(merged, [Verdict::Merged; 3]);
    std::thread::scope(|threads| {
        threads.spawn(|| stage.write(PAGE_SIZE, 4));
        while stage.region.page_states()[1] == State::Merged {
            std::hint::spin_loop();
        }
        // The break has copied the page, and pauses before it maps it.
        std::thread::sleep(PAUSE / 2);
        // SAFETY: a page of the region that another thread is about to map anew; whoever reads it waits for that.
        assert_eq!(unsafe { libc::munmap(stage.byte(PAGE_SIZE).cast(), PAGE_SIZE) }, 0);
        let began = Instant::now();
        assert_eq!(stage.read(PAGE_SIZE + 1), 3);
        assert!(began.elapsed() > PAUSE / 10, "the page was there");
    });
    assert_eq!([0, 1, 2].map(|page| stage.read(page * PAGE_SIZE)), [3, 4, 3]);
    assert_eq!(stage.region.page_states()[1], State::Private);
}

/// The scene passes, and fails with the mutant: that needs luck, the more so where the machine is busy, and gets twenty tries.
fn check(scene: &str, failpoints: &str, mutant: &str) {
    assert!(run(scene, failpoints, None).success());
    let survives = (0..20).all(|_| run(scene, failpoints, Some(mutant)).success());
    assert!(!survives, "{mutant} survives");
}

fn run(scene: &str, failpoints: &str, mutant: Option<&str>) -> ExitStatus {
    // One at a time: each needs its processors to come to where its mutant errs.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", scene, "--ignored"])
        .env("KSMRS_FAILPOINTS", failpoints);
    match mutant {
        Some(mutant) => command.env(MUTANT, mutant),
        None => command.env_remove(MUTANT),
    };
    command.output().unwrap().status
}

#[test]
fn a_page_left_read_only_is_noticed() {
    let failpoints = "fault-arrived=delay:300;merge-freezing=delay:300";
    check("scene_slow_handler", failpoints, "no-freezing");
}

#[test]
fn who_reads_what_is_being_mapped_waits() {
    let failpoints = format!("break-filled=delay:{}", PAUSE.as_micros());
    assert!(run("scene_reads_a_hole", &failpoints, None).success());
}

#[test]
fn old_evidence_frees_no_frame() {
    let failpoints = "scan-evidence=delay:1000000";
    check("scene_old_evidence", failpoints, "no-generation");
}

/// Writers meet a scan of tracked pages.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_writes_while_scanning() {
    assert!(mutant::choose(std::env::var(MUTANT).ok().as_deref()));
    for kind in [Kind::Private, Kind::Shared] {
        assert!(tracked::writes_while_scanning(kind) > 0);
    }
}

/// Writers meet merges that compare before they freeze.
#[test]
#[ignore = "run in a process of its own by the tests below"]
fn scene_merges_under_writers() {
    assert!(mutant::choose(std::env::var(MUTANT).ok().as_deref()));
    assert!(tracked::merges_under_writers(60) > 0);
}

#[test]
fn a_write_between_the_testimony_and_the_freeze_is_noticed() {
    let failpoints = "merge-freezing=delay:500";
    check("scene_merges_under_writers", failpoints, "witness-asked-early");
}

#[test]
fn a_write_to_a_page_that_a_break_bridges_is_noticed() {
    check("scene_bridges_under_a_writer", "", "bridge-filled");
}

#[test]
fn a_write_between_the_look_and_the_arming_is_noticed() {
    check("scene_writes_while_scanning", "", "arm-after-read");
}
