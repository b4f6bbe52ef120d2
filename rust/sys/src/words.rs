//! The state words of one region: a slice of the client's page table, as the protocol moves them.
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

    fn word(&self, page: Page) -> &AtomicU64 {
        &self.words[page.0 as usize]
    }

    /// The half of the word that a futex can wait on: state, origin, generation and store, but not the slot.
    fn low_half(&self, page: Page) -> &AtomicU32 {
        let word: *const AtomicU64 = self.word(page);
        let half = if cfg!(target_endian = "big") { 1 } else { 0 };
        // SAFETY: half of a live, aligned u64 whose every access is atomic; the kernel reads it as a futex does.
        unsafe { &*word.cast::<AtomicU32>().add(half) }
    }
}

impl Words for RegionWords {
    fn pages(&self) -> u32 {
        self.words.len() as u32
    }

    fn load(&self, page: Page) -> Word {
        Word(self.word(page).load(Ordering::SeqCst))
    }

    fn cas(&self, page: Page, from: Word, to: Word) -> bool {
        self.word(page)
            .compare_exchange(from.0, to.0, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    fn store(&self, page: Page, word: Word) {
        self.word(page).store(word.0, Ordering::SeqCst);
        futex::wake_shared(self.low_half(page));
    }

    fn wait(&self, page: Page, seen: Word) {
        futex::wait_shared(self.low_half(page), seen.futex_half());
    }
}
