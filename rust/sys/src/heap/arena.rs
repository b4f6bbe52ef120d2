//! An arena: a region whose memory is lent out in blocks, a word for each, and the table that finds it by an address.
//!
//! A block's word says how far its life has come; it moves by atomic operations alone, so that whoever frees, whoever opens and whoever
//! looks need no common lock. Addresses are looked up without one, in a table of 2 MiB units; that an arena does not end while one of
//! its blocks is lent is what makes that sound.

use super::room::UNIT;
use crate::object::{EXTENT_SIZE, PAGE_SIZE};
use crate::protocol::{Page, Span};
use crate::region::Region;
use core::alloc::Layout;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::alloc::alloc_zeroed;
use std::ptr;
use std::sync::Arc;

/// How far a block's life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// No block begins here, or a free one.
    Free,
    /// Lent, and out of merging.
    Lent,
    /// Lent, and taking part.
    Open,
    /// Lent, and out of merging again, but for some pinned pages over slots, which could not be moved.
    Out,
}

/// A block's word: its life, when it was lent and with what in it, its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) life: Life,
    /// Whether it was lent with the bytes of an earlier one.
    pub(super) used: bool,
    /// The pass in which it was lent.
    pub(super) pass: u16,
    /// The second in which it was lent, of 256.
    pub(super) second: u8,
    pub(super) pages: u32,
}

impl Block {
    const FREE: u64 = 0;

    fn word(self) -> u64 {
        let life = match self.life {
            Life::Free => return Block::FREE,
            Life::Lent => 1,
            Life::Open => 2,
            Life::Out => 3,
        };
        let when = u64::from(self.pass) << 8 | u64::from(self.second) << 24;
        life | u64::from(self.used) << 2 | when | u64::from(self.pages) << 32
    }

    fn of(word: u64) -> Block {
        Block {
            life: match word & 3 {
                1 => Life::Lent,
                2 => Life::Open,
                3 => Life::Out,
                _ => Life::Free,
            },
            used: word & 4 != 0,
            pass: (word >> 8) as u16,
            second: (word >> 24) as u8,
            pages: (word >> 32) as u32,
        }
    }
}

/// A region that is lent out in blocks.
pub(super) struct Arena {
    pub(super) number: u32,
    pub(super) region: Arc<Region>,
    /// By first page, as are `asked`: how many bytes were asked for, and above them by which thread.
    blocks: Box<[AtomicU64]>,
    asked: Box<[AtomicU64]>,
}

const BYTES: u64 = (1 << 48) - 1;

/// Zeros that need no memory before they are written; `None` where there is no room, for an allocator must not end its program.
fn zeros(count: u32) -> Option<Box<[AtomicU64]>> {
    let layout = Layout::array::<AtomicU64>(count as usize).ok().filter(|_| count > 0)?;
    // SAFETY: the layout is of some size, and of a slice of that length, for which zeros are valid; the box is its only owner.
    unsafe {
        let start = alloc_zeroed(layout).cast::<AtomicU64>();
        (!start.is_null()).then(|| Box::from_raw(ptr::slice_from_raw_parts_mut(start, count as usize)))
    }
}

impl Arena {
    pub(super) fn new(number: u32, region: Arc<Region>) -> Option<Arena> {
        let pages = region.pages();
        Some(Arena {
            number,
            region,
            blocks: zeros(pages)?,
            asked: zeros(pages)?,
        })
    }

    /// Where the block that begins with this page begins.
    pub(super) fn address(&self, first: u32) -> usize {
        self.region.address() + first as usize * PAGE_SIZE
    }

    pub(super) fn block(&self, first: u32) -> Block {
        Block::of(self.blocks[first as usize].load(Ordering::Acquire))
    }

    pub(super) fn lend(&self, first: u32, block: Block, bytes: usize, thread: u16) {
        let asked = bytes as u64 & BYTES | u64::from(thread) << 48;
        self.asked[first as usize].store(asked, Ordering::Relaxed);
        self.blocks[first as usize].store(block.word(), Ordering::Release);
    }

    /// Takes a block back from whoever had it; what it was.
    pub(super) fn take_back(&self, first: u32) -> Block {
        Block::of(self.blocks[first as usize].swap(Block::FREE, Ordering::AcqRel))
    }

    /// Moves a block on, unless it was taken back meanwhile.
    pub(super) fn advance(&self, first: u32, from: Block, life: Life) -> bool {
        let to = Block { life, ..from };
        self.blocks[first as usize]
            .compare_exchange(from.word(), to.word(), Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// How many bytes were asked for.
    pub(super) fn bytes(&self, first: u32) -> usize {
        (self.asked[first as usize].load(Ordering::Relaxed) & BYTES) as usize
    }

    /// Who asked for them, by a number that threads may share when there were very many.
    pub(super) fn thread(&self, first: u32) -> u16 {
        (self.asked[first as usize].load(Ordering::Relaxed) >> 48) as u16
    }

    /// Whoever has the block uses it for another number of bytes.
    pub(super) fn set_bytes(&self, first: u32, bytes: usize) {
        let asked = &self.asked[first as usize];
        let thread = asked.load(Ordering::Relaxed) & !BYTES;
        asked.store(bytes as u64 & BYTES | thread, Ordering::Relaxed);
    }

    /// The blocks that are lent, as they are met.
    pub(super) fn lent(&self) -> impl Iterator<Item = (u32, Block)> {
        let mut at = 0;
        core::iter::from_fn(move || {
            while at < self.region.pages() {
                let (first, block) = (at, self.block(at));
                if block.life != Life::Free {
                    at += block.pages.max(1);
                    return Some((first, block));
                }
                at += 1;
            }
            None
        })
    }
}

pub(super) fn span(first: u32, pages: u32) -> Span {
    Span {
        first: Page(first),
        pages,
    }
}

const LEAF: usize = 1 << 13;
const ROOT: usize = 1 << 14;
/// Units of an address space of 48 bits.
const UNITS: usize = LEAF * ROOT;
type Leaf = [AtomicPtr<Arena>; LEAF];

/// By the 2 MiB unit of an address; leaves are never freed.
static TABLE: [AtomicPtr<Leaf>; ROOT] = [const { AtomicPtr::new(ptr::null_mut()) }; ROOT];
/// The lowest and the highest unit that ever had one: most addresses are told by these.
static LOW: AtomicUsize = AtomicUsize::new(usize::MAX);
static HIGH: AtomicUsize = AtomicUsize::new(0);

fn entry(unit: usize) -> Option<&'static AtomicPtr<Arena>> {
    // SAFETY: null, or a leaf that is never freed.
    let leaf = unsafe { TABLE.get(unit / LEAF)?.load(Ordering::Acquire).as_ref() }?;
    Some(&leaf[unit % LEAF])
}

/// The arena that an address lies in, and its page there. `None` for every address that is not lent from an arena.
///
/// # Safety
/// If it is lent, it stays so for as long as the answer is used.
pub(super) unsafe fn find<'a>(address: usize) -> Option<(&'a Arena, u32)> {
    let unit = address / EXTENT_SIZE;
    if unit < LOW.load(Ordering::Acquire) || unit > HIGH.load(Ordering::Acquire) {
        return None;
    }
    // SAFETY: null, or an arena: it is taken out before it ends, and does not end while a block of it is lent.
    let arena = unsafe { entry(unit)?.load(Ordering::Acquire).as_ref() }?;
    let offset = address - arena.region.address();
    offset
        .is_multiple_of(PAGE_SIZE)
        .then_some((arena, (offset / PAGE_SIZE) as u32))
}

fn units(arena: &Arena) -> impl Iterator<Item = usize> {
    let first = arena.region.address() / EXTENT_SIZE;
    first..first + (arena.region.pages() / UNIT) as usize
}

/// Has addresses found. The arenas' owner calls this, with its lock; false beyond the 48 bits that the kernel gives without being asked
/// for more.
pub(super) fn publish(arena: &Arc<Arena>) -> bool {
    let (first, last) = (
        units(arena).next().unwrap_or(UNITS),
        units(arena).last().unwrap_or(UNITS),
    );
    if last >= UNITS {
        return false;
    }
    for unit in units(arena) {
        let root = &TABLE[unit / LEAF];
        if root.load(Ordering::Acquire).is_null() {
            let leaf: Box<Leaf> = Box::new([const { AtomicPtr::new(ptr::null_mut()) }; LEAF]);
            root.store(Box::into_raw(leaf), Ordering::Release);
        }
        if let Some(entry) = entry(unit) {
            entry.store(Arc::as_ptr(arena).cast_mut(), Ordering::Release);
        }
    }
    LOW.fetch_min(first, Ordering::AcqRel);
    HIGH.fetch_max(last, Ordering::AcqRel);
    true
}

/// Has addresses found no more.
pub(super) fn forget(arena: &Arena) {
    units(arena)
        .filter_map(entry)
        .for_each(|entry| entry.store(ptr::null_mut(), Ordering::Release));
}
