//! Clients that break the rules: each is dropped with its reason in the log, and another client goes on as if nothing were.

mod fake;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fake::{Broker, CAPACITY, FakeClient, hello, receive};
use ksmrs_broker::wire::{
    Bits, ClientEnd, Failure, Kind, MAX_DATAGRAM, Question, RunOutcome, ScanCounts, ToBroker, ToClient, VERSION, encode,
};
use ksmrs_sys::life::LifePage;
use ksmrs_sys::object;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::peer::Wait;
use ksmrs_sys::staging::Staging;
use ksmrs_sys::{Slot, State, Word};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// The connection must end, with this in the broker's Bye and in its log.
fn dropped(broker: &Broker, connection: &ClientEnd, reason: &str) {
    let mut farewell = None;
    loop {
        match receive(connection) {
            Ok((ToClient::Bye { reason }, _)) => farewell = Some(reason),
            Ok(_) => {}
            Err(error) if error.is_closed() => break,
            Err(error) => panic!("{error}"),
        }
    }
    let farewell = farewell.expect("a dropped client is told why");
    assert!(farewell.contains(reason), "{farewell:?} does not say {reason:?}");
    broker.logged(reason);
}

/// A bystander that must be able to merge at any time.
fn unaffected(client: &mut FakeClient) {
    let region = client.join([4, 4, 4]);
    assert!(client.merge().finished);
    client.verify();
    assert_eq!(client.merged(), 3);
    client.leave(region, 3);
    drop(client.turn_life());
    client.until("frames", 0);
}

fn send(connection: &ClientEnd, message: &ToBroker, fd: Option<BorrowedFd<'_>>) {
    connection.send(message, fd, Wait::Yes).unwrap();
}

fn welcomed(broker: &Broker) -> ClientEnd {
    let connection = broker.connect();
    send(&connection, &hello(vec![]), None);
    assert!(matches!(receive(&connection).unwrap().0, ToClient::Welcome { .. }));
    connection
}

fn with_life(broker: &Broker) -> (ClientEnd, LifePage) {
    let connection = welcomed(broker);
    let (life, fd) = LifePage::new().unwrap();
    send(&connection, &ToBroker::Life { epoch: 1 }, Some(fd.as_fd()));
    (connection, life)
}

#[test]
fn malformed_datagrams() {
    let broker = Broker::start("malformed");
    let mut bystander = FakeClient::new(&broker);
    let good = encode(&hello(vec![])).unwrap();
    let mut longer = good.clone();
    longer.push(0);
    let mut trailing = longer.clone();
    trailing[..4].copy_from_slice(&((longer.len() - 4) as u32).to_le_bytes());
    let mut version = good.clone();
    version[4] = VERSION + 1;
    let mut tag = good.clone();
    tag[5] = 99;
    let cases: [(&[u8], &str); 7] = [
        (&good[..3], "the message says 0 bytes and has 3"),
        (&good[..good.len() - 1], "the message says"),
        (&longer, "the message says"),
        (&trailing, "1 bytes after the end"),
        (&version, "protocol version"),
        (&tag, "not a message"),
        (&[0; 4], "the message says 0 bytes and has 0"),
    ];
    for (bytes, reason) in cases {
        let connection = broker.connect();
        connection.send_encoded(bytes, None, Wait::Yes).unwrap();
        dropped(&broker, &connection, reason);
    }
    let connection = broker.connect();
    connection
        .send_encoded(&vec![1; MAX_DATAGRAM + 1], None, Wait::Yes)
        .unwrap();
    dropped(&broker, &connection, "longer than any message");
    unaffected(&mut bystander);
}

#[test]
fn noise() {
    let broker = Broker::start("noise");
    let mut bystander = FakeClient::new(&broker);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..200 {
        let mut bytes: Vec<u8> = (0..random() % 200 + 6).map(|_| random() as u8).collect();
        let length = (bytes.len() - 4) as u32;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4] = VERSION;
        bytes[5] %= 16;
        let connection = broker.connect();
        connection.send_encoded(&bytes, None, Wait::Yes).unwrap();
        while receive(&connection).is_ok() {
            // Noise that happens to be a question or a Hello is answered; anything after it is out of order.
            let _ = connection.send_encoded(&[0], None, Wait::No);
        }
    }
    unaffected(&mut bystander);
}

#[test]
fn descriptors_that_do_not_belong() {
    let broker = Broker::start("descriptors");
    let mut bystander = FakeClient::new(&broker);
    let pipe = rustix::pipe::pipe().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let two = [pipe.0.as_fd(), pipe.1.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&two));
    let connection = broker.connect();
    let bytes = encode(&hello(vec![])).unwrap();
    rustix::net::sendmsg(&connection, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
    dropped(&broker, &connection, "more than one descriptor");
    let connection = broker.connect();
    connection
        .send_encoded(&bytes, Some(pipe.0.as_fd()), Wait::Yes)
        .unwrap();
    dropped(&broker, &connection, "Hello carried a descriptor");
    let connection = welcomed(&broker);
    connection
        .send_encoded(&encode(&ToBroker::Life { epoch: 1 }).unwrap(), None, Wait::Yes)
        .unwrap();
    dropped(&broker, &connection, "Life came without its descriptor");
    unaffected(&mut bystander);
}

#[test]
fn objects_that_are_not_what_they_are_called() {
    let broker = Broker::start("objects");
    let mut bystander = FakeClient::new(&broker);
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let unsealed = object::create("ksmrs-test", 1 << 21).unwrap();
    let (_table, table) = ClientTable::create(64).unwrap();
    let small = object::create("ksmrs-test", 4096).unwrap();
    object::seal_size(&small, "test").unwrap();

    for (fd, reason) in [(&null, "life page"), (&unsealed, "life page"), (&table, "life page")] {
        let connection = welcomed(&broker);
        send(&connection, &ToBroker::Life { epoch: 1 }, Some(fd.as_fd()));
        dropped(&broker, &connection, reason);
    }
    let headless = object::create("ksmrs-test", 3 * 4096).unwrap();
    object::seal_size(&headless, "test").unwrap();
    let tables = [
        (&null, 64, "page table"),
        (&unsealed, 64, "page table descriptor is not one: seals"),
        (&table, 4096, "bytes for 4096 pages"),
        (&table, 0, "bytes for 0 pages"),
        (&table, u32::MAX, "bytes for 4294967295 pages"),
        (&headless, 64, "header"),
    ];
    for (fd, pages, reason) in tables {
        let (connection, _life) = with_life(&broker);
        send(&connection, &ToBroker::Table { pages }, Some(fd.as_fd()));
        dropped(&broker, &connection, reason);
    }
    for (fd, reason) in [
        (&null, "staging"),
        (&unsealed, "staging"),
        (&small, "4096 bytes, not 2097152"),
    ] {
        let (connection, _life) = with_life(&broker);
        send(&connection, &ToBroker::Table { pages: 64 }, Some(table.as_fd()));
        send(&connection, &ToBroker::Staging, Some(fd.as_fd()));
        dropped(&broker, &connection, reason);
    }
    unaffected(&mut bystander);
}

#[test]
fn messages_out_of_order() {
    let broker = Broker::start("order");
    let mut bystander = FakeClient::new(&broker);
    let (_life, life) = LifePage::new().unwrap();
    let (_table, table) = ClientTable::create(64).unwrap();
    let (_staging, staging) = Staging::create().unwrap();
    let ask = ToBroker::Ask {
        id: 0,
        question: Question::Stats,
    };

    let connection = broker.connect();
    send(&connection, &ask, None);
    dropped(&broker, &connection, "Ask before Hello");
    let connection = welcomed(&broker);
    send(&connection, &hello(vec![]), None);
    dropped(&broker, &connection, "Hello after Welcome");
    let connection = welcomed(&broker);
    send(&connection, &ToBroker::Table { pages: 64 }, Some(table.as_fd()));
    dropped(&broker, &connection, "Table before Life");
    let (connection, _mine) = with_life(&broker);
    send(&connection, &ToBroker::Staging, Some(staging.as_fd()));
    dropped(&broker, &connection, "Staging after Welcome and before Table");
    let (connection, _mine) = with_life(&broker);
    send(&connection, &ToBroker::Leave { region: 0 }, None);
    dropped(&broker, &connection, "Leave after Welcome and before Table");
    let (connection, _mine) = with_life(&broker);
    send(&connection, &ToBroker::Life { epoch: 1 }, Some(life.as_fd()));
    dropped(&broker, &connection, "life page of epoch 1 after epoch 1");
    let connection = broker.connect();
    let elsewhere = ToBroker::Hello {
        release: String::new(),
        domain: "../x".into(),
        pid: 0,
        stores: vec![],
        born: None,
    };
    send(&connection, &elsewhere, None);
    dropped(&broker, &connection, "domain name");
    let connection = broker.connect();
    send(&connection, &hello((1..=255).collect()), None);
    dropped(&broker, &connection, "stores that a process's words may name");

    let answers: [(ToBroker, &str); 5] = [
        (
            ToBroker::Scanned {
                order: 9999,
                counts: ScanCounts::default(),
            },
            "Scanned for order 9999",
        ),
        (
            ToBroker::Staged {
                order: 9999,
                copied: Bits::All,
                cpu_micros: 0,
            },
            "Staged for order 9999",
        ),
        (
            ToBroker::Mapped {
                order: 9999,
                outcomes: vec![],
                cpu_micros: 0,
            },
            "Mapped for order 9999",
        ),
        (
            ToBroker::Unmapped {
                order: 9999,
                unmapped: Bits::All,
            },
            "Unmapped for order 9999",
        ),
        (
            ToBroker::Failed {
                order: 9999,
                failure: Failure::Gone,
            },
            "Failed for order 9999",
        ),
    ];
    for (answer, reason) in answers {
        let client = FakeClient::new(&broker);
        client.send(answer);
        dropped(&broker, &client.connection, reason);
    }
    let client = FakeClient::new(&broker);
    client.send(ToBroker::Leave { region: 3 });
    dropped(&broker, &client.connection, "region 3, which it has not joined");
    unaffected(&mut bystander);
}

#[test]
fn answers_of_the_wrong_shape() {
    let broker = Broker::start("shape");
    let mut bystander = FakeClient::new(&broker);
    for wrong in [false, true] {
        let mut client = FakeClient::new(&broker);
        client.join([6; 4]);
        client.send(ToBroker::Ask {
            id: 77,
            question: Question::Merge { timeout_ms: None },
        });
        let ToClient::Map { order, runs, .. } = client.work_until(|message| matches!(message, ToClient::Map { .. }))
        else {
            unreachable!()
        };
        let merged = if wrong { Bits::Some(vec![0; 40]) } else { Bits::All };
        let count = if wrong { runs.len() } else { runs.len() + 1 };
        let outcomes = vec![RunOutcome { merged, failure: None }; count];
        client.send(ToBroker::Mapped {
            order,
            outcomes,
            cpu_micros: 0,
        });
        dropped(
            &broker,
            &client.connection,
            if wrong { "bitmap" } else { "results, not" },
        );
        // It may have mapped what it was told to: that stays until its life page is gone.
        assert!(bystander.counter("frames") > 0);
        drop(client);
        bystander.until("frames", 0);
    }
    unaffected(&mut bystander);
}

#[test]
fn regions_outside_the_table_or_over_others_are_refused() {
    let broker = Broker::start("regions");
    let mut client = FakeClient::new(&broker);
    let (region, first_word) = client.join([1; 10]);
    let joins = [
        (50, CAPACITY - 4, 5, "outside the table"),
        (50, u32::MAX - 5, 5, "outside the table"),
        (50, first_word + 9, 4, "overlap"),
        (50, first_word + 3, 2, "overlap"),
        (region, 100, 4, "has joined already"),
    ];
    for (region, first_word, pages, wanted) in joins {
        client.send(ToBroker::Join {
            region,
            kind: Kind::Private,
            first_word,
            pages,
            position: 0,
            flags: 0,
            object: None,
        });
        let answer = client.work_until(|message| matches!(message, ToClient::Refused { .. } | ToClient::Joined { .. }));
        let ToClient::Refused { reason, .. } = answer else {
            panic!("{answer:?} for {wanted}")
        };
        assert!(reason.contains(wanted), "{reason}");
    }
    unaffected_but(&mut client);
}

/// The client itself goes on.
fn unaffected_but(client: &mut FakeClient) {
    assert_eq!(client.merge().pages_merged, 10);
    client.verify();
}

#[test]
fn words_that_lie_hurt_only_their_client() {
    let broker = Broker::start("lies");
    let mut bystander = FakeClient::new(&broker);
    bystander.join([8, 8]);
    bystander.merge();
    let mut liar = FakeClient::new(&broker);
    let (_, first) = liar.join(1..=12);
    let lies = [
        Word(u64::MAX),
        Word(15),
        Word::PRIVATE.with_state(State::Merged).with_frame(liar.number, Slot(0)),
        Word::PRIVATE
            .with_state(State::Merged)
            .with_frame(liar.number, Slot(u32::MAX - 1)),
        Word::PRIVATE
            .with_state(State::Broken)
            .with_frame(liar.number, Slot(fake::STORE_SLOTS)),
        Word::PRIVATE
            .with_state(State::Zero)
            .with_frame(liar.number, Slot::ZERO),
        Word::PRIVATE.with_state(State::Held).with_frame(liar.number, Slot(1)),
        Word::PRIVATE
            .with_state(State::Detached)
            .with_frame(liar.number, Slot(2)),
    ];
    for (index, lie) in lies.into_iter().enumerate() {
        liar.store_word(first + index as u32, lie);
    }
    let worker = std::thread::spawn(move || {
        let report = liar.merge();
        (liar, report)
    });
    while !worker.is_finished() {
        // The bystander answers its own orders meanwhile.
        bystander.counter("pages_disbelieved");
    }
    let (liar, report) = worker.join().unwrap();
    assert!(report.finished, "{report:?}");
    assert!(bystander.counter("pages_disbelieved") >= 5);
    assert_eq!(bystander.counter("frames"), 1);
    bystander.verify();
    drop(liar);
    assert_eq!(bystander.merged(), 2);
}

#[test]
fn staging_that_does_not_hold_the_page_founds_no_frame() {
    let broker = Broker::start("staging");
    let mut bystander = FakeClient::new(&broker);
    let mut liar = FakeClient::new(&broker);
    liar.join([2; 6]);
    liar.send(ToBroker::Ask {
        id: 5,
        question: Question::Merge { timeout_ms: Some(300) },
    });
    for _ in 0..3 {
        let order = liar.work_until(|message| matches!(message, ToClient::Stage { .. } | ToClient::Answer { .. }));
        let ToClient::Stage { order, .. } = order else { break };
        liar.staging.write_page(0, &fake::page(666));
        liar.send(ToBroker::Staged {
            order,
            copied: Bits::All,
            cpu_micros: 0,
        });
    }
    assert_eq!(bystander.counter("frames"), 0, "a frame of another content is no frame");
    assert_eq!(bystander.counter("store_bytes"), 0);
    drop(liar);
    unaffected(&mut bystander);
}

#[test]
fn a_client_that_does_not_read_is_dropped() {
    let broker = Broker::start("deaf");
    let mut bystander = FakeClient::new(&broker);
    let deaf = FakeClient::new(&broker);
    let question = encode(&ToBroker::Ask {
        id: 0,
        question: Question::Stats,
    })
    .unwrap();
    fake::wait_for(
        || {
            deaf.connection
                .send_encoded(&question, None, Wait::No)
                .is_err_and(|error| error.is_closed())
        },
        || "the broker to lose patience".into(),
    );
    broker.logged("messages waiting to be read");
    unaffected(&mut bystander);
}

/// A client that is too slow to read is dropped with life pages on their way, of which the last is the only one that it maps.
#[test]
fn a_dropped_client_is_not_dead() {
    let broker = Broker::start("dropped");
    let mut bystander = FakeClient::new(&broker);
    let mut deaf = FakeClient::new(&broker);
    deaf.join([5, 5]);
    assert_eq!(deaf.merge().pages_merged, 2);
    let question = encode(&ToBroker::Ask {
        id: 0,
        question: Question::Stats,
    })
    .unwrap();
    let mut turns = 1;
    'connected: loop {
        for _ in 0..20 {
            if deaf.connection.send_encoded(&question, None, Wait::Yes).is_err() {
                break 'connected;
            }
        }
        let (life, fd) = LifePage::new().unwrap();
        turns += 1;
        let message = ToBroker::Life { epoch: turns };
        if deaf.connection.send(&message, Some(fd.as_fd()), Wait::Yes).is_err() {
            break;
        }
        // The old one is let go, as a client does.
        deaf.life = Some(life);
    }
    broker.logged("messages waiting to be read");
    let begun = std::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_millis(500) {
        assert_eq!(bystander.counter("frames"), 1, "a live client shows it");
    }
    deaf.verify();
    drop(deaf);
    bystander.until("frames", 0);
}
