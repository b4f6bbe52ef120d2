//! The client side against an embedded broker: regions of this very process merge, break, unmerge, leave and close.
//!
//! Nextest or not, each test uses the one client of the process, so they run one after another.

use ksmrs_broker::client::{self, Kind, Region};
use ksmrs_sys::State;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const PAGE: usize = 4096;
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The region's bytes. Only this thread touches them, and the engine keeps them what they are.
#[allow(clippy::mut_from_ref, reason = "the memory is the region's, not the object's")]
fn bytes(region: &Region) -> &mut [u8] {
    // SAFETY: the region is mapped, readable and writable for as long as it lives, and each test is its only user.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(region.address()), region.len()) }
}

fn filled(pages: usize, kind: Kind, seed: u64) -> Arc<Region> {
    let region = Region::new(pages * PAGE, kind).unwrap();
    fill(&region, seed);
    region
}

fn content(seed: u64, page: usize) -> impl Iterator<Item = u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (page as u64 + 1) << 20;
    (0..PAGE).map(move |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    })
}

fn fill(region: &Region, seed: u64) {
    for (number, page) in bytes(region).chunks_mut(PAGE).enumerate() {
        page.iter_mut()
            .zip(content(seed, number))
            .for_each(|(byte, new)| *byte = new);
    }
}

fn check(region: &Region, seed: u64) {
    for (number, page) in bytes(region).chunks(PAGE).enumerate() {
        assert!(
            page.iter().copied().eq(content(seed, number)),
            "page {number} holds other bytes than were written"
        );
    }
}

fn count(region: &Region, state: State) -> usize {
    region
        .page_states()
        .iter()
        .filter(|found| **found == state as u8)
        .count()
}

fn merge() -> client::MergeReport {
    client::merge(Some(Duration::from_secs(30)), &mut || false).unwrap()
}

fn counter(name: &str) -> i64 {
    client::stats()
        .unwrap()
        .into_iter()
        .find(|(found, _)| found == name)
        .map(|(_, value)| value)
        .unwrap()
}

#[test]
fn equal_pages_merge_and_a_write_gets_its_own_copy() {
    let _alone = alone();
    for kind in [Kind::Private, Kind::Shared] {
        let (a, b) = (filled(700, kind, 1), filled(700, kind, 1));
        let report = merge();
        assert!(report.finished, "{report:?}");
        assert_eq!(
            (count(&a, State::Merged), count(&b, State::Merged)),
            (700, 700),
            "{kind:?} {report:?}"
        );
        assert_eq!(
            (counter("pages_shared"), counter("pages_sharing")),
            (700, 700),
            "{kind:?}"
        );
        check(&a, 1);
        check(&b, 1);
        for page in [0, 1, 2, 3, 4, 300, 699] {
            bytes(&a)[page * PAGE + 17] ^= 0xff;
        }
        check(&b, 1);
        for page in [0, 1, 2, 3, 4, 300, 699] {
            bytes(&a)[page * PAGE + 17] ^= 0xff;
        }
        check(&a, 1);
        fill(&b, 2);
        check(&b, 2);
        check(&a, 1);
        merge();
        check(&a, 1);
        check(&b, 2);
        drop((a, b));
    }
}

#[test]
fn unmerge_holds_and_leave_gives_plain_memory_back() {
    let _alone = alone();
    for kind in [Kind::Private, Kind::Shared] {
        let (a, b) = (filled(600, kind, 3), filled(600, kind, 3));
        merge();
        a.advise_unmergeable(10..520).unwrap();
        assert_eq!(count(&a, State::Held), 510);
        check(&a, 3);
        merge();
        assert_eq!(count(&a, State::Held), 510, "held pages stay out");
        a.advise_mergeable(10..520).unwrap();
        merge();
        assert_eq!(count(&a, State::Merged), 600);
        a.pin(0..5).unwrap();
        a.pin(3..8).unwrap();
        merge();
        assert_eq!(count(&a, State::Held), 8);
        a.unpin(0..5);
        assert_eq!(count(&a, State::Held), 5);
        a.unpin(3..8);
        assert_eq!(count(&a, State::Held), 0);
        merge();
        b.leave().unwrap();
        check(&b, 3);
        fill(&b, 4);
        check(&b, 4);
        check(&a, 3);
    }
}

#[test]
fn zero_pages_need_no_memory() {
    let _alone = alone();
    for kind in [Kind::Private, Kind::Shared] {
        let region = Region::new(300 * PAGE, kind).unwrap();
        bytes(&region).fill(1);
        bytes(&region).fill(0);
        merge();
        assert_eq!(count(&region, State::Zero), 300, "{kind:?}");
        assert_eq!(counter("ksm_zero_pages"), 300);
        assert!(bytes(&region).iter().all(|byte| *byte == 0));
        fill(&region, 5);
        check(&region, 5);
        merge();
        check(&region, 5);
        assert_eq!(counter("ksm_zero_pages"), 0);
    }
}

#[test]
fn regions_come_and_go() {
    let _alone = alone();
    for round in 0..40u64 {
        let kind = if round % 2 == 0 { Kind::Private } else { Kind::Shared };
        let (a, b) = (filled(64, kind, round), filled(64, kind, round));
        merge();
        check(&a, round);
        drop(a);
        check(&b, round);
        bytes(&b)[5] = 1;
        drop(b);
    }
    merge();
    assert_eq!(
        (counter("pages_shared"), counter("pages_sharing"), counter("regions")),
        (0, 0, 0)
    );
}
