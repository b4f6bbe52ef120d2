//! Merges that compare before they freeze, on real memory: the kernel vouches for what was not written, and for nothing else.

mod tracked;

use ksmrs_sys::protocol::{Kind, Page, Span};
use tracked::{Frames, Tracked, UNIT, merges_under_writers};

const WHOLE: Span = Span {
    first: Page(0),
    pages: UNIT,
};

#[test]
fn pages_at_rest_are_vouched_for() {
    let mut tracked = Tracked::make(UNIT, Kind::Private);
    tracked.fill();
    tracked.settle();
    let mut frames = Frames::of(&tracked);
    // One that is not equal is told from the others all the same.
    tracked.word(7).store(0, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(frames.merge(&tracked.region, WHOLE), UNIT as usize - 1);
    assert_eq!(frames.tools.vouched(), u64::from(UNIT) - 1);
}

#[test]
fn what_is_not_registered_or_may_be_somebody_elses_is_not() {
    let shared = {
        let mut tracked = Tracked::make(UNIT, Kind::Shared);
        tracked.fill();
        tracked.settle();
        tracked
    };
    let fresh = Tracked::make(UNIT, Kind::Private);
    fresh.fill();
    for tracked in [shared, fresh] {
        let mut frames = Frames::of(&tracked);
        assert_eq!(frames.merge(&tracked.region, WHOLE), UNIT as usize);
        assert_eq!(frames.tools.vouched(), 0);
    }
}

#[test]
fn writers_lose_nothing() {
    assert!(merges_under_writers(60) > 0, "the kernel vouched for nothing");
}
