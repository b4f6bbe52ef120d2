//! Memory that is lent out in blocks and merges while it is lent: what a program's allocator is made of.
//!
//! Blocks are whole pages of *arenas*, regions of which only some pages take part (`parts.rs`). A block takes part once it outlived
//! a pass, so that what lives for moments costs nothing but its place, and, if it was lent with an earlier one's bytes, once it is sure to
//! be filled ([`FILLED`]); freed, it is abandoned: what shows a frame becomes fresh
//! memory and nothing is copied. What is freed without having taken part keeps its memory for the next block of that size, up to
//! [`KEEP`], until nobody came for it through a pass and [`SURPLUS`]. A lent address is found in a table of 2 MiB units, without a lock.
//!
//! ```text
//!   lend --> Lent --(a pass began, and another)--> Open --(withdraw: unmerged, copied)--> Lent, or Out if pinned
//!             |  free: kept for the next               |  free: taken out of merging, fresh where it was merged
//!             `------------------> bin or free run <---'
//! ```
//!
//! Arenas come from whoever began ([`begin`]), who knows of brokers; nothing here waits for one. The heap's lock is taken by program
//! threads, by the remapper for moments, and by fork (`fork.rs`), always before the locks of regions, the registry and the gate.
//! In a child that is not registered nothing is lent, and freeing touches no word.

mod arena;
mod room;

use crate::error::SysError;
use crate::failpoint::{self, Failpoint};
use crate::fork;
use crate::object::PAGE_SIZE;
use crate::protocol::Span;
use crate::region::Region;
use arena::{Arena, Block, Life, span};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use room::{Bins, Place, Room, UNIT, size_of};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that freed blocks keep at most for the next of their size: as in the C library twice the largest that was freed, but no less
/// and no more than this. Blocks of one size serve no other, so that more would lie idle here than there.
pub const KEEP: core::ops::RangeInclusive<usize> = 4 << 20..=64 << 20;
/// How long blocks that nobody comes for keep their memory at least: less than a program that computes anything lets them lie.
const SURPLUS: Duration = Duration::from_secs(1);
/// How long a block with the bytes of an earlier one is taken for one that a system call may be filling. What it has not filled yet may
/// equal something, and is frozen while it merges: the call would stop there and say EFAULT, or how far it came, which NumPy's `fromfile`
/// does not look at. 32 MiB are read in less. Memory without bytes merges with nothing.
const FILLED: u8 = 10;
/// Larger blocks give their memory back when they are freed, as the C library unmaps such.
const KEEP_BLOCK: u32 = (32 << 20) / PAGE_SIZE as u32;
/// From this size on a block's memory is asked to be of huge pages, as NumPy does for its own: the first write to each 2 MiB, and
/// walking through them, then cost a third of what small pages cost.
const HUGE_FROM: u32 = (4 << 20) / PAGE_SIZE as u32;
/// Pages of an arena, unless a block needs more.
const ARENA: u32 = (64 << 20) / PAGE_SIZE as u32;
/// Free arenas beyond this number end.
const IDLE: usize = 2;

/// Where arenas come from and go to.
#[derive(Clone, Copy)]
pub struct Supply {
    /// Makes one of so many pages and has it join; `None` where there is no room.
    pub make: fn(u32) -> Option<Arc<Region>>,
    /// Takes one that no block is lent from.
    pub end: fn(Arc<Region>),
}

/// What the heap holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Addresses of all arenas.
    pub arenas: usize,
    /// As the lent blocks were asked for.
    pub lent: usize,
    /// Of lent blocks that take part.
    pub open: usize,
    /// Memory of freed blocks, for the next ones.
    pub kept: usize,
}

/// Memory just lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// Its first byte, which is a page's.
    pub address: usize,
    /// Whether all of it reads as zeros.
    pub zeros: bool,
}

struct Heap {
    supply: Option<Supply>,
    /// Whether large blocks are to be of huge pages.
    huge: bool,
    /// The life whose arenas these are.
    era: Option<u32>,
    next: u32,
    arenas: BTreeMap<u32, Arc<Arena>>,
    room: Room,
    bins: Bins,
    /// Arenas of which nothing is lent or kept.
    idle: usize,
    /// Pages of the largest block that was freed and kept its memory.
    largest: u32,
    /// When it was last asked which blocks nobody came for.
    asked: Option<Instant>,
}

static HEAP: Mutex<Heap> = Mutex::new(Heap {
    supply: None,
    huge: false,
    era: None,
    next: 0,
    arenas: BTreeMap::new(),
    room: Room::new(),
    bins: Bins::new(),
    idle: 0,
    largest: 0,
    asked: None,
});

/// The pass that is under way, as far as this process knows.
static PASS: AtomicU32 = AtomicU32::new(0);
/// Whether blocks that outlive a pass take part.
static OPENS: AtomicBool = AtomicBool::new(false);

/// The heap's lock, which a fork holds so that no child inherits it locked.
pub(crate) struct Still {
    _heap: MutexGuard<'static, Heap>,
}

/// Keeps the heap as it is.
pub(crate) fn still() -> Still {
    Still {
        _heap: HEAP.lock().unwrap_or_else(PoisonError::into_inner),
    }
}

fn heap() -> MutexGuard<'static, Heap> {
    let mut heap = HEAP.lock().unwrap_or_else(PoisonError::into_inner);
    let era = fork::era();
    if heap.era != era {
        heap.begin_era(era);
    }
    heap
}

fn arenas() -> Vec<Arc<Arena>> {
    heap().arenas.values().cloned().collect()
}

impl Heap {
    /// In a child: what it was born with goes on, the rest is nobody's any more.
    fn begin_era(&mut self, era: Option<u32>) {
        self.era = era;
        let gone: Vec<u32> = self
            .arenas
            .values()
            .filter(|arena| !arena.region.is_ours())
            .map(|arena| arena.number)
            .collect();
        for number in gone {
            self.room.forget(number);
            self.bins.forget(number);
            // Its blocks are still lent, and found; it never ends.
            if let Some(arena) = self.arenas.remove(&number) {
                core::mem::forget(arena);
            }
        }
        let arenas: Vec<Place> = self.arenas.values().map(|arena| place(arena, 0)).collect();
        self.idle = arenas.into_iter().filter(|place| self.is_idle(*place)).count();
    }

    fn is_idle(&self, place: Place) -> bool {
        let pages = |arena: &Arc<Arena>| arena.region.pages();
        let whole = self.arenas.get(&place.arena).map(pages);
        whole.is_some() && self.room.run_at(Place { first: 0, ..place }) == whole
    }

    /// Finds room for a block, and whether it reads as zeros.
    fn find(&mut self, pages: u32) -> Option<(Place, bool)> {
        if let Some(place) = self.bins.pop(pages) {
            return Some((place, false));
        }
        let mut found = self.take(pages);
        if found.is_none() && self.bins.pages() >= pages {
            self.give_memory_back();
            found = self.take(pages);
        }
        if found.is_none() {
            self.add_arena(pages.next_multiple_of(UNIT).max(ARENA))?;
            found = self.take(pages);
        }
        found.map(|place| (place, true))
    }

    fn take(&mut self, pages: u32) -> Option<Place> {
        let place = self.room.take(pages)?;
        // It was idle if what was taken and what is left on both sides of it are all of it.
        let whole = self.arenas.get(&place.arena)?.region.pages();
        let run_at = |first| self.room.run_at(Place { first, ..place }).unwrap_or(0);
        let before = if place.first == 0 { 0 } else { run_at(0) };
        self.idle -= usize::from(before + pages + run_at(place.first + pages) == whole);
        Some(place)
    }

    fn add_arena(&mut self, pages: u32) -> Option<()> {
        let supply = self.supply?;
        let region = (supply.make)(pages)?;
        let arena = Arena::new(self.next, region.clone()).map(Arc::new);
        let Some(arena) = arena.filter(arena::publish) else {
            (supply.end)(region);
            return None;
        };
        self.next += 1;
        self.room.give(place(&arena, 0), pages);
        self.arenas.insert(arena.number, arena);
        self.idle += 1;
        Some(())
    }

    /// Takes pages back that hold no memory.
    fn give_back(&mut self, place: Place, pages: u32) {
        let free = self.room.give(place, pages);
        let Some(arena) = self.arenas.get(&place.arena) else {
            return;
        };
        if free < arena.region.pages() {
            return;
        }
        self.idle += 1;
        if self.idle > IDLE {
            self.idle -= 1;
            self.room.forget(place.arena);
            if let (Some(arena), Some(supply)) = (self.arenas.remove(&place.arena), self.supply) {
                arena::forget(&arena);
                (supply.end)(arena.region.clone());
            }
        }
    }

    /// Keeps the memory of a block that was freed, unless that makes too much.
    fn keep(&mut self, place: Place, pages: u32) {
        self.bins.push(place, pages);
        self.largest = self.largest.max(pages);
        let most = (2 * self.largest as usize * PAGE_SIZE).clamp(*KEEP.start(), *KEEP.end());
        if self.bins.pages() as usize * PAGE_SIZE > most {
            self.give_memory_back();
        }
    }

    /// Gives up the memory of all blocks in bins.
    fn give_memory_back(&mut self) {
        let blocks = self.bins.drain();
        self.give_up(blocks);
    }

    /// Gives up the memory of the blocks that nobody came for since the last time, unless that was just now.
    fn give_surplus_back(&mut self) {
        if self.asked.is_some_and(|asked| asked.elapsed() < SURPLUS) {
            return;
        }
        self.asked = Some(Instant::now());
        let blocks = self.bins.drain_surplus();
        self.give_up(blocks);
    }

    fn give_up(&mut self, blocks: Vec<(Place, u32)>) {
        for (place, pages) in blocks {
            let discarded = self
                .arenas
                .get(&place.arena)
                .is_some_and(|arena| discard(&arena.region, span(place.first, pages)));
            if discarded {
                self.give_back(place, pages);
            } else {
                self.bins.push(place, pages);
            }
        }
    }
}

/// Gives a block's memory back. Advice stays with addresses, so those of a large block are replaced: a small one that begins there later
/// must not be given 2 MiB at its first byte.
fn discard(region: &Region, span: Span) -> bool {
    if span.pages >= HUGE_FROM {
        region.replace_pages(span)
    } else {
        region.discard_pages(span)
    }
}

fn place(arena: &Arena, first: u32) -> Place {
    Place {
        arena: arena.number,
        first,
    }
}

/// Says where arenas come from, makes the first one, so that children are born with it, and has blocks take part from now on. False
/// where none can be had.
pub fn begin(supply: Supply) -> bool {
    // The switch that NumPy has for its own.
    let huge = std::env::var_os("NUMPY_MADVISE_HUGEPAGE").is_none_or(|value| value != "0");
    let mut heap = heap();
    (heap.supply, heap.huge) = (Some(supply), huge);
    OPENS.store(true, Ordering::Release);
    !heap.arenas.is_empty() || heap.add_arena(ARENA).is_some()
}

/// Lends memory that takes part once it outlived a pass; `None` where there is no room, and in a child that is not registered. Never
/// waits for a broker.
pub fn lend(bytes: usize) -> Option<Fresh> {
    if fork::is_unregistered() {
        return None;
    }
    let pages = u32::try_from(bytes.max(1).div_ceil(PAGE_SIZE))
        .ok()
        .filter(|pages| *pages <= 1 << 30)?;
    let pages = match pages {
        ..=KEEP_BLOCK => size_of(pages),
        _ => pages.next_multiple_of(UNIT),
    };
    let mut heap = heap();
    let (place, zeros) = heap.find(pages)?;
    let arena = heap.arenas.get(&place.arena)?;
    let block = Block {
        life: Life::Lent,
        used: !zeros,
        pass: PASS.load(Ordering::Relaxed) as u16,
        second: second(),
        pages,
    };
    arena.lend(place.first, block, bytes, this_thread());
    let address = arena.address(place.first);
    if zeros && pages >= HUGE_FROM && heap.huge {
        // Lent, it keeps its arena there.
        let region = arena.region.clone();
        drop(heap);
        region.want_huge_pages(span(place.first, pages));
    }
    Some(Fresh { address, zeros })
}

/// The second that it is, of 256.
fn second() -> u8 {
    rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse).tv_sec as u8
}

/// A number of the thread that calls.
fn this_thread() -> u16 {
    static THREADS: AtomicU32 = AtomicU32::new(0);
    thread_local! {
        static NUMBER: u16 = THREADS.fetch_add(1, Ordering::Relaxed) as u16;
    }
    // A thread that ends frees what it has, and may want memory for that.
    NUMBER.try_with(|number| *number).unwrap_or(0)
}

/// Whether no system call fills a block any more, as far as its age tells: one that is not opened for 256 seconds waits ten more.
fn is_filled(block: Block, now: u8) -> bool {
    !block.used || now.wrapping_sub(block.second) >= FILLED
}

/// Bytes that were asked for at a lent address, and bytes that are there; `None` where nothing of the heap begins.
pub fn lent(address: usize) -> Option<(usize, usize)> {
    // SAFETY: whoever asks of memory that is lent keeps it meanwhile.
    let (arena, first) = unsafe { arena::find(address) }?;
    let block = arena.block(first);
    (block.life != Life::Free).then(|| (arena.bytes(first), block.pages as usize * PAGE_SIZE))
}

/// Notes that a lent block is used for another number of bytes, at most as many as there are.
pub fn resize(address: usize, bytes: usize) {
    // SAFETY: as for `lent`.
    if let Some((arena, first)) = unsafe { arena::find(address) } {
        arena.set_bytes(first, bytes);
    }
}

/// Takes memory back that was lent; false where nothing of the heap begins.
pub fn free(address: usize) -> bool {
    // SAFETY: whoever frees memory has it.
    let Some((arena, first)) = (unsafe { arena::find(address) }) else {
        return false;
    };
    // From here on the arena may end with the next block that is given back; this one is not, before the end.
    let block = arena.take_back(first);
    let span = span(first, block.pages);
    match block.life {
        Life::Free => return false,
        _ if !arena.region.is_ours() => {
            // Of a process that this one was forked from; its place is not lent again here.
            arena.region.forget_pages(span);
            return true;
        }
        Life::Open | Life::Out if arena.region.abandon_pages(span).is_err() => {
            // Some of it shows frames, and there is no mapping to be had for anything else: its place is lost.
            return true;
        }
        Life::Open | Life::Out => arena.region.forget_holds(span),
        Life::Lent if arena.region.has_holds() => arena.region.forget_holds(span),
        Life::Lent => {}
    }
    let place = place(arena, first);
    let discarded = block.pages > KEEP_BLOCK && discard(&arena.region, span);
    let mut heap = heap();
    if discarded {
        heap.give_back(place, block.pages);
    } else {
        heap.keep(place, block.pages);
    }
    true
}

/// A pass began, as the broker says: what was lent before it, and before the last look, takes part, and memory that is kept for blocks
/// that did not come goes back.
pub fn pass_began(pass: u16) {
    if PASS.swap(pass.into(), Ordering::AcqRel) == u32::from(pass) || !blocks_take_part() {
        return;
    }
    let now = second();
    for arena in arenas() {
        open(&arena, blocks_take_part, |_, block| {
            block.pass != pass && is_filled(block, now)
        });
    }
    heap().give_surplus_back();
}

/// Has all that is lent take part at once, unless it was withdrawn, or another thread than the one that calls may be filling it.
pub fn open_all() {
    if !blocks_take_part() {
        return;
    }
    let (now, caller) = (second(), this_thread());
    for arena in arenas() {
        open(&arena, blocks_take_part, |first, block| {
            is_filled(block, now) || arena.thread(first) == caller
        });
    }
}

/// Has blocks take part at once that touch a range of an arena's addresses, for the program asked for these.
pub(crate) fn open_range(range: &Range<usize>) {
    for arena in arenas() {
        let asked = || true;
        open(&arena, asked, |first, block| {
            let start = arena.address(first);
            start < range.end && range.start < start + block.pages as usize * PAGE_SIZE
        });
    }
}

fn blocks_take_part() -> bool {
    OPENS.load(Ordering::Acquire)
}

fn open(arena: &Arena, wanted: impl Fn() -> bool, chosen: impl Fn(u32, Block) -> bool) {
    for (first, block) in arena.lent() {
        if matches!(block.life, Life::Lent | Life::Out) && chosen(first, block) {
            failpoint::hit(Failpoint::BlockChosen);
            // Asked where a withdrawal waits: after it, nobody begins.
            arena.region.open_pages_if(span(first, block.pages), || {
                let wanted = wanted();
                failpoint::hit(Failpoint::BlockWanted);
                wanted && arena.advance(first, block, Life::Open)
            });
        }
    }
}

/// From now on nothing that is lent takes part, and nothing of it is merged any more. Pinned pages stay where they are.
///
/// # Errors
/// No memory for the copies; some of it may still be merged.
pub fn withdraw_all() -> Result<(), SysError> {
    OPENS.store(false, Ordering::Release);
    for arena in arenas() {
        arena.region.await_openings();
        for (first, block) in arena.lent().filter(|(_, block)| block.life == Life::Open) {
            let still = || arena.block(first) == block;
            // Whoever frees it meanwhile waits until this is done.
            let done = |is_plain| {
                arena.advance(first, block, if is_plain { Life::Lent } else { Life::Out });
            };
            arena.region.withdraw_pages_if(span(first, block.pages), still, done)?;
        }
    }
    heap().give_memory_back();
    Ok(())
}

/// The arena that an address lies in, as a region.
pub fn region_at(address: usize) -> Option<Arc<Region>> {
    let within = |arena: &&Arc<Arena>| {
        let start = arena.region.address();
        (start..start + arena.region.pages() as usize * PAGE_SIZE).contains(&address)
    };
    heap().arenas.values().find(within).map(|arena| arena.region.clone())
}

/// What there is.
pub fn held() -> Held {
    let mut held = Held {
        kept: heap().bins.pages() as usize * PAGE_SIZE,
        ..Held::default()
    };
    for arena in arenas() {
        held.arenas += arena.region.pages() as usize * PAGE_SIZE;
        for (first, block) in arena.lent() {
            held.lent += arena.bytes(first);
            if block.life == Life::Open {
                held.open += block.pages as usize * PAGE_SIZE;
            }
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_table::ClientTable;

    fn make(pages: u32) -> Option<Arc<Region>> {
        static TABLE: std::sync::OnceLock<ClientTable> = std::sync::OnceLock::new();
        let table = TABLE.get_or_init(|| ClientTable::create(8 * ARENA).unwrap().0);
        Region::arena(table, pages).ok().map(Arc::new)
    }

    /// Their addresses are anybody's next.
    #[test]
    fn ended_arenas_are_found_no_more() {
        fork::begin_life(|_| ()).unwrap();
        let end = |arena: Arc<Region>| arena.close();
        assert!(begin(Supply { make, end }));
        let blocks = [(); IDLE + 3].map(|()| lend(ARENA as usize * PAGE_SIZE).unwrap().address);
        assert!(blocks.iter().all(|address| lent(*address).is_some() && free(*address)));
        // SAFETY: of what is found only that it is.
        let found = blocks
            .iter()
            .filter(|address| unsafe { arena::find(**address) }.is_some());
        assert_eq!(found.count(), IDLE);
        assert_eq!(held().arenas, IDLE * ARENA as usize * PAGE_SIZE);
    }
}
