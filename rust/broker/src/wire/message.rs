//! The messages, both directions, with the limits of each.
//!
//! On the wire a page is the index of its words in its client's page table; a region has the number that its client gave it.
//! Nothing here knows what a message leads to.

use serde::{Deserialize, Serialize};

use super::WireError;

/// Whether a region's memory is private anonymous memory or a shared object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Private anonymous memory.
    Private,
    /// A MAP_SHARED object with a home view.
    Shared,
}

/// The named object that a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Its `st_dev`.
    pub device: u64,
    /// Its `st_ino`.
    pub inode: u64,
    /// Where in it the region begins, in bytes.
    pub offset: u64,
}

/// Consecutive pages of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// The first page's index in the table.
    pub first_word: u32,
    /// How many.
    pub pages: u32,
}

/// Consecutive pages for consecutive frames, or all for the zero page (`u32::MAX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first page's index in the table.
    pub first_word: u32,
    /// How many, 512 at most.
    pub pages: u16,
    /// The first frame.
    pub slot: u32,
}

/// A yes or no for each of some pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bits {
    /// Yes for all.
    All,
    /// No for all.
    None,
    /// Lowest bit first.
    Some(Vec<u8>),
}

impl Bits {
    /// Asks for each of `count` pages.
    pub fn collect(count: u32, mut bit: impl FnMut(u32) -> bool) -> Bits {
        let mut bytes = vec![0u8; count.div_ceil(8) as usize];
        let mut set = 0;
        for index in (0..count).filter(|&index| bit(index)) {
            bytes[index as usize / 8] |= 1 << (index % 8);
            set += 1;
        }
        match set {
            0 => Bits::None,
            _ if set == count => Bits::All,
            _ => Bits::Some(bytes),
        }
    }

    /// The answer for one page; no beyond the end.
    pub fn get(&self, index: u32) -> bool {
        match self {
            Bits::All => true,
            Bits::None => false,
            Bits::Some(bytes) => bytes
                .get(index as usize / 8)
                .is_some_and(|byte| byte & 1 << (index % 8) != 0),
        }
    }

    /// How many of `count` pages have a yes.
    pub fn count(&self, count: u32) -> u32 {
        match self {
            Bits::All => count,
            Bits::None => 0,
            Bits::Some(_) => (0..count).filter(|&index| self.get(index)).count() as u32,
        }
    }

    /// Whether this answers for exactly `count` pages.
    ///
    /// # Errors
    /// [`WireError::Limit`] otherwise.
    pub fn check(&self, count: u32) -> Result<(), WireError> {
        let limit = count.div_ceil(8) as usize;
        match self {
            Bits::Some(bytes) if bytes.len() != limit => Err(WireError::Limit {
                what: "bytes of a bitmap",
                found: bytes.len(),
                limit,
            }),
            _ => Ok(()),
        }
    }
}

/// Why a run or an order could not be done as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// At the limit of mappings (ENOMEM from mprotect, mmap or mremap), or over the client's own budget.
    Mappings,
    /// No memory.
    Memory,
    /// The pages' region is leaving or gone.
    Gone,
    /// The client is giving up its merging, for instance within a fork; some pages may have shown their frames for a moment.
    NotNow,
    /// Another address space has the memory of a shared region mapped: nothing was tried.
    NotAlone,
    /// It would have split a huge page, which the order did not allow.
    WouldSplit,
    /// Any other errno.
    Errno(i32),
}

/// What became of one run of a Map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunOutcome {
    /// Per page, whether it is Merged (or Zero) now; a no means "not equal, or written meanwhile" unless there is a failure.
    pub merged: Bits,
    /// Why the rest could not be tried.
    pub failure: Option<Failure>,
}

/// What a scan did and took; the words tell what was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanCounts {
    /// Pages whose memory was read.
    pub read: u32,
    /// Pages known to be unwritten without reading them.
    pub clean: u32,
    /// Pages without memory, transient or held.
    pub passed_over: u32,
    /// CPU time of the client's scanner and remapper that no answer to a Scan, Stage or Map told before, in microseconds: for the
    /// advisor and the client's ceiling.
    pub cpu_micros: u32,
}

/// Why pages are to be unmerged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// `run` was set to 2.
    Run,
    /// The client's mappings are needed for something better.
    Budget,
    /// Their frames go away.
    Store,
}

/// In the flags of a Join: the words of the region name frames already, for it came by a fork.
pub const BORN: u32 = 1;

/// Which client a forked child was born of, and what its words call that client's store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The broker's number for it.
    pub client: u32,
    /// The store's number in its words, and in the child's.
    pub store: u8,
    /// The key that came with it: no other domain of any broker has the same.
    pub key: [u8; 16],
}

/// What a client may ask at any time after Welcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// The domain's counters.
    Stats,
    /// This client's counters.
    ProcessStats,
    /// One knob.
    Get(String),
    /// All knobs.
    Knobs,
    /// Sets a knob.
    Set {
        /// The kernel's name.
        knob: String,
        /// As it would be written to the file of that name.
        value: String,
    },
    /// Scan and merge now, until nothing merges any more.
    Merge {
        /// When to answer at the latest.
        timeout_ms: Option<u64>,
    },
    /// How the broker is.
    Status,
    /// What the domain's pages count as.
    PageMap {
        /// The page to go on with, as the last answer named it; 0 to begin.
        from: u32,
    },
}

/// Named counters, in the order in which they are shown.
pub type Counters = Vec<(String, i64)>;

/// How the broker is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its process.
    pub pid: u32,
    /// Its release.
    pub release: String,
    /// Connected clients.
    pub clients: u32,
    /// Domains with clients or frames.
    pub domains: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// Its resident memory in bytes, the frame stores not counted.
    pub resident_bytes: u64,
    /// Memory in all frame stores, in bytes.
    pub store_bytes: u64,
    /// CPU time it used.
    pub cpu_ms: u64,
    /// Whether it runs inside a client.
    pub embedded: bool,
    /// Why an extent of frames last did not become a huge page; `None` where each did.
    pub huge_declined: Option<String>,
}

/// Neighbouring pages of one region that count as one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stretch {
    /// The client's process as the broker sees it, 0 where it cannot.
    pub pid: u32,
    /// The client's number.
    pub client: u32,
    /// The region's number in the domain.
    pub region: u32,
    /// Whether that is shared memory.
    pub shared: bool,
    /// The first page, counted from the region's.
    pub first: u32,
    /// How many.
    pub pages: u32,
    /// As `ksmrs_core::Class` numbers them.
    pub class: u8,
}

/// What a requested merge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeReport {
    /// Pages merged meanwhile, in all clients of the domain.
    pub pages_merged: u64,
    /// Rounds over all clients.
    pub rounds: u32,
    /// Whether nothing more was to be merged; otherwise time was up.
    pub finished: bool,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// Answers, in the order of the questions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The domain's counters.
    Stats(Counters),
    /// The client's counters.
    ProcessStats(Counters),
    /// A knob's value.
    Value(String),
    /// All knobs with their values.
    Knobs(Vec<(String, String)>),
    /// The knob is set.
    Set,
    /// The merge ended.
    Merged(MergeReport),
    /// How the broker is.
    Status(Status),
    /// What pages count as, and the page to go on with.
    PageMap {
        /// At most [`MAX_STRETCHES`](super::MAX_STRETCHES).
        stretches: Vec<Stretch>,
        /// `None` at the end.
        next: Option<u32>,
    },
}

/// Why a question got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorCode {
    /// No knob of that name.
    UnknownKnob,
    /// Not a value for that knob; nothing changed.
    InvalidValue,
    /// The client has not said hello, or asked too much at once.
    NotNow,
}

/// From a client to its broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToBroker {
    /// First of all. Answered by Welcome.
    Hello {
        /// The client's release, for the log.
        release: String,
        /// The trust zone.
        domain: String,
        /// Its process, for the log and where credentials can't say.
        pid: u32,
        /// Numbers of stores that words of its table still name.
        stores: Vec<u8>,
        /// A forked child: which client it was born of. Where that is believed, Welcome answers with the same store number.
        born: Option<Lineage>,
    },
    /// With the life page of an epoch, each one higher than the last; the first before the table.
    Life {
        /// Its number.
        epoch: u32,
    },
    /// With the page table.
    Table {
        /// Its capacity.
        pages: u32,
    },
    /// With the staging area. Answered by Ready.
    Staging,
    /// A region opts in; with the object's descriptor if it has a name. Answered by Joined or Refused.
    Join {
        /// The client's number for it.
        region: u32,
        /// What its memory is.
        kind: Kind,
        /// Its slice of the table.
        first_word: u32,
        /// Its length.
        pages: u32,
        /// The place of its first page modulo 512.
        position: u16,
        /// [`BORN`] or 0.
        flags: u32,
        /// What it is made of, if others can open that.
        object: Option<Object>,
    },
    /// A region is no more: its words are given up. Answered by Left; only then may its slice be reused.
    Leave {
        /// The client's number for it.
        region: u32,
    },
    /// The words of a Scan are up to date.
    Scanned {
        /// The order.
        order: u32,
        /// What it took.
        counts: ScanCounts,
    },
    /// The pages of a Stage are in the staging area, in order, as far as they could be copied.
    Staged {
        /// The order.
        order: u32,
        /// Per page.
        copied: Bits,
        /// As in [`ScanCounts`].
        cpu_micros: u32,
    },
    /// What became of a Map, per run.
    Mapped {
        /// The order.
        order: u32,
        /// One per run, in order.
        outcomes: Vec<RunOutcome>,
        /// As in [`ScanCounts`].
        cpu_micros: u32,
    },
    /// What became of an Unmap, over all its ranges in order.
    Unmapped {
        /// The order.
        order: u32,
        /// Per page, whether it has memory of its own again.
        unmapped: Bits,
    },
    /// Nothing of an order was done.
    Failed {
        /// The order.
        order: u32,
        /// Why.
        failure: Failure,
    },
    /// Answered by Answer or Error with the same id.
    Ask {
        /// The client's number for it.
        id: u32,
        /// What.
        question: Question,
    },
    /// The client disconnects on purpose. This is not death.
    Bye {
        /// For the log.
        reason: String,
    },
}

/// From the broker to a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToClient {
    /// With a read-only descriptor of the domain's store.
    Welcome {
        /// The broker's number for the client.
        client: u32,
        /// The domain's key for checksums.
        key: [u8; 16],
        /// The number that stands for this store in the client's words.
        store: u8,
        /// Its size.
        slots: u32,
    },
    /// The client may join regions.
    Ready,
    /// The region takes part.
    Joined {
        /// The client's number for it.
        region: u32,
        /// Pages of a [`BORN`] region that name a frame of this store and could not be counted.
        uncounted: u32,
    },
    /// The region does not.
    Refused {
        /// The client's number for it.
        region: u32,
        /// Why.
        reason: String,
    },
    /// The region's slice of the table may be reused.
    Left {
        /// The client's number for it.
        region: u32,
    },
    /// Somebody waits to open the region's object: take its pages home, and leave.
    Recall {
        /// The client's number for it.
        region: u32,
    },
    /// Send a fresh life page: something was given up in the epoch of the latest one.
    Turn,
    /// Bring the words and checksums of these pages up to date.
    Scan {
        /// The order.
        order: u32,
        /// The pass, for the checksum words.
        pass: u16,
        /// Whether the checksums are to have the pages' NUMA nodes in them.
        nodes: bool,
        /// Which pages.
        ranges: Vec<Range>,
    },
    /// Copy these pages into the staging area, in this order.
    Stage {
        /// The order.
        order: u32,
        /// Which pages; `u32::MAX` stands for one to leave out (its region left), as one that could not be copied.
        pages: Vec<u32>,
    },
    /// Compare these pages with these frames, and map the frames where they are equal.
    Map {
        /// The order.
        order: u32,
        /// Whether runs may split huge pages.
        split: bool,
        /// Pages and frames.
        runs: Vec<Run>,
    },
    /// Give these pages memory of their own.
    Unmap {
        /// The order.
        order: u32,
        /// Which pages.
        ranges: Vec<Range>,
        /// Why.
        why: Why,
    },
    /// To a question.
    Answer {
        /// The question's id.
        id: u32,
        /// The answer.
        answer: Answer,
    },
    /// To a question that has no answer.
    Error {
        /// The question's id.
        id: u32,
        /// What kind.
        code: ErrorCode,
        /// For people.
        text: String,
    },
    /// The broker drops the client and says why.
    Bye {
        /// For the client's log.
        reason: String,
    },
}
