//! Single scenes at full size: what merges must look like, what they cost, how knobs and counters behave.

mod world;

use ksmrs_core::{ClientId, Decision, Kind, Next, Observation, RunFailure, RunOutcome, Seen, WINDOW};
use std::time::Duration;
use world::{World, checksum_of};

const WINDOWS: u32 = 16;
const PAGES: u32 = WINDOWS * WINDOW;

/// A healthy world of clients with one private region each; contents above the dictionary's special ones.
fn clients(count: u32, pages: u32, content: impl Fn(u32, u32) -> u32) -> (World, Vec<ClientId>) {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    let mut ids = Vec::new();
    for n in 0..count {
        let id = world.join_client(false);
        world.join_region(id, Kind::Private, pages, 0, |i| content(n, i));
        ids.push(id);
    }
    (world, ids)
}

#[test]
fn equal_regions_merge_as_whole_windows_over_whole_extents() {
    let (mut world, _) = clients(2, PAGES, |_, i| 10 + i);
    let report = world.merge();
    assert_eq!((report.merged, report.rounds), (u64::from(2 * PAGES), 2));
    let stats = world.core.stats();
    assert_eq!(
        (stats.pages_shared, stats.pages_sharing),
        (u64::from(PAGES), u64::from(PAGES))
    );
    assert_eq!(
        (stats.frames, stats.frames_huge),
        (u64::from(PAGES), u64::from(WINDOWS))
    );
    assert_eq!(world.runs.len() as u32, 2 * WINDOWS);
    assert!(
        world
            .runs
            .iter()
            .all(|run| u32::from(run.pages) == WINDOW && run.slot.0 % WINDOW == 0)
    );
    world.check_counts();
    world.check_reads();
}

#[test]
fn a_background_merge_takes_two_passes() {
    let (mut world, _) = clients(2, WINDOW, |_, i| 10 + i);
    for passes in 0..3 {
        while world.core.stats().full_scans == passes {
            world.settle();
            world.now += Duration::from_millis(20);
        }
        let stats = world.core.stats();
        match passes {
            0 => assert_eq!((stats.merges, stats.pages_volatile), (0, u64::from(2 * WINDOW))),
            _ => assert_eq!(stats.pages_sharing, u64::from(WINDOW)),
        }
    }
    assert_eq!(world.core.stats().pages_volatile, 0);
}

#[test]
fn pages_that_sat_out_are_candidates_again_when_they_are_looked_at() {
    let (mut world, _) = clients(1, WINDOW, |_, i| 10 + i);
    let (mut scanned, mut looks) = (0, String::new());
    for passes in 0..24 {
        while world.core.stats().full_scans == passes {
            world.settle();
            world.now += Duration::from_millis(20);
        }
        let stats = world.core.stats();
        let looked_at = stats.pages_scanned - scanned;
        scanned = stats.pages_scanned;
        assert!(looked_at == 0 || looked_at == u64::from(WINDOW));
        let unshared = if passes == 0 { 0 } else { looked_at };
        assert_eq!(stats.pages_unshared, unshared, "pass {passes} looked at {looked_at}");
        looks.push(if looked_at == 0 { '.' } else { 'x' });
    }
    assert!(looks.contains("x.x..x....x"), "{looks}");
    // Whoever comes now finds them.
    let other = world.join_client(false);
    world.join_region(other, Kind::Private, WINDOW, 0, |i| 10 + i);
    let passes = world.core.stats().full_scans;
    while world.core.stats().pages_sharing < u64::from(WINDOW) {
        assert!(world.core.stats().full_scans < passes + 12, "{:?}", world.core.stats());
        world.settle();
        world.now += Duration::from_millis(20);
    }
    world.check_counts();
    world.check_reads();
}

#[test]
fn pages_that_are_opted_in_again_are_looked_at_as_new_ones() {
    let (mut world, ids) = clients(2, WINDOW, |_, i| 10 + i);
    for id in &ids {
        (0..WINDOW).for_each(|page| world.hold(*id, page as usize, true));
    }
    let passes = |world: &mut World, count: u64| {
        let end = world.core.stats().full_scans + count;
        while world.core.stats().full_scans < end {
            world.settle();
            world.now += Duration::from_millis(20);
        }
    };
    // Smart scan looks at them once in nine passes by now.
    passes(&mut world, 40);
    for id in &ids {
        for page in 0..WINDOW {
            world.hold(*id, page as usize, false);
            world.write(*id, page as usize, 5000 + page);
        }
    }
    // Nine until they are seen, and the two of any page.
    passes(&mut world, 11);
    assert_eq!(world.core.stats().pages_sharing, u64::from(WINDOW));
}

#[test]
fn batches_keep_the_pace_that_the_knobs_set() {
    let (mut world, _) = clients(2, PAGES, |n, i| 10 + i + n * PAGES);
    world.core.set("advisor_mode", "none").unwrap();
    world.core.set("pages_to_scan", "2048").unwrap();
    world.core.set("sleep_millisecs", "50").unwrap();
    world.settle();
    assert_eq!(world.core.stats().pages_scanned, 2048);
    assert_eq!(world.wait(), Next::WaitUntil(Duration::from_millis(50)));
    world.now = Duration::from_millis(50);
    world.settle();
    assert_eq!(world.core.stats().pages_scanned, 4096);
    world.core.set("run", "0").unwrap();
    world.now = Duration::from_secs(9);
    assert_eq!(world.wait(), Next::Idle);
}

/// Passes in the background until so many are over: what each batch looked at.
fn batches_of(world: &mut World, passes: u64, cpu: Duration) -> Vec<u64> {
    let mut batches = Vec::new();
    while world.core.stats().full_scans < passes {
        let before = world.core.stats().pages_scanned;
        world.settle();
        batches.push(world.core.stats().pages_scanned - before);
        world.core.spent(cpu);
        world.now += Duration::from_millis(20);
    }
    batches
}

#[test]
fn the_advisor_looks_at_whole_windows_and_keeps_the_average() {
    let (mut world, _) = clients(2, PAGES, |n, i| 10 + i + n * PAGES);
    let batches = batches_of(&mut world, 1, Duration::from_millis(10));
    assert!(
        batches.iter().all(|pages| pages % u64::from(WINDOW) == 0),
        "{batches:?}"
    );
    // 32 windows at 500 pages for each 20 ms.
    assert_eq!(batches.iter().sum::<u64>(), u64::from(2 * PAGES));
    assert_eq!(batches.len(), 33, "{batches:?}");
    assert_eq!(batches.iter().filter(|&&pages| pages == 0).count(), 1);
}

#[test]
fn the_advisor_spends_between_ten_and_seventy_percent() {
    let (mut world, _) = clients(2, PAGES, |n, i| 10 + i + n * PAGES);
    let pages_to_scan = |world: &World| world.core.tunables().pages_to_scan;
    assert_eq!(pages_to_scan(&world), 500);
    // Half the time is spent at work: 10 pages per percent, and the target of 200 s wants less than the floor of 10 %.
    batches_of(&mut world, 1, Duration::from_millis(10));
    assert!(
        (100..=110).contains(&pages_to_scan(&world)),
        "{}",
        pages_to_scan(&world)
    );
    // Hardly any work: ten times as much, then the bound.
    for passes in 2..6 {
        batches_of(&mut world, passes, Duration::ZERO);
    }
    assert_eq!(pages_to_scan(&world), 30_000);
    world.core.set("advisor_mode", "none").unwrap();
    assert_eq!(pages_to_scan(&world), 1024);
    batches_of(&mut world, 8, Duration::ZERO);
    assert_eq!(pages_to_scan(&world), 1024, "nobody advises");
    world.core.set("advisor_mode", "scan-time").unwrap();
    assert_eq!(pages_to_scan(&world), 500);
}

#[test]
fn a_merge_on_request_asks_no_advisor() {
    let report = |min: &str| {
        let (mut world, _) = clients(2, PAGES, |_, i| 10 + i);
        world.core.set("advisor_mode", "none").unwrap();
        world.core.set("advisor_min_pages_to_scan", min).unwrap();
        world.core.set("advisor_mode", "scan-time").unwrap();
        let before = world.now;
        let report = world.merge();
        assert_eq!(world.now, before, "no pause");
        assert_eq!(
            world.core.get("pages_to_scan").unwrap(),
            min,
            "its rounds say nothing about passes"
        );
        report
    };
    assert_eq!(report("1"), report("30000"));
}

#[test]
fn max_page_sharing_makes_chains() {
    let (mut world, _) = clients(1, 400, |_, _| 10);
    world.core.set("max_page_sharing", "100").unwrap();
    world.merge();
    let stats = world.core.stats();
    assert_eq!((stats.pages_shared, stats.pages_sharing), (4, 396));
    assert_eq!((stats.stable_node_chains, stats.stable_node_dups), (1, 4));
    assert!(world.core.set("max_page_sharing", "200").is_err());
    world.check_counts();
}

#[test]
fn a_chain_loses_a_frame_with_the_last_page_that_shows_it() {
    let (mut world, _) = clients(1, 400, |_, _| 10);
    world.core.set("max_page_sharing", "100").unwrap();
    world
        .core
        .set("stable_node_chains_prune_millisecs", "4294967295")
        .unwrap();
    world.merge();
    assert_eq!(world.core.stats().stable_node_dups, 4);
    world.core.set("run", "2").unwrap();
    world.settle();
    let stats = world.core.stats();
    assert_eq!(
        (stats.pages_shared, stats.stable_node_chains, stats.stable_node_dups),
        (0, 0, 0),
        "no time has passed"
    );
    assert_eq!(stats.frames, 4, "a child could still show them");
    world.seal_everything();
    assert_eq!(world.core.stats().frames, 0);
}

#[test]
fn pages_on_their_way_to_a_frame_are_not_unmerged_yet() {
    let (mut world, ids) = clients(1, 4, |_, _| 10);
    world.core.request_merge(world.now);
    while world.runs.is_empty() {
        if !world.pump(1) {
            world.work(ids[0], 0);
            world.report(ids[0], 0);
        }
    }
    world.core.set("run", "2").unwrap();
    let left = |world: &World| {
        let stats = world.core.stats();
        (stats.pages_shared, stats.pages_proposed)
    };
    assert_eq!(left(&world), (0, 4), "a client maps them now");
    world.work(ids[0], 0);
    world.report(ids[0], 0);
    assert_eq!(left(&world), (1, 0));
    world.settle();
    assert_eq!(left(&world), (0, 0));
    world.check_counts();
}

#[test]
fn a_vma_budget_is_spent_on_the_longest_runs() {
    // Two long stretches, and pages that equal each other only one by one.
    let content = |n: u32, i: u32| {
        if i % 128 < 100 {
            10 + i
        } else {
            10_000 + if n == 0 { i } else { i / 128 * 128 + 227 - i % 128 }
        }
    };
    let (mut world, ids) = clients(2, 512, content);
    for &id in &ids {
        world.core.set_budget(id, 9);
    }
    world.merge();
    let stats = world.core.stats();
    assert!(stats.pages_unmerged_by_budget > 0);
    assert!(stats.pages_sharing >= 400, "{stats:?}");
    world.check_counts();
    world.check_reads();
}

#[test]
fn a_silent_client_holds_nobody_up() {
    let (mut world, ids) = clients(3, WINDOW, |_, i| 10 + i);
    // Only the merge on request is to merge here.
    world.core.set("run", "0").unwrap();
    // The second client is asked to stage its pages, and sleeps.
    let ticket = world.core.request_merge(world.now);
    world.pump(1);
    while world.core.client_stats(ids[1]).ksm_rmap_items == 0 {
        for &id in &ids[..2] {
            world.work(id, 0);
            world.report(id, 0);
            world.pump(1);
        }
    }
    world.stop(ids[1], true);
    world.settle();
    world.now += Duration::from_secs(6);
    world.settle();
    assert_eq!(world.core.stats().clients_unplanned, 1);
    assert!(world.core.merge_finished(ticket).is_some());
    assert_eq!(world.core.stats().pages_sharing, u64::from(WINDOW));
    world.stop(ids[1], false);
    world.merge();
    assert_eq!(world.core.stats().pages_sharing, 2 * u64::from(WINDOW));
    world.check_counts();
    world.check_reads();
}

#[test]
fn a_client_at_its_mapping_limit_is_left_alone_until_the_next_pass() {
    let (mut world, ids) = clients(2, 64, |_, i| 10 + i);
    world.core.request_merge(world.now);
    let mut maps = 0;
    for _ in 0..1000 {
        match world.core.next(world.now) {
            Next::Do(Decision::Scan { order, ranges, .. }) => {
                let pages = ranges.iter().flat_map(|range| range.iter());
                let seen = |page: ksmrs_core::PageNumber| Observation {
                    seen: Seen::Own,
                    checksum: Some((checksum_of(10 + page.0 % 64), false)),
                };
                let seen: Vec<_> = pages.map(seen).collect();
                world.core.scanned(order, &(Default::default(), &seen[..]), world.now);
            }
            Next::Do(Decision::Stage { order, pages, .. }) => {
                world.core.staged(order, &|_| true);
                let sums: Vec<_> = pages.iter().map(|page| Some(checksum_of(10 + page.0 % 64))).collect();
                world.core.filled(order, &sums);
            }
            Next::Do(Decision::Map { order, runs, .. }) => {
                maps += 1;
                let failed = RunOutcome {
                    failure: Some(RunFailure::MappingLimit),
                    ..RunOutcome::default()
                };
                world.core.mapped(order, Default::default(), &vec![failed; runs.len()]);
            }
            Next::Do(_) => {}
            Next::WaitUntil(_) | Next::Idle => break,
        }
    }
    assert_eq!(maps, ids.len());
    assert_eq!(world.core.stats().pages_shared, 0);
}

#[test]
fn what_is_refused_while_a_stranger_has_the_memory_piles_nothing_up() {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    let id = world.join_client(false);
    world.join_region(id, Kind::Shared, WINDOW, 0, |i| 10 + i / 2);
    world.core.set("smart_scan", "0").unwrap();
    // Passes of the same length, also while nothing happens.
    world.core.set("advisor_mode", "none").unwrap();
    world.accompany(id, true);
    let passes = 1000;
    while world.core.stats().full_scans < passes {
        world.settle();
        world.now += Duration::from_millis(20);
        let stats = world.core.stats();
        assert_eq!((stats.pages_shared, stats.frames, stats.references_in_limbo), (0, 0, 0));
    }
    // Asked after 0, 0.25, 0.75 ... seconds: 20 s of passes are seven tries, each with two runs for a pair of pages at most.
    assert!(
        (1..=7 * WINDOW as usize).contains(&world.runs.len()),
        "{} runs",
        world.runs.len()
    );
    assert_eq!(world.core.stats().pages_unshared, u64::from(WINDOW), "they rest");
    assert_eq!(world.merge().merged, 0, "on request it is tried, and refused");
    assert_eq!(
        (world.core.stats().frames, world.core.stats().references_in_limbo),
        (0, 0)
    );
    world.accompany(id, false);
    world.now += Duration::from_secs(16);
    for _ in 0..3 {
        world.settle();
        world.now += Duration::from_millis(20);
    }
    assert_eq!(
        world.core.stats().pages_sharing,
        u64::from(WINDOW / 2),
        "nobody else has it any more"
    );
    world.check_counts();
    world.check_reads();
}

#[test]
fn a_candidate_of_a_region_that_rests_meets_nobody() {
    let (mut world, _) = clients(0, 0, |_, _| 0);
    for (knob, value) in [
        ("smart_scan", "0"),
        ("advisor_mode", "none"),
        ("pages_to_scan", "100000"),
    ] {
        world.core.set(knob, value).unwrap();
    }
    // Two equal pages, for which the region comes to rest; all others are candidates.
    let id = world.join_client(false);
    world.join_region(id, Kind::Shared, WINDOW, 0, |i| 10 + i.max(1));
    world.accompany(id, true);
    let pass = |world: &mut World| {
        world.settle();
        world.now += Duration::from_millis(20);
    };
    while world.runs.is_empty() {
        pass(&mut world);
    }
    let (begun, proposed) = (world.now, world.runs.len());
    let other = world.join_client(false);
    world.join_region(other, Kind::Private, WINDOW / 2, 0, |i| 10 + WINDOW / 2 + i);
    let passes = world.core.full_scans() + 5;
    while world.core.full_scans() < passes {
        pass(&mut world);
    }
    assert!(world.now < begun + Duration::from_millis(200), "it rests still");
    assert_eq!((world.runs.len(), world.frames_in_store()), (proposed, 0));
    assert_eq!(world.core.stats().pages_unshared, u64::from(WINDOW + WINDOW / 2));
}

#[test]
fn a_region_whose_merges_do_not_last_is_left_alone_and_others_are_not() {
    let half = 4 * WINDOW;
    let (mut world, ids) = clients(2, 2 * half, |_, i| 10 + i);
    world.disk_trouble = false;
    for (knob, value) in [
        ("smart_scan", "0"),
        ("advisor_mode", "none"),
        ("pages_to_scan", "100000"),
    ] {
        world.core.set(knob, value).unwrap();
    }
    // Half of it is written whenever it merged: the same anew, so that it merges again.
    let mut contents = 100_000;
    let mut merges_at = Vec::new();
    for second in 0..30 {
        for _ in 0..50 {
            world.settle();
            world.now += Duration::from_millis(20);
            if world.core.stats().pages_sharing >= u64::from(2 * half) - 8 {
                contents += half;
                for (id, page) in ids.iter().flat_map(|&id| (0..half).map(move |page| (id, page))) {
                    world.write(id, page as usize, contents + page);
                }
            }
        }
        merges_at.push((second, world.core.stats().merges));
    }
    let stats = world.core.stats();
    assert!(
        (10..=14).contains(&stats.regions_rested),
        "{} rests",
        stats.regions_rested
    );
    assert!(
        stats.pages_sharing >= u64::from(half),
        "the other half stays merged: {stats:?}"
    );
    let (early, late) = (merges_at[4].1, merges_at[29].1 - merges_at[4].1);
    assert!(late < early, "{merges_at:?}");
    // Nobody writes any more: all merges, at once on request, in the background once it rested.
    world.now += Duration::from_secs(16);
    for _ in 0..5 {
        world.settle();
        world.now += Duration::from_millis(20);
    }
    assert_eq!(world.core.stats().pages_sharing, u64::from(2 * half));
    world.check_counts();
    world.check_reads();
}

#[test]
fn run_2_unmerges_everything_and_run_1_merges_again() {
    let (mut world, _) = clients(2, 2 * WINDOW, |_, i| 10 + i / 2);
    world.merge();
    world.core.set("run", "2").unwrap();
    world.settle();
    assert_eq!(world.core.stats().pages_shared, 0);
    assert_eq!(world.core.stats().full_scans, 0);
    assert_eq!(world.core.stats().cow_ksm, 0);
    world.seal_everything();
    world.settle();
    assert_eq!(world.frames_in_store(), 0);
    assert_eq!(world.core.stats().regions, 2);
    let ticket = world.core.request_merge(world.now);
    world.settle();
    assert_eq!(world.core.merge_finished(ticket).map(|report| report.merged), Some(0));
    world.core.set("run", "1").unwrap();
    world.merge();
    assert_eq!(world.core.stats().pages_shared, u64::from(WINDOW));
    world.check_counts();
}

#[test]
fn a_full_store_merges_what_fits() {
    let mut world = World::with_slots(1, 100);
    world.disk_trouble = false;
    for _ in 0..2 {
        let id = world.join_client(false);
        world.join_region(id, Kind::Private, 300, 5, |i| 10 + i);
    }
    world.merge();
    assert_eq!(world.core.stats().pages_sharing, 100);
    world.check_counts();
    world.check_reads();
}

#[test]
fn born_children_are_clients_of_their_own() {
    let (mut world, ids) = clients(2, WINDOW, |_, i| 10 + i);
    world.merge();
    let frames = world.frames_in_store();
    for _ in 0..3 {
        world.fork(ids[0]);
        world.bear(ids[0], 0, 10);
    }
    // One page of each child was written before it registered, back to what it was.
    assert_eq!(
        world.core.stats().pages_shared + world.core.stats().pages_sharing,
        u64::from(5 * WINDOW)
    );
    world.merge();
    world.check_counts();
    world.check_merged();
    assert_eq!(world.frames_in_store(), frames);
    // Whoever is left keeps the frames, and nobody else does.
    for &id in &ids {
        world.turn(id);
        world.die(id);
        world.seal(id);
    }
    world.settle();
    world.check_reads();
    assert_eq!((world.core.stats().clients, world.frames_in_store()), (3, frames));
    world.everybody_dies();
    world.settle();
    assert_eq!((world.frames_in_store(), world.core.slots_taken()), (0, 0));
}

/// A client whose pages are all on one node.
fn on_node(world: &mut World, pages: u32, node: u8) -> ClientId {
    let id = world.join_client(false);
    world.join_region(id, Kind::Private, pages, 0, |i| 10 + i);
    for page in 0..pages {
        world.migrate(id, page as usize, node);
    }
    id
}

fn counted(world: &World) -> (u64, u64, u64, u64) {
    world.check_counts();
    world.check_reads();
    let stats = world.core.stats();
    let shared = (stats.pages_shared, stats.pages_sharing);
    (shared.0, shared.1, stats.pages_unshared, stats.pages_volatile)
}

#[test]
fn pages_of_two_nodes_make_two_frames_unless_they_merge_across() {
    let half = u64::from(WINDOW);
    for (across, expected) in [("0", (2 * half, 2 * half, half, 0)), ("1", (half, 4 * half, 0, 0))] {
        let mut world = World::with_slots(1, 64 * WINDOW);
        world.disk_trouble = false;
        world.core.set("merge_across_nodes", across).unwrap();
        let ids = [0, 1, 0, 1, 2].map(|node| on_node(&mut world, WINDOW, node));
        world.merge();
        assert_eq!(counted(&world), expected, "merge_across_nodes={across}");
        for (id, node) in ids.into_iter().zip([0, 1, 0, 1]) {
            let expected = (across == "0").then_some(node);
            assert_eq!(world.nodes_shown(id), vec![expected; WINDOW as usize]);
        }
    }
}

#[test]
fn frames_of_neighbours_on_two_nodes_are_filled_on_two() {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    world.core.set("merge_across_nodes", "0").unwrap();
    let ids = [0, 0].map(|node| on_node(&mut world, 64, node));
    for id in ids {
        (0..64).for_each(|page| world.migrate(id, page, (page / 4 % 2) as u8));
    }
    world.merge();
    assert_eq!(counted(&world), (64, 64, 0, 0));
    let expected: Vec<_> = (0..64).map(|page| Some(page / 4 % 2)).collect();
    assert!(ids.into_iter().all(|id| world.nodes_shown(id) == expected));
}

#[test]
fn who_has_no_node_merges_with_nothing_but_zeros() {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    world.core.set("merge_across_nodes", "0").unwrap();
    for _ in 0..2 {
        let id = world.join_client(false);
        world.join_region(id, Kind::Private, 32, 0, |i| if i < 8 { 0 } else { 10 + i });
        (0..32).for_each(|page| world.migrate(id, page, ksmrs_core::Checksum::NO_NODE));
    }
    world.merge();
    assert_eq!(counted(&world), (0, 0, 48, 0));
    assert_eq!(world.core.stats().ksm_zero_pages, 16);
}

#[test]
fn a_page_that_the_kernel_moved_is_of_its_new_node() {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    world.core.set("merge_across_nodes", "0").unwrap();
    let ids = [0, 1].map(|node| on_node(&mut world, 32, node));
    world.merge();
    assert_eq!(counted(&world), (0, 0, 64, 0));
    (0..32).for_each(|page| world.migrate(ids[0], page, 1));
    world.merge();
    assert_eq!(counted(&world), (32, 32, 0, 0));
}

#[test]
fn nodes_begin_and_cease_to_count_while_nothing_is_merged() {
    let mut world = World::with_slots(1, 64 * WINDOW);
    world.disk_trouble = false;
    let ids = [0, 1].map(|node| on_node(&mut world, 32, node));
    world.merge();
    let refused = world.core.set("merge_across_nodes", "0").unwrap_err();
    assert!(
        matches!(refused, ksmrs_core::TunableError::Busy { pages_shared: 32, .. }),
        "{refused}"
    );
    assert_eq!(world.core.set("merge_across_nodes", "1"), Ok(()), "it is 1");
    for (across, expected) in [("0", (0, 0, 64, 0)), ("1", (32, 32, 0, 0)), ("0", (0, 0, 64, 0))] {
        world.core.set("run", "2").unwrap();
        while world.core.stats().pages_shared > 0 {
            world.settle();
            world.now += Duration::from_millis(20);
        }
        world.core.set("merge_across_nodes", across).unwrap();
        world.core.set("run", "1").unwrap();
        for (id, node) in ids.into_iter().zip([0, 1]) {
            (0..32).for_each(|page| world.migrate(id, page, node));
        }
        world.merge();
        assert_eq!(counted(&world), expected, "merge_across_nodes={across}");
    }
}

/// Plays until a decision of this kind comes, carries out all others, and returns with it open.
fn until(world: &mut World, client: ClientId, wanted: impl Fn(&World) -> bool) {
    for _ in 0..1000 {
        world.pump(1);
        if wanted(world) {
            return;
        }
        world.work(client, 0);
        world.report(client, 0);
    }
    panic!("it does not come: {:?}", world.core.stats());
}

#[test]
fn what_is_on_its_way_when_nodes_begin_to_count_merges_nothing_across() {
    // A scan whose answer is late; a page about to be staged; one about to be mapped, which is in the way.
    for stage in ["scan", "stage", "map"] {
        let mut world = World::with_slots(1, 64 * WINDOW);
        world.disk_trouble = false;
        let id = on_node(&mut world, 64, 0);
        for page in 0..32 {
            world.write(id, 32 + page, 10 + page as u32);
            world.migrate(id, 32 + page, 1);
        }
        world.core.request_merge(world.now);
        match stage {
            "scan" => {
                until(&mut world, id, |world| world.scans == 1);
                world.work(id, 0);
            }
            "stage" => until(&mut world, id, World::stages),
            _ => until(&mut world, id, |world| world.core.stats().pages_proposed > 0),
        }
        let set = world.core.set("merge_across_nodes", "0");
        if stage == "map" {
            assert!(matches!(
                set,
                Err(ksmrs_core::TunableError::Busy {
                    pages_shared: 0,
                    pages_proposed: 64,
                    ..
                })
            ));
            continue;
        }
        set.unwrap();
        for _ in 0..4 {
            world.merge();
        }
        assert_eq!(counted(&world), (0, 0, 64, 0), "{stage}");
        assert_eq!(world.frames_in_store(), 0, "{stage}");
    }
}
