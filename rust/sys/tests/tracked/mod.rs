//! A region that is scanned with dirty tracking, for tests: no broker, no client threads; what must hold is checked against the bytes.
//!
//! The regions are of small pages, for memory made of huge ones is not tracked.
#![allow(dead_code, reason = "each test program uses its own part")]

use ksmrs_sys::checksum::{ChecksumWord, Checksummer};
use ksmrs_sys::foreign::Foreign;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::pagemap::Pagemap;
use ksmrs_sys::protocol::{Kind, MergeRun, Page, Span, Verdict};
use ksmrs_sys::region::Region;
use ksmrs_sys::remap::RemapTools;
use ksmrs_sys::scan::{ScanTools, Tally};
use ksmrs_sys::staging::{Staging, StagingView};
use ksmrs_sys::store::{Store, StoreFile};
use ksmrs_sys::tracking::Userfault;
use ksmrs_sys::{PAGE_SIZE, Slot, State, StoreNumber, fork, maps, signal};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub const STORE: StoreNumber = StoreNumber(1);
pub const UNIT: u32 = 512;
/// A pass in which nothing of a region of up to a dozen units is read for the sake of it, private or shared.
pub const PASS: u16 = 17;

pub struct Tracked {
    pub region: Region,
    pub table: &'static ClientTable,
    pub tools: ScanTools,
    pub fault: Userfault,
    pub pagemap: Pagemap,
    pub checksummer: Checksummer,
}

/// Faults are served from here on.
pub fn begin() {
    fork::begin_life(|_| ()).unwrap();
    signal::install().unwrap();
}

impl Tracked {
    pub fn make(pages: u32, kind: Kind) -> Tracked {
        let tracked = Tracked::make_with_huge(pages, kind);
        no_huge_pages(tracked.region.address(), pages as usize * PAGE_SIZE);
        tracked
    }

    /// As the process is: with huge pages where the kernel gives them.
    pub fn make_with_huge(pages: u32, kind: Kind) -> Tracked {
        begin();
        Tracked::of(pages, |table| Region::create(table, pages, kind).unwrap())
    }

    pub fn adopt(foreign: Foreign, pages: u32) -> Tracked {
        Tracked::of(pages, |table| Region::adopt(table, foreign).unwrap())
    }

    fn of(pages: u32, region: impl FnOnce(&'static ClientTable) -> Region) -> Tracked {
        let table: &'static ClientTable = Box::leak(Box::new(ClientTable::create(pages).unwrap().0));
        let checksummer = Checksummer::new(&[1; 16]);
        let mut tools = ScanTools::new(checksummer.clone(), STORE, Some(Pagemap::open().unwrap()));
        tools.tracks = true;
        Tracked {
            region: region(table),
            table,
            tools,
            fault: Userfault::open().unwrap(),
            pagemap: Pagemap::open().unwrap(),
            checksummer,
        }
    }

    /// All of the region, unit by unit, as the scanner does; then what was wished is done.
    pub fn pass(&mut self) -> Tally {
        self.pass_as(PASS)
    }

    pub fn pass_as(&mut self, pass: u16) -> Tally {
        let mut total = Tally::default();
        let position = (self.region.address() / PAGE_SIZE) as u32 % UNIT;
        let mut first = 0;
        while first < self.region.pages() {
            let pages = (UNIT - (first + position) % UNIT).min(self.region.pages() - first);
            let span = Span {
                first: Page(first),
                pages,
            };
            total.add(self.region.scan(span, pass, &mut self.tools).unwrap().unwrap());
            for wish in self.tools.wishes.drain(..) {
                self.region.fulfil(wish, &self.fault, &self.pagemap).unwrap();
            }
            first += pages;
        }
        total
    }

    /// Passes until everything that can be is registered and armed.
    pub fn settle(&mut self) {
        for _ in 0..4 {
            self.pass();
        }
    }

    pub fn word(&self, page: u32) -> &'static AtomicU64 {
        word(self.region.address(), page)
    }

    pub fn fill(&self) {
        for page in 0..self.region.pages() {
            self.word(page).store(u64::from(page) + 1, Ordering::Relaxed);
        }
    }

    /// Pages whose checksum is not that of what they hold.
    pub fn stale(&self) -> Vec<u32> {
        let stale = |page: &u32| {
            let mut bytes = [0u8; PAGE_SIZE];
            let base = self.region.address() + *page as usize * PAGE_SIZE;
            for (at, eight) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                // SAFETY: a word of a page of the region, which is mapped while it lives.
                let word = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(base + at * 8) };
                *eight = word.load(Ordering::Relaxed).to_ne_bytes();
            }
            let index = (self.region.first_word() + page) as usize;
            let word = ChecksumWord(self.table.checksums()[index].load(Ordering::Relaxed));
            word.checksum48() != Some(self.checksummer.page(&bytes))
        };
        (0..self.region.pages()).filter(stale).collect()
    }

    /// The kernel's mappings of the region, and how many of them are registered.
    pub fn mappings(&self) -> (usize, usize) {
        mappings(self.region.address(), self.region.pages())
    }
}

/// Advises memory that the caller keeps mapped.
pub fn no_huge_pages(base: usize, bytes: usize) {
    // SAFETY: the caller's memory; the advice changes no byte.
    let advised = unsafe {
        let start = std::ptr::with_exposed_provenance_mut(base);
        libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE)
    };
    assert!(
        advised == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL),
        "no such pages here"
    );
}

pub fn word(base: usize, page: u32) -> &'static AtomicU64 {
    // SAFETY: the first word of a page that the caller keeps mapped for as long as it uses this.
    unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(base + page as usize * PAGE_SIZE) }
}

pub fn mappings(base: usize, pages: u32) -> (usize, usize) {
    let found = maps::over(base..base + pages as usize * PAGE_SIZE).unwrap();
    (found.len(), found.iter().filter(|mapped| mapped.has(b"uw")).count())
}

/// Two threads write pages at random while everything is scanned; once they have stopped, one more pass knows every page. How many
/// pages nobody had to read meanwhile.
pub fn writes_while_scanning(kind: Kind) -> u32 {
    const PAGES: u32 = 2 * UNIT;
    const PASSES: u32 = 60;
    let mut tracked = Tracked::make(PAGES, kind);
    tracked.fill();
    tracked.settle();
    let (stop, base) = (AtomicBool::new(false), tracked.region.address());
    let mut clean = 0;
    std::thread::scope(|threads| {
        for seed in [1u64, 2] {
            let stop = &stop;
            threads.spawn(move || {
                let mut state = seed;
                while !stop.load(Ordering::Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // A few pages are written all the time, the others now and then.
                    let page = (state >> 20) as u32 % if state >> 50 == 0 { PAGES } else { 64 };
                    word(base, page).store(state, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..PASSES {
            clean += tracked.pass().clean;
        }
        stop.store(true, Ordering::Relaxed);
    });
    tracked.pass();
    assert_eq!(tracked.stale(), [], "{kind:?}: pages whose last write no scan saw");
    clean
}

/// A store whose frames hold what [`Tracked::fill`] writes, page for page.
pub struct Frames {
    store: Store,
    pub file: StoreFile,
    pub tools: RemapTools,
}

impl Frames {
    pub fn of(tracked: &Tracked) -> Frames {
        Frames::of_pages(tracked.region.pages())
    }

    pub fn of_pages(pages: u32) -> Frames {
        let store = Store::with_slots(pages.max(UNIT)).unwrap();
        let (staging, fd) = Staging::create().unwrap();
        let view = StagingView::open(&fd).unwrap();
        for page in 0..pages {
            let mut bytes = [0u8; PAGE_SIZE];
            bytes[..8].copy_from_slice(&(u64::from(page) + 1).to_ne_bytes());
            staging.write_page(0, &bytes);
            store.fill(Slot(page), &view, 0, 1).unwrap();
        }
        let file = StoreFile::vet(store.read_only().unwrap(), store.slots()).unwrap();
        Frames {
            store,
            file,
            tools: RemapTools::new().unwrap(),
        }
    }

    /// Merges a span onto the frames at its place; how many pages show theirs.
    pub fn merge(&mut self, region: &Region, span: Span) -> usize {
        self.merge_onto(region, span, Slot(span.first.0))
    }

    pub fn merge_zero(&mut self, region: &Region, span: Span) -> usize {
        self.merge_onto(region, span, Slot::ZERO)
    }

    fn merge_onto(&mut self, region: &Region, span: Span, slot: Slot) -> usize {
        let run = MergeRun {
            span,
            store: STORE,
            slot,
        };
        let mut verdicts = vec![Verdict::Busy; span.pages as usize];
        region
            .merge(run, &self.file, fork::count(), &mut self.tools, &mut verdicts)
            .unwrap()
            .unwrap();
        if region.kind() == Kind::Shared {
            region.settle(span, true, fork::count()).unwrap().unwrap();
        }
        let shows = |verdict: &&Verdict| matches!(verdict, Verdict::Merged | Verdict::Moved);
        verdicts.iter().filter(shows).count()
    }

    pub fn punch(&self, slot: u32) {
        self.store.punch(Slot(slot), 1).unwrap();
    }
}

pub fn states(region: &Region, state: State) -> usize {
    region.page_states().iter().filter(|now| **now == state).count()
}

/// Whole regions are merged in one run each, with the kernel for a witness, while two threads write and a third one scans: everybody reads
/// what they wrote last. How many pages the kernel vouched for.
pub fn merges_under_writers(rounds: u64) -> u64 {
    let mut vouched = 0;
    for round in 0..rounds {
        let mut tracked = Tracked::make(UNIT, Kind::Private);
        tracked.fill();
        tracked.settle();
        let mut frames = Frames::of(&tracked);
        let span = Span {
            first: Page(0),
            pages: UNIT,
        };
        let (begun, merged, base) = (AtomicBool::new(false), AtomicBool::new(false), tracked.region.address());
        std::thread::scope(|threads| {
            let writers = [0u32, 1].map(|half| {
                let (begun, merged) = (&begun, &merged);
                threads.spawn(move || {
                    // Before the merge begins, all pages are at rest; while it goes on most of them still are.
                    while !begun.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                    let mut last: Vec<u64> = (0..u64::from(UNIT)).map(|page| page + 1).collect();
                    let mut state = round * 2 + u64::from(half) + 1;
                    for after in 0.. {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let page = (state >> 33) as u32 % (UNIT / 2) * 2 + half;
                        assert_eq!(
                            word(base, page).load(Ordering::Relaxed),
                            last[page as usize],
                            "page {page} in round {round} lost a write"
                        );
                        word(base, page).store(state, Ordering::Relaxed);
                        last[page as usize] = state;
                        if merged.load(Ordering::Relaxed) && after > 40 {
                            break;
                        }
                        (0..2000).for_each(|_| std::hint::spin_loop());
                    }
                    last
                })
            });
            let (region, tools) = (&tracked.region, &mut tracked.tools);
            let stop = &merged;
            let scanner = threads.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    region.scan(span, PASS, tools).unwrap().unwrap();
                }
            });
            begun.store(true, Ordering::Relaxed);
            frames.merge(region, span);
            merged.store(true, Ordering::Relaxed);
            scanner.join().unwrap();
            for (half, writer) in writers.into_iter().enumerate() {
                let last = writer.join().unwrap();
                for page in (half as u32..UNIT).step_by(2) {
                    let now = word(base, page).load(Ordering::Relaxed);
                    assert_eq!(now, last[page as usize], "page {page} in round {round} lost a write");
                }
            }
        });
        vouched += frames.tools.vouched();
        tracked.region.end_tracking();
        tracked.region.untrack(&tracked.fault).unwrap();
    }
    vouched
}
