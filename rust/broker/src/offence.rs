//! Why a client is dropped: one sentence for the log and for its Bye.
//!
//! An offence ends the connection of the client that made it and nothing else. What the client still shows stays allocated
//! until its life pages take the seal.

use ksmrs_sys::SysError;

use crate::wire::WireError;

/// What a client did that ends its connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Offence {
    /// Not a message, or not one that may be sent.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A descriptor is not what it should be, or the kernel refused a step.
    #[error(transparent)]
    Descriptor(#[from] SysError),
    /// Somebody else's process.
    #[error("its uid is {theirs}, not {ours}")]
    Stranger {
        /// The peer's user.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// A message at the wrong time.
    #[error("{message} {phase}")]
    OutOfOrder {
        /// The message.
        message: &'static str,
        /// When it came.
        phase: &'static str,
    },
    /// Epochs only rise.
    #[error("life page of epoch {epoch} after epoch {current}")]
    Epoch {
        /// The new one.
        epoch: u32,
        /// The latest before.
        current: u32,
    },
    /// An answer to no order of that kind.
    #[error("{message} for order {order}, which is not open for it")]
    NoSuchOrder {
        /// The message.
        message: &'static str,
        /// The order it names.
        order: u32,
    },
    /// An answer that does not fit its order.
    #[error("{message} for order {order} has {found} results, not {expected}")]
    Results {
        /// The message.
        message: &'static str,
        /// The order.
        order: u32,
        /// Results in it.
        found: usize,
        /// Results that the order asks for.
        expected: usize,
    },
    /// Leave of a region that it never joined.
    #[error("Leave of region {region}, which it has not joined")]
    NoSuchRegion {
        /// The client's number.
        region: u32,
    },
    /// More of something than one client gets.
    #[error("more than {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many are allowed.
        limit: usize,
    },
    /// A name that is no name.
    #[error("domain name {name:?}: 1 to 64 letters, digits, '.', '_' or '-'")]
    DomainName {
        /// The name.
        name: String,
    },
}
