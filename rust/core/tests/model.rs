//! Core against a naive model: random histories of clients that write, fork, stop, leave, lie and die.

#[path = "world/steps.rs"]
mod steps;
#[path = "world/mod.rs"]
mod world;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nobody_ever_reads_a_wrong_page(steps in prop::collection::vec(steps::step(), 1..250), seed: u64) {
        steps::play(&steps, seed, false);
    }

    #[test]
    fn a_lying_client_hurts_nobody_else(steps in prop::collection::vec(steps::step(), 1..150), seed: u64) {
        steps::play(&steps, seed, true);
    }
}
