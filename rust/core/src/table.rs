//! A hash table of 32-bit numbers in parts that grow on their own.
//!
//! One table of a hundred million entries moves all of them when it grows, and everybody who waits for the broker waits for that:
//! seconds. A part moves a 256th of them. And since the last part is twice as large as the first and the others lie between, they
//! double one after the other: however many entries there are, the parts together are filled to six tenths, where a table that doubles
//! as a whole is filled to less than half at the worst moment. The keys lie elsewhere (in a page's or a frame's record), so an entry is
//! four bytes and a control byte. Relies on hashes whose bits 40 to 51 are as good as the others; never looks at a key itself.

use hashbrown::HashTable;

const PARTS: usize = 256;

/// Searches that begin together ([`Table::warm`]): what they fetch is a part of the nearest cache, and more than the processor does at
/// a time.
pub(crate) const TOGETHER: usize = 32;

pub(crate) struct Table {
    parts: Box<[HashTable<u32>; PARTS]>,
}

impl Default for Table {
    fn default() -> Table {
        Table {
            parts: Box::new([const { HashTable::new() }; PARTS]),
        }
    }
}

/// Equal shares of all hashes, which are dealt out to the parts.
const SHARES: usize = 4096;

/// The part of each share. Part `q` of 1 has the hashes up to `-log2(1 - q / 2)` of 1: the last is twice as large as the first, and as
/// the table grows by a hundredth, parts with a hundredth of the room double.
const PART_OF: [u8; SHARES] = {
    const ONE: u128 = 1 << 60;
    /// 2 to the power of -1/4096.
    const STEP: u128 = 1_152_726_417_527_650_499;
    let (mut part_of, mut left, mut share) = ([0; SHARES], ONE, 0);
    while share < SHARES {
        part_of[share] = (2 * PARTS as u128 * (ONE - left) / ONE) as u8;
        left = left * STEP / ONE;
        share += 1;
    }
    part_of
};

fn part(hash: u64) -> usize {
    PART_OF[(hash >> 40) as usize % SHARES].into()
}

impl Table {
    pub(crate) fn find(&self, hash: u64, is: impl FnMut(&u32) -> bool) -> Option<u32> {
        self.parts[part(hash)].find(hash, is).copied()
    }

    /// Fetches where a hash is looked for, and what `touch` reads for the entries there. Lookups depend on nothing but their hash, so
    /// many of these in a row wait for memory together, where one search after the other waits for each; what it returns is to
    /// be used for nothing but to keep the compiler from leaving all of it out.
    pub(crate) fn warm(&self, hash: u64, touch: impl Fn(u32) -> u32) -> u32 {
        let mut touched = 0;
        self.parts[part(hash)].find(hash, |&entry| {
            touched ^= touch(entry);
            false
        });
        touched
    }

    pub(crate) fn find_mut(&mut self, hash: u64, is: impl FnMut(&u32) -> bool) -> Option<&mut u32> {
        self.parts[part(hash)].find_mut(hash, is)
    }

    /// Adds an entry that is not in it.
    pub(crate) fn insert(&mut self, hash: u64, entry: u32, hash_of: impl Fn(&u32) -> u64) {
        self.parts[part(hash)].insert_unique(hash, entry, hash_of);
    }

    /// Takes an entry out; returns whether it was in.
    pub(crate) fn remove(&mut self, hash: u64, entry: u32, hash_of: impl Fn(&u32) -> u64) -> bool {
        let part = &mut self.parts[part(hash)];
        let Ok(found) = part.find_entry(hash, |&other| other == entry) else {
            return false;
        };
        found.remove();
        let room = part.capacity();
        if room > 64 && part.len() < room / 8 {
            part.shrink_to(room / 4, hash_of);
        }
        true
    }

    /// Takes everything out, and keeps the room: about as many come back.
    pub(crate) fn clear(&mut self) {
        for part in self.parts.iter_mut() {
            let last = part.len();
            part.clear();
            part.shrink_to(last, |_| 0);
        }
    }

    /// Gives back the room of parts that are emptier than they would be just before they double twice.
    pub(crate) fn fit(&mut self, hash_of: impl Fn(&u32) -> u64) {
        for part in self.parts.iter_mut() {
            if part.len() < part.capacity() / 4 {
                part.shrink_to(2 * part.len(), &hash_of);
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let parts = self.parts.iter().map(HashTable::allocation_size);
        size_of_val(&*self.parts) + parts.sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::spread;

    #[test]
    fn entries_come_and_go_and_their_room_with_them() {
        let mut table = Table::default();
        let hash_of = |&entry: &u32| spread(entry);
        for entry in 0..100_000 {
            table.insert(spread(entry), entry, hash_of);
            if entry >= 40_000 && entry.is_multiple_of(1000) {
                let each = table.bytes() as f64 / f64::from(entry);
                assert!(
                    (8.2..9.2).contains(&each),
                    "{each} bytes for each of {entry}: the parts are not filled alike"
                );
            }
        }
        let full = table.bytes();
        assert!((0..100_000).all(|entry| table.find(spread(entry), |&other| other == entry) == Some(entry)));
        for entry in 100..100_000 {
            assert!(table.remove(spread(entry), entry, hash_of));
            assert!(!table.remove(spread(entry), entry, hash_of));
        }
        assert_eq!(table.parts.iter().map(HashTable::len).sum::<usize>(), 100);
        assert!(table.bytes() < full / 8, "{} of {full} bytes are left", table.bytes());
        table.clear();
        assert_eq!(table.find(spread(7), |&other| other == 7), None);
    }
}
