//! The state words of one region: a slice of the client's page table, as the protocol moves them, in the client and, for pages
//! that are lent, in its broker.
//!
//! It relies on the table staying mapped while the process lives (the client never unmaps it) and on the registry for slices
//! not being lent again while a handler may still hold one. Async-signal-safe.

use crate::futex;
use crate::protocol::{Page, Words};
use crate::word::Word;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A region's words.
#[derive(Clone, Copy)]
pub(crate) struct RegionWords {
    words: &'static [AtomicU64],
}

impl RegionWords {
    pub(crate) fn new(words: &'static [AtomicU64]) -> RegionWords {
        RegionWords { words }
    }

    pub(crate) fn slice(&self) -> &'static [AtomicU64] {
        self.words
    }

    fn word(&self, page: Page) -> &AtomicU64 {
        &self.words[page.0 as usize]
    }
}

/// The half of a word that a futex can wait on: state, origin, generation and store, but not the slot.
fn low_half(word: &AtomicU64) -> &AtomicU32 {
    let word: *const AtomicU64 = word;
    let half = if cfg!(target_endian = "big") { 1 } else { 0 };
    // SAFETY: half of a live, aligned u64 whose every access is atomic; the kernel reads it as a futex does.
    unsafe { &*word.cast::<AtomicU32>().add(half) }
}

fn cas(word: &AtomicU64, from: Word, to: Word) -> bool {
    word.compare_exchange(from.0, to.0, Ordering::SeqCst, Ordering::SeqCst)
        .is_ok()
}

impl Words for RegionWords {
    fn pages(&self) -> u32 {
        self.words.len() as u32
    }

    fn load(&self, page: Page) -> Word {
        Word(self.word(page).load(Ordering::SeqCst))
    }

    fn cas(&self, page: Page, from: Word, to: Word) -> bool {
        cas(self.word(page), from, to)
    }

    fn store(&self, page: Page, word: Word) {
        self.word(page).store(word.0, Ordering::SeqCst);
        futex::wake_shared(low_half(self.word(page)));
    }

    fn wait(&self, page: Page, seen: Word) {
        futex::wait_shared(low_half(self.word(page)), seen.futex_half());
    }
}

/// A broker's way to the words of a client's region: whoever waits does so in another process.
pub(crate) struct LentWords<'a> {
    words: &'a [AtomicU64],
}

impl<'a> LentWords<'a> {
    pub(crate) fn new(words: &'a [AtomicU64]) -> LentWords<'a> {
        LentWords { words }
    }
}

impl Words for LentWords<'_> {
    fn pages(&self) -> u32 {
        self.words.len() as u32
    }

    fn load(&self, page: Page) -> Word {
        Word(self.words[page.0 as usize].load(Ordering::SeqCst))
    }

    fn cas(&self, page: Page, from: Word, to: Word) -> bool {
        cas(&self.words[page.0 as usize], from, to)
    }

    fn store(&self, page: Page, word: Word) {
        let place = &self.words[page.0 as usize];
        place.store(word.0, Ordering::SeqCst);
        futex::wake_elsewhere(low_half(place));
    }

    /// A broker waits for no client: it comes back later.
    fn wait(&self, _page: Page, _seen: Word) {}
}
