//! When frames are let go: not while a forked child may show them, and not never.

mod fake;
mod regions;

use fake::{Broker, FakeClient};
use ksmrs_broker::client::{self, Kind, Region};
use ksmrs_broker::wire::{Question, ToBroker, ToClient};
use ksmrs_sys::life::LifePage;
use ksmrs_sys::peer::Wait;
use regions::{BrokerProcess, PAGE, alone, count, counter, filled, forked, merge, wait_for, wrong};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// The client turned its life page, forked, and gave pages up; the broker reads the words before it hears of the turn. It must
/// not take them for given up in the epoch that it knows of, since the child shows the frames in the next.
#[test]
fn words_read_before_the_turn_is_heard_of_belong_to_the_next_epoch() {
    let broker = Broker::start("early");
    let mut client = FakeClient::new(&broker);
    client.join([7; 8]);
    assert_eq!(client.merge().pages_merged, 8);
    let (next, next_fd) = LifePage::new().unwrap();
    client.table.set_epoch(2);
    for index in 0..8 {
        client.write(index, 100 + index);
    }
    // Then the words were read.
    client.until("cow_ksm", 8);
    let life = |epoch: u32, fd: &std::os::fd::OwnedFd| {
        let message = ToBroker::Life { epoch };
        client.connection.send(&message, Some(fd.as_fd()), Wait::Yes).unwrap();
    };
    life(2, &next_fd);
    drop(client.life.replace(next));
    let (last, last_fd) = LifePage::new().unwrap();
    client.table.set_epoch(3);
    life(3, &last_fd);
    let child = client.life.replace(last).unwrap();
    // Merging looks for seals all along.
    client.keeps("store_bytes", 4096, "a child of epoch 2 shows the frame");
    drop(child);
    // A proposal that came to nothing meanwhile was given up in epoch 3.
    client.epoch = 3;
    drop(client.turn_life());
    client.until("store_bytes", 0);
}

/// The client's turns were all over before the words were read.
#[test]
fn a_turn_of_the_life_page_is_asked_for_that_lets_frames_go() {
    let broker = Broker::start("asked");
    let mut client = FakeClient::new(&broker);
    client.join([7; 8]);
    assert_eq!(client.merge().pages_merged, 8);
    drop(client.turn_life());
    for index in 0..8 {
        client.write(index, 100 + index);
    }
    client.until("cow_ksm", 8);
    client.keeps("store_bytes", 4096, "its epoch goes on");
    client.work_until(|message| *message == ToClient::Turn);
    drop(client.turn_life());
    client.until("store_bytes", 0);
}

/// A child of the epoch in which a region ends shows its frames.
#[test]
fn what_a_region_shows_that_ends_is_given_up_in_the_epoch_of_its_end() {
    let broker = Broker::start("ended");
    let mut client = FakeClient::new(&broker);
    let region = client.join([7; 8]);
    assert_eq!(client.merge().pages_merged, 8);
    drop(client.turn_life());
    client.leave(region, 8);
    let child = client.turn_life();
    client.keeps("store_bytes", 4096, "a child of that epoch shows the frame");
    drop(child);
    client.until("store_bytes", 0);
}

/// The client turned its life page, forked, and died before it read all that the broker sent. That must not hide the page that the child
/// has.
#[test]
fn a_life_page_on_its_way_counts_though_the_socket_was_reset() {
    let broker = Broker::start("reset");
    let mut witness = FakeClient::new(&broker);
    for round in 1..6 {
        let mut client = FakeClient::new(&broker);
        client.join([round; 8]);
        assert_eq!(client.merge().pages_merged, 8);
        for id in 0..50 {
            let question = Question::Stats;
            client.send(ToBroker::Ask { id, question });
        }
        let parents = client.turn_life();
        let childs = client.life.take();
        drop((client, parents));
        witness.keeps("store_bytes", 4096, "a child shows the frame");
        drop(childs);
        witness.until("frames", 0);
    }
}

/// The same with a real client, whose broker is stopped while it works: as many tries as time allows.
#[test]
fn a_child_keeps_its_bytes_while_the_broker_lags() {
    alone("a_child_keeps_its_bytes_while_the_broker_lags", 60, || {
        let broker = BrokerProcess::start();
        let pages = 1024;
        let knobs = [
            ("sleep_millisecs", "1"),
            ("advisor_mode", "none"),
            ("pages_to_scan", "8192"),
            ("run", "1"),
        ];
        for (knob, value) in knobs {
            client::set(knob, value).unwrap();
        }
        let begun = Instant::now();
        let mut seed = 0;
        while begun.elapsed() < Duration::from_secs(3) {
            seed += 1;
            let both = [1, 2].map(|_| filled(pages, Kind::Private, seed));
            merge();
            let other = Region::new(4 * PAGE, Kind::Private).unwrap();
            // A different place in the scan each time.
            std::thread::sleep(Duration::from_millis(seed % 7));
            broker.stop();
            std::thread::sleep(Duration::from_millis(20));
            drop(other);
            std::thread::sleep(Duration::from_millis(20));
            let child = forked(|| {
                std::thread::sleep(Duration::from_millis(250));
                i32::from(both.iter().any(|region| wrong(region, seed) > 0))
            });
            both.iter().for_each(|region| region.pin(0..pages).unwrap());
            broker.go_on();
            assert_eq!(child.ended(), 0, "the child of round {seed} lost bytes");
        }
    });
}

/// Whatever epoch the broker took it for, what an idle client gave up is freed.
#[test]
fn closed_regions_free_their_frames_though_nothing_else_happens() {
    const TEST: &str = "closed_regions_free_their_frames_though_nothing_else_happens";
    alone(TEST, 60, || {
        let _broker = BrokerProcess::start();
        for round in 0..10 {
            let kind = if round % 2 == 0 { Kind::Private } else { Kind::Shared };
            let both = [1, 2].map(|_| filled(96, kind, round));
            merge();
            assert_eq!(counter("frames"), 96);
            drop(both);
            wait_for("the frames' end", || counter("frames") == 0);
        }
    });
}

/// Each connection to the same broker is a client anew; the earlier ones' frames must not stay for ever.
#[test]
fn frames_of_earlier_connections_go() {
    alone("frames_of_earlier_connections_go", 60, || {
        let _broker = BrokerProcess::start();
        let both = [1, 2].map(|_| filled(400, Kind::Private, 1));
        for round in 1..4 {
            both.iter().for_each(|region| regions::fill(region, round));
            merge();
            let merged: usize = both.iter().map(|region| count(region, ksmrs_sys::State::Merged)).sum();
            assert_eq!(merged, 800, "round {round}");
            client::disconnect().unwrap();
            client::connect().unwrap();
        }
        assert!(both.iter().all(|region| wrong(region, 3) == 0));
        drop(both);
        // The connection that is left has no region; nothing shows a frame.
        wait_for("the end of all frames", || counter("frames") == 0);
        wait_for("the end of earlier clients", || counter("clients") == 1);
        assert_eq!(counter("store_bytes"), 0);
    });
}

/// At the end of a program regions are retired, and show what they show to the last: also the frames of an earlier connection.
#[test]
fn retired_regions_keep_the_frames_of_earlier_connections() {
    alone("retired_regions_keep_the_frames_of_earlier_connections", 60, || {
        let _broker = BrokerProcess::start();
        let both = [1, 2].map(|_| filled(256, Kind::Private, 1));
        merge();
        client::disconnect().unwrap();
        client::connect().unwrap();
        client::set("run", "0").unwrap();
        both.iter().for_each(|region| region.retire());
        // Each second the remapper looks which connections are named no more.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            assert_eq!(both.each_ref().map(|region| wrong(region, 1)), [0, 0]);
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}
