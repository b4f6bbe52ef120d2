//! How long a small client waits among large ones, by core's own clock: clients answer at once, and time is what core waits for.
//!
//! Pages hold what they hold; a checksum has changed if it took its value in the look that asks, as in a client's table.

mod honest;

use honest::Honest;
use ksmrs_core::{Checksum, ClientId, Core, Decision, Kind, Next, Observation, PageNumber, Seen, WINDOW};
use std::time::Duration;

/// Pages per batch, a batch each 20 ms.
const BATCH: u32 = 1024;
/// What each of the pair holds, the same as the other.
const SMALL: u32 = 8 * WINDOW;
const PAUSE: Duration = Duration::from_millis(20);
/// From a look to the next that is called for.
const CALL: Duration = Duration::from_millis(100);

type Content = Box<dyn Fn(PageNumber) -> Checksum>;

struct Scene {
    core: Core,
    clients: Honest<Content>,
    /// The look in which each page's checksum took its value.
    since: Vec<Option<u16>>,
    /// Pages that are written over and over, as often as they are looked at.
    restless: Option<std::ops::Range<u32>>,
    joined: u32,
    /// Pages of others than the pair.
    others: u32,
}

impl Scene {
    /// Room for so many pages of others, each like no other, and behind them for the pair's.
    fn new(others: u32) -> Scene {
        let pages = others + 2 * SMALL;
        let content = move |page: PageNumber| {
            let number = if page.0 < others {
                page.0
            } else {
                others + (page.0 - others) % SMALL
            };
            Checksum(u64::from((number + 1).wrapping_mul(0x7f4a_7c15)))
        };
        let mut core = Core::new(pages, Checksum(0));
        for (knob, value) in [("advisor_mode", "none"), ("pages_to_scan", &BATCH.to_string())] {
            core.set(knob, value).unwrap();
        }
        Scene {
            core,
            clients: Honest::new(pages, pages, Box::new(content)),
            since: vec![None; pages as usize],
            restless: None,
            joined: 0,
            others,
        }
    }

    fn join(&mut self, pages: u32) -> PageNumber {
        self.joined += 1;
        let id = ClientId(self.joined);
        self.core.client_joined(id);
        self.core.region_joined(id, Kind::Private, pages, 0).unwrap().1
    }

    fn join_pair(&mut self) {
        assert_eq!(self.join(SMALL), PageNumber(self.others));
        assert_eq!(self.join(SMALL), PageNumber(self.others + SMALL));
    }

    fn observe(&mut self, page: PageNumber, look: u16) -> Observation {
        if self.restless.as_ref().is_some_and(|pages| pages.contains(&page.0)) {
            return Observation {
                seen: Seen::Own,
                checksum: Some((Checksum(u64::from(look) << 32 | u64::from(page.0)), true)),
            };
        }
        let since = *self.since[page.0 as usize].get_or_insert(look);
        self.clients.observe(page, since == look)
    }

    fn step(&mut self) {
        let next = self.core.next(self.clients.now);
        self.obey(next);
    }

    fn obey(&mut self, next: Next) {
        match next {
            Next::Do(Decision::Scan {
                order, pass, ranges, ..
            }) => {
                let pages = ranges.iter().flat_map(|range| range.iter());
                let observations: Vec<Observation> = pages.map(|page| self.observe(page, pass)).collect();
                self.core
                    .scanned(order, &(Default::default(), &observations[..]), self.clients.now);
            }
            Next::Do(decision) => self.clients.carry_out(&mut self.core, decision),
            Next::WaitUntil(then) => self.clients.now = then.max(self.clients.now),
            Next::Idle => panic!("nothing to do: {:?}", self.core.stats()),
        }
    }

    fn passes(&mut self, count: u64) {
        let until = self.core.full_scans() + count;
        while self.core.full_scans() < until {
            self.step();
        }
    }

    /// From now until nine tenths of what the pair can save is saved.
    fn until_saved(&mut self) -> Duration {
        let began = self.clients.now;
        while self.core.stats().pages_sharing < u64::from(SMALL) * 9 / 10 {
            self.step();
        }
        self.clients.now - began
    }
}

/// The pair with nobody else there.
fn alone() -> Duration {
    let mut scene = Scene::new(0);
    scene.join_pair();
    scene.until_saved()
}

#[test]
fn a_large_newcomer_makes_small_ones_wait_for_its_share_and_not_for_its_end() {
    let large = 512 * WINDOW;
    let mut scene = Scene::new(large);
    scene.join(large);
    scene.join_pair();
    let took = scene.until_saved();
    // Three are ahead, and their half of the batches is shared.
    assert!(
        took <= 2 * 3 * alone() / 2 + CALL + 2 * PAUSE,
        "{took:?}, alone {:?}",
        alone()
    );
    assert_eq!(scene.core.stats().full_scans, 0, "the pass is not over yet");
    let whole = PAUSE * (large / BATCH);
    assert!(took < whole / 3, "{took:?}, a pass {whole:?}");
}

#[test]
fn a_crowd_that_was_there_before_makes_small_ones_wait_no_longer_than_twice_as_long() {
    let (crowd, each) = (100, 8 * WINDOW);
    let mut scene = Scene::new(crowd * each);
    for _ in 0..crowd {
        scene.join(each);
    }
    scene.core.set("smart_scan", "0").unwrap();
    scene.core.set("pages_to_scan", "100000").unwrap();
    scene.passes(2);
    scene.core.set("pages_to_scan", &BATCH.to_string()).unwrap();
    scene.join_pair();
    let took = scene.until_saved();
    assert!(took <= 2 * alone() + CALL + 2 * PAUSE, "{took:?}, alone {:?}", alone());
}

#[test]
fn a_pass_is_over_when_every_region_was_looked_at_and_no_later() {
    let large = 64 * WINDOW;
    let mut scene = Scene::new(large);
    scene.core.set("smart_scan", "0").unwrap();
    scene.join(large);
    scene.join_pair();
    for _ in 0..4 {
        let (before, began) = (scene.core.stats(), scene.clients.now);
        scene.passes(1);
        let now = scene.core.stats();
        let again = now.pages_scanned_again - before.pages_scanned_again;
        assert_eq!(
            now.pages_scanned - before.pages_scanned - again,
            u64::from(large + 2 * SMALL)
        );
        let batches = (now.pages_scanned - before.pages_scanned).div_ceil(BATCH.into()) as u32;
        assert!(scene.clients.now - began <= PAUSE * (batches + 1), "the pace is kept");
        assert!(
            again <= u64::from(2 * SMALL),
            "nobody but the pair is through so early: {again}"
        );
    }
    assert_eq!(
        scene.core.stats().pages_scanned_again,
        2 * u64::from(SMALL),
        "once, and never again"
    );
}

#[test]
fn looks_that_never_pay_become_rare() {
    let large = 1024 * WINDOW;
    let mut scene = Scene::new(large + 2 * WINDOW);
    scene.core.set("smart_scan", "0").unwrap();
    let first = scene.join(2 * WINDOW).0;
    scene.restless = Some(first..first + 2 * WINDOW);
    scene.join(large);
    scene.passes(1);
    // 10 s: called after 0.1, 0.2, 0.4 ... 6.4 s.
    let looks = scene.core.stats().pages_scanned_again / u64::from(2 * WINDOW);
    assert!((5..=7).contains(&looks), "{looks} looks");
    scene.passes(1);
    let more = scene.core.stats().pages_scanned_again / u64::from(2 * WINDOW) - looks;
    assert!(more <= 1, "{more} more looks in another pass");
}

#[test]
fn idle_memory_is_looked_at_rarely_until_something_happens() {
    let mut scene = Scene::new(0);
    scene.core.set("advisor_mode", "scan-time").unwrap();
    scene.join_pair();
    let second = Duration::from_secs(1);
    let passes_in = |scene: &mut Scene, time: Duration| {
        let (before, until) = (scene.core.full_scans(), scene.clients.now + time);
        while scene.clients.now < until {
            scene.step();
        }
        scene.core.full_scans() - before
    };
    assert!(scene.until_saved() < second);
    passes_in(&mut scene, 20 * second);
    assert!(passes_in(&mut scene, 60 * second) <= 60, "a pass each second at most");
    scene.core.set("sleep_millisecs", "20").unwrap();
    assert!(passes_in(&mut scene, second) >= 9, "somebody turned a knob");
    passes_in(&mut scene, 20 * second);
    // One of them writes a sixteenth of its memory, again and again.
    scene.restless = Some(0..SMALL / 16);
    passes_in(&mut scene, second + PAUSE);
    assert!(passes_in(&mut scene, 10 * second) >= 50, "it is seen after a second");
    scene.core.set("advisor_mode", "none").unwrap();
    assert!(passes_in(&mut scene, 60 * second) >= 60 * 2, "as the kernel does");
}

/// Two clients that are scanned without a pause, each page for 2 us: what the first spent, and when, and all of it by the second.
fn spending(ceiling: &str, mut on_request: bool, time: Duration) -> (Vec<(Duration, Duration)>, Duration) {
    let mut scene = Scene::new(8 * WINDOW);
    for (knob, value) in [
        ("smart_scan", "0"),
        ("pages_to_scan", "1000000"),
        ("sleep_millisecs", "0"),
        ("client_max_cpu", ceiling),
    ] {
        scene.core.set(knob, value).unwrap();
    }
    scene.join(8 * WINDOW);
    scene.join_pair();
    let (mut spent, mut other) = (Vec::new(), Duration::ZERO);
    while scene.clients.now < time {
        if on_request && scene.core.stats().clients_at_max_cpu > 0 {
            on_request = false;
            scene.core.request_merge(scene.clients.now);
            scene.core.set("run", "0").unwrap();
        }
        let next = scene.core.next(scene.clients.now);
        let client = match &next {
            Next::Do(Decision::Scan { client, .. } | Decision::Map { client, .. }) => Some(*client),
            _ => None,
        };
        let pages: u32 = match &next {
            Next::Do(Decision::Scan { ranges, .. }) => ranges.iter().map(|range| range.pages).sum(),
            Next::Do(Decision::Map { runs, .. }) => runs.iter().map(|run| u32::from(run.pages)).sum(),
            Next::Idle => break,
            _ => 0,
        };
        scene.obey(next);
        if let Some(client) = client {
            let cpu = Duration::from_micros(2) * pages;
            // Both have a processor to themselves, which is free again when its order is done.
            scene.clients.now += cpu / 2;
            scene.core.client_spent(client, cpu, scene.clients.now);
            match client {
                ClientId(1) => spent.push((scene.clients.now, cpu)),
                _ => other += cpu,
            }
        }
    }
    (spent, other)
}

/// The most that was spent in any second.
fn in_a_second(spent: &[(Duration, Duration)]) -> Duration {
    let in_second = |from: Duration| -> Duration {
        let inside = spent
            .iter()
            .filter(|(at, _)| (from..from + Duration::from_secs(1)).contains(at));
        inside.map(|&(_, cpu)| cpu).sum()
    };
    spent.iter().map(|&(at, _)| in_second(at)).max().unwrap_or_default()
}

#[test]
fn no_client_takes_more_than_its_ceiling_in_the_background() {
    let time = Duration::from_secs(8);
    let order = Duration::from_micros(2) * 8192;
    let (free, _) = spending("200", false, Duration::from_millis(1100));
    assert!(
        in_a_second(&free) > Duration::from_millis(500),
        "{:?}",
        in_a_second(&free)
    );
    for ceiling in [5, 10, 30] {
        let (spent, other) = spending(&ceiling.to_string(), false, time);
        let most = Duration::from_millis(11 * u64::from(ceiling)) + order;
        assert!(in_a_second(&spent) <= most, "{:?} at {ceiling} %", in_a_second(&spent));
        let total: Duration = spent.iter().map(|&(_, cpu)| cpu).sum();
        let whole = time * ceiling / 100;
        assert!(
            total > whole * 9 / 10 && total <= whole + order + whole / 10,
            "{total:?} at {ceiling} %"
        );
        assert!(other > whole, "each has a ceiling of its own: {other:?}");
    }
}

#[test]
fn a_merge_on_request_waits_for_no_ceiling() {
    let (spent, _) = spending("1", true, Duration::from_secs(10));
    // Two rounds over its eight windows, at once.
    let total: Duration = spent.iter().map(|&(_, cpu)| cpu).sum();
    assert!(total >= Duration::from_micros(2) * (2 * 8 * WINDOW), "{total:?}");
    let (first, last) = (spent.first().unwrap().0, spent.last().unwrap().0);
    assert!(last - first < Duration::from_secs(1), "{:?}", last - first);
}
