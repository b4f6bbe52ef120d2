//! How many mappings this process may still spend on merging: the kernel allows it a number, and the program needs the rest.
//!
//! Counting reads all of /proc/self/maps, so it is done when what was counted last may be used up, and now and then, for the
//! program maps too. Relies on being told of every Map that is carried out. The order that reaches the line is still carried out: what is
//! kept for the program, a quarter of the limit, has room for it.

use crate::wire::Run;
use ksmrs_sys::sysctl;

/// Map orders between two counts at most: the program's own mappings grow unseen meanwhile.
const ORDERS: u32 = 128;

/// What may still be spent, as of the last count.
#[derive(Default)]
pub(super) struct Mappings {
    left: usize,
    orders: u32,
}

impl Mappings {
    /// Whether merging may take any more, after a look where these runs may use up what the last look left.
    pub(super) fn have_room_for(&mut self, runs: &[Run]) -> bool {
        // At worst every other page of a run changed, and each page that did not is a mapping between two others.
        let worst = runs.iter().map(|run| usize::from(run.pages) + 1).sum();
        if self.orders == 0 || self.left < worst {
            self.orders = ORDERS;
            self.left = mergeable(sysctl::max_map_count()).saturating_sub(count());
        }
        self.orders -= 1;
        self.left > 0
    }

    /// Stretches of pages were mapped: each adds one mapping, and one more where it cuts another in two.
    pub(super) fn spend(&mut self, stretches: usize) {
        self.left = self.left.saturating_sub(2 * stretches);
    }
}

/// The mappings at which merging stops.
fn mergeable(limit: usize) -> usize {
    limit / 4 * 3
}

fn count() -> usize {
    let maps = std::fs::read("/proc/thread-self/maps").unwrap_or_default();
    maps.iter().filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pages: u16) -> Run {
        Run {
            first_word: 0,
            pages,
            slot: 0,
        }
    }

    #[test]
    fn is_counted_when_what_was_counted_may_be_used_up() {
        let mut mappings = Mappings::default();
        assert!(mappings.have_room_for(&[run(512)]));
        let counted = mappings.left;
        assert!(counted > 0 && counted < mergeable(sysctl::max_map_count()));
        mappings.spend(100);
        assert!(mappings.have_room_for(&[run(512)]));
        assert_eq!(mappings.left, counted - 200, "not counted again");
        mappings.spend(counted);
        assert!(mappings.have_room_for(&[run(512)]));
        assert!(mappings.left > counted / 2, "counted again");
        for _ in 0..ORDERS {
            mappings.left = usize::MAX;
            mappings.have_room_for(&[]);
        }
        assert_ne!(mappings.left, usize::MAX, "counted in its turn");
    }
}
