//! What merging would save in processes as they are, found by reading their memory once, and what looks equal once more.
//!
//! ```text
//!     processes --pagemap--> pages with a frame of their own --/proc/PID/mem--> checksum ----> 16 bytes a page --sort--> groups
//!                                                                `-> windows (shifted.rs) --> 12 bytes a page --> votes -> compared
//! ```
//!
//! A survey is done in steps that its caller times, so that it can rest in between, show how far it is, and end it. It relies on
//! nobody's cooperation and changes nothing in the processes (`process.rs` says how). Memory is bounded: when the list of
//! pages is full, half of all *contents* are forgotten, by their checksums. All copies of a content are kept or none, so every count of
//! duplicates is unbiased when it is divided by the fraction that was kept. Pages chosen by position would find the square of
//! that fraction of all pairs; and choosing pages by a few of their bytes would save no time, for finding a page costs the kernel more than copying it.

mod process;
mod shifted;
mod tally;

use crate::checksum::{self, Checksummer};
use crate::error::SysError;
use crate::object::PAGE_SIZE;
pub use process::Kind;
use process::{Ended, Entry, NOTHING, Place, Process};
use rustix::io::Errno;
pub use shifted::Shift;
use shifted::{Anchor, Stretch};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tally::{DUPLICATE, KERNEL, KSMRS, SHOWN, Seen, VOLATILE, ZEROS};
pub use tally::{Knobs, MOST_PROCESSES, Outcome, Share, Tally};

/// Bytes that the survey needs for each page it keeps: 16 for the page, and 48 for each fourth page's window and its vote.
pub const BYTES_PER_PAGE: usize = 28;
/// Pages read at once: 256 KiB, which stay in the second cache until they are hashed.
const AT_ONCE: usize = 64;
const PAGES_PER_ANCHOR: usize = 4;
/// The checksums are 48 bits.
const ALL: u64 = 1 << 48;
/// Shifts that are told one by one.
const MOST_SHIFTS: usize = 64;

/// How far a survey is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Every page is read.
    Look,
    /// What seems equal is read once more.
    LookAgain,
    /// What lies at other offsets is compared.
    Compare,
    /// Nothing is left to be done.
    Done,
}

/// Pages of one kind of mapping in a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Mappings of this kind.
    pub mappings: u64,
    /// Addresses, in pages.
    pub pages: u64,
    /// Pages in RAM.
    pub present: u64,
    /// Pages of anonymous memory in swap, which are not read.
    pub swapped: u64,
    /// Pages that share their frame with another page table, or are the kernel's page of zeros.
    pub shared: u64,
    /// Pages that were read.
    pub read: u64,
    /// Those of them that show a frame of ksmrs.
    pub merged: u64,
    /// Pages read that ksmrs could take.
    pub fit: u64,
    /// Pages read that kernel KSM could take.
    pub kernel: u64,
}

/// One process's part of a survey.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its number.
    pub pid: u32,
    /// Pages of zeros that were read; of those, what ksmrs and kernel KSM could take. They are counted apart, for they are one content.
    pub zeros: [u64; 3],
    /// Whether it ended, or ran another program, before it was read: then nothing of it counts.
    pub ended: bool,
    /// By `Kind as usize`.
    pub kinds: [Figures; Kind::ALL.len()],
}

/// A survey on its way.
pub struct Survey {
    sums: Checksummer,
    processes: Vec<Process>,
    found: Vec<Found>,
    pages: Vec<Seen>,
    anchors: Vec<Anchor>,
    most_pages: usize,
    least_pages: u64,
    /// Contents with a checksum below this are kept.
    kept: u64,
    /// Likewise windows.
    anchors_kept: u64,
    stage: Stage,
    /// Where the look is: a process, a mapping of it, a page in that.
    at: (usize, usize, u64),
    /// Where the second look is, in `pages`.
    again: usize,
    stretches: std::vec::IntoIter<Stretch>,
    /// What was found at other offsets, the longest first.
    pub shifts: Vec<Shift>,
    read: u64,
    to_read: u64,
    buffer: Vec<u8>,
}

impl Survey {
    /// A survey that keeps no more than this in memory, and no more than this fraction of all contents, and passes over mappings of
    /// fewer pages than these.
    ///
    /// # Errors
    /// No randomness for the key of its checksums.
    pub fn new(memory: usize, fraction: f64, least_pages: u64) -> Result<Survey, SysError> {
        Ok(Survey {
            sums: Checksummer::new(&checksum::random_key()?),
            processes: Vec::new(),
            found: Vec::new(),
            pages: Vec::new(),
            anchors: Vec::new(),
            most_pages: (memory / BYTES_PER_PAGE).max(AT_ONCE),
            least_pages,
            kept: ((fraction * ALL as f64) as u64).clamp(1, ALL),
            anchors_kept: ALL,
            stage: Stage::Look,
            at: (0, 0, 0),
            again: 0,
            stretches: Vec::new().into_iter(),
            shifts: Vec::new(),
            read: 0,
            to_read: 0,
            buffer: vec![0; AT_ONCE * PAGE_SIZE],
        })
    }

    /// Takes a process in, before the first step.
    ///
    /// # Errors
    /// ESRCH or ENOENT for a process that is none, EACCES or EPERM for one that may not be looked at; EEXIST for one whose memory is
    /// taken in already (a thread, a child of vfork).
    pub fn add(&mut self, pid: u32) -> Result<(), SysError> {
        let process = Process::open(pid)?;
        if self.processes.iter().any(|other| other.has_memory_of(&process)) {
            return Err(SysError::call("kcmp", "/proc/PID")(Errno::EXIST));
        }
        self.found.push(Found {
            pid,
            zeros: [0; 3],
            ended: false,
            kinds: [Figures::default(); Kind::ALL.len()],
        });
        self.processes.push(process);
        Ok(())
    }

    /// The processes in the order in which they were added.
    pub fn found(&self) -> &[Found] {
        &self.found
    }

    /// What it does now, pages looked at so far in this stage, and how many there seem to be.
    pub fn progress(&self) -> (Stage, u64, u64) {
        let (done, all) = match self.stage {
            Stage::Look => (self.read, self.to_read),
            Stage::LookAgain => (self.again as u64, self.pages.len() as u64),
            Stage::Compare => (0, self.stretches.len() as u64),
            Stage::Done => (0, 0),
        };
        (self.stage, done.min(all), all)
    }

    /// The fraction of all contents that is kept, and the same of windows.
    pub fn fractions(&self) -> (f64, f64) {
        (self.kept as f64 / ALL as f64, self.anchors_kept as f64 / ALL as f64)
    }

    /// Pages kept.
    pub fn pages_kept(&self) -> usize {
        self.pages.len()
    }

    /// Once all processes are known: what there is, and room for what will be kept.
    fn begin(&mut self) {
        // ksmrs merges an object's memory while one process has it.
        let mut owners = HashMap::new();
        for (index, process) in self.processes.iter().enumerate() {
            for object in process.places.iter().filter_map(|place| place.object) {
                let owner = owners.entry(object).or_insert(Some(index));
                *owner = owner.filter(|owner| *owner == index);
            }
        }
        for (process, found) in self.processes.iter_mut().zip(&mut self.found) {
            for place in &mut process.places {
                if place.object.is_some_and(|object| owners[&object].is_none()) {
                    place.kind = Kind::File;
                }
                let figures = &mut found.kinds[place.kind as usize];
                figures.mappings += 1;
                figures.pages += place.pages.end - place.pages.start;
                figures.swapped += place.swapped;
                if place.is_read(self.least_pages) {
                    self.to_read += place.resident;
                } else {
                    figures.present += place.resident;
                }
            }
        }
        // Addresses only, which get memory as they are written: no list is ever copied to a larger one.
        let expected = usize::try_from(self.to_read).unwrap_or(usize::MAX);
        let expected = self.most_pages.min(expected.saturating_add(expected / 8 + AT_ONCE));
        self.pages.reserve_exact(expected);
        self.anchors.reserve_exact(expected / PAGES_PER_ANCHOR + AT_ONCE);
    }

    /// Works for about this long, or until a stage is over.
    pub fn step(&mut self, time: Duration) {
        let (begun, stage) = (Instant::now(), self.stage);
        if self.pages.capacity() == 0 {
            self.begin();
        }
        while self.stage == stage && self.stage != Stage::Done && begun.elapsed() < time {
            match self.stage {
                Stage::Look => self.look(),
                Stage::LookAgain => self.look_again(),
                Stage::Compare => self.compare(),
                Stage::Done => {}
            }
        }
    }

    fn end_process(&mut self, process: usize) {
        self.processes[process].ended = true;
        self.found[process].ended = true;
        self.pages.retain(|seen| seen.process() != process);
    }

    fn look(&mut self) {
        let (process, index, page) = self.at;
        let Some(looked_at) = self.processes.get(process) else {
            tally::mark(&mut self.pages);
            self.stage = Stage::LookAgain;
            return;
        };
        let Some(place) = looked_at.places.get(index).filter(|_| !looked_at.ended) else {
            self.at = (process + 1, 0, 0);
            return;
        };
        let first = page.max(place.pages.start);
        if !place.is_read(self.least_pages) || first >= place.pages.end {
            self.at = (process, index + 1, 0);
            return;
        }
        let mut entries = [NOTHING; AT_ONCE];
        let count = (place.pages.end - first).min(AT_ONCE as u64) as usize;
        self.at = (process, index, first + count as u64);
        if self.look_at(process, index, first, &mut entries[..count]).is_err() {
            self.end_process(process);
            return;
        }
        // A sanitizer's shadow has terabytes of addresses, and its pagemap takes a minute to be read.
        if !entries[..count].iter().any(|entry| entry.is_present()) {
            let place = &self.processes[process].places[index];
            self.at.2 = self.processes[process].first_present(self.at.2..place.pages.end);
        }
    }

    fn look_at(&mut self, process: usize, index: usize, first: u64, entries: &mut [Entry]) -> Result<(), Ended> {
        self.processes[process].entries(first, entries)?;
        let mut next = 0;
        while next < entries.len() {
            let place = &self.processes[process].places[index];
            let figures = &mut self.found[process].kinds[place.kind as usize];
            let flags = flags(place, entries[next], figures);
            let begun = next;
            next += 1;
            let Some(flags) = flags else { continue };
            while next < entries.len() && begins_alike(place, entries[next], entries[begun]) {
                let _ = self::flags(place, entries[next], figures);
                next += 1;
            }
            self.read_run(process, index, first + begun as u64, next - begun, flags)?;
        }
        Ok(())
    }

    fn read_run(&mut self, process: usize, index: usize, first: u64, pages: usize, flags: u64) -> Result<(), Ended> {
        let bytes = &mut self.buffer[..pages * PAGE_SIZE];
        let read = self.processes[process].read(first * PAGE_SIZE as u64, bytes)?;
        let bytes = &bytes[..read / PAGE_SIZE * PAGE_SIZE];
        let whole = bytes.as_chunks::<PAGE_SIZE>().0;
        let figures = &mut self.found[process].kinds[self.processes[process].places[index].kind as usize];
        figures.read += whole.len() as u64;
        self.read += pages as u64;
        for (count, flag) in [
            (&mut figures.merged, SHOWN),
            (&mut figures.fit, KSMRS),
            (&mut figures.kernel, KERNEL),
        ] {
            *count += if flags & flag != 0 { whole.len() as u64 } else { 0 };
        }
        for (page, bytes) in (first..).zip(whole) {
            let key = key(&self.sums, bytes);
            if key == ZEROS && flags & SHOWN == 0 {
                let zeros = &mut self.found[process].zeros;
                zeros[0] += 1;
                zeros[1] += u64::from(flags & KSMRS != 0);
                zeros[2] += u64::from(flags & KERNEL != 0);
            }
            if is_kept(key, self.kept) {
                self.pages.push(Seen::new(key, process, page, flags));
            }
        }
        if flags & (KSMRS | SHOWN) == KSMRS {
            let kept = self.anchors_kept;
            shifted::anchors(bytes, process, first * PAGE_SIZE as u64, &self.sums, |anchor| {
                if anchor.checksum48() < kept {
                    self.anchors.push(anchor);
                }
            });
        }
        self.keep_within_bounds();
        Ok(())
    }

    /// Forgets half of all contents, as often as it takes.
    fn keep_within_bounds(&mut self) {
        while self.pages.len() + AT_ONCE > self.most_pages && self.kept > 1 {
            self.kept /= 2;
            let kept = self.kept;
            self.pages.retain(|seen| is_kept(seen.key, kept));
        }
        while self.anchors.len() > self.most_pages / PAGES_PER_ANCHOR && self.anchors_kept > 1 {
            self.anchors_kept /= 2;
            let kept = self.anchors_kept;
            self.anchors.retain(|anchor| anchor.checksum48() < kept);
        }
    }

    /// Reads the next pages that seem to be equal once more, and notes which are not what they were.
    fn look_again(&mut self) {
        let rest = &self.pages[self.again..];
        let Some(skipped) = rest.iter().position(|seen| seen.has(DUPLICATE)) else {
            self.again = self.pages.len();
            self.stretches = shifted::stretches(core::mem::take(&mut self.anchors)).into_iter();
            self.stage = Stage::Compare;
            return;
        };
        let begun = self.again + skipped;
        let next_to = |index: usize| {
            let (one, other) = (self.pages[index - 1], self.pages[index]);
            other.has(DUPLICATE) && other.where_it_is() == one.where_it_is() + 1
        };
        let most = (begun + AT_ONCE).min(self.pages.len());
        let end = (begun + 1..most).find(|index| !next_to(*index)).unwrap_or(most);
        self.again = end;
        let process = self.pages[begun].process();
        if self.confirm(begun, end).is_err() {
            // Those of it that were confirmed go as well.
            self.again -= self.pages[..end]
                .iter()
                .filter(|seen| seen.process() == process)
                .count();
            self.end_process(process);
        }
    }

    fn confirm(&mut self, begun: usize, end: usize) -> Result<(), Ended> {
        let (first, count) = (self.pages[begun], end - begun);
        let process = &self.processes[first.process()];
        let mut entries = [NOTHING; AT_ONCE];
        process.entries(first.page(), &mut entries[..count])?;
        for (index, entry) in (begun..end).zip(entries) {
            let seen = &mut self.pages[index];
            let as_before = entry.is_present() && (seen.has(SHOWN) || entry.is_exclusive());
            let page = &mut self.buffer[..PAGE_SIZE];
            let is_equal = as_before
                && process.read(seen.page() * PAGE_SIZE as u64, page)? == PAGE_SIZE
                && page
                    .as_chunks()
                    .0
                    .first()
                    .is_some_and(|page| key(&self.sums, page) == seen.key);
            seen.set(VOLATILE, !is_equal);
        }
        Ok(())
    }

    fn compare(&mut self) {
        let Some(stretch) = self.stretches.next() else {
            self.shifts
                .sort_unstable_by_key(|shift| core::cmp::Reverse(shift.pages));
            self.shifts.truncate(MOST_SHIFTS);
            self.stage = Stage::Done;
            return;
        };
        let shift = shifted::compare(stretch, &self.processes, &mut self.pages);
        self.shifts.extend(shift);
    }

    /// Counts, once it is done.
    pub fn tally(&mut self, ksmrs: Knobs, kernel: Knobs, mappings: u64) -> Tally {
        let mut tally = tally::tally(&mut self.pages, self.processes.len(), ksmrs, kernel);
        if self.kept == ALL {
            tally::spend(&mut self.pages, mappings, &mut tally);
        }
        for seen in &self.pages {
            if seen.has(tally::SHIFTED) {
                tally.shares[seen.process()].pages_out_of_phase += 1;
            }
        }
        tally
    }

    /// A byte for each page of a process that was kept, in the order of their addresses: its class.
    pub fn classes(&self, process: usize) -> Vec<u8> {
        let its_own = self.pages.iter().filter(|seen| seen.process() == process);
        its_own.map(|seen| tally::class(*seen)).collect()
    }
}

/// Whether a content is among those that are kept. Zeros, often more than all others, are known by their number once not all are.
fn is_kept(key: u64, kept: u64) -> bool {
    key < kept && (key != ZEROS || kept == ALL)
}

/// What a page is for merging; `None` if it is not read. Counts it.
fn flags(place: &Place, entry: Entry, figures: &mut Figures) -> Option<u64> {
    if !entry.is_present() {
        return None;
    }
    figures.present += 1;
    let flags = role(place, entry);
    if flags.is_none() && (entry.is_file() == (place.kind == Kind::Shared)) {
        figures.shared += 1;
    }
    flags
}

fn begins_alike(place: &Place, entry: Entry, first: Entry) -> bool {
    entry.is_present() && role(place, entry) == role(place, first)
}

fn role(place: &Place, entry: Entry) -> Option<u64> {
    let anonymous = !entry.is_file() && entry.is_exclusive();
    let ksmrs = if place.unfit.is_none() { KSMRS } else { 0 };
    let kernel = if place.kernel { KERNEL } else { 0 };
    match place.kind {
        Kind::Shared => (entry.is_file() && entry.is_exclusive()).then_some(ksmrs),
        Kind::Frames if entry.is_file() => Some(SHOWN),
        _ => anonymous.then_some(ksmrs | kernel),
    }
}

fn key(sums: &Checksummer, page: &[u8; PAGE_SIZE]) -> u64 {
    if page.iter().all(|byte| *byte == 0) {
        ZEROS
    } else {
        sums.page(page)
    }
}
