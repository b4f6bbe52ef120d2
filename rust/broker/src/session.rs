//! One connected client, as the broker knows it: how far its handshake is, its table and staging, its regions, and what
//! waits to be sent to it.
//!
//! Everything that a client hands over is vetted here, before `domain.rs` sees it. Sending never blocks; a client that does
//! not read is dropped once too much waits for it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ksmrs_core::{ClientId, Epoch};
use ksmrs_sys::StoreNumber;
use ksmrs_sys::page_table::TableView;
use ksmrs_sys::peer::{Credentials, Wait};
use ksmrs_sys::staging::StagingView;

use crate::cpu::Claims;
use crate::lives::Lives;
use crate::offence::Offence;
use crate::process::Process;
use crate::wire::{self, BrokerEnd, ReceiveBuffer, ToBroker, ToClient, WireError};

/// Datagrams that may wait for a client; each is at most 64 KiB, most are a few bytes.
const MAX_WAITING: usize = 256;
/// Regions of one client.
pub(crate) const MAX_REGIONS: usize = 1 << 20;

/// How far a client is. The order of the variants is the order of the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Nothing was said.
    Silent,
    /// Hello and Welcome.
    Welcome,
    /// The table is here.
    Table,
    /// Staging is here too: it may join regions.
    Ready,
}

impl Phase {
    fn tell(self) -> &'static str {
        match self {
            Phase::Silent => "before Hello",
            Phase::Welcome => "after Welcome and before Table",
            Phase::Table => "after Table and before Staging",
            Phase::Ready => "after Ready",
        }
    }
}

/// A region, as its client describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat {
    pub(crate) region: ksmrs_core::RegionId,
    pub(crate) first_word: u32,
    pub(crate) pages: u32,
    pub(crate) first_page: ksmrs_core::PageNumber,
}

/// A connected client.
pub(crate) struct Session {
    pub(crate) id: ClientId,
    pub(crate) connection: BrokerEnd,
    pub(crate) credentials: Credentials,
    /// The number that its process goes by where it runs; in another namespace the kernel has none for the broker.
    pub(crate) says: u32,
    /// Tells of its process's end; absent where the kernel does not know the process by that number.
    pub(crate) process: Option<Process>,
    pub(crate) phase: Phase,
    pub(crate) domain: Option<String>,
    /// What this client's words call the domain's store.
    pub(crate) store: StoreNumber,
    /// A forked child, whose words may name frames of that store from the start.
    pub(crate) is_born: bool,
    pub(crate) lives: Lives,
    pub(crate) table: Option<TableView>,
    pub(crate) staging: Option<StagingView>,
    pub(crate) claims: Claims,
    /// By the client's own numbers.
    pub(crate) regions: BTreeMap<u32, Seat>,
    /// Slices of the table in use: first word -> the region and its pages.
    slices: BTreeMap<u32, (u32, u32)>,
    waiting: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    /// Regions to be recalled, by the client's own numbers: as many as somebody else makes them by opening an object.
    recalls: BTreeSet<u32>,
    overflowed: bool,
}

impl Session {
    pub(crate) fn new(id: ClientId, connection: BrokerEnd) -> Result<Session, Offence> {
        let credentials = connection.credentials()?;
        let ours = rustix::process::geteuid().as_raw();
        if credentials.uid != ours {
            return Err(Offence::Stranger {
                theirs: credentials.uid,
                ours,
            });
        }
        let process = Process::of(credentials.pid);
        Ok(Session {
            id,
            connection,
            credentials,
            says: 0,
            process,
            phase: Phase::Silent,
            domain: None,
            store: StoreNumber(0),
            is_born: false,
            lives: Lives::default(),
            table: None,
            staging: None,
            claims: Claims::default(),
            regions: BTreeMap::new(),
            slices: BTreeMap::new(),
            waiting: VecDeque::new(),
            recalls: BTreeSet::new(),
            overflowed: false,
        })
    }

    /// What tells its process from others that live, as far as numbers do; of a liar only among its own connections.
    pub(crate) fn process_key(&self) -> (u32, u32) {
        (self.credentials.pid, self.says)
    }

    /// The handshake's order: this message belongs to this phase.
    pub(crate) fn expect(&self, message: &'static str, phase: Phase) -> Result<(), Offence> {
        if self.phase == phase {
            Ok(())
        } else {
            Err(Offence::OutOfOrder {
                message,
                phase: self.phase.tell(),
            })
        }
    }

    /// The same for what may come at any time from a phase on.
    pub(crate) fn expect_from(&self, message: &'static str, phase: Phase) -> Result<(), Offence> {
        if self.phase >= phase {
            Ok(())
        } else {
            Err(Offence::OutOfOrder {
                message,
                phase: self.phase.tell(),
            })
        }
    }

    pub(crate) fn take_life(&mut self, epoch: u32, fd: OwnedFd, now: Duration) -> Result<(), Offence> {
        self.expect_from("Life", Phase::Welcome)?;
        self.lives.turn(epoch, fd, now)
    }

    /// Takes the life pages that were on their way when the connection was shut down: a client lets an old page go once the new one
    /// is sent, so without them it would look dead. What it tries to send from now on fails, and its page stays.
    pub(crate) fn take_last_lives(&mut self, buffer: &mut ReceiveBuffer, now: Duration, embedded: bool) {
        while self.connection.has_room_for_descriptor() {
            match self.connection.receive(buffer, Wait::No) {
                // One that breaks the rules here, too, hurts only itself.
                Ok((ToBroker::Life { epoch }, Some(fd))) => drop(self.take_life(epoch, fd, now)),
                Ok(_) => {}
                Err(error) if error.is_would_block() || error.is_closed() => return,
                Err(_) => self.not_received(embedded),
            }
        }
        self.lives.may_miss_one();
    }

    /// A message came that is none, or not whole.
    pub(crate) fn not_received(&mut self, embedded: bool) {
        if embedded {
            // The program's other threads may have taken the last descriptor just now.
            self.lives.may_miss_one();
        }
    }

    pub(crate) fn take_table(&mut self, pages: u32, fd: &OwnedFd) -> Result<(), Offence> {
        self.expect("Table", Phase::Welcome)?;
        if self.lives.current().is_none() {
            return Err(Offence::OutOfOrder {
                message: "Table",
                phase: "before Life",
            });
        }
        self.table = Some(TableView::open(fd, pages)?);
        self.phase = Phase::Table;
        Ok(())
    }

    pub(crate) fn take_staging(&mut self, fd: &OwnedFd) -> Result<(), Offence> {
        self.expect("Staging", Phase::Table)?;
        self.staging = Some(StagingView::open(fd)?);
        self.phase = Phase::Ready;
        self.send(&ToClient::Ready, None)
    }

    /// The epoch in which the client gave up what its words, read before this, no longer show. Messages may lag behind the
    /// words, so the table's own epoch counts too: a child that shows a frame was forked before its parent's word changed, and
    /// keeps a life page of this epoch or an earlier one.
    pub(crate) fn epoch(&self) -> Epoch {
        let received = self.lives.current().unwrap_or(0);
        Epoch(received.max(self.table.as_ref().map_or(0, TableView::epoch)))
    }

    /// What its pages are lent by: its words, its domain, and what they call the store.
    pub(crate) fn lender(&self) -> Option<(&TableView, &str, StoreNumber)> {
        Some((self.table.as_ref()?, self.domain.as_deref()?, self.store))
    }

    /// Whether a slice lies in the table and overlaps no other region; the reason otherwise.
    pub(crate) fn check_slice(&self, region: u32, first_word: u32, pages: u32) -> Result<(), String> {
        let capacity = self.table.as_ref().map_or(0, TableView::capacity);
        let Some(end) = first_word.checked_add(pages).filter(|&end| end <= capacity) else {
            return Err(format!(
                "words {first_word}+{pages} are outside the table of {capacity}"
            ));
        };
        if pages == 0 {
            return Err("it has no whole page".to_owned());
        }
        if self.regions.contains_key(&region) {
            return Err(format!("region {region} has joined already"));
        }
        if self.regions.len() >= MAX_REGIONS {
            return Err(format!("the client has {MAX_REGIONS} regions already"));
        }
        if let Some((&other, &(_, length))) = self.slices.range(..end).next_back()
            && other + length > first_word
        {
            return Err(format!(
                "words {first_word}+{pages} overlap the region at {other}+{length}"
            ));
        }
        Ok(())
    }

    /// Notes a region that core took.
    pub(crate) fn seat(&mut self, region: u32, seat: Seat) {
        self.slices.insert(seat.first_word, (region, seat.pages));
        self.regions.insert(region, seat);
    }

    /// Forgets a region.
    pub(crate) fn unseat(&mut self, region: u32) -> Option<Seat> {
        self.recalls.remove(&region);
        let seat = self.regions.remove(&region)?;
        self.slices.remove(&seat.first_word);
        Some(seat)
    }

    /// The region that a word belongs to.
    pub(crate) fn seat_at(&self, word: u32) -> Option<Seat> {
        let (_, &(region, pages)) = self.slices.range(..=word).next_back()?;
        self.regions
            .get(&region)
            .filter(|seat| word < seat.first_word + pages)
            .copied()
    }

    /// Queues a message; `flush` sends it.
    pub(crate) fn send(&mut self, message: &ToClient, fd: Option<OwnedFd>) -> Result<(), Offence> {
        let datagram = wire::encode(message)?;
        if self.waiting.len() >= MAX_WAITING {
            self.overflowed = true;
            return Err(Offence::TooMany {
                what: "messages waiting to be read",
                limit: MAX_WAITING,
            });
        }
        self.waiting.push_back((datagram, fd));
        Ok(())
    }

    /// Asks for a fresh life page; not where too much waits already, for it is asked for again.
    pub(crate) fn ask_turn(&mut self) {
        if self.waiting.len() < MAX_WAITING
            && let Err(offence) = self.send(&ToClient::Turn, None)
        {
            tracing::debug!(client = self.id.0, %offence, "not asked for a life page");
        }
    }

    /// Somebody waits to open a region's object: the client is told when nothing else waits for it.
    pub(crate) fn recall(&mut self, region: u32) {
        self.recalls.insert(region);
    }

    /// Sends what can be sent without waiting.
    pub(crate) fn flush(&mut self) -> Result<(), Offence> {
        if self.overflowed {
            return Err(Offence::TooMany {
                what: "messages waiting to be read",
                limit: MAX_WAITING,
            });
        }
        loop {
            if self.waiting.is_empty()
                && let Some(region) = self.recalls.pop_first()
            {
                self.send(&ToClient::Recall { region }, None)?;
            }
            let Some((datagram, fd)) = self.waiting.front() else {
                return Ok(());
            };
            match self
                .connection
                .send_encoded(datagram, fd.as_ref().map(AsFd::as_fd), Wait::No)
            {
                Ok(()) => drop(self.waiting.pop_front()),
                Err(error) if error.is_would_block() => return Ok(()),
                // The end of the stream is found by reading: there may be answers before it.
                Err(error) if error.is_closed() => {
                    self.waiting.clear();
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether something waits for the client to read.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Says why the connection ends, if the client can still hear it, and ends it.
    pub(crate) fn dismiss(&self, reason: &str) {
        let mut reason = reason.to_owned();
        let end = (0..=reason.len().min(wire::MAX_TEXT))
            .rev()
            .find(|&end| reason.is_char_boundary(end))
            .unwrap_or(0);
        reason.truncate(end);
        let farewell: Result<(), WireError> = self.connection.send(&ToClient::Bye { reason }, None, Wait::No);
        if let Err(error) = farewell {
            tracing::debug!(client = self.id.0, %error, "no farewell");
        }
        self.connection.shut_down();
    }
}
