//! Pages that are confirmed together come to the same as pages that are looked at one by one: the same decisions, the same counters.
//!
//! Two cores with clients of their own are driven in lockstep over the same random history; of one of them the driver says each time
//! that something is new. Relies on core to be deterministic.

mod honest;

use honest::Honest;
use ksmrs_core::{
    Checksum, ClientId, Core, Decision, Epoch, Kind, Next, Observation, Observations, PageNumber, WINDOW,
};
use proptest::prelude::*;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

const PAGES: u32 = 2 * WINDOW;

/// What all pages hold.
type Contents = Rc<RefCell<Vec<u64>>>;

/// A driver that answers page by page.
struct OneByOne<'a>(&'a [Observation]);

impl Observations for OneByOne<'_> {
    fn pages(&self) -> usize {
        self.0.len()
    }

    fn of(&self, page: usize) -> Observation {
        self.0[page]
    }

    fn unchanged(&self, _: usize, _: &mut [Checksum]) -> bool {
        false
    }

    fn epoch(&self) -> Epoch {
        Epoch::default()
    }
}

struct Side {
    core: Core,
    clients: Honest<Box<dyn Fn(PageNumber) -> Checksum>>,
    contents: Contents,
    together: bool,
    /// Each page's checksum, and the look in which it took its value.
    known: Vec<(u64, u16)>,
}

impl Side {
    fn new(contents: &Contents, together: bool, smart: bool) -> Side {
        let mut core = Core::new(PAGES, Checksum(0));
        for (knob, value) in [
            ("use_zero_pages", "0"),
            ("advisor_mode", "none"),
            ("pages_to_scan", "700"),
            ("smart_scan", if smart { "1" } else { "0" }),
        ] {
            core.set(knob, value).unwrap();
        }
        for (client, position) in [(1, 0), (2, 37)] {
            core.client_joined(ClientId(client));
            core.region_joined(ClientId(client), Kind::Private, PAGES / 2 - 100, position)
                .unwrap();
        }
        let held = Rc::clone(contents);
        Side {
            core,
            clients: Honest::new(
                PAGES,
                PAGES,
                Box::new(move |page| Checksum(held.borrow()[page.0 as usize])),
            ),
            contents: Rc::clone(contents),
            together,
            known: vec![(0, 0); PAGES as usize],
        }
    }

    fn look(&mut self, page: PageNumber, pass: u16) -> Observation {
        let holds = self.contents.borrow()[page.0 as usize];
        let known = &mut self.known[page.0 as usize];
        if known.0 != holds {
            *known = (holds, pass);
        }
        let changed = known.1 == pass;
        self.clients.observe(page, changed)
    }

    fn carry_out(&mut self, decision: Decision) {
        let Decision::Scan {
            order, pass, ranges, ..
        } = decision
        else {
            return self.clients.carry_out(&mut self.core, decision);
        };
        let pages = ranges.iter().flat_map(|range| range.iter());
        let seen: Vec<Observation> = pages.map(|page| self.look(page, pass)).collect();
        match self.together {
            true => self
                .core
                .scanned(order, &(Epoch::default(), &seen[..]), self.clients.now),
            false => self.core.scanned(order, &OneByOne(&seen), self.clients.now),
        }
    }
}

/// Does the next thing on both sides; whether it was the same.
fn step(sides: &mut [Side; 2]) -> bool {
    let [one, other] = sides.each_mut().map(|side| side.core.next(side.clients.now));
    let same = one == other;
    for (side, next) in sides.iter_mut().zip([one, other]) {
        match next {
            Next::Do(decision) => side.carry_out(decision),
            Next::WaitUntil(then) => side.clients.now = then.max(side.clients.now),
            Next::Idle => side.clients.now += Duration::from_millis(20),
        }
    }
    same
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_same_follows(
        smart: bool,
        alike in 1u64..2000,
        zeros_after in 0usize..30,
        // While somebody else has the clients' memory.
        accompanied in (0usize..30, 0usize..30),
        // After how many steps which pages are written: (steps, first, stride).
        writes in proptest::collection::vec((1u32..60, 0u32..PAGES, 1u32..300), 1..30),
    ) {
        // A third is written now and then and never equal to anything; of the rest some are, and some are zeros.
        let contents: Contents = Rc::new(RefCell::new((0..u64::from(PAGES)).map(|page| if page % 3 == 0 { (1 + page) << 20 } else { (page % alike).saturating_sub(1) }).collect()));
        let mut sides = [true, false].map(|together| Side::new(&contents, together, smart));
        let mut fresh = 1 << 31;
        for (i, (steps, first, stride)) in writes.into_iter().enumerate() {
            for side in &mut sides {
                if i == zeros_after {
                    side.core.set("use_zero_pages", "1").unwrap();
                }
                side.clients.accompanied = (accompanied.0..accompanied.1).contains(&i);
            }
            for _ in 0..steps {
                prop_assert!(step(&mut sides), "they decide differently");
                let [one, other] = sides.each_ref().map(|side| side.core.stats());
                prop_assert_eq!(format!("{one:?}"), format!("{other:?}"));
            }
            for page in (first..PAGES).step_by(stride as usize).filter(|page| page % 3 == 0) {
                fresh += 1;
                contents.borrow_mut()[page as usize] = fresh;
            }
        }
    }
}
