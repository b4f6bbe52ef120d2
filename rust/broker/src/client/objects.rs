//! Regions whose object somebody else might see: when they may merge, and when their pages go home.
//!
//! ```text
//!            alone with it, leased                     a Recall, or no connection
//!   Outside ----------------------> Inside ----------------------------------------> Returning
//!      ^                                                                                  | pages are home
//!      +---------------------- Leaving <--------------------------------------------------+
//! ```
//!
//! A region is Inside while the broker counts it a member of the domain; only then does anything merge. It relies on the
//! broker for the lease on what can be opened (and for writing back what this process cannot any more), on `sharers` for whoever
//! had the object before, and on the desk's sentinel for children. Where one of them says no, the reason is kept, and asked for again.

use super::Error;
use super::orders::{Desk, number};
use super::session::Session;
use crate::process::Process;
use crate::wire;
use ksmrs_sys::foreign::Object;
use ksmrs_sys::lease::Description;
use ksmrs_sys::region::Region;
use ksmrs_sys::sharers::{self, ObjectId, Sharer};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After a no it is asked again, ever later.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Pages that had no room at home are tried again after this.
const NO_ROOM_PAUSE: Duration = Duration::from_millis(20);

/// How a region stands with the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// All at home; asked for again at that time.
    Outside(Instant),
    /// It joined, or asked to.
    Inside,
    /// Its pages are going home; tried again at that time.
    Returning(Instant),
    /// They are home, and the broker was told.
    Leaving,
}

struct Entry {
    region: Arc<Region>,
    object: Object,
    /// Of what is leased.
    description: Option<Description>,
    standing: Standing,
    /// The connection that it last joined over, and the broker there.
    link: u32,
    broker: Option<Arc<Process>>,
    pause: Duration,
    /// Why it does not merge.
    reason: Option<String>,
}

impl Entry {
    fn not_yet(&mut self, reason: String, now: Instant) {
        self.reason = Some(reason);
        self.standing = Standing::Outside(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Whether pages of it may be missing in its object.
    fn is_away(&self) -> bool {
        !matches!(self.standing, Standing::Outside(_))
    }
}

/// All of them, by their numbers.
#[derive(Default)]
pub(super) struct Objects {
    entries: BTreeMap<u32, Entry>,
    changed: bool,
}

impl Objects {
    /// Takes a region in, if it is one of these.
    pub(super) fn add(&mut self, region: &Arc<Region>) -> bool {
        let Some(object) = region.object() else { return false };
        let entry = Entry {
            region: region.clone(),
            object,
            description: None,
            standing: Standing::Outside(Instant::now()),
            link: 0,
            broker: None,
            pause: FIRST_PAUSE,
            reason: None,
        };
        self.entries.insert(number(region), entry);
        true
    }

    /// Those that the desk does not know any more, though pages of theirs still show frames.
    pub(super) fn returning(&self) -> impl Iterator<Item = &Arc<Region>> {
        let returning = |entry: &&Entry| matches!(entry.standing, Standing::Returning(_));
        self.entries.values().filter(returning).map(|entry| &entry.region)
    }

    /// Forgets a region that ended, and says how it stood; what merged of it is home already. `link` is the connection at work, if any.
    pub(super) fn remove(&mut self, region: &Arc<Region>, link: Option<u32>) -> Option<Standing> {
        let entry = self.entries.get_mut(&number(region))?;
        if !Arc::ptr_eq(&entry.region, region) {
            return None;
        }
        self.changed = true;
        if matches!(entry.standing, Standing::Returning(_)) && link != Some(entry.link) {
            // The broker of that connection is not told; this one never knew.
            entry.standing = Standing::Outside(Instant::now());
        }
        let (standing, id) = (entry.standing, entry.object.id);
        // The broker gives up what it knows of.
        if matches!(standing, Standing::Outside(_)) {
            self.give_lease_up(id);
        }
        self.entries.remove(&number(region));
        Some(standing)
    }

    /// Nobody waits for an object any more on our account, unless pages of it are away still, of whichever region. (One lease stands for
    /// all of them: they share the program's description.)
    fn give_lease_up(&mut self, id: ObjectId) {
        if self
            .entries
            .values()
            .any(|entry| entry.object.id == id && entry.is_away())
        {
            return;
        }
        for entry in self.entries.values_mut().filter(|entry| entry.object.id == id) {
            if let Some(description) = entry.description.take() {
                // There may be none: the broker gave it up, or the kernel took it.
                let _ = description.release();
            }
        }
    }

    /// When something is to be done next.
    pub(super) fn due(&self, connected: bool) -> Option<Instant> {
        let due = self.entries.values().filter_map(|entry| match entry.standing {
            Standing::Outside(at) if connected => Some(at),
            Standing::Returning(at) => Some(at),
            _ => None,
        });
        due.min()
    }

    /// Somebody wants everything merged now: ask again at once.
    pub(super) fn hurry(&mut self) {
        let now = Instant::now();
        for entry in self.entries.values_mut() {
            if let Standing::Outside(at) = &mut entry.standing {
                *at = now;
            }
        }
    }

    /// Does what is due.
    ///
    /// # Errors
    /// The connection failed.
    pub(super) fn tend(&mut self, desk: &mut Desk, mut session: Option<&mut Session>) -> Result<(), Error> {
        let now = Instant::now();
        let (mut back, mut sent) = (BTreeSet::new(), Ok(()));
        for (number, entry) in &mut self.entries {
            if matches!(entry.standing, Standing::Returning(at) if at <= now) {
                self.changed = true;
                sent = sent.and(bring_home(*number, entry, session.as_deref_mut()));
                if !entry.is_away() {
                    back.insert(entry.object.id);
                }
            }
        }
        for id in back {
            self.give_lease_up(id);
        }
        sent?;
        match session {
            Some(session) => self.let_in(desk, session, now),
            None => Ok(()),
        }
    }

    /// Joins what is due and nobody else's.
    fn let_in(&mut self, desk: &mut Desk, session: &mut Session, now: Instant) -> Result<(), Error> {
        let is_due = |entry: &Entry| matches!(entry.standing, Standing::Outside(at) if at <= now);
        let of = |standing: &dyn Fn(&Entry) -> bool| -> BTreeSet<ObjectId> {
            let entries = self.entries.values().filter(|entry| standing(entry));
            entries.map(|entry| entry.object.id).collect()
        };
        let mut wanted = of(&is_due);
        if wanted.is_empty() {
            return Ok(());
        }
        // Where one region of an object is in, the object is ours alone.
        let inside = of(&|entry| entry.standing == Standing::Inside);
        wanted.retain(|id| !inside.contains(id));
        let going_home = of(&|entry| matches!(entry.standing, Standing::Returning(_) | Standing::Leaving));
        self.changed = true;
        let alone = desk.is_alone();
        let shared = if alone {
            sharers::of(&wanted, session.link.broker)
        } else {
            BTreeMap::new()
        };
        for entry in self.entries.values_mut().filter(|entry| is_due(entry)) {
            if going_home.contains(&entry.object.id) {
                entry.not_yet("other pages of its object are on their way home".to_owned(), now);
                continue;
            }
            match admit(entry, alone, shared.get(&entry.object.id)) {
                Ok(()) => {
                    (entry.standing, entry.link) = (Standing::Inside, session.link.number);
                    entry.broker = session.link.process.clone();
                    entry.region.dismiss();
                    desk.add(entry.region.clone());
                    let leased = entry.description.as_ref().map(|description| {
                        let Object { id, offset, .. } = entry.object;
                        let object = wire::Object {
                            device: id.device,
                            inode: id.inode,
                            offset,
                        };
                        (object, description.as_fd())
                    });
                    session.join(&entry.region, 0, leased)?;
                }
                Err(reason) => entry.not_yet(reason, now),
            }
        }
        Ok(())
    }

    /// What stayed inside without a broker joined the next one.
    pub(super) fn rejoined(&mut self, link: u32) {
        for entry in self
            .entries
            .values_mut()
            .filter(|entry| entry.standing == Standing::Inside)
        {
            entry.link = link;
        }
    }

    /// The broker took a region.
    pub(super) fn joined(&mut self, number: u32) {
        if let Some(entry) = self.entries.get_mut(&number) {
            (entry.reason, entry.pause) = (None, FIRST_PAUSE);
            self.changed = true;
        }
    }

    /// The broker did not; whether it is one of these.
    pub(super) fn refused(&mut self, number: u32, reason: String, desk: &mut Desk) -> bool {
        let Some(entry) = self.entries.get_mut(&number) else {
            return false;
        };
        desk.remove(&entry.region);
        // Nothing of it has merged.
        entry.region.recall();
        entry.description = None;
        entry.not_yet(reason, Instant::now());
        self.changed = true;
        true
    }

    /// Somebody waits for a region's object.
    pub(super) fn recall(&mut self, number: u32, desk: &mut Desk) {
        if let Some(entry) = self.entries.get_mut(&number)
            && entry.standing == Standing::Inside
        {
            desk.remove(&entry.region);
            entry.region.recall();
            entry.standing = Standing::Returning(Instant::now());
        }
    }

    /// The broker let a region go that we asked it to; whether it is one of these.
    pub(super) fn left(&mut self, number: u32) -> bool {
        let Some(entry) = self.entries.get_mut(&number) else {
            return false;
        };
        if entry.standing == Standing::Leaving {
            entry.description = None;
            entry.not_yet("another process opened it".to_owned(), Instant::now());
            self.changed = true;
        }
        true
    }

    /// There is no broker any more to keep what can be opened whole: it goes home.
    pub(super) fn lost(&mut self, desk: &mut Desk) {
        let now = Instant::now();
        let mut back = BTreeSet::new();
        for entry in self.entries.values_mut() {
            match entry.standing {
                Standing::Inside if entry.object.opens => {
                    desk.remove(&entry.region);
                    entry.region.recall();
                    entry.standing = Standing::Returning(now);
                }
                Standing::Leaving => {
                    entry.standing = Standing::Outside(now);
                    back.insert(entry.object.id);
                }
                _ => {}
            }
        }
        for id in back {
            self.give_lease_up(id);
        }
        self.changed = true;
    }

    /// Why regions do not merge, if that is not what was told last.
    pub(super) fn news(&mut self) -> Option<Vec<String>> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let reasons = self.entries.values().filter_map(|entry| {
            let region = &entry.region;
            let bytes = u64::from(region.pages()) * ksmrs_sys::PAGE_SIZE as u64;
            let reason = entry.reason.as_ref()?;
            Some(format!("{bytes} bytes at {:#x}: {reason}", region.address()))
        });
        Some(reasons.collect())
    }

    /// Whether nobody waits to open a region's object.
    pub(super) fn is_leased(&self, region: &Region) -> bool {
        let entry = self.entries.get(&number(region));
        let description = entry.and_then(|entry| entry.description.as_ref());
        description.is_none_or(Description::is_leased)
    }

    /// Whether the file system of a region's object keeps room for all that this process took out of objects there.
    pub(super) fn have_room(&self, region: &Region) -> bool {
        let Some(entry) = self.entries.get(&number(region)) else {
            return true;
        };
        let Some(room) = entry.description.as_ref().and_then(Description::room) else {
            return true;
        };
        let device = entry.object.id.device;
        let there = self.entries.values().filter(|other| other.object.id.device == device);
        let taken: u64 = there.map(|other| u64::from(other.region.pages_away())).sum();
        room >= taken * ksmrs_sys::PAGE_SIZE as u64
    }
}

/// Whether nobody else can see a region's object, as far as this process can tell. What can be opened gets its description, for
/// the broker to lease.
fn admit(entry: &mut Entry, alone: bool, sharer: Option<&Sharer>) -> Result<(), String> {
    if !alone {
        return Err("a forked child shares it".to_owned());
    }
    if let Some(sharer) = sharer {
        return Err(sharer.to_string());
    }
    if entry.object.opens && entry.description.is_none() {
        entry.description = Some(Description::find(entry.object.id).map_err(|error| error.to_string())?);
    }
    Ok(())
}

/// Takes a recalled region's pages home and says so, to the broker if there is one.
fn bring_home(number: u32, entry: &mut Entry, session: Option<&mut Session>) -> Result<(), Error> {
    let connected = session
        .as_ref()
        .is_some_and(|session| session.link.number == entry.link);
    if entry.region.is_being_lent() && entry.broker.as_deref().map_or(!connected, Process::has_exited) {
        entry.region.reclaim();
    }
    let home = entry.region.take_home();
    if home == Err(Errno::AGAIN) {
        // The broker is at it.
        entry.standing = Standing::Returning(Instant::now() + NO_ROOM_PAUSE);
        return Ok(());
    }
    if let Err(errno) = home {
        tracing::warn!(%errno, region = number, "no room at home for a region's pages; it is tried again");
        entry.reason = Some(format!("its pages have no room at home ({errno})"));
        entry.standing = Standing::Returning(Instant::now() + NO_ROOM_PAUSE);
        return Ok(());
    }
    entry.reason = None;
    match session {
        Some(session) if connected => {
            entry.standing = Standing::Leaving;
            session.leave(number)
        }
        _ => {
            entry.standing = Standing::Outside(Instant::now());
            Ok(())
        }
    }
}
