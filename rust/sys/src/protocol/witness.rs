//! A witness: what remembers which pages were written, so that most of a merge's comparing is done before the freeze.
//!
//! ```text
//!   without    claim  freeze  [ compare ............... ] commit        a writer waits for the comparison, a system call fails
//!   with one   arm  compare   claim  freeze  [ ask ] commit            what was not written since it was armed is still equal
//! ```
//!
//! The order is all: armed before the first byte is read, asked when nobody can write any more. What the witness does not vouch for is compared
//! within the freeze as ever. It vouches for writes through this mapping only, so it serves private memory; and nobody else may arm a
//! page meanwhile, for that would take its testimony away.

use super::{Page, Span};

/// Remembers which pages were written since they were armed.
pub trait Witness {
    /// Arms all pages of the span, and keeps everybody else from doing so until the witness is gone. False where that cannot be:
    /// then it is not asked.
    fn arm(&mut self, span: Span) -> bool;

    /// Tells the pages of that span that may have been written since. False if it cannot say: then all may.
    fn written(&mut self, span: Span, tell: impl FnMut(Page)) -> bool;
}

/// Nobody.
impl Witness for () {
    fn arm(&mut self, _: Span) -> bool {
        false
    }

    fn written(&mut self, _: Span, _: impl FnMut(Page)) -> bool {
        false
    }
}
