//! Idle memory: passes in which nothing happens follow each other ever later.
//!
//! Memory that merged once and rests needs looking at only for what may be written next, yet the advisor spends at least a tenth
//! of a CPU where it can. So once every page had its turn (nine passes, the longest that smart scan leaves one out) and hardly any changed,
//! merged or broke in them, the pause before the next pass doubles, up to where a pass takes a five-hundredth of one CPU, but no longer
//! than a pass should take anyway (`advisor_target_scan_time`). It ends with the first pass that finds something, a region that
//! joins, a merge on request and every knob that is set. Only while the advisor sets the pace: whoever sets it by hand
//! gets the kernel's, a pass after the other. The advisor is not told: what it measures begins with the first look.

use std::time::Duration;

/// Passes in a row in which nothing happens before they are put off.
const QUIET: u32 = 9;
/// Of so many pages that were looked at one may have changed, merged or broken in a quiet pass.
const NOISE: u64 = 256;
/// So many times what a pass takes of CPU time lie between two passes, at most.
const PARTS: u32 = 500;
/// The first pause that is added, and the least that the longest can be.
const PAUSE: (Duration, Duration) = (Duration::from_millis(40), Duration::from_secs(1));

/// What a pass came to.
pub(crate) struct Outcome {
    /// Pages looked at.
    pub looked_at: u64,
    /// Pages that changed, merged or broke.
    pub stirred: u64,
    /// What it took, of all processes.
    pub cpu: Duration,
}

/// How many passes have been quiet, and what follows from it.
#[derive(Default)]
pub(crate) struct Idle {
    quiet: u32,
    pause: Duration,
}

impl Idle {
    /// How long to wait until the next pass, at most `longest` and beside the usual pause.
    pub(crate) fn end_pass(&mut self, outcome: &Outcome, longest: Duration) -> Duration {
        if outcome.stirred > outcome.looked_at / NOISE {
            self.disturb();
            return Duration::ZERO;
        }
        self.quiet = self.quiet.saturating_add(1);
        if self.quiet <= QUIET {
            return Duration::ZERO;
        }
        let most = (outcome.cpu * PARTS).max(PAUSE.1).min(longest);
        self.pause = (self.pause * 2).max(PAUSE.0).min(most);
        self.pause
    }

    /// Something happened.
    pub(crate) fn disturb(&mut self) {
        *self = Idle::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn pass(looked_at: u64, stirred: u64, cpu_ms: u64) -> Outcome {
        Outcome {
            looked_at,
            stirred,
            cpu: Duration::from_millis(cpu_ms),
        }
    }

    #[test]
    fn pauses_double_once_every_page_had_its_turn_and_end_with_what_happens() {
        let mut idle = Idle::default();
        let mut pauses = |count: usize, outcome: &Outcome, longest: Duration| -> Vec<u128> {
            (0..count)
                .map(|_| idle.end_pass(outcome, longest).as_millis())
                .collect()
        };
        assert_eq!(pauses(9, &pass(1000, 0, 4), HOUR), [0; 9]);
        assert_eq!(
            pauses(8, &pass(1000, 3, 4), HOUR),
            [40, 80, 160, 320, 640, 1280, 2000, 2000],
            "a five-hundredth of a CPU; 3 pages of 1000 are next to nothing"
        );
        assert_eq!(pauses(1, &pass(1000, 4, 4), HOUR), [0], "4 are not");
        assert_eq!(
            pauses(9, &pass(0, 0, 0), HOUR),
            [0; 9],
            "smart scan left all of them out"
        );
        assert_eq!(pauses(7, &pass(0, 0, 0), HOUR)[6], 1000, "no more than one a second");
        assert_eq!(pauses(1, &pass(1000, 0, 1000), Duration::from_secs(3)), [2000]);
        assert_eq!(
            pauses(1, &pass(1000, 0, 1000), Duration::from_secs(3)),
            [3000],
            "no longer than a pass should take"
        );
        assert_eq!(pauses(1, &pass(0, 1, 0), HOUR), [0]);
    }
}
