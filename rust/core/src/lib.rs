//! Decides: the scan, the two trees, the rmap, the plan, the pace and the counters of ksmrs.
//!
//! Pure: no operating system, no clock, no input or output. A driver (the broker, or a test) tells [`Core`] what happened (these
//! pages have these checksums; this page was broken; the merge of this run was accepted for these pages) and asks for
//! [`Next`]; time comes in as the duration since the driver began. It is one domain; nothing crosses domains.
//!
//! Modules in the order in which data travels: `page` and `region` number what clients have, `record`, `frame`, `rmap` and `limbo`
//! keep the store, `checksum` and `scan` look, `unstable`, `founding` and `stable` find equals, `migrate` moves frames, `ahead`, `plan` and
//! `pace` (with `idle`, `advisor` and `ceiling`) decide what leaves and when, `order` is what left, `stats` counts. [`Core`]'s methods lie in `decide.rs` (what
//! next), `observe.rs` (what was seen of pages), `answer.rs` (what became of orders), `member.rs` (who comes and goes) and `born.rs` (who came by a fork).
#![forbid(unsafe_code)]

mod advisor;
mod ahead;
mod answer;
mod born;
mod ceiling;
mod checksum;
mod client;
mod decide;
mod founding;
mod frame;
mod idle;
mod limbo;
mod member;
mod migrate;
pub mod mutant;
mod observe;
mod order;
mod pace;
mod page;
mod page_map;
mod plan;
mod record;
mod region;
mod rmap;
mod scan;
mod stable;
mod stats;
mod table;
mod tunables;
mod unstable;

pub use ahead::EXTRA;
pub use answer::{Fill, RunFailure, RunOutcome};
pub use born::Birth;
pub use checksum::Checksum;
pub use decide::Next;
pub use frame::Slot;
pub use limbo::Epoch;
pub use member::CoreError;
pub use observe::{Observation, Observations, Seen};
pub use order::{
    Decision, MAX_MAP_PAGES, MAX_RANGES, MAX_RUNS, MAX_SCAN_PAGES, MAX_STAGE_PAGES, MAX_STEP_PAGES, OrderId, Why,
};
pub use pace::{MergeReport, MergeTicket};
pub use page::{PageNumber, PageRange, Run, WINDOW};
pub use page_map::{Class, Stretch};
pub use region::{ClientId, Kind, RegionId};
pub use stats::{METADATA_PER_PAGE, PAGE_SIZE, ProcessStats, Stats};
pub use tunables::{AdvisorMode, TunableError, Tunables};

use advisor::Advisor;
use ahead::Ahead;
use client::Client;
use founding::{FoundingId, Foundings};
use idle::Idle;
use migrate::Migration;
use order::{Orders, Task};
use pace::Pace;
use page::{Mark, Pages, Place};
use region::Regions;
use rmap::Rmap;
use stats::Events;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use tunables::InUse;
use unstable::UnstableTree;

/// Which of a client's queues.
#[derive(Clone, Copy)]
pub(crate) enum Queue {
    Scan = 0,
    Stage = 1,
    Remap = 2,
    Ahead = 3,
}

/// One domain's decisions.
///
/// ```
/// use ksmrs_core::{Checksum, ClientId, Core, Decision, Kind, Next};
/// use std::time::Duration;
///
/// let mut core = Core::new(4096, Checksum(0));
/// core.client_joined(ClientId(1));
/// let (_region, first) = core.region_joined(ClientId(1), Kind::Private, 100, 0)?;
/// let Next::Do(Decision::Scan { ranges, .. }) = core.next(Duration::ZERO) else { panic!("nothing to scan") };
/// assert_eq!((ranges[0].first, ranges[0].pages), (first, 100));
/// # Ok::<(), ksmrs_core::CoreError>(())
/// ```
pub struct Core {
    zero: Checksum,
    now: Duration,
    /// The current pass; 0 is never used.
    pass: u16,
    tunables: Tunables,
    pages: Pages,
    regions: Regions,
    clients: BTreeMap<ClientId, Client>,
    unstable: UnstableTree,
    foundings: Foundings,
    rmap: Rmap,
    orders: Orders,
    pace: Pace,
    advisor: Advisor,
    idle: Idle,
    /// Counters when the pass began.
    at_pass: Events,
    migration: Migration,
    events: Events,
    queues: [VecDeque<ClientId>; 4],
    /// Clients with work left in this pass.
    in_pass: u32,
    /// Clients that the pass has not come to the end of.
    unscanned: u32,
    ahead: Ahead,
    /// Clients at their ceiling, and until when.
    held: BTreeSet<(Duration, ClientId)>,
    /// Orders that planned clients owe.
    active: u32,
    /// Proposals that have not left yet.
    waiting_maps: u64,
    /// When clients whose pages could not be unmapped are asked again.
    unmerge_again: Option<Duration>,
}

impl Core {
    /// A domain whose store has room for `slots` frames and whose key gives the zero page the checksum `zero`.
    pub fn new(slots: u32, zero: Checksum) -> Core {
        Core {
            zero: zero.masked(),
            now: Duration::ZERO,
            pass: 1,
            tunables: Tunables::default(),
            pages: Pages::default(),
            regions: Regions::default(),
            clients: BTreeMap::new(),
            unstable: UnstableTree::default(),
            foundings: Foundings::default(),
            rmap: Rmap::new(slots),
            orders: Orders::default(),
            pace: Pace::default(),
            advisor: Advisor::default(),
            idle: Idle::default(),
            at_pass: Events::default(),
            migration: Migration::default(),
            events: Events::default(),
            queues: Default::default(),
            in_pass: 0,
            unscanned: 0,
            ahead: Ahead::default(),
            held: BTreeSet::new(),
            active: 0,
            waiting_maps: 0,
            unmerge_again: None,
        }
    }

    /// Begins a merge on request: rounds over all clients until one in which nothing merged. Pages that just changed are
    /// taken too, and there are no pauses. Works with `run=0`; with `run=2` it ends at once.
    pub fn request_merge(&mut self, now: Duration) -> MergeTicket {
        self.now = self.now.max(now);
        self.disturb();
        self.pace.request(self.now, self.events.merges, self.events.scanned)
    }

    /// The report of a merge that is over, once.
    pub fn merge_finished(&mut self, ticket: MergeTicket) -> Option<MergeReport> {
        self.pace.finished(ticket)
    }

    /// Nobody waits for this merge any more (its client died, or its timeout passed).
    pub fn cancel_merge(&mut self, ticket: MergeTicket) {
        self.pace.cancel(ticket);
    }

    /// CPU time of the driver's own that scanning and merging in this domain took; what clients report of theirs is told
    /// [`Core::client_spent`]. The advisor weighs it when the pass ends.
    pub fn spent(&mut self, cpu: Duration) {
        self.advisor.spend(cpu);
    }

    /// Nothing is idle any more.
    fn disturb(&mut self) {
        self.idle.disturb();
        let soon = self.now + self.pause();
        self.pace.wake = self.pace.wake.map(|wake| wake.min(soon));
    }

    /// Sets a knob.
    ///
    /// # Errors
    /// [`TunableError`]; nothing changes then.
    pub fn set(&mut self, knob: &str, value: &str) -> Result<(), TunableError> {
        let (before, mode, ceiling) = (
            self.tunables.run,
            self.tunables.advisor_mode,
            self.tunables.client_max_cpu,
        );
        let nodes = self.tunables.nodes_count();
        let in_use = InUse {
            pages_shared: u64::from(self.rmap.shared),
            pages_proposed: self.pages_proposed(),
        };
        self.tunables.set(knob, value, in_use)?;
        self.disturb();
        if ceiling != self.tunables.client_max_cpu {
            self.let_go(true);
        }
        if nodes != self.tunables.nodes_count() {
            self.drop_candidates();
        }
        if mode != self.tunables.advisor_mode {
            self.advisor.reset();
            self.pace.start_afresh();
        }
        if before != self.tunables.run && self.tunables.run == tunables::run::UNMERGE {
            self.begin_unmerge();
        }
        Ok(())
    }

    /// A knob's value as text.
    ///
    /// # Errors
    /// [`TunableError::Unknown`].
    pub fn get(&self, knob: &str) -> Result<String, TunableError> {
        self.tunables.get(knob)
    }

    /// All knobs.
    pub fn tunables(&self) -> &Tunables {
        &self.tunables
    }

    /// The counters of the domain.
    pub fn stats(&self) -> Stats {
        let events = &self.events;
        let pages_shared = u64::from(self.rmap.shared);
        let pages_sharing = self.rmap.merged - pages_shared;
        let filed = pages_shared + pages_sharing + events.unshared;
        Stats {
            pages_shared,
            pages_sharing,
            pages_unshared: events.unshared,
            pages_volatile: events.items.saturating_sub(filed),
            pages_skipped: events.skipped,
            pages_scanned: events.scanned,
            pages_scanned_again: events.again,
            full_scans: events.full_scans,
            stable_node_chains: u64::from(self.rmap.stable.chains()),
            stable_node_dups: u64::from(self.rmap.stable.dups()),
            ksm_zero_pages: events.zero,
            general_profit: stats::profit(pages_sharing + events.zero, events.items),
            cow_ksm: events.cow,
            frames: u64::from(self.rmap.frames.filled),
            frames_huge: u64::from(self.rmap.frames.huge),
            frames_huge_declined: events.huge_declined,
            saved_bytes: (pages_sharing + events.zero) * PAGE_SIZE,
            regions: self.regions.private + self.regions.shared,
            regions_shared: self.regions.shared,
            clients: self.clients.len() as u64,
            clients_at_max_cpu: self.clients_held(),
            clients_unplanned: self.clients.values().filter(|client| !client.is_planned()).count() as u64,
            pages_proposed: self.pages_proposed(),
            merges: events.merges,
            pages_migrated: events.migrated,
            pages_unmerged_by_budget: events.over_budget,
            pages_unmerged_in_huge_pages: events.would_split,
            regions_rested: events.rests,
            pages_disbelieved: events.disbelieved,
            references_in_limbo: self.rmap.limbo.len(),
        }
    }

    /// Pages that were offered a frame and have not answered.
    fn pages_proposed(&self) -> u64 {
        self.waiting_maps + self.orders.pages_proposed()
    }

    /// The NUMA node that a frame belongs to, while nodes count.
    pub fn node_of(&self, slot: Slot) -> Option<u8> {
        let nodes = self.tunables.nodes_count();
        nodes.then(|| self.rmap.frames.get(slot).checksum().node())
    }

    /// Passes completed: the one counter that a driver looks at all the time.
    pub fn full_scans(&self) -> u64 {
        self.events.full_scans
    }

    /// The counters of one client; all 0 for a stranger.
    pub fn client_stats(&self, client: ClientId) -> ProcessStats {
        let Some(client) = self.clients.get(&client) else {
            return ProcessStats::default();
        };
        ProcessStats {
            ksm_rmap_items: client.items,
            ksm_merging_pages: client.merged,
            ksm_zero_pages: client.zero,
            ksm_process_profit: stats::profit(client.merged + client.zero, client.items),
            cpu_milliseconds: client.cpu(),
            times_at_max_cpu: client.account.holds,
        }
    }

    /// Bytes that core spends on clients, pages, frames and trees at this moment; the page tables of the clients are not its own.
    pub fn metadata_bytes(&self) -> usize {
        let Rmap {
            frames, stable, limbo, ..
        } = &self.rmap;
        let trees = limbo.bytes() + stable.bytes() + self.unstable.bytes() + self.foundings.bytes();
        let clients: usize = self.clients.values().map(Client::bytes).sum();
        let members = clients + self.regions.bytes();
        members + self.ahead.bytes() + self.pages.bytes() + frames.bytes() + trees + self.migration.bytes()
    }

    /// Slots of the store that cannot be taken now: filled, being filled, or covered by a page.
    pub fn slots_taken(&self) -> u32 {
        self.rmap.frames.taken()
    }

    /// The latest epoch in which the client gave something up that waits for its seal.
    pub fn latest_unsealed(&self, client: ClientId) -> Option<Epoch> {
        self.rmap.limbo.latest(client)
    }

    /// Brings the queues and counts in line with what a client can do now; called after each change of a client.
    fn refresh(&mut self, id: ClientId) {
        let has_ceilings = self.has_ceilings();
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let planned = client.is_planned();
        let scanning = client.scanner.is_some_and(|order| {
            self.orders
                .get(order)
                .is_some_and(|order| matches!(order.task, Task::Scan { .. }))
        });
        let in_pass = planned && (!client.scanned || scanning);
        let active = if planned {
            u32::from(client.scanner.is_some()) + u32::from(client.remapper.is_some())
        } else {
            0
        };
        self.in_pass = self.in_pass - u32::from(client.in_pass) + u32::from(in_pass);
        self.active = self.active - client.active + active;
        let unscanned = planned && !client.scanned;
        self.unscanned = self.unscanned - u32::from(client.unscanned) + u32::from(unscanned);
        (client.in_pass, client.active, client.unscanned) = (in_pass, active, unscanned);
        let unmerging = self.tunables.run == tunables::run::UNMERGE && client.merged + client.zero > 0;
        let wants = [
            !client.scanned && client.scanner.is_none(),
            !client.stages.is_empty() && client.scanner.is_none(),
            (!client.maps.is_empty() || unmerging && !client.rests) && client.remapper.is_none(),
            !client.ahead.is_empty() && client.scanner.is_none(),
        ];
        let asked = planned && !(has_ceilings && client.account.is_held());
        for (queue, wanted) in wants.into_iter().enumerate() {
            if asked && wanted && !client.queued[queue] {
                client.queued[queue] = true;
                self.queues[queue].push_back(id);
            }
        }
    }

    /// The next client of a queue that is still there and planned.
    fn dequeue(&mut self, queue: Queue) -> Option<ClientId> {
        let has_ceilings = self.has_ceilings();
        while let Some(id) = self.queues[queue as usize].pop_front() {
            if let Some(client) = self.clients.get_mut(&id) {
                client.queued[queue as usize] = false;
                // Who is held comes back when it is let go.
                if client.is_planned() && !(has_ceilings && client.account.is_held()) {
                    return Some(id);
                }
            }
        }
        None
    }

    fn mark(&mut self, page: PageNumber, mark: Mark, on: bool) {
        if self.pages.mark(page, mark, on) && matches!(mark, Mark::Unshared) {
            self.events.unshared = if on {
                self.events.unshared + 1
            } else {
                self.events.unshared - 1
            };
        }
    }

    fn mark_item(&mut self, client: ClientId, page: PageNumber, on: bool) {
        if self.pages.mark(page, Mark::Item, on)
            && let Some(client) = self.clients.get_mut(&client)
        {
            self.events.items = if on {
                self.events.items + 1
            } else {
                self.events.items - 1
            };
            client.items = if on { client.items + 1 } else { client.items - 1 };
        }
    }

    /// Moves a page; what it lay over is given up in `epoch`, or at once where no epoch is given.
    fn move_page(&mut self, page: PageNumber, to: Place, region: PageRange, id: ClientId, epoch: Option<Epoch>) {
        let from = self.pages.place(page);
        if from == to {
            return;
        }
        self.unstable.remove(&mut self.pages, page);
        let around = PageRange { first: page, pages: 1 };
        let before = plan::boundaries(&self.pages, around, region);
        self.pages.set_place(page, to);
        let after = plan::boundaries(&self.pages, around, region);
        if let Some(back) = self.rmap.enter(to) {
            self.unstable.crowd_out(&self.pages, back.tag());
        }
        match epoch {
            Some(epoch) => self.rmap.leave(from, id, epoch),
            None => self.rmap.vanish(from),
        }
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        client.boundaries = client.boundaries + after - before;
        for (place, on) in [(from, false), (to, true)] {
            let count = match place {
                Place::Merged(_) => &mut client.merged,
                Place::Zero => &mut client.zero,
                _ => continue,
            };
            *count = if on { *count + 1 } else { *count - 1 };
            if place == Place::Zero {
                self.events.zero = if on { self.events.zero + 1 } else { self.events.zero - 1 };
            }
        }
    }

    /// Files a proposal: the page is busy and the frame stays until it is answered.
    fn propose(&mut self, id: ClientId, page: PageNumber, slot: Slot) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        self.rmap.propose(slot);
        self.pages.mark(page, Mark::Busy, true);
        client.maps.push((page, slot));
        self.waiting_maps += 1;
    }

    /// Drops proposals that never left.
    fn withdraw(&mut self, proposals: &[(PageNumber, Slot)]) {
        for &(page, slot) in proposals {
            self.pages.mark(page, Mark::Busy, false);
            self.rmap.withdraw(slot);
        }
        self.waiting_maps -= proposals.len() as u64;
    }

    /// Ends a founding without a frame: those who waited are ordinary pages again.
    fn end_founding(&mut self, founding: FoundingId) {
        if self.foundings.is_live(founding) {
            for page in self.foundings.end(founding) {
                self.pages.mark(page, Mark::Busy, false);
            }
        }
    }
}
