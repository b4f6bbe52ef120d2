//! Limbo: what clients gave up and a forked child may still show.
//!
//! A client gives something up in its current epoch; it is released when every life page up to and including that epoch took
//! its seal, for then no address space that may have inherited the mapping exists. Entries are kept per client in the order of
//! epochs, consecutive slots in one. Relies on the caller to say when a seal held; never looks at a frame.

use crate::frame::Slot;
use crate::mutant::{self, Mutant};
use crate::region::ClientId;
use hashbrown::HashMap;
use std::collections::VecDeque;

/// A stretch of a client's life between two turns of its life page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u32);

struct Entry {
    epoch: Epoch,
    first: Slot,
    slots: u32,
}

#[derive(Default)]
pub(crate) struct Limbo {
    given_up: HashMap<ClientId, VecDeque<Entry>>,
    references: u64,
}

impl Limbo {
    /// Keeps one reference to the slot until the client's epoch is sealed. Epochs only rise: an older one counts as the latest.
    pub(crate) fn keep(&mut self, client: ClientId, epoch: Epoch, slot: Slot) {
        self.references += 1;
        let entries = self.given_up.entry(client).or_default();
        let mut epoch = epoch;
        if let Some(last) = entries.back_mut() {
            epoch = epoch.max(last.epoch);
            if last.epoch == epoch && last.first.0 + last.slots == slot.0 {
                last.slots += 1;
                return;
            }
        }
        entries.push_back(Entry {
            epoch,
            first: slot,
            slots: 1,
        });
    }

    /// Runs of slots that nobody can show any more on account of this client, one at a time.
    pub(crate) fn next_sealed(&mut self, client: ClientId, epoch: Epoch) -> Option<(Slot, u32)> {
        let entries = self.given_up.get_mut(&client)?;
        if entries.front()?.epoch > epoch && !mutant::active(Mutant::NoEpoch) {
            return None;
        }
        let entry = entries.pop_front()?;
        self.references -= u64::from(entry.slots);
        if entries.is_empty() {
            self.given_up.remove(&client);
        }
        Some((entry.first, entry.slots))
    }

    pub(crate) fn bytes(&self) -> usize {
        let entries: usize = self.given_up.values().map(VecDeque::capacity).sum();
        self.given_up.allocation_size() + entries * size_of::<Entry>()
    }

    /// References still kept, over all clients.
    pub(crate) fn len(&self) -> u64 {
        self.references
    }

    /// The latest epoch in which this client gave something up that is still kept.
    pub(crate) fn latest(&self, client: ClientId) -> Option<Epoch> {
        self.given_up.get(&client)?.back().map(|entry| entry.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_releases_its_epoch_and_older_ones() {
        let mut limbo = Limbo::default();
        let client = ClientId(1);
        limbo.keep(client, Epoch(1), Slot(10));
        limbo.keep(client, Epoch(1), Slot(11));
        limbo.keep(client, Epoch(3), Slot(12));
        limbo.keep(client, Epoch(2), Slot(13));
        assert_eq!(limbo.len(), 4);
        assert_eq!(limbo.next_sealed(client, Epoch(0)), None);
        assert_eq!(limbo.next_sealed(client, Epoch(2)), Some((Slot(10), 2)));
        assert_eq!(limbo.next_sealed(client, Epoch(2)), None);
        assert_eq!(limbo.latest(client), Some(Epoch(3)));
        assert_eq!(limbo.next_sealed(client, Epoch(3)), Some((Slot(12), 2)));
        assert_eq!(limbo.len(), 0);
    }
}
