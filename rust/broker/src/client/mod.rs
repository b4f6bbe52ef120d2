//! The client side: what a process with regions runs, and what Python calls.
//!
//! ```text
//!   program threads --- mailbox ---> remapper ---- socket ---> broker
//!   (regions, merge,      ^   ^      (freezes, maps,              |
//!    stats, knobs)        |   |       owns the socket's sending)  |
//!                      scanner +---------- wire thread <----------+
//! ```
//!
//! Four threads (the fourth, the tracker, registers memory for dirty tracking) share one descriptor table that is not the
//! program's. Program threads talk to them through memory only. Nothing here is needed for data to
//! be right: without threads, broker or socket every region is ordinary memory, breaks included. No thread here ever runs Python.

mod born;
mod heap;
mod link;
mod mailbox;
mod mappings;
mod objects;
mod orders;
mod page_map;
mod query;
mod region;
mod remapper;
mod scanner;
mod sentinel;
mod session;
mod start;
mod tracker;

use crate::runtime_dir::RuntimeDirError;
use crate::wire::{Answer, ErrorCode, Lineage, Question, WireError};
use arc_swap::ArcSwap;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::{fork, signal};
use mailbox::{Event, Mailbox};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

pub use crate::wire::{Counters, Kind, MergeReport, Status};
pub use born::{born, expect_births};
pub use heap::{Fresh, Held, arena_at, begin_heap, end_heap, free, held, lend, lent, resize};
pub use ksmrs_sys::SysError;
pub use ksmrs_sys::foreign::Foreign;
pub use page_map::{RegionMap, page_map};
pub use region::Region;

/// How often a waiting program thread looks whether it was interrupted (Ctrl-C).
const INTERRUPT_CHECK: Duration = Duration::from_millis(50);
/// How long after its time an answer to a merge may come.
const MERGE_GRACE: Duration = Duration::from_secs(5);
/// How long a question other than a merge may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Where and how to meet a broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The broker's directory; else as `runtime_dir::default_path` says.
    pub runtime_dir: Option<PathBuf>,
    /// Whether the broker runs inside this process.
    pub embedded: bool,
    /// The trust zone; pages merge only inside one.
    pub domain: String,
    /// The command that starts a broker as a daemon and returns once it listens.
    pub broker_command: Vec<OsString>,
    /// Whether pages that nobody writes need not be read again, where the kernel can tell (`ksmrs_sys::tracking`).
    pub dirty_tracking: bool,
}

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions {
            runtime_dir: None,
            embedded: true,
            domain: "default".to_owned(),
            broker_command: Vec::new(),
            dirty_tracking: true,
        }
    }
}

/// What a client call can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused something.
    #[error(transparent)]
    System(#[from] SysError),
    /// The broker's directory cannot be used.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// The socket failed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// No broker could be started.
    #[error("the broker did not start: {0}")]
    Start(String),
    /// The connection went away while an answer was due.
    #[error("the connection to the broker was lost; the next call connects again")]
    Lost,
    /// No answer came.
    #[error("the broker did not answer within {0:?}; see its log in the runtime directory")]
    Silent(Duration),
    /// The broker refused a question.
    #[error("{text}")]
    Refused {
        /// What kind of refusal.
        code: ErrorCode,
        /// For people.
        text: String,
    },
    /// Connected already, with other options.
    #[error("this process is connected with other options already ({0}); call disconnect() first")]
    Configured(String),
    /// The waiting was interrupted.
    #[error("interrupted")]
    Interrupted,
    /// A size that no region can have.
    #[error("a region of {nbytes} bytes: {reason}")]
    Size {
        /// The size asked for.
        nbytes: usize,
        /// Why not.
        reason: String,
    },
    /// A page range outside the region.
    #[error("pages {start}..{end} are not in a region of {pages} pages")]
    Range {
        /// First page asked for.
        start: usize,
        /// The page after the last.
        end: usize,
        /// The region's pages.
        pages: u32,
    },
    /// The region was closed.
    #[error("the region is closed")]
    Closed,
    /// Merging cannot work in this process.
    #[error("merging is off in this process: {0}")]
    Off(String),
}

impl Error {
    /// The kernel's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::System(error) => error.errno(),
            Error::Wire(WireError::Socket(error)) => error.errno(),
            _ => None,
        }
    }
}

/// What a process keeps between calls, once per life: a forked child begins its own.
struct Process {
    /// Read without a lock: a child may be forked at any moment.
    options: ArcSwap<ConnectOptions>,
    client: Mutex<Option<&'static Client>>,
    /// What the remapper leaves for children.
    bequest: Mutex<Bequest>,
}

/// How a process stands with its broker, for a child to go on from.
#[derive(Clone, Default)]
struct Bequest {
    /// Whether there is anything to connect for.
    wanted: bool,
    /// The client that its words are known as.
    lineage: Option<Lineage>,
}

/// This life's client: its page table, and the way to its threads. Never freed: a handler or a thread may always be at it.
struct Client {
    table: &'static ClientTable,
    mailbox: Arc<Mailbox>,
    era: u32,
}

/// Forks of forks that each begin a life of their own with ksmrs.
const MAX_LIVES: usize = 64;
/// One place per life, so that a lock which another thread of the parent held at the fork is never looked at again.
static LIVES: [OnceLock<Process>; MAX_LIVES] = [const { OnceLock::new() }; MAX_LIVES];
static LIFE: AtomicUsize = AtomicUsize::new(0);

fn process() -> &'static Process {
    let life = LIFE.load(Ordering::Acquire).min(MAX_LIVES - 1);
    LIVES[life].get_or_init(|| {
        let parent = life.checked_sub(1).and_then(|parent| LIVES[parent].get());
        let options = parent.map(|parent| parent.options.load_full());
        let bequest = parent
            .and_then(|parent| parent.bequest.try_lock().ok())
            .map(|bequest| bequest.clone());
        Process {
            options: ArcSwap::new(options.unwrap_or_default()),
            client: Mutex::new(None),
            bequest: Mutex::new(bequest.unwrap_or_default()),
        }
    })
}

/// In the child of a fork. Its place is its parent's only where that never lived, and no thread of it was about to.
fn in_child(lived: bool) {
    let is_free = || !matches!(process().client.try_lock(), Err(TryLockError::WouldBlock));
    if lived || !is_free() {
        LIFE.fetch_add(1, Ordering::AcqRel);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This life's client, begun if need be.
fn client() -> Result<&'static Client, Error> {
    if let Some(client) = client_if_begun() {
        return Ok(client);
    }
    let process = process();
    let mut client = lock(&process.client);
    if let Some(client) = *client {
        return Ok(client);
    }
    if LIFE.load(Ordering::Acquire) >= MAX_LIVES {
        return Err(Error::Off(format!("it is a fork of forks, {MAX_LIVES} deep")));
    }
    let page_size = rustix::param::page_size();
    if page_size != ksmrs_sys::PAGE_SIZE {
        return Err(Error::Off(format!(
            "the kernel's pages have {page_size} bytes; ksmrs merges pages of 4096"
        )));
    }
    let era = fork::begin_life(in_child)?;
    signal::install()?;
    let (table, mailbox) = remapper::begin((**process.options.load()).clone(), &process.bequest)?;
    ksmrs_sys::born::use_table(table);
    let begun: &'static Client = Box::leak(Box::new(Client { table, mailbox, era }));
    *client = Some(begun);
    Ok(begun)
}

/// The client, where this very process has begun one.
fn client_if_begun() -> Option<&'static Client> {
    let client = *lock(&process().client);
    let client = client?;
    if fork::is_life(client.era) {
        return Some(client);
    }
    // A raw clone, which no fork handler saw: what was begun was begun by the parent.
    in_child(true);
    None
}

/// Says what the first use connects to.
///
/// # Errors
/// [`Error::Configured`] when this process already runs with other options.
pub fn configure(options: ConnectOptions) -> Result<(), Error> {
    let begun = client_if_begun();
    let kept = &process().options;
    let current = kept.load();
    if let Some(client) = begun
        && **current != options
    {
        if client.mailbox.is_connected() {
            let domain = &current.domain;
            return Err(Error::Configured(match &current.runtime_dir {
                _ if current.embedded => format!("an embedded broker, domain {domain:?}"),
                Some(directory) => format!("{}, domain {domain:?}", directory.display()),
                None => format!("the default directory, domain {domain:?}"),
            }));
        }
        client.mailbox.push(Event::Configure(options.clone()));
    }
    kept.store(Arc::new(options));
    Ok(())
}

/// Connects, starting a broker where none runs; returns when regions can join.
///
/// # Errors
/// Why it did not work; the next use tries again.
pub fn connect() -> Result<(), Error> {
    let (reply, answer) = mpsc::channel();
    client()?.mailbox.push(Event::Connect(reply));
    match answer.recv_timeout(ANSWER_TIMEOUT) {
        Ok(connected) => connected,
        Err(RecvTimeoutError::Timeout) => Err(Error::Silent(ANSWER_TIMEOUT)),
        Err(RecvTimeoutError::Disconnected) => Err(Error::Lost),
    }
}

/// Says goodbye to the broker. What is merged stays merged and keeps its contents; nothing merges until [`connect`] or a new
/// region.
///
/// # Errors
/// None so far.
pub fn disconnect() -> Result<(), Error> {
    if let Some(client) = client_if_begun() {
        let (reply, done) = mpsc::channel();
        client.mailbox.push(Event::Disconnect(reply));
        // An error means that the thread is gone or stuck with a broker that does not read; it ends the connection when it can.
        let _ = done.recv_timeout(ANSWER_TIMEOUT);
    }
    Ok(())
}

/// Whether a broker is connected now.
pub fn is_connected() -> bool {
    client_if_begun().is_some_and(|client| client.mailbox.is_connected())
}

/// Puts the SIGSEGV handler in front again, if this process has regions.
pub fn reassert_handler() {
    if !fork::is_unregistered() {
        // It was installed once, so nothing can refuse it now.
        let _ = signal::install();
    }
}

/// Asks the broker this process is connected to, or connects.
fn ask(question: Question) -> Result<Answer, Error> {
    let (reply, answer) = mpsc::channel();
    client()?.mailbox.push(Event::Ask(question, reply));
    match answer.recv_timeout(ANSWER_TIMEOUT) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => Err(Error::Silent(ANSWER_TIMEOUT)),
        Err(RecvTimeoutError::Disconnected) => Err(Error::Lost),
    }
}

/// Scans and merges now, over all clients of the domain, until nothing more merges or the time is up. A broker that dies
/// meanwhile is replaced, and the next one asked.
///
/// # Errors
/// [`Error::Interrupted`] when `interrupted` says so; what was merged stays merged.
pub fn merge(timeout: Option<Duration>, interrupted: &mut dyn FnMut() -> bool) -> Result<MergeReport, Error> {
    // What this process has lent need not outlive a pass for it; what others have does.
    heap::open_all();
    let begun = Instant::now();
    loop {
        let left = timeout.map(|timeout| timeout.saturating_sub(begun.elapsed()));
        let timeout_ms = left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
        let (reply, answer) = mpsc::channel();
        client()?
            .mailbox
            .push(Event::Ask(Question::Merge { timeout_ms }, reply));
        // Counted only while this process runs: being stopped meanwhile is not the broker's silence.
        let mut silent = Duration::ZERO;
        let answer = loop {
            match answer.recv_timeout(INTERRUPT_CHECK) {
                Ok(answer) => break answer,
                Err(RecvTimeoutError::Disconnected) => break Err(Error::Lost),
                Err(RecvTimeoutError::Timeout) if interrupted() => return Err(Error::Interrupted),
                Err(RecvTimeoutError::Timeout) => {
                    silent += INTERRUPT_CHECK;
                    let most = left.map(|left| left.saturating_add(MERGE_GRACE));
                    if let Some(most) = most.filter(|most| silent > *most) {
                        return Err(Error::Silent(most));
                    }
                }
            }
        };
        match answer {
            Ok(Answer::Merged(mut report)) => {
                report.elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                return Ok(report);
            }
            Ok(other) => return Err(unexpected(&other)),
            Err(Error::Lost) if left.is_none_or(|left| !left.is_zero()) => {
                if interrupted() {
                    return Err(Error::Interrupted);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn unexpected(answer: &Answer) -> Error {
    Error::Start(format!("it answered another question: {answer:?}"))
}

/// Asks the broker of this process, else the one that runs in its directory; `None` where there is none. Starts nothing.
fn ask_without_starting(question: Question) -> Result<Option<Answer>, Error> {
    match client_if_begun() {
        Some(client) if client.mailbox.is_connected() => match ask(question) {
            Err(Error::Lost) => Ok(None),
            answer => answer.map(Some),
        },
        _ => query::ask_running(&process().options.load_full(), question),
    }
}

/// The counters of the domain; empty where no broker runs. Never starts one.
///
/// # Errors
/// The broker is there and cannot be asked.
pub fn stats() -> Result<Counters, Error> {
    match ask_without_starting(Question::Stats)? {
        None => Ok(Counters::new()),
        Some(Answer::Stats(counters)) => Ok(counters),
        Some(other) => Err(unexpected(&other)),
    }
}

/// The counters of this process: its own, and its broker's where it has one.
///
/// # Errors
/// As for [`stats`].
pub fn process_stats() -> Result<Counters, Error> {
    let (merges, breaks) = orders::merges_and_breaks();
    let own = [("merges", merges), ("breaks", breaks)].map(|(name, count)| (name.to_owned(), count as i64));
    let mut counters = Counters::from(own);
    if !is_connected() {
        return Ok(counters);
    }
    match ask(Question::ProcessStats) {
        Ok(Answer::ProcessStats(brokers)) => counters.extend(brokers),
        Ok(other) => return Err(unexpected(&other)),
        Err(Error::Lost) => {}
        Err(error) => return Err(error),
    }
    Ok(counters)
}

/// Why regions of this process do not merge, one sentence each.
pub fn not_merging() -> Vec<String> {
    client_if_begun().map_or_else(Vec::new, |client| client.mailbox.not_merging())
}

/// "on" where pages that nobody writes are not read again, else "off: " and why.
pub fn dirty_tracking() -> String {
    client_if_begun().map_or_else(
        || "off: no region yet".to_owned(),
        |client| client.mailbox.tracker.state(),
    )
}

/// How the broker is; `None` where none runs. Never starts one.
///
/// # Errors
/// As for [`stats`].
pub fn status() -> Result<Option<Status>, Error> {
    match ask_without_starting(Question::Status)? {
        None => Ok(None),
        Some(Answer::Status(status)) => Ok(Some(status)),
        Some(other) => Err(unexpected(&other)),
    }
}

/// A knob's value.
///
/// # Errors
/// No such knob, or no broker.
pub fn get(knob: &str) -> Result<String, Error> {
    match ask(Question::Get(knob.to_owned()))? {
        Answer::Value(value) => Ok(value),
        other => Err(unexpected(&other)),
    }
}

/// Sets a knob of the domain.
///
/// # Errors
/// No such knob, not a value for it (nothing changed), or no broker.
pub fn set(knob: &str, value: &str) -> Result<(), Error> {
    match ask(Question::Set {
        knob: knob.to_owned(),
        value: value.to_owned(),
    })? {
        Answer::Set => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Waits, after `run=2`, until nothing of the domain is merged any more; false after 10 s, for a client that is stopped unmerges
/// when it goes on.
///
/// # Errors
/// The broker cannot be asked, or [`Error::Interrupted`] when `interrupted` says so.
pub fn wait_until_unmerged(interrupted: &mut dyn FnMut() -> bool) -> Result<bool, Error> {
    const LOOK: Duration = Duration::from_millis(2);
    let until = Instant::now() + ANSWER_TIMEOUT;
    // Those on their way to a frame still come there, and are unmerged then.
    const LEFT: [&str; 3] = ["pages_shared", "ksm_zero_pages", "pages_proposed"];
    let is_left = |(name, pages): &(String, i64)| LEFT.contains(&name.as_str()) && *pages > 0;
    while stats()?.iter().any(is_left) {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        if Instant::now() > until {
            return Ok(false);
        }
        std::thread::sleep(LOOK);
    }
    Ok(true)
}
