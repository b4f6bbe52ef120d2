//! The scanner: the low-priority thread that reads the program's pages.
//!
//! It brings checksum words up to date and copies pages into staging, as the broker asks. It owns no page and no lock that the
//! program could wait for, and it stops early when the connection that it works for is gone.

use super::mailbox::{Event, Mailbox};
use crate::cpu::Stopwatch;
use ksmrs_sys::checksum::Checksummer;
use ksmrs_sys::pagemap::Pagemap;
use ksmrs_sys::protocol::{Page, Span};
use ksmrs_sys::region::Region;
use ksmrs_sys::scan::{ScanTools, Tally};
use ksmrs_sys::staging::Staging;
use ksmrs_sys::{PAGE_SIZE, StoreNumber, sigmask};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Something for the scanner to do, for the connection of that number.
pub(super) enum Job {
    /// A broker's domain: its key, and its store's number.
    Domain(u32, Box<Checksummer>, StoreNumber),
    /// Bring these pages' words up to date.
    Scan {
        link: u32,
        order: u32,
        pass: u16,
        /// Whether checksums are to have the pages' NUMA nodes in them.
        nodes: bool,
        spans: Vec<(Arc<Region>, Span)>,
    },
    /// Copy these pages into staging, where they still exist.
    Stage {
        link: u32,
        order: u32,
        pages: Vec<Option<(Arc<Region>, Page)>>,
    },
}

/// Pages between two looks at whether the connection still stands; steps end where huge pages do, which is what is tracked by.
const STEP: u32 = ksmrs_sys::EXTENT_PAGES;

/// How long the staging area keeps its memory after the last page was copied there. The broker has read it long before; from one that has
/// not, its frames' hashes keep what it reads then.
const STAGED_FOR: Duration = Duration::from_secs(1);

/// Starts the thread; it ends with its sender. `current` is the number of the connection that counts.
pub(super) fn start(
    mailbox: Arc<Mailbox>,
    staging: Arc<Staging>,
    current: Arc<AtomicU32>,
) -> std::io::Result<Sender<Job>> {
    let (jobs, waiting) = channel();
    std::thread::Builder::new()
        .name("ksmrs-scan".to_owned())
        .spawn(move || {
            sigmask::Blocked::for_good();
            sigmask::lower_priority();
            run(&waiting, &mailbox, &staging, &current);
        })?;
    Ok(jobs)
}

fn run(jobs: &Receiver<Job>, mailbox: &Mailbox, staging: &Staging, current: &AtomicU32) {
    let mut tools: Option<ScanTools> = None;
    let mut stopwatch = Stopwatch::start();
    let mut staged: Option<Instant> = None;
    while let Some(job) = next_job(jobs, staging, &mut staged) {
        match job {
            Job::Domain(link, checksummer, store) => {
                let pagemap =
                    Pagemap::open().inspect_err(|error| tracing::info!(%error, link, "checksums find breaks"));
                let mut fresh = ScanTools::new(*checksummer, store, pagemap.ok());
                // Even where nothing will be known, for what is known now is under another key.
                fresh.tracks = mailbox.tracker.renew() && fresh.pagemap.is_some();
                if current.load(Ordering::Acquire) != link {
                    // Whoever lost that connection closed the tracker before it was renewed here.
                    mailbox.tracker.close();
                }
                tools = Some(fresh);
            }
            Job::Scan {
                link,
                order,
                pass,
                nodes,
                spans,
            } => {
                let Some(tools) = &mut tools else { continue };
                tools.count_nodes(nodes);
                let stands = || current.load(Ordering::Acquire) == link;
                let tally = scan(&spans, pass, tools, mailbox, &stands);
                if let Some(error) = tools.nodes_refused() {
                    tracing::warn!(%error, link, "nothing but zeros merges while merge_across_nodes is 0: allow the call, or set it to 1");
                }
                mailbox.push(Event::Scanned(link, order, tally, stopwatch.lap()));
            }
            Job::Stage { link, order, pages } => {
                let copied = pages.iter().enumerate().map(|(index, page)| {
                    page.as_ref()
                        .is_some_and(|(region, page)| region.stage(*page, staging, index as u32))
                });
                let copied = copied.collect();
                staged = Some(Instant::now());
                mailbox.push(Event::Staged(link, order, copied, stopwatch.lap()));
            }
        }
    }
}

/// The next job; meanwhile, and before it begins, the staging area's memory goes back if it is time. `None`: nobody sends any more.
fn next_job(jobs: &Receiver<Job>, staging: &Staging, staged: &mut Option<Instant>) -> Option<Job> {
    while let Some(at) = *staged {
        let left = STAGED_FOR.saturating_sub(at.elapsed());
        if left.is_zero() {
            *staged = None;
            if let Err(error) = staging.discard() {
                tracing::warn!(%error, "the staging area keeps its memory");
            }
            break;
        }
        match jobs.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => {}
            answer => return answer.ok(),
        }
    }
    jobs.recv().ok()
}

fn scan(
    spans: &[(Arc<Region>, Span)],
    pass: u16,
    tools: &mut ScanTools,
    mailbox: &Mailbox,
    stands: &dyn Fn() -> bool,
) -> Tally {
    let mut total = Tally::default();
    for (region, span) in spans {
        let position = (region.address() / PAGE_SIZE) as u32 % STEP;
        let mut at = span.first;
        while at < span.end() && stands() {
            let room = STEP - (at.0 % STEP + position) % STEP;
            let part = Span {
                first: at,
                pages: (span.end().0 - at.0).min(room),
            };
            match region.scan(part, pass, tools) {
                Some(Ok(tally)) => total.add(tally),
                Some(Err(error)) => {
                    tracing::warn!(%error, "pages are compared by checksum from here on");
                    (tools.pagemap, tools.tracks) = (None, false);
                    continue;
                }
                // Closed meanwhile.
                None => break,
            }
            for wish in tools.wishes.drain(..) {
                mailbox.tracker.fulfil(region, wish);
            }
            at = part.end();
        }
    }
    total
}
