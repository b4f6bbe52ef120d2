//! Orders: decisions that are on their way, and what they were.
//!
//! What a decision referred to when it left stays referred to until it is answered. Times are kept in the order of leaving, so
//! that an overdue order is found without a walk. Never decides.

use crate::founding::FoundingId;
use crate::frame::Slot;
use crate::page::{PageNumber, PageRange, Run};
use crate::region::ClientId;
use hashbrown::HashMap;
use std::collections::VecDeque;
use std::time::Duration;

/// A decision that a client is to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OrderId(pub u32);

/// Why pages are unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// `run` was set to 2.
    Unmerge,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Checksum these pages.
    Scan {
        /// Whose.
        client: ClientId,
        /// Answer with [`Core::scanned`](crate::Core::scanned).
        order: OrderId,
        /// The number of the pass, or with bit 15 of a look ahead of it, never 0: a checksum that took its value in this look has *changed*.
        pass: u16,
        /// Whether each checksum is to have its page's NUMA node in it: [`Checksum::on_node`](crate::Checksum::on_node).
        nodes: bool,
        /// At most [`MAX_RANGES`] of at most [`MAX_SCAN_PAGES`] pages together.
        ranges: Vec<PageRange>,
    },
    /// Copy these pages into the staging area, in this order.
    Stage {
        /// Whose.
        client: ClientId,
        /// Answer with [`Core::staged`](crate::Core::staged).
        order: OrderId,
        /// At most 512.
        pages: Vec<PageNumber>,
    },
    /// Show these frames, where the content is equal.
    Map {
        /// Whose.
        client: ClientId,
        /// Answer with [`Core::mapped`](crate::Core::mapped).
        order: OrderId,
        /// At most [`MAX_RUNS`] of at most [`MAX_MAP_PAGES`] pages together.
        runs: Vec<Run>,
    },
    /// Give these pages memory of their own.
    Unmap {
        /// Whose.
        client: ClientId,
        /// Answer with [`Core::unmapped`](crate::Core::unmapped).
        order: OrderId,
        /// At most [`MAX_RANGES`] of at most [`MAX_STEP_PAGES`] pages together.
        ranges: Vec<PageRange>,
        /// The reason.
        why: Why,
    },
    /// Copy the frames of the first slots to the second, which nobody shows; hash what was written and answer with
    /// [`Core::moved`](crate::Core::moved), before anything else is asked of core. A copy stays on the node of its frame
    /// ([`Core::node_of`](crate::Core::node_of)).
    Move {
        /// At most [`WINDOW`](crate::WINDOW), in the order of the second slots; so many are a whole fresh extent if they begin one.
        frames: Vec<(Slot, Slot)>,
    },
    /// Give the memory of these frames back, before anything else is asked of core.
    Punch {
        /// The first of them.
        first: Slot,
        /// How many.
        pages: u32,
    },
}

/// Ranges in one order; fits a datagram.
pub const MAX_RANGES: usize = 1024;
/// Runs in one order.
pub const MAX_RUNS: usize = 2048;
/// Pages in one Scan.
pub const MAX_SCAN_PAGES: u32 = 32_768;
/// Pages in one Unmap, and in other orders where it is to be a few milliseconds of work.
pub const MAX_STEP_PAGES: u32 = 8192;
/// Pages in one Map.
pub const MAX_MAP_PAGES: u32 = 65_536;
/// Pages in one Stage: the staging area.
pub const MAX_STAGE_PAGES: usize = 512;

/// What an open order was about.
pub(crate) enum Task {
    Scan {
        ranges: Vec<PageRange>,
        /// Whether nodes counted when it left.
        nodes: bool,
        /// Whether it is an extra look, beside the pass's own.
        again: bool,
    },
    /// Each page, whose content it founds, and the slot taken for it.
    Stage(Vec<(PageNumber, FoundingId, Slot)>),
    /// Staged; the broker fills the frames now.
    Fill(Vec<(FoundingId, Slot)>),
    Map(Vec<Run>),
    Unmap(Vec<PageRange>),
}

impl Task {
    /// Pages whose regions must keep their numbers until the answer: one per range is enough.
    pub(crate) fn pinned(&self) -> Vec<PageNumber> {
        match self {
            Task::Scan { ranges, .. } | Task::Unmap(ranges) => ranges.iter().map(|range| range.first).collect(),
            Task::Map(runs) => runs.iter().map(|run| run.first).collect(),
            // Foundings lose pages of a region when it leaves.
            Task::Stage(_) | Task::Fill(_) => Vec::new(),
        }
    }
}

pub(crate) struct Order {
    pub client: ClientId,
    pub task: Task,
    issued: Duration,
}

#[derive(Default)]
pub(crate) struct Orders {
    open: HashMap<OrderId, Order>,
    by_time: VecDeque<(Duration, OrderId)>,
    last: u32,
}

/// A client that owes an answer for longer is left out of planning: it is stopped, swapped out, or starved.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

impl Orders {
    pub(crate) fn open(&mut self, client: ClientId, task: Task, now: Duration) -> OrderId {
        self.last = self.last.wrapping_add(1);
        let id = OrderId(self.last);
        self.open.insert(
            id,
            Order {
                client,
                task,
                issued: now,
            },
        );
        self.by_time.push_back((now, id));
        id
    }

    pub(crate) fn get(&self, id: OrderId) -> Option<&Order> {
        self.open.get(&id)
    }

    /// Turns an order into what follows from it, under the same number; returns what it was.
    pub(crate) fn replace(&mut self, id: OrderId, task: Task) -> Task {
        match self.open.get_mut(&id) {
            Some(order) => std::mem::replace(&mut order.task, task),
            None => task,
        }
    }

    pub(crate) fn close(&mut self, id: OrderId) -> Option<Order> {
        self.open.remove(&id)
    }

    /// A client that has owed an answer for longer than [`PATIENCE`]; each order is told once.
    pub(crate) fn next_overdue(&mut self, now: Duration) -> Option<ClientId> {
        while let Some(&(issued, id)) = self.by_time.front() {
            match self.open.get(&id) {
                Some(order) if !matches!(order.task, Task::Fill(_)) => {
                    if now < issued + PATIENCE {
                        return None;
                    }
                    let client = order.client;
                    self.by_time.pop_front();
                    return Some(client);
                }
                _ => drop(self.by_time.pop_front()),
            }
        }
        None
    }

    /// Pages that were asked to show a frame and did not answer.
    pub(crate) fn pages_proposed(&self) -> u64 {
        let proposed = |order: &Order| match &order.task {
            Task::Map(runs) => runs.iter().map(|run| u64::from(run.pages)).sum(),
            _ => 0,
        };
        self.open.values().map(proposed).sum()
    }

    /// When the next order may become overdue.
    pub(crate) fn next_deadline(&mut self) -> Option<Duration> {
        while self.by_time.front().is_some_and(|(_, id)| !self.open.contains_key(id)) {
            self.by_time.pop_front();
        }
        self.by_time.front().map(|&(issued, _)| issued + PATIENCE)
    }

    /// Whether this order has been open for too long.
    pub(crate) fn is_overdue(&self, id: OrderId, now: Duration) -> bool {
        self.open.get(&id).is_some_and(|order| now >= order.issued + PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overdue_order_is_told_once() {
        let mut orders = Orders::default();
        let a = orders.open(ClientId(1), Task::Unmap(vec![]), Duration::ZERO);
        let b = orders.open(ClientId(2), Task::Unmap(vec![]), Duration::from_secs(1));
        assert_eq!(orders.next_overdue(Duration::from_secs(4)), None);
        orders.close(a);
        assert_eq!(orders.next_overdue(Duration::from_secs(5)), None);
        assert_eq!(orders.next_overdue(Duration::from_secs(6)), Some(ClientId(2)));
        assert_eq!(orders.next_overdue(Duration::from_secs(6)), None);
        assert!(orders.is_overdue(b, Duration::from_secs(6)));
    }
}
