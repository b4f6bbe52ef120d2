//! Remapping a region's pages: what the remapper does to them.
//!
//! The remapper's side of `region.rs`; it is one thread, at the program's priority, and owns pages only within these calls. Relies on the
//! protocol for the order of everything. Needs no memory while it merges: what it works with was made before.

use crate::error::SysError;
use crate::fork;
use crate::gate::Pass;
use crate::pagemap::Pagemap;
use crate::protocol::{self, Claims, Kind, MAX_RUN, MergeRun, Span, Verdict, Words};
use crate::region::Region;
use crate::store::StoreFile;
use crate::watch::{Testimony, Watch};
use crate::window::{Pane, Window};
use crate::word::{Slot, State, StoreNumber, Word};

/// What the remapper works with, made once by its thread.
pub struct RemapTools {
    pane: Pane,
    claims: Claims,
    /// Opened when it is needed; absent where the kernel refuses it.
    pagemap: Option<Pagemap>,
    testimony: Testimony,
    /// The 2 MiB where a run merged last, so that it has no huge page any more: short runs in order ask for many splits of one.
    split: usize,
}

impl RemapTools {
    /// Reserves what merging needs.
    ///
    /// # Errors
    /// No address space, or no mapping to be had.
    pub fn new() -> Result<RemapTools, SysError> {
        let mut testimony = Testimony::default();
        testimony.written.reset(MAX_RUN as u32);
        testimony.armed.reset(MAX_RUN as u32);
        Ok(RemapTools {
            pane: Pane::reserve()?,
            claims: Claims::new(),
            pagemap: None,
            testimony,
            split: 0,
        })
    }

    /// Pages that were compared before they were frozen, and not again, since the kernel vouched for them.
    pub fn vouched(&self) -> u64 {
        self.testimony.vouched
    }

    /// An order begins. Before it anything may have become a huge page.
    pub fn begin_order(&mut self) {
        self.split = 0;
    }

    fn pagemap(&mut self) -> Option<&Pagemap> {
        if self.pagemap.is_none() {
            self.pagemap = Pagemap::open().ok();
        }
        self.pagemap.as_ref()
    }
}

impl Region {
    /// Merges a run onto frames of the store; verdicts per page. `None` if the region is closed. A shared region merges only if the
    /// process has not forked since [`fork::count`] was `forks`, else its pages are Busy: a child writes to the same object.
    pub fn merge(
        &self,
        run: MergeRun,
        store: &StoreFile,
        forks: u32,
        tools: &mut RemapTools,
        verdicts: &mut [Verdict],
    ) -> Option<Result<(), SysError>> {
        self.merging(|_| {
            let window = match run.slot {
                Slot::ZERO => None,
                slot => Some(Window::open(store, slot, run.span.pages, self.kind(), &mut tools.pane)?),
            };
            let _pass = Pass::enter();
            if self.kind() == Kind::Shared && fork::count() != forks {
                verdicts[..run.span.pages as usize].fill(Verdict::Busy);
                return Ok(());
            }
            if self.tracking.any() {
                tools.pagemap();
            }
            let mut watch = Watch::of(self.view, &self.tracking, tools.pagemap.as_ref(), &mut tools.testimony);
            let claims = &mut tools.claims;
            let view = self.view.with_split(tools.split);
            let merged = protocol::merge_run(&self.words, &view, run, window.as_ref(), &mut watch, claims, verdicts)
                .map_err(SysError::call("merge", "run"));
            let merges = &verdicts[..run.span.pages as usize];
            if let Some(last) = merges.iter().rposition(|verdict| *verdict == Verdict::Merged) {
                tools.split = self.view.extent_of(run.span.first.plus(last as u32));
            }
            merged
        })
    }

    /// Whether replacing the span's mapping would split a huge page. A kernel that cannot tell is taken to mean yes, where the
    /// memory may be huge at all.
    pub fn would_split(&self, span: Span, tools: &mut RemapTools) -> bool {
        if !self.view.may_split(span) {
            return false;
        }
        let pagemap = tools.pagemap();
        self.open(|_| {
            pagemap
                .and_then(|pagemap| pagemap.any_huge(&self.view, span).ok())
                .unwrap_or(true)
        })
        .unwrap_or(false)
    }

    /// Whether all pages of a span show frames of this store.
    pub fn shows_frames(&self, span: Span, store: StoreNumber) -> bool {
        let shows =
            |word: Word| word.state() == State::Merged && word.frame().is_some_and(|(theirs, _)| theirs == store);
        self.open(|_| span.iter().all(|page| shows(self.words.load(page))))
            .unwrap_or(false)
    }

    /// Frees the home pages behind pages just merged, or takes the pages back if another address space maps the object.
    /// A fork since [`fork::count`] was `forks` makes another address space, too.
    pub fn settle(&self, span: Span, alone: bool, forks: u32) -> Option<Result<u32, SysError>> {
        self.merging(|_| {
            let _pass = Pass::enter();
            let alone = alone && fork::count() == forks;
            protocol::settle(&self.words, &self.view, span, alone)
                .map_err(SysError::call("madvise(MADV_REMOVE)", "home"))
        })
    }

    /// Gives merged pages of a span memory of their own again, still taking part. How many it was.
    pub fn break_span(&self, span: Span) -> Option<Result<u32, SysError>> {
        let broken = {
            // What is taken out of an arena meanwhile must not come in again.
            let _alone = self.parts.as_ref().map(|parts| parts.changing.alone());
            self.open(|_| self.break_merged(span))
        };
        if let Some(Ok(_)) = broken {
            self.hold_again(span);
        }
        broken
    }

    fn break_merged(&self, span: Span) -> Result<u32, SysError> {
        let merged = |word: Word| matches!(word.state(), State::Merged | State::Zero);
        let mut broken = 0;
        for part in self.stretches_of(span, merged) {
            let _pass = Pass::enter();
            protocol::unmerge(&self.words, &self.view, part).map_err(SysError::call("unmerge", "run"))?;
            for page in part.iter().filter(|page| self.takes_part(*page)) {
                protocol::reopen(&self.words, &self.view, Span::one(page));
            }
            broken += part.pages;
        }
        Ok(broken)
    }

    /// Brings Detached pages home, as far as there is room; how many came.
    pub fn bring_home(&self, span: Span) -> u32 {
        let came = self.open(|_| {
            let detached = span
                .iter()
                .filter(|page| self.words.load(*page).state() == State::Detached);
            let _pass = Pass::enter();
            detached
                .filter(|page| protocol::bring_home(&self.words, &self.view, *page) == Ok(true))
                .count()
        });
        came.unwrap_or(0) as u32
    }
}
