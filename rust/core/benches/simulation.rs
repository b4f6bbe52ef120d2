//! Core without a kernel: ten thousand clients and 1 TiB of pages, by default, and what deciding about them costs.
//!
//!     cargo bench -p ksmrs-core --bench simulation -- [CLIENTS [PAGES_EACH [SMART_PASSES]]]
//!
//! The clients are programs in groups of a hundred. A stretch of 64 pages is, by a hash, the group's own (40 of 100: the same
//! in all of its processes), a pair's (20), zeros (10), or unlike any other (30). Everybody answers at once and honestly, and time is what core
//! says it would wait for, so all that is measured is core: the time within its methods, and what it allocates by its own count. At the end a
//! newcomer with 10 GiB joins, and two with 64 MiB each, equal to one another, in the middle of a pass: how long until nine tenths of what the
//! two can save is saved, and how long where they are alone, is told for the fewest and the most pages per batch that the advisor says by
//! default; a page looked at takes half a microsecond then. Prints one JSON object, and on stderr
//! what goes into it as it is found. Needs about 36 bytes of memory per simulated page.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it is a program, and this its report"
)]

use ksmrs_core::{
    Checksum, ClientId, Core, Decision, Epoch, Kind, Next, Observation, PageNumber, Run, RunOutcome, Seen, Slot,
};
use std::time::{Duration, Instant};

const GROUP: u32 = 100;
const STRETCH: u32 = 64;
const ZERO: Checksum = Checksum(0);
const NEWCOMER_PAGES: u32 = 10 << 18;
const LATECOMER_PAGES: u32 = 64 << 8;
const LOOK: Duration = Duration::from_nanos(500);
const NOWHERE: u32 = u32::MAX - 1;

fn mixed(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// What a page of a client holds.
fn content(client: u32, page: u32) -> Checksum {
    let group = client / GROUP;
    let owner = match mixed(group.into(), (page / STRETCH).into()) % 100 {
        0..40 => u64::from(group) | 1 << 40,
        40..60 => u64::from(client / 2) | 1 << 41,
        60..70 => return ZERO,
        _ => u64::from(client) | 1 << 42,
    };
    Checksum(mixed(owner, page.into()) & Checksum::MASK | 1)
}

/// One client's place among the page numbers; `like` is whose content it has.
#[derive(Clone, Copy)]
struct Region {
    like: u32,
    merged: u32,
    first: PageNumber,
    pages: u32,
    looked_at: u32,
}

struct Simulation {
    core: Core,
    now: Duration,
    /// Time within core's methods.
    spent: Duration,
    regions: Vec<Region>,
    /// Slot per page number.
    slots: Vec<u32>,
    /// Whose the page number is, and the look in which its checksum took its value.
    owners: Vec<u32>,
    since: Vec<u16>,
    frames: Vec<Checksum>,
    longest: Duration,
    unequal: u64,
    /// What looking at a page takes of the clock.
    look: Duration,
}

impl Simulation {
    fn timed<T>(&mut self, call: impl FnOnce(&mut Core) -> T) -> T {
        let began = Instant::now();
        let answer = call(&mut self.core);
        let took = began.elapsed();
        self.spent += took;
        self.longest = self.longest.max(took);
        answer
    }

    fn new(pages: u64, knobs: &[(&str, &str)]) -> Simulation {
        let mut core = Core::new(u32::try_from(pages.min(1 << 31)).unwrap_or(1 << 31), ZERO);
        for (knob, value) in knobs {
            core.set(knob, value).expect("a valid knob");
        }
        Simulation {
            core,
            now: Duration::ZERO,
            spent: Duration::ZERO,
            regions: Vec::new(),
            slots: Vec::new(),
            owners: Vec::new(),
            since: Vec::new(),
            frames: Vec::new(),
            longest: Duration::ZERO,
            unequal: 0,
            look: Duration::ZERO,
        }
    }

    fn join(&mut self, pages: u32, like: Option<u32>) {
        let client = self.regions.len() as u32;
        let like = like.unwrap_or(client);
        let id = ClientId(client);
        self.core.client_joined(id);
        let (_, first) = self
            .timed(|core| core.region_joined(id, Kind::Private, pages, 0))
            .expect("page numbers");
        let end = (first.0 + pages) as usize;
        if self.slots.len() < end {
            self.slots.resize(end, NOWHERE);
            self.owners.resize(end, u32::MAX);
            self.since.resize(end, 0);
        }
        self.since[first.0 as usize..end].fill(0);
        self.owners[first.0 as usize..end].fill(client);
        self.regions.push(Region {
            like,
            first,
            pages,
            looked_at: 0,
            merged: 0,
        });
    }

    fn content(&self, page: PageNumber) -> Checksum {
        let client = self.owners[page.0 as usize];
        let region = self.regions[client as usize];
        content(region.like, page.0 - region.first.0)
    }

    fn observe(&mut self, page: PageNumber, look: u16) -> Observation {
        let index = page.0 as usize;
        let since = &mut self.since[index];
        if *since == 0 {
            *since = look;
        }
        let changed = *since == look;
        match Slot(self.slots[index]) {
            Slot(NOWHERE) => Observation {
                seen: Seen::Own,
                checksum: Some((self.content(page), changed)),
            },
            Slot::ZERO => Observation {
                seen: Seen::Zero,
                checksum: None,
            },
            slot => Observation {
                seen: Seen::Merged(slot),
                checksum: None,
            },
        }
    }

    fn map(&mut self, run: Run) -> RunOutcome {
        let mut outcome = RunOutcome::default();
        for (i, (page, slot)) in run.iter().enumerate() {
            let frame = if slot == Slot::ZERO {
                ZERO
            } else {
                self.frames[slot.0 as usize]
            };
            if frame == self.content(page) {
                self.slots[page.0 as usize] = slot.0;
                self.regions[self.owners[page.0 as usize] as usize].merged += 1;
                outcome.merged[i / 64] |= 1 << (i % 64);
            } else {
                self.unequal += 1;
            }
        }
        outcome
    }

    fn fill(&mut self, slot: Slot, content: Checksum) {
        let index = slot.0 as usize;
        if self.frames.len() <= index {
            self.frames.resize(index + 1, ZERO);
        }
        self.frames[index] = content;
    }

    fn carry_out(&mut self, decision: Decision) {
        match decision {
            Decision::Scan {
                client,
                order,
                pass,
                ranges,
                ..
            } => {
                let observations: Vec<Observation> = ranges
                    .iter()
                    .flat_map(|range| range.iter())
                    .map(|page| self.observe(page, pass))
                    .collect();
                self.regions[client.0 as usize].looked_at += observations.len() as u32;
                self.now += self.look * observations.len() as u32;
                let now = self.now;
                self.timed(|core| core.scanned(order, &(Epoch(1), &observations[..]), now));
            }
            Decision::Stage { order, pages, .. } => {
                let fills = self.timed(|core| core.staged(order, &|_| true));
                let mut checksums = Vec::new();
                for fill in fills {
                    for i in 0..fill.pages {
                        let content = self.content(pages[usize::from(fill.staging_index + i)]);
                        self.fill(fill.slot.stepped(i.into()), content);
                        checksums.push(Some(content));
                    }
                }
                self.timed(|core| core.filled(order, &checksums));
            }
            Decision::Map { order, runs, .. } => {
                let outcomes: Vec<RunOutcome> = runs.iter().map(|&run| self.map(run)).collect();
                self.timed(|core| core.mapped(order, Epoch(1), &outcomes));
            }
            Decision::Move { frames } => {
                let mut checksums = Vec::new();
                for (from, to) in frames {
                    let content = self.frames[from.0 as usize];
                    self.fill(to, content);
                    checksums.push(Some(content));
                }
                self.timed(|core| core.moved(&checksums));
            }
            Decision::Unmap { .. } | Decision::Punch { .. } => {}
        }
    }

    fn step(&mut self) -> bool {
        let now = self.now;
        match self.timed(|core| core.next(now)) {
            Next::Do(decision) => self.carry_out(decision),
            Next::WaitUntil(then) => self.now = then.max(now),
            Next::Idle => return false,
        }
        true
    }

    /// Two equal clients join: how long until nine tenths of what they can save is saved, by the clock.
    fn latecomers(&mut self) -> Duration {
        let first = self.regions.len();
        self.look = LOOK;
        for _ in 0..2 {
            self.join(LATECOMER_PAGES, Some(u32::MAX));
        }
        let began = self.now;
        while self.regions[first..].iter().map(|region| region.merged).sum::<u32>() < LATECOMER_PAGES * 2 / 10 * 9 {
            assert!(self.step(), "nothing to do: {:?}", self.core.stats());
        }
        self.look = Duration::ZERO;
        self.now - began
    }

    /// Goes on to the end of the pass, or until `stop` says so.
    fn pass(&mut self, stop: impl Fn(&Simulation) -> bool) -> Pass {
        let (scans, scanned) = (self.core.full_scans(), self.core.stats().pages_scanned);
        (self.spent, self.longest) = Default::default();
        let (simulated, began) = (self.now, Instant::now());
        while self.core.full_scans() == scans && !stop(self) && self.step() {}
        let stats = self.core.stats();
        let pages = stats.pages_scanned - scanned;
        Pass {
            pages,
            spent: self.spent,
            longest: self.longest,
            simulated: self.now - simulated,
            wall: began.elapsed(),
            metadata: self.core.metadata_bytes(),
        }
    }
}

struct Pass {
    pages: u64,
    spent: Duration,
    longest: Duration,
    simulated: Duration,
    wall: Duration,
    metadata: usize,
}

impl Pass {
    fn json(&self, name: &str, all_pages: u64) -> String {
        format!(
            r#"{{"pass": "{name}", "pages": {}, "core_seconds": {:.3}, "ns_per_page": {:.1}, "longest_call_ms": {:.2}, "slept_seconds": {:.2}, "wall_seconds": {:.1}, "metadata_bytes_per_page": {:.2}}}"#,
            self.pages,
            self.spent.as_secs_f64(),
            self.spent.as_nanos() as f64 / self.pages.max(1) as f64,
            self.longest.as_secs_f64() * 1e3,
            self.simulated.as_secs_f64(),
            self.wall.as_secs_f64(),
            16.0 + self.metadata as f64 / all_pages as f64,
        )
    }
}

/// A newcomer with 10 GiB joins when a quarter of the pass is done, and then the two.
fn latecomers(simulation: &mut Simulation, batch: &str) -> Duration {
    simulation.pass(|_| false);
    let all: u64 = simulation.regions.iter().map(|region| u64::from(region.pages)).sum();
    let (before, quarter) = (simulation.core.stats(), all / 4);
    simulation.pass(|simulation| {
        let now = simulation.core.stats();
        now.pages_scanned + now.pages_skipped - before.pages_scanned - before.pages_skipped >= quarter
    });
    simulation.core.set("pages_to_scan", batch).expect("a valid knob");
    // What is left of the large batch is over when time goes on.
    let then = simulation.now;
    while simulation.now == then && simulation.step() {}
    simulation.join(NEWCOMER_PAGES, None);
    let wait = simulation.latecomers();
    simulation.core.set("pages_to_scan", "1000000").expect("a valid knob");
    wait
}

fn main() {
    let numbers: Vec<u32> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let clients = numbers.first().copied().unwrap_or(10_000);
    let each = numbers.get(1).copied().unwrap_or(26_844);
    let pages = u64::from(clients) * u64::from(each);
    let knobs = [
        ("advisor_mode", "none"),
        ("pages_to_scan", "1000000"),
        ("smart_scan", "0"),
    ];
    let mut simulation = Simulation::new(pages, &knobs);
    for _ in 0..clients {
        simulation.join(each, None);
    }
    let mut passes = Vec::new();
    for name in ["first look", "candidates, merges", "steady", "steady again"] {
        passes.push(simulation.pass(|_| false).json(name, pages));
        eprintln!("{}", passes[passes.len() - 1]);
    }
    let merged = simulation.core.stats();
    simulation.core.set("smart_scan", "1").expect("a valid knob");
    for _ in 0..numbers.get(2).copied().unwrap_or(12) {
        simulation.pass(|_| false);
    }
    passes.push(simulation.pass(|_| false).json("smart scan", pages));
    eprintln!("{}", passes[passes.len() - 1]);

    // A newcomer with a hundred times the others' memory, looked at when half of the others are done.
    simulation.core.set("smart_scan", "0").expect("a valid knob");
    simulation.pass(|_| false);
    simulation.join(NEWCOMER_PAGES, None);
    simulation.regions.iter_mut().for_each(|region| region.looked_at = 0);
    let newcomer = simulation.regions.len() - 1;
    let half = clients as usize / 2;
    simulation.pass(|simulation| simulation.regions[half].looked_at >= simulation.regions[half].pages);
    let mut looked_at: Vec<u32> = simulation.regions[..newcomer]
        .iter()
        .map(|region| region.looked_at)
        .collect();
    looked_at.sort_unstable();
    let fairness = format!(
        r#"{{"median": {}, "least": {}, "most": {}, "newcomer_with_10_gib": {}}}"#,
        looked_at[half],
        looked_at[0],
        looked_at[newcomer - 1],
        simulation.regions[newcomer].looked_at
    );
    simulation.core.set("smart_scan", "1").expect("a valid knob");
    let waits = ["500", "30000"].map(|batch| {
        let wait = latecomers(&mut simulation, batch);
        let mut alone = Simulation::new((2 * LATECOMER_PAGES).into(), &knobs);
        alone.core.set("pages_to_scan", batch).expect("a valid knob");
        let alone = alone.latecomers();
        let (wait, alone) = (wait.as_secs_f64(), alone.as_secs_f64());
        let found = format!(r#"{{"pages_to_scan": {batch}, "seconds": {wait:.2}, "alone": {alone:.2}}}"#);
        eprintln!("{found}");
        found
    });
    println!(
        r#"{{"clients": {clients}, "pages": {pages}, "gib": {:.1}, "pages_shared": {}, "pages_sharing": {}, "pages_unshared": {}, "ksm_zero_pages": {}, "proposals_unequal": {}, "passes": [{}], "pages_looked_at_when_half_is_done": {fairness}, "latecomers_with_64_mib_save": [{}]}}"#,
        pages as f64 / f64::from(1 << 18),
        merged.pages_shared,
        merged.pages_sharing,
        merged.pages_unshared,
        merged.ksm_zero_pages,
        simulation.unequal,
        passes.join(", "),
        waits.join(", "),
    );
}
