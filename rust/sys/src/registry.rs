//! Which addresses belong to which region: what the fault handler looks a faulting address up in.
//!
//! A sorted array behind one pointer. Readers (the handler) take no lock and allocate nothing: they count themselves in, read
//! the pointer, and count themselves out when they are done with the region. A writer publishes a new array, waits until
//! everyone who may still see the old one is gone, and only then lets anything of a removed region be freed or lent again.

use crate::mapping::View;
use crate::region::Region;
use crate::words::RegionWords;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// One region as the handler sees it.
#[derive(Clone, Copy)]
pub(crate) struct Area {
    pub(crate) view: View,
    pub(crate) words: RegionWords,
    /// The process life that registered it; in any other (a forked child's) the words are not ours to touch.
    pub(crate) era: u32,
}

static AREAS: AtomicPtr<Vec<Area>> = AtomicPtr::new(ptr::null_mut());
/// Raised at each publication: "was this address a region's a moment ago?"
static VERSION: AtomicU32 = AtomicU32::new(0);
/// Readers by the parity of the writer's phase: a writer flips the phase and waits for the side it left to empty.
static READERS: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
static PHASE: AtomicUsize = AtomicUsize::new(0);
/// Serialises writers; never taken by a handler. Holds the regions themselves, for a child that is born with them.
static WRITER: Mutex<Vec<Weak<Region>>> = Mutex::new(Vec::new());

/// The right to publish, and the regions that were remembered.
pub(crate) type Writer = MutexGuard<'static, Vec<Weak<Region>>>;

/// A region found; nothing of it goes away while this lives, and no region comes either: whoever waits for others drops it first.
pub(crate) struct Found {
    pub(crate) area: Area,
    side: usize,
}

impl Drop for Found {
    fn drop(&mut self) {
        READERS[self.side].fetch_sub(1, Ordering::SeqCst);
    }
}

/// The region that holds an address. Async-signal-safe.
pub(crate) fn find(address: usize) -> Option<Found> {
    let side = PHASE.load(Ordering::SeqCst) & 1;
    READERS[side].fetch_add(1, Ordering::SeqCst);
    // SAFETY: null, or an array that a writer frees only after every reader counted before its publication has left.
    let areas = unsafe { AREAS.load(Ordering::SeqCst).as_ref() };
    let area = areas.and_then(|areas| {
        let after = areas.partition_point(|area| area.view.base() <= address);
        areas[..after]
            .last()
            .filter(|area| area.view.page_at(address).is_some())
            .copied()
    });
    match area {
        Some(area) => Some(Found { area, side }),
        None => {
            READERS[side].fetch_sub(1, Ordering::SeqCst);
            None
        }
    }
}

/// Changes whenever a region comes or goes.
pub(crate) fn version() -> u32 {
    VERSION.load(Ordering::SeqCst)
}

/// Calls `each` for every region, while the caller's lock sees to it that none comes or goes.
pub(crate) fn for_each(_writer: &Writer, mut each: impl FnMut(&Area)) {
    // SAFETY: writers are excluded, and only they free the array.
    if let Some(areas) = unsafe { AREAS.load(Ordering::SeqCst).as_ref() } {
        areas.iter().for_each(&mut each);
    }
}

/// Whether any page of a range is in a region that is known.
pub(crate) fn overlaps(range: &Range<usize>) -> bool {
    let writer = lock();
    let mut found = false;
    for_each(&writer, |area| {
        let other = &area.view;
        found |= range.start < other.base() + other.bytes() && other.base() < range.end;
    });
    found
}

/// Remembers a region that was added, for as long as somebody else holds it.
pub(crate) fn remember(region: &Arc<Region>) {
    let mut regions = lock();
    if regions.len() == regions.capacity() {
        regions.retain(|region| region.strong_count() > 0);
    }
    regions.push(Arc::downgrade(region));
}

/// Gives areas to another life: in a child that is born with them, by their first addresses.
pub(crate) fn belong(era: u32, is_born: impl Fn(usize) -> bool) {
    publish(|areas| {
        for area in areas.iter_mut().filter(|area| is_born(area.view.base())) {
            area.era = era;
        }
    });
}

/// Makes a region known.
pub(crate) fn add(area: Area) {
    publish(|areas| {
        let at = areas.partition_point(|other| other.view.base() < area.view.base());
        areas.insert(at, area);
    });
}

/// Forgets the region that starts at this address. `before_wait` runs when no new handler can find it, and must wake those that
/// wait for its words; afterwards no handler holds it any more.
pub(crate) fn remove(base: usize, before_wait: impl FnOnce()) {
    let mut before_wait = Some(before_wait);
    publish_then(
        |areas| areas.retain(|area| area.view.base() != base),
        || {
            if let Some(before_wait) = before_wait.take() {
                before_wait();
            }
        },
    );
}

/// In a child that lives a life of its own: no handler of the parent runs here.
pub(crate) fn reset_readers() {
    for side in &READERS {
        side.store(0, Ordering::SeqCst);
    }
}

/// The lock that a fork must hold, so that no child inherits it locked.
pub(crate) fn lock() -> Writer {
    WRITER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn publish(change: impl FnOnce(&mut Vec<Area>)) {
    publish_then(change, || {});
}

fn publish_then(change: impl FnOnce(&mut Vec<Area>), published: impl FnOnce()) {
    let _writer = lock();
    let old = AREAS.load(Ordering::SeqCst);
    // SAFETY: writers are excluded, and only they free the array.
    let mut areas = unsafe { old.as_ref() }.cloned().unwrap_or_default();
    change(&mut areas);
    AREAS.store(Box::into_raw(Box::new(areas)), Ordering::SeqCst);
    VERSION.fetch_add(1, Ordering::SeqCst);
    published();
    // Twice: a reader may have read the phase before the first flip and counted itself in only after our look.
    for _ in 0..2 {
        let side = PHASE.fetch_add(1, Ordering::SeqCst) & 1;
        while READERS[side].load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }
    if !old.is_null() {
        // SAFETY: made by Box::into_raw above in an earlier call; unpublished, and every reader that could have seen it has left.
        drop(unsafe { Box::from_raw(old) });
    }
}

/// A handler may have come for a region that ended a moment ago: the first fault outside all regions at this address is retried
/// if regions have come or gone since this thread last asked.
pub(crate) fn changed_since_last_look(thread: u32) -> bool {
    static LOOKS: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
    let look = (thread as usize) << 32 | version() as usize;
    LOOKS[thread as usize % LOOKS.len()].swap(look, Ordering::SeqCst) != look
}
