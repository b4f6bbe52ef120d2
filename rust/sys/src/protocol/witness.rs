//! A witness: what notices which pages are written, so that most of a merge's comparing is done before the freeze.
//!
//! ```text
//!   without    claim  freeze  [ compare ............... ] commit        a writer waits for the comparison, a system call fails
//!   with one   watch  compare   claim  freeze  [ ask ] commit           what was not written since it is watched is still equal
//! ```
//!
//! The order is all: watched before the first byte is read, asked when nobody can write any more. What the witness does not vouch for is
//! compared within the freeze as ever. It vouches for writes through this mapping only, so it serves private memory.

use super::{Page, Span};

/// Notices which pages are written.
pub trait Witness {
    /// Tells the pages of the span of which it notices the next write, until it is gone.
    fn watch(&mut self, span: Span, tell: impl FnMut(Page));

    /// Tells the pages of that span that may have been written since. False if it cannot say: then all may.
    fn written(&mut self, span: Span, tell: impl FnMut(Page)) -> bool;
}

/// Nobody.
impl Witness for () {
    fn watch(&mut self, _: Span, _: impl FnMut(Page)) {}

    fn written(&mut self, _: Span, _: impl FnMut(Page)) -> bool {
        false
    }
}
