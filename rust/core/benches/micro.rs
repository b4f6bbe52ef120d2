//! What single decisions cost: filing candidates, finding equals, planning runs. The whole at work: `simulation`.
//!
//!     cargo bench -p ksmrs-core --bench micro
//!
//! Each figure is of one order of 4096 pages in a domain of 262,144, so that the tables are out of the processor's caches.

#[path = "../tests/honest/mod.rs"]
mod honest;

use divan::Bencher;
use divan::counter::ItemsCount;
use honest::Honest;
use ksmrs_core::{Checksum, ClientId, Core, Decision, Kind, Observation, PageNumber};

const PAGES: u32 = 1 << 17;
const ORDER: u32 = 4096;
/// A Stage is of 512 pages at most; then as many are proposed to each of two clients.
const STAGED: usize = 400;

fn main() {
    divan::main();
}

/// Spreads numbers over checksums, no two of one.
fn checksum(number: u32) -> Checksum {
    Checksum(u64::from((number + 1).wrapping_mul(0x7f4a_7c15)))
}

fn unique(page: PageNumber) -> Checksum {
    checksum(page.0)
}

/// Two regions hold the same, in the same order.
fn equal(page: PageNumber) -> Checksum {
    checksum(page.0 % PAGES)
}

/// Two regions hold the same, the second in another order.
fn scattered(page: PageNumber) -> Checksum {
    let at = page.0 % PAGES;
    checksum(if page.0 < PAGES {
        at
    } else {
        at.wrapping_mul(0x9e37_79b1) % PAGES
    })
}

type Content = fn(PageNumber) -> Checksum;

/// Two clients, a merge on request (so that the first look counts), and the decision at which `wanted` holds.
fn at(content: Content, mut wanted: impl FnMut(&Core, &Decision) -> bool) -> (Core, Honest<Content>, Decision) {
    let mut core = Core::new(2 * PAGES, Checksum(0));
    let mut clients = Honest::new(2 * PAGES, 2 * PAGES, content);
    for client in 0..2 {
        core.client_joined(ClientId(client));
        core.region_joined(ClientId(client), Kind::Private, PAGES, 0)
            .expect("page numbers");
    }
    core.request_merge(clients.now);
    let decision = clients.until(&mut core, &mut wanted);
    (core, clients, decision)
}

/// A scan of the last pages of the second client.
fn is_last_scan(_: &Core, decision: &Decision) -> bool {
    let last = |ranges: &[ksmrs_core::PageRange]| ranges.iter().any(|range| range.first.0 + range.pages == 2 * PAGES);
    matches!(decision, Decision::Scan { ranges, .. } if last(ranges))
}

/// The answer to such a scan.
fn scan(bencher: Bencher<'_, '_>, content: Content) {
    bencher
        .counter(ItemsCount::new(ORDER))
        .with_inputs(|| {
            let (core, clients, decision) = at(content, is_last_scan);
            let Decision::Scan { order, ranges, .. } = decision else {
                unreachable!("asked for a scan")
            };
            let pages: Vec<PageNumber> = ranges.iter().flat_map(|range| range.iter()).collect();
            assert_eq!(pages.len(), ORDER as usize, "the counter says so");
            let observations: Vec<Observation> = pages.iter().map(|&page| clients.observe(page, true)).collect();
            (core, order, observations, clients.now)
        })
        .bench_local_values(|(mut core, order, observations, now)| {
            core.scanned(order, &(Default::default(), &observations[..]), now);
            core
        });
}

/// Pages unlike any other become candidates in the unstable tree.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn file_candidates(bencher: Bencher<'_, '_>) {
    scan(bencher, unique);
}

/// Pages whose equals are candidates, or stable.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn find_equals(bencher: Bencher<'_, '_>) {
    scan(bencher, equal);
}

/// The next order of the remapper: some 500 proposals sorted, joined to runs, weighed by the mappings that they need.
fn plan(bencher: Bencher<'_, '_>, content: Content) {
    bencher
        .with_inputs(|| {
            let is_fill =
                |_: &Core, decision: &Decision| matches!(decision, Decision::Stage { pages, .. } if pages.len() >= STAGED);
            let (mut core, mut clients, decision) = at(content, is_fill);
            clients.carry_out(&mut core, decision);
            (core, clients.now)
        })
        .bench_local_values(|(mut core, now)| {
            let next = core.next(now);
            (core, next)
        });
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn plan_long_runs(bencher: Bencher<'_, '_>) {
    plan(bencher, equal);
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn plan_scattered_pages(bencher: Bencher<'_, '_>) {
    plan(bencher, scattered);
}
