//! The life pages of one client, in epochs, and when to ask the kernel about them again.
//!
//! Relies on `ksmrs_sys::life` for the one question that matters. While the client is connected its latest page is not asked
//! about: it would be busy, and asking again after it took the seal would end an epoch that goes on.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use ksmrs_sys::life::{self, Seal};

use crate::offence::Offence;

/// Life pages of one client that somebody still maps; forked children keep them. Each is a descriptor of the broker's.
const MAX_PAGES: usize = 1024;
/// The client unmaps the old page right after it sent the new one; a child may keep it for days.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(256);
/// A client turns its life page by itself after a report that gives something up; what belongs to the page that it turned to is asked for
/// after this long, then after ever longer pauses, for there may have been no memory for a page.
const TURN_PAUSE: Duration = Duration::from_millis(50);
const TURN_PAUSE_GROWTH: u32 = 4;

/// Life pages that have not taken the seal, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Lives {
    pages: VecDeque<(u32, OwnedFd)>,
    latest: Option<u32>,
    /// The lowest epoch whose page may have been sent and never arrived: somebody may map it.
    missing: Option<u32>,
    pause: Duration,
    next: Option<Duration>,
    owed: Option<Owed>,
}

/// What was given up in the epoch of the latest page waits for the next one.
#[derive(Debug)]
struct Owed {
    epoch: u32,
    /// When to ask for it.
    at: Duration,
    /// How long after the time before.
    pause: Duration,
}

impl Lives {
    /// Vets and keeps the life page of a new epoch.
    pub(crate) fn turn(&mut self, epoch: u32, fd: OwnedFd, now: Duration) -> Result<(), Offence> {
        if let Some(current) = self.latest.filter(|&current| epoch <= current) {
            return Err(Offence::Epoch { epoch, current });
        }
        life::vet(&fd)?;
        let too_many = self.pages.len() >= MAX_PAGES;
        // One too many is kept all the same: it may be the only one that the client itself has mapped.
        self.pages.push_back((epoch, fd));
        self.latest = Some(epoch);
        self.hurry(now);
        if too_many {
            return Err(Offence::TooMany {
                what: "life pages in use",
                limit: MAX_PAGES,
            });
        }
        Ok(())
    }

    /// The epoch that what is given up now belongs to; `None` before the first life page.
    pub(crate) fn current(&self) -> Option<u32> {
        self.latest
    }

    /// Asks soon, because something changed.
    pub(crate) fn hurry(&mut self, now: Duration) {
        self.pause = FIRST_PAUSE;
        self.next = Some(now);
    }

    /// When to ask again; `None` when there is nothing to ask.
    pub(crate) fn next_poll(&self, connected: bool) -> Option<Duration> {
        if self.pages.len() > usize::from(connected) {
            self.next
        } else {
            None
        }
    }

    /// Asks about every page whose time has come. Returns the highest epoch up to which all have taken the seal, if that may
    /// have changed.
    pub(crate) fn poll(&mut self, connected: bool, now: Duration) -> Option<u32> {
        if self.next_poll(connected).is_none_or(|next| now < next) {
            return None;
        }
        let latest = self.latest.filter(|_| connected);
        let before = self.pages.len();
        self.pages.retain(|(epoch, fd)| {
            if Some(*epoch) == latest {
                return true;
            }
            match life::try_seal(fd) {
                Seal::Taken => false,
                Seal::Busy => true,
                Seal::Hostile(errno) => {
                    tracing::debug!(
                        epoch,
                        errno,
                        "a life page answers neither yes nor no; what it stands for is kept"
                    );
                    true
                }
            }
        });
        self.next = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if self.pages.len() == before {
            return None;
        }
        let oldest = self.pages.front().map(|&(epoch, _)| epoch);
        match oldest.into_iter().chain(self.missing).min() {
            Some(epoch) => epoch.checked_sub(1),
            None => self.latest,
        }
    }

    /// Whether to ask a connected client for a fresh page now; it gave something up as late as in the epoch `given_up`.
    pub(crate) fn is_turn_due(&mut self, given_up: Option<u32>, now: Duration) -> bool {
        let Some(epoch) = self.latest.filter(|&latest| given_up >= Some(latest)) else {
            self.owed = None;
            return false;
        };
        let mut owed = self.owed.take().filter(|owed| owed.epoch == epoch).unwrap_or(Owed {
            epoch,
            at: now + TURN_PAUSE,
            pause: TURN_PAUSE,
        });
        let due = owed.at <= now;
        if due {
            owed.pause *= TURN_PAUSE_GROWTH;
            owed.at = now + owed.pause;
        }
        self.owed = Some(owed);
        due
    }

    /// When that is to be looked at again.
    pub(crate) fn next_turn(&self) -> Option<Duration> {
        self.owed.as_ref().map(|owed| owed.at)
    }

    /// A message was lost that may have brought one: what was given up in its epoch, or in a later one, is kept for good.
    pub(crate) fn may_miss_one(&mut self) {
        let next = self.latest.map_or(0, |latest| latest.saturating_add(1));
        self.missing.get_or_insert(next);
    }

    /// Whether no address space shows anything of this client any more.
    pub(crate) fn are_over(&self) -> bool {
        self.pages.is_empty() && self.missing.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ksmrs_sys::life::LifePage;

    const LATER: Duration = Duration::from_secs(9);

    #[test]
    fn an_epoch_ends_when_all_pages_up_to_it_took_the_seal() {
        let mut lives = Lives::default();
        let mut pages: Vec<Option<LifePage>> = Vec::new();
        for epoch in 1..=4 {
            let (page, fd) = LifePage::new().unwrap();
            lives.turn(epoch, fd, Duration::ZERO).unwrap();
            pages.push(Some(page));
        }
        assert_eq!(lives.poll(true, LATER), None);
        pages[1] = None;
        assert_eq!(lives.poll(true, 2 * LATER), Some(0), "epoch 1 is still shown");
        pages[0] = None;
        assert_eq!(lives.poll(true, 3 * LATER), Some(2));
        pages[2] = None;
        pages[3] = None;
        assert_eq!(lives.poll(true, 4 * LATER), Some(3));
        assert!(!lives.are_over() && lives.next_poll(true).is_none());
        assert_eq!(lives.poll(false, 5 * LATER), Some(4));
        assert!(lives.are_over());
    }

    #[test]
    fn a_page_that_is_missing_keeps_its_epoch_and_later_ones() {
        let mut lives = Lives::default();
        let (one, fd) = LifePage::new().unwrap();
        lives.turn(1, fd, Duration::ZERO).unwrap();
        // That of epoch 2 was lost; a child may map it alone.
        lives.may_miss_one();
        let (three, fd) = LifePage::new().unwrap();
        lives.turn(3, fd, Duration::ZERO).unwrap();
        lives.may_miss_one();
        drop(one);
        assert_eq!(lives.poll(false, LATER), Some(1));
        drop(three);
        assert_eq!(lives.poll(false, 2 * LATER), Some(1));
        assert!(!lives.are_over());
    }

    #[test]
    fn a_turn_is_asked_for_while_something_waits_for_it() {
        let mut lives = Lives::default();
        let at = Duration::from_millis;
        assert!(!lives.is_turn_due(Some(7), at(0)), "no page at all");
        let (_one, fd) = LifePage::new().unwrap();
        lives.turn(7, fd, at(0)).unwrap();
        assert!(
            !lives.is_turn_due(Some(6), at(10)),
            "what is older waits for older pages"
        );
        assert_eq!(lives.next_turn(), None);
        assert!(!lives.is_turn_due(Some(7), at(20)), "it may be on its way");
        assert_eq!(lives.next_turn(), Some(at(70)));
        assert!(lives.is_turn_due(Some(8), at(70)));
        assert!(!lives.is_turn_due(Some(8), at(269)), "it was asked");
        assert!(lives.is_turn_due(Some(8), at(270)), "it has not answered");
        let (_two, fd) = LifePage::new().unwrap();
        lives.turn(8, fd, at(280)).unwrap();
        assert!(!lives.is_turn_due(Some(8), at(280)), "that is another epoch");
        assert_eq!(lives.next_turn(), Some(at(330)));
        assert!(!lives.is_turn_due(None, at(330)), "nothing waits any more");
        assert_eq!(lives.next_turn(), None);
    }

    #[test]
    fn epochs_only_rise() {
        let mut lives = Lives::default();
        let (_one, fd) = LifePage::new().unwrap();
        lives.turn(7, fd, Duration::ZERO).unwrap();
        let (_two, fd) = LifePage::new().unwrap();
        assert!(matches!(
            lives.turn(7, fd, Duration::ZERO),
            Err(Offence::Epoch { epoch: 7, current: 7 })
        ));
    }
}
