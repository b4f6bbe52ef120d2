//! One domain: its core, its frame store, its key, and the orders on their way between core and clients.
//!
//! Core speaks of pages and slots of the domain, clients speak of words of their tables; here one becomes the other. It relies
//! on core for every choice and on the sessions for every vetted thing, and reads no client's memory: of a table it loads
//! words, from staging the kernel copies.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use ksmrs_core::{ClientId, Core, Decision, Next, OrderId, PageNumber, PageRange, RegionId};
use ksmrs_sys::SysError;
use ksmrs_sys::checksum::{Checksummer, KEY_BYTES};
use ksmrs_sys::failpoint::{self, Failpoint};
use ksmrs_sys::store::Store;

use crate::offence::Offence;
use crate::questions::PendingMerge;
use crate::session::{Seat, Session};
use crate::sweep::Sweep;
use crate::wire::{self, ToClient};

/// Decisions carried out before the sockets are looked at again.
const DECISIONS_PER_TURN: usize = 512;

/// Consecutive words of one region that an order is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// `None` when the region had left before the order was translated.
    pub(crate) region: Option<RegionId>,
    pub(crate) first_word: u32,
    pub(crate) pages: u32,
    /// For a Map: the slot that the first page is to show.
    pub(crate) slot: u32,
}

/// What an open order asked for.
#[derive(Debug)]
pub(crate) enum Task {
    Scan { pass: u16, parts: Vec<Part> },
    Stage { pages: usize },
    Map { parts: Vec<Part> },
    Unmap { parts: Vec<Part> },
}

/// A domain.
pub(crate) struct Domain {
    pub(crate) name: String,
    pub(crate) core: Core,
    pub(crate) store: Store,
    pub(crate) key: [u8; KEY_BYTES],
    pub(crate) checksummer: Checksummer,
    pub(crate) merges: Vec<PendingMerge>,
    pub(crate) sweep: Sweep,
    /// Why an extent last did not become a huge page.
    pub(crate) huge_declined: Option<SysError>,
    orders: HashMap<OrderId, (ClientId, Task)>,
    /// Regions by their first page number.
    regions: BTreeMap<PageNumber, Seat>,
}

impl Domain {
    pub(crate) fn new(name: &str, slots: Option<u32>) -> Result<Domain, SysError> {
        let store = match slots {
            Some(slots) => Store::with_slots(slots)?,
            None => Store::create()?,
        };
        let key = ksmrs_sys::checksum::random_key()?;
        let checksummer = Checksummer::new(&key);
        let core = Core::new(store.slots(), ksmrs_core::Checksum(checksummer.zero_page()));
        Ok(Domain {
            name: name.to_owned(),
            core,
            store,
            key,
            checksummer,
            merges: Vec::new(),
            sweep: Sweep::default(),
            huge_declined: None,
            orders: HashMap::new(),
            regions: BTreeMap::new(),
        })
    }

    /// A region opts in; the reason if it cannot. Of one that was `born`, the words say where its pages are; returns how many of
    /// them could not be counted there.
    pub(crate) fn join(
        &mut self,
        session: &mut Session,
        region: u32,
        kind: wire::Kind,
        (first_word, pages): (u32, u32),
        position: u16,
        born: bool,
    ) -> Result<u32, String> {
        session.check_slice(region, first_word, pages)?;
        if born {
            return self.join_born(session, region, kind, (first_word, pages), position);
        }
        let kind = match kind {
            wire::Kind::Private => ksmrs_core::Kind::Private,
            wire::Kind::Shared => ksmrs_core::Kind::Shared,
        };
        let joined = self.core.region_joined(session.id, kind, pages, position);
        let (id, first_page) = joined.map_err(|error| error.to_string())?;
        let seat = Seat {
            region: id,
            first_word,
            pages,
            first_page,
        };
        self.seat(session, region, seat);
        Ok(0)
    }

    pub(crate) fn seat(&mut self, session: &mut Session, region: u32, seat: Seat) {
        session.seat(region, seat);
        self.regions.insert(seat.first_page, seat);
    }

    /// A region ends.
    pub(crate) fn leave(&mut self, session: &mut Session, region: u32) -> Result<(), Offence> {
        let seat = session.unseat(region).ok_or(Offence::NoSuchRegion { region })?;
        self.regions.remove(&seat.first_page);
        self.core.region_left(seat.region, session.epoch());
        Ok(())
    }

    /// The client is not connected any more; its frames stay.
    pub(crate) fn lost(&mut self, session: &Session) {
        for seat in session.regions.values() {
            self.regions.remove(&seat.first_page);
        }
        self.orders.retain(|_, (client, _)| *client != session.id);
        self.drop_merges(session.id);
        self.core.client_lost(session.id);
    }

    /// Carries out what core decides until it wants to wait, or for one turn. Returns when to come back: `None` for "at the
    /// next event".
    pub(crate) fn conduct(&mut self, now: Duration, sessions: &mut BTreeMap<u32, Session>) -> Option<Duration> {
        for _ in 0..DECISIONS_PER_TURN {
            match self.core.next(now) {
                Next::Do(decision) => self.carry_out(decision, sessions),
                Next::WaitUntil(then) => {
                    self.sweep();
                    return Some(then);
                }
                Next::Idle => return None,
            }
        }
        Some(now)
    }

    fn sweep(&mut self) {
        match self.sweep.after_pass(self.core.full_scans(), &self.store) {
            Ok(0) => {}
            Ok(pages) => tracing::info!(
                domain = self.name,
                pages,
                "memory that came back to the store was freed again"
            ),
            Err(error) => tracing::warn!(domain = self.name, %error, "the store was not swept"),
        }
    }

    fn carry_out(&mut self, decision: Decision, sessions: &mut BTreeMap<u32, Session>) {
        let (client, order, message, task) = match decision {
            Decision::Punch { first, pages } => return self.free(first, pages),
            Decision::Move { frames } => return self.move_frames(&frames),
            Decision::Scan {
                client,
                order,
                pass,
                nodes,
                ranges,
            } => {
                let parts: Vec<Part> = ranges.iter().map(|&range| self.locate(range)).collect();
                let message = ToClient::Scan {
                    order: order.0,
                    pass,
                    nodes,
                    ranges: as_ranges(&parts),
                };
                (client, order, message, Task::Scan { pass, parts })
            }
            Decision::Stage { client, order, pages } => {
                let words: Vec<u32> = pages
                    .iter()
                    .map(|&first| self.locate(PageRange { first, pages: 1 }))
                    .map(|part| {
                        if part.region.is_some() {
                            part.first_word
                        } else {
                            u32::MAX
                        }
                    })
                    .collect();
                let task = Task::Stage { pages: words.len() };
                (
                    client,
                    order,
                    ToClient::Stage {
                        order: order.0,
                        pages: words,
                    },
                    task,
                )
            }
            Decision::Map { client, order, runs } => {
                failpoint::hit(Failpoint::BrokerProposes);
                let split = self.core.tunables().split_huge_pages != 0;
                let parts: Vec<Part> = runs
                    .iter()
                    .map(|run| {
                        let range = PageRange {
                            first: run.first,
                            pages: u32::from(run.pages),
                        };
                        Part {
                            slot: run.slot.0,
                            ..self.locate(range)
                        }
                    })
                    .collect();
                let runs = parts
                    .iter()
                    .filter(|part| part.region.is_some())
                    .map(|part| wire::Run {
                        first_word: part.first_word,
                        pages: part.pages as u16,
                        slot: part.slot,
                    })
                    .collect();
                (
                    client,
                    order,
                    ToClient::Map {
                        order: order.0,
                        split,
                        runs,
                    },
                    Task::Map { parts },
                )
            }
            Decision::Unmap {
                client,
                order,
                ranges,
                why,
            } => {
                let parts: Vec<Part> = ranges.iter().map(|&range| self.locate(range)).collect();
                let why = match why {
                    ksmrs_core::Why::Unmerge => wire::Why::Run,
                };
                let message = ToClient::Unmap {
                    order: order.0,
                    ranges: as_ranges(&parts),
                    why,
                };
                (client, order, message, Task::Unmap { parts })
            }
        };
        tracing::trace!(client = client.0, order = order.0, ?task, "order");
        // A client that is not connected any more owes the answer until it is gone; core was told that it is lost.
        let Some(session) = sessions.get_mut(&client.0) else {
            return;
        };
        self.orders.insert(order, (client, task));
        if let Err(offence) = session.send(&message, None) {
            // Found again when the session is flushed, and dropped there.
            tracing::debug!(client = client.0, %offence, "order not sent");
        }
    }

    /// Where a range of core's pages lies in its client's table.
    fn locate(&self, range: PageRange) -> Part {
        let found = self.regions.range(..=range.first).next_back();
        let inside = found.map(|(first, &seat)| (range.first.0 - first.0, seat));
        match inside.filter(|(offset, seat)| offset + range.pages <= seat.pages) {
            Some((offset, seat)) => Part {
                region: Some(seat.region),
                first_word: seat.first_word + offset,
                pages: range.pages,
                slot: 0,
            },
            None => Part {
                region: None,
                first_word: 0,
                pages: range.pages,
                slot: 0,
            },
        }
    }

    /// Whether a part's words still belong to the region that the order was about.
    pub(crate) fn is_there(&self, part: &Part, session: &Session) -> bool {
        let Some(region) = part.region else { return false };
        session
            .seat_at(part.first_word)
            .is_some_and(|seat| seat.region == region)
    }

    /// Takes an open order for its answer.
    pub(crate) fn take_order(
        &mut self,
        message: &'static str,
        order: u32,
        client: ClientId,
        fits: impl Fn(&Task) -> bool,
    ) -> Result<Task, Offence> {
        match self.orders.remove(&OrderId(order)) {
            Some((owner, task)) if owner == client && fits(&task) => Ok(task),
            Some(other) => {
                self.orders.insert(OrderId(order), other);
                Err(Offence::NoSuchOrder { message, order })
            }
            None => Err(Offence::NoSuchOrder { message, order }),
        }
    }

    /// Whether nothing holds the domain: no clients, and no frames of former ones.
    pub(crate) fn is_vacant(&self) -> bool {
        let stats = self.core.stats();
        stats.clients == 0 && stats.frames == 0
    }
}

fn as_ranges(parts: &[Part]) -> Vec<wire::Range> {
    let there = parts.iter().filter(|part| part.region.is_some());
    there
        .map(|part| wire::Range {
            first_word: part.first_word,
            pages: part.pages,
        })
        .collect()
}
