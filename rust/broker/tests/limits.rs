//! At the limits: no mapping left, a broker that says nothing, one call too many, evidence that is none.

mod fake;
mod regions;

use std::time::{Duration, Instant};

use fake::{FakeClient, connect};
use ksmrs_broker::client::{self, Kind, Region};
use ksmrs_broker::wire::{Question, ToBroker};
use ksmrs_sys::checksum::Checksummer;
use ksmrs_sys::protocol::{self, MergeRun, Page, Span, Verdict};
use ksmrs_sys::region::Region as Bare;
use ksmrs_sys::remap::RemapTools;
use ksmrs_sys::scan::ScanTools;
use ksmrs_sys::staging::{Staging, StagingView};
use ksmrs_sys::store::{Store, StoreFile};
use ksmrs_sys::{Slot, State, StoreNumber, fork, page_table};
use regions::{BrokerProcess, PAGE, PATIENCE, alone, counter, directory, filled, merge, poke, wait_for, wrong};
use rustix::mm::{MapFlags, ProtFlags};

const PAGES: u32 = 512;

fn bare(pages: u32) -> Bare {
    let (table, _) = page_table::ClientTable::create(4096).unwrap();
    Bare::create(Box::leak(Box::new(table)), pages, protocol::Kind::Private).unwrap()
}

/// Begins this process's life: fork handlers and the fault handler.
fn begin_life() {
    drop(Region::new(PAGE, Kind::Private).unwrap());
}

fn write(region: &Bare, page: u32, at: usize, byte: u8) {
    assert!(page < region.pages() && at < PAGE);
    let address = region.address() + page as usize * PAGE + at;
    // SAFETY: inside the region, which is mapped and writable as long as it lives.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(byte) }
}

fn read(region: &Bare, page: u32, at: usize) -> u8 {
    assert!(page < region.pages() && at < PAGE);
    let address = region.address() + page as usize * PAGE + at;
    // SAFETY: as in `write`.
    unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

/// A mapping that neighbours cannot join, if there is one to be had.
fn mapping(turn: usize) -> Option<usize> {
    let access = if turn.is_multiple_of(2) {
        ProtFlags::empty()
    } else {
        ProtFlags::READ
    };
    // SAFETY: a fresh mapping where the kernel likes; nothing points into it.
    let mapped = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), PAGE, access, MapFlags::SHARED) };
    mapped.ok().map(|mapped| mapped as usize)
}

/// A zero run merges with so few mappings to spare that it fails at one step or another: no page may be left unwritable or lost.
#[test]
fn zero_runs_at_the_mapping_limit_stay_writable() {
    alone("zero_runs_at_the_mapping_limit_stay_writable", 60, || {
        begin_life();
        let table: &'static _ = Box::leak(Box::new(page_table::ClientTable::create(1 << 16).unwrap().0));
        let regions: Vec<Bare> = (0..7)
            .map(|_| Bare::create(table, PAGES, protocol::Kind::Private).unwrap())
            .collect();
        for region in &regions {
            (0..PAGES).for_each(|page| write(region, page, 0, (page % 2) as u8));
        }
        let store = Store::with_slots(2048).unwrap();
        let file = StoreFile::vet(store.read_only().unwrap(), store.slots()).unwrap();
        let mut remap = RemapTools::new().unwrap();
        let mut verdicts = vec![Verdict::Busy; PAGES as usize];
        let mut eaten: Vec<usize> = Vec::with_capacity(1 << 20);
        let mut zero = 0;
        for (spare, region) in regions.iter().enumerate() {
            while let Some(mapped) = mapping(eaten.len()) {
                assert!(eaten.len() < eaten.capacity(), "no limit of mappings here");
                eaten.push(mapped);
            }
            for _ in 0..spare {
                let last = eaten.pop().unwrap();
                // SAFETY: our own mapping, forgotten with this.
                unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(last), PAGE) }.unwrap();
            }
            let run = MergeRun {
                span: Span {
                    first: Page(0),
                    pages: PAGES,
                },
                store: StoreNumber(1),
                slot: Slot::ZERO,
            };
            // Whether it works is not the question.
            let _ = region
                .merge(run, &file, fork::count(), &mut remap, &mut verdicts)
                .unwrap();
            zero += region
                .page_states()
                .iter()
                .filter(|state| **state == State::Zero)
                .count();
            for page in 0..PAGES {
                write(region, page, 1, 9);
                let found = [read(region, page, 0), read(region, page, 1), read(region, page, 2)];
                assert_eq!(
                    found,
                    [(page % 2) as u8, 9, 0],
                    "page {page} with {spare} mappings to spare"
                );
            }
        }
        for mapped in eaten {
            // SAFETY: as above.
            unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(mapped), PAGE) }.unwrap();
        }
        assert!(zero > 0, "no zero page merged with any number of mappings to spare");
    });
}

/// Without pagemap a scan knows no copies. The checksum of a merged page differs from the last one, of before it merged: that is
/// no proof of a copy, and the frame must not be let go under the page.
#[test]
fn another_checksum_than_once_is_no_copy() {
    alone("another_checksum_than_once_is_no_copy", 20, || {
        begin_life();
        let region = bare(1);
        let store = Store::with_slots(2048).unwrap();
        let file = StoreFile::vet(store.read_only().unwrap(), store.slots()).unwrap();
        let (staging, staging_fd) = Staging::create().unwrap();
        staging.write_page(0, &[0x58; PAGE]);
        store
            .fill(Slot(5), &StagingView::open(&staging_fd).unwrap(), 0, 1)
            .unwrap();
        let mut tools = ScanTools::new(Checksummer::new(&[7; 16]), StoreNumber(1), None);
        let span = Span {
            first: Page(0),
            pages: 1,
        };
        let fill = |byte| (0..PAGE).for_each(|at| write(&region, 0, at, byte));
        fill(0x59);
        region.scan(span, 3, &mut tools).unwrap().unwrap();
        fill(0x58);
        let run = MergeRun {
            span,
            store: StoreNumber(1),
            slot: Slot(5),
        };
        let (mut remap, mut verdicts) = (RemapTools::new().unwrap(), [Verdict::Busy]);
        region
            .merge(run, &file, fork::count(), &mut remap, &mut verdicts)
            .unwrap()
            .unwrap();
        assert_eq!(
            (verdicts, region.page_states()),
            ([Verdict::Merged], vec![State::Merged])
        );
        region.scan(span, 4, &mut tools).unwrap().unwrap();
        if region.page_states() != [State::Merged] {
            // What the broker does once no page shows the frame.
            store.punch(Slot(5), 1).unwrap();
        }
        assert!((0..PAGE).all(|at| read(&region, 0, at) == 0x58));
    });
}

#[test]
fn connecting_twice_answers_twice() {
    alone("connecting_twice_answers_twice", 20, || {
        let _region = Region::new(4 * PAGE, Kind::Private).unwrap();
        let begun = Instant::now();
        client::connect().unwrap();
        client::connect().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    });
}

/// A merge's time is up although the broker says nothing at all.
#[test]
fn a_merge_ends_though_the_broker_is_stopped() {
    alone("a_merge_ends_though_the_broker_is_stopped", 60, || {
        let broker = BrokerProcess::start();
        let region = filled(64, Kind::Private, 1);
        merge();
        broker.stop();
        let silent = client::merge(Some(Duration::from_millis(50)), &mut || false);
        assert!(matches!(silent, Err(client::Error::Silent(_))), "{silent:?}");
        let interrupted = client::merge(None, &mut || true);
        assert!(
            matches!(interrupted, Err(client::Error::Interrupted)),
            "{interrupted:?}"
        );
        assert_eq!(wrong(&region, 1), 0);
        broker.go_on();
        assert!(client::merge(Some(PATIENCE), &mut || false).unwrap().finished);
    });
}

/// The broker has no descriptor left when the next life page comes: it waits until there is one, and nobody loses a byte meanwhile.
#[test]
fn a_broker_without_descriptors_takes_no_life_page_for_lost() {
    const TEST: &str = "a_broker_without_descriptors_takes_no_life_page_for_lost";
    alone(TEST, 60, || {
        let broker = BrokerProcess::start();
        let both = [1, 2].map(|_| filled(256, Kind::Private, 1));
        merge();
        let old = broker.limit_descriptors(broker.lowest_free_descriptor());
        let write = |page| {
            both.iter()
                .zip([7, 8])
                .for_each(|(region, value)| poke(region, page, 0, value))
        };
        let wrong = || both.each_ref().map(|region| wrong(region, 1));
        // Begins an epoch, and has a frame given up.
        write(0);
        assert!(client::merge(Some(Duration::from_secs(1)), &mut || false).is_err());
        assert_eq!(wrong(), [1, 1]);
        broker.limit_descriptors(old);
        write(1);
        merge();
        assert_eq!(wrong(), [2, 2]);
        wait_for("the end of both frames", || counter("frames") == 254);
    });
}

/// What the dead sent, life pages among it, could not be read for want of a descriptor, and stands before their end.
#[test]
fn a_broker_without_descriptors_has_those_of_the_dead_back() {
    const TEST: &str = "a_broker_without_descriptors_has_those_of_the_dead_back";
    alone(TEST, 60, || {
        let broker = BrokerProcess::start();
        let both = [1, 2].map(|_| filled(256, Kind::Private, 1));
        let mut dead = [1, 2, 3].map(|_| FakeClient::over(connect(&directory())));
        let old = broker.limit_descriptors(broker.lowest_free_descriptor());
        for client in &mut dead {
            let question = Question::Stats;
            client.send(ToBroker::Ask { id: 1, question });
            drop(client.turn_life());
            drop(client.turn_life());
        }
        assert!(client::merge(Some(Duration::from_secs(1)), &mut || false).is_err());
        drop(dead);
        merge();
        assert_eq!(both.each_ref().map(|region| wrong(region, 1)), [0, 0]);
        assert_eq!(counter("clients"), 1);
        broker.limit_descriptors(old);
    });
}
