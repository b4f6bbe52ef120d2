//! The socket between client and broker: datagrams in order, at most one descriptor each, and who is on the other end.
//!
//! SOCK_SEQPACKET, so that a message is either whole or refused: this file turns every way in which the kernel reports "not
//! whole" into an error, and never returns half a message or a second descriptor. What the bytes mean is not its business.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use crate::error::SysError;

const WHAT: &str = "the broker socket";
/// Connections that may wait for the broker to accept them.
const BACKLOG: i32 = 64;

/// Who opened the other end (SO_PEERCRED).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Its process, as seen from our pid namespace (0 when it has none there).
    pub pid: u32,
    /// Its effective user.
    pub uid: u32,
}

/// Whether a call waits for the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Sleep until it can be done.
    Yes,
    /// Fail with [`SysError::is_would_block`].
    No,
}

/// A received datagram.
#[derive(Debug)]
pub struct Received {
    /// Bytes of it, in the buffer that was given.
    pub length: usize,
    /// The descriptor that came along.
    pub fd: Option<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Peer {
    fd: OwnedFd,
}

/// The address of `name` in a directory that is held open: long paths fit, and nobody can swap the directory.
fn address(directory: BorrowedFd<'_>, name: &str) -> Result<SocketAddrUnix, SysError> {
    // Not /proc/self: the thread may have a descriptor table of its own.
    let path = format!("/proc/thread-self/fd/{}/{name}", directory.as_raw_fd());
    SocketAddrUnix::new(path).map_err(SysError::call("socket address", WHAT))
}

fn socket(flags: SocketFlags) -> Result<OwnedFd, SysError> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags | SocketFlags::CLOEXEC,
        None,
    )
    .map_err(SysError::call("socket", WHAT))
}

impl Peer {
    /// The socket itself.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Wraps an end that was made elsewhere.
    pub fn from_fd(fd: OwnedFd) -> Peer {
        Peer { fd }
    }

    /// Two connected ends.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn pair() -> Result<(Peer, Peer), SysError> {
        let (one, two) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(SysError::call("socketpair", WHAT))?;
        Ok((Peer { fd: one }, Peer { fd: two }))
    }

    /// Connects to the socket `name` in a directory held open.
    ///
    /// # Errors
    /// The kernel's errno: ENOENT or ECONNREFUSED when nobody listens there.
    pub fn connect(directory: impl AsFd, name: &str) -> Result<Peer, SysError> {
        let fd = socket(SocketFlags::empty())?;
        let address = address(directory.as_fd(), name)?;
        loop {
            match rustix::net::connect(&fd, &address) {
                Err(Errno::INTR) => continue,
                answer => return answer.map(|()| Peer { fd }).map_err(SysError::call("connect", WHAT)),
            }
        }
    }

    /// Who opened the other end.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn credentials(&self) -> Result<Credentials, SysError> {
        let credentials = sockopt::socket_peercred(&self.fd).map_err(SysError::call("SO_PEERCRED", WHAT))?;
        // Read by number: a peer outside our pid namespace has pid 0, which rustix's Pid cannot be.
        let pid = rustix::process::Pid::as_raw(Some(credentials.pid));
        Ok(Credentials {
            pid: pid.max(0) as u32,
            uid: credentials.uid.as_raw(),
        })
    }

    /// Sends one datagram, whole or not at all, without ever raising SIGPIPE.
    ///
    /// # Errors
    /// [`SysError::Closed`], or the kernel's errno (EMSGSIZE for a datagram beyond the socket's buffer).
    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>, wait: Wait) -> Result<(), SysError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: [BorrowedFd<'_>; 1];
        if let Some(fd) = fd {
            fds = [fd];
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = SendFlags::NOSIGNAL
            | if wait == Wait::No {
                SendFlags::DONTWAIT
            } else {
                SendFlags::empty()
            };
        loop {
            return match rustix::net::sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut control, flags) {
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE | Errno::CONNRESET) => Err(SysError::Closed),
                Err(errno) => Err(SysError::Call {
                    call: "sendmsg",
                    what: WHAT,
                    errno,
                }),
                Ok(sent) if sent == bytes.len() => Ok(()),
                Ok(_) => Err(SysError::Datagram {
                    reason: "the kernel sent a part of it",
                }),
            };
        }
    }

    /// Whether a descriptor that came along could be kept now. Without room the kernel throws it away, and the message says so too late.
    pub fn has_room_for_descriptor(&self) -> bool {
        rustix::io::fcntl_dupfd_cloexec(&self.fd, 0).is_ok()
    }

    /// Whether the other end closed. What it sent before may still be there to be received.
    pub fn has_hung_up(&self) -> bool {
        let mut asked = [PollFd::new(&self.fd, PollFlags::empty())];
        loop {
            match rustix::event::poll(&mut asked, Some(&Timespec::default())) {
                Err(Errno::INTR) => {}
                answer => return answer.is_ok() && asked[0].revents().contains(PollFlags::HUP),
            }
        }
    }

    /// Receives one datagram into `buffer`, with at most one descriptor (close-on-exec).
    ///
    /// # Errors
    /// [`SysError::Closed`] at the end of the stream, [`SysError::Datagram`] for what is not whole or carries too much (all
    /// descriptors in it are closed), or the kernel's errno.
    pub fn receive(&self, buffer: &mut [u8], wait: Wait) -> Result<Received, SysError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC
            | if wait == Wait::No {
                RecvFlags::DONTWAIT
            } else {
                RecvFlags::empty()
            };
        let message = loop {
            match rustix::net::recvmsg(&self.fd, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
                // The other end closed with messages of ours unread. The kernel says so once, and before it hands out what is queued.
                Err(Errno::INTR | Errno::CONNRESET) => continue,
                Err(errno) => {
                    return Err(SysError::Call {
                        call: "recvmsg",
                        what: WHAT,
                        errno,
                    });
                }
                Ok(message) => break message,
            }
        };
        let mut received = None;
        let mut surplus = false;
        for part in control.drain() {
            match part {
                // Alignment leaves room for a second descriptor in the control buffer; dropping the iterator closes it.
                RecvAncillaryMessage::ScmRights(fds) => fds.for_each(|fd| surplus |= received.replace(fd).is_some()),
                _ => surplus = true,
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || surplus {
            return Err(SysError::Datagram {
                reason: "more than one descriptor, or one and no room for it",
            });
        }
        if message.flags.contains(ReturnFlags::TRUNC) || message.bytes > buffer.len() {
            return Err(SysError::Datagram {
                reason: "longer than any message",
            });
        }
        if message.bytes == 0 {
            return Err(SysError::Closed);
        }
        Ok(Received {
            length: message.bytes,
            fd: received,
        })
    }

    /// Ends the connection in both directions; a thread that waits in it wakes up with [`SysError::Closed`].
    pub fn shut_down(&self) {
        // The only errors say that it is not connected any more, which is what is wanted.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A socket that clients connect to.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Binds `name` in a directory held open, and listens. An old socket of that name must be gone.
    ///
    /// # Errors
    /// The kernel's errno: EADDRINUSE when the name exists.
    pub fn bind(directory: impl AsFd, name: &str) -> Result<Listener, SysError> {
        let fd = socket(SocketFlags::NONBLOCK)?;
        rustix::net::bind(&fd, &address(directory.as_fd(), name)?).map_err(SysError::call("bind", WHAT))?;
        rustix::net::listen(&fd, BACKLOG).map_err(SysError::call("listen", WHAT))?;
        Ok(Listener { fd })
    }

    /// The next client that waits, if any.
    ///
    /// # Errors
    /// The kernel's errno (EMFILE).
    pub fn accept(&self) -> Result<Option<Peer>, SysError> {
        match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC) {
            Ok(fd) => Ok(Some(Peer { fd })),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(SysError::Call {
                call: "accept4",
                what: WHAT,
                errno,
            }),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_and_its_descriptor_arrive_whole() {
        let (one, two) = Peer::pair().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        one.send(b"hello", Some(write.as_fd()), Wait::Yes).unwrap();
        one.send(b"again", None, Wait::Yes).unwrap();
        drop(write);
        let mut buffer = [0; 64];
        let received = two.receive(&mut buffer, Wait::Yes).unwrap();
        assert_eq!(&buffer[..received.length], b"hello");
        rustix::io::write(received.fd.as_ref().unwrap(), b"x").unwrap();
        let mut byte = [0; 1];
        assert_eq!(rustix::io::read(&read, &mut byte).unwrap(), 1);
        assert!(two.receive(&mut buffer, Wait::No).unwrap().fd.is_none());
        assert!(two.receive(&mut buffer, Wait::No).unwrap_err().is_would_block());
        assert_eq!(two.credentials().unwrap().pid, std::process::id());
        drop(one);
        assert!(matches!(two.receive(&mut buffer, Wait::Yes), Err(SysError::Closed)));
        assert!(matches!(two.send(b"x", None, Wait::Yes), Err(SysError::Closed)));
    }

    #[test]
    fn what_was_sent_before_the_end_arrives_though_its_sender_did_not_read() {
        let (one, two) = Peer::pair().unwrap();
        two.send(b"unread", None, Wait::Yes).unwrap();
        let (_read, write) = rustix::pipe::pipe().unwrap();
        one.send(b"last", Some(write.as_fd()), Wait::Yes).unwrap();
        assert!(!two.has_hung_up());
        drop(one);
        assert!(two.has_hung_up());
        let mut buffer = [0; 64];
        let received = two.receive(&mut buffer, Wait::No).unwrap();
        assert_eq!(
            (&buffer[..received.length], received.fd.is_some()),
            (&b"last"[..], true)
        );
        assert!(matches!(two.receive(&mut buffer, Wait::No), Err(SysError::Closed)));
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let (one, two) = Peer::pair().unwrap();
        let mut buffer = [0; 8];
        one.send(b"nine bytes", None, Wait::Yes).unwrap();
        assert!(matches!(
            two.receive(&mut buffer, Wait::Yes),
            Err(SysError::Datagram { .. })
        ));
        for count in [2, 3, 5] {
            let pipes: Vec<_> = (0..count).map(|_| rustix::pipe::pipe().unwrap()).collect();
            let fds: Vec<BorrowedFd<'_>> = pipes.iter().map(|(_, write)| write.as_fd()).collect();
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            rustix::net::sendmsg(&one, &[IoSlice::new(b"fds")], &mut control, SendFlags::empty()).unwrap();
            assert!(
                matches!(two.receive(&mut buffer, Wait::Yes), Err(SysError::Datagram { .. })),
                "{count} descriptors"
            );
            drop(fds);
            for (read, write) in pipes {
                drop(write);
                assert_eq!(
                    rustix::io::read(&read, &mut buffer).unwrap(),
                    0,
                    "a refused descriptor stayed open"
                );
            }
        }
    }

    #[test]
    fn a_deep_directory_is_reached_through_its_descriptor() {
        let base = std::env::temp_dir().join(format!("ksmrs-peer-{}", std::process::id()));
        let deep = base.join("d".repeat(120));
        std::fs::create_dir_all(&deep).unwrap();
        let directory = std::fs::File::open(&deep).unwrap();
        assert!(Peer::connect(&directory, "socket").is_err());
        let listener = Listener::bind(&directory, "socket").unwrap();
        assert!(listener.accept().unwrap().is_none());
        let client = Peer::connect(&directory, "socket").unwrap();
        let server = listener.accept().unwrap().unwrap();
        client.send(b"x", None, Wait::Yes).unwrap();
        assert_eq!(server.receive(&mut [0; 8], Wait::Yes).unwrap().length, 1);
        assert_eq!(server.credentials().unwrap().uid, rustix::process::geteuid().as_raw());
        std::fs::remove_dir_all(&base).unwrap();
    }
}
