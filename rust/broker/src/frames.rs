//! Frames: what core wants written, copied and freed in a domain's store.
//!
//! What was written is hashed as it is *in the store*, for whatever it came from may have changed meanwhile; core compares. Keeps the sweep's
//! marks true. Never decides which slot holds what.

use ksmrs_core::{Checksum, Fill, Slot};
use ksmrs_sys::extent::{Extent, Writer};
use ksmrs_sys::failpoint::{self, Failpoint};
use ksmrs_sys::numa::Preferred;
use ksmrs_sys::store::HASHED_AT_ONCE;
use ksmrs_sys::{EXTENT_PAGES, SysError};

use crate::domain::Domain;
use crate::session::Session;

fn in_store(slot: Slot) -> ksmrs_sys::Slot {
    ksmrs_sys::Slot(slot.0)
}

impl Domain {
    /// Fills frames from a client's staging area.
    pub(crate) fn fill(&mut self, session: &Session, fill: &Fill, checksums: &mut Vec<Option<Checksum>>) {
        let (slot, pages) = (in_store(fill.slot), u32::from(fill.pages));
        let Some(staging) = &session.staging else {
            return checksums.extend((0..pages).map(|_| None));
        };
        let _preferred = self.prefer(fill.node);
        let extent = if fill.whole_extent {
            self.make_huge(slot, pages)
        } else {
            None
        };
        self.write(slot, pages, extent, checksums, |writer, done, now| {
            writer.fill(slot.plus(done), staging, u32::from(fill.staging_index) + done, now)
        });
    }

    /// Copies frames to the slots that they move to, and tells core.
    pub(crate) fn move_frames(&mut self, frames: &[(Slot, Slot)]) {
        let mut checksums = Vec::with_capacity(frames.len());
        let together = |one: Slot, next: Slot| self.core.node_of(one) == self.core.node_of(next);
        let runs = frames.chunk_by(|one, next| one.1.stepped(1) == next.1 && together(one.0, next.0));
        for run in runs.collect::<Vec<_>>() {
            let _preferred = self.prefer(self.core.node_of(run[0].0));
            let from: Vec<ksmrs_sys::Slot> = run.iter().map(|&(from, _)| in_store(from)).collect();
            let to = in_store(run[0].1);
            let extent = self.make_huge(to, run.len() as u32);
            self.write(to, run.len() as u32, extent, &mut checksums, |writer, done, now| {
                writer.copy(&from[done as usize..(done + now) as usize], to.plus(done))
            });
        }
        failpoint::hit(Failpoint::BrokerFilled);
        self.core.moved(&checksums);
    }

    /// Frames that are about to be written get memory of this node, where there is some.
    fn prefer(&self, node: Option<u8>) -> Option<Preferred> {
        let refused = |error: &SysError| tracing::debug!(domain = self.name, node, %error, "frames lie anywhere");
        Preferred::node(node?).inspect_err(refused).ok()
    }

    /// Frames that are about to be written: one huge page if they are a whole extent.
    fn make_huge(&mut self, slot: ksmrs_sys::Slot, pages: u32) -> Option<Extent> {
        if pages != EXTENT_PAGES || !slot.0.is_multiple_of(EXTENT_PAGES) {
            return None;
        }
        match self.store.make_huge(slot) {
            Ok(extent) => Some(extent),
            Err(declined) => {
                tracing::debug!(domain = self.name, ?slot, %declined, "the extent stays small");
                self.core.stays_small(Slot(slot.0));
                self.huge_declined = Some(declined);
                None
            }
        }
    }

    /// Writes consecutive frames in pieces, so that each is hashed while the cache still has it. If one fails, none counts.
    fn write(
        &mut self,
        slot: ksmrs_sys::Slot,
        pages: u32,
        extent: Option<Extent>,
        checksums: &mut Vec<Option<Checksum>>,
        piece: impl Fn(&mut Writer<'_>, u32, u32) -> Result<(), SysError>,
    ) {
        let mut hashes = Vec::with_capacity(pages as usize);
        let mut writer = self.store.writer(extent);
        let written = (0..pages).step_by(HASHED_AT_ONCE as usize).try_for_each(|done| {
            let now = (pages - done).min(HASHED_AT_ONCE);
            piece(&mut writer, done, now)?;
            writer.hash(slot.plus(done), now, &self.checksummer, &mut hashes)
        });
        match written {
            Ok(()) => {
                self.sweep.mark(slot, pages, true);
                checksums.extend(hashes.into_iter().map(|hash| Some(Checksum(hash))));
            }
            Err(error) => {
                tracing::warn!(domain = self.name, ?slot, pages, %error, "frames not written");
                // Core punches only what it believes written, and a part of these may be.
                self.punch(slot, pages);
                checksums.extend((0..pages).map(|_| None));
            }
        }
    }

    /// Gives the memory of frames back.
    pub(crate) fn free(&mut self, first: Slot, pages: u32) {
        let slot = in_store(first);
        self.sweep.mark(slot, pages, false);
        failpoint::hit(Failpoint::BrokerPunches);
        self.punch(slot, pages);
    }

    fn punch(&self, slot: ksmrs_sys::Slot, pages: u32) {
        if let Err(error) = self.store.punch(slot, pages) {
            tracing::warn!(domain = self.name, ?slot, pages, %error, "frames keep their memory");
        }
    }
}
