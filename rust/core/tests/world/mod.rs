//! A small stand-in for clients, broker and kernel around a real [`Core`], and the naive model it is held against.
//!
//! Page contents are words of a dictionary. Clients run their orders in two steps, so that anything can happen between the
//! work and its report: writes, forks, turns of the life page, stops, deaths. Every punch, fill and read is checked against
//! what pages must show. Nothing here knows how core works.
#![allow(dead_code, reason = "each test uses its part")]

mod born;
mod orders;

use ksmrs_core::{
    Checksum, Class, ClientId, Core, Decision, Epoch, Kind, MergeTicket, Next, Observation, OrderId, PageNumber,
    PageRange, RegionId, Run, RunFailure, RunOutcome, Seen, Slot,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// 0 is the zero page; 5 and 6 have one checksum.
pub type Content = u32;
pub const CONTENTS: Content = 8;
pub const SLOTS: u32 = 2048;

pub fn checksum_of(content: Content) -> Checksum {
    let distinct = if content == 6 { 5 } else { content };
    Checksum((u64::from(distinct) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & Checksum::MASK)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Private,
    Merged(Slot),
    Zero,
    Broken(Slot),
    /// Of a shared region: a private copy of the frame, once it is written.
    Detached(Slot),
    Held(Option<Slot>),
}

#[derive(Clone, Copy, Debug)]
struct Page {
    word: Word,
    /// Memory of its own; in a private region a merged page that was written has some before its word says so, a detached page has
    /// none before it is written.
    own: Option<Content>,
    /// What the program must read.
    must: Content,
    /// As the scanner left it: value, and the pass in which it took that.
    checksum: Option<(Checksum, u16)>,
    /// Where its memory is.
    node: u8,
}

impl Page {
    fn slot(&self) -> Option<Slot> {
        match self.word {
            Word::Merged(slot) | Word::Broken(slot) | Word::Detached(slot) | Word::Held(Some(slot)) => Some(slot),
            _ => None,
        }
    }

    /// What broker and core read there.
    fn seen(&self) -> Seen {
        match self.word {
            Word::Private => Seen::Own,
            Word::Merged(slot) => Seen::Merged(slot),
            Word::Zero => Seen::Zero,
            Word::Broken(slot) => Seen::Broken(slot),
            Word::Detached(slot) => Seen::Detached(slot),
            Word::Held(slot) => Seen::Held(slot),
        }
    }
}

#[derive(Clone, Debug)]
enum Report {
    Scan {
        ranges: Vec<PageRange>,
        pass: u16,
        nodes: bool,
    },
    Stage {
        pages: Vec<PageNumber>,
        copies: Vec<Option<Content>>,
    },
    Map {
        runs: Vec<Run>,
        /// Runs of shared regions were not tried.
        alone: bool,
    },
    Unmap {
        ranges: Vec<PageRange>,
    },
}

#[derive(Clone, Debug)]
struct Open {
    order: OrderId,
    report: Report,
    done: bool,
}

struct Area {
    kind: Kind,
    range: PageRange,
}

#[derive(Default)]
struct Process {
    pages: BTreeMap<u32, Page>,
    areas: BTreeMap<RegionId, Area>,
    open: Vec<Open>,
    epoch: u32,
    children: Vec<Child>,
    stopped: bool,
    dead: bool,
    lies: bool,
    /// Another address space has its shared regions mapped.
    accompanied: bool,
}

fn is_shared(areas: &BTreeMap<RegionId, Area>, number: u32) -> bool {
    let shared = |area: &Area| area.kind == Kind::Shared && within(area.range, number);
    areas.values().any(shared)
}

/// What a forked child still shows, and the epoch of its fork.
struct Child {
    epoch: u32,
    pages: BTreeMap<u32, Page>,
    areas: Vec<PageRange>,
}

/// Core, the store and all processes.
pub struct World {
    pub core: Core,
    pub now: Duration,
    store: Vec<Option<Content>>,
    processes: BTreeMap<ClientId, Process>,
    next_client: u32,
    dice: u64,
    pub tickets: Vec<MergeTicket>,
    /// Every run ever proposed.
    pub runs: Vec<Run>,
    /// Scan orders, ever.
    pub scans: usize,
    /// The node that each frame's memory was asked for on.
    filled_on: BTreeMap<Slot, Option<u8>>,
    /// Frames copied, ever.
    pub moves: usize,
    /// At most so many at once.
    pub largest_move: usize,
    /// Whether the store cannot be written now and then.
    pub disk_trouble: bool,
    /// Nodes began or ceased to count while children may still have shown frames of before: who shows one has no equals.
    pub mixed: bool,
}

impl World {
    pub fn new(seed: u64) -> World {
        World::with_slots(seed, SLOTS)
    }

    pub fn with_slots(seed: u64, slots: u32) -> World {
        let core = Core::new(slots, checksum_of(0));
        World {
            core,
            now: Duration::ZERO,
            store: vec![None; slots as usize],
            runs: Vec::new(),
            scans: 0,
            filled_on: BTreeMap::new(),
            moves: 0,
            largest_move: 0,
            disk_trouble: true,
            mixed: false,
            processes: BTreeMap::new(),
            next_client: 0,
            dice: seed | 1,
            tickets: Vec::new(),
        }
    }

    pub fn roll(&mut self, sides: u32) -> u32 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        (self.dice >> 33) as u32 % sides
    }

    pub fn client(&mut self, n: usize) -> Option<ClientId> {
        let ids: Vec<ClientId> = self.processes.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[n % ids.len()])
    }

    fn process(&mut self, id: ClientId) -> &mut Process {
        self.processes.get_mut(&id).expect("a process")
    }

    pub fn join_client(&mut self, lies: bool) -> ClientId {
        self.next_client += 1;
        let id = ClientId(self.next_client);
        self.core.client_joined(id);
        self.processes.insert(
            id,
            Process {
                lies,
                ..Process::default()
            },
        );
        id
    }

    pub fn join_region(
        &mut self,
        id: ClientId,
        kind: Kind,
        pages: u32,
        position: u16,
        content: impl Fn(u32) -> Content,
    ) {
        if self.process(id).dead {
            return;
        }
        let (region, first) = self.core.region_joined(id, kind, pages, position).expect("a region");
        assert_eq!(first.position(), position);
        let process = self.process(id);
        for i in 0..pages {
            let must = content(i);
            let page = Page {
                word: Word::Private,
                own: Some(must),
                must,
                checksum: None,
                node: 0,
            };
            assert!(
                process.pages.insert(first.0 + i, page).is_none(),
                "a page number was given twice"
            );
        }
        process.areas.insert(
            region,
            Area {
                kind,
                range: PageRange { first, pages },
            },
        );
    }

    pub fn leave_region(&mut self, id: ClientId, n: usize) {
        let process = self.process(id);
        let Some(&region) = process.areas.keys().nth(n % process.areas.len().max(1)) else {
            return;
        };
        if process.dead || process.stopped {
            return;
        }
        let area = process.areas.remove(&region).expect("an area");
        process.pages.retain(|&page, _| !within(area.range, page));
        let epoch = Epoch(process.epoch);
        self.core.region_left(region, epoch);
    }

    pub fn write(&mut self, id: ClientId, n: usize, content: Content) {
        let process = self.process(id);
        let Some(&number) = process.pages.keys().nth(n % process.pages.len().max(1)) else {
            return;
        };
        if process.dead || process.stopped {
            return;
        }
        let shared = is_shared(&process.areas, number);
        let page = process.pages.get_mut(&number).expect("a page");
        (page.own, page.must) = (Some(content), content);
        match page.word {
            Word::Merged(_) if shared => page.word = Word::Private,
            Word::Zero => page.word = Word::Private,
            _ => {}
        }
    }

    /// The kernel moves the memory of one of the client's pages, if it has any of its own.
    pub fn migrate(&mut self, id: ClientId, n: usize, node: u8) {
        let process = self.process(id);
        let count = process.pages.len().max(1);
        if let Some(page) = process.pages.values_mut().nth(n % count)
            && page.own.is_some()
        {
            page.node = node;
        }
    }

    /// The nodes of the frames that the client's pages show, in the order of the pages; they got their memory there.
    pub fn nodes_shown(&self, id: ClientId) -> Vec<Option<u8>> {
        let pages = self.processes[&id].pages.values();
        let shown = pages.filter(|page| matches!(page.word, Word::Merged(_)));
        shown
            .filter_map(Page::slot)
            .map(|slot| {
                let node = self.core.node_of(slot);
                assert_eq!(
                    self.filled_on[&slot], node,
                    "{slot:?} is of another node than its memory"
                );
                node
            })
            .collect()
    }

    /// MADV_UNMERGEABLE, or the end of it.
    pub fn hold(&mut self, id: ClientId, n: usize, on: bool) {
        let process = self.process(id);
        let Some(&number) = process.pages.keys().nth(n % process.pages.len().max(1)) else {
            return;
        };
        if process.dead || process.stopped {
            return;
        }
        let shared = is_shared(&process.areas, number);
        let page = process.pages.get_mut(&number).expect("a page");
        page.word = match page.word {
            Word::Held(Some(slot)) if !on && shared => Word::Detached(slot),
            Word::Held(Some(slot)) if !on => Word::Broken(slot),
            Word::Held(None) if !on => Word::Private,
            Word::Held(_) => page.word,
            _ if !on => return,
            Word::Detached(slot) => Word::Held(Some(slot)),
            Word::Merged(slot) | Word::Broken(slot) if !shared => Word::Held(Some(slot)),
            _ => Word::Held(None),
        };
        if !shared || page.slot().is_none() {
            page.own = Some(page.must);
        }
    }

    /// There is no room to break a merged page of a shared region: the program may write where it is mapped.
    pub fn detach(&mut self, id: ClientId, n: usize) {
        let process = self.process(id);
        let Some(&number) = process.pages.keys().nth(n % process.pages.len().max(1)) else {
            return;
        };
        if process.dead || process.stopped || !is_shared(&process.areas, number) {
            return;
        }
        let page = process.pages.get_mut(&number).expect("a page");
        if let Word::Merged(slot) = page.word {
            page.word = Word::Detached(slot);
        }
    }

    /// There is room again: what is detached goes back to where its region's memory is.
    pub fn bring_home(&mut self, id: ClientId) {
        let process = self.process(id);
        if process.dead || process.stopped {
            return;
        }
        for page in process.pages.values_mut() {
            if let Word::Detached(_) = page.word {
                (page.word, page.own) = (Word::Private, Some(page.must));
            }
        }
    }

    pub fn fork(&mut self, id: ClientId) {
        let process = self.process(id);
        if !process.dead && !process.stopped && process.children.len() < 4 {
            let child = Child {
                epoch: process.epoch,
                pages: process.pages.clone(),
                areas: process
                    .areas
                    .values()
                    .filter(|area| area.kind == Kind::Private)
                    .map(|area| area.range)
                    .collect(),
            };
            process.children.push(child);
        }
    }

    pub fn end_child(&mut self, id: ClientId) {
        let process = self.process(id);
        if !process.children.is_empty() {
            process.children.remove(0);
        }
    }

    /// The client maps a fresh life page and says so.
    pub fn turn(&mut self, id: ClientId) {
        let process = self.process(id);
        if !process.dead && !process.stopped {
            process.epoch += 1;
        }
    }

    /// The broker tries the seals.
    pub fn seal(&mut self, id: ClientId) {
        let process = self.process(id);
        let oldest_child = process.children.iter().map(|child| child.epoch).min();
        let mapped = if process.dead {
            oldest_child
        } else {
            Some(oldest_child.map_or(process.epoch, |e| e.min(process.epoch)))
        };
        match mapped {
            Some(0) => {}
            Some(epoch) => self.core.sealed(id, Epoch(epoch - 1)),
            None => {
                self.core.client_gone(id);
                self.processes.remove(&id);
            }
        }
    }

    pub fn stop(&mut self, id: ClientId, stopped: bool) {
        self.process(id).stopped = stopped;
    }

    pub fn accompany(&mut self, id: ClientId, accompanied: bool) {
        self.process(id).accompanied = accompanied;
    }

    pub fn die(&mut self, id: ClientId) {
        let process = self.process(id);
        if process.dead {
            return;
        }
        process.dead = true;
        process.pages.clear();
        process.open.clear();
        self.core.client_lost(id);
    }

    /// I4: nobody shows a frame whose memory goes, and nobody was asked to.
    fn check_punch(&self, slot: Slot) {
        for (id, process) in self.processes.iter().filter(|(_, process)| !process.lies) {
            let pages = process
                .pages
                .iter()
                .chain(process.children.iter().flat_map(|child| &child.pages));
            for (number, page) in pages {
                let shows = page.own.is_none() && page.slot() == Some(slot);
                assert!(
                    !shows,
                    "{slot:?} is punched while page {number} of {id:?} or its child shows it"
                );
            }
            for open in &process.open {
                if let Report::Map { runs, .. } = &open.report {
                    let proposed = runs
                        .iter()
                        .flat_map(|run| run.iter())
                        .any(|(_, proposed)| proposed == slot);
                    assert!(!proposed, "{slot:?} is punched while proposed to {id:?}");
                }
            }
        }
    }

    /// Slots that somebody honest, or a child, has a mapping over.
    fn mapped_slots(&self) -> BTreeMap<Slot, (ClientId, u32)> {
        let mut mapped = BTreeMap::new();
        for (&id, process) in self.processes.iter().filter(|(_, process)| !process.lies) {
            let children = process.children.iter().flat_map(|child| &child.pages);
            for (&number, page) in process.pages.iter().chain(children) {
                mapped.extend(page.slot().map(|slot| (slot, (id, number))));
            }
        }
        mapped
    }

    /// I2: everybody honest reads what they wrote; a liar may hurt itself.
    pub fn check_reads(&self) {
        for (id, process) in self.processes.iter().filter(|(_, process)| !process.lies) {
            let pages = process
                .pages
                .iter()
                .chain(process.children.iter().flat_map(|child| &child.pages));
            for (number, page) in pages {
                let read = match (page.own, page.word) {
                    (Some(own), _) => Some(own),
                    (None, Word::Zero) => Some(0),
                    (None, _) => page.slot().and_then(|slot| self.store[slot.0 as usize]),
                };
                assert_eq!(read, Some(page.must), "page {number} of {id:?}: {page:?}");
            }
        }
    }

    /// I7, when nothing is on its way.
    pub fn check_counts(&self) {
        let pages = || self.processes.values().flat_map(|process| process.pages.values());
        let merged = pages().filter(|page| matches!(page.word, Word::Merged(_))).count() as u64;
        let zero = pages().filter(|page| page.word == Word::Zero).count() as u64;
        let shown: BTreeSet<Slot> = pages()
            .filter(|page| matches!(page.word, Word::Merged(_)))
            .filter_map(Page::slot)
            .collect();
        let stats = self.core.stats();
        assert_eq!(stats.pages_shared + stats.pages_sharing, merged, "{stats:?}");
        assert_eq!(stats.pages_shared, shown.len() as u64, "{stats:?}");
        assert_eq!(stats.ksm_zero_pages, zero, "{stats:?}");
        assert_eq!(stats.frames, self.store.iter().flatten().count() as u64, "{stats:?}");
        self.check_page_map();
    }

    /// Every page is on the map once, however many calls that takes, and the classes add up to the counters.
    fn check_page_map(&self) {
        let mut map: BTreeMap<RegionId, Vec<Class>> = BTreeMap::new();
        for most in [1, 7, usize::MAX] {
            map.clear();
            let mut from = Some(PageNumber(0));
            while let Some(page) = from {
                let (stretches, next) = self.core.page_map(page, most);
                for stretch in stretches {
                    let classes = map.entry(stretch.region).or_default();
                    assert_eq!(classes.len(), stretch.first as usize, "{stretch:?}");
                    classes.resize(classes.len() + stretch.pages as usize, stretch.class);
                }
                from = next;
            }
            let pages = map.values().map(Vec::len).sum::<usize>();
            let there = self.processes.values().flat_map(|process| process.pages.values());
            assert_eq!(pages, there.count());
        }
        let count = |class: Class| map.values().flatten().filter(|found| **found == class).count() as u64;
        let stats = self.core.stats();
        assert_eq!(
            count(Class::Merged),
            stats.pages_shared + stats.pages_sharing,
            "{stats:?}"
        );
        assert_eq!(count(Class::Zero), stats.ksm_zero_pages, "{stats:?}");
        assert_eq!(count(Class::Unshared), stats.pages_unshared, "{stats:?}");
        assert_eq!(count(Class::Volatile), stats.pages_volatile, "{stats:?}");
    }

    /// The naive model: pages of one content are merged, all of them, except where checksums collide; while nodes count, pages of one
    /// content and one node.
    pub fn check_merged(&self) {
        if self.core.tunables().max_page_sharing < 256 {
            // The last page of a content may find all frames full, and alone it founds none.
            return;
        }
        if self.mixed {
            return;
        }
        let nodes = self.core.tunables().nodes_count();
        let mut by_content: BTreeMap<(Content, u8), Vec<&Page>> = BTreeMap::new();
        for page in self.processes.values().flat_map(|process| process.pages.values()) {
            if !matches!(page.word, Word::Held(_)) {
                let node = if nodes && page.must != 0 { page.node } else { 0 };
                by_content.entry((page.must, node)).or_default().push(page);
            }
        }
        let collides = |content: Content| matches!(content, 5 | 6);
        for ((content, node), pages) in by_content.into_iter().filter(|((content, _), _)| !collides(*content)) {
            let merged = pages.iter().filter(|page| page.own.is_none()).count();
            let expected = if content == 0 || pages.len() > 1 && node != Checksum::NO_NODE {
                pages.len()
            } else {
                merged
            };
            assert_eq!(
                merged,
                expected,
                "content {content} on node {node}: {:?}",
                self.core.stats()
            );
        }
    }

    /// Nobody is stopped or accompanied any more, and there is room for everything.
    pub fn wake_everybody(&mut self) {
        let ids: Vec<ClientId> = self.processes.keys().copied().collect();
        for id in ids {
            let process = self.process(id);
            (process.stopped, process.accompanied) = (false, false);
            self.bring_home(id);
        }
    }

    pub fn is_honest(&self) -> bool {
        self.processes.values().all(|process| !process.lies)
    }

    /// Children end, life pages turn, seals are taken.
    pub fn seal_everything(&mut self) {
        let ids: Vec<ClientId> = self.processes.keys().copied().collect();
        for id in ids {
            self.process(id).children.clear();
            self.turn(id);
            self.seal(id);
        }
    }

    pub fn everybody_dies(&mut self) {
        let ids: Vec<ClientId> = self.processes.keys().copied().collect();
        for id in ids {
            self.die(id);
            self.process(id).children.clear();
            self.seal(id);
        }
    }

    /// Neighbours among the client's pages that show frames which are no neighbours.
    pub fn rifts(&self, id: ClientId) -> u32 {
        let pages: Vec<(&u32, &Page)> = self.processes[&id].pages.iter().collect();
        let shown = |page: &Page| match page.word {
            Word::Merged(slot) => Some(slot.0),
            _ => None,
        };
        let rift = |pair: &&[(&u32, &Page)]| {
            let (one, next) = (shown(pair[0].1), shown(pair[1].1));
            *pair[0].0 + 1 == *pair[1].0 && one.is_some() && next.is_some() && one.map(|slot| slot + 1) != next
        };
        pages.windows(2).filter(rift).count() as u32
    }

    /// Whether somebody was asked to stage pages.
    pub fn stages(&self) -> bool {
        let is_stage = |open: &Open| matches!(open.report, Report::Stage { .. });
        self.processes.values().flat_map(|process| &process.open).any(is_stage)
    }

    /// Frames that held pages of shared regions stand over: whether they were written, only their clients know.
    pub fn frames_held(&self) -> usize {
        let held = self.processes.values().flat_map(|process| {
            let pages = process.pages.iter();
            let shared = pages.filter(|&(&number, _)| is_shared(&process.areas, number));
            shared.filter_map(|(_, page)| page.slot())
        });
        held.collect::<BTreeSet<Slot>>().len()
    }

    pub fn frames_in_store(&self) -> usize {
        self.store.iter().flatten().count()
    }
}

fn within(range: PageRange, page: u32) -> bool {
    page.wrapping_sub(range.first.0) < range.pages
}

fn numbers(ranges: &[PageRange]) -> impl Iterator<Item = u32> {
    ranges.iter().flat_map(|range| range.iter()).map(|page| page.0)
}
