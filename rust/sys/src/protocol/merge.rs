//! The remapper's half of the protocol: freeze, compare, map, and let go of what the pages had before.
//!
//! It relies on being the only remapper of its region. A checksum is never proof here: a page is mapped away only after its
//! bytes were compared with the frame, frozen, or before that if a witness vouches for them.

use super::{Access, Kind, Memory, Page, Span, Witness, Words, resting_access};
use crate::failpoint::{self, Failpoint};
use crate::mutant::{self, Mutant};
use crate::word::{Origin, Slot, State, StoreNumber, Word};
use rustix::io::Errno;

/// The longest run: one extent, 2 MiB. It bounds how long a writer waits for a freeze.
pub const MAX_RUN: usize = 512;

/// What became of one page of a proposed run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// It shows the frame now. In a shared region its home page is still complete: [`settle`] it.
    Merged,
    /// It shows the frame now, or did already, and had no home page left before this run.
    Moved,
    /// It holds other bytes than the frame.
    Unequal,
    /// A writer took it back, or it was in no state to be merged.
    Busy,
    /// The kernel refused; the errno is the run's.
    Failed,
}

/// A run to merge: consecutive pages onto consecutive slots, or all onto [`Slot::ZERO`].
#[derive(Clone, Copy, Debug)]
pub struct MergeRun {
    /// The pages, [`MAX_RUN`] at most.
    pub span: Span,
    /// The store that the slots belong to.
    pub store: StoreNumber,
    /// The slot of the first page.
    pub slot: Slot,
}

impl MergeRun {
    fn is_zero(&self) -> bool {
        self.slot == Slot::ZERO
    }

    /// The word of page `at` once it is committed.
    fn target(&self, at: usize, old: Word, state: State) -> Word {
        let next = old.next_generation().with_origin(Origin::Private).with_state(state);
        if self.is_zero() {
            next.without_frame()
        } else {
            next.with_frame(self.store, self.slot.plus(at as u32))
        }
    }
}

/// One page's bookkeeping during a run.
#[derive(Clone, Copy)]
struct Claim {
    /// The resting word it was claimed from.
    resting: Word,
    /// What of it is still ours.
    hold: Hold,
    /// Whether a witness has an eye on it.
    watched: bool,
    /// What a comparison before the freeze said, as long as it holds.
    early: Option<bool>,
}

/// How far a run owns a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Not, or no longer.
    None,
    /// Freezing, then Frozen: a writer may take it back.
    Frozen,
    /// Committing or Breaking: nobody else may touch it before it is put back.
    Owned,
}

impl Claim {
    const NONE: Claim = Claim {
        resting: Word::PRIVATE,
        hold: Hold::None,
        watched: false,
        early: None,
    };
}

/// The bookkeeping of a run, allocated once: a client thread that merges must not need memory.
pub struct Claims(Box<[Claim; MAX_RUN]>);

impl Claims {
    /// Room for the longest run.
    pub fn new() -> Claims {
        Claims(Box::new([Claim::NONE; MAX_RUN]))
    }
}

impl Default for Claims {
    fn default() -> Claims {
        Claims::new()
    }
}

/// Merges a run as far as its pages are equal; `verdicts` gets one entry per page. The first errno met comes back, with
/// everything that was not mapped thawed. In a shared region the home pages stay until [`settle`]. What the witness can vouch for is
/// compared before the freeze.
///
/// # Panics
/// If the run is longer than [`MAX_RUN`] or `verdicts` is shorter than the run.
pub fn merge_run<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    run: MergeRun,
    window: Option<&M::Window>,
    witness: &mut impl Witness,
    claims: &mut Claims,
    verdicts: &mut [Verdict],
) -> Result<(), Errno> {
    let pages = run.span.pages as usize;
    assert!(
        pages <= MAX_RUN && verdicts.len() >= pages,
        "a run of {pages} pages, at most {MAX_RUN}"
    );
    let claims = &mut claims.0[..pages];
    claims.fill(Claim::NONE);
    witness.watch(run.span, |page| {
        claims[(page.0 - run.span.first.0) as usize].watched = true
    });
    let watched = claims.iter().any(|claim| claim.watched);
    for (at, page) in run.span.iter().enumerate() {
        if claims[at].watched || mutant::active(Mutant::CompareBeforeFreeze) {
            claims[at].early = Some(memory.equals(page, window, at as u32));
        }
    }
    if watched && mutant::active(Mutant::WitnessAskedEarly) {
        ask(witness, run.span, claims);
    }

    failpoint::hit(Failpoint::MergeCompared);
    claim_run(words, &run, claims, verdicts);
    failpoint::hit(Failpoint::MergeFreezing);
    let mut trouble = freeze_won(words, memory, &run, claims, verdicts);
    if watched && !mutant::active(Mutant::WitnessAskedEarly) {
        ask(witness, run.span, claims);
    }
    failpoint::hit(Failpoint::MergeFrozen);
    let mut at = 0;
    while at < pages {
        let start = at;
        while at < pages && claims[at].hold == Hold::Frozen {
            let page = run.span.first.plus(at as u32);
            let equal = claims[at]
                .early
                .unwrap_or_else(|| memory.equals(page, window, at as u32));
            let frozen = frozen_word(claims[at].resting);
            if !equal {
                verdicts[at] = Verdict::Unequal;
                break;
            }
            if !words.cas(page, frozen, run.target(at, claims[at].resting, State::Committing)) {
                verdicts[at] = Verdict::Busy;
                break;
            }
            at += 1;
        }
        if at > start
            && let Err(errno) = commit(words, memory, &run, window, start..at, claims, verdicts)
        {
            trouble = trouble.and(Err(errno));
        }
        // Skips the page that ended the stretch: not held, unequal, or taken back.
        at += 1;
    }
    thaw_rest(words, memory, &run, claims)?;
    trouble
}

/// Forgets what was compared of pages that may have been written since.
fn ask(witness: &mut impl Witness, span: Span, claims: &mut [Claim]) {
    let vouches = witness.written(span, |page| claims[(page.0 - span.first.0) as usize].early = None);
    if !vouches {
        claims.iter_mut().for_each(|claim| claim.early = None);
    }
}

/// The word of a page while it is Frozen from this resting word.
fn frozen_word(resting: Word) -> Word {
    let origin = Origin::of(resting.state()).unwrap_or(Origin::Private);
    resting.with_origin(origin).with_state(State::Frozen)
}

/// Step 2a: takes every page that may be frozen into Freezing.
fn claim_run<W: Words>(words: &W, run: &MergeRun, claims: &mut [Claim], verdicts: &mut [Verdict]) {
    for (at, page) in run.span.iter().enumerate() {
        let word = words.load(page);
        let slot = run.slot;
        let wanted = (run.store, if run.is_zero() { slot } else { slot.plus(at as u32) });
        let may = match word.state() {
            State::Private | State::Broken | State::Detached => true,
            State::Merged => word.frame() != Some(wanted),
            _ => false,
        };
        verdicts[at] = Verdict::Busy;
        if word.state() == State::Merged && word.frame() == Some(wanted) || word.state() == State::Zero && run.is_zero()
        {
            verdicts[at] = Verdict::Moved;
        }
        if !may {
            continue;
        }
        let next = if mutant::active(Mutant::NoFreezing) {
            State::Frozen
        } else {
            State::Freezing
        };
        if words.cas(page, word, frozen_word(word).with_state(next)) {
            claims[at].resting = word;
            claims[at].hold = Hold::Frozen;
        }
    }
}

/// Step 2b: write-protects the maximal ranges won, and says so.
fn freeze_won<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    run: &MergeRun,
    claims: &mut [Claim],
    verdicts: &mut [Verdict],
) -> Result<(), Errno> {
    let mut trouble = Ok(());
    let mut at = 0;
    while let Some(range) = next_held(claims, Hold::Frozen, at) {
        at = range.end;
        let span = span_of(run.span.first, &range);
        let frozen = if mutant::active(Mutant::NoFreeze) {
            Ok(())
        } else {
            memory.protect(span, Access::ReadOnly)
        };
        match frozen {
            Ok(()) => {
                for (at, page) in range.clone().zip(span.iter()) {
                    if !mutant::active(Mutant::NoFreezing) {
                        words.store(page, frozen_word(claims[at].resting));
                    }
                }
            }
            Err(errno) => {
                // Whatever part of the range got it is thawed: the ends are where the mapping was split, if it was.
                put_back(words, memory, run.span.first, range.clone(), claims, false).ok();
                for at in range {
                    claims[at].hold = Hold::None;
                    verdicts[at] = Verdict::Failed;
                }
                trouble = Err(errno);
            }
        }
    }
    trouble
}

/// Step 4: puts the frames over pages in Committing.
fn commit<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    run: &MergeRun,
    window: Option<&M::Window>,
    range: core::ops::Range<usize>,
    claims: &mut [Claim],
    verdicts: &mut [Verdict],
) -> Result<(), Errno> {
    let span = span_of(run.span.first, &range);
    if mutant::active(Mutant::PunchBeforeMap) && memory.kind() == Kind::Shared {
        memory.punch_home(span).ok();
    }
    failpoint::hit(Failpoint::MergeCommitting);
    let mapped = match window {
        Some(window) if !run.is_zero() => memory.map_frames(span, window, range.start as u32),
        _ => memory.map_zero(
            span,
            range.clone().all(|at| claims[at].resting.state() == State::Private),
        ),
    };
    failpoint::hit(Failpoint::MergeMapped);
    match mapped {
        Ok(()) => {
            let resting = if run.is_zero() { State::Zero } else { State::Merged };
            for (at, page) in range.zip(span.iter()) {
                words.store(page, run.target(at, claims[at].resting, resting));
                let had_home = claims[at].resting.state() == State::Private;
                verdicts[at] = if had_home { Verdict::Merged } else { Verdict::Moved };
                claims[at].hold = Hold::None;
            }
            Ok(())
        }
        Err(errno) => {
            // They are thawed together with what lies around them: alone they might have to be split off, which fails at the
            // mapping limit.
            for at in range {
                claims[at].hold = Hold::Owned;
                verdicts[at] = Verdict::Failed;
            }
            Err(errno)
        }
    }
}

/// Step 5: gives back what is still frozen, and what could not be mapped.
///
/// At the mapping limit a thaw works only for a whole frozen range. A writer that owns a page in the middle just now makes both
/// its own thaw and ours fail, and leaves its page frozen with its mark: so what could not be thawed goes back to Frozen, the
/// writer is waited for (we own nothing then), and the rest is tried as a whole.
fn thaw_rest<W: Words, M: Memory>(words: &W, memory: &M, run: &MergeRun, claims: &mut [Claim]) -> Result<(), Errno> {
    let mut trouble = Ok(());
    for attempt in 0.. {
        let mut writer = None;
        for (at, page) in run.span.iter().enumerate() {
            if claims[at].hold != Hold::Frozen {
                continue;
            }
            let frozen = frozen_word(claims[at].resting);
            let breaking = frozen.with_state(State::Breaking);
            loop {
                let word = words.load(page);
                if word == breaking {
                    writer = Some((page, word));
                } else if word != frozen && word != frozen.cancelled() {
                    claims[at].hold = Hold::None;
                } else if words.cas(page, word, breaking) {
                    claims[at].hold = Hold::Owned;
                } else {
                    continue;
                }
                break;
            }
        }
        let mut left = false;
        let mut at = 0;
        while let Some(range) = next_held(claims, Hold::Owned, at) {
            at = range.end;
            match put_back(
                words,
                memory,
                run.span.first,
                range.clone(),
                claims,
                attempt < MAX_THAWS,
            ) {
                Ok(()) => claims[range].iter_mut().for_each(|claim| claim.hold = Hold::None),
                Err(errno) => {
                    claims[range].iter_mut().for_each(|claim| claim.hold = Hold::Frozen);
                    trouble = Err(errno);
                    left = attempt < MAX_THAWS;
                }
            }
        }
        match writer {
            Some((page, word)) => words.wait(page, word),
            None if left => {}
            None => break,
        }
    }
    trouble
}

/// How often a thaw that fails is tried before the fault handler is left to make the pages writable, one by one, as they are
/// written.
const MAX_THAWS: u32 = 1000;

/// Thaws owned pages and stores their resting words. A thaw over a whole frozen range splits no mapping, so it does not fail
/// at the mapping limit; pages of a part that does fail are Frozen again if `refreeze`, else at rest but still protected.
fn put_back<W: Words, M: Memory>(
    words: &W,
    memory: &M,
    first: Page,
    range: core::ops::Range<usize>,
    claims: &[Claim],
    refreeze: bool,
) -> Result<(), Errno> {
    let mut trouble = Ok(());
    for (part, access) in stretches(claims, range, |claim| resting_access(memory.kind(), claim.resting)) {
        let span = span_of(first, &part);
        let thawed = memory.protect(span, access);
        for (at, page) in part.zip(span.iter()) {
            let resting = claims[at].resting;
            words.store(
                page,
                if thawed.is_err() && refreeze {
                    frozen_word(resting)
                } else {
                    resting
                },
            );
        }
        trouble = trouble.and(thawed);
    }
    trouble
}

/// The next maximal range of claims held so, from `from` on.
fn next_held(claims: &[Claim], hold: Hold, from: usize) -> Option<core::ops::Range<usize>> {
    stretches(claims, from..claims.len(), |claim| claim.hold == hold)
        .find(|(_, held)| *held)
        .map(|(range, _)| range)
}

fn span_of(first: Page, range: &core::ops::Range<usize>) -> Span {
    Span {
        first: first.plus(range.start as u32),
        pages: range.len() as u32,
    }
}

/// The maximal ranges of `range` whose claims are alike under `key`.
fn stretches<K: PartialEq>(
    claims: &[Claim],
    range: core::ops::Range<usize>,
    key: impl Fn(&Claim) -> K,
) -> impl Iterator<Item = (core::ops::Range<usize>, K)> {
    let mut start = range.start;
    core::iter::from_fn(move || {
        if start >= range.end {
            return None;
        }
        let this = key(&claims[start]);
        let mut end = start + 1;
        while end < range.end && key(&claims[end]) == this {
            end += 1;
        }
        let found = start..end;
        start = end;
        Some((found, this))
    })
}

/// Frees the home pages under pages that a run just merged ([`Verdict::Merged`], no others), or, when another address space was
/// found to map the object, takes them back to their home, which is still complete. Pages that a writer broke meanwhile are left alone. Returns how many pages
/// were settled as asked; a home page that cannot be freed stays, merged but not saved. `alone` is to be known after the pages
/// merged: who comes later has them lent first.
pub fn settle<W: Words, M: Memory>(words: &W, memory: &M, span: Span, alone: bool) -> Result<u32, Errno> {
    // Taken back, the home is complete, and perhaps newer than the frame: somebody else may be writing to it. Freed, it may be anything
    // for a moment, and is to be written anew should this process end in it.
    let passing = if alone { State::Breaking } else { State::Homed };
    let mut settled = 0;
    let mut trouble = Ok(());
    let mut page = span.first;
    while page < span.end() {
        let mut end = page;
        while end < span.end() {
            let word = words.load(end);
            let shows = matches!(word.state(), State::Merged | State::Zero);
            if !shows || !words.cas(end, word, word.with_state(passing)) {
                break;
            }
            end = end.plus(1);
        }
        if end == page {
            page = page.plus(1);
            continue;
        }
        let part = Span {
            first: page,
            pages: end.0 - page.0,
        };
        failpoint::hit(Failpoint::SettleClaimed);
        let done = if alone {
            memory.punch_home(part)
        } else {
            memory.map_home(part)
        };
        failpoint::hit(Failpoint::SettlePunched);
        for page in part.iter() {
            let word = words.load(page);
            let rests = if alone || done.is_err() {
                showing(word)
            } else {
                private_again(word)
            };
            words.store(page, rests);
        }
        match done {
            Ok(()) => settled += part.pages,
            Err(errno) => trouble = Err(errno),
        }
        page = end;
    }
    trouble.map(|()| settled)
}

/// The word of a shared page that shows what it showed before somebody owned it: its frame, or zeros.
pub(crate) fn showing(word: Word) -> Word {
    let shows = if word.frame().is_some() {
        State::Merged
    } else {
        State::Zero
    };
    word.unlent().with_state(shows)
}

/// The word of a page that has its own memory again and lies over no slot.
pub(super) fn private_again(word: Word) -> Word {
    word.with_state(State::Private)
        .with_origin(Origin::Private)
        .without_frame()
        .uncancelled()
        .unlent()
}

/// Brings a Detached page of a shared region home. The page stays Detached, and writable, where there is no room for it. It is never
/// Frozen on the way: a remapper at work beside this would take that for its own freeze, and this a freeze of the remapper's, which may
/// have been thawed in part, for its own.
pub fn bring_home<W: Words, M: Memory>(words: &W, memory: &M, page: Page) -> Result<bool, Errno> {
    let word = words.load(page);
    let span = Span::one(page);
    if word.state() != State::Detached || !words.cas(page, word, word.with_state(State::Breaking)) {
        return Ok(false);
    }
    let homed = memory
        .protect(span, Access::ReadOnly)
        .and_then(|()| memory.fill_home(span))
        .and_then(|()| {
            words.store(page, word.with_state(State::Homed));
            memory.map_home(span)
        });
    match homed {
        Ok(()) => {
            words.store(page, private_again(word));
            Ok(true)
        }
        Err(errno) => {
            let thawed = memory.protect(span, Access::ReadWrite);
            words.store(page, word);
            thawed.and(Err(errno))
        }
    }
}
