//! Clients whose socket is closed, until they are gone: nothing shows their frames, and their objects hold all their bytes.
//!
//! A client departs when its socket closes, is *dead* when its process exited or no address space maps a life page of it, and
//! *gone* when the latter is so. What a dead client left out of its objects is written back before a frame of it is freed.

use std::time::Duration;

use ksmrs_core::{ClientId, Epoch};
use ksmrs_sys::StoreNumber;
use ksmrs_sys::page_table::TableView;

use crate::domain::Domain;
use crate::lives::Lives;
use crate::objects::Objects;
use crate::process::Process;
use crate::session::Session;

/// How often it is looked whether a process that has objects is dead.
const DEATH_WATCH: Duration = Duration::from_millis(20);
/// Pages that could not be written back are tried again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// A client whose socket is closed, but whose frames may still be shown.
pub(crate) struct Departed {
    pub(crate) id: ClientId,
    pub(crate) domain: String,
    /// As [`Session::process_key`].
    pub(crate) process_key: (u32, u32),
    lives: Lives,
    table: Option<TableView>,
    pub(crate) store: StoreNumber,
    process: Option<Process>,
    /// When to look after its objects.
    next: Duration,
}

/// What a look at a departed client found.
pub(crate) enum Found {
    /// It is gone: its frames are free.
    Gone,
    /// Some of them may be.
    Released,
    /// Nothing new.
    Waiting,
}

impl Departed {
    /// What is left of a session.
    pub(crate) fn new(session: Session, domain: String, now: Duration) -> Departed {
        let process_key = session.process_key();
        let mut lives = session.lives;
        lives.hurry(now);
        Departed {
            id: session.id,
            domain,
            process_key,
            lives,
            table: session.table,
            store: session.store,
            process: session.process,
            next: now,
        }
    }

    /// Whether it was an earlier connection of this one's address space, which takes its pages home itself.
    pub(crate) fn was(&self, session: &Session) -> bool {
        let tables = self.table.as_ref().zip(session.table.as_ref());
        tables.is_some_and(|(theirs, its)| theirs.is_same(its))
    }

    /// As [`Session::lender`], for a process that stood still before it took its pages home. Words that went on are not touched: a
    /// later epoch than was told of is a later connection's, maybe to another broker, and another region may have the words by now. Nor
    /// are those of a process that this one's end is hidden from, in another namespace: it takes lent words for left behind.
    pub(crate) fn lender(&self) -> Option<(&TableView, &str, StoreNumber)> {
        let stood_still = |table: &&TableView| Some(table.epoch()) <= self.lives.current();
        let (pid, says) = self.process_key;
        let table = self.table.as_ref().filter(stood_still)?;
        (pid == says).then_some((table, self.domain.as_str(), self.store))
    }

    /// Asks about its life pages, and looks after its objects.
    pub(crate) fn look(&mut self, now: Duration, domain: &mut Domain, objects: &mut Objects) -> Found {
        let sealed = self.lives.poll(false, now);
        let whole = !objects.are_of(self.id.0) || self.write_back(now, domain, objects);
        let over = self.lives.are_over();
        match sealed {
            _ if whole && over => {
                tracing::info!(client = self.id.0, "gone; nothing shows its frames");
                domain.core.client_gone(self.id);
                Found::Gone
            }
            // The last epochs end with the client.
            Some(epoch) if !over => {
                domain.core.sealed(self.id, Epoch(epoch));
                Found::Released
            }
            _ => Found::Waiting,
        }
    }

    /// Writes its objects' pages back if it is dead; whether it has no objects any more.
    fn write_back(&mut self, now: Duration, domain: &mut Domain, objects: &mut Objects) -> bool {
        if now < self.next {
            return false;
        }
        self.next = now + DEATH_WATCH;
        // An exec only life pages tell of.
        let exited = self.process.as_ref().is_some_and(Process::has_exited);
        if !exited && !self.lives.are_over() {
            return false;
        }
        let table = self.table.as_ref();
        let word = |index| table.and_then(|table| table.word(index));
        let written = objects.write_back(self.id.0, &word, self.store, &mut domain.store);
        if let Err(error) = &written {
            tracing::warn!(client = self.id.0, %error, "pages are not back in their object; it is tried again");
            self.next = now + AGAIN;
        }
        written.is_ok()
    }

    /// When to look again; `None` when there is nothing to look for.
    pub(crate) fn next_look(&self, objects: &Objects) -> Option<Duration> {
        let owed = objects.are_of(self.id.0).then_some(self.next);
        [self.lives.next_poll(false), owed].into_iter().flatten().min()
    }
}
