//! The remapper's mailbox: what program threads, the wire thread and the scanner have for it.
//!
//! Memory and a condition variable, so that a program thread needs no descriptor to reach a client thread. Pushing never waits
//! for anything but the queue's own lock, and nobody owns a word meanwhile.

use super::tracker::Tracker;
use super::{ConnectOptions, Error};
use crate::wire::{Answer, Question, ToClient};
use ksmrs_sys::region::Region;
use ksmrs_sys::scan::Tally;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Something for the remapper to do.
pub(super) enum Event {
    /// From the program: the options of the next connection.
    Configure(ConnectOptions),
    /// From the program: connect now, and say when.
    Connect(Sender<Result<(), Error>>),
    /// From the program: disconnect, and say when.
    Disconnect(Sender<()>),
    /// From the program: a new region takes part.
    Join(Arc<Region>),
    /// From the program: a region was closed; its slice of the table is free once the broker knows.
    Leave(Arc<Region>),
    /// From the program: an arena of which nothing is lent any more, to be closed.
    End(Arc<Region>),
    /// From the program: a question for the broker.
    Ask(Question, Sender<Result<Answer, Error>>),
    /// From the wire thread of this connection: a message.
    Message(u32, ToClient, Option<OwnedFd>),
    /// From the wire thread of this connection: it ended, and why.
    Closed(u32, String),
    /// From the scanner, for this connection: a Scan is done, and what CPU time the scanner took since it said so last.
    Scanned(u32, u32, Tally, Duration),
    /// The same of a Stage, page by page.
    Staged(u32, u32, Vec<bool>, Duration),
}

/// The queue and what waits for it.
pub(super) struct Mailbox {
    queue: Mutex<VecDeque<Event>>,
    arrived: Condvar,
    connected: AtomicBool,
    /// Why regions do not merge, the other way round: from the remapper, for whoever asks.
    not_merging: Mutex<Vec<String>>,
    /// Beside the queue, for it must not wait for the remapper.
    pub(super) tracker: Tracker,
}

impl Mailbox {
    pub(super) fn new() -> Mailbox {
        Mailbox {
            queue: Mutex::default(),
            arrived: Condvar::new(),
            connected: AtomicBool::new(false),
            not_merging: Mutex::default(),
            tracker: Tracker::new(),
        }
    }

    /// Leaves an event.
    pub(super) fn push(&self, event: Event) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(event);
        self.arrived.notify_one();
    }

    /// Waits, until then at most, for an event that cannot wait.
    pub(super) fn linger(&self, until: Instant) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while queue
            .iter()
            .all(|event| matches!(event, Event::Leave(_) | Event::End(_) | Event::Configure(_)))
        {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.arrived.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes the oldest event; `None` when none came until then.
    pub(super) fn take(&self, until: Option<Instant>) -> Option<Event> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(event) = queue.pop_front() {
                return Some(event);
            }
            queue = match until {
                None => self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.arrived
                        .wait_timeout(queue, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// Why regions do not merge.
    pub(super) fn not_merging(&self) -> Vec<String> {
        self.not_merging.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_not_merging(&self, reasons: Vec<String>) {
        *self.not_merging.lock().unwrap_or_else(PoisonError::into_inner) = reasons;
    }

    /// Whether the handshake with a broker is through.
    pub(super) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    pub(super) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
    }
}
