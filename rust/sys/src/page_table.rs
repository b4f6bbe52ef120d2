//! The page table of a client: per page a state word and a checksum word, in memory that client and broker share.
//!
//! The client makes it once, sized to a capacity and sealed, and lends slices of it to its regions; the broker maps it
//! read-only (but to lend pages of a client that stands still) and believes nothing but what it loads. The header also says which epoch the client is in: what words say is given
//! up belongs to the epoch that is read *after* them, whatever messages are still on their way. Neither side ever waits in this file, and no file descriptor is needed
//! after the mapping exists.
//!
//! ```text
//! +--------+---------------------------+-------------------------------+
//! | header | capacity x state word     | capacity x checksum word      |   all sparse
//! +--------+---------------------------+-------------------------------+
//! 0        4096                        4096 + pages of words
//! ```

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SealFlags;

use crate::checksum::ChecksumWord;
use crate::error::SysError;
use crate::object::{self, Access, PAGE_SIZE, SharedMapping};
use crate::protocol::{self, Page, Span, Words};
use crate::sharers::ObjectId;
use crate::word::{State, Word};
use crate::words::LentWords;

pub(crate) const WHAT: &str = "page table";
/// "ksmrsPT1": layout and endianness in one word.
const MAGIC: u64 = u64::from_be_bytes(*b"ksmrsPT1");
const HEADER_WORDS: usize = 4;
/// Which of them is the client's epoch.
const EPOCH_WORD: usize = 3;
/// 2^31 pages are 8 TiB of regions and 32 GiB of (sparse) table: beyond any machine that this serves.
pub const MAX_CAPACITY: u32 = 1 << 31;

/// Bytes that `capacity` words take, in whole pages.
const fn words_bytes(capacity: u32) -> usize {
    (capacity as usize * 8).next_multiple_of(PAGE_SIZE)
}

const fn table_bytes(capacity: u32) -> usize {
    PAGE_SIZE + 2 * words_bytes(capacity)
}

/// A client's own table, read and written by any of its threads and by its signal handler.
pub struct ClientTable {
    pub(crate) mapping: SharedMapping,
    pub(crate) capacity: u32,
    /// Free slices: first word -> length; neighbours are always merged.
    pub(crate) free: Mutex<BTreeMap<u32, u32>>,
}

impl ClientTable {
    /// Makes a table of `capacity` pages and the descriptor to send to brokers.
    ///
    /// # Errors
    /// The kernel's errno (EFBIG beyond RLIMIT_FSIZE).
    pub fn create(capacity: u32) -> Result<(ClientTable, OwnedFd), SysError> {
        let capacity = capacity.clamp(1, MAX_CAPACITY);
        let bytes = table_bytes(capacity);
        let fd = object::create("ksmrs-table", bytes as u64)?;
        object::seal_size(&fd, WHAT)?;
        let mapping = SharedMapping::of(&fd, WHAT, bytes, Access::ReadWrite)?;
        let header = [MAGIC, PAGE_SIZE as u64, u64::from(capacity), 0];
        for (word, value) in mapping.words(0, HEADER_WORDS).iter().zip(header) {
            word.store(value, Ordering::Relaxed);
        }
        let free = Mutex::new(BTreeMap::from([(0, capacity)]));
        Ok((
            ClientTable {
                mapping,
                capacity,
                free,
            },
            fd,
        ))
    }

    /// Pages that the table can describe.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Says which epoch the client is in: after the epoch's life page is mapped, before the last one's is unmapped.
    pub fn set_epoch(&self, epoch: u32) {
        let before = self.mapping.words(0, HEADER_WORDS)[EPOCH_WORD].swap(epoch.into(), Ordering::SeqCst);
        debug_assert!(before < epoch.into(), "epoch {epoch} after {before}");
    }

    /// The epoch that it says. It only rises, also from one connection to the next: the broker may not have read all of the last one's words
    /// yet, which count for the epoch that it finds here then.
    pub fn epoch(&self) -> u32 {
        epoch_of(&self.mapping)
    }

    /// Which of its words is the first of this slice, if it is one of this table.
    pub(crate) fn index_of(&self, slice: &[AtomicU64]) -> Option<u32> {
        let bytes = slice.as_ptr().addr().checked_sub(self.words().as_ptr().addr())?;
        u32::try_from(bytes / 8).ok().filter(|first| *first < self.capacity)
    }

    /// All state words.
    pub fn words(&self) -> &[AtomicU64] {
        self.mapping.words(PAGE_SIZE, self.capacity as usize)
    }

    /// All checksum words.
    pub fn checksums(&self) -> &[AtomicU64] {
        self.mapping
            .words(PAGE_SIZE + words_bytes(self.capacity), self.capacity as usize)
    }

    /// Lends a slice of `pages` words, all zero: Private pages without a checksum. Returns its first word.
    ///
    /// # Errors
    /// [`SysError::TableFull`] when no free slice is long enough.
    pub fn take(&self, pages: u32) -> Result<u32, SysError> {
        let mut free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let found = free
            .iter()
            .find(|&(_, &length)| length >= pages.max(1))
            .map(|(&first, &length)| (first, length));
        let Some((first, length)) = found.filter(|_| pages > 0) else {
            return Err(SysError::TableFull {
                pages,
                capacity: self.capacity,
            });
        };
        free.remove(&first);
        if length > pages {
            free.insert(first + pages, length - pages);
        }
        Ok(first)
    }

    /// Takes a slice back, zeroes it and frees its memory. Nobody may use its words any more.
    ///
    /// # Panics
    /// When the slice was not lent: that is a bug whose continuation would give one word to two pages.
    pub fn give_back(&self, first: u32, pages: u32) {
        let end = first.checked_add(pages).filter(|&end| end <= self.capacity);
        assert!(
            end.is_some() && pages > 0,
            "slice {first}+{pages} is outside the table of {}",
            self.capacity
        );
        for offset in [PAGE_SIZE, PAGE_SIZE + words_bytes(self.capacity)] {
            self.clear(offset, first as usize, pages as usize);
        }
        let mut free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (mut start, mut end) = (first, first + pages);
        if let Some((&before, &length)) = free.range(..end).next_back() {
            assert!(
                before + length <= start,
                "slice {first}+{pages} overlaps the free {before}+{length}"
            );
            if before + length == start {
                free.remove(&before);
                start = before;
            }
        }
        if let Some(length) = free.remove(&end) {
            end += length;
        }
        free.insert(start, end - start);
    }

    /// Zeroes words: whole pages of the table by a hole, the ends by stores.
    fn clear(&self, offset: usize, first: usize, pages: usize) {
        let (start, end) = (offset + first * 8, offset + (first + pages) * 8);
        let (whole_start, whole_end) = (start.next_multiple_of(PAGE_SIZE), end / PAGE_SIZE * PAGE_SIZE);
        let zero = |from: usize, to: usize| {
            for word in self.mapping.words(from, (to - from) / 8) {
                word.store(0, Ordering::Relaxed);
            }
        };
        if whole_start < whole_end && self.mapping.punch(WHAT, whole_start..whole_end).is_ok() {
            zero(start, whole_start);
            zero(whole_end, end);
        } else {
            zero(start, end);
        }
    }
}

/// The broker's read-only view of a client's table. Everything in it may be a lie.
pub struct TableView {
    mapping: SharedMapping,
    capacity: u32,
    /// For the one time that the broker has to write: `lend`.
    fd: OwnedFd,
    id: ObjectId,
}

fn epoch_of(mapping: &SharedMapping) -> u32 {
    let epoch = mapping.words(0, HEADER_WORDS)[EPOCH_WORD].load(Ordering::SeqCst);
    u32::try_from(epoch).unwrap_or(u32::MAX)
}

impl TableView {
    /// Vets the descriptor and maps the table.
    ///
    /// # Errors
    /// [`SysError::Vetting`] with what is wrong: no memfd, not sealed, another size than the header or `capacity` says.
    pub fn open(fd: impl AsFd, capacity: u32) -> Result<TableView, SysError> {
        let vetted = object::vet(&fd, WHAT, SealFlags::SHRINK | SealFlags::GROW)?;
        let hostile = |reason: String| SysError::Vetting { what: WHAT, reason };
        if capacity == 0 || capacity > MAX_CAPACITY || vetted.size != table_bytes(capacity) as u64 {
            return Err(hostile(format!("{} bytes for {capacity} pages", vetted.size)));
        }
        let mapping = SharedMapping::of(&fd, WHAT, table_bytes(capacity), Access::Read)?;
        let header: [u64; HEADER_WORDS] = {
            let words = mapping.words(0, HEADER_WORDS);
            core::array::from_fn(|index| words[index].load(Ordering::Relaxed))
        };
        if header[..EPOCH_WORD] != [MAGIC, PAGE_SIZE as u64, u64::from(capacity)] {
            return Err(hostile(format!("header {header:x?} for {capacity} pages")));
        }
        let fd = rustix::io::fcntl_dupfd_cloexec(&fd, 0).map_err(SysError::call("F_DUPFD_CLOEXEC", WHAT))?;
        let id = ObjectId::of(&fd)?;
        Ok(TableView {
            mapping,
            capacity,
            fd,
            id,
        })
    }

    /// Whether both are of one table, and so of one address space: an exec has its next program make one of its own.
    pub fn is_same(&self, other: &TableView) -> bool {
        self.id == other.id
    }

    /// Pages that the table describes.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The epoch that the client says it is in. No child that it forked before this was read maps only later life pages.
    pub fn epoch(&self) -> u32 {
        epoch_of(&self.mapping)
    }

    /// The state word of a page; `None` outside the table. Later loads see no older memory than this one.
    pub fn word(&self, index: u32) -> Option<Word> {
        let words = self.mapping.words(PAGE_SIZE, self.capacity as usize);
        words.get(index as usize).map(|word| Word(word.load(Ordering::Acquire)))
    }

    /// Lends the pages of a shared region out, see [`protocol::lend`]: `complete` is told how far into the region a stretch begins,
    /// how many pages it has, and the word of the first.
    ///
    /// # Errors
    /// The table cannot be mapped, or what `complete` failed with.
    pub fn lend(
        &self,
        first_word: u32,
        pages: u32,
        known: impl Fn(Word) -> bool,
        mut complete: impl FnMut(u32, u32, Word) -> Result<(), SysError>,
    ) -> Result<bool, SysError> {
        let mapping = SharedMapping::of(&self.fd, WHAT, table_bytes(self.capacity), Access::ReadWrite)?;
        let words = mapping.words(PAGE_SIZE, self.capacity as usize);
        let end = first_word.saturating_add(pages).min(self.capacity);
        let words = LentWords::new(&words[first_word.min(end) as usize..end as usize]);
        let span = Span {
            first: Page(0),
            pages: words.pages(),
        };
        protocol::lend(&words, span, known, |span, word| {
            complete(span.first.0, span.pages, word)
        })
    }

    /// The checksum word of a page; `None` outside the table.
    pub fn checksum(&self, index: u32) -> Option<ChecksumWord> {
        let words = self
            .mapping
            .words(PAGE_SIZE + words_bytes(self.capacity), self.capacity as usize);
        words
            .get(index as usize)
            .map(|word| ChecksumWord(word.load(Ordering::Relaxed)))
    }

    /// Tells the checksums of consecutive pages if all of them are Private and have one, which did not take its value in this pass; else
    /// what it tells means nothing.
    pub fn unchanged<'a>(&self, first: u32, pass: u16, checksums: impl ExactSizeIterator<Item = &'a mut u64>) -> bool {
        let (first, end) = (first as usize, first as usize + checksums.len());
        if end > self.capacity as usize {
            return false;
        }
        let words = &self.mapping.words(PAGE_SIZE, end)[first..];
        let known = &self.mapping.words(PAGE_SIZE + words_bytes(self.capacity), end)[first..];
        words.iter().zip(known).zip(checksums).all(|((word, known), to)| {
            let state = Word(word.load(Ordering::Acquire)).checked_state();
            let known = ChecksumWord(known.load(Ordering::Relaxed));
            *to = known.0;
            state == Some(State::Private) && known.checksum48().is_some() && known.pass16() != pass
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_broker_sees_what_the_client_stores() {
        let (table, fd) = ClientTable::create(5000).unwrap();
        let view = TableView::open(&fd, 5000).unwrap();
        let first = table.take(600).unwrap();
        let word = Word::PRIVATE.with_state(State::Held);
        table.words()[first as usize + 599].store(word.0, Ordering::Release);
        table.checksums()[4999].store(ChecksumWord::new(7, 9).0, Ordering::Relaxed);
        assert_eq!(view.word(first + 599), Some(word));
        assert_eq!(view.checksum(4999), Some(ChecksumWord::new(7, 9)));
        assert_eq!((view.word(5000), view.checksum(5000)), (None, None));
    }

    #[test]
    fn slices_come_back_zeroed_and_without_memory() {
        let (table, fd) = ClientTable::create(8192).unwrap();
        let before = object::allocated(&fd, WHAT).unwrap();
        let first = table.take(3000).unwrap();
        let second = table.take(100).unwrap();
        for word in table.words()[..3100].iter().chain(&table.checksums()[..3100]) {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        table.give_back(first, 3000);
        let kept = 4 * PAGE_SIZE as u64;
        assert!(object::allocated(&fd, WHAT).unwrap() <= before + kept);
        assert!(
            table.words()[..3000]
                .iter()
                .all(|word| word.load(Ordering::Relaxed) == 0)
        );
        assert!(
            table.words()[3000..3100]
                .iter()
                .all(|word| word.load(Ordering::Relaxed) == u64::MAX)
        );
        table.give_back(second, 100);
        assert_eq!(table.take(8192).unwrap(), 0);
        assert!(matches!(table.take(1), Err(SysError::TableFull { .. })));
    }

    proptest! {
        #[test]
        fn slices_never_overlap(steps in proptest::collection::vec((1u32..40, any::<bool>()), 1..60)) {
            let (table, _fd) = ClientTable::create(256).unwrap();
            let mut lent: Vec<(u32, u32)> = Vec::new();
            for (pages, back) in steps {
                if back && !lent.is_empty() {
                    let (first, pages) = lent.swap_remove(pages as usize % lent.len());
                    table.give_back(first, pages);
                } else if let Ok(first) = table.take(pages) {
                    prop_assert!(first + pages <= 256);
                    prop_assert!(lent.iter().all(|&(f, p)| first + pages <= f || f + p <= first));
                    lent.push((first, pages));
                }
            }
            for (first, pages) in lent {
                table.give_back(first, pages);
            }
            prop_assert_eq!(table.take(256).unwrap(), 0);
        }
    }

    #[test]
    fn a_table_that_lies_is_refused() {
        let (_table, fd) = ClientTable::create(64).unwrap();
        assert!(TableView::open(&fd, 65_536).is_err());
        let unsealed = object::create("ksmrs-table", table_bytes(64) as u64).unwrap();
        assert!(TableView::open(&unsealed, 64).is_err());
        object::seal_size(&unsealed, WHAT).unwrap();
        let error = TableView::open(&unsealed, 64).err().unwrap();
        assert!(error.to_string().contains("header"), "{error}");
    }
}
