//! The advisor: how many pages a batch should have so that a pass takes the time that was asked for.
//!
//! The kernel's `scan-time` advisor, in whole numbers as there. After each pass in the background:
//!
//! ```text
//! factor  = target * 100 / time of this pass
//! change  = 70 % of the last change + 30 % of (time of this pass * 100 / time of the last one)
//! pages   = pages_to_scan * 100 / factor * change / 100
//! per %   = pages_to_scan / percent of a CPU that this pass took
//! result  = pages, at most per % * advisor_max_cpu, at least per % * 10, at most advisor_max_pages_to_scan
//! ```
//!
//! `advisor_min_pages_to_scan` is where it starts, not a bound of what it says later: the kernel's code has it so. Three things
//! differ. Times are in milliseconds, where the kernel takes whole seconds and calls each shorter pass 1 s and 1 % of a CPU; for
//! whole seconds the results are the same. The time of a pass has the pause before it, or a pass of one batch would look like
//! nothing but work. And the result is 1 at least, since a batch of nothing would end all passes, and the advice with them.
//!
//! Relies on being told of time and of CPU time spent; reads no clock. Never sees a merge on request: its rounds are not passes in
//! the background, nor is a pass in whose middle the scan stood still.

use crate::tunables::Tunables;
use std::time::Duration;

/// Weight of what is new in the moving average, in percent.
const EWMA_WEIGHT: u64 = 30;
/// Percent of a CPU that the advisor spends at least, where there is so much to scan.
const MIN_CPU: u64 = 10;

/// What the advisor remembers from pass to pass.
#[derive(Debug, Default)]
pub(crate) struct Advisor {
    /// How long the last pass took, in milliseconds; 0 before the first.
    scan_time: u64,
    /// The moving average of how a pass compares with the one before, in percent.
    change: u64,
    /// Since when this pass is measured.
    since: Option<Duration>,
    /// The scan stood still in the middle of this pass: its time says nothing.
    stood_still: bool,
    /// What was spent since this pass began.
    cpu: Duration,
}

impl Advisor {
    /// Another mode: what was learnt is forgotten. A pass that is under way is not measured.
    pub(crate) fn reset(&mut self) {
        *self = Advisor {
            since: self.since,
            stood_still: self.since.is_some(),
            ..Advisor::default()
        };
    }

    /// A new pass, or a round of a merge on request.
    pub(crate) fn begin_pass(&mut self) {
        (self.since, self.stood_still, self.cpu) = (None, false, Duration::ZERO);
    }

    /// Pages are looked at in the background, after a pause that was so long if they are the first of this pass.
    pub(crate) fn look(&mut self, now: Duration, pause: Duration) {
        self.since.get_or_insert(now.saturating_sub(pause));
    }

    /// Nothing is to be scanned now.
    pub(crate) fn stand_still(&mut self) {
        self.stood_still |= self.since.is_some();
    }

    /// CPU time that scanning and merging took, wherever.
    pub(crate) fn spend(&mut self, cpu: Duration) {
        self.cpu = self.cpu.saturating_add(cpu);
    }

    /// What this pass took so far.
    pub(crate) fn spent(&self) -> Duration {
        self.cpu
    }

    /// A pass is over: `pages_to_scan` from now on, or `None` where the pass says nothing.
    pub(crate) fn end_pass(&mut self, now: Duration, tunables: &Tunables) -> Option<u32> {
        let since = self.since.filter(|_| !self.stood_still)?;
        Some(self.advise(now.saturating_sub(since), tunables))
    }

    fn advise(&mut self, took: Duration, tunables: &Tunables) -> u32 {
        let now = u64::from(tunables.pages_to_scan);
        let scan_time = millis(took).max(1);
        let cpu_percent = (millis(self.cpu).saturating_mul(100) / scan_time).max(1);
        let last_scan_time = if self.scan_time == 0 { scan_time } else { self.scan_time };

        let target = u64::from(tunables.advisor_target_scan_time) * 1000;
        let factor = (target * 100 / scan_time).max(1);
        let change = (scan_time.saturating_mul(100) / last_scan_time).max(1);
        let change = ewma(self.change, change);
        let pages = (now * 100 / factor).saturating_mul(change) / 100;

        let per_percent = (now / cpu_percent).max(1);
        let pages = pages
            .min(per_percent.saturating_mul(u64::from(tunables.advisor_max_cpu)))
            .max(per_percent.saturating_mul(MIN_CPU))
            .min(u64::from(tunables.advisor_max_pages_to_scan))
            .max(1);
        (self.change, self.scan_time) = (change, scan_time);
        u32::try_from(pages).unwrap_or(u32::MAX)
    }
}

/// Where the advisor starts.
pub(crate) fn first(tunables: &Tunables) -> u32 {
    tunables.advisor_min_pages_to_scan.max(1)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn ewma(before: u64, now: u64) -> u64 {
    ((100 - EWMA_WEIGHT).saturating_mul(before)).saturating_add(EWMA_WEIGHT.saturating_mul(now)) / 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAUSE: Duration = Duration::from_millis(20);

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A pass of that length and that CPU time; `pages_to_scan` follows the advice.
    fn pass(advisor: &mut Advisor, tunables: &mut Tunables, took: Duration, cpu: Duration) -> u32 {
        advisor.begin_pass();
        advisor.spend(cpu);
        tunables.pages_to_scan = advisor.advise(took, tunables);
        tunables.pages_to_scan
    }

    #[test]
    fn the_average_is_made_of_thirty_percent_of_what_is_new() {
        // 0.7 * 0 + 0.3 * 100; 0.7 * 30 + 0.3 * 100; 0.7 * 51 + 0.3 * 200 = 95.7; 0.7 * 95 + 0.3 * 1 = 66.8.
        let mut average = 0;
        let averages = [100, 100, 200, 1].map(|change| {
            average = ewma(average, change);
            average
        });
        assert_eq!(averages, [30, 51, 95, 66]);
        assert_eq!(
            ewma(u64::MAX, u64::MAX),
            u64::MAX / 100,
            "the largest numbers do not wrap"
        );
    }

    #[test]
    fn passes_worked_out_by_hand() {
        let (mut advisor, mut tunables) = (Advisor::default(), Tunables::default());
        assert_eq!((tunables.pages_to_scan, tunables.advisor_target_scan_time), (500, 200));
        // 400 s, 8 s of CPU: factor 50, change 30 (there was no pass before), 500 * 100 / 50 = 1000, * 30 % = 300.
        // 2 % of a CPU: 250 pages for each, so 2500 at least and 17500 at most.
        assert_eq!(pass(&mut advisor, &mut tunables, secs(400), secs(8)), 2500);
        // 100 s, 8 s: factor 200, change 0.7 * 30 + 0.3 * 25 = 28, 2500 * 100 / 200 * 28 % = 350; 8 %: 312 for each.
        assert_eq!(pass(&mut advisor, &mut tunables, secs(100), secs(8)), 3120);
        // 900 s, 180 s: factor 22, change 0.7 * 28 + 0.3 * 900 = 289, 3120 * 100 / 22 = 14181, * 289 % = 40983;
        // 20 %: 156 for each, 10920 at most.
        assert_eq!(pass(&mut advisor, &mut tunables, secs(900), secs(180)), 10920);
        // 4000 s, 80 s: factor 5, change 0.7 * 289 + 0.3 * 444 = 335, 218400 * 335 % = 731640; 2 %: 5460 for each, 382200
        // at most; the bound of pages is lower.
        assert_eq!(pass(&mut advisor, &mut tunables, secs(4000), secs(80)), 30000);
        // 200 s, 60 s: factor 100, change 0.7 * 335 + 0.3 * 5 = 236, 30000 * 236 % = 70800; 30 %: 1000 for each, 70000 at most.
        assert_eq!(pass(&mut advisor, &mut tunables, secs(200), secs(60)), 30000);
        // 200 s, 200 s: the same time, now at 100 %: 300 pages for each, 21000 at most.
        assert_eq!(pass(&mut advisor, &mut tunables, secs(200), secs(200)), 21000);
    }

    #[test]
    fn the_first_pass_counts_what_was_spent_in_it_alone() {
        let (mut advisor, tunables) = (Advisor::default(), Tunables::default());
        advisor.spend(secs(1000));
        advisor.begin_pass();
        assert_eq!(advisor.end_pass(secs(9), &tunables), None, "no page was looked at");
        advisor.look(secs(10), PAUSE);
        advisor.spend(secs(1));
        // 10.02 s with the pause, 9 %: 55 pages for each.
        assert_eq!(advisor.end_pass(secs(20), &tunables), Some(550));
        assert_eq!((advisor.change, advisor.scan_time), (30, 10_020));
    }

    #[test]
    fn a_pass_that_stood_still_says_nothing() {
        let (mut advisor, tunables) = (Advisor::default(), Tunables::default());
        advisor.begin_pass();
        advisor.stand_still();
        advisor.look(secs(1), PAUSE);
        assert!(advisor.end_pass(secs(2), &tunables).is_some(), "it had not begun");
        advisor.begin_pass();
        advisor.look(secs(3), PAUSE);
        advisor.stand_still();
        advisor.look(secs(9), PAUSE);
        assert_eq!(advisor.end_pass(secs(10), &tunables), None);
        advisor.begin_pass();
        advisor.look(secs(11), PAUSE);
        advisor.reset();
        assert_eq!(
            advisor.end_pass(secs(12), &tunables),
            None,
            "it began under another mode"
        );
        assert_eq!((advisor.change, advisor.scan_time), (0, 0));
    }

    #[test]
    fn bounds_of_nothing_do_not_end_all_passes() {
        let mut tunables = Tunables {
            advisor_min_pages_to_scan: 0,
            advisor_max_pages_to_scan: 0,
            ..Tunables::default()
        };
        assert_eq!(first(&tunables), 1);
        assert_eq!(pass(&mut Advisor::default(), &mut tunables, secs(5), secs(1)), 1);
    }

    /// What is to be scanned, as a machine that needs so long for a page and pauses between batches.
    struct Machine {
        pages: u64,
        per_page: f64,
    }

    impl Machine {
        fn pass(&self, pages_to_scan: u32) -> (Duration, Duration) {
            let cpu = self.pages as f64 * self.per_page;
            let pauses = self.pages.div_ceil(u64::from(pages_to_scan)) as f64 * PAUSE.as_secs_f64();
            (Duration::from_secs_f64(cpu + pauses), Duration::from_secs_f64(cpu))
        }
    }

    proptest! {
        /// Whatever was measured: at most the bound of pages, and in terms of the last pass no more than the CPU bound allows
        /// and no less than its floor, where the bound of pages is no lower.
        #[test]
        fn the_bounds_hold_after_every_pass(
            passes in prop::collection::vec((0..10_000_000u64, 0..20_000_000u64), 1..20),
            start in 0..u32::MAX, max_cpu in 0..200u32, target in 1..u32::MAX, max_pages in 0..u32::MAX,
        ) {
            let mut tunables = Tunables {
                pages_to_scan: start,
                advisor_max_cpu: max_cpu,
                advisor_target_scan_time: target,
                advisor_max_pages_to_scan: max_pages,
                ..Tunables::default()
            };
            let mut advisor = Advisor::default();
            for (took, cpu) in passes {
                let before = u64::from(tunables.pages_to_scan);
                let (took, cpu) = (Duration::from_millis(took), Duration::from_millis(cpu));
                let pages = u64::from(pass(&mut advisor, &mut tunables, took, cpu));
                let percent = (cpu.as_millis() as u64 * 100 / (took.as_millis() as u64).max(1)).max(1);
                let each = (before / percent).max(1);
                prop_assert!(pages >= 1 && pages <= u64::from(max_pages.max(1)));
                prop_assert!(pages <= each * u64::from(max_cpu).max(MIN_CPU));
                prop_assert!(pages >= (each * MIN_CPU).min(u64::from(max_pages)));
            }
        }

        /// Where the bounds leave room for it, a pass soon takes the time that was asked for, wherever it starts. The average
        /// is rounded down and stays at 97 %, so it takes a little longer.
        #[test]
        fn passes_come_to_take_the_target_time(
            target in 20..400u32, busy in 0.15..0.60f64, goal in 500..20_000u32, start in 10..30_000u32,
        ) {
            // At `goal` pages per batch a pass takes the target time and is busy for that part of it.
            let time = f64::from(target);
            let pages = (1.0 - busy) * time / PAUSE.as_secs_f64() * f64::from(goal);
            let machine = Machine { pages: pages as u64, per_page: busy * time / pages };
            let mut tunables = Tunables {
                pages_to_scan: start,
                advisor_target_scan_time: target,
                ..Tunables::default()
            };
            let mut advisor = Advisor::default();
            for _ in 0..25 {
                let (took, cpu) = machine.pass(tunables.pages_to_scan);
                pass(&mut advisor, &mut tunables, took, cpu);
            }
            let (took, _) = machine.pass(tunables.pages_to_scan);
            prop_assert!((took.as_secs_f64() / time - 1.0).abs() < 0.1, "{took:?} at {}", tunables.pages_to_scan);
        }
    }
}
