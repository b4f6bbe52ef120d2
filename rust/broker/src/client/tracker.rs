//! The tracker: the thread that has the userfaultfd, and registers and unregisters memory with it for dirty tracking.
//!
//! It runs at the program's priority and waits for nobody but the kernel and whoever closes a region: registering takes the lock
//! that page faults wait for, which the scanner, preempted, would hold for long; and a program thread that opts memory out waits
//! here until none of it is registered. Where the thread or the userfaultfd cannot be had, pages are read instead, and
//! [`Tracker::state`] says why.

use ksmrs_sys::pagemap::Pagemap;
use ksmrs_sys::region::Region;
use ksmrs_sys::sigmask;
use ksmrs_sys::tracking::{self, Userfault, Wish};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// Something for the thread to do.
enum Request {
    /// Forget what was registered, and begin anew; the answer is whether that worked.
    Renew(Sender<bool>),
    /// Register nothing any more.
    Close,
    /// Register pages, or leave them alone.
    Fulfil(Arc<Region>, Wish),
    /// Unregister all of a region that may be registered no more, and say so.
    Untrack(Arc<Region>, Sender<()>),
}

/// The way to the thread, for the scanner, the remapper and the program's threads.
pub(super) struct Tracker {
    thread: Mutex<Option<Sender<Request>>>,
    wanted: AtomicBool,
    state: Arc<Mutex<String>>,
}

/// What [`Tracker::state`] says while pages that nobody writes are not read.
const ON: &str = "on";

impl Tracker {
    pub(super) fn new() -> Tracker {
        Tracker {
            thread: Mutex::default(),
            wanted: AtomicBool::new(false),
            state: Arc::new(Mutex::new("off: not connected".to_owned())),
        }
    }

    /// Whether anything is to be tracked from the next connection on. Called by the remapper, whose descriptor table and priority the
    /// thread gets.
    pub(super) fn want(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Release);
        let mut thread = super::lock(&self.thread);
        if !wanted || thread.is_some() {
            return;
        }
        let (requests, waiting) = channel();
        let state = self.state.clone();
        let started = std::thread::Builder::new()
            .name("ksmrs-track".to_owned())
            .spawn(move || {
                sigmask::Blocked::for_good();
                run(&waiting, &state);
            });
        match started {
            Ok(_) => *thread = Some(requests),
            Err(error) => tracing::info!(%error, "no thread for dirty tracking"),
        }
    }

    /// "on", or why not.
    pub(super) fn state(&self) -> String {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets which pages are known to be unwritten: whoever scans from here on does so under another key. Whether it works.
    pub(super) fn renew(&self) -> bool {
        if !self.wanted.load(Ordering::Acquire) {
            self.close();
            set(&self.state, "off: switched off".to_owned());
            return false;
        }
        let (reply, answer) = channel();
        let renewed = self.send(Request::Renew(reply)).then(|| answer.recv().ok()).flatten();
        if renewed.is_none() {
            set(&self.state, "off: no thread for it".to_owned());
        }
        renewed.unwrap_or(false)
    }

    /// Nothing is scanned any more.
    pub(super) fn close(&self) {
        self.send(Request::Close);
    }

    /// Passes a scan's wish on.
    pub(super) fn fulfil(&self, region: &Arc<Region>, wish: Wish) {
        self.send(Request::Fulfil(region.clone(), wish));
    }

    /// Returns when nothing of a region is registered, and nothing will be.
    pub(super) fn untrack(&self, region: &Arc<Region>) {
        if !region.end_tracking() {
            return;
        }
        let (reply, done) = channel();
        // Where the thread is gone, so is its descriptor, and with it every registration.
        if !self.send(Request::Untrack(region.clone(), reply)) || done.recv().is_err() {
            region.forget_tracking();
        }
    }

    fn send(&self, request: Request) -> bool {
        let thread = super::lock(&self.thread);
        thread.as_ref().is_some_and(|thread| thread.send(request).is_ok())
    }
}

fn set(state: &Mutex<String>, now: String) {
    *state.lock().unwrap_or_else(PoisonError::into_inner) = now;
}

fn run(requests: &Receiver<Request>, state: &Mutex<String>) {
    let mut tools: Option<(Userfault, Pagemap)> = None;
    let mut told = false;
    for request in requests {
        match request {
            Request::Renew(reply) => {
                // The old one first: memory is registered with one userfaultfd only.
                tools = None;
                let made = Userfault::open().and_then(|fault| Ok((fault, Pagemap::open()?)));
                match made {
                    Ok(made) => {
                        tools = Some(made);
                        set(state, ON.to_owned());
                    }
                    Err(error) => {
                        let why = tracking::refusal(&error);
                        if !std::mem::replace(&mut told, true) {
                            tracing::info!(why, "no dirty tracking: pages are read to see whether they changed");
                        }
                        set(state, format!("off: {why}"));
                    }
                }
                // The scanner may be gone.
                let _ = reply.send(tools.is_some());
            }
            Request::Close => {
                if tools.take().is_some() {
                    set(state, "off: not connected".to_owned());
                }
            }
            Request::Fulfil(region, wish) => {
                if let Some((fault, pagemap)) = &tools
                    && let Err(error) = region.fulfil(wish, fault, pagemap)
                {
                    tracing::debug!(%error, ?wish, "these pages are read instead of tracked");
                }
            }
            Request::Untrack(region, done) => {
                let untracked = tools.as_ref().is_some_and(|(fault, _)| region.untrack(fault).is_ok());
                if !untracked {
                    // No userfaultfd, no registration.
                    if tools.take().is_some() {
                        set(state, "off: the kernel did not unregister a region".to_owned());
                    }
                    region.forget_tracking();
                }
                let _ = done.send(());
            }
        }
    }
}
