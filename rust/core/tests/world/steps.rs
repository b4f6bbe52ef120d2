//! Random histories of a [`World`], and what must hold after them.

use crate::world::{CONTENTS, Content, World};
use ksmrs_core::{Checksum, Kind, Next};
use proptest::prelude::*;
use std::time::Duration;

#[derive(Clone, Debug)]
pub enum Step {
    JoinClient,
    JoinRegion {
        client: usize,
        shared: bool,
        pages: u32,
        position: u16,
        content: Content,
    },
    LeaveRegion {
        client: usize,
        region: usize,
    },
    Write {
        client: usize,
        page: usize,
        content: Content,
    },
    Hold {
        client: usize,
        page: usize,
        on: bool,
    },
    /// A page of a shared region has no room to break into.
    Detach {
        client: usize,
        page: usize,
    },
    BringHome {
        client: usize,
    },
    Pump,
    Work {
        client: usize,
        order: usize,
    },
    Report {
        client: usize,
        order: usize,
    },
    Settle,
    Fork {
        client: usize,
    },
    EndChild {
        client: usize,
    },
    Bear {
        client: usize,
        child: usize,
        content: Content,
    },
    Turn {
        client: usize,
    },
    Seal {
        client: usize,
    },
    Stop {
        client: usize,
        stopped: bool,
    },
    /// Another address space maps the client's shared regions, or does no more.
    Accompany {
        client: usize,
        accompanied: bool,
    },
    /// The kernel moves a page's memory to another node.
    Migrate {
        client: usize,
        page: usize,
        node: u8,
    },
    Die {
        client: usize,
    },
    Pass {
        millis: u64,
    },
    Set {
        knob: &'static str,
        value: u32,
    },
    Merge,
    /// Passes go by in which nobody does anything.
    Quiet,
}

pub fn step() -> impl Strategy<Value = Step> {
    let client = || 0..4usize;
    let page = || 0..64usize;
    prop_oneof![
        1 => Just(Step::JoinClient),
        2 => (client(), any::<bool>(), 1..24u32, 0..512u16, 0..CONTENTS)
            .prop_map(|(client, shared, pages, position, content)| Step::JoinRegion { client, shared, pages, position, content }),
        1 => (client(), 0..4usize).prop_map(|(client, region)| Step::LeaveRegion { client, region }),
        12 => (client(), page(), 0..CONTENTS).prop_map(|(client, page, content)| Step::Write { client, page, content }),
        2 => (client(), page(), any::<bool>()).prop_map(|(client, page, on)| Step::Hold { client, page, on }),
        3 => (client(), page()).prop_map(|(client, page)| Step::Detach { client, page }),
        1 => client().prop_map(|client| Step::BringHome { client }),
        12 => Just(Step::Pump),
        14 => (client(), 0..2usize).prop_map(|(client, order)| Step::Work { client, order }),
        14 => (client(), 0..2usize).prop_map(|(client, order)| Step::Report { client, order }),
        4 => Just(Step::Settle),
        3 => client().prop_map(|client| Step::Fork { client }),
        2 => client().prop_map(|client| Step::EndChild { client }),
        2 => (client(), page(), 0..CONTENTS).prop_map(|(client, child, content)| Step::Bear { client, child, content }),
        5 => client().prop_map(|client| Step::Turn { client }),
        5 => client().prop_map(|client| Step::Seal { client }),
        3 => (client(), any::<bool>()).prop_map(|(client, stopped)| Step::Stop { client, stopped }),
        2 => (client(), any::<bool>()).prop_map(|(client, accompanied)| Step::Accompany { client, accompanied }),
        3 => (client(), page(), prop_oneof![Just(0), Just(1), Just(1), Just(Checksum::NO_NODE)])
            .prop_map(|(client, page, node)| Step::Migrate { client, page, node }),
        1 => client().prop_map(|client| Step::Die { client }),
        6 => prop_oneof![Just(20), Just(20), Just(6000)].prop_map(|millis| Step::Pass { millis }),
        2 => prop_oneof![
            Just(("run", 0)), Just(("run", 1)), Just(("run", 1)), Just(("run", 1)), Just(("run", 2)),
            Just(("use_zero_pages", 0)), Just(("use_zero_pages", 1)), Just(("max_page_sharing", 3)),
            Just(("max_page_sharing", 256)), Just(("pages_to_scan", 7)), Just(("smart_scan", 0)),
            Just(("advisor_max_pages_to_scan", 7)),
            Just(("merge_across_nodes", 0)), Just(("merge_across_nodes", 0)), Just(("merge_across_nodes", 1)),
        ].prop_map(|(knob, value)| Step::Set { knob, value }),
        3 => Just(Step::Merge),
        3 => Just(Step::Quiet),
    ]
}

pub fn apply(world: &mut World, step: &Step) {
    let with = |world: &mut World, n: usize, act: &dyn Fn(&mut World, ksmrs_core::ClientId)| {
        if let Some(id) = world.client(n) {
            act(world, id);
        }
    };
    match *step {
        Step::JoinClient => drop(world.join_client(false)),
        Step::JoinRegion {
            client,
            shared,
            pages,
            position,
            content,
        } => {
            let kind = if shared { Kind::Shared } else { Kind::Private };
            let contents = move |i: u32| (i / 3 + content) % CONTENTS;
            with(world, client, &|world, id| {
                world.join_region(id, kind, pages, position, contents)
            });
        }
        Step::LeaveRegion { client, region } => with(world, client, &|world, id| world.leave_region(id, region)),
        Step::Write { client, page, content } => with(world, client, &|world, id| world.write(id, page, content)),
        Step::Hold { client, page, on } => with(world, client, &|world, id| world.hold(id, page, on)),
        Step::Detach { client, page } => with(world, client, &|world, id| world.detach(id, page)),
        Step::BringHome { client } => with(world, client, &World::bring_home),
        Step::Pump => drop(world.pump(3)),
        Step::Work { client, order } => with(world, client, &|world, id| world.work(id, order)),
        Step::Report { client, order } => with(world, client, &|world, id| world.report(id, order)),
        Step::Settle => world.settle(),
        Step::Fork { client } => with(world, client, &World::fork),
        Step::EndChild { client } => with(world, client, &World::end_child),
        Step::Bear { client, child, content } => with(world, client, &|world, id| world.bear(id, child, content)),
        Step::Turn { client } => with(world, client, &World::turn),
        Step::Seal { client } => with(world, client, &World::seal),
        Step::Stop { client, stopped } => with(world, client, &|world, id| world.stop(id, stopped)),
        Step::Accompany { client, accompanied } => {
            with(world, client, &|world, id| world.accompany(id, accompanied));
        }
        Step::Migrate { client, page, node } => with(world, client, &|world, id| world.migrate(id, page, node)),
        Step::Die { client } => with(world, client, &World::die),
        Step::Pass { millis } => world.now += Duration::from_millis(millis),
        Step::Set { knob, value } => {
            if knob == "pages_to_scan" {
                drop(world.core.set("advisor_mode", "none"));
            }
            let (before, frames) = (world.core.tunables().merge_across_nodes, world.frames_in_store());
            drop(world.core.set(knob, &value.to_string()));
            world.mixed |= before != world.core.tunables().merge_across_nodes && frames > 0;
        }
        Step::Merge => {
            let ticket = world.core.request_merge(world.now);
            world.tickets.push(ticket);
        }
        Step::Quiet => {
            for _ in 0..4 {
                world.settle();
                world.now += Duration::from_millis(20);
            }
        }
    }
}

/// Plays a history; `liars` clients answer at random. Panics where an invariant does not hold.
pub fn play(steps: &[Step], seed: u64, liars: bool) {
    let mut world = World::new(seed);
    // Half of the histories begin with it, for later something is merged most of the time.
    world
        .core
        .set("merge_across_nodes", if seed.is_multiple_of(2) { "0" } else { "1" })
        .expect("a valid knob");
    for n in 0..3 {
        let id = world.join_client(liars && n == 2);
        let kind = if n == 1 { Kind::Shared } else { Kind::Private };
        world.join_region(id, kind, 12, 7 * n, move |i| (i + u32::from(n)) % CONTENTS);
    }
    for step in steps {
        apply(&mut world, step);
        world.check_reads();
    }
    if world.is_honest() {
        finish(&mut world);
    }
    // Whatever happened, nothing outlives the last client.
    world.everybody_dies();
    world.settle();
    assert_eq!(
        (
            world.core.stats().frames,
            world.frames_in_store(),
            world.core.slots_taken()
        ),
        (0, 0, 0)
    );
    assert_eq!(world.core.stats().references_in_limbo, 0);
    world.now += Duration::from_secs(10);
    assert_eq!(world.wait(), Next::Idle);
}

fn finish(world: &mut World) {
    world.wake_everybody();
    for (knob, value) in [("run", "1"), ("use_zero_pages", "1")] {
        world.core.set(knob, value).expect("a valid knob");
    }
    world.settle();
    world.seal_everything();
    // A merge may lose to a store that could not be written, so a few are tried.
    for _ in 0..12 {
        world.merge();
    }
    world.seal_everything();
    world.settle();
    for ticket in std::mem::take(&mut world.tickets) {
        assert!(
            world.core.merge_finished(ticket).is_some(),
            "a merge on request was forgotten"
        );
    }
    world.check_reads();
    world.check_counts();
    world.check_merged();
    world.core.set("run", "2").expect("a valid knob");
    for _ in 0..100 {
        world.settle();
        world.now += Duration::from_millis(100);
    }
    world.seal_everything();
    world.settle();
    world.check_reads();
    world.check_counts();
    let stats = world.core.stats();
    let held = world.frames_held() as u64;
    assert_eq!(
        (stats.pages_shared, stats.ksm_zero_pages, stats.frames),
        (0, 0, held),
        "{stats:?}"
    );
}
