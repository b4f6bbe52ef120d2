//! The remapper's connection: how it is begun, what a broker that welcomes is sent, and what is left of it when it is over.
//!
//! Relies on nobody else connecting. A connection that is lost takes nothing along but its orders: the life page stays, as an anchor
//! of the frames that words still name, and whoever waited is told. Nothing here waits for the broker.

use super::{Remapper, Session, Stage};
use crate::client::link::Link;
use crate::client::scanner::Job;
use crate::client::{Error, start};
use crate::wire::ToBroker;
use ksmrs_sys::checksum::Checksummer;
use ksmrs_sys::store::StoreFile;
use ksmrs_sys::{StoreNumber, SysError};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl Remapper {
    /// Something asks for a broker.
    pub(super) fn want(&mut self) {
        self.wanted = true;
        if self.session.is_none() && (self.try_again.is_none() || !self.connecting.is_empty()) {
            self.try_again = None;
            self.connect();
        }
    }

    pub(super) fn connect(&mut self) {
        if !self.wanted || self.session.is_some() {
            return;
        }
        let number = self.current.fetch_add(1, Ordering::AcqRel) + 1;
        let hello = ToBroker::Hello {
            release: env!("CARGO_PKG_VERSION").to_owned(),
            domain: self.options.domain.clone(),
            pid: std::process::id(),
            stores: self
                .desk
                .stores_in_use(&self.objects)
                .into_iter()
                .map(|store| store.0)
                .collect(),
            born: self.birth.of.clone(),
        };
        let opened = Link::open(&self.options, number, &self.mailbox).and_then(|link| {
            link.send(&hello, None)?;
            Ok(link)
        });
        match opened {
            Ok(link) => {
                self.session = Some(Session::new(link, self.table));
            }
            Err(error) => {
                tracing::warn!(%error, "no broker");
                self.fail(error);
                self.retry();
            }
        }
    }

    /// Tells everyone who waits for a connection that there is none.
    pub(super) fn fail(&mut self, error: Error) {
        let text = error.to_string();
        let mut first = Some(error);
        let mut again = || first.take().unwrap_or_else(|| Error::Start(text.clone()));
        for reply in self.connecting.drain(..) {
            let _ = reply.send(Err(again()));
        }
        for (_, reply) in self.unasked.drain(..) {
            let _ = reply.send(Err(again()));
        }
    }

    pub(super) fn retry(&mut self) {
        if !self.wanted {
            return;
        }
        // The first time at once: a broker that died is replaced by whoever comes first.
        let pause = if self.failures == 0 {
            Duration::ZERO
        } else {
            start::pause_after(self.failures)
        };
        self.failures += 1;
        self.try_again = Some(Instant::now() + pause);
    }

    /// The connection is over: every order of it is dropped, its frames stay as long as words name them.
    pub(super) fn lost(&mut self, why: &str) {
        let Some(session) = self.session.take() else { return };
        self.mailbox.set_connected(false);
        self.current.fetch_add(1, Ordering::AcqRel);
        // Nobody scans: what is written until somebody does need not be known.
        self.mailbox.tracker.close();
        self.lineage = self.birth.of.clone();
        self.birth.lost();
        if let (Some((number, _)), Some(life)) = (&session.store, session.life) {
            self.anchors.push((*number, life));
        }
        self.objects.lost(&mut self.desk);
        for region in session.leaving.values() {
            self.free_slice(region);
        }
        for (_, reply) in session.questions {
            let _ = reply.send(Err(Error::Lost));
        }
        if session.stage != Stage::Ready {
            self.fail(Error::Start(why.to_owned()));
        }
    }

    pub(super) fn welcome(
        &mut self,
        key: &[u8; 16],
        store: StoreNumber,
        slots: u32,
        fd: Option<OwnedFd>,
    ) -> Result<(), Error> {
        let vetting = |reason: String| SysError::Vetting {
            what: "Welcome",
            reason,
        };
        let is_parents = self.birth.welcomed(store, key);
        let taken = store.0 == 0 || !is_parents && self.desk.stores_in_use(&self.objects).contains(&store);
        let Some(session) = self
            .session
            .as_mut()
            .filter(|session| session.stage == Stage::Hello && !taken)
        else {
            return Err(vetting(format!("store number {} is not free, or it came twice", store.0)).into());
        };
        let fd = fd.ok_or_else(|| vetting("it came without a store".to_owned()))?;
        session.store = Some((store, StoreFile::vet(fd, slots)?));
        session.stage = Stage::Welcomed;
        session.turn()?;
        let table = ToBroker::Table {
            pages: self.table.capacity(),
        };
        session.link.send(&table, Some(self.table_fd.as_fd()))?;
        session.link.send(&ToBroker::Staging, Some(self.staging_fd.as_fd()))?;
        let checksummer = Box::new(Checksummer::new(key));
        self.to_scanner(|link| Job::Domain(link, checksummer, store))
    }

    /// The handshake is through: every region joins, and who waited is served.
    pub(super) fn begin_work(&mut self) -> Result<(), Error> {
        let regions = self.desk.regions();
        let Some(session) = self.session.as_mut().filter(|session| session.stage == Stage::Welcomed) else {
            return Err(SysError::Vetting {
                what: "Ready",
                reason: "it came before its time".to_owned(),
            }
            .into());
        };
        session.stage = Stage::Ready;
        for region in &regions {
            session.join(region, self.birth.flags(region), None)?;
        }
        self.objects.rejoined(session.link.number);
        self.objects.hurry();
        self.objects.tend(&mut self.desk, Some(session))?;
        for (question, reply) in self.unasked.drain(..) {
            session.ask(question, reply)?;
        }
        for reply in self.connecting.drain(..) {
            let _ = reply.send(Ok(()));
        }
        self.failures = 0;
        self.mailbox.set_connected(true);
        self.let_parent_go();
        Ok(())
    }
}
