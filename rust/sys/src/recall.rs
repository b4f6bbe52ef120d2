//! Recalling a region: while somebody else can see its object, all its pages are in the object.
//!
//! For regions whose object may be opened by others, or be shared with relatives of this process. The remapper calls this; it
//! relies on being the only one that merges. A region begins recalled and is dismissed once its object is known to be ours alone.

use crate::protocol::{self, Kind, Page, Words};
use crate::region::Region;
use crate::word::State;
use core::sync::atomic::Ordering;
use rustix::io::Errno;

impl Region {
    /// From now on no page of it merges, and none is read. When this returns, nothing of that kind is under way.
    pub fn recall(&self) {
        self.recalled.store(true, Ordering::Release);
        if self.is_ours() {
            drop(self.in_use.alone());
        }
    }

    /// Its pages may merge (again).
    pub fn dismiss(&self) {
        self.recalled.store(false, Ordering::Release);
    }

    /// Takes every page of a recalled region home; the program may go on writing meanwhile. Afterwards the object holds all its
    /// bytes. Once the region is closed there is nothing to do.
    ///
    /// # Errors
    /// No room for the pages, or EAGAIN while the broker owns some; then some of them are at home, and it may be tried again.
    pub fn take_home(&self) -> Result<(), Errno> {
        debug_assert!(self.kind() == Kind::Shared && self.recalled.load(Ordering::Acquire));
        let home = self.open(|_| self.leave_on(&self.view)).unwrap_or(Ok(()));
        // What was held only for the way home takes part again.
        let holds = self.holds();
        self.let_go(&holds, 0..self.pages());
        drop(holds);
        home
    }

    /// Whether its broker owns pages of it, to complete them at home for somebody else.
    pub fn is_being_lent(&self) -> bool {
        let owned = |page: Page| protocol::is_being_lent(self.words.load(page));
        self.whole().iter().any(owned)
    }

    /// Its broker ended: pages that it owned are the region's again.
    pub fn reclaim(&self) {
        protocol::reclaim(&self.words, self.whole());
    }

    /// Pages whose memory may be taken out of the object now.
    pub fn pages_away(&self) -> u32 {
        let away = |page: &Page| matches!(self.words.load(*page).state(), State::Private | State::Held);
        self.pages() - self.whole().iter().filter(away).count() as u32
    }
}
