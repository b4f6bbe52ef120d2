//! The remapper's desk: the regions by their words, and the broker's orders carried out on them.
//!
//! Relies on `ksmrs-sys` for everything that happens to a page; what is decided here is only in which order runs are taken, and
//! that shared pages lose their home only when no other address space can see them.

use super::mappings::Mappings;
use super::objects::Objects;
use super::sentinel::Sentinel;
use crate::wire::{Bits, Failure, Range, Run, RunOutcome};
use ksmrs_sys::protocol::{Kind, MAX_RUN, MergeRun, Page, Span, Verdict};
use ksmrs_sys::region::Region;
use ksmrs_sys::remap::RemapTools;
use ksmrs_sys::store::StoreFile;
use ksmrs_sys::{Slot, State, StoreNumber, SysError, fork, signal};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Pages that this process mapped onto frames so far.
static MERGES: AtomicU64 = AtomicU64::new(0);

/// Pages that this process mapped onto frames so far, and pages that got memory of their own again by being written.
pub(super) fn merges_and_breaks() -> (u64, u64) {
    (
        MERGES.load(Ordering::Relaxed),
        signal::breaks() + ksmrs_sys::scan::copied(),
    )
}

/// The regions, and what merging them takes.
pub(super) struct Desk {
    /// By their first word; slices never overlap.
    regions: BTreeMap<u32, Arc<Region>>,
    tools: RemapTools,
    verdicts: Box<[Verdict; MAX_RUN]>,
    sentinel: Sentinel,
    /// Whether a shared region ever showed a frame: then the fault handler matters.
    shared_merged: bool,
    mappings: Mappings,
}

/// What became of a Map.
pub(super) struct Mapped {
    pub(super) outcomes: Vec<RunOutcome>,
    /// Whether pages moved away from other frames, or did not take those that they were proposed.
    pub(super) gave_up: bool,
    /// Whether the store's glass is there to look through.
    pub(super) through_glass: bool,
}

/// Runs in an order from which on a mapping of the whole store pays: about as many windows cost more than it does.
const WORTH_A_GLASS: usize = 64;

/// The number that the broker knows a region by: its first word, which no other region has while it lives.
pub(super) fn number(region: &Region) -> u32 {
    region.first_word()
}

impl Desk {
    pub(super) fn new() -> Result<Desk, SysError> {
        Ok(Desk {
            regions: BTreeMap::new(),
            tools: RemapTools::new()?,
            verdicts: Box::new([Verdict::Busy; MAX_RUN]),
            sentinel: Sentinel::new(),
            shared_merged: false,
            mappings: Mappings::default(),
        })
    }

    /// Whether no other address space can see what this one sees.
    pub(super) fn is_alone(&mut self) -> bool {
        self.sentinel.alone()
    }

    pub(super) fn add(&mut self, region: Arc<Region>) {
        self.regions.insert(region.first_word(), region);
    }

    /// Forgets a region; its number, if it was known.
    pub(super) fn remove(&mut self, region: &Arc<Region>) -> Option<u32> {
        self.regions.remove(&region.first_word()).map(|region| number(&region))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    pub(super) fn regions(&self) -> Vec<Arc<Region>> {
        self.regions.values().cloned().collect()
    }

    /// The region that words lie in, and which pages of it they are; `None` if it left, or if they reach beyond it.
    pub(super) fn span(&self, first_word: u32, pages: u32) -> Option<(Arc<Region>, Span)> {
        let (start, region) = self.regions.range(..=first_word).next_back()?;
        let first = first_word - start;
        let fits = first.checked_add(pages).is_some_and(|end| end <= region.pages());
        (fits && pages > 0).then(|| {
            (
                region.clone(),
                Span {
                    first: Page(first),
                    pages,
                },
            )
        })
    }

    /// Stores whose frames some page still shows or lies over, also of regions on their way home.
    pub(super) fn stores_in_use(&self, objects: &Objects) -> Vec<StoreNumber> {
        let mut bits = [0u64; 4];
        for region in self.regions.values().chain(objects.returning()) {
            region.stores_in_use(&mut bits);
        }
        (1..=255)
            .filter(|number| bits[usize::from(number / 64)] & 1 << (number % 64) != 0)
            .map(StoreNumber)
            .collect()
    }

    /// Carries out a Map; too near to the limit of mappings only of frames that move, which leaves no more mappings than there
    /// were. Without `split`, nothing short of a whole huge page is mapped over one.
    pub(super) fn map(
        &mut self,
        runs: &[Run],
        split: bool,
        (number, store): (StoreNumber, &StoreFile),
        objects: &Objects,
    ) -> Mapped {
        ksmrs_sys::take_ballast();
        self.tools.begin_order();
        let mut mapped = Mapped {
            outcomes: Vec::with_capacity(runs.len()),
            gave_up: false,
            through_glass: runs.len() >= WORTH_A_GLASS && store.mount_glass(),
        };
        let mut unsettled: Vec<(usize, Arc<Region>, Span)> = Vec::new();
        let has_room = self.mappings.have_room_for(runs);
        let forks = fork::count();
        let mut alone = None;
        for (index, run) in runs.iter().enumerate() {
            let found = self
                .span(run.first_word, run.pages.into())
                .filter(|_| usize::from(run.pages) <= MAX_RUN);
            let outcome = match found {
                None => RunOutcome {
                    merged: Bits::None,
                    failure: Some(Failure::Gone),
                },
                Some((region, _))
                    if region.kind() == Kind::Shared && !*alone.get_or_insert_with(|| self.sentinel.alone()) =>
                {
                    RunOutcome {
                        merged: Bits::None,
                        failure: Some(Failure::NotAlone),
                    }
                }
                Some((region, span)) if !has_room && !region.shows_frames(span, number) => RunOutcome {
                    merged: Bits::None,
                    failure: Some(Failure::Mappings),
                },
                Some((region, span)) if !split && region.would_split(span, &mut self.tools) => RunOutcome {
                    merged: Bits::None,
                    failure: Some(Failure::WouldSplit),
                },
                Some((region, span)) => {
                    let run = MergeRun {
                        span,
                        store: number,
                        slot: Slot(run.slot),
                    };
                    let outcome = self.merge(&region, run, store, forks);
                    let verdicts = &self.verdicts[..span.pages as usize];
                    // What was proposed and not mapped everywhere may be let go too.
                    mapped.gave_up |= verdicts.iter().any(|verdict| *verdict != Verdict::Merged);
                    let shown = |verdict: &Verdict| matches!(verdict, Verdict::Merged | Verdict::Moved);
                    let shows = verdicts.iter().filter(|verdict| shown(verdict)).count();
                    MERGES.fetch_add(shows as u64, Ordering::Relaxed);
                    self.mappings
                        .spend(verdicts.chunk_by(|one, next| shown(one) == shown(next)).count());
                    if region.kind() == Kind::Shared {
                        unsettled.extend(fresh(verdicts, span).map(|part| (index, region.clone(), part)));
                    }
                    outcome
                }
            };
            mapped.outcomes.push(outcome);
        }
        self.settle(&unsettled, runs, forks, objects, &mut mapped.outcomes);
        // What failed on the way, or was taken back, gives its proposals up; what was not tried has nothing to give up.
        let tried = |outcome: &RunOutcome| !matches!(outcome.failure, None | Some(Failure::NotAlone));
        mapped.gave_up |= mapped.outcomes.iter().any(tried);
        mapped
    }

    fn merge(&mut self, region: &Region, run: MergeRun, store: &StoreFile, forks: u32) -> RunOutcome {
        let pages = run.span.pages;
        // Where nothing gets as far as the pages, none of them merged.
        self.verdicts[..pages as usize].fill(Verdict::Busy);
        let answer = region.merge(run, store, forks, &mut self.tools, &mut *self.verdicts);
        let Some(answer) = answer else {
            return RunOutcome {
                merged: Bits::None,
                failure: Some(Failure::Gone),
            };
        };
        let failure = answer.err().map(|error| {
            tracing::debug!(%error, ?run, "a run could not be merged as a whole");
            failure_of(&error)
        });
        let verdicts = &self.verdicts;
        let merged = Bits::collect(pages, |at| {
            matches!(verdicts[at as usize], Verdict::Merged | Verdict::Moved)
        });
        RunOutcome { merged, failure }
    }

    /// Frees the home pages of what was just merged in shared regions, all together, after a last look that nobody else sees them.
    fn settle(
        &mut self,
        unsettled: &[(usize, Arc<Region>, Span)],
        runs: &[Run],
        forks: u32,
        objects: &Objects,
        outcomes: &mut [RunOutcome],
    ) {
        if unsettled.is_empty() {
            return;
        }
        self.shared_merged = true;
        let alone = self.sentinel.alone() && fork::count() == forks;
        // Asked once for each region: the answer looks through all that is away.
        let mut room = BTreeMap::new();
        for (index, region, span) in unsettled {
            let alone = alone && *room.entry(number(region)).or_insert_with(|| objects.have_room(region));
            let alone = alone && objects.is_leased(region);
            if let Some(Err(error)) = region.settle(*span, alone, forks) {
                tracing::warn!(%error, "merged pages keep their memory");
            }
            if !alone {
                let run = &runs[*index];
                let first = run.first_word - region.first_word();
                let before = outcomes[*index].merged.clone();
                let taken_back = |at: u32| span.first.0 <= first + at && first + at < span.end().0;
                outcomes[*index] = RunOutcome {
                    merged: Bits::collect(run.pages.into(), |at| before.get(at) && !taken_back(at)),
                    failure: Some(Failure::NotNow),
                };
            }
        }
    }

    /// Carries out an Unmap: the pages have memory of their own afterwards, and take part again.
    pub(super) fn unmap(&self, ranges: &[Range]) -> Bits {
        let mut done = Vec::new();
        for range in ranges {
            let broken = self
                .span(range.first_word, range.pages)
                .is_some_and(|(region, span)| !matches!(region.break_span(span), Some(Err(_))));
            done.extend(std::iter::repeat_n(broken, range.pages as usize));
        }
        Bits::collect(done.len() as u32, |at| done[at as usize])
    }

    /// Whether `upkeep` has anything to look after.
    pub(super) fn needs_upkeep(&self) -> bool {
        self.shared_merged && !self.regions.is_empty()
    }

    /// Keeps the fault handler in front, ballast aboard, and brings Detached pages home.
    pub(super) fn upkeep(&mut self) {
        static BROUGHT: AtomicU32 = AtomicU32::new(0);
        if let Err(error) = signal::install() {
            tracing::error!(%error, "the SIGSEGV handler cannot be put in front");
        }
        ksmrs_sys::take_ballast();
        let detached = signal::detached() + fork::detached_by_fork();
        if u64::from(BROUGHT.load(Ordering::Relaxed)) == detached {
            return;
        }
        let mut left = false;
        for region in self.regions.values().filter(|region| region.kind() == Kind::Shared) {
            let whole = Span {
                first: Page(0),
                pages: region.pages(),
            };
            region.bring_home(whole);
            left |= region.page_states().contains(&State::Detached);
        }
        if !left {
            BROUGHT.store(detached as u32, Ordering::Relaxed);
        }
    }
}

/// The maximal stretches of pages whose home is still complete.
fn fresh(verdicts: &[Verdict], span: Span) -> impl Iterator<Item = Span> + use<> {
    let mut parts: Vec<Span> = Vec::new();
    for (verdict, page) in verdicts.iter().zip(span.iter()) {
        match parts.last_mut() {
            _ if *verdict != Verdict::Merged => {}
            Some(last) if last.end() == page => last.pages += 1,
            _ => parts.push(Span::one(page)),
        }
    }
    parts.into_iter()
}

fn failure_of(error: &SysError) -> Failure {
    match error.errno() {
        // The calls of a merge need mappings, not memory.
        Some(errno) if errno == Errno::NOMEM.raw_os_error() => Failure::Mappings,
        Some(errno) => Failure::Errno(errno),
        None => Failure::Gone,
    }
}
