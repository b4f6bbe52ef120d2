//! Migration: frames move where that joins runs, all who show them follow, and nothing moves where somebody would lose by it.

mod world;

use ksmrs_core::{ClientId, Kind, Stats, WINDOW};
use std::time::Duration;
use world::World;

const PAGES: u32 = 256;

/// Contents in an order that leaves no two neighbours together.
fn scattered(i: u32) -> u32 {
    10 + i * 37 % PAGES
}

fn straight(i: u32) -> u32 {
    10 + i
}

/// A healthy world; frames are founded by two clients whose pages are scattered.
fn founded() -> (World, Vec<ClientId>) {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    let ids = (0..2).map(|_| join(&mut world, scattered)).collect();
    world.merge();
    (world, ids)
}

fn join(world: &mut World, content: fn(u32) -> u32) -> ClientId {
    let id = world.join_client(false);
    world.join_region(id, Kind::Private, PAGES, 0, content);
    id
}

/// The founders' frames are shown by these as well, and then by nobody else.
fn inherit(world: &mut World, founders: Vec<ClientId>, heirs: u32) -> Vec<ClientId> {
    let heirs = (0..heirs).map(|_| join(world, straight)).collect();
    world.merge();
    for id in founders {
        world.die(id);
        world.seal(id);
    }
    heirs
}

fn rifts(world: &World, ids: &[ClientId]) -> Vec<u32> {
    ids.iter().map(|&id| world.rifts(id)).collect()
}

/// Whole passes go by, and what was given up is released.
fn passes(world: &mut World, count: u64) -> Stats {
    let until = world.core.stats().full_scans + count;
    while world.core.stats().full_scans < until {
        world.settle();
        world.now += Duration::from_millis(20);
    }
    world.seal_everything();
    world.settle();
    world.check_reads();
    world.check_counts();
    world.core.stats()
}

#[test]
fn frames_follow_the_order_of_those_who_are_left() {
    let (mut world, founders) = founded();
    let heirs = inherit(&mut world, founders, 2);
    assert_eq!(rifts(&world, &heirs), [PAGES - 1; 2]);
    let stats = passes(&mut world, 4);
    assert_eq!(rifts(&world, &heirs), [0; 2]);
    assert_eq!((stats.pages_shared, stats.pages_sharing), (PAGES.into(), PAGES.into()));
    assert_eq!(
        (stats.frames, stats.pages_migrated),
        (PAGES.into(), u64::from(2 * PAGES))
    );
    assert_eq!(world.core.slots_taken(), PAGES, "the old slots are free again");
    let moves = world.moves;
    assert_eq!(passes(&mut world, 40).pages_migrated, stats.pages_migrated);
    assert_eq!(world.moves, moves, "it is over");
}

#[test]
fn nothing_moves_where_somebody_would_lose_by_it() {
    let (mut world, founders) = founded();
    let heir = join(&mut world, straight);
    world.merge();
    passes(&mut world, 6);
    assert_eq!((world.moves, world.rifts(heir)), (0, PAGES - 1));
    assert_eq!(rifts(&world, &founders), [0; 2]);
}

#[test]
fn nothing_moves_where_the_knob_says_so() {
    let (mut world, founders) = founded();
    world.core.set("join_runs", "0").unwrap();
    let heirs = inherit(&mut world, founders, 2);
    passes(&mut world, 6);
    assert_eq!((world.moves, world.rifts(heirs[0])), (0, PAGES - 1));
    world.core.set("join_runs", "1").unwrap();
    passes(&mut world, 4);
    assert_eq!(world.rifts(heirs[0]), 0);
}

#[test]
fn a_page_that_was_written_and_merged_again_goes_back_between_its_neighbours() {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    let ids = [join(&mut world, straight), join(&mut world, straight)];
    world.merge();
    for id in ids {
        world.write(id, 100, 7);
    }
    world.merge();
    assert_eq!(rifts(&world, &ids), [2; 2], "its old slot was not free");
    world.seal_everything();
    let stats = passes(&mut world, 4);
    assert_eq!((world.moves, stats.pages_migrated), (1, 2));
    assert_eq!(rifts(&world, &ids), [0; 2]);
}

#[test]
fn a_client_that_could_not_follow_does_so_when_it_is_seen_again() {
    let (mut world, founders) = founded();
    let heirs = inherit(&mut world, founders, 2);
    // Two passes to find what is to move; then one of them stands still while it is to follow.
    while world.moves == 0 {
        world.pump(1);
        for &id in &heirs {
            world.work(id, 0);
            world.report(id, 0);
        }
        world.now += Duration::from_millis(20);
    }
    world.stop(heirs[0], true);
    for _ in 0..20 {
        world.settle();
        world.now += Duration::from_secs(1);
    }
    world.check_reads();
    assert_eq!((world.rifts(heirs[0]), world.rifts(heirs[1])), (PAGES - 1, 0));
    assert!(world.core.stats().frames > u64::from(PAGES), "what it shows is kept");
    world.stop(heirs[0], false);
    let stats = passes(&mut world, 4);
    assert_eq!((stats.frames, world.rifts(heirs[0])), (PAGES.into(), 0));
}

#[test]
fn what_too_many_show_moves_in_parts_and_comes_together() {
    let (mut world, founders) = founded();
    // A step weighs and moves 2^15 pages at most; these show the frames more often.
    let heirs = inherit(&mut world, founders, 150);
    let stats = passes(&mut world, 20);
    assert_eq!((world.moves, world.rifts(heirs[0])), (PAGES as usize, 0));
    assert_eq!(
        (stats.frames, stats.pages_migrated),
        (PAGES.into(), u64::from(150 * PAGES))
    );
}

#[test]
fn moved_frames_stay_on_their_nodes() {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    world.core.set("merge_across_nodes", "0").unwrap();
    let on_nodes = |world: &mut World, content: fn(u32) -> u32| {
        let id = join(world, content);
        for page in 0..PAGES {
            world.migrate(id, page as usize, u8::from(content(page) % 64 < 32));
        }
        id
    };
    let founders = (0..2).map(|_| on_nodes(&mut world, scattered)).collect::<Vec<_>>();
    world.merge();
    let heirs: Vec<ClientId> = (0..2).map(|_| on_nodes(&mut world, straight)).collect();
    world.merge();
    for id in founders {
        world.die(id);
        world.seal(id);
    }
    assert!(rifts(&world, &heirs).iter().all(|&rifts| rifts > PAGES / 2));
    let expected: Vec<Option<u8>> = (0..PAGES)
        .map(|page| Some(u8::from(straight(page) % 64 < 32)))
        .collect();
    let stats = passes(&mut world, 8);
    assert_eq!(rifts(&world, &heirs), [0, 0]);
    assert!(world.moves > 0 && stats.pages_sharing == u64::from(PAGES), "{stats:?}");
    for id in heirs {
        assert_eq!(world.nodes_shown(id), expected);
    }
}
