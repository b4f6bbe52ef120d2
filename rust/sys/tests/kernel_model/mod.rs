//! A kernel of a few dozen lines, and the real protocol code running on it under the model checker.
//!
//! The kernel is one mutex around what is mapped where; every call is atomic, as each is under the mmap lock. What is explored
//! is the order of the calls and of the words, which is where the protocol can go wrong. Contents are two cells a page, so that
//! two writers each own one and any lost or foreign byte shows.

#![allow(dead_code, reason = "each test program uses its part of it")]

use ksmrs_sys::protocol::*;
use ksmrs_sys::{Slot, State, StoreNumber, Word};
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use rustix::io::Errno;

pub const STORE: StoreNumber = StoreNumber(1);
pub type Bytes = [u8; 2];
/// What the frame of slot 0 and up holds; pages start out with the same.
pub const CONTENT: Bytes = [7, 9];
/// What a frame shows after it was freed: nobody may ever see it.
const FREED: Bytes = [0xee, 0xee];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mapping {
    /// The object, or the page's own anonymous memory.
    Own { writable: bool },
    /// A frame; a write, where allowed, copies.
    Frame { slot: u32, writable: bool },
    /// A copy that the kernel made.
    Copied { bytes: Bytes, writable: bool },
}

struct Kernel {
    kind: Kind,
    mapped: Vec<Mapping>,
    /// The object's pages, or anonymous memory; `None` is a hole.
    own: Vec<Option<Bytes>>,
    /// How many holes may still get memory.
    room: usize,
    frames: Vec<Bytes>,
    /// Whatever would split a mapping fails: the mapping limit is reached.
    at_limit: bool,
    /// Whether nobody has opened the object.
    leased: bool,
    /// Pages that were not written since somebody armed them.
    armed: Vec<bool>,
}

/// The broker, as far as one page and one frame go: it acts on one message at a time.
#[derive(Default)]
struct Broker {
    proposed: bool,
    shown: bool,
    freed: bool,
}

pub struct World {
    kernel: Mutex<Kernel>,
    broker: Mutex<Broker>,
    words: Vec<AtomicU64>,
    /// Whoever arms pages has this.
    arming: Mutex<()>,
}

pub struct Window(pub u32);

impl World {
    pub fn new(kind: Kind, pages: usize, at_limit: bool) -> Arc<World> {
        Arc::new(World {
            kernel: Mutex::new(Kernel {
                kind,
                mapped: vec![Mapping::Own { writable: true }; pages],
                own: vec![Some(CONTENT); pages],
                room: usize::MAX,
                // One more than the pages need, to move to.
                frames: vec![CONTENT; pages + 1],
                at_limit,
                leased: true,
                armed: vec![false; pages],
            }),
            broker: Mutex::new(Broker::default()),
            words: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            arming: Mutex::new(()),
        })
    }

    /// A write by the program; the fault handler runs as often as it must.
    pub fn write(&self, page: u32, cell: usize, value: u8) {
        let mut seen = None;
        while !self.try_write(page, cell, value) {
            let word = self.load(Page(page));
            let repeated = seen == Some(word);
            seen = Some(word);
            let around = Span {
                first: Page(0),
                pages: self.pages(),
            };
            match write_fault(self, self, Page(page), repeated, around) {
                Resolution::Retry | Resolution::Broken(_) => {}
                Resolution::Wait(word) => self.wait(Page(page), word),
                Resolution::NoRoom(_) => {
                    detach_stretch(self, self, Page(page)).ok();
                }
            }
        }
        assert_eq!(self.read(page, cell), value, "a write that returned is seen");
    }

    fn try_write(&self, page: u32, cell: usize, value: u8) -> bool {
        let mut kernel = self.kernel.lock().unwrap();
        let page = page as usize;
        match kernel.mapped[page] {
            Mapping::Own { writable: true } => {
                let mut bytes = kernel.own[page].unwrap_or_default();
                bytes[cell] = value;
                kernel.own[page] = Some(bytes);
            }
            Mapping::Frame { slot, writable: true } => {
                let mut bytes = kernel.frames[slot as usize];
                bytes[cell] = value;
                kernel.mapped[page] = Mapping::Copied { bytes, writable: true };
            }
            Mapping::Copied {
                mut bytes,
                writable: true,
            } => {
                bytes[cell] = value;
                kernel.mapped[page] = Mapping::Copied { bytes, writable: true };
            }
            _ => return false,
        }
        kernel.armed[page] = false;
        true
    }

    pub fn read(&self, page: u32, cell: usize) -> u8 {
        let kernel = self.kernel.lock().unwrap();
        let bytes = kernel.shown(page as usize);
        assert_ne!(bytes, FREED, "page {page} shows a frame that was freed");
        bytes[cell]
    }

    pub fn merge(&self, pages: u32, slot: Slot) -> Vec<Verdict> {
        self.merge_before(&mut (), pages, slot)
    }

    /// The same, with a witness.
    fn merge_before(&self, witness: &mut impl Witness, pages: u32, slot: Slot) -> Vec<Verdict> {
        let mut verdicts = vec![Verdict::Busy; pages as usize];
        let run = MergeRun {
            span: Span { first: Page(0), pages },
            store: STORE,
            slot,
        };
        let window = Window(slot.0);
        let window = (slot != Slot::ZERO).then_some(&window);
        merge_run(self, self, run, window, witness, &mut Claims::new(), &mut verdicts).ok();
        verdicts
    }

    /// What the remapper does after an order on a shared region.
    pub fn settle(&self, verdicts: &[Verdict], alone: bool) {
        for (page, verdict) in verdicts.iter().enumerate() {
            if *verdict == Verdict::Merged {
                settle(self, self, Span::one(Page(page as u32)), alone).unwrap();
            }
        }
    }

    /// A whole order of one page: merged, and in a shared region settled.
    fn merge_and_settle(&self) {
        let verdicts = self.merge(1, Slot(0));
        if self.kind() == Kind::Shared {
            self.settle(&verdicts, true);
        }
    }

    /// A whole order of one private page, with a witness.
    fn merge_witnessed(&self) {
        self.merge_before(&mut Watch::of(self), 1, Slot(0));
    }

    /// The first page follows its frame to a copy; the first frame is freed as soon as it did.
    fn migrate(&self) {
        if self.merge(1, Slot(1))[0] == Verdict::Moved {
            self.kernel.lock().unwrap().frames[0] = FREED;
        }
    }

    /// What the broker does while the client seems to stand still; afterwards somebody else uses the object.
    fn lend_and_use(&self, value: u8) {
        let whole = Span {
            first: Page(0),
            pages: self.pages(),
        };
        let complete = |span: Span, word: Word| -> Result<(), Errno> {
            let mut kernel = self.kernel.lock().unwrap();
            for (i, page) in span.iter().enumerate() {
                let bytes = word
                    .frame()
                    .map_or([0, 0], |(_, slot)| kernel.frames[slot.0 as usize + i]);
                kernel.own[page.0 as usize].get_or_insert(bytes);
            }
            Ok(())
        };
        while lend(self, whole, |_| true, complete) != Ok(true) {
            loom::thread::yield_now();
        }
        for home in &mut self.kernel.lock().unwrap().own {
            home.as_mut().expect("the object has all its pages")[1] = value;
        }
    }

    /// What the remapper does when it hears of that.
    fn take_home(&self) {
        let mut before = Box::new([Word::PRIVATE; MAX_RUN]);
        let whole = Span {
            first: Page(0),
            pages: self.pages(),
        };
        while let Err(errno) = leave(self, self, whole, &mut before) {
            assert_eq!(errno, Errno::AGAIN);
            loom::thread::yield_now();
        }
    }

    /// What the scanner does: the word first, the look afterwards.
    pub fn scan(&self, page: u32) -> Option<Evidence> {
        let word = self.load(Page(page));
        let copied = matches!(
            self.kernel.lock().unwrap().mapped[page as usize],
            Mapping::Copied { .. }
        );
        (word.state() == State::Merged && copied).then_some(Evidence { page: Page(page), word })
    }

    /// The broker reads the word when the scan's report arrives, and frees a frame that no page shows and nobody was offered.
    pub fn scan_reported(&self) {
        let mut broker = self.broker.lock().unwrap();
        if matches!(self.load(Page(0)).state(), State::Broken | State::Held) {
            broker.shown = false;
        }
        if !broker.shown && !broker.proposed {
            broker.freed = true;
            self.kernel.lock().unwrap().frames[0] = FREED;
        }
    }

    /// A proposal of frame 0 for page 0, from the order to the answer; none if the frame is gone.
    pub fn merge_by_order(&self) {
        {
            let mut broker = self.broker.lock().unwrap();
            if broker.freed {
                return;
            }
            broker.proposed = true;
        }
        let verdicts = self.merge(1, Slot(0));
        let mut broker = self.broker.lock().unwrap();
        broker.proposed = false;
        broker.shown |= matches!(verdicts[0], Verdict::Merged | Verdict::Moved);
    }

    /// At rest: no word is transient, and every word tells what is mapped.
    pub fn check_at_rest(&self) {
        let kernel = self.kernel.lock().unwrap();
        for (page, mapped) in kernel.mapped.iter().enumerate() {
            let word = self.load(Page(page as u32));
            assert!(!word.state().is_in_motion(), "page {page} left as {word:?}");
            let shared = kernel.kind == Kind::Shared;
            let fits = match (word.state(), mapped) {
                (State::Private, Mapping::Own { writable }) => *writable,
                (State::Merged, Mapping::Frame { slot, writable }) => {
                    word.frame() == Some((STORE, Slot(*slot))) && *writable != shared
                }
                (State::Merged | State::Broken, Mapping::Copied { writable, .. }) => !shared && *writable,
                (State::Detached, Mapping::Frame { writable, .. } | Mapping::Copied { writable, .. }) => {
                    shared && *writable
                }
                (State::Held, Mapping::Own { writable } | Mapping::Copied { writable, .. }) => *writable,
                (State::Zero, Mapping::Own { writable }) => *writable != shared,
                _ => false,
            };
            assert!(fits, "page {page} is {word:?} but mapped as {mapped:?}");
        }
    }
}

/// What remembers writes, as the scanner does, too, in its own time.
struct Watch<'a> {
    world: &'a World,
    alone: Option<loom::sync::MutexGuard<'a, ()>>,
}

impl Watch<'_> {
    fn of(world: &World) -> Watch<'_> {
        Watch { world, alone: None }
    }
}

impl World {
    /// What the scanner does before it reads a page, unless somebody watches.
    fn arm(&self, page: u32) {
        if let Ok(_alone) = self.arming.try_lock() {
            let mut kernel = self.kernel.lock().unwrap();
            kernel.armed[page as usize] = matches!(kernel.mapped[page as usize], Mapping::Own { .. });
        }
    }
}

impl Witness for Watch<'_> {
    fn watch(&mut self, span: Span, tell: impl FnMut(Page)) {
        self.alone = self.world.arming.try_lock().ok();
        if self.alone.is_some() {
            let kernel = self.world.kernel.lock().unwrap();
            span.iter().filter(|page| kernel.armed[page.0 as usize]).for_each(tell);
        }
    }

    fn written(&mut self, span: Span, tell: impl FnMut(Page)) -> bool {
        let kernel = self.world.kernel.lock().unwrap();
        span.iter().filter(|page| !kernel.armed[page.0 as usize]).for_each(tell);
        true
    }
}

impl Kernel {
    fn writable(&self, page: Page) -> bool {
        match self.mapped[page.0 as usize] {
            Mapping::Own { writable } | Mapping::Frame { writable, .. } | Mapping::Copied { writable, .. } => writable,
        }
    }

    /// ENOMEM where one end of the span lies within a mapping and no further mapping may be made.
    fn no_split(&self, span: Span) -> Result<(), Errno> {
        let cuts = |at: u32| {
            at > 0
                && (at as usize) < self.mapped.len()
                && self.writable(Page(at - 1)) == self.writable(Page(at))
                && matches!(self.mapped[at as usize - 1], Mapping::Own { .. })
                    == matches!(self.mapped[at as usize], Mapping::Own { .. })
        };
        if self.at_limit && (cuts(span.first.0) || cuts(span.end().0)) {
            Err(Errno::NOMEM)
        } else {
            Ok(())
        }
    }

    fn shown(&self, page: usize) -> Bytes {
        match self.mapped[page] {
            Mapping::Own { .. } => self.own[page].unwrap_or_default(),
            Mapping::Frame { slot, .. } => self.frames[slot as usize],
            Mapping::Copied { bytes, .. } => bytes,
        }
    }
}

impl Words for World {
    fn pages(&self) -> u32 {
        self.words.len() as u32
    }

    fn load(&self, page: Page) -> Word {
        Word(self.words[page.0 as usize].load(Ordering::SeqCst))
    }

    fn cas(&self, page: Page, from: Word, to: Word) -> bool {
        let word = &self.words[page.0 as usize];
        word.compare_exchange(from.0, to.0, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    fn store(&self, page: Page, word: Word) {
        self.words[page.0 as usize].store(word.0, Ordering::SeqCst);
    }

    fn wait(&self, page: Page, seen: Word) {
        while self.load(page) == seen {
            loom::thread::yield_now();
        }
    }
}

impl Memory for World {
    type Window = Window;

    fn kind(&self) -> Kind {
        self.kernel.lock().unwrap().kind
    }

    fn protect(&self, span: Span, access: Access) -> Result<(), Errno> {
        let mut kernel = self.kernel.lock().unwrap();
        let rw = access == Access::ReadWrite;
        if span.iter().any(|page| kernel.writable(page) != rw) {
            kernel.no_split(span)?;
        }
        for page in span.iter() {
            match &mut kernel.mapped[page.0 as usize] {
                Mapping::Own { writable } | Mapping::Frame { writable, .. } | Mapping::Copied { writable, .. } => {
                    *writable = rw;
                }
            }
        }
        Ok(())
    }

    fn equals(&self, page: Page, window: Option<&Window>, at: u32) -> bool {
        let kernel = self.kernel.lock().unwrap();
        let frame = window.map_or([0, 0], |window| kernel.frames[(window.0 + at) as usize]);
        kernel.shown(page.0 as usize) == frame
    }

    fn map_frames(&self, span: Span, window: &Window, at: u32) -> Result<(), Errno> {
        let mut kernel = self.kernel.lock().unwrap();
        kernel.no_split(span)?;
        let writable = kernel.kind == Kind::Private;
        for (i, page) in span.iter().enumerate() {
            let page = page.0 as usize;
            kernel.mapped[page] = Mapping::Frame {
                slot: window.0 + at + i as u32,
                writable,
            };
            if kernel.kind == Kind::Private {
                kernel.own[page] = None;
            }
        }
        Ok(())
    }

    fn map_zero(&self, span: Span, _plain: bool) -> Result<(), Errno> {
        let mut kernel = self.kernel.lock().unwrap();
        kernel.no_split(span)?;
        let private = kernel.kind == Kind::Private;
        for page in span.iter() {
            let page = page.0 as usize;
            kernel.mapped[page] = Mapping::Own { writable: private };
            kernel.own[page] = None;
        }
        Ok(())
    }

    fn fill_home(&self, span: Span) -> Result<(), Errno> {
        for page in span.iter().map(|page| page.0 as usize) {
            // A copy takes its time.
            let shown = self.kernel.lock().unwrap().shown(page);
            let mut kernel = self.kernel.lock().unwrap();
            if kernel.own[page].is_none() {
                kernel.room = kernel.room.checked_sub(1).ok_or(Errno::NOSPC)?;
            }
            kernel.own[page] = Some(shown);
        }
        Ok(())
    }

    fn map_home(&self, span: Span) -> Result<(), Errno> {
        let mut kernel = self.kernel.lock().unwrap();
        kernel.no_split(span)?;
        for page in span.iter() {
            kernel.mapped[page.0 as usize] = Mapping::Own { writable: true };
        }
        Ok(())
    }

    fn punch_home(&self, span: Span) -> Result<(), Errno> {
        let mut kernel = self.kernel.lock().unwrap();
        for page in span.iter() {
            kernel.own[page.0 as usize] = None;
        }
        Ok(())
    }

    fn copy_own(&self, span: Span) -> Result<(), Errno> {
        let mut kernel = self.kernel.lock().unwrap();
        for page in span.iter() {
            if let Mapping::Frame { slot, writable } = kernel.mapped[page.0 as usize] {
                let bytes = kernel.frames[slot as usize];
                kernel.mapped[page.0 as usize] = Mapping::Copied { bytes, writable };
            }
        }
        Ok(())
    }

    fn make_plain(&self, span: Span) -> Result<(), Errno> {
        let mut kernel = self.kernel.lock().unwrap();
        for page in span.iter() {
            let shown = kernel.shown(page.0 as usize);
            kernel.own[page.0 as usize] = Some(shown);
            kernel.mapped[page.0 as usize] = Mapping::Own { writable: true };
        }
        Ok(())
    }
}

/// Explores every interleaving with at most `switches` forced ones.
pub fn explore(switches: usize, scenario: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(switches);
    builder.max_branches = 20_000;
    builder.check(scenario);
}

fn spawn(world: &Arc<World>, body: impl FnOnce(&World) + 'static) -> loom::thread::JoinHandle<()> {
    let world = world.clone();
    loom::thread::spawn(move || body(&world))
}

/// What a remapper does, against two writers of the first page.
fn against_two_writers(world: &Arc<World>, remap: impl FnOnce(&World) + 'static) {
    let remapper = spawn(world, remap);
    let first = spawn(world, |world| world.write(0, 0, 1));
    world.write(0, 1, 2);
    remapper.join().unwrap();
    first.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [1, 2]);
    world.check_at_rest();
}

/// Remapper against two writers of the same page.
pub fn merge_and_two_writers(kind: Kind) {
    against_two_writers(&World::new(kind, 1, false), World::merge_and_settle);
}

/// Remapper against one writer who writes twice, and a reader of the byte nobody writes.
pub fn merge_and_reader(kind: Kind) {
    let world = World::new(kind, 1, false);
    let remapper = spawn(&world, World::merge_and_settle);
    let writer = spawn(&world, |world| {
        world.write(0, 0, 1);
        world.write(0, 0, 3);
    });
    for _ in 0..2 {
        assert_eq!(world.read(0, 1), CONTENT[1], "a byte that nobody wrote");
    }
    remapper.join().unwrap();
    writer.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [3, CONTENT[1]]);
    world.check_at_rest();
}

/// A merge that compares before it freezes, against two writers of the same page.
pub fn witnessed_merge_and_two_writers() {
    let world = World::new(Kind::Private, 1, false);
    world.arm(0);
    against_two_writers(&world, World::merge_witnessed);
}

/// The same against one writer and a scanner, which arms the page for itself.
pub fn witnessed_merge_and_scanner() {
    let world = World::new(Kind::Private, 1, false);
    world.arm(0);
    let remapper = spawn(&world, World::merge_witnessed);
    let scanner = spawn(&world, |world| world.arm(0));
    world.write(0, 1, 2);
    remapper.join().unwrap();
    scanner.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [CONTENT[0], 2]);
    world.check_at_rest();
}

/// A page that shows a frame moves to a copy of it, under two writers; the first frame is freed as soon as it moved.
pub fn migration_and_two_writers(kind: Kind) {
    let world = World::new(kind, 1, false);
    world.merge_and_settle();
    against_two_writers(&world, World::migrate);
}

/// The same under a reader and somebody who unmerges.
pub fn migration_and_unmerge(kind: Kind) {
    let world = World::new(kind, 1, false);
    world.merge_and_settle();
    let remapper = spawn(&world, World::migrate);
    let program = spawn(&world, |world| unmerge(world, world, Span::one(Page(0))).unwrap());
    for _ in 0..2 {
        assert_eq!([world.read(0, 0), world.read(0, 1)], CONTENT);
    }
    remapper.join().unwrap();
    program.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], CONTENT);
    world.check_at_rest();
}

/// Two pages, a widened break and a writer of the second page.
pub fn widened_break() {
    let world = World::new(Kind::Shared, 2, false);
    let verdicts = world.merge(2, Slot(0));
    world.settle(&verdicts, true);
    let other = spawn(&world, |world| world.write(1, 0, 5));
    world.write(0, 0, 4);
    other.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(1, 0)], [4, 5]);
    assert_eq!([world.read(0, 1), world.read(1, 1)], [CONTENT[1]; 2]);
    world.check_at_rest();
}

/// Three pages of which the middle one has its own memory and is written, while a break of the first takes the last along.
pub fn bridging_break() {
    let world = all_but_one_merged(3);
    let other = spawn(&world, write_the_second);
    let remapper = spawn(&world, |world| {
        let verdicts = world.merge(2, Slot(0));
        world.settle(&verdicts, true);
    });
    world.write(0, 0, 4);
    other.join().unwrap();
    remapper.join().unwrap();
    check_around_the_second(&world, [4, 5, CONTENT[0]]);
}

/// The same the other way round: the last page is written, and the first one is taken along.
pub fn bridging_break_downwards() {
    let world = all_but_one_merged(3);
    let other = spawn(&world, write_the_second);
    world.write(2, 0, 4);
    other.join().unwrap();
    check_around_the_second(&world, [CONTENT[0], 5, 4]);
}

/// A world whose second page alone has its own memory.
fn all_but_one_merged(pages: usize) -> Arc<World> {
    let world = World::new(Kind::Shared, pages, false);
    let verdicts = world.merge(pages as u32, Slot(0));
    world.settle(&verdicts, true);
    break_alone(&world, Page(1));
    world
}

fn write_the_second(world: &World) {
    world.write(1, 0, 5);
    world.write(1, 1, 6);
}

fn check_around_the_second(world: &World, first_cells: [u8; 3]) {
    assert_eq!([0, 1, 2].map(|page| world.read(page, 0)), first_cells);
    assert_eq!([0, 1, 2].map(|page| world.read(page, 1)), [CONTENT[1], 6, CONTENT[1]]);
    world.check_at_rest();
}

/// There is room for one page, and that is for the one that is written; then there is none for a mapping.
pub fn bridging_break_without_room() {
    let world = all_but_one_merged(5);
    let around = Span {
        first: Page(0),
        pages: 4,
    };
    let states = |world: &World| [0, 1, 2, 3, 4].map(|page| world.load(Page(page)).state());
    world.kernel.lock().unwrap().room = 1;
    let answer = write_fault(&*world, &*world, Page(2), false, around);
    assert_eq!(answer, Resolution::NoRoom(Errno::NOSPC));
    let (merged, private) = (State::Merged, State::Private);
    assert_eq!(states(&world), [merged, private, merged, merged, merged]);
    world.check_at_rest();
    break_alone(&world, Page(2));
    let mut kernel = world.kernel.lock().unwrap();
    (kernel.room, kernel.at_limit) = (usize::MAX, true);
    drop(kernel);
    let answer = write_fault(&*world, &*world, Page(0), false, around);
    assert_eq!(answer, Resolution::NoRoom(Errno::NOMEM));
    assert_eq!(states(&world), [merged, private, private, merged, merged]);
    world.check_at_rest();
}

/// Breaks one page as a write to it does that nobody else writes near.
fn break_alone(world: &World, page: Page) {
    let end = page.plus(1);
    assert_eq!(
        write_fault(world, world, page, false, Span::one(page)),
        Resolution::Broken(Broken { pages: 1, end })
    );
}

/// Unmerge against the remapper and a writer: afterwards the page is Held and stays so.
pub fn unmerge_and_writer(kind: Kind) {
    let world = World::new(kind, 1, false);
    let remapper = spawn(&world, World::merge_and_settle);
    let writer = spawn(&world, |world| world.write(0, 0, 1));
    unmerge(&*world, &*world, Span::one(Page(0))).unwrap();
    assert_eq!(world.load(Page(0)).state(), State::Held);
    world.write(0, 1, 2);
    remapper.join().unwrap();
    writer.join().unwrap();
    assert_eq!(
        world.load(Page(0)).state(),
        State::Held,
        "a late order must not merge a held page"
    );
    assert_eq!([world.read(0, 0), world.read(0, 1)], [1, 2]);
    world.check_at_rest();
}

/// Leaving against the remapper and a writer.
pub fn leave_and_writer(kind: Kind) {
    let world = World::new(kind, 1, false);
    let remapper = spawn(&world, World::merge_and_settle);
    let writer = spawn(&world, |world| world.write(0, 0, 1));
    let mut before = Box::new([Word::PRIVATE; MAX_RUN]);
    leave(&*world, &*world, Span::one(Page(0)), &mut before).unwrap();
    remapper.join().unwrap();
    writer.join().unwrap();
    let word = world.load(Page(0));
    assert_eq!((word.state(), word.frame()), (State::Held, None));
    assert_eq!([world.read(0, 0), world.read(0, 1)], [1, CONTENT[1]]);
    world.check_at_rest();
}

/// A slow scan whose evidence is older than an unmerge and a second merge; whoever frees frames believes the words.
pub fn stale_evidence() {
    let world = World::new(Kind::Private, 1, false);
    world.merge_by_order();
    world.write(0, 0, 1);
    let scanner = spawn(&world, |world| {
        if let Some(evidence) = world.scan(0) {
            mark_written(world, evidence);
        }
        world.scan_reported();
    });
    unmerge(&*world, &*world, Span::one(Page(0))).unwrap();
    world.write(0, 0, CONTENT[0]);
    reopen(&*world, &*world, Span::one(Page(0)));
    world.merge_by_order();
    scanner.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], CONTENT);
}

/// The mapping limit: a writer can thaw nothing alone, and a break finds no room.
pub fn at_the_mapping_limit() {
    let world = World::new(Kind::Shared, 2, true);
    let remapper = spawn(&world, |world| {
        world.merge(2, Slot(0));
    });
    world.write(1, 0, 4);
    remapper.join().unwrap();
    world.write(0, 1, 6);
    assert_eq!([world.read(0, 0), world.read(0, 1)], [CONTENT[0], 6]);
    assert_eq!([world.read(1, 0), world.read(1, 1)], [4, CONTENT[1]]);
    world.check_at_rest();
}

/// Another address space holds the object: what was merged goes back to its home.
pub fn not_alone() {
    let world = World::new(Kind::Shared, 1, false);
    let remapper = spawn(&world, |world| {
        let verdicts = world.merge(1, Slot(0));
        world.settle(&verdicts, false);
    });
    world.write(0, 0, 1);
    remapper.join().unwrap();
    assert_eq!(world.load(Page(0)).state(), State::Private);
    assert_eq!([world.read(0, 0), world.read(0, 1)], [1, CONTENT[1]]);
    world.check_at_rest();
}

/// A Detached page is brought home under a writer.
pub fn homecoming() {
    let world = World::new(Kind::Shared, 1, false);
    let verdicts = world.merge(1, Slot(0));
    world.settle(&verdicts, true);
    assert_eq!(detach_stretch(&*world, &*world, Page(0)), Ok(1));
    let writer = spawn(&world, |world| world.write(0, 0, 1));
    bring_home(&*world, &*world, Page(0)).unwrap();
    writer.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [1, CONTENT[1]]);
    world.check_at_rest();
}

/// A Detached page leaves under the remapper, which merges it anew, and a writer.
pub fn detached_leaves() {
    let world = World::new(Kind::Shared, 1, false);
    let verdicts = world.merge(1, Slot(0));
    world.settle(&verdicts, true);
    assert_eq!(detach_stretch(&*world, &*world, Page(0)), Ok(1));
    let writer = spawn(&world, |world| world.write(0, 0, 1));
    let program = spawn(&world, |world| {
        bring_home(world, world, Page(0)).unwrap();
    });
    world.merge_and_settle();
    writer.join().unwrap();
    program.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [1, CONTENT[1]]);
    world.check_at_rest();
}

/// Pages are lent and used by somebody else while the client, which was taken for stopped, writes.
pub fn lent_under_a_writer(pages: u32) {
    let world = World::new(Kind::Shared, pages as usize, false);
    let verdicts = world.merge(pages, Slot(0));
    world.settle(&verdicts, true);
    let broker = spawn(&world, |world| world.lend_and_use(8));
    world.write(0, 0, 1);
    broker.join().unwrap();
    world.write(pages - 1, 0, 2);
    world.take_home();
    assert_eq!(
        [world.read(0, 0), world.read(0, 1)],
        [if pages == 1 { 2 } else { 1 }, 8]
    );
    assert_eq!([world.read(pages - 1, 0), world.read(pages - 1, 1)], [2, 8]);
    world.check_at_rest();
}

/// Pages are lent while they go home.
pub fn lent_while_they_leave() {
    let world = World::new(Kind::Shared, 1, false);
    let verdicts = world.merge(1, Slot(0));
    world.settle(&verdicts, true);
    let broker = spawn(&world, |world| world.lend_and_use(8));
    world.take_home();
    broker.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [CONTENT[0], 8]);
    world.check_at_rest();
}

/// Somebody opens the object in the midst of a merge, and the client is taken for stopped.
pub fn lent_in_a_merge() {
    let world = World::new(Kind::Shared, 1, false);
    let broker = spawn(&world, |world| {
        world.kernel.lock().unwrap().leased = false;
        world.lend_and_use(8);
    });
    let verdicts = world.merge(1, Slot(0));
    let leased = world.kernel.lock().unwrap().leased;
    world.settle(&verdicts, leased);
    broker.join().unwrap();
    world.take_home();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [CONTENT[0], 8]);
    world.check_at_rest();
}

/// A writer that faulted in one freeze and gets to its handler in the next: the page must not end read-only.
pub fn slow_handler(kind: Kind) {
    let world = World::new(kind, 1, false);
    world.write(0, 1, 5);
    let remapper = spawn(&world, |world| {
        world.merge(1, Slot(0));
        world.merge(1, Slot(0));
    });
    world.write(0, 0, 1);
    remapper.join().unwrap();
    assert_eq!([world.read(0, 0), world.read(0, 1)], [1, 5]);
    world.check_at_rest();
}
