//! What a fork does to ksmrs.
//!
//! `fork()` of the C library closes the gate, waits until nobody owns a word, and takes every shared region home; then parent and
//! child see plain shared memory, and private memory exactly as the kernel copies it. A raw clone does none of that and is safe
//! all the same: a page that the kernel wipes in every child (MADV_WIPEONFORK) tells the handler there that no word is its to
//! touch, and the parent's life pages keep whatever the child may still show. What it takes to become a client is in `born.rs`.

use crate::error::SysError;
use crate::object::PAGE_SIZE;
use crate::protocol::{Kind, MAX_RUN, Memory, Page, Resolution, Span, Words, is_being_lent, write_fault};
use crate::sigmask::Blocked;
use crate::word::State;
use crate::{born, futex, gate, heap, registry, room, signal};
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;

/// A page that holds the era of the process that made it, and zero in every child of it.
static MARKER: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());
/// Eras begun in this process and its ancestors.
static ERAS: AtomicU32 = AtomicU32::new(0);
/// Forks that went through the gate.
static FORKS: AtomicU32 = AtomicU32::new(0);
/// Pages that fork() could not take home and left Detached.
static DETACHED_BY_FORK: AtomicU64 = AtomicU64::new(0);
/// Called in the child of a fork() of the C library.
static IN_CHILD: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// The life that this process leads with ksmrs; `None` before its first and in a child that has not begun its own.
pub(crate) fn era() -> Option<u32> {
    // SAFETY: null, or a page that is never unmapped.
    let marker = unsafe { MARKER.load(Ordering::Acquire).as_ref() }?;
    match marker.load(Ordering::Acquire) {
        0 => None,
        era => Some(era),
    }
}

/// Whether this is the life of that number.
pub fn is_life(life: u32) -> bool {
    era() == Some(life)
}

/// Whether this process is a child that has not begun a life of its own with ksmrs, or never used it.
pub fn is_unregistered() -> bool {
    era().is_none()
}

/// From now on `in_child` is called in children of fork(), so that they forget their parent's threads, and told whether the parent had
/// begun a life. What a thread is at when its process forks is only safe where this was called before.
///
/// # Errors
/// The C library has no memory for it.
pub fn expect_children(in_child: fn(bool)) -> Result<(), SysError> {
    static REGISTERED: OnceLock<libc::c_int> = OnceLock::new();
    IN_CHILD.store(in_child as *mut (), Ordering::Release);
    let registered = REGISTERED.get_or_init(|| {
        // SAFETY: three functions that live as long as the process (the extension module is never unloaded).
        unsafe { libc::pthread_atfork(Some(prepare), Some(in_parent), Some(in_the_child)) }
    });
    match *registered {
        0 => Ok(()),
        errno => Err(SysError::Call {
            call: "pthread_atfork",
            what: "fork handlers",
            errno: rustix::io::Errno::from_raw_os_error(errno),
        }),
    }
}

/// Begins a life: in a fresh process, and in a child that wants regions of its own. `in_child` as for [`expect_children`]. The caller sees
/// to it that only one thread does this.
///
/// # Errors
/// The kernel refused a page, or to wipe it in children (before Linux 4.14): merging is unsafe there.
pub fn begin_life(in_child: fn(bool)) -> Result<u32, SysError> {
    if let Some(era) = era() {
        return Ok(era);
    }
    if MARKER.load(Ordering::Acquire).is_null() {
        MARKER.store(map_marker()?, Ordering::Release);
    }
    gate::reset();
    futex::forget_waiters();
    registry::reset_readers();
    expect_children(in_child)?;
    let era = ERAS.fetch_add(1, Ordering::SeqCst) + 1;
    // SAFETY: mapped above or by an ancestor; never unmapped.
    unsafe { &*MARKER.load(Ordering::Acquire) }.store(era, Ordering::Release);
    Ok(era)
}

fn map_marker() -> Result<*mut AtomicU32, SysError> {
    const WHAT: &str = "fork marker";
    // SAFETY: a fresh zeroed page where the kernel likes.
    let page = unsafe {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        rustix::mm::mmap_anonymous(ptr::null_mut(), PAGE_SIZE, access, MapFlags::PRIVATE)
    }
    .map_err(SysError::call("mmap", WHAT))?;
    // SAFETY: the page mapped above; only children see a difference.
    if let Err(errno) = unsafe { rustix::mm::madvise(page, PAGE_SIZE, Advice::LinuxWipeOnFork) } {
        // SAFETY: as above; nobody has seen it.
        let _ = unsafe { rustix::mm::munmap(page, PAGE_SIZE) };
        return Err(SysError::call("madvise(MADV_WIPEONFORK)", WHAT)(errno));
    }
    Ok(page.cast())
}

/// How often this process forked: read before asking whether it is alone, and compared behind the gate.
pub fn count() -> u32 {
    FORKS.load(Ordering::SeqCst)
}

/// Pages that a fork could not take home so far.
pub fn detached_by_fork() -> u64 {
    DETACHED_BY_FORK.load(Ordering::Relaxed)
}

extern "C" fn prepare() {
    // What this process inherited and made nothing of; its own children cannot either.
    born::forget();
    // The first lock of all: the heap makes and ends regions.
    let heap = heap::still();
    if is_unregistered() {
        HELD.set(Some(Held {
            rest: None,
            _heap: heap,
        }));
        return;
    }
    let blocked = Blocked::new();
    // The registry's lock first: a thread that publishes a region waits for handlers, and a handler may wait at the gate.
    let registry = registry::lock();
    gate::close();
    FORKS.fetch_add(1, Ordering::SeqCst);
    registry::for_each(&registry, |area| {
        if Some(area.era) == era() && area.view.kind() == Kind::Shared {
            take_home(area);
        }
    });
    let snapshot = born::snapshot(&registry);
    HELD.set(Some(Held {
        rest: Some(Rest {
            _registry: registry,
            _blocked: blocked,
            snapshot,
        }),
        _heap: heap,
    }));
}

/// Does something while nobody owns a word, no region comes or goes, and nobody forks.
pub(crate) fn while_still<T>(act: impl FnOnce(&registry::Writer) -> T) -> T {
    let _blocked = Blocked::new();
    // In the same order as `prepare`.
    let registry = registry::lock();
    gate::close();
    let done = act(&registry);
    gate::open();
    done
}

/// What the forking thread holds from `prepare` on; fields drop in this order.
struct Held {
    /// Nothing more in a process without a life.
    rest: Option<Rest>,
    _heap: heap::Still,
}

/// What it holds of a life.
struct Rest {
    _registry: registry::Writer,
    _blocked: Blocked,
    /// What the child may be born with; the parent unmaps it.
    snapshot: Option<born::Snapshot>,
}

thread_local! {
    static HELD: Cell<Option<Held>> = const { Cell::new(None) };
}

/// Gives every merged page of a shared region its home back, so that parent and child share all of it.
fn take_home(area: &registry::Area) {
    /// Milliseconds for which pages are waited for that the broker owns: it may have died, and the remapper stand at the gate.
    const PATIENCE: u32 = 2000;
    let mut page = Page(0);
    let mut waited = 0;
    while page.0 < area.words.pages() {
        let word = area.words.load(page);
        if is_being_lent(word) && waited < PATIENCE {
            signal::nap();
            waited += 1;
            continue;
        }
        let lent = word.state() == State::Homed && word.is_lent();
        if !lent && !matches!(word.state(), State::Merged | State::Zero) {
            page = page.plus(1);
            continue;
        }
        let rest = Span {
            first: page,
            pages: (area.words.pages() - page.0).min(MAX_RUN as u32),
        };
        match write_fault(&area.words, &area.view, page, false, rest) {
            Resolution::Broken(broken) => page = broken.end,
            Resolution::NoRoom(_) => match room::make(area, page) {
                Ok(pages) => drop(DETACHED_BY_FORK.fetch_add(u64::from(pages), Ordering::Relaxed)),
                Err(_) => signal::nap(),
            },
            Resolution::Retry | Resolution::Wait(_) => {}
        }
    }
}

extern "C" fn in_parent() {
    if let Some(held) = HELD.take() {
        if held.rest.is_some() {
            gate::open();
        }
        drop(held);
    }
}

extern "C" fn in_the_child() {
    let Some(Held { rest, _heap: heap }) = HELD.take() else {
        return;
    };
    let lived = rest.is_some();
    let snapshot = rest.and_then(|mut rest| rest.snapshot.take());
    drop(heap);
    if lived {
        gate::reset();
        futex::forget_waiters();
        registry::reset_readers();
    }
    let in_child = IN_CHILD.load(Ordering::Acquire);
    if !in_child.is_null() {
        // SAFETY: stored by expect_children from a fn(bool) of this very type.
        let in_child = unsafe { core::mem::transmute::<*mut (), fn(bool)>(in_child) };
        in_child(lived);
    }
    if lived {
        born::keep(snapshot);
    }
}
