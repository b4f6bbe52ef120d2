//! Where the heap's arenas come from: regions of this life's client, which join and leave as all regions do.
//!
//! `ksmrs_sys::heap` lends their memory out. An arena is made with the heap's lock, so nothing here waits for the remapper once the
//! client has begun, and never for a broker.

use super::mailbox::Event;
use super::region::Region;
use super::{Error, client, client_if_begun};
use ksmrs_sys::heap::{self, Supply};
use ksmrs_sys::region::Region as Memory;
use ksmrs_sys::{SysError, born};
use std::sync::Arc;

pub(super) use ksmrs_sys::heap::open_all;
pub use ksmrs_sys::heap::{Fresh, Held, free, held, lend, lent, resize};

/// Has what is lent take part from now on, once it outlived the pass in which it was lent.
///
/// # Errors
/// This process can have no regions, or no memory for the first arena.
pub fn begin_heap() -> Result<(), Error> {
    client()?;
    let begun = heap::begin(Supply { make, end });
    begun.then_some(()).ok_or_else(|| {
        let errno = rustix::io::Errno::NOMEM;
        Error::System(SysError::Call {
            call: "mmap",
            what: "the first arena",
            errno,
        })
    })
}

/// Has nothing of it take part any more, and gives all of it memory of its own.
///
/// # Errors
/// No memory for the copies; some of it may still be merged.
pub fn end_heap() -> Result<(), Error> {
    Ok(heap::withdraw_all()?)
}

/// The arena that an address lies in.
pub fn arena_at(address: usize) -> Option<Arc<Region>> {
    heap::region_at(address).map(Region::of_arena)
}

fn make(pages: u32) -> Option<Arc<Memory>> {
    // In a child that has not begun a life this would begin one, threads and all; but there nothing is lent.
    let client = client_if_begun()?;
    let arena = Memory::arena(client.table, pages)
        .inspect_err(|error| tracing::warn!(%error, "no arena: the C library's memory does not merge"));
    let arena = born::known(arena.ok()?);
    client.mailbox.push(Event::Join(arena.clone()));
    Some(arena)
}

/// The remapper closes it, for that may wait for the scanner.
fn end(arena: Arc<Memory>) {
    if let Some(client) = client_if_begun() {
        client.mailbox.push(Event::End(arena));
    }
}
