//! Forked children that say which client they were born of: those that are, and those that lie.

mod fake;

use fake::{Broker, FakeClient, hello_of_a_child, wait_for};
use ksmrs_broker::wire::{Lineage, ToBroker};
use ksmrs_sys::{Slot, State, StoreNumber, Word};

/// Eight pages that show frames 0 to 3 twice.
fn merged(broker: &Broker) -> (FakeClient, (u32, u32)) {
    let mut parent = FakeClient::new(broker);
    let region = parent.join([1, 2, 3, 4, 1, 2, 3, 4]);
    assert_eq!(parent.merge().pages_merged, 8);
    (parent, region)
}

#[test]
fn a_child_keeps_what_its_parent_gave_up() {
    let broker = Broker::start("born");
    let (mut parent, region) = merged(&broker);
    let mut child = FakeClient::born(&broker, &parent);
    assert_eq!(
        child.number, parent.number,
        "its words name the store as its parent's do"
    );
    // What the child still maps.
    let inherited = parent.turn_life();
    parent.leave(region, 8);
    drop(parent);
    assert_eq!(child.join_born(0, 8), Ok(0));
    drop(inherited);
    child.until("clients", 1);
    child.until("references_in_limbo", 0);
    assert_eq!((child.counter("pages_shared"), child.counter("pages_sharing")), (4, 4));
    child.verify();
    // It merges like any other: a page that was written and another that became equal to it.
    child.write(0, 9);
    child.write(1, 9);
    assert_eq!(child.merge().pages_merged, 2);
    assert_eq!(child.counter("pages_disbelieved"), 0);
    child.verify();
    let mut bystander = FakeClient::new(&broker);
    drop(child);
    bystander.until("frames", 0);
    bystander.until("store_bytes", 0);
}

/// The pages were written before the fork, so that their frames went and only their slots stay; the child copies some of them out of
/// merging while it joins.
#[test]
fn what_a_child_is_giving_back_while_it_joins_is_counted() {
    let broker = Broker::start("giving");
    let (mut parent, _) = merged(&broker);
    (0..8).for_each(|page| parent.write(page, 100 + page));
    parent.until("cow_ksm", 8);
    let punched = || {
        drop(parent.turn_life());
        parent.counter("store_bytes") == 0
    };
    wait_for(punched, || "the frames' end".to_owned());
    let mut child = FakeClient::born(&broker, &parent);
    for (index, state) in (0..).zip([State::Leaving, State::Breaking, State::Frozen]) {
        child.store_word(index, child.word(index).with_state(state));
    }
    assert_eq!(child.join_born(0, 8), Ok(0));
    assert_eq!(child.counter("pages_disbelieved"), 0);
}

#[test]
fn a_child_of_a_departed_parent_is_known() {
    let broker = Broker::start("departed");
    let (mut parent, _) = merged(&broker);
    let lineage = parent.lineage.clone();
    let words: Vec<Word> = (0..8).map(|index| parent.word(index)).collect();
    let inherited = parent.life.take();
    let mut bystander = FakeClient::new(&broker);
    drop(parent);
    broker.logged("client closed its socket");
    let mut child = FakeClient::greeting(broker.connect(), &hello_of_a_child(lineage));
    (0..)
        .zip(&words)
        .for_each(|(index, word)| child.store_word(index, *word));
    assert_eq!(child.join_born(0, 8), Ok(0));
    drop(inherited);
    bystander.until("clients", 2);
    assert_eq!(bystander.counter("frames"), 4);
    drop(child);
    bystander.until("frames", 0);
}

#[test]
fn children_of_nobody_get_a_number_of_their_own_and_join_nothing_born() {
    let broker = Broker::start("nobodys");
    let (parent, _) = merged(&broker);
    let mut stranger = FakeClient::new(&broker);
    let Lineage { client, store, key } = parent.lineage.clone();
    let lies = [
        Lineage { client: 77, store, key },
        Lineage {
            client,
            store: store + 1,
            key,
        },
        Lineage { client, store: 0, key },
        Lineage {
            client,
            store,
            key: [0; 16],
        },
    ];
    for lie in lies {
        let mut child = FakeClient::greeting(broker.connect(), &hello_of_a_child(lie.clone()));
        assert_ne!(child.number, StoreNumber(lie.store), "{lie:?}");
        let refused = child.join_born(0, 8).unwrap_err();
        assert!(refused.contains("not born"), "{refused}");
    }
    let hello = match hello_of_a_child(parent.lineage.clone()) {
        ToBroker::Hello {
            release,
            pid,
            stores,
            born,
            ..
        } => ToBroker::Hello {
            release,
            domain: "another".into(),
            pid,
            stores,
            born,
        },
        other => other,
    };
    let mut child = FakeClient::greeting(broker.connect(), &hello);
    assert!(child.join_born(0, 8).is_err(), "a store of another domain");
    assert_eq!(stranger.counter("frames"), 4);
    assert_eq!(stranger.counter("pages_sharing"), 4);
    parent.verify();
}

#[test]
fn a_child_that_lies_refers_to_nothing_but_frames() {
    let broker = Broker::start("cuckoo");
    let (mut parent, _) = merged(&broker);
    let frames: Vec<Slot> = (0..4)
        .filter_map(|index| parent.word(index).frame())
        .map(|(_, slot)| slot)
        .collect();
    let mut cuckoo = FakeClient::born(&broker, &parent);
    let states = [
        State::Merged,
        State::Broken,
        State::Held,
        State::Detached,
        State::Leaving,
        State::Frozen,
    ];
    let slots = [0, 1, 511, 512, 4095, 4096, 1 << 20, u32::MAX - 1, u32::MAX].map(Slot);
    let mut index = 0;
    let mut wrong = 0;
    for state in states {
        for slot in slots.into_iter().filter(|slot| !frames.contains(slot)) {
            cuckoo.store_word(index, Word::PRIVATE.with_state(state).with_frame(cuckoo.number, slot));
            (index, wrong) = (index + 1, wrong + 1);
        }
    }
    // Not of any store, and of no state: nothing that could be counted.
    cuckoo.store_word(index, Word(15));
    cuckoo.store_word(
        index + 1,
        Word::PRIVATE
            .with_state(State::Merged)
            .with_frame(StoreNumber(200), Slot(0)),
    );
    index += 2;
    for frame in &frames {
        cuckoo.store_word(
            index,
            Word::PRIVATE
                .with_state(State::Merged)
                .with_frame(cuckoo.number, *frame),
        );
        index += 1;
    }
    assert_eq!(cuckoo.join_born(0, index), Ok(wrong));
    assert!(cuckoo.join_born(0, 8).unwrap_err().contains("overlap"));
    assert!(cuckoo.join_born(fake::CAPACITY - 1, 2).is_err());
    let mut bystander = FakeClient::new(&broker);
    assert_eq!(bystander.counter("frames"), 4);
    // Whatever it claims, the others merge, write and leave as if it were not there.
    parent.write(0, 70);
    parent.write(4, 70);
    drop(cuckoo);
    assert!(parent.merge().finished);
    parent.verify();
    drop(parent);
    bystander.until("frames", 0);
    bystander.until("store_bytes", 0);
}
