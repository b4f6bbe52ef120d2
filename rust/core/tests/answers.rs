//! Answers that come when the world has moved on: what is guessed of it afterwards would be wrong.

mod honest;

use honest::Honest;
use ksmrs_core::{
    Checksum, ClientId, Core, Decision, Epoch, Kind, MAX_SCAN_PAGES, MAX_STEP_PAGES, Next, Observation, Observations,
    PageNumber, Seen,
};
use std::cell::Cell;
use std::time::Duration;

const SLOTS: u32 = 4096;
const ONE: ClientId = ClientId(1);

type Clients = Honest<fn(PageNumber) -> Checksum>;

/// A client all of whose pages are equal.
fn equal_pages(max_page_sharing: &str) -> (Core, Clients) {
    let mut core = Core::new(SLOTS, Checksum(0));
    for (knob, value) in [
        ("advisor_mode", "none"),
        ("smart_scan", "0"),
        ("join_runs", "0"),
        ("max_page_sharing", max_page_sharing),
    ] {
        core.set(knob, value).unwrap();
    }
    core.client_joined(ONE);
    (core, Honest::new(SLOTS, SLOTS, |_| Checksum(77)))
}

fn until_stage(core: &mut Core, clients: &mut Clients) -> Decision {
    clients.until(core, |_, decision| matches!(decision, Decision::Stage { .. }))
}

/// All of so many pages merge within a few passes.
fn all_merge(core: &mut Core, clients: &mut Clients, pages: u64) {
    let end = core.full_scans() + 5;
    clients.pass(core, end);
    let stats = core.stats();
    assert_eq!(stats.pages_shared + stats.pages_sharing, pages, "{stats:?}");
}

#[test]
fn who_found_a_founding_full_finds_its_frame_when_the_knob_is_raised_meanwhile() {
    let (mut core, mut clients) = equal_pages("2");
    core.region_joined(ONE, Kind::Private, 3, 0).unwrap();
    let stage = until_stage(&mut core, &mut clients);
    core.set("max_page_sharing", "4").unwrap();
    clients.carry_out(&mut core, stage);
    all_merge(&mut core, &mut clients, 3);
}

#[test]
fn who_found_a_founding_full_finds_its_frame_when_a_page_leaves_it_meanwhile() {
    let (mut core, mut clients) = equal_pages("3");
    core.region_joined(ONE, Kind::Private, 2, 0).unwrap();
    let (leaves, _) = core.region_joined(ONE, Kind::Private, 1, 100).unwrap();
    core.region_joined(ONE, Kind::Private, 1, 200).unwrap();
    let stage = until_stage(&mut core, &mut clients);
    core.region_left(leaves, Epoch(1));
    clients.carry_out(&mut core, stage);
    all_merge(&mut core, &mut clients, 3);
}

/// The client answers the next Scan, of its only region, with what these pages hold, and whether that is new; what it is not told of, it left out.
fn answer_scan(core: &mut Core, clients: &mut Clients, held: &[(u64, bool)]) {
    let scan = clients.until(core, |_, decision| !matches!(decision, Decision::Punch { .. }));
    let Decision::Scan { order, .. } = scan else {
        panic!("{scan:?} though nobody has an equal")
    };
    let observations: Vec<Observation> = held
        .iter()
        .map(|&(checksum, changed)| Observation {
            seen: Seen::Own,
            checksum: Some((Checksum(checksum), changed)),
        })
        .collect();
    core.scanned(order, &(Epoch(0), &observations[..]), clients.now);
}

#[test]
fn who_is_left_out_of_a_short_answer_is_no_candidate_two_passes_later() {
    let (mut core, mut clients) = equal_pages("256");
    core.region_joined(ONE, Kind::Private, 2, 0).unwrap();
    answer_scan(&mut core, &mut clients, &[(10, true), (20, true)]);
    answer_scan(&mut core, &mut clients, &[(10, false), (20, false)]);
    assert_eq!(core.stats().pages_unshared, 2);
    // The second page is not looked at; then the first holds what the second held when it was filed, and that holds something else.
    answer_scan(&mut core, &mut clients, &[(20, true)]);
    answer_scan(&mut core, &mut clients, &[(20, false), (30, true)]);
    answer_scan(&mut core, &mut clients, &[(20, false), (30, false)]);
    assert_eq!(core.stats().pages_unshared, 2);
}

#[test]
fn a_merge_on_request_asks_for_more_at_once_of_who_had_nothing_new_to_say() {
    let mut core = Core::new(SLOTS, Checksum(0));
    core.client_joined(ONE);
    core.region_joined(ONE, Kind::Private, 4 * MAX_SCAN_PAGES, 0).unwrap();
    core.request_merge(Duration::ZERO);
    let mut asked = |changed: bool| {
        let Next::Do(Decision::Scan { order, ranges, .. }) = core.next(Duration::ZERO) else {
            panic!("all of it is looked at")
        };
        let pages = ranges.iter().flat_map(|range| range.iter());
        let seen = |page: PageNumber| Observation {
            seen: Seen::Own,
            checksum: Some((Checksum(u64::from(page.0) + 1), changed)),
        };
        let observations: Vec<Observation> = pages.map(seen).collect();
        core.scanned(order, &(Epoch(0), &observations[..]), Duration::ZERO);
        observations.len() as u32
    };
    let (few, many) = (MAX_STEP_PAGES, MAX_SCAN_PAGES);
    assert_eq!(
        [true, true, false, true, false].map(&mut asked),
        [few, few, few, many, few]
    );
    assert_eq!(asked(true), many);
}

/// Words of a client that turns to another epoch whenever one is read: each page was written in the epoch before.
struct Turning {
    pages: usize,
    epoch: Cell<u32>,
}

impl Observations for Turning {
    fn pages(&self) -> usize {
        self.pages
    }

    fn of(&self, page: usize) -> Observation {
        self.epoch.set(self.epoch.get() + 1);
        Observation {
            seen: Seen::Own,
            checksum: Some((Checksum(900 + page as u64), true)),
        }
    }

    fn unchanged(&self, _: usize, _: &mut [Checksum]) -> bool {
        false
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.epoch.get())
    }
}

#[test]
fn what_was_given_up_belongs_to_the_epoch_after_the_words() {
    let (mut core, mut clients) = equal_pages("256");
    core.region_joined(ONE, Kind::Private, 2, 0).unwrap();
    all_merge(&mut core, &mut clients, 2);
    core.sealed(ONE, Epoch(0));
    let scan = clients.until(&mut core, |_, decision| matches!(decision, Decision::Scan { .. }));
    let Decision::Scan { order, .. } = scan else {
        unreachable!("it was asked for")
    };
    let turning = Turning {
        pages: 2,
        epoch: Cell::new(1),
    };
    core.scanned(order, &turning, clients.now);
    assert_eq!(core.stats().cow_ksm, 2);
    assert_eq!(core.latest_unsealed(ONE), Some(Epoch(3)));
}
