//! The SIGSEGV handler: a write to a page that ksmrs protects is answered, everything else goes to whoever handled it before.
//!
//! Raw system calls only: no allocation, no lock, no thread-local storage, no panic. It relies on the registry to find the
//! region and on the protocol for everything that happens to its words. A break never fails and never kills the process: where
//! the kernel has no room, room is made (`room.rs`), and at the very worst the writer sleeps and tries again.

use crate::error::SysError;
use crate::failpoint::{self, Failpoint};
use crate::fork;
use crate::gate::Pass;
use crate::protocol::{Access, Memory, Page, Resolution, Span, Words, dense_block, write_fault};
use crate::registry::{self, Area, Found};
use crate::word::Word;
use crate::{gate, room, sigmask};
use core::ffi::c_void;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use rustix::io::Errno;
use std::ptr;

/// How far a break widens for a thread that writes page after page.
const WIDEST: u32 = 32;
/// The same page, the same word, the same thread, this often in a row: the fault is not ours.
const NOT_OURS_AFTER: u32 = 1000;

/// The same foreign fault is handed on this often in a row before it kills.
const CHAINED_AT_MOST: u32 = 3;

/// What a thread last faulted on. Threads that share a line overwrite each other's and only lose a hint.
struct Last {
    thread: AtomicU32,
    address: AtomicUsize,
    word: AtomicU64,
    repeats: AtomicU32,
    next: AtomicUsize,
    width: AtomicU32,
}

static LAST: [Last; 64] = [const {
    Last {
        thread: AtomicU32::new(0),
        address: AtomicUsize::new(0),
        word: AtomicU64::new(0),
        repeats: AtomicU32::new(0),
        next: AtomicUsize::new(0),
        width: AtomicU32::new(1),
    }
}; 64];

/// Pages that write faults gave memory of their own, since the process began.
pub(crate) static BREAKS: AtomicU64 = AtomicU64::new(0);
/// Pages that ended Detached because there was no room for their break.
pub(crate) static DETACHED: AtomicU64 = AtomicU64::new(0);
/// Who handled SIGSEGV before us, as the kernel tells it; leaked at each change, so that a handler may still be reading it.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
/// The thread that is running the previous handler.
static CHAINING: AtomicU32 = AtomicU32::new(0);
/// Self-sent SIGSEGVs to overlook: a handler that was in front of us passes a fault of ours on by raising the signal, without its
/// address; the write that is retried brings it.
static OVERLOOK: AtomicU32 = AtomicU32::new(0);

/// Pages broken by write faults in this process so far.
pub fn breaks() -> u64 {
    BREAKS.load(Ordering::Relaxed)
}

/// Pages that emergency breaks left outside their object so far.
pub fn detached() -> u64 {
    DETACHED.load(Ordering::Relaxed)
}

/// Installs the handler, or puts it in front again. Cheap when it is there: one system call. True if somebody else was in front.
///
/// # Errors
/// The kernel's errno.
pub fn install() -> Result<bool, SysError> {
    let failed = |_| {
        let errno = Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
        SysError::Call {
            call: "sigaction",
            what: "SIGSEGV",
            errno,
        }
    };
    // SAFETY: sigaction is plain data for which zeros are valid; the pointers are to live locals.
    let current = unsafe {
        let mut current: libc::sigaction = core::mem::zeroed();
        if libc::sigaction(libc::SIGSEGV, ptr::null(), &mut current) != 0 {
            return Err(failed(()));
        }
        current
    };
    let ours = on_fault as *const () as usize;
    if current.sa_sigaction == ours {
        return Ok(false);
    }
    let first = PREVIOUS
        .swap(Box::into_raw(Box::new(current)), Ordering::SeqCst)
        .is_null();
    // SAFETY: as above; the handler is a function of the right type that lives as long as the process.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = ours;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        libc::sigfillset(&mut action.sa_mask);
        if libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) != 0 {
            return Err(failed(()));
        }
        block_everything_in_handler();
    }
    if !first {
        OVERLOOK.store(1, Ordering::SeqCst);
    }
    Ok(!first)
}

/// Gives the installed handler a mask that the C library would not: its own two signals included, SIGSEGV and SIGBUS left open.
///
/// # Safety
/// Our handler was installed just now through the C library, whose return trampoline the kernel's record then names.
unsafe fn block_everything_in_handler() {
    /// The kernel's struct sigaction, on x86-64 and aarch64.
    #[repr(C)]
    struct KernelAction {
        handler: usize,
        flags: u64,
        restorer: usize,
        mask: u64,
    }
    let mut action = KernelAction {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    let size = size_of::<u64>();
    // SAFETY: the structure is the kernel's, live for both calls; what is written is what was read but for the mask.
    unsafe {
        let null = ptr::null::<KernelAction>();
        if libc::syscall(libc::SYS_rt_sigaction, libc::SIGSEGV, null, &raw mut action, size) == 0 {
            action.mask = sigmask::handler_mask();
            libc::syscall(
                libc::SYS_rt_sigaction,
                libc::SIGSEGV,
                &raw const action,
                ptr::null_mut::<KernelAction>(),
                size,
            );
        }
    }
}

/// Whether a fault was a write; where the processor does not say, the word decides.
#[cfg(target_arch = "x86_64")]
unsafe fn is_write(context: *mut c_void) -> bool {
    const WRITE: i64 = 2;
    const FETCH: i64 = 16;
    // SAFETY: the kernel passes a ucontext to an SA_SIGINFO handler.
    let error = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_ERR as usize] };
    error & WRITE != 0 && error & FETCH == 0
}

/// Whether a fault was a write; where the processor does not say, the word decides.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn is_write(_context: *mut c_void) -> bool {
    true
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo to an SA_SIGINFO handler.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let thread = gate::thread_id();
    if code <= 0 {
        // Sent, not faulted.
        if CHAINING.load(Ordering::SeqCst) == thread {
            die(true);
        } else if OVERLOOK.swap(0, Ordering::SeqCst) == 0 {
            chain(signal, info, context, thread, true);
        }
        return;
    }
    // SAFETY: the kernel's context, as above.
    let write = unsafe { is_write(context) };
    let served = match registry::find(address) {
        Some(found) if write => serve(found, address, thread),
        Some(found) => waited(found, address, thread),
        None => registry::changed_since_last_look(thread),
    };
    if served {
        return;
    }
    /// No state word looks like this.
    const FOREIGN: u64 = u64::MAX - 1;
    if LAST[thread as usize % LAST.len()].count(thread, address, FOREIGN) > CHAINED_AT_MOST {
        // Whoever was asked came back without having changed anything: a disabled faulthandler does that for ever.
        return die(false);
    }
    chain(signal, info, context, thread, false);
}

/// Answers any other fault inside a region: at the mapping limit the kernel may unmap a page that somebody maps anew, and say only then
/// that it cannot go on (`insist`), so whoever reads it waits until nobody owns it any more. False if it comes back all the same.
fn waited(found: Found, address: usize, thread: u32) -> bool {
    let area = &found.area;
    let Some(page) = area.view.page_at(address).filter(|_| fork::era() == Some(area.era)) else {
        return false;
    };
    let word = area.words.load(page);
    if word.is_owned() {
        wait_outside(found, page, word);
        return true;
    }
    let last = &LAST[thread as usize % LAST.len()];
    last.count(thread, area.view.page(page) as usize, word.0) < NOT_OURS_AFTER
}

/// Waits until a word is no longer this one, and keeps no region from coming or going meanwhile: it may be for a broker that is stopped.
/// The instruction then faults anew, if it does, and the region is looked for again.
fn wait_outside(found: Found, page: Page, word: Word) {
    let words = found.area.words;
    drop(found);
    // The table is never unmapped. A region that ends wakes who waits; should these be another's words by now, one that is owned or
    // marked there is no less sure to be let go, which wakes too.
    words.wait(page, word);
}

/// Answers a write fault inside a region; false if it is none of ours.
fn serve(found: Found, address: usize, thread: u32) -> bool {
    let area = &found.area;
    let Some(page) = area.view.page_at(address) else {
        return false;
    };
    let last = &LAST[thread as usize % LAST.len()];
    if fork::era() != Some(area.era) {
        return in_unregistered_child(area, page, last, thread);
    }
    // Once per fault, not per round: a break may have to make room several times.
    let start = area.view.page(page) as usize;
    let repeats = last.count(thread, start, area.words.load(page).0);
    if repeats >= NOT_OURS_AFTER {
        return false;
    }
    failpoint::hit(Failpoint::FaultArrived);
    let mut around = around(area, page, last.width(thread, start));
    loop {
        let pass = Pass::enter();
        match write_fault(&area.words, &area.view, page, repeats > 0, around) {
            Resolution::Retry => return true,
            Resolution::Broken(broken) => {
                let end = start + (broken.end.0 - page.0) as usize * crate::object::PAGE_SIZE;
                last.broke(thread, end);
                BREAKS.fetch_add(u64::from(broken.pages), Ordering::Relaxed);
                return true;
            }
            Resolution::Wait(word) => {
                drop(pass);
                last.waits(thread);
                wait_outside(found, page, word);
                return true;
            }
            // Perhaps there is room for what was written.
            Resolution::NoRoom(_) if around.pages > 1 => around = Span::one(page),
            Resolution::NoRoom(_) => {
                let made = room::make(area, page);
                drop(pass);
                if made.is_err() {
                    last.waits(thread);
                    // Whoever ends a region may be the one to make room.
                    drop(found);
                    nap();
                    return true;
                }
            }
        }
    }
}

/// What a break of this page may take along: so many pages from it on for a thread that writes page after page, and the rest of a block that is
/// written in any order.
fn around(area: &Area, page: Page, width: u32) -> Span {
    let end = page.0 + width.min(area.words.pages() - page.0);
    let block = dense_block(&area.words, page).unwrap_or(Span::one(page));
    Span {
        first: block.first,
        pages: end.max(block.end().0) - block.first.0,
    }
}

/// In a child that is not registered: no word is ours, and all that a write needs is a writable mapping, which the kernel copies.
fn in_unregistered_child(area: &Area, page: Page, last: &Last, thread: u32) -> bool {
    let start = area.view.page(page) as usize;
    if last.count(thread, start, u64::MAX) >= NOT_OURS_AFTER {
        return false;
    }
    let whole = Span {
        first: Page(0),
        pages: area.view.pages(),
    };
    [Span::one(page), whole]
        .into_iter()
        .any(|span| area.view.protect(span, Access::ReadWrite).is_ok())
        || {
            nap();
            true
        }
}

pub(crate) fn nap() {
    pause(1_000_000);
}

pub(crate) fn pause(nanoseconds: i64) {
    let time = rustix::thread::Timespec {
        tv_sec: 0,
        tv_nsec: nanoseconds,
    };
    let _ = rustix::thread::nanosleep(&time);
}

impl Last {
    /// How often in a row this thread met this word at this page, before now.
    fn count(&self, thread: u32, address: usize, word: u64) -> u32 {
        let same = self.thread.swap(thread, Ordering::Relaxed) == thread;
        let same = (self.address.swap(address, Ordering::Relaxed) == address) & same;
        let same = (self.word.swap(word, Ordering::Relaxed) == word) & same;
        if !same {
            self.repeats.store(0, Ordering::Relaxed);
            return 0;
        }
        self.repeats.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// How many pages the break of this page may take along.
    fn width(&self, thread: u32, address: usize) -> u32 {
        let sequential = self.thread.load(Ordering::Relaxed) == thread && self.next.load(Ordering::Relaxed) == address;
        let width = if sequential {
            (self.width.load(Ordering::Relaxed) * 2).min(WIDEST)
        } else {
            1
        };
        self.width.store(width, Ordering::Relaxed);
        width
    }

    /// This thread waits for a word or for room, for as long as it takes: its next fault repeats none.
    fn waits(&self, thread: u32) {
        let _ = self
            .thread
            .compare_exchange(thread, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// This thread's break went as far as `next`.
    fn broke(&self, thread: u32, next: usize) {
        if self.thread.load(Ordering::Relaxed) == thread {
            self.repeats.store(0, Ordering::Relaxed);
            self.next.store(next, Ordering::Relaxed);
        }
    }
}

/// Hands the signal to whoever handled it before us.
fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void, thread: u32, sent: bool) {
    // SAFETY: null, or leaked for good by `install`.
    let Some(previous) = (unsafe { PREVIOUS.load(Ordering::SeqCst).as_ref() }) else {
        return die(sent);
    };
    match previous.sa_sigaction {
        libc::SIG_DFL => die(sent),
        // A fault that is ignored would come back for ever; the kernel kills for it too.
        libc::SIG_IGN if !sent => die(false),
        libc::SIG_IGN => {}
        handler => {
            CHAINING.store(thread, Ordering::SeqCst);
            // SAFETY: the kernel told us this handler and its kind; we call it as the kernel would have.
            unsafe {
                if previous.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) = core::mem::transmute(handler);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(i32) = core::mem::transmute(handler);
                    handler(signal);
                }
            }
            CHAINING.store(0, Ordering::SeqCst);
        }
    }
}

/// Lets the signal do what it does by default: at once if it was sent, else when the faulting instruction runs again.
fn die(sent: bool) {
    // SAFETY: plain data, live for the calls; raising a signal in our own thread.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut());
        if sent {
            libc::raise(libc::SIGSEGV);
        }
    }
}
