//! Clients: what core knows of each process.
//!
//! A client does two things at a time, like its two threads: one order for the scanner (Scan, Stage) and one for the remapper
//! (Map, Unmap), so never more than two are open. Never talks to anybody.

use crate::ceiling::Account;
use crate::founding::FoundingId;
use crate::frame::Slot;
use crate::limbo::Epoch;
use crate::order::OrderId;
use crate::page::PageNumber;
use crate::region::{ClientId, RegionId};
use crate::stats::in_tree;
use std::collections::VecDeque;

/// Where run=2 goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Index into the client's regions.
    pub region: usize,
    /// Pages of it that are done.
    pub pages: u32,
}

#[derive(Default)]
pub(crate) struct Client {
    pub regions: Vec<RegionId>,
    /// The latest epoch it gave something up in.
    pub epoch: Epoch,
    /// Index of the region at which the pass goes on.
    pub scan: usize,
    /// Regions that are looked at ahead of the pass, in turn.
    pub ahead: VecDeque<RegionId>,
    /// The cursor reached the end in this pass.
    pub scanned: bool,
    pub unmap: Cursor,
    /// Whether the current sweep of run=2 unmapped anything.
    pub unmapped: bool,
    /// Nothing could be unmapped: the next sweep waits a little.
    pub rests: bool,
    /// The last answer to a Scan said nothing new.
    pub settled: bool,
    pub scanner: Option<OrderId>,
    pub remapper: Option<OrderId>,
    /// Owes an answer for too long.
    pub stalled: bool,
    /// Its socket is closed, its death not certain.
    pub lost: bool,
    /// Pages with the slots they are to show, proposals not sent yet.
    pub maps: Vec<(PageNumber, Slot)>,
    /// Pages to be copied out.
    pub stages: Vec<(PageNumber, FoundingId)>,
    /// CPU time that its threads took.
    pub account: Account,
    /// VMAs that merging may add.
    pub budget: Option<u32>,
    /// Boundaries between neighbours inside its regions that need a VMA each.
    pub boundaries: u32,
    /// Set when it met its mapping limit, until the pass ends.
    pub at_limit: bool,
    pub merged: u64,
    pub zero: u64,
    pub items: u64,
    pub pages: u64,
    /// Counted as having work left in this pass.
    pub in_pass: bool,
    /// Counted as having regions left that the pass has not come by.
    pub unscanned: bool,
    /// Open orders counted as active.
    pub active: u32,
    /// Whether it is queued, per queue.
    pub queued: [bool; 4],
}

impl Client {
    /// Whether anything is planned for it.
    pub(crate) fn is_planned(&self) -> bool {
        !self.stalled && !self.lost
    }

    /// Bytes spent on it.
    pub(crate) fn bytes(&self) -> usize {
        let lists = self.regions.capacity() * size_of::<RegionId>()
            + self.ahead.capacity() * size_of::<RegionId>()
            + self.maps.capacity() * size_of::<(PageNumber, Slot)>()
            + self.stages.capacity() * size_of::<(PageNumber, FoundingId)>();
        in_tree::<(ClientId, Client)>() + lists
    }

    /// VMAs that merging may still add.
    pub(crate) fn vmas_left(&self) -> i64 {
        match self.budget {
            _ if self.at_limit => 0,
            Some(budget) => i64::from(budget) - i64::from(self.boundaries),
            None => i64::MAX,
        }
    }
}
