//! Which pages of a region the program keeps out of merging: opted out ranges, and pins, which are counted.
//!
//! Plain bookkeeping under the region's lock; what it means for a page's word is `region.rs`'s business.

use std::ops::Range;

/// Which pages the program keeps out of the protocol.
#[derive(Default)]
pub(crate) struct Holds {
    /// Opted out; neither overlapping nor touching, in order.
    pub(crate) unadvised: Vec<Range<u32>>,
    /// Pinned, once per pin.
    pub(crate) pins: Vec<Range<u32>>,
    /// The region is ending: nothing is opted in any more.
    pub(crate) leaving: bool,
}

/// Adds a range to ranges that neither overlap nor are out of order, and keeps them so.
pub(crate) fn insert_range(ranges: &mut Vec<Range<u32>>, new: Range<u32>) {
    remove_range(ranges, new.clone());
    let at = ranges.partition_point(|range| range.start < new.start);
    ranges.insert(at, new);
}

/// Takes a range out of such ranges.
pub(crate) fn remove_range(ranges: &mut Vec<Range<u32>>, gone: Range<u32>) {
    let before = core::mem::take(ranges);
    for range in before {
        for part in [
            range.start..range.end.min(gone.start),
            range.start.max(gone.end)..range.end,
        ] {
            if part.start < part.end {
                ranges.push(part);
            }
        }
    }
}

/// What such ranges have in common with a range.
pub(crate) fn within(ranges: &[Range<u32>], span: &Range<u32>) -> Vec<Range<u32>> {
    let common = ranges
        .iter()
        .map(|range| range.start.max(span.start)..range.end.min(span.end));
    common.filter(|range| !range.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_hold_what_a_set_would(steps in proptest::collection::vec((0u32..60, 1u32..20, any::<bool>()), 1..40)) {
            let (mut ranges, mut set) = (Vec::new(), std::collections::BTreeSet::new());
            for (start, length, add) in steps {
                let range = start..start + length;
                if add {
                    insert_range(&mut ranges, range.clone());
                    set.extend(range);
                } else {
                    remove_range(&mut ranges, range.clone());
                    set.retain(|page| !range.contains(page));
                }
                let held: Vec<u32> = ranges.iter().cloned().flatten().collect();
                prop_assert_eq!(held, set.iter().copied().collect::<Vec<_>>());
                let common: Vec<u32> = within(&ranges, &(10..30)).into_iter().flatten().collect();
                prop_assert_eq!(common, set.range(10..30).copied().collect::<Vec<_>>());
            }
        }
    }
}
