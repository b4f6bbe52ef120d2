//! What the broker's pages count as, region by region: many answers put together.
//!
//! What comes and goes between two of them is seen as it is met: a region may be missing, never mixed with another, for its number is
//! never used twice. Starts no broker.

use super::{Error, ask_without_starting, unexpected};
use crate::wire::{Answer, Question};
use std::collections::BTreeMap;

/// The pages of one region of any client of the domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionMap {
    /// The client's process as the broker sees it, 0 where it cannot.
    pub pid: u32,
    /// The client's number.
    pub client: u32,
    /// The region's number in the domain.
    pub region: u32,
    /// Whether it is shared memory.
    pub shared: bool,
    /// What each page counts as, by `ksmrs_core::Class`.
    pub classes: Vec<u8>,
}

/// All regions of the domain, by client; none where no broker runs.
///
/// # Errors
/// The broker is there and cannot be asked.
pub fn page_map() -> Result<Vec<RegionMap>, Error> {
    let mut regions: BTreeMap<(u32, u32), RegionMap> = BTreeMap::new();
    let mut from = Some(0);
    while let Some(page) = from {
        let stretches = match ask_without_starting(Question::PageMap { from: page })? {
            None => break,
            Some(Answer::PageMap { stretches, next }) => {
                // A broker that does not go on must not keep us for ever.
                from = next.filter(|next| *next > page);
                stretches
            }
            Some(other) => return Err(unexpected(&other)),
        };
        for stretch in stretches {
            let region = regions
                .entry((stretch.client, stretch.region))
                .or_insert_with(|| RegionMap {
                    pid: stretch.pid,
                    client: stretch.client,
                    region: stretch.region,
                    shared: stretch.shared,
                    classes: Vec::new(),
                });
            let end = region.classes.len() + stretch.pages as usize;
            region.classes.resize(end, stretch.class);
        }
    }
    Ok(regions.into_values().collect())
}
