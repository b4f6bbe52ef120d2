//! Room for a break that found none: the kernel is at its limit of mappings, or the object's file system is full.
//!
//! Ballast is given up, else everything that the page's mapping covers gets its memory, else that mapping becomes writable as it is.
//! Neither of the latter splits a mapping, for the whole of it is claimed, in the regions beside this one too. Relies on whoever calls
//! to be within a pass; raw system calls only, and little of the stack, for it runs in the signal handler.

use crate::object::PAGE_SIZE;
use crate::protocol::{
    Kind, Memory, Page, Span, Words, break_stretch, claim_stretch, detach_stretch, end_claim, goes_on, showing,
};
use crate::registry::{self, Area};
use crate::signal::{self, BREAKS, DETACHED};
use crate::word::State;
use crate::{ballast, futex, gate};
use core::sync::atomic::{AtomicU32, Ordering};
use rustix::io::Errno;
use std::time::Duration;

/// The one thread that may make a whole mapping writable.
static EMERGENCY: AtomicU32 = AtomicU32::new(0);

/// Makes room for a break that found none: gives up ballast, else breaks the whole mapping (which splits nothing), else makes it
/// writable as it is. Ok: look again; the pages are those that ended Detached.
pub(crate) fn make(area: &Area, page: Page) -> Result<u32, Errno> {
    if ballast::give_up() {
        return Ok(0);
    }
    if area.view.kind() == Kind::Private {
        // Only a thaw can have failed, of pages that the remapper will thaw together, or others' mappings make room for.
        return Err(Errno::NOMEM);
    }
    // One at a time, and the others keep still meanwhile: each needs all pages of its mapping, and while several claim them, page by
    // page, each finds some that another has, for ever.
    let thread = gate::thread_id();
    if let Err(other) = EMERGENCY.compare_exchange(0, thread, Ordering::SeqCst, Ordering::SeqCst) {
        futex::wait(&EMERGENCY, other, Some(Duration::from_millis(1)));
        return Ok(0);
    }
    let done = break_or_detach(area, page);
    EMERGENCY.store(0, Ordering::SeqCst);
    futex::wake_all(&EMERGENCY);
    done
}

/// Tries it as long as those who own a page of the mapping may need to be done with it; EAGAIN then.
fn break_or_detach(area: &Area, page: Page) -> Result<u32, Errno> {
    const TRIES: u32 = 20;
    for _ in 0..TRIES {
        match break_stretch(&area.words, &area.view, page) {
            Ok(0) => {}
            Ok(pages) => {
                BREAKS.fetch_add(u64::from(pages), Ordering::Relaxed);
                return Ok(0);
            }
            Err(_) => match detach_stretch(&area.words, &area.view, page).or_else(|_| detach_beyond(area, page))? {
                0 => {}
                pages => {
                    DETACHED.fetch_add(u64::from(pages), Ordering::Relaxed);
                    return Ok(pages);
                }
            },
        }
        let word = area.words.load(page);
        if word.state() == State::Homed && word.is_lent() {
            // Complete at home, owned by nobody, and there is no room to map it.
            return Err(Errno::AGAIN);
        }
        if !matches!(word.state(), State::Merged | State::Zero) {
            // Whoever had it is at it, or saw to it.
            return Ok(0);
        }
        signal::pause(50_000);
    }
    Err(Errno::AGAIN)
}

/// Detaches what the page's mapping covers where that goes on in regions that adjoin this one. Their words are held by being claimed: a
/// region whose words somebody owns does not end.
#[inline(never)]
fn detach_beyond(area: &Area, page: Page) -> Result<u32, Errno> {
    let Some(mine) = claim_stretch(&area.words, page) else {
        return Ok(0);
    };
    let start = |area: &Area, span: Span| area.view.page(span.first) as usize;
    let (mut low, mut high) = (start(area, mine), start(area, mine) + bytes(mine));
    let claimed = claim_beside(area.era, &mut low, &mut high);
    let alone = high - low == bytes(mine);
    let done = match claimed {
        // Somebody is at it: look again.
        false => Ok(0),
        // There is nothing beside it.
        true if alone => Err(Errno::NOMEM),
        true => area
            .view
            .make_writable(low, high - low)
            .map(|()| (high - low) / PAGE_SIZE),
    };
    let detached = done.is_ok_and(|pages| pages > 0);
    let mut at = low;
    while at < high
        && let Some(found) = registry::find(at)
        && let Some(first) = found.area.view.page_at(at)
    {
        let pages = found.area.view.pages() - first.0;
        let span = Span {
            first,
            pages: pages.min(((high - at) / PAGE_SIZE) as u32),
        };
        end_claim(&found.area.words, span, detached);
        at += bytes(span);
    }
    done.map(|pages| pages as u32)
}

/// Claims what goes on below `low` and above `high` in other regions, and moves these; `false` if any of it belongs to somebody else.
fn claim_beside(era: u32, low: &mut usize, high: &mut usize) -> bool {
    let neighbour = |address: usize| {
        let found = registry::find(address)?;
        let ours = found.area.view.kind() == Kind::Shared && found.area.era == era;
        let page = found.area.view.page_at(address).filter(|_| ours)?;
        Some((found, page))
    };
    for below in [true, false] {
        loop {
            let (outer, inner) = if below { (*low - 1, *low) } else { (*high, *high - 1) };
            let (Some((found, page)), Some((edge, last))) = (neighbour(outer), neighbour(inner)) else {
                break;
            };
            if found.area.view.base() == edge.area.view.base() {
                break;
            }
            // Ours is claimed, and its word tells what it showed.
            let (theirs, ours) = (found.area.words.load(page), showing(edge.area.words.load(last)));
            if theirs.state().is_in_motion() {
                return false;
            }
            let one = if below {
                goes_on(theirs, ours)
            } else {
                goes_on(ours, theirs)
            };
            if !one {
                break;
            }
            let Some(span) = claim_stretch(&found.area.words, page) else {
                return false;
            };
            if below {
                *low -= bytes(span);
            } else {
                *high += bytes(span);
            }
        }
    }
    true
}

fn bytes(span: Span) -> usize {
    span.pages as usize * PAGE_SIZE
}
