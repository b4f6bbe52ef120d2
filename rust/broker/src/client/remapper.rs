//! The remapper: the thread that conducts this process's side of merging.
//!
//! It makes the table, the staging area and the life pages, keeps the connection, does what the broker orders (freeze, compare,
//! map, unmap) and passes scans on to the scanner. It runs at the program's priority, because it holds pages for moments at a
//! time; it waits for nothing while it holds one. If everything here fails, regions are ordinary memory.

pub(super) mod born;
mod connection;

use super::mailbox::{Event, Mailbox};
use super::objects::{Objects, Standing};
use super::orders::{self, Desk};
use super::scanner::{self, Job};
use super::session::{Session, Stage};
use super::{Bequest, ConnectOptions, Error};
use crate::cpu::Stopwatch;
use crate::wire::{self, Answer, Lineage, ScanCounts, ToBroker, ToClient};
use born::Birth;
use ksmrs_sys::life::LifePage;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::region::Region;
use ksmrs_sys::staging::Staging;
use ksmrs_sys::{PAGE_SIZE, StoreNumber, descriptors, heap, sigmask, signal};
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often the signal handler is put in front again, and Detached pages are tried to be brought home, while there is reason to.
const UPKEEP: Duration = Duration::from_millis(50);

/// How often it is looked whether frames of an earlier connection are still shown.
const ANCHOR_WATCH: Duration = Duration::from_secs(5);

/// How long the store's glass stays after an order that looked through it: the next one finds it, and its page tables, in place.
const GLASS_STAYS: Duration = Duration::from_millis(100);

/// Begins this process's client: starts the thread and returns what program threads need of it.
pub(super) fn begin(
    options: ConnectOptions,
    bequest: &'static Mutex<Bequest>,
) -> Result<(&'static ClientTable, Arc<Mailbox>), Error> {
    let mailbox = Arc::new(Mailbox::new());
    let (ready, begun) = channel();
    let theirs = mailbox.clone();
    let thread = spawn(move || match Remapper::new(options, theirs, bequest) {
        Ok(mut remapper) => {
            let _ = ready.send(Ok(remapper.table));
            remapper.run();
        }
        Err(error) => {
            let _ = ready.send(Err(error));
        }
    });
    thread.map_err(|error| Error::Off(format!("no thread to remap with: {error}")))?;
    let table = begun.recv().unwrap_or(Err(Error::Lost))?;
    Ok((table, mailbox))
}

/// Starts the remapper's thread, in which no signal of the program's arrives.
fn spawn(body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let thread = std::thread::Builder::new().name("ksmrs-remap".to_owned());
    thread
        .spawn(move || {
            sigmask::Blocked::for_good();
            body();
        })
        .map(drop)
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
    /// When the store's glass is taken down.
    glass_until: Option<Instant>,
    birth: Birth,
    /// Who children are born of now, and where they find that and whether a broker is wanted.
    lineage: Option<Lineage>,
    bequest: &'static Mutex<Bequest>,
    /// Its CPU time from report to report.
    stopwatch: Stopwatch,
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
        mailbox.tracker.want(options.dirty_tracking);
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
            glass_until: None,
            birth: Birth::default(),
            lineage: None,
            bequest,
            stopwatch: Stopwatch::start(),
        })
    }

    fn run(&mut self) {
        loop {
            let upkeep = self.desk.needs_upkeep().then(|| Instant::now() + UPKEEP);
            let weigh = (!self.anchors.is_empty()).then(|| Instant::now() + ANCHOR_WATCH);
            let connected = self.ready().is_some();
            let objects = self.objects.due(connected);
            let until = [self.try_again, upkeep, weigh, objects, self.glass_until]
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
            self.tidy_glass();
            self.tend_objects();
            self.weigh_anchors();
            self.bequeath();
        }
    }

    fn tidy_glass(&mut self) {
        if self.glass_until.is_some_and(|until| until <= Instant::now()) {
            self.glass_until = None;
            if let Some((_, store)) = self.session.as_mut().and_then(|session| session.store.as_mut()) {
                store.take_glass_down();
            }
        }
    }

    /// Leaves for children what they go on with.
    fn bequeath(&self) {
        *super::lock(self.bequest) = Bequest {
            wanted: self.wanted,
            lineage: self.lineage.clone(),
        };
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Configure(options) => {
                self.mailbox.tracker.want(options.dirty_tracking);
                self.options = options;
            }
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
                // Whoever hears of it may fork at once.
                self.bequeath();
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
            Event::End(arena) => {
                arena.close();
                self.leave(&arena);
            }
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
            Event::Scanned(link, order, tally, scanner) if self.is_current(link) => {
                let counts = ScanCounts {
                    read: tally.checksummed,
                    clean: tally.clean,
                    passed_over: 0,
                    cpu_micros: self.spent(scanner),
                };
                self.report(&ToBroker::Scanned { order, counts }, tally.broken > 0);
            }
            Event::Staged(link, order, copied, scanner) if self.is_current(link) => {
                let copied = wire::Bits::collect(copied.len() as u32, |index| copied[index as usize]);
                let cpu_micros = self.spent(scanner);
                let report = ToBroker::Staged {
                    order,
                    copied,
                    cpu_micros,
                };
                self.report(&report, false);
            }
            // From a connection that is gone.
            Event::Message(..) | Event::Closed(..) | Event::Scanned(..) | Event::Staged(..) => {}
        }
    }

    /// CPU time that was not reported yet, the scanner's included, in microseconds.
    fn spent(&mut self, scanner: Duration) -> u32 {
        u32::try_from((scanner + self.stopwatch.lap()).as_micros()).unwrap_or(u32::MAX)
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

    fn check(&mut self, sent: Result<(), Error>) {
        if let Err(error) = sent {
            self.lost(&error.to_string());
            self.retry();
        }
    }

    /// A region was closed. Its slice of the table is free when the broker says so: until then an order may be on its way that
    /// means the old region, and would be carried out on a new one in its place.
    fn leave(&mut self, region: &Arc<Region>) {
        let link = self.session.as_ref().map(|session| session.link.number);
        let standing = self.objects.remove(region, link);
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
            ToClient::Turn => self.ready().map_or(Ok(()), Session::turn),
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
            ToClient::Scan {
                order,
                pass,
                nodes,
                ranges,
            } => {
                if pass & ksmrs_core::EXTRA == 0 {
                    heap::pass_began(pass);
                }
                let spans = ranges
                    .iter()
                    .filter_map(|range| self.desk.span(range.first_word, range.pages))
                    .collect();
                self.to_scanner(|link| Job::Scan {
                    link,
                    order,
                    pass,
                    nodes,
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

    fn map(&mut self, order: u32, split: bool, runs: &[wire::Run]) -> Result<(), Error> {
        let Some((number, store)) = self.session.as_ref().and_then(|session| session.store.as_ref()) else {
            return Ok(());
        };
        let done = self.desk.map(runs, split, (*number, store), &self.objects);
        if done.through_glass {
            self.glass_until = Some(Instant::now() + GLASS_STAYS);
        }
        let report = ToBroker::Mapped {
            order,
            outcomes: done.outcomes,
            cpu_micros: self.spent(Duration::ZERO),
        };
        self.report(&report, done.gave_up);
        Ok(())
    }
}
