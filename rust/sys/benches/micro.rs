//! What single steps on real memory cost: a checksum, a scan, a run through the page-state protocol and back.
//!
//!     cargo bench -p ksmrs-sys --bench micro
//!
//! One region of 2 MiB of small pages, so its bytes are in the processor's caches: what memory itself costs, the programs under benches/
//! show.

#[path = "../tests/tracked/mod.rs"]
mod tracked;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use ksmrs_sys::PAGE_SIZE;
use ksmrs_sys::checksum::Checksummer;
use ksmrs_sys::protocol::{Kind, Page, Span};
use tracked::{Frames, Tracked, UNIT};

fn main() {
    divan::main();
}

fn first(pages: u32) -> Span {
    Span { first: Page(0), pages }
}

#[divan::bench]
fn checksum(bencher: Bencher<'_, '_>) {
    let checksummer = Checksummer::new(&[7; 16]);
    let page = [0x5a; PAGE_SIZE];
    bencher
        .counter(BytesCount::new(PAGE_SIZE))
        .bench_local(|| checksummer.page(divan::black_box(&page)));
}

/// A pass over pages that did not change, all of which are read.
#[divan::bench]
fn scan(bencher: Bencher<'_, '_>) {
    let mut tracked = Tracked::make(UNIT, Kind::Private);
    tracked.fill();
    let mut pass = tracked::PASS;
    bencher.counter(ItemsCount::new(UNIT)).bench_local(|| {
        pass += 1;
        tracked.region.scan(first(UNIT), pass, &mut tracked.tools)
    });
}

fn merge(bencher: Bencher<'_, '_>, kind: Kind, pages: u32, glass: bool) {
    let tracked = Tracked::make(UNIT, kind);
    let mut frames = Frames::of(&tracked);
    if glass {
        assert!(frames.file.mount_glass(), "addresses for the whole store");
    }
    bencher
        .counter(ItemsCount::new(pages))
        .with_inputs(|| {
            if let Some(broken) = tracked.region.break_span(first(pages)) {
                broken.expect("memory of their own");
            }
            tracked.fill();
        })
        .bench_local_values(|()| assert_eq!(frames.merge(&tracked.region, first(pages)), pages as usize));
}

/// Frozen, compared, mapped: runs of so many pages.
#[divan::bench(args = [1, 16, 64, 512], sample_size = 1)]
fn merge_private(bencher: Bencher<'_, '_>, pages: u32) {
    merge(bencher, Kind::Private, pages, false);
}

/// The same, compared through the glass.
#[divan::bench(args = [1, 16], sample_size = 1)]
fn merge_private_through_glass(bencher: Bencher<'_, '_>, pages: u32) {
    merge(bencher, Kind::Private, pages, true);
}

/// The same, and the pages of the object freed.
#[divan::bench(args = [1, 16, 64, 512], sample_size = 1)]
fn merge_shared(bencher: Bencher<'_, '_>, pages: u32) {
    merge(bencher, Kind::Shared, pages, false);
}

/// Memory of their own for merged pages, still taking part.
#[divan::bench(args = [1, 16, 64, 512], sample_size = 1)]
fn break_private(bencher: Bencher<'_, '_>, pages: u32) {
    break_(bencher, Kind::Private, pages);
}

#[divan::bench(args = [1, 16, 64, 512], sample_size = 1)]
fn break_shared(bencher: Bencher<'_, '_>, pages: u32) {
    break_(bencher, Kind::Shared, pages);
}

fn break_(bencher: Bencher<'_, '_>, kind: Kind, pages: u32) {
    let tracked = Tracked::make(UNIT, kind);
    let frames = std::cell::RefCell::new(Frames::of(&tracked));
    tracked.fill();
    bencher
        .counter(ItemsCount::new(pages))
        .with_inputs(|| {
            let merged = frames.borrow_mut().merge(&tracked.region, first(pages));
            assert_eq!(merged, pages as usize);
        })
        .bench_local_values(|()| tracked.region.break_span(first(pages)));
}
