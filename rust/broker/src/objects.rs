//! Named objects that clients opted in: the lease on each, and its pages when the client is gone.
//!
//! A merged page is missing in its object, so nobody but the client may look at that. The lease, taken here and asked about here,
//! makes whoever opens the object wait until the client took its pages home, or, when there is no client any more, until they are
//! written back from their frames. A client that does not answer, for it is stopped, has its pages *lent*: completed in the
//! object under the rules of the page-state protocol, so that it may go on at any moment. It relies on the words of a dead
//! process standing still, believes a descriptor only after it was vetted, and writes only to pages that are holes.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::Duration;

use ksmrs_sys::lease::Description;
use ksmrs_sys::page_table::TableView;
use ksmrs_sys::sharers::ObjectId;
use ksmrs_sys::store::Store;
use ksmrs_sys::{PAGE_SIZE, Slot, State, StoreNumber, SysError, Word};

use crate::wire;

/// How often it is asked whether somebody waits for a lease to end.
const LEASE_WATCH: Duration = Duration::from_millis(50);
/// How long a client may take to bring its pages home before they are lent; a third of what the kernel grants it, at most.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pages written back at once.
const PAGES_AT_ONCE: u32 = 512;

/// Where the pages of a region lie in its object.
#[derive(Clone, Copy, Debug)]
struct Place {
    first_word: u32,
    pages: u32,
    offset: u64,
}

impl Place {
    fn offset_of(&self, page: u32) -> u64 {
        self.offset + u64::from(page) * PAGE_SIZE as u64
    }

    /// How many of its pages the object has: what was cut off by its owner is not to come back.
    fn pages_there(&self, description: &Description) -> Result<u32, SysError> {
        let there = description.size()?.saturating_sub(self.offset) / PAGE_SIZE as u64;
        Ok(self.pages.min(u32::try_from(there).unwrap_or(u32::MAX)))
    }
}

/// An object, held for one client.
struct Held {
    description: Description,
    client: u32,
    /// By the client's numbers.
    regions: BTreeMap<u32, Place>,
    waiting: Waiting,
}

/// Whether somebody waits to open an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    Nobody,
    /// The client was told, and is given until then.
    Until(Duration),
    /// Not any more: the object holds all its bytes, but the client does not know yet.
    Lent,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Objects {
    held: BTreeMap<ObjectId, Held>,
    next_watch: Duration,
}

impl Objects {
    /// A region of a named object opts in: the lease is taken; the reason if it cannot. `was` tells whether a client that holds the
    /// object already is the same process in an earlier connection, which took its pages home.
    pub(crate) fn join(
        &mut self,
        client: u32,
        region: u32,
        (first_word, pages): (u32, u32),
        object: wire::Object,
        fd: OwnedFd,
        was: impl FnOnce(u32) -> bool,
    ) -> Result<(), String> {
        let id = ObjectId {
            device: object.device,
            inode: object.inode,
        };
        let place = Place {
            first_word,
            pages,
            offset: object.offset,
        };
        if self.held.get(&id).is_some_and(|held| was(held.client)) {
            self.held.remove(&id);
        }
        if let Some(held) = self.held.get_mut(&id) {
            if held.client != client {
                return Err(format!("client {} has opted it in", held.client));
            }
            if held.waiting != Waiting::Nobody {
                return Err("somebody has opened it".to_owned());
            }
            held.regions.insert(region, place);
            return Ok(());
        }
        let description = Description::vet(fd, id).map_err(|error| error.to_string())?;
        let end = object.offset + u64::from(pages) * PAGE_SIZE as u64;
        let size = description.size().map_err(|error| error.to_string())?;
        if size < end {
            return Err(format!("it has {size} bytes, and the region ends at {end}"));
        }
        description.lease().map_err(|error| match error.errno() {
            Some(errno) if errno == rustix::io::Errno::AGAIN.raw_os_error() => {
                "it is open more than once, here or elsewhere".to_owned()
            }
            _ => error.to_string(),
        })?;
        let held = Held {
            description,
            client,
            regions: BTreeMap::from([(region, place)]),
            waiting: Waiting::Nobody,
        };
        self.held.insert(id, held);
        Ok(())
    }

    /// A region's pages are in its object again; with the last region of an object the lease ends.
    pub(crate) fn leave(&mut self, client: u32, region: u32) {
        self.held.retain(|_, held| {
            if held.client == client {
                held.regions.remove(&region);
            }
            if held.regions.is_empty() {
                release(held);
                return false;
            }
            true
        });
    }

    /// Regions that somebody began to wait for: each is told once.
    pub(crate) fn recalls(&mut self, now: Duration) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        if now < self.next_watch {
            return found;
        }
        self.next_watch = now + LEASE_WATCH;
        for held in self.held.values_mut().filter(|held| held.waiting == Waiting::Nobody) {
            if !held.description.is_leased() {
                held.waiting = Waiting::Until(now + patience());
                found.extend(held.regions.keys().map(|region| (held.client, *region)));
            }
        }
        found
    }

    /// When to ask for recalls again; `None` while there is nothing to ask about.
    pub(crate) fn next_watch(&self) -> Option<Duration> {
        let watched = self.held.values().any(|held| held.waiting != Waiting::Lent);
        watched.then_some(self.next_watch)
    }

    /// Clients that took too long.
    pub(crate) fn overdue(&self, now: Duration) -> BTreeSet<u32> {
        let overdue = |held: &&Held| matches!(held.waiting, Waiting::Until(until) if until <= now);
        self.held.values().filter(overdue).map(|held| held.client).collect()
    }

    /// Lends the pages of a client's overdue objects out, and lets go on who waits for them, each as soon as it is whole. What a
    /// thread of the client owns right now is tried again.
    ///
    /// # Errors
    /// The first of an object that has no room, or whose pages' frames cannot be read.
    pub(crate) fn lend(
        &mut self,
        client: u32,
        now: Duration,
        table: &TableView,
        number: StoreNumber,
        store: &mut Store,
    ) -> Result<(), SysError> {
        let mut failed = None;
        for held in self.held.values_mut().filter(|held| held.client == client) {
            if !matches!(held.waiting, Waiting::Until(until) if until <= now) {
                continue;
            }
            match held.lend(table, number, store) {
                Ok(true) => {
                    tracing::info!(
                        client,
                        "it does not answer: its pages are lent to whoever opened its object"
                    );
                    held.waiting = Waiting::Lent;
                    release(held);
                }
                Ok(false) => {}
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether a client has any.
    pub(crate) fn are_of(&self, client: u32) -> bool {
        self.held.values().any(|held| held.client == client)
    }

    /// Writes the pages of a dead client's objects back and lets the objects go, each as soon as it is whole.
    ///
    /// # Errors
    /// The first of an object without room: whatever is not back yet is still in its frames; try again.
    pub(crate) fn write_back(
        &mut self,
        client: u32,
        word: &dyn Fn(u32) -> Option<Word>,
        number: StoreNumber,
        store: &mut Store,
    ) -> Result<(), SysError> {
        let mut failed = None;
        self.held.retain(|_, held| {
            if held.client != client {
                return true;
            }
            match held.write_back(word, number, store) {
                Ok(pages) => tracing::info!(client, pages, "its object holds all its bytes again"),
                // Sealed against writing: nobody's bytes but its own maker's are lost.
                Err(error) if error.errno() == Some(rustix::io::Errno::PERM.raw_os_error()) => {
                    tracing::error!(client, %error, "pages cannot be written back to their object");
                }
                Err(error) => {
                    failed.get_or_insert(error);
                    return true;
                }
            }
            // Also after an exec: the next program may have inherited the description.
            release(held);
            false
        });
        failed.map_or(Ok(()), Err)
    }
}

impl Held {
    /// Whether all its pages are home or lent now.
    fn lend(&self, table: &TableView, number: StoreNumber, store: &mut Store) -> Result<bool, SysError> {
        let slots = store.slots();
        let known = |word: Word| {
            word.frame()
                .is_none_or(|(store, slot)| store == number && slot.0 < slots)
        };
        let mut whole = true;
        for place in self.regions.values() {
            whole &= table.lend(place.first_word, place.pages, known, |page, pages, word| {
                let Some((_, slot)) = word.frame() else { return Ok(()) };
                let pages = pages.min(place.pages_there(&self.description)?.saturating_sub(page));
                store.fill_holes(&self.description, place.offset_of(page), slot, pages)?;
                Ok(())
            })?;
        }
        Ok(whole)
    }

    /// How many pages were missing.
    fn write_back(
        &self,
        word: &dyn Fn(u32) -> Option<Word>,
        number: StoreNumber,
        store: &mut Store,
    ) -> Result<u32, SysError> {
        let mut written = 0;
        for place in self.regions.values() {
            written += write_back(&self.description, *place, word, number, store)?;
        }
        Ok(written)
    }
}

fn patience() -> Duration {
    match Description::break_time() {
        Duration::ZERO => PATIENCE,
        most => PATIENCE.min(most / 3),
    }
}

/// Whoever waits goes on.
fn release(held: &Held) {
    // There is none any more if it was waited for too long.
    if let Err(error) = held.description.release() {
        tracing::debug!(client = held.client, %error, "no lease to give up");
    }
}

/// How a dead client's page is brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// Its home is a hole, or complete.
    Perhaps(Slot),
    /// Its home was being filled, and nobody had written to it yet.
    Partly(Slot),
}

/// What a word says about the page's home. Frames of other stores are out of reach; the client took such pages home long ago. A
/// word that lies names a slot that is not there.
fn missing(word: Word, number: StoreNumber, slots: u32) -> Option<Missing> {
    let (store, slot) = word.frame()?;
    if store != number || slot.0 >= slots {
        return None;
    }
    match word.checked_state()? {
        State::Breaking => Some(Missing::Partly(slot)),
        // Complete, and newer than the frame.
        State::Homed | State::Private | State::Leaving => None,
        _ => Some(Missing::Perhaps(slot)),
    }
}

fn write_back(
    description: &Description,
    place: Place,
    word: &dyn Fn(u32) -> Option<Word>,
    number: StoreNumber,
    store: &mut Store,
) -> Result<u32, SysError> {
    let slots = store.slots();
    let of = |page: u32| missing(word(place.first_word + page)?, number, slots);
    let pages = place.pages_there(description)?;
    let mut written = 0;
    let mut page = 0;
    while page < pages {
        let Some(first) = of(page) else {
            page += 1;
            continue;
        };
        let mut run = 1;
        while run < PAGES_AT_ONCE && page + run < pages && of(page + run) == Some(first.plus(run)) {
            run += 1;
        }
        let offset = place.offset_of(page);
        written += match first {
            Missing::Perhaps(slot) => store.fill_holes(description, offset, slot, run)?,
            Missing::Partly(slot) => store.copy_to(description, offset, slot, run)?,
        };
        page += run;
    }
    Ok(written)
}

impl Missing {
    fn plus(self, pages: u32) -> Missing {
        match self {
            Missing::Perhaps(slot) => Missing::Perhaps(slot.plus(pages)),
            Missing::Partly(slot) => Missing::Partly(slot.plus(pages)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_home_stays_as_it_is() {
        let (ours, other) = (StoreNumber(2), StoreNumber(3));
        let slot = Slot(7);
        let word = |state| Word::PRIVATE.with_state(state).with_frame(ours, slot);
        for state in [
            State::Merged,
            State::Committing,
            State::Detached,
            State::Held,
            State::Frozen,
        ] {
            assert_eq!(missing(word(state), ours, 8), Some(Missing::Perhaps(slot)), "{state:?}");
            assert_eq!(missing(word(state), other, 8), None);
        }
        assert_eq!(missing(word(State::Breaking), ours, 8), Some(Missing::Partly(slot)));
        assert_eq!(missing(word(State::Homed), ours, 8), None);
        assert_eq!(missing(Word::PRIVATE, ours, 8), None);
        assert_eq!(missing(Word::PRIVATE.with_state(State::Zero), ours, 8), None);
        assert_eq!(missing(Word(15), ours, 8), None);
        assert_eq!(missing(word(State::Merged), ours, 7), None, "no such slot");
    }
}
