//! Whether this process is alone with its memory, asked of the kernel without the broker.
//!
//! Relies on life pages (`ksmrs_sys::life`): one of our own, never sent to anybody, which children keep when we turn it.

use ksmrs_sys::life::{LifePage, Seal, try_seal};
use std::os::fd::OwnedFd;

/// Finds out whether another address space has our memory mapped, without asking the broker: a life page of our own, turned each
/// time, which children keep.
pub(super) struct Sentinel {
    mapped: Option<(LifePage, OwnedFd)>,
    /// Turned, and still mapped by somebody when last looked at.
    busy: Vec<OwnedFd>,
}

impl Sentinel {
    pub(super) fn new() -> Sentinel {
        Sentinel {
            mapped: LifePage::new().ok(),
            busy: Vec::new(),
        }
    }

    /// Whether no other address space can see what this one sees. Where it cannot be known, the answer is no.
    pub(super) fn alone(&mut self) -> bool {
        let Ok(fresh) = LifePage::new() else { return false };
        match self.mapped.replace(fresh) {
            Some((old, fd)) => {
                drop(old);
                self.busy.push(fd);
            }
            None => return false,
        }
        self.busy.retain(|fd| try_seal(fd) != Seal::Taken);
        self.busy.is_empty()
    }
}
