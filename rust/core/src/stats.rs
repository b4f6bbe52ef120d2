//! Counters: the kernel's names and arithmetic.
//!
//! Everything here is counted where it happens and only put together here; nothing is walked but the open orders. Never decides.

use crate::page::{PageNumber, Pages};
use crate::unstable::UnstableTree;
use serde::{Deserialize, Serialize};

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// What a page with an rmap_item costs in metadata, page table included: this crate's place of the kernel's
/// `sizeof(struct ksm_rmap_item)` in the profits. A bound; what is spent can be asked of [`Core::metadata_bytes`](crate::Core::metadata_bytes).
pub const METADATA_PER_PAGE: u64 = 32;

/// The counters of a domain, those of /sys/kernel/mm/ksm first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Frames that pages show.
    pub pages_shared: u64,
    /// Further pages on them: what is saved.
    pub pages_sharing: u64,
    /// Pages looked at, unchanged, without an equal.
    pub pages_unshared: u64,
    /// Pages that changed too fast to be filed.
    pub pages_volatile: u64,
    /// Pages that smart scan left out.
    pub pages_skipped: u64,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages looked at once more within a pass; they are in `pages_scanned` too.
    pub pages_scanned_again: u64,
    /// Passes completed.
    pub full_scans: u64,
    /// Contents with more than one frame.
    pub stable_node_chains: u64,
    /// The frames of those contents.
    pub stable_node_dups: u64,
    /// Zero pages without memory.
    pub ksm_zero_pages: u64,
    /// Bytes saved less bytes of metadata.
    pub general_profit: i64,
    /// Merged pages that were written.
    pub cow_ksm: u64,
    /// Frames with memory.
    pub frames: u64,
    /// Extents that were filled whole, as huge pages, and still are.
    pub frames_huge: u64,
    /// Extents that were filled whole and did not become huge pages, ever.
    pub frames_huge_declined: u64,
    /// Bytes saved, metadata not counted.
    pub saved_bytes: u64,
    /// Regions opted in.
    pub regions: u64,
    /// Those of them that are shared memory.
    pub regions_shared: u64,
    /// Clients.
    pub clients: u64,
    /// Clients of which nothing is asked now, since they spent their share of CPU time (`client_max_cpu`).
    pub clients_at_max_cpu: u64,
    /// Clients that owe an answer for too long, or are lost, and are left out of planning.
    pub clients_unplanned: u64,
    /// Pages that were offered a frame and did not answer yet.
    pub pages_proposed: u64,
    /// Pages that took a frame, ever.
    pub merges: u64,
    /// Pages that followed a frame to another slot, ever.
    pub pages_migrated: u64,
    /// Proposals dropped because the client's VMA budget was spent, ever.
    pub pages_unmerged_by_budget: u64,
    /// Proposals that a client turned down because they would have split a huge page (`split_huge_pages` is 0), ever.
    pub pages_unmerged_in_huge_pages: u64,
    /// Times that a region was left alone for a while because its merges did not last.
    pub regions_rested: u64,
    /// Words that named something core never proposed, ever: a lying or damaged client.
    pub pages_disbelieved: u64,
    /// References that wait for the seal of an epoch.
    pub references_in_limbo: u64,
}

/// The counters of one client, as in /proc/PID/ksm_stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStats {
    /// Pages with memory that the last scans saw.
    pub ksm_rmap_items: u64,
    /// Pages that show a frame.
    pub ksm_merging_pages: u64,
    /// Zero pages without memory.
    pub ksm_zero_pages: u64,
    /// Bytes saved less bytes of metadata, as if every merged page were saved.
    pub ksm_process_profit: i64,
    /// CPU time that its scanner and remapper took, as it says.
    pub cpu_milliseconds: u64,
    /// Times that nothing was asked of it for a while, for it had taken `client_max_cpu`.
    pub times_at_max_cpu: u64,
}

/// Events, counted where they happen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Events {
    pub scanned: u64,
    pub again: u64,
    /// Pages whose checksum was another than last time.
    pub changed: u64,
    pub skipped: u64,
    pub full_scans: u64,
    pub cow: u64,
    pub merges: u64,
    pub migrated: u64,
    pub over_budget: u64,
    pub would_split: u64,
    pub huge_declined: u64,
    pub disbelieved: u64,
    pub rests: u64,
    /// Pages marked Unshared.
    pub unshared: u64,
    /// Pages marked Item.
    pub items: u64,
    pub zero: u64,
}

impl Events {
    /// Pages to which something happened since then.
    pub(crate) fn stirred_since(&self, then: &Events) -> u64 {
        let all = |events: &Events| events.changed + events.merges + events.migrated + events.cow;
        // Nothing that begins anew with run=2 is among them.
        all(self).saturating_sub(all(then))
    }

    /// Smart scan left the page out of this pass.
    pub(crate) fn skip(&mut self, pages: &mut Pages, unstable: &mut UnstableTree, page: PageNumber) {
        self.skipped += 1;
        self.unshared -= u64::from(unstable.leave_out(pages, page));
    }
}

/// What an entry of a B-tree takes, whose nodes are three quarters full on the average of their fillings.
pub(crate) const fn in_tree<T>() -> usize {
    size_of::<T>() * 4 / 3
}

pub(crate) fn profit(pages: u64, items: u64) -> i64 {
    (pages * PAGE_SIZE).cast_signed() - (items * METADATA_PER_PAGE).cast_signed()
}
