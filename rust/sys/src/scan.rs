//! Scanning a region: which merged pages were written, and what the checksums of the others are.
//!
//! The scanner's side of `region.rs`: it reads what the program may be writing, so nothing it learns proves anything; evidence counts
//! only against the words that were loaded before it was taken. Where the kernel keeps track of writes (`tracking.rs`), pages that
//! were not written since they were last read are not read again; each is armed *before* it is read. Where nodes count (`numa.rs`) a
//! checksum says where its page was when it was read. It owns no page, but for one at
//! a time where the kernel does not say what it copied.

use crate::bytes::PageBytes;
use crate::careful::{self, Ahead};
use crate::checksum::{self, ChecksumWord, Checksummer};
use crate::error::SysError;
use crate::gate::Pass;
use crate::mutant::{self, Mutant};
use crate::numa::Nodes;
use crate::pagemap::{Bits, Owned, Pagemap};
use crate::protocol::{self, Evidence, Kind, Page, Span};
use crate::region::Region;
use crate::tracking::{Look, Wish};
use crate::word::{State, StoreNumber, Word};
use core::sync::atomic::{AtomicU64, Ordering};

/// Merged private pages that scans found written.
static COPIED: AtomicU64 = AtomicU64::new(0);

/// Merged private pages that scans found written so far: the kernel copied them.
pub fn copied() -> u64 {
    COPIED.load(Ordering::Relaxed)
}

/// Of how many looks one reads a page, whatever tracking says. Private memory changes unseen only under a device that pinned it, an object
/// may be written through a descriptor or by a child; the worst of it is a page that does not merge until then.
const fn looks_unread(kind: Kind) -> u32 {
    match kind {
        Kind::Private => 128,
        Kind::Shared => 64,
    }
}

/// Whether a checksum word has a checksum.
fn is_there(word: &AtomicU64) -> bool {
    ChecksumWord(word.load(Ordering::Relaxed)).checksum48().is_some()
}

/// Whether anything at all is in swap.
fn swap_is_used() -> bool {
    let info = rustix::system::sysinfo();
    info.freeswap < info.totalswap
}

/// Pages that are cheaper looked at with their neighbours than left out between two system calls.
const GAP: u32 = 16;

/// What a scan saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages whose bytes were read.
    pub checksummed: u32,
    /// Pages that were not, since nobody wrote them.
    pub clean: u32,
    /// Pages whose checksum is new.
    pub changed: u32,
    /// Merged pages found written.
    pub broken: u32,
}

impl Tally {
    /// Adds what another scan saw.
    pub fn add(&mut self, other: Tally) {
        self.checksummed += other.checksummed;
        self.clean += other.clean;
        self.changed += other.changed;
        self.broken += other.broken;
    }
}

/// What a scan works with, made once by its thread.
pub struct ScanTools {
    /// The domain's checksum.
    pub checksummer: Checksummer,
    /// The store in use; words of others are looked at like private ones.
    pub store: StoreNumber,
    /// Absent where the kernel refuses it.
    pub pagemap: Option<Pagemap>,
    /// Whether pages that were not written since this checksummer read them may be known: regions are registered, if at all, with a
    /// userfaultfd that is younger than the checksummer.
    pub tracks: bool,
    /// What should become of units, for whoever has the userfaultfd.
    pub wishes: Vec<Wish>,
    words: Vec<Word>,
    /// The stretches of the span that are looked at more closely.
    parts: Vec<Span>,
    own: Owned,
    written: Bits,
    /// Pages that need no reading.
    clean: Bits,
    armed: Bits,
    /// Where pages are, while that counts.
    nodes: Option<Nodes>,
    page: Box<PageBytes>,
    /// The first page of the span that is being scanned.
    first: Page,
    ahead: Ahead,
}

impl ScanTools {
    /// Tools for one broker's domain, without tracking.
    pub fn new(checksummer: Checksummer, store: StoreNumber, pagemap: Option<Pagemap>) -> ScanTools {
        let page = Box::new(PageBytes::ZEROS);
        ScanTools {
            checksummer,
            store,
            pagemap,
            tracks: false,
            wishes: Vec::new(),
            words: Vec::new(),
            parts: Vec::new(),
            own: Owned::default(),
            written: Bits::default(),
            clean: Bits::default(),
            armed: Bits::default(),
            nodes: None,
            page,
            first: Page(0),
            ahead: Ahead::default(),
        }
    }

    /// From now on checksums have the pages' nodes in them, or have not.
    pub fn count_nodes(&mut self, count: bool) {
        if count != self.nodes.is_some() {
            self.nodes = count.then(Nodes::default);
        }
    }

    /// Why no page's node is known, if that was found out since the last call: those merge with nothing but zeros.
    pub fn nodes_refused(&mut self) -> Option<SysError> {
        self.nodes.as_mut()?.take_refusal()
    }
}

impl Region {
    /// Looks at a span: finds merged pages that were written, and brings the checksum words of all pages that could merge up to
    /// date. `None` if the region is closed.
    ///
    /// # Errors
    /// The pagemap could not be read.
    pub fn scan(&self, span: Span, pass: u16, tools: &mut ScanTools) -> Option<Result<Tally, SysError>> {
        self.merging(|_| {
            self.forget_others(tools.nodes.is_some());
            // The words first: evidence counts only against what a page was before it was looked at.
            tools.words.clear();
            let words = &self.words.slice()[span.first.0 as usize..][..span.pages as usize];
            tools
                .words
                .extend(words.iter().map(|word| Word(word.load(Ordering::SeqCst))));
            tools.first = span.first;
            if self.parts.is_some() && tools.words.iter().all(|word| word.state() == State::Held) {
                // An arena's, lent for a moment or free.
                return Ok(Tally::default());
            }
            let unread = self.written(span, pass, tools)?;
            self.part(span, unread, tools);
            if tools.parts.is_empty() {
                let look = Look {
                    clean: span.pages,
                    ..Look::default()
                };
                tools.wishes.extend(self.judge(span, look));
                return Ok(Tally {
                    clean: span.pages,
                    ..Tally::default()
                });
            }
            tools.armed.reset(span.pages);
            let late = mutant::active(Mutant::ArmAfterRead);
            let sure = late || self.arm(span, tools);
            let known = self.backed(span, sure, tools)?;
            if let Some(nodes) = &mut tools.nodes {
                nodes.reset(span.pages);
                tools
                    .parts
                    .iter()
                    .for_each(|part| nodes.ask(&self.view, *part, span.first));
            }
            tools.ahead.forget();
            let mut tally = Tally::default();
            let mut look = Look::default();
            for (at, page) in span.iter().enumerate() {
                let word = tools.words[at];
                let (evidence, at) = (Evidence { page, word }, at as u32);
                let armed = tools.armed.has(at);
                if tools.clean.has(at) && !armed {
                    tally.clean += 1;
                    continue;
                }
                let own = known.then(|| tools.own.pages.has(at));
                if self.scan_page(evidence, own, pass, tools, &mut tally) {
                    look.armed += u32::from(armed);
                    look.unarmed += u32::from(!armed);
                } else if armed {
                    // Armed, and not read: nobody would read it while it is not written.
                    self.checksum_word(page).store(ChecksumWord::NONE.0, Ordering::Relaxed);
                }
            }
            if late {
                self.arm(span, tools);
            }
            COPIED.fetch_add(tally.broken.into(), Ordering::Relaxed);
            // When everything was read for the sake of it, that says nothing of who wrote.
            if tools.tracks && (unread || !self.tracking.any()) {
                look.clean = tally.clean;
                look.changed = tally.changed;
                tools.wishes.extend(self.judge(span, look));
            }
            Ok(tally)
        })
    }

    /// Checksums with nodes in them and without are not to be compared, and a page that has none is read.
    fn forget_others(&self, with_nodes: bool) {
        if self.with_nodes.swap(with_nodes, Ordering::Relaxed) == with_nodes {
            return;
        }
        for checksum in self.whole().iter().map(|page| self.checksum_word(page)) {
            // To write is to give the table memory.
            if checksum.load(Ordering::Relaxed) != ChecksumWord::NONE.0 {
                checksum.store(ChecksumWord::NONE.0, Ordering::Relaxed);
            }
        }
    }

    /// Finds the pages that were written since they were armed, or are not; false if all are to be read anyway.
    fn written(&self, span: Span, pass: u16, tools: &mut ScanTools) -> Result<bool, SysError> {
        let Some(pagemap) = tools.pagemap.as_ref().filter(|_| tools.tracks && self.tracking.any()) else {
            return Ok(false);
        };
        // Each pass another part of the region is read whatever the kernel says.
        let turn = u32::from(pass).wrapping_add(span.first.0 / protocol::MAX_RUN as u32);
        if turn.is_multiple_of(looks_unread(self.kind())) {
            return Ok(false);
        }
        pagemap.written(&self.view, span, &mut tools.written)?;
        Ok(true)
    }

    fn checksums(&self, span: Span) -> &[AtomicU64] {
        &self.table.checksums()[(self.first_word + span.first.0) as usize..][..span.pages as usize]
    }

    /// Whether all pages of a span of which nothing may have been written are to be left at what is known of them: the usual case,
    /// without a decision per page.
    fn is_known(&self, span: Span, tools: &ScanTools) -> bool {
        tools.written.is_empty()
            && tools.words.iter().all(|word| word.state() == State::Private)
            && self.checksums(span).iter().all(is_there)
    }

    /// Tells the pages that need no reading, since nobody wrote them, from the stretches that have to be looked at more closely, if there
    /// are any.
    fn part(&self, span: Span, unread: bool, tools: &mut ScanTools) {
        tools.parts.clear();
        tools.clean.reset(span.pages);
        if !unread {
            tools.parts.push(span);
            return;
        }
        if self.is_known(span, tools) {
            return;
        }
        let pages = tools.words.iter().zip(self.checksums(span)).zip(span.iter());
        for (at, ((word, checksum), page)) in pages.enumerate() {
            let at = at as u32;
            // Only pages whose memory is their own by their words: of others a marker of the kernel's may say that they were not written.
            let own = match word.state() {
                State::Private => true,
                State::Broken => self.kind() == Kind::Private,
                _ => false,
            };
            if own && is_there(checksum) && !tools.written.has(at) {
                tools.clean.set(at);
                continue;
            }
            match tools.parts.last_mut() {
                Some(part) if page.0 - part.end().0 <= GAP => part.pages = page.0 + 1 - part.first.0,
                _ => tools.parts.push(Span::one(page)),
            }
        }
    }

    /// Finds which pages have memory, where that matters and can be known; `sure` says that those that pass for armed are.
    fn backed(&self, span: Span, sure: bool, tools: &mut ScanTools) -> Result<bool, SysError> {
        tools.own.reset(span.pages);
        match (&tools.pagemap, self.kind()) {
            (Some(pagemap), Kind::Private) => {
                for part in &tools.parts {
                    if sure && part.iter().all(|page| tools.armed.has(page.0 - span.first.0)) {
                        // Only what has memory of its own is armed, and one walk of the page table does for both.
                        part.iter().for_each(|page| tools.own.pages.set(page.0 - span.first.0));
                        continue;
                    }
                    let words = &tools.words[(part.first.0 - span.first.0) as usize..][..part.pages as usize];
                    // What merges meanwhile shows what it holds.
                    let no_frames = words.iter().all(|word| word.state() == State::Private);
                    pagemap.own_memory(&self.view, *part, no_frames, span.first, &mut tools.own)?;
                }
                Ok(true)
            }
            // Its holes would get memory by being read.
            (_, Kind::Shared) if self.view.is_vanishing() => {
                careful::resident(&self.view, span, &mut tools.own.pages)
                    .map_err(SysError::call("mincore", "region"))?;
                Ok(true)
            }
            (_, Kind::Shared) if swap_is_used() => {
                Ok(careful::resident(&self.view, span, &mut tools.own.pages).is_ok())
            }
            _ => Ok(false),
        }
    }

    /// Arms what is about to be read; whether those that pass for armed are.
    fn arm(&self, span: Span, tools: &mut ScanTools) -> bool {
        let Some(pagemap) = tools.pagemap.as_ref().filter(|_| tools.tracks && self.tracking.any()) else {
            return true;
        };
        // A merge relies on what it armed. What is not armed is read again next time.
        let Some(_arming) = self.tracking.arming() else {
            return true;
        };
        let mut sure = true;
        for part in &tools.parts {
            if pagemap.arm(&self.view, *part, span.first, &mut tools.armed).is_err() {
                // Any of them may be armed now: all are read.
                part.iter().for_each(|page| tools.armed.set(page.0 - span.first.0));
                sure = false;
            }
        }
        sure
    }

    pub(crate) fn checksum_word(&self, page: Page) -> &AtomicU64 {
        &self.table.checksums()[(self.first_word + page.0) as usize]
    }

    /// One page; `own` says whether it has memory of its own, where that is known. Whether it was read.
    fn scan_page(
        &self,
        evidence: Evidence,
        own: Option<bool>,
        pass: u16,
        tools: &mut ScanTools,
        tally: &mut Tally,
    ) -> bool {
        let word = evidence.word;
        let foreign = word.frame().is_some_and(|(store, _)| store != tools.store);
        let checksum = self.checksum_word(evidence.page);
        let read = match (word.state(), self.kind()) {
            (State::Private, Kind::Private) | (State::Broken, _) => own != Some(false),
            (State::Private, Kind::Shared) | (State::Detached, _) => own != Some(false),
            (State::Merged, Kind::Private) => match own {
                Some(true) => {
                    tally.broken += u32::from(protocol::mark_written(&self.words, evidence));
                    true
                }
                Some(false) => foreign,
                None => true,
            },
            (State::Merged, Kind::Shared) => foreign,
            (State::Zero, Kind::Private) => {
                let written = own.unwrap_or(true);
                if written {
                    protocol::mark_private(&self.words, evidence);
                }
                written
            }
            _ => return false,
        };
        // What the kernel put away for want of use is not brought back to be looked at.
        let swapped = tools.own.swapped.has(evidence.page.0 - tools.first.0);
        if !read || swapped {
            // Not a byte of its own to read: forget what it was, unless it still shows the frame that it merged with.
            if swapped || word.state() != State::Merged {
                checksum.store(ChecksumWord::NONE.0, Ordering::Relaxed);
            }
            return false;
        }
        let Some(mut now) = self.checksum_of(evidence.page, tools) else {
            return false;
        };
        tally.checksummed += 1;
        let before = ChecksumWord(checksum.load(Ordering::Relaxed));
        if let Some(nodes) = &mut tools.nodes {
            let at = evidence.page.0 - tools.first.0;
            now = checksum::on_node(now, nodes.of_read(&self.view, evidence.page, at));
            let same_bytes = |before| checksum::without_node(before) == checksum::without_node(now);
            if before.checksum48() != Some(now) && before.checksum48().is_some_and(same_bytes) {
                // Only its memory is elsewhere.
                checksum.store(ChecksumWord::new(now, before.pass16()).0, Ordering::Relaxed);
                return true;
            }
        }
        if before.checksum48() != Some(now) {
            tally.changed += 1;
            checksum.store(ChecksumWord::new(now, pass).0, Ordering::Relaxed);
            // Nobody knows what the kernel copied, and other bytes than last time are no proof (the last look may have been at
            // what the page held before it merged): so the copy is made.
            if word.state() == State::Merged && own.is_none() && self.kind() == Kind::Private && !foreign {
                let _pass = Pass::enter();
                tally.broken += u32::from(protocol::copy_and_mark(&self.words, &self.view, evidence));
            }
        }
        true
    }

    /// The checksum of a page as it is now; `None` if it is there no more.
    fn checksum_of(&self, page: Page, tools: &mut ScanTools) -> Option<u64> {
        if self.view.is_vanishing() {
            let own = &tools.own;
            let after = page.0 - tools.first.0 + 1..tools.words.len() as u32;
            let more = after
                .take(careful::AHEAD as usize)
                .take_while(|next| own.pages.has(*next));
            let copy = tools.ahead.page(&self.view, page, more.count() as u32)?;
            return Some(tools.checksummer.page(copy));
        }
        self.view.copy_out(page, &mut tools.page.0);
        Some(tools.checksummer.page(&tools.page.0))
    }
}
