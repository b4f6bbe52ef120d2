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
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const STORE: StoreNumber = StoreNumber(1);
const PAUSE: Duration = Duration::from_millis(700);
const MUTANT: &str = "KSMRS_SCENE_MUTANT";

/// One private region of one page, and a store with one frame.
struct Stage {
    region: Region,
    store: Store,
    file: StoreFile,
}

impl Stage {
    fn set(page: u8, frame: u8) -> Stage {
        failpoint::configure().unwrap();
        assert!(mutant::choose(std::env::var(MUTANT).ok().as_deref()));
        fork::begin_life(|| ()).unwrap();
        signal::install().unwrap();
        let table: &'static ClientTable = Box::leak(Box::new(ClientTable::create(512).unwrap().0));
        let region = Region::create(table, 1, Kind::Private).unwrap();
        let store = Store::with_slots(512).unwrap();
        let (staging, fd) = Staging::create().unwrap();
        staging.write_page(0, &[frame; PAGE_SIZE]);
        store.fill(Slot(0), &StagingView::open(&fd).unwrap(), 0, 1).unwrap();
        let file = StoreFile::vet(store.read_only().unwrap(), store.slots()).unwrap();
        let stage = Stage { region, store, file };
        for at in 0..PAGE_SIZE {
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
        let span = Span::one(Page(0));
        let run = MergeRun {
            span,
            store: STORE,
            slot: Slot(0),
        };
        let mut verdicts = [Verdict::Busy];
        let merged = self.region.merge(run, &self.file, fork::count(), tools, &mut verdicts);
        merged.unwrap().unwrap();
        verdicts[0]
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

/// The scene passes, and fails with the mutant: that needs luck, the more so where the machine is busy, and gets three tries.
fn check(scene: &str, failpoints: &str, mutant: &str) {
    assert!(run(scene, failpoints, None).success());
    let survives = (0..3).all(|_| run(scene, failpoints, Some(mutant)).success());
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
fn a_write_between_the_look_and_the_arming_is_noticed() {
    check("scene_writes_while_scanning", "", "arm-after-read");
}
