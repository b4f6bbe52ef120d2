//! The broker's loop: one thread that listens, reads, decides and sends, and waits only in one place.
//!
//! ```text
//! poll -> accept -> read what is there -> core decides -> merges answered -> send what can be sent -> ask life pages
//! ```
//!
//! A client is *connected* while its socket is open, *departed* after, and *gone* when all its life pages took the seal; only
//! then are its frames free (`departed.rs`). Whatever a client does wrong ends its own connection and is logged.

mod hello;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ksmrs_core::{ClientId, Epoch};
use ksmrs_sys::peer::{Listener, Peer, Wait};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::cpu::Stopwatch;
use crate::departed::{Departed, Found};
use crate::domain::Domain;
use crate::objects::Objects;
use crate::offence::Offence;
use crate::session::{Phase, Session};
use crate::wire::{
    Answer, BORN, BrokerEnd, MAX_TEXT, Message, Object, Question, ReceiveBuffer, Status, ToBroker, ToClient,
};

/// Messages read from one client before the next one has its turn.
const MESSAGES_PER_TURN: usize = 64;
/// More than the kernel takes would end the broker.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);
/// How long accepting and reading pause when descriptors run out.
const DESCRIPTORS_PAUSE: Duration = Duration::from_millis(100);
/// Why a named object is refused by a broker inside its client.
const NOT_EMBEDDED: &str = "an embedded broker ends with its client, and nobody would write the object's pages back";

/// Everything that a broker holds.
pub(crate) struct Conductor {
    started: Instant,
    listener: Option<Listener>,
    sessions: BTreeMap<u32, Session>,
    departed: Vec<Departed>,
    domains: BTreeMap<String, Domain>,
    objects: Objects,
    last_client: u32,
    store_slots: Option<u32>,
    /// When there may be descriptors again.
    paused_until: Option<Duration>,
    /// Given up to read what clients left that are no more, and to have their descriptors back, when there is no other.
    spare: Option<OwnedFd>,
    buffer: ReceiveBuffer,
}

impl Conductor {
    pub(crate) fn new(listener: Option<Listener>, store_slots: Option<u32>) -> Conductor {
        Conductor {
            started: Instant::now(),
            listener,
            sessions: BTreeMap::new(),
            departed: Vec::new(),
            domains: BTreeMap::new(),
            objects: Objects::default(),
            last_client: 0,
            store_slots,
            paused_until: None,
            spare: None,
            buffer: ReceiveBuffer::new(),
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes a connection over.
    pub(crate) fn connected(&mut self, peer: Peer) {
        self.last_client = self.last_client.wrapping_add(1);
        let id = ClientId(self.last_client);
        match Session::new(id, BrokerEnd::over(peer)) {
            Ok(session) => {
                tracing::debug!(client = id.0, pid = session.credentials.pid, "connected");
                self.sessions.insert(id.0, session);
            }
            Err(offence) => tracing::warn!(client = id.0, %offence, "connection refused"),
        }
    }

    /// Runs until nobody was connected for `idle`; without a listener until the last connection closed.
    pub(crate) fn run(&mut self, idle: Duration) -> Result<(), Errno> {
        let mut alone_since = Some(self.now());
        loop {
            let mut wake = self.turn();
            if self.sessions.is_empty() && !self.owes_pages() {
                let since = *alone_since.get_or_insert(self.now());
                if self.listener.is_none() || self.now() >= since + idle {
                    return Ok(());
                }
                wake = earliest(wake, Some(since + idle));
            } else {
                alone_since = None;
            }
            self.wait(wake)?;
        }
    }

    /// The listener is given up: its socket is gone, and who connects now starts another broker.
    pub(crate) fn close(self) {
        for session in self.sessions.values() {
            session.dismiss("the broker ends");
        }
    }

    fn turn(&mut self) -> Option<Duration> {
        let mut wake = None;
        let now = self.now();
        let mut stopwatch = Stopwatch::start();
        for domain in self.domains.values_mut() {
            wake = earliest(wake, domain.conduct(now, &mut self.sessions));
            wake = earliest(wake, domain.answer_merges(now, &mut self.sessions));
            domain.core.spent(stopwatch.lap());
        }
        wake = earliest(wake, self.ask_lives());
        wake = earliest(wake, self.recall());
        let offenders: Vec<(u32, Offence)> = self
            .sessions
            .iter_mut()
            .filter_map(|(&id, session)| session.flush().err().map(|offence| (id, offence)))
            .collect();
        if !offenders.is_empty() {
            wake = Some(now);
        }
        for (id, offence) in offenders {
            self.drop_client(id, Some(&offence));
        }
        earliest(wake, self.paused_until)
    }

    /// Whether pages of a departed client are still to be written back to its objects.
    fn owes_pages(&self) -> bool {
        self.departed.iter().any(|departed| self.objects.are_of(departed.id.0))
    }

    /// Tells clients of whose objects somebody waits to open, and lends the pages of those that do not answer; returns when to ask
    /// for that next.
    fn recall(&mut self) -> Option<Duration> {
        let now = self.now();
        for (client, region) in self.objects.recalls(now) {
            tracing::info!(client, region, "somebody opens its object: its pages go home");
            if let Some(session) = self.sessions.get_mut(&client) {
                session.recall(region);
            }
        }
        for client in self.objects.overdue(now) {
            let connected = self.sessions.get(&client).and_then(Session::lender);
            let departed = || self.departed.iter().find(|departed| departed.id.0 == client);
            if let Some((table, name, number)) = connected.or_else(|| departed()?.lender())
                && let Some(domain) = self.domains.get_mut(name)
                && let Err(error) = self.objects.lend(client, now, table, number, &mut domain.store)
            {
                tracing::warn!(client, %error, "pages cannot be lent; it is tried again");
            }
        }
        self.objects.next_watch()
    }

    /// Asks about life pages whose time has come; returns when to ask next.
    fn ask_lives(&mut self) -> Option<Duration> {
        let now = self.now();
        let mut wake = None;
        let mut released = false;
        for session in self.sessions.values_mut() {
            let Some(domain) = session.domain.as_ref().and_then(|name| self.domains.get_mut(name)) else {
                continue;
            };
            if let Some(epoch) = session.lives.poll(true, now) {
                domain.core.sealed(session.id, Epoch(epoch));
                released = true;
            }
            let given_up = domain.core.latest_unsealed(session.id).map(|epoch| epoch.0);
            if session.lives.is_turn_due(given_up, now) {
                session.ask_turn();
            }
            wake = earliest(wake, earliest(session.lives.next_poll(true), session.lives.next_turn()));
        }
        let (domains, objects) = (&mut self.domains, &mut self.objects);
        self.departed.retain_mut(|departed| {
            let Some(domain) = domains.get_mut(&departed.domain) else {
                return false;
            };
            let found = departed.look(now, domain, objects);
            released |= !matches!(found, Found::Waiting);
            wake = earliest(wake, departed.next_look(objects));
            !matches!(found, Found::Gone)
        });
        if released { Some(now) } else { wake }
    }

    /// The one place to wait, then reads everything that came.
    fn wait(&mut self, wake: Option<Duration>) -> Result<(), Errno> {
        let now = self.now();
        let timeout = wake.map(|wake| {
            let left = wake.saturating_sub(now).min(LONGEST_WAIT);
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        self.keep_spare();
        let paused = self.paused_until.is_some_and(|until| now < until);
        if !paused {
            self.paused_until = None;
        }
        let mut ids = Vec::with_capacity(self.sessions.len());
        let mut fds = Vec::with_capacity(self.sessions.len() + 1);
        // The end of a connection cannot be left out of what is waited for.
        for (&id, session) in self.sessions.iter().filter(|_| !paused) {
            let flags = if session.has_waiting() {
                PollFlags::IN | PollFlags::OUT
            } else {
                PollFlags::IN
            };
            ids.push(id);
            fds.push(PollFd::from_borrowed_fd(session.connection.as_fd(), flags));
        }
        if let Some(listener) = self.listener.as_ref().filter(|_| !paused) {
            fds.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let events: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        if events.len() > ids.len() && !events[ids.len()].is_empty() {
            self.accept();
        }
        let readable = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        for (id, _) in ids
            .into_iter()
            .zip(events)
            .filter(|(_, event)| event.intersects(readable))
        {
            self.read(id);
        }
        Ok(())
    }

    fn accept(&mut self) {
        loop {
            match self.listener.as_ref().map(Listener::accept) {
                Some(Ok(Some(peer))) => self.connected(peer),
                Some(Ok(None)) | None => return,
                Some(Err(error)) => {
                    tracing::warn!(%error, "cannot accept clients for a moment");
                    return self.pause();
                }
            }
        }
    }

    /// Descriptors ran out: nothing is accepted or read until there may be some again, for what comes along with a message would be lost.
    fn pause(&mut self) {
        self.paused_until = Some(self.now() + DESCRIPTORS_PAUSE);
    }

    fn keep_spare(&mut self) {
        if self.spare.is_none() {
            self.spare = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).ok();
        }
    }

    /// Reads what a client sent; hearing it is work for its domain.
    fn read(&mut self, id: u32) {
        let mut stopwatch = Stopwatch::start();
        self.read_messages(id);
        // Before the others are read.
        self.keep_spare();
        let domain = self.sessions.get(&id).and_then(|session| session.domain.as_ref());
        if let Some(domain) = domain.and_then(|name| self.domains.get_mut(name)) {
            domain.core.spent(stopwatch.lap());
        }
    }

    fn read_messages(&mut self, id: u32) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(session) = self.sessions.get_mut(&id) else {
                return;
            };
            if !session.connection.has_room_for_descriptor() {
                // Its own are among those that may be had again, once everything is read that it sent.
                let spare = self.spare.take_if(|_| session.connection.has_hung_up());
                if spare.is_none() {
                    tracing::warn!(client = id, "no descriptor is left: nothing is read for a moment");
                    return self.pause();
                }
            }
            let result = match session.connection.receive(&mut self.buffer, Wait::No) {
                Err(error) if error.is_would_block() => return,
                Err(error) if error.is_closed() => return self.drop_client(id, None),
                Err(error) => {
                    session.not_received(self.listener.is_none());
                    Err(error.into())
                }
                Ok((message, fd)) => self.hear(id, message, fd),
            };
            if let Err(offence) = result {
                return self.drop_client(id, Some(&offence));
            }
        }
    }

    /// Ends a connection. What the client shows stays until its life pages say otherwise.
    fn drop_client(&mut self, id: u32, offence: Option<&Offence>) {
        let Some(mut session) = self.sessions.remove(&id) else {
            return;
        };
        let pid = session.credentials.pid;
        match offence {
            Some(offence) => {
                tracing::warn!(client = id, pid, %offence, "client dropped");
                session.dismiss(&offence.to_string());
                session.take_last_lives(&mut self.buffer, self.started.elapsed(), self.listener.is_none());
            }
            None => tracing::info!(client = id, pid, "client closed its socket"),
        }
        let Some(name) = session.domain.take() else { return };
        if let Some(domain) = self.domains.get_mut(&name) {
            domain.lost(&session);
        }
        self.departed.push(Departed::new(session, name, self.started.elapsed()));
    }

    fn hear(&mut self, id: u32, message: ToBroker, fd: Option<OwnedFd>) -> Result<(), Offence> {
        let now = self.now();
        let name = message.name();
        let embedded = self.listener.is_none();
        if let ToBroker::Hello {
            release,
            domain,
            pid,
            stores,
            born,
        } = message
        {
            let born = born.and_then(|born| self.lineage(&domain, &born));
            return self.hello(id, &release, domain, pid, &stores, born);
        }
        let of_all = match &message {
            ToBroker::Ask { question, .. } => self.answer_of_all(id, question),
            _ => None,
        };
        let Some(session) = self.sessions.get_mut(&id) else {
            return Ok(());
        };
        session.expect_from(name, Phase::Welcome)?;
        let Some(domain) = session.domain.as_ref().and_then(|name| self.domains.get_mut(name)) else {
            return Err(Offence::OutOfOrder {
                message: name,
                phase: "before Hello",
            });
        };
        let missing = || Offence::OutOfOrder {
            message: name,
            phase: "without its descriptor",
        };
        match message {
            ToBroker::Hello { .. } => Ok(()),
            ToBroker::Life { epoch } => session.take_life(epoch, fd.ok_or_else(missing)?, now),
            ToBroker::Table { pages } => session.take_table(pages, &fd.ok_or_else(missing)?),
            ToBroker::Staging => session.take_staging(&fd.ok_or_else(missing)?),
            ToBroker::Ask { id, question } => match of_all {
                Some(answer) => session.send(&ToClient::Answer { id, answer }, None),
                None => domain.ask(session, id, question, now),
            },
            ToBroker::Bye { reason } => {
                tracing::info!(client = id, reason, "client says bye");
                Ok(())
            }
            message => {
                session.expect(name, Phase::Ready)?;
                match message {
                    ToBroker::Join {
                        region,
                        kind,
                        first_word,
                        pages,
                        position,
                        flags,
                        object,
                    } => {
                        let slice = (first_word, pages);
                        let leased = match object.zip(fd) {
                            Some(_) if embedded => Err(NOT_EMBEDDED.to_owned()),
                            Some((object, fd)) => {
                                lease(&mut self.objects, &self.departed, session, (region, slice), object, fd)
                            }
                            None => Ok(()),
                        };
                        let joined = leased.and_then(|()| {
                            let joined = domain.join(session, region, kind, slice, position, flags & BORN != 0);
                            joined.inspect_err(|_| self.objects.leave(id, region))
                        });
                        match joined {
                            Ok(uncounted) => session.send(&ToClient::Joined { region, uncounted }, None),
                            Err(reason) => {
                                tracing::warn!(client = id, region, reason, "region refused");
                                session.send(&ToClient::Refused { region, reason }, None)
                            }
                        }
                    }
                    ToBroker::Leave { region } => {
                        domain.leave(session, region)?;
                        self.objects.leave(id, region);
                        session.send(&ToClient::Left { region }, None)
                    }
                    ToBroker::Scanned { order, counts } => {
                        tracing::trace!(client = id, order, ?counts, "scanned");
                        let cpu = session.claims.take(counts.cpu_micros, now);
                        domain.core.client_spent(session.id, cpu, now);
                        domain.scanned(session, order, now)
                    }
                    ToBroker::Staged {
                        order,
                        copied,
                        cpu_micros,
                    } => {
                        let cpu = session.claims.take(cpu_micros, now);
                        domain.core.client_spent(session.id, cpu, now);
                        domain.staged(session, order, &copied)
                    }
                    ToBroker::Mapped {
                        order,
                        outcomes,
                        cpu_micros,
                    } => {
                        tracing::trace!(client = id, order, cpu_micros, "mapped");
                        let cpu = session.claims.take(cpu_micros, now);
                        domain.core.client_spent(session.id, cpu, now);
                        domain.mapped(session, order, &outcomes)
                    }
                    ToBroker::Unmapped { order, .. } => domain.unmapped(session, order),
                    ToBroker::Failed { order, failure } => domain.failed(session, order, failure),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Answers what needs more than the session that asks.
    fn answer_of_all(&self, asker: u32, question: &Question) -> Option<Answer> {
        match question {
            Question::Status => Some(Answer::Status(self.status())),
            Question::PageMap { from } => {
                let domain = self.domains.get(self.sessions.get(&asker)?.domain.as_ref()?)?;
                // Who left without its regions ending is not in `sessions` any more.
                let pid_of = |client: ClientId| self.sessions.get(&client.0).map_or(0, |found| found.credentials.pid);
                Some(domain.page_map(*from, pid_of))
            }
            _ => None,
        }
    }

    fn status(&self) -> Status {
        let embedded = self.listener.is_none();
        let clock = if embedded {
            rustix::time::ClockId::ThreadCPUTime
        } else {
            rustix::time::ClockId::ProcessCPUTime
        };
        let cpu = rustix::time::clock_gettime(clock);
        let declined = self.domains.values().find_map(|domain| domain.huge_declined.as_ref());
        let huge_declined = declined.map(|error| error.to_string().chars().take(MAX_TEXT / 4).collect());
        let stores = self.domains.values().filter_map(|domain| domain.store.allocated().ok());
        Status {
            pid: std::process::id(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            clients: self
                .sessions
                .values()
                .filter(|session| session.phase == Phase::Ready)
                .count() as u32,
            domains: self.domains.len() as u32,
            uptime_ms: self.now().as_millis() as u64,
            resident_bytes: resident_bytes().unwrap_or(0),
            store_bytes: stores.sum(),
            cpu_ms: cpu.tv_sec as u64 * 1000 + cpu.tv_nsec as u64 / 1_000_000,
            embedded,
            huge_declined,
        }
    }
}

/// Leases the object that a region is made of; the reason if it cannot.
fn lease(
    objects: &mut Objects,
    departed: &[Departed],
    session: &Session,
    (region, slice): (u32, (u32, u32)),
    object: Object,
    fd: OwnedFd,
) -> Result<(), String> {
    if session.regions.contains_key(&region) {
        return Err(format!("region {region} has joined already"));
    }
    objects.join(session.id.0, region, slice, object, fd, |client| {
        let mut earlier = departed.iter().filter(|departed| departed.id.0 == client);
        earlier.any(|departed| departed.was(session))
    })
}

fn earliest(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// Anonymous and file memory of this process; windows of the frame stores are shared memory and not counted.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    Some((kibibytes("RssAnon:")? + kibibytes("RssFile:")?) * 1024)
}
