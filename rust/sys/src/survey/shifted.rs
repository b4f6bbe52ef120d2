//! Equal data at other offsets within a page, which nobody can merge: found by windows that the content itself chooses.
//!
//! A window begins at each 16 bytes (what malloc aligns to) whose mix has ten zero bits, one in four pages; equal data chooses equal windows wherever
//! it lies. Two windows with one checksum at different offsets within a page vote for the distance between them. A stretch
//! with two votes is then compared, page by page and byte by byte, so what is counted is equal. Data that repeats itself chooses none or too
//! many, and is left out.

use super::process::{LEAST_BYTES, Process};
use super::tally::{SHIFTED, Seen};
use crate::checksum::Checksummer;
use crate::object::PAGE_SIZE;

const STEP: usize = 16;
/// Bytes of a window.
const WINDOW: usize = 64;
/// One step in so many begins a window.
const RARE: u32 = 10;
/// More windows alike are data that repeats itself.
const MOST_ALIKE: usize = 64;
/// Votes further apart are of different stretches, in bytes.
const APART: u64 = 1 << 20;

/// A window: its checksum above 12 bits of process, and its address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Anchor {
    pub(super) key: u64,
    address: u64,
}

const PROCESS_BITS: u32 = 12;

impl Anchor {
    pub(super) fn checksum48(self) -> u64 {
        self.key >> PROCESS_BITS
    }

    fn process(self) -> usize {
        (self.key & ((1 << PROCESS_BITS) - 1)) as usize
    }

    fn phase(self) -> u64 {
        self.address % PAGE_SIZE as u64
    }

    fn order(&self) -> (usize, u64) {
        (self.process(), self.address)
    }
}

/// The windows of some consecutive pages.
pub(super) fn anchors(bytes: &[u8], process: usize, address: u64, sums: &Checksummer, mut found: impl FnMut(Anchor)) {
    let end = bytes.len().saturating_sub(WINDOW - 1);
    let block = |at: usize| -> u128 {
        let block: [u8; STEP] = bytes[at..at + STEP].try_into().unwrap_or_default();
        u128::from_le_bytes(block)
    };
    for at in (0..end).step_by(STEP) {
        let here = block(at);
        // An odd constant with bits all over spreads every byte into the highest bits.
        let mixed = ((here as u64) ^ ((here >> 64) as u64).rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if mixed >> (64 - RARE) != 0 || here == block(at + STEP) || here == block(at + 2 * STEP) {
            continue;
        }
        let checksum = sums.bytes(&bytes[at..at + WINDOW]);
        found(Anchor {
            key: checksum << PROCESS_BITS | process as u64,
            address: address + at as u64,
        });
    }
}

/// Data that lies at two places with different offsets within a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shift {
    /// The process whose pages are counted.
    pub process: usize,
    /// Where the first of them is.
    pub address: u64,
    /// How many there are.
    pub pages: u64,
    /// The process that has their bytes as well.
    pub other: usize,
    /// Where that has the first of them.
    pub other_address: u64,
}

/// A stretch to be compared: windows of it have been found at a distance.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    process: usize,
    other: usize,
    /// From an address of `process` to the same byte in `other`.
    distance: u64,
    first: u64,
    last: u64,
}

/// Windows alike that lie closer in one process than the smallest buffer that is opted in: data that repeats itself, which no offset
/// cures. For windows in the order of their places.
fn repeat_themselves(alike: &[Anchor]) -> bool {
    let closer = |pair: &[Anchor]| {
        pair[0].process() == pair[1].process() && pair[1].address - pair[0].address < LEAST_BYTES as u64
    };
    alike.windows(2).any(closer)
}

/// A window that is at another place, at another offset within a page, too: 24 bytes.
#[derive(Clone, Copy, Debug)]
struct Vote {
    address: u64,
    distance: u64,
    processes: (u16, u16),
}

impl Vote {
    fn order(&self) -> ((u16, u16), u64, u64) {
        (self.processes, self.distance, self.address)
    }

    fn goes_on(&self, next: &Vote) -> bool {
        (self.processes, self.distance) == (next.processes, next.distance) && next.address - self.address < APART
    }
}

/// Finds the stretches that windows vote for. Votes take no more room than windows may, and stretches no more than both.
pub(super) fn stretches(mut anchors: Vec<Anchor>) -> Vec<Stretch> {
    anchors.sort_unstable_by_key(|anchor| (anchor.checksum48(), anchor.order()));
    let count = votes(&anchors).count();
    let mut voted = Vec::with_capacity(count);
    voted.extend(votes(&anchors));
    drop(anchors);
    voted.sort_unstable_by_key(Vote::order);
    let several = || voted.chunk_by(Vote::goes_on).filter(|votes| votes.len() > 1);
    let mut joined = Vec::with_capacity(several().count());
    joined.extend(several().map(|votes| Stretch {
        process: votes[0].processes.0.into(),
        other: votes[0].processes.1.into(),
        distance: votes[0].distance,
        first: votes[0].address,
        last: votes[votes.len() - 1].address,
    }));
    joined.sort_unstable_by_key(|stretch| core::cmp::Reverse(stretch.last - stretch.first));
    joined
}

/// The first window of each further phase votes for the distance to the very first: aligned, all of that phase would save one frame more.
fn votes(anchors: &[Anchor]) -> impl Iterator<Item = Vote> {
    let groups = anchors.chunk_by(|one, other| one.checksum48() == other.checksum48());
    let groups = groups.filter(|alike| alike.len() <= MOST_ALIKE && !repeat_themselves(alike));
    groups.flat_map(|alike| {
        let further = alike.iter().enumerate().skip(1).filter(|(index, anchor)| {
            let before = &alike[..*index];
            before.iter().all(|before| before.phase() != anchor.phase())
        });
        further.map(|(_, anchor)| Vote {
            address: anchor.address,
            distance: alike[0].address.wrapping_sub(anchor.address),
            processes: (anchor.process() as u16, alike[0].process() as u16),
        })
    })
}

/// Compares a stretch and marks the pages that are equal, among pages in the order of their places; `None` if there are none.
pub(super) fn compare(stretch: Stretch, processes: &[Process], pages: &mut [Seen]) -> Option<Shift> {
    let (process, other) = (&processes[stretch.process], &processes[stretch.other]);
    let mut found: Option<Shift> = None;
    let mut equal = |page: u64| {
        let place = Seen::new(0, stretch.process, page, 0).where_it_is();
        let Ok(index) = pages.binary_search_by_key(&place, |seen| seen.where_it_is()) else {
            return false;
        };
        let address = page * PAGE_SIZE as u64;
        let there = address.wrapping_add(stretch.distance);
        if !are_equal(process, address, other, there) {
            return false;
        }
        if !pages[index].has(SHIFTED) {
            pages[index].set(SHIFTED, true);
            let shift = found.get_or_insert(Shift {
                process: stretch.process,
                address,
                pages: 0,
                other: stretch.other,
                other_address: there,
            });
            if address < shift.address {
                (shift.address, shift.other_address) = (address, there);
            }
            shift.pages += 1;
        }
        true
    };
    let (first, last) = (stretch.first / PAGE_SIZE as u64, stretch.last / PAGE_SIZE as u64);
    (first..=last).for_each(|page| {
        equal(page);
    });
    (0..first).rev().take_while(|page| equal(*page)).for_each(drop);
    (last + 1..).take_while(|page| equal(*page)).for_each(drop);
    found
}

/// Whether a page of one process has the bytes that begin at an address of another. Only frames that are there are read.
fn are_equal(process: &Process, page: u64, other: &Process, there: u64) -> bool {
    let (mut ours, mut theirs) = ([0_u8; PAGE_SIZE], [0_u8; PAGE_SIZE]);
    let mut entries = [super::process::NOTHING; 2];
    let here = page / PAGE_SIZE as u64;
    process.entries(here, &mut entries[..1]).is_ok()
        && entries[0].is_present()
        && other.entries(there / PAGE_SIZE as u64, &mut entries).is_ok()
        && entries.iter().all(|entry| entry.is_present())
        && process.read(page, &mut ours) == Ok(PAGE_SIZE)
        && other.read(there, &mut theirs) == Ok(PAGE_SIZE)
        && ours == theirs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    #[test]
    fn equal_data_chooses_equal_windows_wherever_it_lies() {
        let sums = Checksummer::new(&[3; 16]);
        let data = noise(64 * PAGE_SIZE);
        let mut moved = noise(16);
        moved.extend(&data);
        let mut both = Vec::new();
        anchors(&data, 0, 1 << 20, &sums, |anchor| both.push(anchor));
        let here = both.len();
        assert!((4..64).contains(&here), "{here} windows");
        anchors(&moved, 1, 1 << 30, &sums, |anchor| both.push(anchor));
        let found = stretches(core::mem::take(&mut both));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].process, found[0].other), (1, 0));
        assert_eq!(found[0].distance, (1_u64 << 20).wrapping_sub((1 << 30) + 16));
        // In phase there is nothing to be found.
        anchors(&data, 0, 1 << 20, &sums, |anchor| both.push(anchor));
        anchors(&data, 1, 1 << 30, &sums, |anchor| both.push(anchor));
        assert!(stretches(both).is_empty());
    }

    #[test]
    fn what_repeats_itself_chooses_no_windows() {
        let sums = Checksummer::new(&[3; 16]);
        for period in [1, 8, 16, 32] {
            let data: Vec<u8> = noise(period).into_iter().cycle().take(256 * PAGE_SIZE).collect();
            let mut found = 0;
            anchors(&data, 0, 0, &sums, |_| found += 1);
            assert_eq!(found, 0, "period {period}");
        }
        let mut found = Vec::new();
        let data: Vec<u8> = noise(48_000).into_iter().cycle().take(96 * PAGE_SIZE).collect();
        anchors(&data, 0, 0, &sums, |anchor| found.push(anchor));
        assert!(!found.is_empty() && stretches(found).is_empty(), "it repeats itself");
    }
}
