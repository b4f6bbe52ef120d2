//! *sys* does: every system call and all unsafe code of ksmrs, one file per thing done.
//!
//! It relies on Linux with 4 KiB pages and knows nothing of scanning or trees; it never decides what merges. Safe functions
//! take mappings that ksmrs owns, never bare addresses, so that the crates above forbid unsafe code.

mod aligned;
mod ballast;
pub mod born;
mod bytes;
mod careful;
pub mod checksum;
pub mod daemon;
pub mod descriptors;
mod ending;
pub mod error;
pub mod extent;
pub mod failpoint;
pub mod foreign;
pub mod fork;
mod futex;
mod gate;
pub mod heap;
mod holds;
mod in_use;
pub mod lease;
pub mod life;
mod mapping;
pub mod maps;
pub mod mutant;
pub mod numa;
pub mod object;
pub mod page_table;
pub mod pagemap;
mod parts;
pub mod peer;
pub mod protocol;
mod recall;
pub mod region;
mod registry;
pub mod remap;
mod room;
pub mod scan;
pub mod sharers;
pub mod sigmask;
pub mod signal;
pub mod staging;
pub mod store;
pub mod survey;
pub mod sysctl;
pub mod tracking;
mod watch;
pub mod window;
pub mod word;
mod words;

pub use error::SysError;
pub use object::{EXTENT_PAGES, EXTENT_SIZE, PAGE_SIZE};
pub use word::{Origin, Slot, State, StoreNumber, Word};

/// Holds mappings back for breaks at the mapping limit, if that is not done yet; see `ballast.rs`.
pub fn take_ballast() {
    ballast::take();
}
