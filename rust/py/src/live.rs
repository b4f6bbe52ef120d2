//! Which memory is ours: every live region by its address.
//!
//! `madvise` and `pinned` get any view of a region, an array or a slice of a slice, and look its address up here. Relies on
//! callers holding the GIL, so that a fork never finds the table locked. Never keeps a region alive.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ksmrs_broker::client;
use pyo3::prelude::*;

use crate::error;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

static LIVE: Mutex<BTreeMap<usize, Weak<Memory>>> = Mutex::new(BTreeMap::new());

/// A region's memory with what the client side doesn't say: whether it was closed, and for whom it was adopted.
pub struct Memory {
    /// The client's side of it.
    pub region: Arc<client::Region>,
    closed: AtomicBool,
    holder: Option<usize>,
}

impl Memory {
    /// Takes a new region into the table; `holder` is the number of the object that its memory belongs to, if it was adopted.
    pub fn new(region: Arc<client::Region>, holder: Option<usize>) -> Arc<Memory> {
        let address = region.address();
        let memory = Arc::new(Memory {
            region,
            closed: AtomicBool::new(false),
            holder,
        });
        LIVE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(address, Arc::downgrade(&memory));
        memory
    }

    /// Whom it was adopted for, if it was.
    pub fn holder(&self) -> Option<usize> {
        self.holder
    }

    /// Whether the region was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Makes adopted memory what it was, with its bytes, and marks it closed.
    pub fn give_back(&self) -> Result<(), client::Error> {
        self.region.give_back()?;
        self.close();
        Ok(())
    }

    /// Lets go of adopted memory that is being freed, and marks it closed: private memory without its bytes, shared memory with them.
    pub fn abandon(&self) -> Result<(), client::Error> {
        self.region.abandon()?;
        self.close();
        Ok(())
    }

    /// Marks it closed; false if it was already.
    pub fn close(&self) -> bool {
        !self.closed.swap(true, Ordering::AcqRel)
    }

    fn reaches(&self, address: usize) -> bool {
        self.region.address() + self.region.len() > address
    }

    /// Opens it again, where leaving failed.
    pub fn reopen(&self) {
        self.closed.store(false, Ordering::Release);
    }
}

impl Drop for Memory {
    /// Runs before the region's own drop unmaps the range, so that no newer region can be at this address yet.
    fn drop(&mut self) {
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        // Adopted memory may have been given back and adopted again meanwhile: that entry is another's.
        if live
            .get(&self.region.address())
            .is_some_and(|entry| entry.strong_count() == 0)
        {
            live.remove(&self.region.address());
        }
    }
}

/// A range of bytes within one live region.
pub struct Within {
    /// The region.
    pub memory: Arc<Memory>,
    bytes: Range<usize>,
}

impl Within {
    /// The pages that lie wholly in the range. The rest of a region's last page is nobody's, so it doesn't keep it out.
    pub fn whole_pages(&self) -> Range<usize> {
        let last = if self.bytes.end == self.memory.region.len() {
            self.bytes.end.div_ceil(PAGE_SIZE)
        } else {
            self.bytes.end / PAGE_SIZE
        };
        self.bytes.start.div_ceil(PAGE_SIZE)..last
    }

    /// The pages that the range touches.
    pub fn touched_pages(&self) -> Range<usize> {
        self.bytes.start / PAGE_SIZE..self.bytes.end.div_ceil(PAGE_SIZE)
    }
}

/// The arena of NumPy's allocator that an address lies in: in the table for as long as somebody advises or pins parts of it.
fn arena_at(address: usize) -> Option<Arc<Memory>> {
    let arena = client::arena_at(address)?;
    let known = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
    let memory = known.get(&arena.address()).and_then(Weak::upgrade);
    // What is dropped last locks the table.
    drop(known);
    // An arena that ended may have been there before.
    let memory = memory.filter(|memory| !memory.region.is_ended());
    Some(memory.unwrap_or_else(|| Memory::new(arena, None)))
}

/// The open regions that a range touches, in order.
pub fn touching(address: usize, nbytes: usize) -> Vec<Arc<Memory>> {
    let _arena = arena_at(address);
    let live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
    let end = address.saturating_add(nbytes);
    let mut found = down_to_an_open_one(live.range(..address));
    found.reverse();
    found.extend(live.range(address..end).filter_map(|(_, memory)| memory.upgrade()));
    // What is dropped last locks the table.
    drop(live);
    found.retain(|memory| !memory.is_closed() && memory.reaches(address));
    found
}

/// The last of some regions, and those before it up to one that is open: where one was closed another may lie by now, and begin before it.
fn down_to_an_open_one<'a>(
    regions: impl DoubleEndedIterator<Item = (&'a usize, &'a Weak<Memory>)>,
) -> Vec<Arc<Memory>> {
    let mut found = Vec::new();
    for memory in regions.rev().filter_map(|(_, memory)| memory.upgrade()) {
        let open = !memory.is_closed();
        found.push(memory);
        if open {
            break;
        }
    }
    found
}

/// Finds the live, open region that a range lies in.
pub fn find(py: Python<'_>, address: usize, nbytes: usize) -> PyResult<Within> {
    let _arena = arena_at(address);
    let before = down_to_an_open_one(LIVE.lock().unwrap_or_else(PoisonError::into_inner).range(..=address));
    let open = before
        .iter()
        .find(|memory| !memory.is_closed() && memory.reaches(address));
    let found = open.or(before.first()).cloned().and_then(|memory| {
        let first = address - memory.region.address();
        let end = first.checked_add(nbytes)?;
        (end <= memory.region.len() && (first < end || first < memory.region.len())).then_some(Within {
            memory,
            bytes: first..end,
        })
    });
    match found {
        None => Err(error::named(
            py,
            "ForeignMemoryError",
            format!(
                "the {nbytes} bytes at {address:#x} are not memory that ksmrs made: copy them with ksmrs.array(), or use \
                 ksmrs.Region"
            ),
        )),
        Some(within) if within.memory.is_closed() => Err(error::closed(py)),
        Some(within) => Ok(within),
    }
}
