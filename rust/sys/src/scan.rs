//! Scanning a region: which merged pages were written, and what the checksums of the others are.
//!
//! The scanner's side of `region.rs`: it reads what the program may be writing, so nothing it learns proves anything; evidence counts
//! only against the words that were loaded before it was taken. It owns no page, but for one at a time where the kernel does not
//! say what it copied.

use crate::bytes::PageBytes;
use crate::careful::{self, Ahead};
use crate::checksum::{ChecksumWord, Checksummer};
use crate::error::SysError;
use crate::gate::Pass;
use crate::pagemap::{Bits, Pagemap};
use crate::protocol::{self, Evidence, Kind, Page, Span, Words};
use crate::region::Region;
use crate::word::{State, StoreNumber, Word};
use core::sync::atomic::{AtomicU64, Ordering};

/// Merged private pages that scans found written.
static COPIED: AtomicU64 = AtomicU64::new(0);

/// Merged private pages that scans found written so far: the kernel copied them.
pub fn copied() -> u64 {
    COPIED.load(Ordering::Relaxed)
}

/// What a scan saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages whose bytes were read.
    pub checksummed: u32,
    /// Pages whose checksum is new.
    pub changed: u32,
    /// Merged pages found written.
    pub broken: u32,
}

/// What a scan works with, made once by its thread.
pub struct ScanTools {
    /// The domain's checksum.
    pub checksummer: Checksummer,
    /// The store in use; words of others are looked at like private ones.
    pub store: StoreNumber,
    /// Absent where the kernel refuses it.
    pub pagemap: Option<Pagemap>,
    words: Vec<Word>,
    own: Bits,
    page: Box<PageBytes>,
    /// The first page of the span that is being scanned.
    first: Page,
    ahead: Ahead,
}

impl ScanTools {
    /// Tools for one broker's domain.
    pub fn new(checksummer: Checksummer, store: StoreNumber, pagemap: Option<Pagemap>) -> ScanTools {
        let page = Box::new(PageBytes::ZEROS);
        ScanTools {
            checksummer,
            store,
            pagemap,
            words: Vec::new(),
            own: Bits::default(),
            page,
            first: Page(0),
            ahead: Ahead::default(),
        }
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
            // The words first: evidence counts only against what a page was before it was looked at.
            tools.words.clear();
            tools.words.extend(span.iter().map(|page| self.words.load(page)));
            let known = match (&tools.pagemap, self.kind()) {
                (Some(pagemap), Kind::Private) => {
                    pagemap.own_memory(&self.view, span, &mut tools.own)?;
                    true
                }
                // Its holes would get memory by being read.
                _ if self.view.is_vanishing() => {
                    careful::resident(&self.view, span, &mut tools.own).map_err(SysError::call("mincore", "region"))?;
                    true
                }
                _ => false,
            };
            tools.first = span.first;
            tools.ahead.forget();
            let mut tally = Tally::default();
            for (at, page) in span.iter().enumerate() {
                let evidence = Evidence {
                    page,
                    word: tools.words[at],
                };
                let own = known.then(|| tools.own.has(at as u32));
                self.scan_page(evidence, own, pass, tools, &mut tally);
            }
            COPIED.fetch_add(tally.broken.into(), Ordering::Relaxed);
            Ok(tally)
        })
    }

    /// One page; `own` says whether it has memory of its own, where that is known.
    fn scan_page(&self, evidence: Evidence, own: Option<bool>, pass: u16, tools: &mut ScanTools, tally: &mut Tally) {
        let word = evidence.word;
        let foreign = word.frame().is_some_and(|(store, _)| store != tools.store);
        let checksum = &self.table.checksums()[(self.first_word + evidence.page.0) as usize];
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
            _ => return,
        };
        if !read {
            // Not a byte of its own to read: forget what it was, unless it still shows the frame that it merged with.
            if word.state() != State::Merged {
                checksum.store(ChecksumWord::NONE.0, Ordering::Relaxed);
            }
            return;
        }
        let Some(now) = self.checksum_of(evidence.page, tools) else {
            return;
        };
        tally.checksummed += 1;
        if ChecksumWord(checksum.load(Ordering::Relaxed)).checksum48() != Some(now) {
            tally.changed += 1;
            checksum.store(ChecksumWord::new(now, pass).0, Ordering::Relaxed);
            // Nobody knows what the kernel copied, and other bytes than last time are no proof (the last look may have been at
            // what the page held before it merged): so the copy is made.
            if word.state() == State::Merged && own.is_none() && self.kind() == Kind::Private && !foreign {
                let _pass = Pass::enter();
                tally.broken += u32::from(protocol::copy_and_mark(&self.words, &self.view, evidence));
            }
        }
    }

    /// The checksum of a page as it is now; `None` if it is there no more.
    fn checksum_of(&self, page: Page, tools: &mut ScanTools) -> Option<u64> {
        if self.view.is_vanishing() {
            let own = &tools.own;
            let after = page.0 - tools.first.0 + 1..tools.words.len() as u32;
            let more = after.take(careful::AHEAD as usize).take_while(|next| own.has(*next));
            let copy = tools.ahead.page(&self.view, page, more.count() as u32)?;
            return Some(tools.checksummer.page(copy));
        }
        self.view.copy_out(page, &mut tools.page.0);
        Some(tools.checksummer.page(&tools.page.0))
    }
}
