//! The pace: when the next batch begins, and which merges on request are open.
//!
//! A batch is `pages_to_scan` pages over all clients; once its orders are answered the scan sleeps `sleep_millisecs`. A merge
//! on request knows no batches: it runs in rounds over all clients until one in which nothing merged. Never looks at a page.

use crate::page::WINDOW;
use std::time::Duration;

/// A merge on request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MergeTicket(pub u32);

/// What a merge on request did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MergeReport {
    /// Rounds over all clients, the last one without a merge.
    pub rounds: u32,
    /// Pages that took a frame or became zero pages meanwhile.
    pub merged: u64,
    /// Pages looked at meanwhile.
    pub scanned: u64,
    /// From the request to the end of the last round, in nanoseconds.
    pub nanoseconds: u64,
}

struct Request {
    ticket: MergeTicket,
    since: Duration,
    /// The first round that counts for it.
    from_round: u64,
    merged: u64,
    scanned: u64,
}

pub(crate) struct Pace {
    /// Pages left in this batch.
    pub batch_left: u32,
    /// Pages that the last batch left to this one.
    carried: u32,
    /// Pages of batches to come that were looked at already.
    ahead: u32,
    /// When the next batch begins, once the last is over.
    pub wake: Option<Duration>,
    /// Rounds begun.
    pub round: u64,
    /// Merges when the round began.
    pub merged_at_round: u64,
    /// A client fell silent in this round, and with it what others waited for: that nothing merged says nothing.
    pub disturbed: bool,
    requests: Vec<Request>,
    over: Vec<(MergeTicket, MergeReport)>,
    last_ticket: u32,
    /// A request came: the next round begins at once.
    pub restart: bool,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            batch_left: 0,
            carried: 0,
            ahead: 0,
            // The first batch begins at once.
            wake: Some(Duration::ZERO),
            round: 0,
            merged_at_round: 0,
            disturbed: false,
            requests: Vec::new(),
            over: Vec::new(),
            last_ticket: 0,
            restart: false,
        }
    }
}

impl Pace {
    pub(crate) fn begin_batch(&mut self, pages_to_scan: u32, pause: Duration) {
        let pages = pages_to_scan.saturating_add(std::mem::take(&mut self.carried));
        if pause.is_zero() {
            // No time lies between batches that an empty one could spare.
            self.ahead = 0;
        }
        self.batch_left = pages.saturating_sub(self.ahead);
        self.ahead = self.ahead.saturating_sub(pages);
    }

    /// So many pages are being looked at; if that is more than the batch has left, the next ones are shorter. Less than a window of a batch that had room for one is left to the next
    /// batch: a window looked at in two batches would merge in two runs, and split the huge page that it may be.
    pub(crate) fn spend(&mut self, pages: u32, pages_to_scan: u32) {
        self.ahead = self.ahead.saturating_add(pages.saturating_sub(self.batch_left));
        self.batch_left = self.batch_left.saturating_sub(pages);
        if self.batch_left < WINDOW && pages_to_scan >= WINDOW {
            self.carried = std::mem::take(&mut self.batch_left);
        }
    }

    /// Somebody else sets `pages_to_scan` now.
    pub(crate) fn start_afresh(&mut self) {
        (self.ahead, self.carried) = (0, 0);
    }

    pub(crate) fn is_requested(&self) -> bool {
        !self.requests.is_empty()
    }

    pub(crate) fn request(&mut self, now: Duration, merged: u64, scanned: u64) -> MergeTicket {
        self.last_ticket = self.last_ticket.wrapping_add(1);
        let ticket = MergeTicket(self.last_ticket);
        if self.requests.is_empty() {
            self.restart = true;
        }
        self.requests.push(Request {
            ticket,
            since: now,
            from_round: self.round + 1,
            merged,
            scanned,
        });
        ticket
    }

    /// A round is over; ends the requests that it satisfies. Without anything to scan all of them are.
    pub(crate) fn end_round(&mut self, now: Duration, merged: u64, scanned: u64, nothing_to_scan: bool) {
        let fruitless = merged == self.merged_at_round && !self.disturbed;
        let round = self.round;
        let over = &mut self.over;
        self.requests.retain(|request| {
            if !nothing_to_scan && (!fruitless || round < request.from_round) {
                return true;
            }
            let report = MergeReport {
                rounds: (round + 1).saturating_sub(request.from_round) as u32,
                merged: merged - request.merged,
                scanned: scanned - request.scanned,
                nanoseconds: now.saturating_sub(request.since).as_nanos() as u64,
            };
            over.push((request.ticket, report));
            false
        });
    }

    pub(crate) fn finished(&mut self, ticket: MergeTicket) -> Option<MergeReport> {
        let index = self.over.iter().position(|(over, _)| *over == ticket)?;
        Some(self.over.swap_remove(index).1)
    }

    /// Nobody waits for it any more.
    pub(crate) fn cancel(&mut self, ticket: MergeTicket) {
        self.requests.retain(|request| request.ticket != ticket);
        self.over.retain(|(over, _)| *over != ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_millis(20);

    #[test]
    fn a_request_ends_with_a_whole_round_without_merges() {
        let mut pace = Pace {
            round: 4,
            ..Pace::default()
        };
        let first = pace.request(Duration::ZERO, 100, 0);
        (pace.round, pace.merged_at_round) = (5, 100);
        let second = pace.request(Duration::ZERO, 110, 50);
        pace.end_round(Duration::from_secs(1), 130, 200, false);
        assert!(pace.is_requested());
        (pace.round, pace.merged_at_round) = (6, 130);
        pace.end_round(Duration::from_secs(2), 130, 300, false);
        assert!(!pace.is_requested());
        let report = MergeReport {
            rounds: 2,
            merged: 30,
            scanned: 300,
            nanoseconds: 2_000_000_000,
        };
        assert_eq!(pace.finished(first), Some(report));
        assert_eq!(pace.finished(first), None);
        assert_eq!(pace.finished(second).map(|report| report.rounds), Some(1));
    }

    #[test]
    fn what_is_left_of_a_batch_goes_to_the_next_where_a_window_would_be_cut() {
        let mut pace = Pace::default();
        pace.begin_batch(1024, PAUSE);
        pace.spend(511, 1024);
        assert_eq!(pace.batch_left, 513);
        pace.spend(512, 1024);
        assert_eq!(pace.batch_left, 0);
        pace.begin_batch(1024, PAUSE);
        assert_eq!(pace.batch_left, 1025);
        pace.spend(1025, 1024);
        pace.begin_batch(100, PAUSE);
        pace.spend(99, 100);
        assert_eq!(pace.batch_left, 1, "small batches cut windows anyway");
    }

    #[test]
    fn what_was_looked_at_in_advance_is_missing_in_the_next_batches() {
        let mut pace = Pace::default();
        let batches = [100; 7].map(|pages| {
            pace.begin_batch(pages, PAUSE);
            if pace.batch_left == 0 {
                return 0;
            }
            pace.spend(512, pages);
            512
        });
        assert_eq!(batches, [512, 0, 0, 0, 0, 512, 0]);
        pace.begin_batch(100, Duration::ZERO);
        assert_eq!(pace.batch_left, 100, "without pauses nothing is ahead of anything");
    }

    #[test]
    fn a_fruitless_round_begun_before_the_request_does_not_count() {
        let mut pace = Pace {
            round: 4,
            ..Pace::default()
        };
        let ticket = pace.request(Duration::ZERO, 0, 0);
        pace.end_round(Duration::ZERO, 0, 0, false);
        assert_eq!(pace.finished(ticket), None);
        pace.cancel(ticket);
        assert!(!pace.is_requested());
    }
}
