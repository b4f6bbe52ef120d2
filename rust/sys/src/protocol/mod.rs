//! The page-state protocol: who may move a page from which state to which, and in what order its memory follows.
//!
//! The code here is generic over [`Words`] (the state words of one region) and [`Memory`] (what can be done to its pages), so
//! that the signal handler, the remapper, the program's own threads and the model checker run the very same lines. It relies
//! on the two traits and on nothing else; it never allocates, never blocks while it owns a word, and never makes a system
//! call itself.
//!
//! ```text
//!             claim            protect             compare equal           map the frame
//!   Private ---------> Freezing -------> Frozen ---------------> Committing ------------> Merged / Zero
//!      ^  ^                                |  a writer, or unequal                           |
//!      |  +------------ Breaking <---------+                                                 |
//!      |                    ^                                                                | a writer
//!      +---- Homed <--------+----------------------------------------------------------------+   (shared)
//!                                                    Broken <--- the kernel copied, a scan saw it (private)
//! ```
//!
//! The rules (DESIGN.md has the table, actor by actor):
//!
//! 0. Nobody changes a page's protection or mapping without owning its word: a successful [`Words::cas`] into a transient
//!    state, or from a state that only the caller may leave.
//! 1. Whoever owns a word never waits for another. Further words are only tried, and given back on failure.
//! 2. Whoever owns a word has all signals blocked but SIGSEGV and SIGBUS (the callers see to that).
//! 3. Every store that ends a transient state wakes the waiters.
//! 4. A panic while owning a word aborts.

mod fault;
mod lend;
mod merge;
mod observe;
mod release;
mod witness;

pub use fault::{Broken, Resolution, break_stretch, dense_block, detach_stretch, write_fault};
pub(crate) use fault::{claim_stretch, end_claim, goes_on};
pub use lend::{is_being_lent, lend, reclaim};
pub(crate) use merge::showing;
pub use merge::{Claims, MAX_RUN, MergeRun, Verdict, bring_home, merge_run, settle};
pub use observe::{Evidence, copy_and_mark, mark_private, mark_written};
pub use release::{claim_all, leave, reopen, unmerge};
pub use witness::Witness;

use crate::word::Word;
use rustix::io::Errno;

/// A page of a region, counted from the region's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page(pub u32);

impl Page {
    /// The page `pages` further on.
    #[must_use]
    pub const fn plus(self, pages: u32) -> Page {
        Page(self.0 + pages)
    }
}

/// Consecutive pages of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first page.
    pub first: Page,
    /// How many there are.
    pub pages: u32,
}

impl Span {
    /// One page.
    pub const fn one(page: Page) -> Span {
        Span { first: page, pages: 1 }
    }

    /// The page after the last one.
    pub const fn end(self) -> Page {
        self.first.plus(self.pages)
    }

    /// Every page of the span.
    pub fn iter(self) -> impl Iterator<Item = Page> {
        (self.first.0..self.end().0).map(Page)
    }
}

/// What a region's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Private anonymous memory: the kernel copies a merged page when it is written.
    Private,
    /// A shared object with a home view: a merged page is read-only and the write-fault handler copies it.
    Shared,
}

/// The protections that pages are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nobody may write: a write faults.
    ReadOnly,
    /// Readable and writable.
    ReadWrite,
}

/// The state words of one region.
pub trait Words {
    /// How many pages the region has.
    fn pages(&self) -> u32;
    /// The word as it stands.
    fn load(&self, page: Page) -> Word;
    /// Moves the word from `from` to `to`; false if it was not `from`.
    fn cas(&self, page: Page, from: Word, to: Word) -> bool;
    /// Stores a word that the caller owns, and wakes who waits for it.
    fn store(&self, page: Page, word: Word);
    /// Sleeps until the word is no longer `seen`; may return early.
    fn wait(&self, page: Page, seen: Word);
}

/// What can be done to the pages of one region. Each call acts on whole spans, and only on pages whose words the caller owns.
pub trait Memory {
    /// A mapping of the frames that a run is to show, to compare with and perhaps to move in.
    type Window;

    /// Private or shared.
    fn kind(&self) -> Kind;
    /// Sets the protection of pages; when it fails midway, some pages may have it.
    fn protect(&self, span: Span, access: Access) -> Result<(), Errno>;
    /// Whether a frozen page holds the same bytes as page `at` of the window (`None`: as a page of zeros).
    fn equals(&self, page: Page, window: Option<&Self::Window>, at: u32) -> bool;
    /// Maps the window's frames from `at` on over the pages.
    fn map_frames(&self, span: Span, window: &Self::Window, at: u32) -> Result<(), Errno>;
    /// Gives the pages up for zeros that need no memory: read-only in a shared region, writable in a private one. `plain` says
    /// that every page is private memory of its own, which needs no new mapping.
    fn map_zero(&self, span: Span, plain: bool) -> Result<(), Errno>;
    /// Shared: makes the home pages complete from what the view shows; where there is not room for all, each that has memory is complete.
    fn fill_home(&self, span: Span) -> Result<(), Errno>;
    /// Shared: puts the home pages over the view, writable.
    fn map_home(&self, span: Span) -> Result<(), Errno>;
    /// Shared: frees the home pages.
    fn punch_home(&self, span: Span) -> Result<(), Errno>;
    /// Private: makes the kernel copy the pages, as a write to each would.
    fn copy_own(&self, span: Span) -> Result<(), Errno>;
    /// Private: replaces the pages by anonymous memory with the same bytes.
    fn make_plain(&self, span: Span) -> Result<(), Errno>;
}

/// The access that a resting page is mapped with, so that a thaw gives back what was there.
fn resting_access(kind: Kind, word: Word) -> Access {
    use crate::word::State;
    match (kind, word.state()) {
        (Kind::Shared, State::Merged | State::Zero) => Access::ReadOnly,
        _ => Access::ReadWrite,
    }
}
