//! What can go wrong between ksmrs and the kernel, or with something that a peer handed over.
//!
//! Every variant names the thing and the number; `errno()` gives callers the kernel's own word for it. Nothing here acts.

use rustix::io::Errno;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SysError {
    /// A system call failed.
    #[error("{call} on {what}: {errno}")]
    Call {
        /// The system call, as its manual page is called.
        call: &'static str,
        /// What it was applied to.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// There is no room for memory that was asked for.
    #[error("no room for {bytes} bytes of {what}: {errno}")]
    NoRoom {
        /// What was to hold the memory.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A descriptor from a peer is not what the protocol says it is.
    #[error("the {what} descriptor is not one: {reason}")]
    Vetting {
        /// What the descriptor was said to be.
        what: &'static str,
        /// What is wrong with it, with the numbers.
        reason: String,
    },
    /// The page table has no free slice of this length.
    #[error(
        "the page table holds {capacity} pages and has no {pages} free in a row; leave regions or raise its capacity"
    )]
    TableFull {
        /// Pages asked for.
        pages: u32,
        /// Pages that the whole table holds.
        capacity: u32,
    },
    /// Memory that a program made cannot take part.
    #[error("{mapping} cannot take part in merging: {reason}")]
    Unfit {
        /// The mapping, with its addresses, permissions and path.
        mapping: String,
        /// What forbids it, and what to do about it.
        reason: &'static str,
    },
    /// What would move pages that a device or a system call may hold on to.
    #[error(
        "{pins} pins of this memory have not ended, and pinned pages are not moved: first leave `with ksmrs.pinned`"
    )]
    Pinned {
        /// How many.
        pins: usize,
    },
    /// A datagram broke the rules of the socket: cut off, too many descriptors, a stranger's control message.
    #[error("malformed datagram: {reason}")]
    Datagram {
        /// Which rule.
        reason: &'static str,
    },
    /// The other side closed the socket.
    #[error("the peer closed the socket")]
    Closed,
}

/// The errno of a call of libc's that just failed in this thread.
pub(crate) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl SysError {
    /// For `map_err`: names the call and the thing.
    pub(crate) fn call(call: &'static str, what: &'static str) -> impl FnOnce(Errno) -> SysError {
        move |errno| SysError::Call { call, what, errno }
    }

    /// The kernel's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            SysError::Call { errno, .. } | SysError::NoRoom { errno, .. } => Some(errno.raw_os_error()),
            SysError::TableFull { .. } => Some(Errno::NOSPC.raw_os_error()),
            SysError::Closed => Some(Errno::PIPE.raw_os_error()),
            SysError::Vetting { .. } | SysError::Datagram { .. } | SysError::Unfit { .. } | SysError::Pinned { .. } => {
                None
            }
        }
    }

    /// Whether the call would only have had to wait.
    pub fn is_would_block(&self) -> bool {
        matches!(
            self,
            SysError::Call {
                errno: Errno::AGAIN,
                ..
            }
        )
    }
}
