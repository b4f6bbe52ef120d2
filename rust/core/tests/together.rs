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
    /// What becomes of the next answer to a Scan.
    next: Fate,
}

/// What becomes of an answer.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Fate {
    #[default]
    Whole,
    Short,
    Refused,
}

impl Side {
    fn new(contents: &Contents, together: bool, smart: bool, sharing: u32) -> Side {
        let mut core = Core::new(4 * PAGES, Checksum(0));
        core.set("max_page_sharing", &sharing.to_string()).unwrap();
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
                4 * PAGES,
                Box::new(move |page| Checksum(held.borrow()[page.0 as usize])),
            ),
            contents: Rc::clone(contents),
            together,
            known: vec![(u64::MAX, 0); PAGES as usize],
            next: Fate::Whole,
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

    /// Something that may happen at any time.
    fn happen(&mut self, event: Event) {
        let now = self.clients.now;
        match event {
            Event::Nothing => {}
            Event::Request => drop(self.core.request_merge(now)),
            // Not while pages are merged, for some.
            Event::Set(knob, value) => drop(self.core.set(knob, value)),
            Event::Sealed => [1, 2]
                .map(ClientId)
                .into_iter()
                .for_each(|id| self.core.sealed(id, Epoch::default())),
            Event::Accompanied(accompanied) => self.clients.accompanied = accompanied,
            Event::Answer(fate) => self.next = fate,
        }
    }

    fn carry_out(&mut self, decision: Decision) {
        let Decision::Scan {
            order, pass, ranges, ..
        } = decision
        else {
            return self.clients.carry_out(&mut self.core, decision);
        };
        let pages = ranges.iter().flat_map(|range| range.iter());
        let mut seen: Vec<Observation> = pages.map(|page| self.look(page, pass)).collect();
        match std::mem::take(&mut self.next) {
            Fate::Whole => {}
            Fate::Short => seen.truncate(seen.len() / 2 + 3),
            Fate::Refused => return self.core.order_refused(order, Epoch::default()),
        }
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

#[derive(Clone, Copy)]
enum Event {
    Nothing,
    Request,
    Set(&'static str, &'static str),
    Sealed,
    Accompanied(bool),
    Answer(Fate),
}

const EVENTS: [Event; 20] = [
    Event::Nothing,
    Event::Nothing,
    Event::Nothing,
    Event::Request,
    Event::Set("smart_scan", "0"),
    Event::Set("smart_scan", "1"),
    Event::Set("run", "0"),
    Event::Set("run", "1"),
    Event::Set("run", "1"),
    Event::Set("run", "2"),
    Event::Set("merge_across_nodes", "0"),
    Event::Set("merge_across_nodes", "1"),
    Event::Set("use_zero_pages", "1"),
    Event::Set("pages_to_scan", "100"),
    Event::Set("pages_to_scan", "5000"),
    Event::Sealed,
    Event::Accompanied(true),
    Event::Accompanied(false),
    Event::Answer(Fate::Short),
    Event::Answer(Fate::Refused),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_same_follows(
        smart: bool,
        sharing in 2u32..7,
        alike in 1u64..400,
        // After how many steps what happens, and which pages are written: each with what no other holds, with what others hold, or all the same.
        history in proptest::collection::vec((1u32..60, 0..EVENTS.len(), 0u32..PAGES, 1u32..300, 0u8..3), 1..40),
    ) {
        // A third is like nothing else, some are zeros.
        let first = |page: u64| if page.is_multiple_of(3) { (1 + page) << 20 } else { (page % alike).saturating_sub(1) };
        let contents: Contents = Rc::new(RefCell::new((0..u64::from(PAGES)).map(first).collect()));
        let mut sides = [true, false].map(|together| Side::new(&contents, together, smart, sharing));
        let mut fresh = 1 << 31;
        for (steps, event, first, stride, how) in history {
            sides.iter_mut().for_each(|side| side.happen(EVENTS[event]));
            for _ in 0..steps {
                prop_assert!(step(&mut sides), "they decide differently");
                let [one, other] = sides.each_ref().map(|side| side.core.stats());
                prop_assert_eq!(format!("{one:?}"), format!("{other:?}"));
            }
            for page in (first..PAGES).step_by(stride as usize) {
                fresh += 1;
                contents.borrow_mut()[page as usize] = [fresh, u64::from(page) % alike, 5][usize::from(how)];
                sides.iter_mut().for_each(|side| side.clients.broke(PageNumber(page)));
            }
        }
    }
}
