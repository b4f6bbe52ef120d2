//! One connection to a broker: made, read by a thread of its own, and written by the remapper.

use super::mailbox::{Event, Mailbox};
use super::{ConnectOptions, Error, start};
use crate::process::Process;
use crate::wire::{ClientEnd, ReceiveBuffer, ToBroker, WireError};
use ksmrs_sys::peer::Wait;
use ksmrs_sys::sigmask;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The remapper's end.
pub(super) struct Link {
    /// Counts connections; what comes for an older one is dropped.
    pub(super) number: u32,
    /// The broker's process, 0 if it cannot be told.
    pub(super) broker: u32,
    /// Tells of its end.
    pub(super) process: Option<Arc<Process>>,
    end: Arc<ClientEnd>,
}

impl Link {
    /// Connects, starting a broker if none listens, and begins to read.
    pub(super) fn open(options: &ConnectOptions, number: u32, mailbox: &Arc<Mailbox>) -> Result<Link, Error> {
        let end = Arc::new(ClientEnd::over(start::meet(options)?));
        let (reader, mailbox) = (end.clone(), mailbox.clone());
        let thread = std::thread::Builder::new()
            .name("ksmrs-wire".to_owned())
            .spawn(move || {
                sigmask::Blocked::for_good();
                let why = read(&reader, number, &mailbox);
                reader.shut_down();
                mailbox.push(Event::Closed(number, why.to_string()));
            });
        thread.map_err(|error| Error::Off(format!("no thread to read the socket: {error}")))?;
        let broker = end.credentials().map_or(0, |credentials| credentials.pid);
        let process = Process::of(broker).map(Arc::new);
        Ok(Link {
            number,
            broker,
            process,
            end,
        })
    }

    /// To a broker that a test plays, which nobody reads from.
    #[cfg(test)]
    pub(super) fn over(end: ClientEnd) -> Link {
        Link {
            number: 1,
            broker: 0,
            process: None,
            end: Arc::new(end),
        }
    }

    /// Sends a message. The remapper owns no word and holds no lock here.
    pub(super) fn send(&self, message: &ToBroker, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        Ok(self.end.send(message, fd, Wait::Yes)?)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Ends the reader too.
        self.end.shut_down();
    }
}

fn read(end: &ClientEnd, number: u32, mailbox: &Mailbox) -> WireError {
    let mut buffer = ReceiveBuffer::new();
    loop {
        match end.receive(&mut buffer, Wait::Yes) {
            Ok((message, fd)) => mailbox.push(Event::Message(number, message, fd)),
            Err(error) => return error,
        }
    }
}
