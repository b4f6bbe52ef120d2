//! Dirty tracking: which pages nobody wrote since they were last read, so that a scan need not read them again.
//!
//! Memory that is registered with a userfaultfd in its asynchronous write-protect mode can be *armed*, page by page (`pagemap.rs`): the
//! kernel resolves the first write to an armed page by itself and forgets that it was armed. An armed page is as it was when it was
//! armed, as far as this mapping goes; the scan arms first and reads then, so its checksum is that of those bytes or newer, and a
//! write in between only has the page read again.
//!
//! It does not see what is written through another mapping, a descriptor, or by a device that pinned the page before it was armed, so
//! every page is read now and then all the same. A merge takes its word for one thing: that private pages were not written between
//! their comparison and the freeze (`watch.rs`).
//!
//! Memory is registered in *units*, the 2 MiB that a huge page could be, and never where it is made of huge pages, for the first write
//! to an armed one splits it. A unit is registered whole, or, where some of it is merged, in the stretches between, whose ends
//! are ends of mappings already: the mappings of frames are left as they are. Whatever is mapped over a page (a frame, a home page) is
//! registered no more, until the unit is registered anew. A unit in which most pages are written between two looks costs more than
//! reading it, and is left alone for a while.
//!
//! One thread of the client owns the [`Userfault`], at the program's priority, for registering takes the lock that page faults
//! wait for. A forked child has none of it: neither the descriptor, nor registered memory, nor armed pages.

use crate::error::{SysError, last_errno};
use crate::mapping::View;
use crate::pagemap::Pagemap;
use crate::protocol::{Kind, MAX_RUN, Page, Span, Words};
use crate::region::Region;
use crate::word::State;
use crate::{object::PAGE_SIZE, sysctl};
use core::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU16, Ordering};
use linux_raw_sys::general as raw;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `_IOWR(UFFDIO, number, type)`; the C headers of older systems lack the types.
const fn request<T>(direction: u64, number: u32) -> libc::Ioctl {
    (direction << 30 | (size_of::<T>() as u64) << 16 | (raw::UFFDIO as u64) << 8 | number as u64) as libc::Ioctl
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const UFFDIO_API: libc::Ioctl = request::<raw::uffdio_api>(READ_WRITE, raw::_UFFDIO_API);
const UFFDIO_REGISTER: libc::Ioctl = request::<raw::uffdio_register>(READ_WRITE, raw::_UFFDIO_REGISTER);
const UFFDIO_UNREGISTER: libc::Ioctl = request::<raw::uffdio_range>(READ, raw::_UFFDIO_UNREGISTER);

const WHAT: &str = "dirty tracking";

/// The userfaultfd that this process's memory is registered with. Dropping it ends all registrations: nothing is armed any more.
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Opens one. In a thread with a descriptor table of its own. It needs no privilege: faults of the kernel are never handed to it.
    ///
    /// # Errors
    /// A kernel without userfaultfd or its asynchronous mode (EINVAL, before Linux 6.7), or a filter that forbids it.
    pub fn open() -> Result<Userfault, SysError> {
        let flags = raw::UFFD_USER_MODE_ONLY | libc::O_CLOEXEC as u32 | libc::O_NONBLOCK as u32;
        // SAFETY: no pointers; the descriptor that comes back is nobody else's.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, flags);
            if fd < 0 {
                return Err(SysError::call("userfaultfd", WHAT)(last_errno()));
            }
            OwnedFd::from_raw_fd(fd as i32)
        };
        let mut api = raw::uffdio_api {
            api: raw::UFFD_API.into(),
            features: raw::UFFD_FEATURE_WP_ASYNC.into(),
            ioctls: 0,
        };
        let fault = Userfault { fd };
        fault.ask(UFFDIO_API, &mut api, "ioctl(UFFDIO_API)")?;
        Ok(fault)
    }

    fn ask<T>(&self, request: libc::Ioctl, argument: &mut T, call: &'static str) -> Result<(), SysError> {
        // SAFETY: the argument is the request's, and lives through the call. What it does to memory changes no byte and no protection:
        // in the asynchronous mode nobody ever has to answer a fault.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument as *mut T) } {
            0 => Ok(()),
            _ => Err(SysError::call(call, WHAT)(last_errno())),
        }
    }

    fn register(&self, view: &View, span: Span) -> Result<(), SysError> {
        let mut argument = raw::uffdio_register {
            range: range(view, span),
            mode: raw::UFFDIO_REGISTER_MODE_WP.into(),
            ioctls: 0,
        };
        self.ask(UFFDIO_REGISTER, &mut argument, "ioctl(UFFDIO_REGISTER)")
    }

    fn unregister(&self, view: &View, span: Span) -> Result<(), SysError> {
        self.ask(UFFDIO_UNREGISTER, &mut range(view, span), "ioctl(UFFDIO_UNREGISTER)")
    }
}

fn range(view: &View, span: Span) -> raw::uffdio_range {
    raw::uffdio_range {
        start: view.page(span.first) as u64,
        len: span.pages as u64 * PAGE_SIZE as u64,
    }
}

/// Pages of a unit: a huge page's, at its place.
const UNIT_PAGES: u32 = MAX_RUN as u32;

/// A unit's number: registered or not.
const REGISTERED: u16 = 1 << 15;
/// Registered since it was last looked at: its pages are unarmed because they are new, not because they were written.
const FRESH: u16 = 1 << 14;
/// How often it was given up for being written too much, 6 at most.
const STRIKES: u16 = 7 << 8;
const STRIKE: u16 = 1 << 8;
/// Looks that it sits out before it is registered (again).
const REST: u16 = 0xff;

/// The shortest stretch of pages between merged ones that is worth a system call.
const SHORTEST: u32 = 32;
/// Looks until a unit that could be registered only in part is looked through again.
const PARTLY: u16 = 8;

/// Stretches of registered units in this process: each may cut a mapping in three.
static STRETCHES: AtomicI64 = AtomicI64::new(0);

/// Something may be registered.
const ANY: u8 = 1;
/// Nothing may be from now on: the region is ending.
const ENDS: u8 = 2;

/// What a region knows of its registrations.
pub(crate) struct Tracking {
    /// [`ANY`] and [`ENDS`] in one word: whoever registers and whoever ends it agree on who was first.
    state: AtomicU8,
    /// Whether somebody arms pages, or relies on those that it armed.
    arming: AtomicBool,
    units: Box<[AtomicU16]>,
    /// Pages of the first unit that lie before the region.
    position: u32,
}

impl Tracking {
    pub(crate) fn of(view: &View) -> Tracking {
        let position = (view.base() / PAGE_SIZE % MAX_RUN) as u32;
        let units = (u64::from(position) + u64::from(view.pages())).div_ceil(UNIT_PAGES.into());
        Tracking {
            state: AtomicU8::new(0),
            arming: AtomicBool::new(false),
            units: (0..units).map(|_| AtomicU16::new(0)).collect(),
            position,
        }
    }

    /// Whether some of the region may be registered.
    pub(crate) fn any(&self) -> bool {
        self.state.load(Ordering::Acquire) & ANY != 0
    }

    fn ends(&self) -> bool {
        self.state.load(Ordering::Acquire) & ENDS != 0
    }

    /// The right to register something, unless that is to end.
    fn begin(&self) -> bool {
        let begun = |state| (state & ENDS == 0).then_some(state | ANY);
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, begun)
            .is_ok()
    }

    /// In a forked child: nothing is registered.
    pub(crate) fn reset(&self) {
        self.forget();
        self.state.store(0, Ordering::Relaxed);
        self.arming.store(false, Ordering::Relaxed);
        STRETCHES.store(0, Ordering::Relaxed);
    }

    /// Whether the units of a span are registered, as far as they can be.
    pub(crate) fn is_registered(&self, span: Span) -> bool {
        let units = self.index(span.first)..=self.index(Page(span.end().0 - 1));
        self.any()
            && units
                .clone()
                .all(|index| self.units[index].load(Ordering::Relaxed) & REGISTERED != 0)
    }

    /// The right to arm pages, unless somebody has it: to arm a page is to forget that it was written.
    pub(crate) fn arming(&self) -> Option<Arming<'_>> {
        // Only who got it may make one: what is dropped gives the right back.
        let taken = self.arming.swap(true, Ordering::Acquire);
        (!taken).then(|| Arming(self))
    }

    fn index(&self, page: Page) -> usize {
        ((u64::from(self.position) + u64::from(page.0)) / u64::from(UNIT_PAGES)) as usize
    }

    fn unit(&self, page: Page) -> &AtomicU16 {
        &self.units[self.index(page)]
    }

    /// The pages of the region that are in the same unit.
    fn span(&self, page: Page, pages: u32) -> Span {
        let index = self.index(page) as u64 * u64::from(UNIT_PAGES);
        let first = index.saturating_sub(self.position.into()) as u32;
        let end = (index + u64::from(UNIT_PAGES) - u64::from(self.position)).min(pages.into()) as u32;
        Span {
            first: Page(first),
            pages: end - first,
        }
    }

    /// Notes that nothing is registered any more.
    pub(crate) fn forget(&self) {
        self.state.fetch_and(!ANY, Ordering::AcqRel);
        for index in 0..self.units.len() {
            self.set_registered(index, false);
        }
    }

    /// Notes whether a unit is registered, and how many stretches of such there are.
    fn set_registered(&self, index: usize, registered: bool) {
        let is = |index: Option<usize>| {
            let unit = index.and_then(|index| self.units.get(index));
            unit.is_some_and(|unit| unit.load(Ordering::Relaxed) & REGISTERED != 0)
        };
        if is(Some(index)) != registered {
            let joined = i64::from(is(index.checked_sub(1))) + i64::from(is(index.checked_add(1)));
            let more = if registered { 1 - joined } else { joined - 1 };
            STRETCHES.fetch_add(more, Ordering::Relaxed);
        }
        let (on, off) = if registered {
            (REGISTERED | FRESH, REST)
        } else {
            (0, REGISTERED | FRESH)
        };
        self.change(index, |unit| unit & !off | on);
    }

    fn change(&self, index: usize, change: impl Fn(u16) -> u16) {
        // The scanner judges while the userfaultfd's thread registers.
        let _ = self.units[index].fetch_update(Ordering::Relaxed, Ordering::Relaxed, |unit| Some(change(unit)));
    }

    /// Leaves a unit alone for so many looks.
    fn rest(&self, index: usize, looks: u16) {
        self.change(index, |unit| unit & !REST | looks.min(REST));
    }
}

/// The right to arm pages of a region; others do without it meanwhile, for nobody waits who may be at low priority.
pub(crate) struct Arming<'a>(&'a Tracking);

impl Drop for Arming<'_> {
    fn drop(&mut self) {
        self.0.arming.store(false, Ordering::Release);
    }
}

/// The stretches of registered units that a process may have: each costs two mappings, and the program needs those.
fn most_stretches() -> i64 {
    i64::try_from(sysctl::max_map_count() / 32).unwrap_or(i64::MAX)
}

/// What a scan saw of the pages of one unit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Look {
    /// Pages that were unwritten, by tracking.
    pub(crate) clean: u32,
    /// Pages that were armed, and read.
    pub(crate) armed: u32,
    /// Pages that were read for want of being registered.
    pub(crate) unarmed: u32,
    /// How many of all that were read had another checksum.
    pub(crate) changed: u32,
}

/// What should become of a unit, by how it was written lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The unit's pages.
    pub unit: Span,
    /// Whether it should be registered, else not.
    pub track: bool,
}

impl Region {
    /// Judges the unit that a span lies in by what a scan of the span saw; `None`: let it be as it is. A span of less than half
    /// a unit says too little.
    pub(crate) fn judge(&self, span: Span, look: Look) -> Option<Wish> {
        let tracking = &self.tracking;
        let unit = tracking.span(span.first, self.pages());
        if span.end() > unit.end() || span.pages * 2 < unit.pages || tracking.ends() {
            return None;
        }
        let index = tracking.index(span.first);
        let now = tracking.unit(span.first).load(Ordering::Relaxed);
        let read = look.armed + look.unarmed;
        let quiet = look.changed * 8 <= read + look.clean;
        if now & REGISTERED != 0 && look.armed + look.clean > 0 {
            tracking.change(index, |unit| unit & !FRESH);
            let hot = now & FRESH == 0 && look.armed * 2 > look.clean + look.armed;
            if hot {
                let strikes = (now & STRIKES).min(5 * STRIKE) + STRIKE;
                tracking.change(index, |unit| unit & !STRIKES | strikes);
                tracking.rest(index, 2 << (strikes / STRIKE));
                return Some(Wish { unit, track: false });
            }
            if quiet {
                tracking.change(index, |unit| unit - (unit & STRIKES).min(STRIKE));
            }
        }
        if now & REST != 0 {
            tracking.rest(index, (now & REST) - 1);
            return None;
        }
        (quiet && look.unarmed > 0).then_some(Wish { unit, track: true })
    }

    /// Whether every page of a span has memory of its own now, or none, in a mapping that shows no frame.
    fn is_own(&self, span: Span) -> bool {
        span.iter().all(|page| {
            let word = self.words.load(page);
            match (word.state(), self.kind()) {
                (State::Private | State::Held, Kind::Shared) => word.frame().is_none(),
                (State::Private | State::Held | State::Broken | State::Zero, Kind::Private) => true,
                _ => false,
            }
        })
    }

    /// The next stretch of a unit from a page on that can be registered without cutting the mapping of a frame.
    fn next_stretch(&self, unit: Span, from: Page) -> Option<Span> {
        if self.is_own(unit) {
            return (from == unit.first).then_some(unit);
        }
        let apart = |page: &Page| self.words.load(*page).frame().is_none() && self.is_own(Span::one(*page));
        let mut next = from;
        while next < unit.end() {
            let end = (next.0..unit.end().0).map(Page).find(|page| !apart(page));
            let span = Span {
                first: next,
                pages: end.unwrap_or(unit.end()).0 - next.0,
            };
            if span.pages >= SHORTEST {
                return Some(span);
            }
            next = span.end().plus(1);
        }
        None
    }

    /// Does what a scan wished. For the thread that has the userfaultfd.
    ///
    /// # Errors
    /// The kernel refused, at the limit of mappings for one; the unit is left alone for long.
    pub fn fulfil(&self, wish: Wish, fault: &Userfault, pagemap: &Pagemap) -> Result<(), SysError> {
        let index = self.tracking.index(wish.unit.first);
        let done = self.merging(|_| {
            if self.tracking.ends() {
                return Ok(());
            }
            if !wish.track {
                self.tracking.set_registered(index, false);
                return fault.unregister(&self.view, wish.unit);
            }
            if STRETCHES.load(Ordering::Relaxed) >= most_stretches() || pagemap.any_huge(&self.view, wish.unit)? {
                self.tracking.rest(index, REST);
                return Ok(());
            }
            let mut from = wish.unit.first;
            while let Some(span) = self.next_stretch(wish.unit, from) {
                from = span.end();
                if !self.tracking.begin() {
                    return Ok(());
                }
                fault.register(&self.view, span)?;
                if self.next_stretch(span, span.first) != Some(span) {
                    // A frame was mapped meanwhile, perhaps before the stretch was registered: then it is now, which would keep its
                    // neighbours' faults and huge pages from it.
                    fault.unregister(&self.view, span)?;
                    continue;
                }
                self.tracking.set_registered(index, true);
            }
            if from < wish.unit.end() {
                self.tracking.rest(index, PARTLY);
            }
            Ok(())
        });
        done.unwrap_or(Ok(())).inspect_err(|_| self.tracking.rest(index, REST))
    }

    /// From now on none of it is registered, until [`Region::resume_tracking`]; what may be still is for [`Region::untrack`]. False
    /// if that has nothing to do.
    pub fn end_tracking(&self) -> bool {
        let before = self.tracking.state.fetch_or(ENDS, Ordering::AcqRel);
        self.is_ours() && before & ANY != 0
    }

    /// Ends all its registrations, after [`Region::end_tracking`]. For the thread that has the userfaultfd, and that fulfils no wish
    /// meanwhile.
    ///
    /// # Errors
    /// The kernel refused; dropping the userfaultfd ends them too.
    pub fn untrack(&self, fault: &Userfault) -> Result<(), SysError> {
        debug_assert!(self.tracking.ends(), "it may be registered again");
        let done = self.open(|_| match self.tracking.any() {
            true => fault.unregister(&self.view, self.whole()),
            false => Ok(()),
        });
        done.unwrap_or(Ok(()))?;
        self.tracking.forget();
        Ok(())
    }

    /// Notes that the userfaultfd is closed, after [`Region::end_tracking`].
    pub fn forget_tracking(&self) {
        self.tracking.forget();
    }

    /// The region goes on after all.
    pub fn resume_tracking(&self) {
        self.tracking.state.fetch_and(!ENDS, Ordering::AcqRel);
    }

    /// Pages of units that are registered now.
    pub fn tracked_pages(&self) -> u32 {
        let units = 0..self.tracking.units.len();
        let registered = units.filter(|index| self.tracking.units[*index].load(Ordering::Relaxed) & REGISTERED != 0);
        let first = |index: usize| {
            let page = (index as u64 * u64::from(UNIT_PAGES)).saturating_sub(self.tracking.position.into());
            Page(page as u32)
        };
        registered
            .map(|index| self.tracking.span(first(index), self.pages()).pages)
            .sum()
    }
}

/// Why it does not work here, in words for people.
pub fn refusal(error: &SysError) -> String {
    match error.errno().map(Errno::from_raw_os_error) {
        Some(Errno::INVAL | Errno::NOSYS) => format!("{error}: needs Linux 6.7 with userfaultfd"),
        Some(Errno::PERM) => {
            format!("{error}: forbidden in this process (a seccomp filter, as containers have, or the like)")
        }
        _ => error.to_string(),
    }
}
