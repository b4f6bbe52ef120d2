//! The model must fail with each deliberate error; needs the feature `mutants`. One test, for the choice is global.
#![cfg(feature = "mutants")]

#[path = "world/steps.rs"]
mod steps;
mod world;

use ksmrs_core::mutant::{self, Mutant};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Whether some random history ends with a frame lost under somebody: other failures (miscounts) would not be enough.
fn is_caught() -> bool {
    let config = Config {
        cases: 2000,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    };
    let histories = (prop::collection::vec(steps::step(), 1..250), any::<u64>());
    let played = TestRunner::new(config).run(&histories, |(steps, seed)| {
        let play = || steps::play(&steps, seed, false);
        let Err(panic) = catch_unwind(AssertUnwindSafe(play)) else {
            return Ok(());
        };
        let message = panic.downcast_ref::<String>().map_or("", String::as_str);
        let about_frames = ["is punched while", "is filled under", "is filled while"];
        let is_about_frames = about_frames.iter().any(|part| message.contains(part));
        if is_about_frames {
            Err(TestCaseError::fail(message.to_owned()))
        } else {
            Ok(())
        }
    });
    played.is_err()
}

#[test]
fn every_mutant_is_caught_by_the_model() {
    // The panics of thousands of histories are the point here, not news.
    std::panic::set_hook(Box::new(|_| ()));
    let survivors: Vec<&str> = Mutant::ALL
        .iter()
        .map(|&(name, _)| name)
        .filter(|name| {
            assert!(mutant::choose(name), "{name} cannot be chosen");
            !is_caught()
        })
        .collect();
    assert!(mutant::choose("") && !mutant::choose("no such mutant"));
    drop(std::panic::take_hook());
    assert!(survivors.is_empty(), "survived: {survivors:?}");
}
