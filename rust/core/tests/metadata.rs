//! What core remembers of a page, by the allocator's own count: at most 32 bytes, 16 of which are the client's page table.
//!
//! Core is driven by clients that answer at once; whatever they need is allocated outside of what is counted, or is gone before the
//! count ends. Each kind of memory is measured at several sizes, for hash tables grow by steps. Prints what it found.
#![allow(clippy::print_stdout, reason = "the figures are what it is for")]

mod honest;

use allocation_counter::measure;
use honest::Honest;
use ksmrs_core::{Checksum, ClientId, Core, Kind};

const PAGE_TABLE: f64 = 16.0;
const MOST: f64 = 32.0;

/// Equal regions and what they hold, by the page's number in its region.
struct Memory {
    name: &'static str,
    clients: u32,
    pages_each: u32,
    /// Whether all clients hold the same.
    equal: bool,
    passes: u64,
}

impl Memory {
    fn pages(&self) -> u32 {
        self.clients * self.pages_each
    }

    /// Regions are a whole number of windows, so that page numbers go on from one to the next.
    fn checksum(&self, page: u32) -> Checksum {
        let content = if self.equal { page % self.pages_each } else { page };
        // 32 bits, of which no two contents have the same, make as many tags.
        Checksum(u64::from((content + 1).wrapping_mul(0x7f4a_7c15)))
    }

    fn join(&self, core: &mut Core) {
        for &(knob, value) in STEADY {
            core.set(knob, value).unwrap();
        }
        for client in 0..self.clients {
            core.client_joined(ClientId(client));
            core.region_joined(ClientId(client), Kind::Private, self.pages_each, 0)
                .unwrap();
        }
    }

    /// Bytes per page by the allocator's count and by core's own, the page table included.
    fn measured(&self) -> (f64, f64, Core) {
        let slots_in_store = self.pages() + 1024;
        let mut clients = Honest::new(self.pages(), slots_in_store, |page| self.checksum(page.0));
        let mut core = Core::new(slots_in_store, Checksum(0));
        let fixed = core.metadata_bytes();
        let grown = measure(|| {
            self.join(&mut core);
            clients.pass(&mut core, self.passes);
        });
        let per_page = |bytes: f64| PAGE_TABLE + bytes / f64::from(self.pages());
        let by_core = (core.metadata_bytes() - fixed) as f64;
        (per_page(grown.bytes_current as f64), per_page(by_core), core)
    }
}

const STEADY: &[(&str, &str)] = &[
    ("advisor_mode", "none"),
    ("pages_to_scan", "100000"),
    ("smart_scan", "0"),
    // A thousand pages on one frame, where so many are equal.
    ("max_page_sharing", "2000"),
];

fn check(memory: &Memory, is_what_it_says: impl Fn(&ksmrs_core::Stats, u64) -> bool) {
    let (allocated, counted, core) = memory.measured();
    let stats = core.stats();
    println!(
        "{:>26}: {:>7} pages, {allocated:.2} bytes a page; by core's own count {counted:.2}",
        memory.name,
        memory.pages()
    );
    assert!(
        is_what_it_says(&stats, memory.pages().into()),
        "{}: {stats:?}",
        memory.name
    );
    assert!(
        (allocated - counted).abs() < 0.5,
        "core's own count is {counted}, the allocator's {allocated}"
    );
    assert!(allocated <= MOST, "{}: {allocated} bytes a page", memory.name);
}

/// Windows in a region: between them the tables have all the fillings that they can have.
const WINDOWS: [u32; 3] = [129, 168, 201];

#[test]
fn a_page_costs_at_most_32_bytes() {
    let memory = |name, clients, pages_each, equal, passes| Memory {
        name,
        clients,
        pages_each,
        equal,
        passes,
    };
    for windows in WINDOWS {
        let unique = memory("unlike any other, once seen", 2, windows * 512, false, 1);
        check(&unique, |stats, pages| stats.pages_volatile == pages);
        let candidates = memory("candidates", 2, windows * 512, false, 3);
        check(&candidates, |stats, pages| stats.pages_unshared == pages);
        let twice = memory("merged twice, in runs", 2, windows * 512, true, 4);
        check(&twice, |stats, pages| stats.pages_sharing == pages / 2);
    }
    let often = memory("merged a thousand times", 1000, 512, true, 4);
    check(&often, |stats, pages| stats.pages_shared == pages / 1000);
}
