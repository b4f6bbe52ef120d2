//! The remapper: the thread that conducts this process's side of merging.
//!
//! It makes the table, the staging area and the life pages, keeps the connection, does what the broker orders (freeze, compare,
//! map, unmap) and passes scans on to the scanner. It runs at the program's priority, because it holds pages for moments at a
//! time; it waits for nothing while it holds one. If everything here fails, regions are ordinary memory.

pub(super) mod born;

use super::link::Link;
use super::mailbox::{Event, Mailbox};
use super::objects::{Objects, Standing};
use super::orders::{self, Desk};
use super::scanner::{self, Job};
use super::session::{Session, Stage};
use super::{Bequest, ConnectOptions, Error, start};
use crate::wire::{self, Answer, Failure, Lineage, ScanCounts, ToBroker, ToClient};
use born::Birth;
use ksmrs_sys::checksum::Checksummer;
use ksmrs_sys::life::LifePage;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::region::Region;
use ksmrs_sys::staging::Staging;
use ksmrs_sys::store::StoreFile;
use ksmrs_sys::{PAGE_SIZE, StoreNumber, SysError, descriptors, sigmask, signal};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often the signal handler is put in front again, and Detached pages are tried to be brought home, while there is reason to.
const UPKEEP: Duration = Duration::from_millis(50);

/// How often it is looked whether frames of an earlier connection are still shown.
const ANCHOR_WATCH: Duration = Duration::from_secs(5);

/// Begins this process's client: starts the thread and returns what program threads need of it.
pub(super) fn begin(
    options: ConnectOptions,
    bequest: &'static Mutex<Bequest>,
) -> Result<(&'static ClientTable, Arc<Mailbox>), Error> {
    let mailbox = Arc::new(Mailbox::new());
    let (ready, begun) = channel();
    let theirs = mailbox.clone();
    std::thread::Builder::new()
        .name("ksmrs-remap".to_owned())
        .spawn(move || {
            sigmask::Blocked::for_good();
            match Remapper::new(options, theirs, bequest) {
                Ok(mut remapper) => {
                    let _ = ready.send(Ok(remapper.table));
                    remapper.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })
        .map_err(|error| Error::Off(format!("no thread to remap with: {error}")))?;
    let table = begun.recv().unwrap_or(Err(Error::Lost))?;
    Ok((table, mailbox))
}

/// Pages that a process can opt in: twice the machine's memory.
fn table_capacity() -> u32 {
    const AT_LEAST: u64 = 1 << 18;
    let info = rustix::system::sysinfo();
    let bytes = info.totalram as u64 * u64::from(info.mem_unit.max(1));
    u32::try_from((2 * bytes / PAGE_SIZE as u64).max(AT_LEAST)).unwrap_or(u32::MAX)
}

struct Remapper {
    options: ConnectOptions,
    mailbox: Arc<Mailbox>,
    table: &'static ClientTable,
    table_fd: OwnedFd,
    staging_fd: OwnedFd,
    scanner: Sender<Job>,
    /// The number of the connection that counts, for scanner and wire thread.
    current: Arc<AtomicU32>,
    desk: Desk,
    objects: Objects,
    session: Option<Session>,
    /// Whether there is anything to connect for.
    wanted: bool,
    failures: u32,
    try_again: Option<Instant>,
    connecting: Vec<Sender<Result<(), Error>>>,
    /// Questions asked before the handshake was through.
    unasked: Vec<(wire::Question, Sender<Result<Answer, Error>>)>,
    /// Life pages of earlier connections whose frames words still name: as long as one is mapped, that broker keeps them.
    anchors: Vec<(StoreNumber, LifePage)>,
    /// When they were last looked through.
    weighed: Option<Instant>,
    birth: Birth,
    /// Who children are born of now, and where they find that and whether a broker is wanted.
    lineage: Option<Lineage>,
    bequest: &'static Mutex<Bequest>,
}

impl Remapper {
    fn new(
        options: ConnectOptions,
        mailbox: Arc<Mailbox>,
        bequest: &'static Mutex<Bequest>,
    ) -> Result<Remapper, Error> {
        descriptors::unshare_table()?;
        let (table, table_fd) = ClientTable::create(table_capacity())?;
        Remapper::with(options, mailbox, bequest, (Box::leak(Box::new(table)), table_fd))
    }

    fn with(
        options: ConnectOptions,
        mailbox: Arc<Mailbox>,
        bequest: &'static Mutex<Bequest>,
        (table, table_fd): (&'static ClientTable, OwnedFd),
    ) -> Result<Remapper, Error> {
        let (staging, staging_fd) = Staging::create()?;
        let current = Arc::new(AtomicU32::new(0));
        let scanner = scanner::start(mailbox.clone(), Arc::new(staging), current.clone())
            .map_err(|error| Error::Off(format!("no thread to scan with: {error}")))?;
        Ok(Remapper {
            options,
            mailbox,
            table,
            table_fd,
            staging_fd,
            scanner,
            current,
            desk: Desk::new()?,
            objects: Objects::default(),
            session: None,
            wanted: false,
            failures: 0,
            try_again: None,
            connecting: Vec::new(),
            unasked: Vec::new(),
            anchors: Vec::new(),
            weighed: None,
            birth: Birth::default(),
            lineage: None,
            bequest,
        })
    }

    fn run(&mut self) {
        loop {
            let upkeep = self.desk.needs_upkeep().then(|| Instant::now() + UPKEEP);
            let weigh = (!self.anchors.is_empty()).then(|| Instant::now() + ANCHOR_WATCH);
            let turn = self
                .session
                .as_ref()
                .and_then(|session| session.turn_again.map(|(at, _)| at));
            let connected = self.ready().is_some();
            let objects = self.objects.due(connected);
            let until = [self.try_again, upkeep, weigh, turn, objects]
                .into_iter()
                .flatten()
                .min();
            match self.mailbox.take(until) {
                Some(event) => self.handle(event),
                None => {
                    if self.try_again.is_some_and(|at| at <= Instant::now()) {
                        self.try_again = None;
                        self.connect();
                    }
                }
            }
            if self.desk.needs_upkeep() {
                self.desk.upkeep();
            }
            self.tend_objects();
            self.weigh_anchors();
            *super::lock(self.bequest) = Bequest {
                wanted: self.wanted,
                lineage: self.lineage.clone(),
            };
            let turned = self.ready().map_or(Ok(()), Session::turn_if_due);
            self.check(turned);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Configure(options) => self.options = options,
            Event::Connect(reply) => match self.ready() {
                // Whoever asked may have given up since.
                Some(_) => drop(reply.send(Ok(()))),
                None => {
                    self.connecting.push(reply);
                    self.want();
                }
            },
            Event::Disconnect(done) => {
                self.wanted = false;
                self.try_again = None;
                if let Some(session) = &self.session {
                    let _ = session.link.send(
                        &ToBroker::Bye {
                            reason: "disconnect()".to_owned(),
                        },
                        None,
                    );
                }
                self.lost("disconnected on request");
                let _ = done.send(());
            }
            Event::Join(region) if self.objects.add(&region) => {
                if self.ready().is_none() {
                    self.want();
                }
            }
            Event::Join(region) => {
                self.desk.add(region.clone());
                let joined = self.ready().map(|session| session.join(&region, 0, None));
                match joined {
                    Some(sent) => self.check(sent),
                    None => self.want(),
                }
            }
            Event::Leave(region) => self.leave(&region),
            Event::Ask(question, reply) => {
                if matches!(question, wire::Question::Merge { .. }) {
                    self.objects.hurry();
                    self.tend_objects();
                }
                self.ask(question, reply);
            }
            Event::Message(link, message, fd) if self.is_current(link) => {
                if let Err(error) = self.message(message, fd) {
                    self.lost(&error.to_string());
                    self.retry();
                }
            }
            Event::Closed(link, why) if self.is_current(link) => {
                tracing::info!(why, "the connection to the broker ended");
                // Whoever waited may ask the next broker.
                self.fail(Error::Lost);
                self.lost(&why);
                self.retry();
            }
            Event::Scanned(link, order, tally) if self.is_current(link) => {
                let counts = ScanCounts {
                    read: tally.checksummed,
                    clean: 0,
                    passed_over: 0,
                };
                self.report(&ToBroker::Scanned { order, counts }, tally.broken > 0);
            }
            Event::Staged(link, order, copied) if self.is_current(link) => {
                let copied = wire::Bits::collect(copied.len() as u32, |index| copied[index as usize]);
                self.report(&ToBroker::Staged { order, copied }, false);
            }
            // From a connection that is gone.
            Event::Message(..) | Event::Closed(..) | Event::Scanned(..) | Event::Staged(..) => {}
        }
    }

    /// Asks now, or once the handshake is through.
    fn ask(&mut self, question: wire::Question, reply: Sender<Result<Answer, Error>>) {
        match self.ready() {
            Some(session) => {
                let asked = session.ask(question, reply);
                self.check(asked);
            }
            None => {
                self.unasked.push((question, reply));
                self.want();
            }
        }
    }

    /// Does what is due for regions whose object others might see, and tells the program why some do not merge.
    fn tend_objects(&mut self) {
        let session = self.session.as_mut().filter(|session| session.stage == Stage::Ready);
        let tended = self.objects.tend(&mut self.desk, session);
        self.check(tended);
        if let Some(reasons) = self.objects.news() {
            self.mailbox.set_not_merging(reasons);
        }
    }

    fn is_current(&self, link: u32) -> bool {
        self.session.as_ref().is_some_and(|session| session.link.number == link)
    }

    fn ready(&mut self) -> Option<&mut Session> {
        self.session.as_mut().filter(|session| session.stage == Stage::Ready)
    }

    /// Something asks for a broker.
    fn want(&mut self) {
        self.wanted = true;
        if self.session.is_none() && (self.try_again.is_none() || !self.connecting.is_empty()) {
            self.try_again = None;
            self.connect();
        }
    }

    fn connect(&mut self) {
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
    fn fail(&mut self, error: Error) {
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

    fn retry(&mut self) {
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
    fn lost(&mut self, why: &str) {
        let Some(session) = self.session.take() else { return };
        self.mailbox.set_connected(false);
        self.current.fetch_add(1, Ordering::AcqRel);
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

    fn check(&mut self, sent: Result<(), Error>) {
        if let Err(error) = sent {
            self.lost(&error.to_string());
            self.retry();
        }
    }

    /// A region was closed. Its slice of the table is free when the broker says so: until then an order may be on its way that
    /// means the old region, and would be carried out on a new one in its place.
    fn leave(&mut self, region: &Arc<Region>) {
        let standing = self.objects.remove(region);
        let mut number = self.desk.remove(region);
        match standing {
            // Its pages came home with its end.
            Some(Standing::Returning(_)) => number = Some(orders::number(region)),
            Some(Standing::Leaving) => {
                if let Some(session) = self.ready() {
                    session.leaving.insert(orders::number(region), region.clone());
                    return;
                }
            }
            _ => {}
        }
        let sent = match (number, self.ready()) {
            (Some(number), Some(session)) if !session.refused.contains(&number) => {
                session.leaving.insert(number, region.clone());
                session.leave(number)
            }
            (Some(number), Some(session)) => {
                session.refused.remove(&number);
                self.free_slice(region);
                Ok(())
            }
            _ => {
                self.free_slice(region);
                Ok(())
            }
        };
        self.check(sent);
    }

    /// Lets earlier connections go whose frames no word names any more. Looks through all words, so not at every turn.
    fn weigh_anchors(&mut self) {
        const PAUSE: Duration = Duration::from_secs(1);
        let recently = self.weighed.is_some_and(|at| at.elapsed() < PAUSE);
        if self.anchors.is_empty() || recently && !self.desk.is_empty() {
            return;
        }
        let used = self.desk.stores_in_use(&self.objects);
        self.anchors.retain(|(number, _)| used.contains(number));
        self.weighed = Some(Instant::now());
    }

    fn free_slice(&self, region: &Region) {
        self.table.give_back(region.first_word(), region.pages());
    }

    /// Sends a report, and turns the life page after it if anything was given up.
    fn report(&mut self, report: &ToBroker, gave_up: bool) {
        let given_up = signal::breaks() + ksmrs_sys::region::given_up();
        let Some(session) = self.ready() else { return };
        let turn = gave_up || given_up != session.given_up;
        session.given_up = given_up;
        let sent = session.link.send(report, None);
        let sent = if turn { sent.and_then(|()| session.turn()) } else { sent };
        self.check(sent);
    }

    fn message(&mut self, message: ToClient, fd: Option<OwnedFd>) -> Result<(), Error> {
        match message {
            ToClient::Welcome {
                client,
                key,
                store,
                slots,
            } => {
                self.welcome(&key, StoreNumber(store), slots, fd)?;
                self.lineage = Some(Lineage { client, store, key });
                Ok(())
            }
            ToClient::Ready => self.begin_work(),
            ToClient::Joined { region, uncounted } => {
                self.objects.joined(region);
                self.counted(region, Some(uncounted));
                Ok(())
            }
            ToClient::Refused { region, reason } => {
                tracing::info!(region, reason, "the broker refused a region");
                if !self.objects.refused(region, reason, &mut self.desk)
                    && let Some(session) = &mut self.session
                {
                    session.refused.insert(region);
                }
                self.counted(region, None);
                Ok(())
            }
            ToClient::Recall { region } => {
                self.objects.recall(region, &mut self.desk);
                Ok(())
            }
            ToClient::Left { region } if self.objects.left(region) => Ok(()),
            ToClient::Left { region } => {
                let left = self
                    .session
                    .as_mut()
                    .and_then(|session| session.leaving.remove(&region));
                left.into_iter().for_each(|region| self.free_slice(&region));
                Ok(())
            }
            ToClient::Scan { order, pass, ranges } => {
                let spans = ranges
                    .iter()
                    .filter_map(|range| self.desk.span(range.first_word, range.pages))
                    .collect();
                self.to_scanner(|link| Job::Scan {
                    link,
                    order,
                    pass,
                    spans,
                })
            }
            ToClient::Stage { order, pages } => {
                let pages = pages
                    .iter()
                    .map(|word| self.desk.span(*word, 1).map(|(region, span)| (region, span.first)));
                let pages = pages.collect();
                self.to_scanner(|link| Job::Stage { link, order, pages })
            }
            ToClient::Map { order, split, runs } => self.map(order, split, &runs),
            ToClient::Unmap { order, ranges, why: _ } => {
                let unmapped = self.desk.unmap(&ranges);
                self.report(&ToBroker::Unmapped { order, unmapped }, true);
                Ok(())
            }
            ToClient::Answer { id, answer } => self.answer(id, Ok(answer)),
            ToClient::Error { id, code, text } => self.answer(id, Err(Error::Refused { code, text })),
            ToClient::Bye { reason } => Err(Error::Start(format!("it said goodbye: {reason}"))),
        }
    }

    fn answer(&mut self, id: u32, answer: Result<Answer, Error>) -> Result<(), Error> {
        if let Some(reply) = self.session.as_mut().and_then(|session| session.questions.remove(&id)) {
            // Whoever asked may have been interrupted since.
            let _ = reply.send(answer);
        }
        Ok(())
    }

    fn to_scanner(&self, job: impl FnOnce(u32) -> Job) -> Result<(), Error> {
        let Some(session) = &self.session else { return Ok(()) };
        self.scanner
            .send(job(session.link.number))
            .map_err(|_| Error::Off("the scanner thread ended".to_owned()))
    }

    fn welcome(&mut self, key: &[u8; 16], store: StoreNumber, slots: u32, fd: Option<OwnedFd>) -> Result<(), Error> {
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
    fn begin_work(&mut self) -> Result<(), Error> {
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

    fn map(&mut self, order: u32, split: bool, runs: &[wire::Run]) -> Result<(), Error> {
        let Some((number, store)) = self.session.as_ref().and_then(|session| session.store.as_ref()) else {
            return Ok(());
        };
        if self.desk.has_too_many_mappings(runs) {
            self.report(
                &ToBroker::Failed {
                    order,
                    failure: Failure::Mappings,
                },
                true,
            );
            return Ok(());
        }
        let done = self.desk.map(runs, split, (*number, store), &self.objects);
        let report = ToBroker::Mapped {
            order,
            outcomes: done.outcomes,
            vmas: 0,
        };
        self.report(&report, done.gave_up);
        Ok(())
    }
}
