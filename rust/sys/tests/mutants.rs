//! Each mutant of the protocol must fail in the model; one that survives fails the build.
#![cfg(feature = "mutants")]

mod kernel_model;

use kernel_model::*;
use ksmrs_sys::mutant::{self, Mutant};
use ksmrs_sys::protocol::Kind;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One after another: the choice is global to the process.
#[test]
fn no_mutant_survives_the_model() {
    let scenarios: [(&str, fn()); 8] = [
        ("slow handler", || explore(4, || slow_handler(Kind::Shared))),
        ("shared writers", || explore(2, || merge_and_two_writers(Kind::Shared))),
        ("private writers", || {
            explore(2, || merge_and_two_writers(Kind::Private))
        }),
        ("shared reader", || explore(3, || merge_and_reader(Kind::Shared))),
        ("stale evidence", || explore(4, stale_evidence)),
        ("witnessed writers", || explore(2, witnessed_merge_and_two_writers)),
        ("homecoming", || explore(4, homecoming)),
        ("bridging break", || explore(2, bridging_break)),
    ];
    // What the kernel knows of writes is no part of the model (`real_mutants.rs` has that one), nor is the broker (a scene has that one).
    let modelled = |mutant: &(_, Mutant)| !matches!(mutant.1, Mutant::ArmAfterRead | Mutant::LeavingCovers);
    for (name, _) in Mutant::ALL.into_iter().filter(modelled) {
        assert!(mutant::choose(Some(name)));
        let killer = scenarios
            .iter()
            .find(|(_, run)| catch_unwind(AssertUnwindSafe(run)).is_err());
        assert!(mutant::choose(None));
        match killer {
            #[allow(clippy::print_stderr, reason = "which scenario caught it is worth knowing")]
            Some((scenario, _)) => eprintln!("mutant {name}: killed by {scenario}"),
            None => panic!("mutant {name} survives the model"),
        }
    }
}
