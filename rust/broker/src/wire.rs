//! The wire: how messages become datagrams and back, with nothing accepted that is not exactly one message.
//!
//! ```text
//! | length: u32 LE | version: u8 | postcard body |      length counts the version byte and the body
//! ```
//!
//! One datagram is one message with at most one descriptor; which messages carry one is fixed here. A datagram that is cut
//! off, too long, of another version, unknown, followed by more bytes or beyond a limit is an error, and errors end the
//! connection. Whether a well-formed message makes sense now is decided by those who receive it.

mod limits;
mod message;

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ksmrs_sys::SysError;
use ksmrs_sys::peer::{Credentials, Peer, Wait};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use message::*;

/// Raised with every change that an older peer could misread. It is part of the socket's name too.
pub const VERSION: u8 = 6;
/// The longest datagram.
pub const MAX_DATAGRAM: usize = 64 * 1024;
/// Runs or ranges in one order: 2048 runs take 26 KiB at most.
pub const MAX_RUNS: usize = 2048;
/// Pages in one Map or Unmap order, so that the answer's bitmaps (32 KiB and a little per run) fit one datagram.
pub const MAX_ORDER_PAGES: u32 = 1 << 18;
/// Pages in one run, and in one Stage: an extent.
pub const MAX_RUN_PAGES: u16 = 512;
/// Stretches of one page map: what fits a datagram.
pub const MAX_STRETCHES: usize = 2048;
/// Bytes of a name, a knob, a value or a reason.
pub const MAX_TEXT: usize = 1024;

const PREFIX: usize = 4;

/// What can be wrong with a datagram.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The socket failed, was closed, or refused the datagram.
    #[error(transparent)]
    Socket(#[from] SysError),
    /// The length says something else than the datagram.
    #[error("the message says {said} bytes and has {found}")]
    Length {
        /// What the prefix says.
        said: usize,
        /// What follows it.
        found: usize,
    },
    /// Another version of the protocol.
    #[error("protocol version {theirs}, not {VERSION}; both sides must run the same ksmrs")]
    Version {
        /// The version that came.
        theirs: u8,
    },
    /// Not a message: an unknown tag, or cut off inside.
    #[error("not a message: {0}")]
    Body(#[from] postcard::Error),
    /// Bytes after the message.
    #[error("{0} bytes after the end of the message")]
    Trailing(usize),
    /// A list or number beyond what the protocol allows.
    #[error("{what}: {found}, at most {limit}")]
    Limit {
        /// What is too large.
        what: &'static str,
        /// Its size.
        found: usize,
        /// The largest allowed.
        limit: usize,
    },
    /// A message with a descriptor that must not have one, or without one that must.
    #[error("{message} {}", if *.expected { "came without its descriptor" } else { "carried a descriptor" })]
    Descriptor {
        /// The message.
        message: &'static str,
        /// Whether it should have one.
        expected: bool,
    },
}

impl WireError {
    /// Whether the call would only have had to wait.
    pub fn is_would_block(&self) -> bool {
        matches!(self, WireError::Socket(error) if error.is_would_block())
    }

    /// Whether the peer ended the stream in the regular way.
    pub fn is_closed(&self) -> bool {
        matches!(self, WireError::Socket(SysError::Closed))
    }
}

/// A message of one direction.
pub trait Message: Serialize + DeserializeOwned {
    /// Its name, for logs.
    fn name(&self) -> &'static str;
    /// Whether exactly one descriptor belongs to it.
    fn carries_descriptor(&self) -> bool;
    /// Checks lists and numbers against the protocol's limits.
    ///
    /// # Errors
    /// [`WireError::Limit`] naming what is too large.
    fn check(&self) -> Result<(), WireError>;
}

/// A message as the bytes of a datagram.
///
/// # Errors
/// [`WireError::Limit`] for a message that is too long to be one.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, WireError> {
    message.check()?;
    let mut bytes = vec![0; PREFIX];
    bytes.push(VERSION);
    let mut bytes = postcard::to_extend(message, bytes)?;
    if bytes.len() > MAX_DATAGRAM {
        return Err(WireError::Limit {
            what: message.name(),
            found: bytes.len(),
            limit: MAX_DATAGRAM,
        });
    }
    let length = (bytes.len() - PREFIX) as u32;
    bytes[..PREFIX].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// The message that a datagram is.
///
/// # Errors
/// Every [`WireError`] but the socket's.
pub fn decode<M: Message>(datagram: &[u8]) -> Result<M, WireError> {
    let Some((prefix, rest)) = datagram.split_first_chunk::<PREFIX>() else {
        return Err(WireError::Length {
            said: 0,
            found: datagram.len(),
        });
    };
    let said = u32::from_le_bytes(*prefix) as usize;
    if said != rest.len() {
        return Err(WireError::Length {
            said,
            found: rest.len(),
        });
    }
    let Some((&theirs, body)) = rest.split_first() else {
        return Err(WireError::Length { said, found: 0 });
    };
    if theirs != VERSION {
        return Err(WireError::Version { theirs });
    }
    let (message, trailing): (M, &[u8]) = postcard::take_from_bytes(body)?;
    if !trailing.is_empty() {
        return Err(WireError::Trailing(trailing.len()));
    }
    message.check()?;
    Ok(message)
}

/// Room to receive datagrams in; one per receiving thread.
pub struct ReceiveBuffer(Box<[u8]>);

impl ReceiveBuffer {
    /// One datagram's worth.
    pub fn new() -> ReceiveBuffer {
        ReceiveBuffer(vec![0; MAX_DATAGRAM].into())
    }
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        ReceiveBuffer::new()
    }
}

/// One end of a connection: sends `Out`, receives `In`. Several threads may send; one receives.
#[derive(Debug)]
pub struct Connection<Out, In> {
    peer: Peer,
    direction: PhantomData<fn(Out) -> In>,
}

/// The client's end.
pub type ClientEnd = Connection<ToBroker, ToClient>;
/// The broker's end.
pub type BrokerEnd = Connection<ToClient, ToBroker>;

impl<Out: Message, In: Message> Connection<Out, In> {
    /// Speaks the protocol over a socket.
    pub fn over(peer: Peer) -> Self {
        Connection {
            peer,
            direction: PhantomData,
        }
    }

    /// Sends a message, with the descriptor that belongs to it.
    ///
    /// # Errors
    /// As [`encode`], or the socket's; with [`Wait::No`] see [`WireError::is_would_block`].
    pub fn send(&self, message: &Out, fd: Option<BorrowedFd<'_>>, wait: Wait) -> Result<(), WireError> {
        if fd.is_some() != message.carries_descriptor() {
            return Err(WireError::Descriptor {
                message: message.name(),
                expected: fd.is_none(),
            });
        }
        self.send_encoded(&encode(message)?, fd, wait)
    }

    /// Sends what [`encode`] made.
    ///
    /// # Errors
    /// The socket's.
    pub fn send_encoded(&self, datagram: &[u8], fd: Option<BorrowedFd<'_>>, wait: Wait) -> Result<(), WireError> {
        Ok(self.peer.send(datagram, fd, wait)?)
    }

    /// Whether the descriptor of the next message could be kept.
    pub fn has_room_for_descriptor(&self) -> bool {
        self.peer.has_room_for_descriptor()
    }

    /// Whether nothing is sent any more; what was sent may still be there to be received.
    pub fn has_hung_up(&self) -> bool {
        self.peer.has_hung_up()
    }

    /// Receives the next message and the descriptor that came with it.
    ///
    /// # Errors
    /// Any [`WireError`]; every one but "would block" ends the connection.
    pub fn receive(&self, buffer: &mut ReceiveBuffer, wait: Wait) -> Result<(In, Option<OwnedFd>), WireError> {
        let received = self.peer.receive(&mut buffer.0, wait)?;
        let message: In = decode(&buffer.0[..received.length])?;
        if received.fd.is_some() != message.carries_descriptor() {
            return Err(WireError::Descriptor {
                message: message.name(),
                expected: received.fd.is_none(),
            });
        }
        Ok((message, received.fd))
    }

    /// Who opened the other end.
    ///
    /// # Errors
    /// The socket's.
    pub fn credentials(&self) -> Result<Credentials, WireError> {
        Ok(self.peer.credentials()?)
    }

    /// Ends the connection; a thread that waits in `receive` wakes up.
    pub fn shut_down(&self) {
        self.peer.shut_down();
    }
}

impl<Out, In> AsFd for Connection<Out, In> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.peer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask() -> ToBroker {
        ToBroker::Ask {
            id: 7,
            question: Question::Get("run".into()),
        }
    }

    #[test]
    fn what_is_sent_is_what_arrives() {
        let (one, two) = Peer::pair().unwrap();
        let (client, broker) = (ClientEnd::over(one), BrokerEnd::over(two));
        let mut buffer = ReceiveBuffer::new();
        client.send(&ask(), None, Wait::Yes).unwrap();
        assert_eq!(broker.receive(&mut buffer, Wait::Yes).unwrap().0, ask());
        let (read, _write) = rustix::pipe::pipe().unwrap();
        client
            .send(&ToBroker::Life { epoch: 3 }, Some(read.as_fd()), Wait::Yes)
            .unwrap();
        assert!(broker.receive(&mut buffer, Wait::Yes).unwrap().1.is_some());
        assert!(client.send(&ToBroker::Life { epoch: 3 }, None, Wait::Yes).is_err());
        assert!(client.send(&ask(), Some(read.as_fd()), Wait::Yes).is_err());
        assert!(broker.receive(&mut buffer, Wait::No).unwrap_err().is_would_block());
        let naked = encode(&ToBroker::Life { epoch: 4 }).unwrap();
        client.send_encoded(&naked, None, Wait::Yes).unwrap();
        let error = broker.receive(&mut buffer, Wait::Yes).unwrap_err();
        assert_eq!(error.to_string(), "Life came without its descriptor");
        drop(client);
        assert!(broker.receive(&mut buffer, Wait::Yes).unwrap_err().is_closed());
    }

    #[test]
    fn anything_but_one_whole_message_is_an_error() {
        let good = encode(&ask()).unwrap();
        assert_eq!(decode::<ToBroker>(&good).unwrap(), ask());
        for cut in 0..good.len() {
            assert!(decode::<ToBroker>(&good[..cut]).is_err(), "{cut} bytes");
            let mut short = good[..cut].to_vec();
            if cut >= PREFIX {
                short[..PREFIX].copy_from_slice(&((cut - PREFIX) as u32).to_le_bytes());
                assert!(decode::<ToBroker>(&short).is_err(), "{cut} bytes that say so");
            }
        }
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            let length = (bytes.len() - PREFIX) as u32;
            bytes[..PREFIX].copy_from_slice(&length.to_le_bytes());
            decode::<ToBroker>(&bytes).unwrap_err()
        };
        assert!(matches!(with(&|bytes| bytes.push(0)), WireError::Trailing(1)));
        assert!(matches!(with(&|bytes| bytes[4] = 9), WireError::Version { theirs: 9 }));
        assert!(matches!(with(&|bytes| bytes[5] = 200), WireError::Body(_)));
    }

    #[test]
    fn limits_hold_in_both_directions() {
        let runs = vec![
            Run {
                first_word: 0,
                pages: 1,
                slot: 0
            };
            MAX_RUNS + 1
        ];
        assert!(matches!(
            encode(&ToClient::Map {
                order: 1,
                split: true,
                runs
            }),
            Err(WireError::Limit { .. })
        ));
        let full = vec![
            Run {
                first_word: u32::MAX - 600,
                pages: 128,
                slot: u32::MAX - 700
            };
            MAX_RUNS
        ];
        let bytes = encode(&ToClient::Map {
            order: u32::MAX,
            split: true,
            runs: full.clone(),
        })
        .unwrap();
        assert!(decode::<ToClient>(&bytes).is_ok());
        let outcomes = full.iter().map(|run| RunOutcome {
            merged: Bits::collect(u32::from(run.pages), |i| i % 2 == 0),
            failure: None,
        });
        let worst = ToBroker::Mapped {
            order: u32::MAX,
            outcomes: outcomes.collect(),
            cpu_micros: u32::MAX,
        };
        assert!(encode(&worst).is_ok(), "the longest answer fits a datagram");
        let long = ToBroker::Ask {
            id: 0,
            question: Question::Get("k".repeat(MAX_TEXT + 1)),
        };
        assert!(matches!(encode(&long), Err(WireError::Limit { .. })));
        let far = ToClient::Unmap {
            order: 0,
            ranges: vec![Range {
                first_word: u32::MAX,
                pages: 2,
            }],
            why: Why::Run,
        };
        assert!(encode(&far).is_err());
    }

    #[test]
    fn bits_are_short_when_all_are_alike() {
        assert_eq!(Bits::collect(512, |_| true), Bits::All);
        assert_eq!(Bits::collect(9, |_| false), Bits::None);
        let some = Bits::collect(9, |i| i == 8);
        assert_eq!((some.get(8), some.get(0), some.get(99)), (true, false, false));
        assert_eq!((some.count(9), Bits::All.count(9)), (1, 9));
        assert!(some.check(9).is_ok() && some.check(17).is_err());
    }
}
