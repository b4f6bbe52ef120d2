//! Named objects at the broker: what is refused a lease, who is told of an opener, and what is written back for the dead.

mod fake;
mod regions;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use fake::{Broker, FakeClient, page, wait_for};
use ksmrs_broker::client;
use ksmrs_broker::wire::{Kind, Object, ToBroker, ToClient};
use ksmrs_sys::peer::Wait;
use ksmrs_sys::{PAGE_SIZE, State, StoreNumber, Word};
use regions::{BrokerProcess, PATIENCE, adopted, alone, count, mapped};
use rustix::fs::Mode;
use rustix::shm;

const FIRST_WORD: u32 = 300;

/// A POSIX object of this test's own, unlinked at its end.
struct Named {
    name: String,
    file: File,
}

impl Named {
    fn new(name: &str, pages: u64) -> Named {
        let name = format!("/ksmrs-broker-test-{}-{name}", std::process::id());
        let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
        let fd = shm::open(&name, flags, Mode::RUSR | Mode::WUSR).unwrap();
        rustix::fs::ftruncate(&fd, pages * PAGE_SIZE as u64).unwrap();
        Named { name, file: fd.into() }
    }

    fn object(&self) -> Object {
        object_of(&self.file)
    }

    fn open(&self) -> OwnedFd {
        shm::open(&self.name, shm::OFlags::RDWR, Mode::empty()).unwrap()
    }

    fn page(&self, at: u64) -> [u8; PAGE_SIZE] {
        let mut bytes = [0; PAGE_SIZE];
        self.file.read_exact_at(&mut bytes, at * PAGE_SIZE as u64).unwrap();
        bytes
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = shm::unlink(&self.name);
    }
}

fn object_of(file: &File) -> Object {
    let stat = rustix::fs::fstat(file).unwrap();
    Object {
        device: stat.st_dev,
        inode: stat.st_ino,
        offset: 0,
    }
}

/// Runs the test of this name where a file system has room for two pages: in a process with a mount namespace of its own.
fn with_little_room(test: &str, program: impl FnOnce(&Path)) {
    const FOLDER: &str = "KSMRS_TEST_LITTLE_ROOM";
    if let Some(folder) = std::env::var_os(FOLDER) {
        return program(Path::new(&folder));
    }
    let folder = std::env::temp_dir().join(format!("ksmrs-little-room-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let ended = Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            "mount -t tmpfs -o size=8k none $0 || exit 1; exec \"$@\"",
        ])
        .args([folder.as_os_str(), std::env::current_exe().unwrap().as_os_str()])
        .args(["--exact", test, "--nocapture"])
        .env(FOLDER, &folder)
        .status();
    std::fs::remove_dir(&folder).unwrap();
    match ended {
        // A test that fails has another status.
        Ok(status) if status.code() != Some(1) => assert!(status.success(), "{test}: {status}"),
        #[allow(clippy::print_stderr, reason = "who reads the results should know")]
        not_run => eprintln!("{test} is left out, for it may not mount: {not_run:?}"),
    }
}

fn join(client: &mut FakeClient, region: u32, pages: u32, object: Object, fd: impl AsFd) -> Result<(), String> {
    let join = ToBroker::Join {
        region,
        kind: Kind::Shared,
        first_word: FIRST_WORD + region,
        pages,
        position: 0,
        flags: 0,
        object: Some(object),
    };
    client.connection.send(&join, Some(fd.as_fd()), Wait::Yes).unwrap();
    match client.work_until(|message| matches!(message, ToClient::Refused { .. } | ToClient::Joined { .. })) {
        ToClient::Refused { reason, .. } => Err(reason),
        _ => Ok(()),
    }
}

fn leave(client: &mut FakeClient, region: u32) {
    client.send(ToBroker::Leave { region });
    client.work_until(|message| *message == ToClient::Left { region });
}

#[test]
fn objects_that_are_not_what_they_are_called_are_refused() {
    let broker = Broker::start("objects");
    let (mut client, mut other) = (FakeClient::new(&broker), FakeClient::new(&broker));
    let named = Named::new("refused", 4);
    let (object, null) = (named.object(), File::open("/dev/null").unwrap());
    let mut refused = |object, pages, fd: &dyn AsFd, wanted: &str| {
        let reason = join(&mut client, 500, pages, object, fd.as_fd()).unwrap_err();
        assert!(reason.contains(wanted), "{reason:?} does not say {wanted:?}");
    };
    refused(object, 4, &null, "inode");
    refused(
        Object {
            inode: object.inode + 1,
            ..object
        },
        4,
        &named.file,
        "inode",
    );
    refused(object, 5, &named.file, "ends at 20480");
    let second = named.open();
    refused(object, 4, &named.file, "open more than once");
    drop(second);
    join(&mut client, 500, 2, object, &named.file).unwrap();
    assert!(
        join(&mut client, 500, 2, object, &named.file)
            .unwrap_err()
            .contains("joined already")
    );
    // Another part of it, by the same client; but nobody else.
    let rest = Object {
        offset: 2 * PAGE_SIZE as u64,
        ..object
    };
    join(&mut client, 502, 2, rest, &named.file).unwrap();
    assert!(
        join(&mut other, 500, 2, object, &named.file)
            .unwrap_err()
            .contains("has opted it in")
    );
    for region in [500, 502] {
        leave(&mut client, region);
    }
    drop(named.open());
    join(&mut other, 500, 2, object, &named.file).unwrap();
}

#[test]
fn an_opener_waits_until_every_region_of_the_object_left() {
    let broker = Broker::start("openers");
    let mut client = FakeClient::new(&broker);
    let named = Named::new("opened", 4);
    let object = named.object();
    join(&mut client, 1, 2, object, &named.file).unwrap();
    let rest = Object {
        offset: 2 * PAGE_SIZE as u64,
        ..object
    };
    join(&mut client, 3, 2, rest, &named.file).unwrap();
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| named.open());
        for region in [1, 3] {
            let recalled = client.work_until(|message| matches!(message, ToClient::Recall { .. }));
            assert_eq!(recalled, ToClient::Recall { region });
            assert!(!opener.is_finished());
        }
        leave(&mut client, 1);
        assert!(!opener.is_finished());
        leave(&mut client, 3);
        drop(opener.join().unwrap());
    });
}

/// More than may wait for a client that does not read just now.
#[test]
fn an_opener_of_an_object_of_many_regions_ends_no_connection() {
    const REGIONS: u32 = 600;
    let broker = Broker::start("many");
    let mut client = FakeClient::new(&broker);
    let named = Named::new("many", REGIONS.into());
    for region in 0..REGIONS {
        let object = Object {
            offset: u64::from(region) * PAGE_SIZE as u64,
            ..named.object()
        };
        join(&mut client, region, 1, object, &named.file).unwrap();
    }
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| named.open());
        let told = || broker.log().matches("its pages go home").count();
        wait_for(|| told() == REGIONS as usize, || broker.log());
        for region in 0..REGIONS {
            let recalled = client.work_until(|message| matches!(message, ToClient::Recall { .. }));
            assert_eq!(recalled, ToClient::Recall { region });
        }
        for region in 0..REGIONS {
            leave(&mut client, region);
        }
        drop(opener.join().unwrap());
    });
}

#[test]
fn what_a_dead_client_left_out_of_its_object_is_written_back() {
    let broker = Broker::start("dead");
    let mut client = FakeClient::new(&broker);
    let (_, first) = client.join([7, 7]);
    client.merge();
    let frame = client.word(first).frame().expect("it merged");
    let named = Named::new("dead", 8);
    join(&mut client, 9, 8, named.object(), &named.file).unwrap();
    let word = |state| Word::PRIVATE.with_state(state).with_frame(frame.0, frame.1);
    let states = [
        word(State::Merged),
        word(State::Breaking),
        word(State::Homed),
        Word::PRIVATE,
        word(State::Merged),
        Word::PRIVATE.with_state(State::Zero),
        // Words that lie: no such slot.
        word(State::Merged).with_frame(frame.0, ksmrs_sys::Slot(u32::MAX - 1)),
        word(State::Breaking).with_frame(frame.0, ksmrs_sys::Slot(u32::MAX)),
    ];
    // Some have something at home: half of a page, a newer one, the page itself, the same bytes.
    for (at, byte) in [(1, 1u8), (2, 2), (3, 3)] {
        named
            .file
            .write_all_at(&[byte; PAGE_SIZE], at * PAGE_SIZE as u64)
            .unwrap();
    }
    named.file.write_all_at(&page(7), 4 * PAGE_SIZE as u64).unwrap();
    for (at, state) in states.into_iter().enumerate() {
        client.store_word(FIRST_WORD + 9 + at as u32, state);
    }
    assert_eq!(named.page(0), [0; PAGE_SIZE]);
    drop(client);
    wait_for(|| named.page(1) == page(7), || broker.log());
    broker.logged("holds all its bytes again");
    let expected = [
        page(7),
        page(7),
        [2; PAGE_SIZE],
        [3; PAGE_SIZE],
        page(7),
        [0; PAGE_SIZE],
    ];
    for (at, expected) in expected.iter().enumerate() {
        assert!(named.page(at as u64) == *expected, "page {at}");
    }
}

/// A process executes another program (its number stays, its memory goes), which opts the object in before the broker brought back what
/// the first one left out of it.
#[test]
fn what_a_program_left_out_is_written_back_though_the_next_one_has_its_number() {
    let broker = Broker::start("exec");
    let mut first = FakeClient::new(&broker);
    let (_, word) = first.join([70, 70]);
    first.merge();
    let frame = first.word(word).frame().expect("it merged");
    let named = Named::new("exec", 8);
    join(&mut first, 9, 8, named.object(), &named.file).unwrap();
    let merged = Word::PRIVATE.with_state(State::Merged).with_frame(frame.0, frame.1);
    first.store_word(FIRST_WORD + 9, merged);
    let mut next = FakeClient::new(&broker);
    // Its last life page: nothing is written back before.
    let life = first.life.take();
    drop(first);
    let early = join(&mut next, 9, 8, named.object(), &named.file);
    assert!(early.is_err_and(|reason| reason.contains("has opted it in")));
    drop(life);
    wait_for(
        || join(&mut next, 9, 8, named.object(), &named.file).is_ok(),
        || "the object, for the next program".to_owned(),
    );
    assert!(named.page(0) == page(70), "it is whole");
}

/// An earlier connection's words are its process's words still: what that connection called the store, no later one may, as long as the
/// broker would read words for it.
#[test]
fn a_store_number_is_not_given_to_a_process_twice_while_it_is_remembered() {
    let broker = Broker::start("number");
    let mut first = FakeClient::new(&broker);
    let (number, life) = (first.number, first.life.take());
    let second = FakeClient::new(&broker);
    assert_ne!(second.number, number, "both are connected");
    drop(first);
    broker.logged("client closed its socket client=1");
    assert!(![number, second.number].contains(&FakeClient::new(&broker).number));
    drop(life);
    broker.logged("nothing shows its frames client=1");
    assert_eq!(FakeClient::new(&broker).number, number, "it is free again");
}

/// Once all numbers are remembered there is none to be had; a process that goes by another number has its own.
#[test]
fn a_process_that_all_store_numbers_are_remembered_of_is_refused() {
    let broker = Broker::start("numbers");
    let says = |pid| ToBroker::Hello {
        release: "test".into(),
        domain: "default".into(),
        pid,
        stores: (2..=255).collect(),
        born: None,
    };
    let first = FakeClient::greeting(broker.connect(), &says(1));
    let other = FakeClient::greeting(broker.connect(), &says(2));
    assert_eq!((first.number, other.number), (StoreNumber(1), StoreNumber(1)));
    let connection = broker.connect();
    connection.send(&says(1), None, Wait::Yes).unwrap();
    broker.logged("stores that a process's words may name");
}

/// The first region of an object is home at once, the second takes its time: the lease is both regions'.
#[test]
fn who_opens_an_object_waits_for_all_regions_over_it() {
    alone("who_opens_an_object_waits_for_all_regions_over_it", 60, || {
        let mut broker = Some(BrokerProcess::start());
        let pages = 8192;
        // Of a few contents, so that pages merge with each other.
        let bytes: Vec<u8> = (0..pages).flat_map(|page| [(page % 64 + 1) as u8; PAGE_SIZE]).collect();
        let named = Named::new("both", pages as u64);
        named.file.write_all_at(&bytes, 0).unwrap();
        let address = mapped(&named.file, pages);
        let regions = [adopted(address, 0..16), adopted(address, 16..pages)];
        for killed in [false, true] {
            regions::wait_for("merging", || {
                let _ = client::merge(Some(PATIENCE), &mut || false);
                regions.iter().map(|region| count(region, State::Merged)).sum::<usize>() > pages - 64
            });
            if killed {
                drop(broker.take());
            } else {
                client::disconnect().unwrap();
            }
            let mut found = vec![0; bytes.len()];
            File::from(named.open()).read_exact(&mut found).unwrap();
            let both = found.chunks_exact(PAGE_SIZE).zip(bytes.chunks_exact(PAGE_SIZE));
            let wrong = both.filter(|(found, written)| found != written).count();
            assert_eq!(wrong, 0, "broker killed: {killed}");
            if !killed {
                client::connect().unwrap();
            }
        }
    });
}

/// A client whose connection is over before it took home the page that it left out of its object, and that lives.
fn disconnected(broker: &Broker, named: &Named) -> (FakeClient, Word) {
    let mut client = FakeClient::new(broker);
    let (_, first) = client.join([7, 7]);
    client.merge();
    let frame = client.word(first).frame().expect("it merged");
    join(&mut client, 9, 1, named.object(), &named.file).unwrap();
    let merged = Word::PRIVATE.with_state(State::Merged).with_frame(frame.0, frame.1);
    client.store_word(FIRST_WORD + 9, merged);
    client.connection.shut_down();
    broker.logged("client closed its socket");
    (client, merged)
}

#[test]
fn a_disconnected_client_that_stands_still_has_its_pages_lent() {
    let broker = Broker::start("still");
    let named = Named::new("still", 1);
    let (client, merged) = disconnected(&broker, &named);
    drop(named.open());
    assert!(named.page(0) == page(7), "whoever opened it reads a hole");
    assert_eq!(client.word(FIRST_WORD + 9), merged.with_state(State::Homed).lent());
}

/// It connected to another broker, say, and another of its regions has the words.
#[test]
fn words_of_a_disconnected_client_that_went_on_are_not_touched() {
    let broker = Broker::start("went-on");
    let named = Named::new("went-on", 1);
    let (client, merged) = disconnected(&broker, &named);
    client.table.set_epoch(client.epoch + 1);
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| named.open());
        broker.logged("its pages go home");
        std::thread::sleep(Duration::from_secs(4));
        assert_eq!(client.word(FIRST_WORD + 9), merged);
        drop(client);
        drop(opener.join().unwrap());
    });
    assert!(named.page(0) == page(7), "it is written back once the client is dead");
}

#[test]
fn an_object_without_room_keeps_no_other_from_being_whole() {
    with_little_room("an_object_without_room_keeps_no_other_from_being_whole", |folder| {
        for lives in [true, false] {
            let broker = Broker::start("room");
            let mut client = FakeClient::new(&broker);
            let (_, first) = client.join([7, 7]);
            client.merge();
            let frame = client.word(first).frame().expect("it merged");
            // The first is a hole, and looked at first; the second needs no room.
            let paths = ["hole", "whole"].map(|name| folder.join(name));
            for (region, path) in (9..).zip(&paths) {
                let file = File::create_new(path).unwrap();
                file.set_len(PAGE_SIZE as u64).unwrap();
                if region == 10 {
                    file.write_all_at(&page(7), 0).unwrap();
                }
                join(&mut client, region, 1, object_of(&file), &file).unwrap();
                let merged = Word::PRIVATE.with_state(State::Merged).with_frame(frame.0, frame.1);
                client.store_word(FIRST_WORD + region, merged);
            }
            let filler = folder.join("filler");
            std::fs::write(&filler, [1; 2 * PAGE_SIZE]).unwrap_err();
            client.connection.shut_down();
            let _life = client.life.take().filter(|_| lives);
            std::thread::scope(|scope| {
                let [hole, whole] = paths
                    .each_ref()
                    .map(|path| scope.spawn(move || std::fs::read(path).unwrap()));
                wait_for(|| whole.is_finished(), || broker.log());
                assert!(whole.join().unwrap() == page(7));
                assert!(!hole.is_finished());
                std::fs::remove_file(&filler).unwrap();
                assert!(hole.join().unwrap() == page(7));
            });
            paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
        }
    });
}
