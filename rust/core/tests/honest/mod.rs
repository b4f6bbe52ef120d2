//! Clients that answer at once and honestly, whatever core asks: for what is counted or timed of core alone.
//!
//! What a merged page holds changes only once it is said to be broken (`broke`), and a page of zeros has checksum 0. A page shows a frame if it
//! holds the same; nothing else is turned down, unless a scene says so.
#![allow(dead_code, reason = "each program uses its own part")]

use ksmrs_core::{Checksum, Core, Decision, Next, Observation, PageNumber};
use ksmrs_core::{Run, RunFailure, RunOutcome, Seen, Slot};
use std::time::Duration;

const NOWHERE: u32 = u32::MAX - 1;

/// All clients' pages, and the store.
pub struct Honest<F> {
    content: F,
    /// Slot by page number.
    slots: Vec<u32>,
    /// Of those that have a slot: whether it was written since.
    broken: Vec<bool>,
    frames: Vec<Checksum>,
    pub now: Duration,
    /// Whether clients turn down what is to be mapped, for somebody else has their memory too.
    pub accompanied: bool,
}

impl<F: Fn(PageNumber) -> Checksum> Honest<F> {
    pub fn new(pages: u32, slots: u32, content: F) -> Honest<F> {
        Honest {
            content,
            slots: vec![NOWHERE; pages as usize],
            broken: vec![false; pages as usize],
            frames: vec![Checksum(0); slots as usize],
            now: Duration::ZERO,
            accompanied: false,
        }
    }

    /// The page was written: it has memory of its own, if it showed a frame until now.
    pub fn broke(&mut self, page: PageNumber) {
        self.broken[page.0 as usize] |= self.slots[page.0 as usize] != NOWHERE;
    }

    /// What a scan finds; `first` says that nobody looked before.
    pub fn observe(&self, page: PageNumber, first: bool) -> Observation {
        match self.slots[page.0 as usize] {
            NOWHERE => Observation {
                seen: Seen::Own,
                checksum: Some(((self.content)(page), first)),
            },
            slot if self.broken[page.0 as usize] => Observation {
                seen: if Slot(slot) == Slot::ZERO {
                    Seen::Own
                } else {
                    Seen::Broken(Slot(slot))
                },
                checksum: Some(((self.content)(page), first)),
            },
            slot => Observation {
                seen: if Slot(slot) == Slot::ZERO {
                    Seen::Zero
                } else {
                    Seen::Merged(Slot(slot))
                },
                checksum: None,
            },
        }
    }

    fn map(&mut self, run: Run) -> RunOutcome {
        let mut outcome = RunOutcome::default();
        if self.accompanied {
            outcome.failure = Some(RunFailure::NotAlone);
            return outcome;
        }
        for (i, (page, slot)) in run.iter().enumerate() {
            let frame = self.frames.get(slot.0 as usize).copied().unwrap_or(Checksum(0));
            if frame != (self.content)(page) {
                continue;
            }
            (self.slots[page.0 as usize], self.broken[page.0 as usize]) = (slot.0, false);
            outcome.merged[i / 64] |= 1 << (i % 64);
        }
        outcome
    }

    pub fn carry_out(&mut self, core: &mut Core, decision: Decision) {
        match decision {
            Decision::Scan { order, ranges, .. } => {
                let first = core.full_scans() == 0;
                let pages = ranges.iter().flat_map(|range| range.iter());
                let observations: Vec<Observation> = pages.map(|page| self.observe(page, first)).collect();
                core.scanned(order, &(Default::default(), &observations[..]), self.now);
            }
            Decision::Stage { order, pages, .. } => {
                let mut checksums = Vec::new();
                for fill in core.staged(order, &|_| true) {
                    for i in 0..fill.pages {
                        let checksum = (self.content)(pages[usize::from(fill.staging_index + i)]);
                        self.frames[(fill.slot.0 + u32::from(i)) as usize] = checksum;
                        checksums.push(Some(checksum));
                    }
                }
                core.filled(order, &checksums);
            }
            Decision::Map { order, runs, .. } => {
                let outcomes: Vec<RunOutcome> = runs.iter().map(|&run| self.map(run)).collect();
                core.mapped(order, Default::default(), &outcomes);
            }
            Decision::Move { frames } => {
                let copy = |&(from, to): &(Slot, Slot)| {
                    self.frames[to.0 as usize] = self.frames[from.0 as usize];
                    Some(self.frames[to.0 as usize])
                };
                let checksums: Vec<_> = frames.iter().map(copy).collect();
                core.moved(&checksums);
            }
            Decision::Unmap { order, ranges, .. } => {
                let pages: Vec<PageNumber> = ranges.iter().flat_map(|range| range.iter()).collect();
                for page in &pages {
                    (self.slots[page.0 as usize], self.broken[page.0 as usize]) = (NOWHERE, false);
                }
                core.unmapped(order, Default::default(), &vec![Seen::Own; pages.len()]);
            }
            Decision::Punch { .. } => {}
        }
    }

    /// Core's next decision, if it does not ask for time first, which passes.
    fn next(&mut self, core: &mut Core) -> Option<Decision> {
        match core.next(self.now) {
            Next::Do(decision) => return Some(decision),
            Next::WaitUntil(then) => self.now = then.max(self.now),
            Next::Idle => panic!("core finds nothing to do: {:?}", core.stats()),
        }
        None
    }

    /// Carries out what core decides, up to a decision that is wanted, which comes back undone.
    ///
    /// # Panics
    /// If core finds nothing to do, or it does not come within a hundred passes.
    pub fn until(&mut self, core: &mut Core, mut wanted: impl FnMut(&Core, &Decision) -> bool) -> Decision {
        loop {
            assert!(core.full_scans() < 100, "it does not come: {:?}", core.stats());
            match self.next(core) {
                Some(decision) if wanted(core, &decision) => return decision,
                Some(decision) => self.carry_out(core, decision),
                None => {}
            }
        }
    }

    /// Goes on until so many passes are over.
    pub fn pass(&mut self, core: &mut Core, passes: u64) {
        while core.full_scans() < passes {
            if let Some(decision) = self.next(core) {
                self.carry_out(core, decision);
            }
        }
    }
}
