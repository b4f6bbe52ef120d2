//! The kernel as a merge's witness: what it tracks as unwritten need not be compared within the freeze.
//!
//! Relies on dirty tracking (`tracking.rs`) and on PAGEMAP_SCAN (`pagemap.rs`): a page that the scanner armed, and that stays armed, was not
//! written through this mapping, by the program or by a system call of its own, nor was its memory given back, whatever swapping or
//! compaction did to it; where the kernel loses count, the page is told as written. It vouches for nothing else, so an object, which others may write, has no witness. It arms
//! nothing itself, for the scanner would take what nobody read for read; and nobody arms while it watches, for to arm a page is to
//! forget that it was written.

use crate::mapping::View;
use crate::pagemap::{Bits, Pagemap};
use crate::protocol::{Kind, Memory, Page, Span, Witness};
use crate::tracking::{Arming, Tracking};

/// What a watch works with, and what came of it.
#[derive(Default)]
pub(crate) struct Testimony {
    /// The pages of a run that may have been written.
    pub(crate) written: Bits,
    /// Those that are armed still, as the freeze has it.
    pub(crate) armed: Bits,
    /// Pages that were not, over all runs.
    pub(crate) vouched: u64,
}

/// Watches the pages of one run for as long as it lives.
pub(crate) struct Watch<'a> {
    view: View,
    tracking: &'a Tracking,
    pagemap: Option<&'a Pagemap>,
    testimony: &'a mut Testimony,
    alone: Option<Arming<'a>>,
}

impl<'a> Watch<'a> {
    pub(crate) fn of(
        view: View,
        tracking: &'a Tracking,
        pagemap: Option<&'a Pagemap>,
        testimony: &'a mut Testimony,
    ) -> Watch<'a> {
        Watch {
            view,
            tracking,
            pagemap,
            testimony,
            alone: None,
        }
    }
}

impl Witness for Watch<'_> {
    fn watch(&mut self, span: Span, tell: impl FnMut(Page)) {
        if self.view.kind() != Kind::Private || !self.tracking.is_registered(span) {
            return;
        }
        self.alone = self.tracking.arming();
        let written = &mut self.testimony.written;
        if let (Some(_), Some(pagemap)) = (&self.alone, self.pagemap)
            && pagemap.written(&self.view, span, written).is_ok()
        {
            span.iter()
                .filter(|page| !written.has(page.0 - span.first.0))
                .for_each(tell);
        }
    }

    fn written(&mut self, span: Span, mut tell: impl FnMut(Page)) -> bool {
        let Some(pagemap) = self.pagemap else { return false };
        // Not who was written, but who is still armed: memory that was given back meanwhile, page table and all, was not written.
        if pagemap.armed(&self.view, span, &mut self.testimony.armed).is_err() {
            return false;
        }
        for page in span.iter() {
            if self.testimony.armed.has(page.0 - span.first.0) {
                self.testimony.vouched += 1;
            } else {
                tell(page);
            }
        }
        true
    }
}
