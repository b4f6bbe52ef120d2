//! A region that leaves while an order for it is open.

mod world;

use ksmrs_core::{ClientId, Kind};
use std::time::Duration;
use world::World;

/// The client mapped the frames, forked, and closed the region before its answer was read: its child shows them.
#[test]
fn what_a_child_shows_of_a_region_that_left_within_the_order_stays() {
    let mut world = World::new(1);
    world.disk_trouble = false;
    let (mine, other) = (world.join_client(false), world.join_client(false));
    for id in [mine, other] {
        world.join_region(id, Kind::Private, 4, 0, |page| page + 1);
    }
    world.core.request_merge(world.now);
    while world.runs.len() < 2 {
        world.pump(1000);
        for id in [mine, other] {
            answer(&mut world, id);
        }
    }
    world.work(mine, 0);
    world.fork(mine);
    world.leave_region(mine, 0);
    world.report(mine, 0);
    world.settle();
    world.die(other);
    world.seal(other);
    let seal = |world: &mut World| {
        world.turn(mine);
        world.seal(mine);
        world.settle();
        world.now += Duration::from_secs(1);
        world.settle();
    };
    seal(&mut world);
    world.check_reads();
    assert_eq!(world.frames_in_store(), 4, "the child shows them");
    world.end_child(mine);
    seal(&mut world);
    assert_eq!(world.frames_in_store(), 0);
}

/// Carries out and reports whatever comes before the runs are proposed.
fn answer(world: &mut World, id: ClientId) {
    if world.runs.is_empty() {
        world.work(id, 0);
        world.report(id, 0);
    }
}
