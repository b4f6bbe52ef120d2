//! One connection at work: how far its handshake is, its life page and epochs, and what waits for an answer.
//!
//! The remapper owns it and is the only one to send; nothing here waits for the broker.

use super::link::Link;
use super::region::kind_of;
use super::{Error, orders};
use crate::wire::{self, Answer, ToBroker};
use ksmrs_sys::life::LifePage;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::region::Region;
use ksmrs_sys::store::StoreFile;
use ksmrs_sys::{PAGE_SIZE, StoreNumber};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// How far the handshake is.
#[derive(PartialEq, Eq)]
pub(super) enum Stage {
    Hello,
    Welcomed,
    Ready,
}

/// A connection at work.
pub(super) struct Session {
    pub(super) link: Link,
    pub(super) table: &'static ClientTable,
    pub(super) stage: Stage,
    pub(super) store: Option<(StoreNumber, StoreFile)>,
    pub(super) life: Option<LifePage>,
    pub(super) epoch: u32,
    pub(super) questions: BTreeMap<u32, Sender<Result<Answer, Error>>>,
    pub(super) next_question: u32,
    /// Closed regions that the broker has not let go yet.
    pub(super) leaving: BTreeMap<u32, Arc<Region>>,
    /// Regions that it did not take.
    pub(super) refused: BTreeSet<u32>,
    /// What handlers and unmerges had given up when the life page was last turned.
    pub(super) given_up: u64,
}

impl Session {
    /// A connection that said hello.
    pub(super) fn new(link: Link, table: &'static ClientTable) -> Session {
        Session {
            link,
            table,
            stage: Stage::Hello,
            store: None,
            life: None,
            epoch: table.epoch(),
            questions: BTreeMap::new(),
            next_question: 0,
            leaving: BTreeMap::new(),
            refused: BTreeSet::new(),
            given_up: 0,
        }
    }

    /// Asks for a region to take part; `object` is what it is made of and a descriptor to lease that by.
    pub(super) fn join(
        &self,
        region: &Arc<Region>,
        flags: u32,
        object: Option<(wire::Object, BorrowedFd<'_>)>,
    ) -> Result<(), Error> {
        let position = (region.address() / PAGE_SIZE % ksmrs_sys::EXTENT_PAGES as usize) as u16;
        let join = ToBroker::Join {
            region: orders::number(region),
            kind: kind_of(region),
            first_word: region.first_word(),
            pages: region.pages(),
            position,
            flags,
            object: object.map(|(object, _)| object),
        };
        self.link.send(&join, object.map(|(_, fd)| fd))
    }

    /// Says that nothing of a region merges any more, and that what it showed is given up.
    pub(super) fn leave(&mut self, region: u32) -> Result<(), Error> {
        self.link.send(&ToBroker::Leave { region }, None)?;
        self.turn()
    }

    pub(super) fn ask(&mut self, question: wire::Question, reply: Sender<Result<Answer, Error>>) -> Result<(), Error> {
        self.next_question = self.next_question.wrapping_add(1);
        let id = self.next_question;
        self.questions.insert(id, reply);
        self.link.send(&ToBroker::Ask { id, question }, None)
    }

    /// Begins an epoch. A fresh life page is mapped, then the table says so, and only then is the old page let go: at each moment
    /// a child would inherit the life page of the epoch that the table says, or of the one before. Where the kernel has no
    /// page to give, the epoch goes on, and what was given up waits with it.
    pub(super) fn turn(&mut self) -> Result<(), Error> {
        let store = self.store.as_ref().map_or(StoreNumber(0), |(number, _)| *number);
        let (life, fd) = match LifePage::for_store(store) {
            Ok(fresh) => fresh,
            Err(error) if self.life.is_none() => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, epoch = self.epoch, "no life page for the next epoch");
                return Ok(());
            }
        };
        self.epoch += 1;
        self.table.set_epoch(self.epoch);
        self.link
            .send(&ToBroker::Life { epoch: self.epoch }, Some(fd.as_fd()))?;
        self.life = Some(life);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{BrokerEnd, ClientEnd, ReceiveBuffer};
    use ksmrs_sys::life::{Seal, try_seal};
    use ksmrs_sys::peer::{Peer, Wait};
    use std::os::fd::OwnedFd;

    /// In its first epoch; the broker's end, and the life page.
    fn begun() -> (Session, BrokerEnd, OwnedFd) {
        let (one, two) = Peer::pair().unwrap();
        let broker = BrokerEnd::over(two);
        let table = Box::leak(Box::new(ClientTable::create(1).unwrap().0));
        let mut session = Session::new(Link::over(ClientEnd::over(one)), table);
        session.turn().unwrap();
        let (message, life) = broker.receive(&mut ReceiveBuffer::new(), Wait::No).unwrap();
        assert_eq!((message, table.epoch()), (ToBroker::Life { epoch: 1 }, 1));
        (session, broker, life.unwrap())
    }

    /// Each step of a turn fails in its turn; what comes after it was not done. (One after another: life pages are listed by process.)
    #[test]
    fn a_turn_maps_a_page_then_tells_then_sends_and_then_lets_the_old_page_go() {
        let (mut session, broker, old) = begun();
        let mut others = Vec::new();
        while let Ok(other) = LifePage::for_store(StoreNumber(1)) {
            others.push(other);
        }
        session.turn().unwrap();
        assert_eq!(
            (session.epoch, session.table.epoch()),
            (1, 1),
            "there is no page for another"
        );
        assert!(
            broker
                .receive(&mut ReceiveBuffer::new(), Wait::No)
                .unwrap_err()
                .is_would_block()
        );
        assert_eq!(try_seal(&old), Seal::Busy, "the epoch goes on");
        drop(others);
        drop(broker);
        session.turn().unwrap_err();
        assert_eq!(session.table.epoch(), 2, "whoever hears of it finds it in the table");
        assert_eq!(try_seal(&old), Seal::Busy, "nobody heard of the new one");
        let (mut session, broker, old) = begun();
        session.turn().unwrap();
        assert_eq!(try_seal(&old), Seal::Taken);
        let (_, fresh) = broker.receive(&mut ReceiveBuffer::new(), Wait::No).unwrap();
        assert_eq!(try_seal(fresh.unwrap()), Seal::Busy);
    }
}
