//! What a scan may do to a page: note that the kernel copied it. It waits for nothing; one compare-and-swap
//! against the very word that was read *before* the evidence was taken decides, so that old evidence changes nothing.

use super::{Memory, Page, Span, Words};
use crate::failpoint::{self, Failpoint};
use crate::mutant::{self, Mutant};
use crate::word::{State, Word};

/// A word as it was before somebody looked at the page.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// The page looked at.
    pub page: Page,
    /// Its word, loaded before the look.
    pub word: Word,
}

/// A merged private page was found to have memory of its own: Broken. False if the word has moved since.
pub fn mark_written<W: Words>(words: &W, evidence: Evidence) -> bool {
    failpoint::hit(Failpoint::ScanEvidence);
    let mut before = evidence.word;
    if mutant::active(Mutant::NoGeneration) {
        before = words.load(evidence.page);
    }
    before.state() == State::Merged && words.cas(evidence.page, before, before.with_state(State::Broken))
}

/// The same where nobody knows what the kernel copied and only other bytes than once suggest it: the copy is made, if there was
/// none, before the page is declared Broken. The caller is behind the gate.
pub fn copy_and_mark<W: Words, M: Memory>(words: &W, memory: &M, evidence: Evidence) -> bool {
    let before = evidence.word;
    if before.state() != State::Merged || !words.cas(evidence.page, before, before.with_state(State::Breaking)) {
        return false;
    }
    let copied = memory.copy_own(Span::one(evidence.page)).is_ok();
    words.store(
        evidence.page,
        if copied {
            before.with_state(State::Broken)
        } else {
            before
        },
    );
    copied
}

/// A zero page of a private region was found written: Private. False if the word has moved since.
pub fn mark_private<W: Words>(words: &W, evidence: Evidence) -> bool {
    let before = evidence.word;
    before.state() == State::Zero && words.cas(evidence.page, before, before.with_state(State::Private))
}
