//! The remapper of a child that was born: when it begins to work, and how far the broker has counted what the child inherited.
//!
//! Relies on `ksmrs_sys::born` for the table and the regions. The thread exists from the fork on, for nobody else would start it, but
//! does nothing for a while unless it is asked to: most children exec or exit. Until the broker has counted every region the child
//! keeps its parent's life pages mapped, as anchors of the store that its words name; where it cannot count them all, for good.

use super::{ConnectOptions, Error, Mailbox, OwnedFd, Region, Remapper};
use crate::client::Bequest;
use crate::client::mailbox::Event;
use crate::client::orders;
use crate::wire::{BORN, Lineage};
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::{StoreNumber, life};
use std::collections::BTreeSet;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a child lives before it connects by itself.
const CHILDHOOD: Duration = Duration::from_secs(1);

/// What a child that was born still has of its parent's.
#[derive(Default)]
pub(super) struct Birth {
    /// The client that it was born of, until a Welcome came.
    pub(super) of: Option<Lineage>,
    /// The store that both have in their words, while regions are being counted there.
    store: Option<StoreNumber>,
    due: BTreeSet<u32>,
    uncounted: u32,
}

impl Birth {
    pub(super) fn of(lineage: Option<Lineage>) -> Birth {
        Birth {
            of: lineage,
            ..Birth::default()
        }
    }

    /// Whether a broker that says so is the parent's, with its store under its name.
    pub(super) fn welcomed(&mut self, store: StoreNumber, key: &[u8; 16]) -> bool {
        let of = self.of.take();
        let same = of.is_some_and(|of| of.store == store.0 && of.key == *key);
        self.store = same.then_some(store);
        same
    }

    /// The flags of the first Join of a region on this connection.
    pub(super) fn flags(&mut self, region: &Region) -> u32 {
        // No shared region comes by a fork.
        if self.store.is_none() || region.kind() != ksmrs_sys::protocol::Kind::Private {
            return 0;
        }
        self.due.insert(orders::number(region));
        BORN
    }

    /// The connection is over; what was not counted never will be.
    pub(super) fn lost(&mut self) {
        self.store = None;
        self.due.clear();
    }
}

impl Remapper {
    /// The broker answered the Join of a region; `None`: it refused it.
    pub(super) fn counted(&mut self, region: u32, uncounted: Option<u32>) {
        if self.birth.due.remove(&region) {
            self.birth.uncounted += uncounted.unwrap_or(u32::MAX).min(1);
        }
        self.let_parent_go();
    }

    /// Lets the parent's life pages go once everything is counted, or leaves them be.
    pub(super) fn let_parent_go(&mut self) {
        if !self.birth.due.is_empty() {
            return;
        }
        let Some(store) = self.birth.store.take() else { return };
        let inherited = self.anchors.extract_if(.., |(number, _)| *number == store);
        if self.birth.uncounted == 0 {
            // Unmapped here: from now on the parent's epochs are no matter of ours.
            drop(inherited.collect::<Vec<_>>());
        } else {
            tracing::info!("this child shows more than the broker could count; its parent keeps that");
            inherited.for_each(|(_, page)| page.keep());
        }
    }
}

/// Starts the thread of a child that is being born. It waits to be told that it was; dropping the sender ends it.
pub(in crate::client) fn begin(
    options: ConnectOptions,
    bequest: &'static Mutex<Bequest>,
    table: &'static ClientTable,
    regions: Vec<Arc<Region>>,
) -> std::io::Result<(Arc<Mailbox>, Sender<()>)> {
    let mailbox = Arc::new(Mailbox::new());
    let (born, wait) = channel();
    let theirs = mailbox.clone();
    super::spawn(move || {
        if wait.recv().is_ok() {
            theirs.linger(Instant::now() + CHILDHOOD);
            grow_up(options, bequest, &theirs, table, &regions);
        }
    })?;
    Ok((mailbox, born))
}

fn grow_up(
    options: ConnectOptions,
    bequest: &'static Mutex<Bequest>,
    mailbox: &Arc<Mailbox>,
    table: &'static ClientTable,
    regions: &[Arc<Region>],
) {
    let inherited = crate::client::lock(bequest).clone();
    let made = ksmrs_sys::descriptors::unshare_table()
        .map_err(Error::from)
        .and_then(|()| Ok((table, table.share()?)))
        .and_then(|table: (_, OwnedFd)| Remapper::with(options, mailbox.clone(), bequest, table));
    match made {
        Ok(mut remapper) => {
            remapper.birth = Birth::of(inherited.lineage.clone());
            remapper.lineage = inherited.lineage;
            remapper.anchors = life::inherited();
            regions.iter().for_each(|region| remapper.desk.add(region.clone()));
            if inherited.wanted {
                remapper.want();
            }
            remapper.run();
        }
        Err(error) => refuse(mailbox, &error),
    }
}

/// Merging is off in this child; whoever asks is told. What it inherited stays as it is, kept by its parent's life pages.
fn refuse(mailbox: &Mailbox, why: &Error) {
    tracing::warn!(%why, "a forked child stays without merging");
    let off = || Error::Off(why.to_string());
    while let Some(event) = mailbox.take(None) {
        match event {
            // Whoever asked may have given up since.
            Event::Connect(reply) => drop(reply.send(Err(off()))),
            Event::Ask(_, reply) => drop(reply.send(Err(off()))),
            Event::Disconnect(done) => drop(done.send(())),
            _ => {}
        }
    }
}
