//! The broker's work, end to end over the wire: merging, breaking, leaving, knobs, and when frames are freed.

mod fake;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fake::{Broker, FakeClient, PATIENCE, connect, wait_for};
use ksmrs_broker::runtime_dir::RuntimeDir;
use ksmrs_broker::wire::{Answer, ErrorCode, Kind, Question, ToBroker};
use ksmrs_broker::{BrokerOptions, Started, run_broker};
use ksmrs_sys::peer::{Peer, Wait};
use ksmrs_sys::{State, Word};

#[test]
fn equal_pages_of_one_client_merge_and_leave() {
    let broker = Broker::start("one");
    let mut client = FakeClient::new(&broker);
    let region = client.join((0..64).map(|i| i % 16 + 1));
    let report = client.merge();
    assert!(report.finished && report.pages_merged == 64, "{report:?}");
    client.verify();
    assert_eq!(client.merged(), 64);
    assert_eq!(
        (client.counter("pages_shared"), client.counter("pages_sharing")),
        (16, 48)
    );
    assert_eq!(client.counter("store_bytes"), 16 * 4096);
    let Answer::ProcessStats(stats) = client.ask(Question::ProcessStats).unwrap() else {
        panic!()
    };
    assert!(stats.contains(&("ksm_merging_pages".into(), 64)), "{stats:?}");
    client.leave(region, 64);
    drop(client.turn_life());
    client.until("store_bytes", 0);
    client.until("frames", 0);
    drop(client);
    assert_eq!(broker.ended(), Started::Served);
}

#[test]
fn candidates_that_are_unmerged_on_request_count_nowhere() {
    let broker = Broker::start("held-candidates");
    let mut client = FakeClient::new(&broker);
    client.join(100..164);
    client.merge();
    client.merge();
    assert_eq!(client.counter("pages_unshared"), 64);
    // Nobody wrote them, and their checksums are what they were.
    for index in 0..64 {
        client.store_word(index, Word::PRIVATE.with_state(State::Held));
    }
    client.merge();
    assert_eq!(client.counter("pages_unshared"), 0);
}

#[test]
fn several_clients_share_frames_and_zero_pages_take_none() {
    let broker = Broker::start("several");
    let mut clients: Vec<FakeClient> = (0..3).map(|_| FakeClient::new(&broker)).collect();
    for client in &mut clients {
        client.join((0..40).map(|i| i / 2));
    }
    let mut asking = clients.swap_remove(0);
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                // The scan goes on in the background, so there is always a next order.
                while !stop.load(Ordering::Relaxed) {
                    let (order, _) = fake::receive(&client.connection).unwrap();
                    client.carry_out(order);
                }
                client
            })
        })
        .collect();
    let report = asking.merge();
    assert!(report.finished && report.pages_merged == 3 * 40, "{report:?}");
    stop.store(true, Ordering::Relaxed);
    let done: Vec<FakeClient> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
    for client in done.iter().chain([&asking]) {
        client.verify();
        assert_eq!(client.merged(), 38);
    }
    assert_eq!(
        (asking.counter("pages_shared"), asking.counter("ksm_zero_pages")),
        (19, 6)
    );
}

#[test]
fn what_an_epoch_still_shows_is_kept() {
    let broker = Broker::start("epoch");
    let mut client = FakeClient::new(&broker);
    client.join([7; 8]);
    assert_eq!(client.merge().pages_merged, 8);
    assert_eq!(client.counter("frames"), 1);
    for index in 0..8 {
        client.write(index, 100 + index);
    }
    // The old page stays mapped, as if a forked child had it: nothing may be freed.
    let child = client.turn_life();
    client.merge();
    client.until("cow_ksm", 8);
    assert_eq!(client.counter("store_bytes"), 4096, "the epoch's frame is kept");
    // What was given up after the turn belongs to the new epoch, which has to end too.
    drop(client.turn_life());
    assert_eq!(client.counter("store_bytes"), 4096);
    drop(child);
    client.until("store_bytes", 0);
}

/// Pages merge while the program opts them out: when the broker hears of the merge, they are being copied from the frame.
#[test]
fn what_is_leaving_shows_its_frame_until_it_has_left() {
    let broker = Broker::start("leaving");
    let mut client = FakeClient::new(&broker);
    let region = client.join([7; 8]);
    client.merge_and_then(|client| {
        for index in 0..8 {
            client.store_word(index, client.word(index).with_state(State::Leaving));
        }
    });
    // What was not shown after all is let go with its epoch.
    drop(client.turn_life());
    client.keeps("store_bytes", 4096, "it is being copied");
    client.leave(region, 8);
    drop(client.turn_life());
    client.until("store_bytes", 0);
}

/// Out of room, a break makes a whole stretch of shared pages Detached, most of which nobody wrote: they show their frames still, also
/// when they are held.
#[test]
fn what_is_held_in_shared_memory_shows_its_frame() {
    let broker = Broker::start("held");
    let mut client = FakeClient::new(&broker);
    client.kind = Kind::Shared;
    let hold = |client: &FakeClient| {
        for index in 0..8 {
            client.store_word(index, client.word(index).with_state(State::Held));
        }
    };
    // Seen by a scan.
    let region = client.join([7; 8]);
    assert_eq!(client.merge().pages_merged, 8);
    hold(&client);
    client.merge();
    drop(client.turn_life());
    client.keeps("store_bytes", 4096, "a scan found it held");
    client.leave(region, 8);
    drop(client.turn_life());
    client.until("store_bytes", 0);
    // Seen when the merge is answered.
    let region = client.join([8; 8]);
    client.merge_and_then(hold);
    drop(client.turn_life());
    client.keeps("store_bytes", 4096, "it was held at once");
    client.leave(region, 8);
    drop(client.turn_life());
    client.until("store_bytes", 0);
}

#[test]
fn a_closed_socket_is_not_death() {
    let broker = Broker::start("death");
    let mut witness = FakeClient::new(&broker);
    let mut client = FakeClient::new(&broker);
    client.join([5; 16]);
    let worker = std::thread::spawn(move || {
        client.merge();
        client
    });
    // The witness has no regions, so core asks nothing of it.
    let mut client = worker.join().unwrap();
    assert_eq!(client.merged(), 16);
    let life = client.life.take();
    client.send(ToBroker::Bye { reason: "test".into() });
    drop(client);
    broker.logged("client says bye");
    broker.logged("client closed its socket");
    witness.merge();
    assert_eq!(witness.counter("store_bytes"), 4096, "its life page is still mapped");
    drop(life);
    witness.until("store_bytes", 0);
    broker.logged("gone; nothing shows its frames");
}

#[test]
fn a_killed_process_frees_everything() {
    let broker = Broker::start("killed");
    let mut witness = FakeClient::new(&broker);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_merges", "--nocapture", "--ignored"])
        .env("KSMRS_TEST_DIR", &broker.path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    witness.until("pages_sharing", 30);
    child.kill().unwrap();
    child.wait().unwrap();
    witness.until("frames", 0);
    witness.until("store_bytes", 0);
    witness.until("clients", 1);
}

#[test]
#[ignore = "run as a process by a_killed_process_frees_everything"]
fn child_that_merges() {
    let Some(path) = std::env::var_os("KSMRS_TEST_DIR") else {
        return;
    };
    let mut client = FakeClient::over(connect(path.as_ref()));
    client.join([3; 31]);
    loop {
        client.merge();
    }
}

#[test]
fn knobs_are_the_kernels() {
    let broker = Broker::start("knobs");
    let mut client = FakeClient::new(&broker);
    let advised = client
        .ask(Question::Set {
            knob: "pages_to_scan".into(),
            value: "77".into(),
        })
        .unwrap_err();
    assert_eq!(advised.0, ErrorCode::InvalidValue);
    assert!(advised.1.contains("advisor_mode=none"), "{advised:?}");
    client.set("advisor_mode", "none");
    client.set("pages_to_scan", "77");
    assert_eq!(
        client.ask(Question::Get("pages_to_scan".into())),
        Ok(Answer::Value("77".into()))
    );
    let invalid = client
        .ask(Question::Set {
            knob: "run".into(),
            value: "3".into(),
        })
        .unwrap_err();
    assert_eq!(invalid.0, ErrorCode::InvalidValue);
    assert!(invalid.1.contains("run"), "{invalid:?}");
    assert_eq!(
        client.ask(Question::Get("nonsense".into())).unwrap_err().0,
        ErrorCode::UnknownKnob
    );
    let Answer::Knobs(knobs) = client.ask(Question::Knobs).unwrap() else {
        panic!()
    };
    assert!(
        knobs
            .iter()
            .any(|(name, value)| name == "sleep_millisecs" && value == "20"),
        "{knobs:?}"
    );
    let Answer::Status(status) = client.ask(Question::Status).unwrap() else {
        panic!()
    };
    assert_eq!(
        (status.pid, status.clients, status.embedded),
        (std::process::id(), 1, false)
    );
}

#[test]
fn run_2_unmerges_everything() {
    let broker = Broker::start("run2");
    let mut client = FakeClient::new(&broker);
    client.join([1, 1, 2, 2, 0, 0]);
    client.merge();
    assert_eq!(client.merged(), 4);
    client.set("run", "2");
    client.until("pages_sharing", 0);
    client.until("ksm_zero_pages", 0);
    assert_eq!(client.merged(), 0);
    drop(client.turn_life());
    client.until("frames", 0);
    client.set("run", "1");
    assert_eq!(client.merge().pages_merged, 6);
}

#[test]
fn a_merge_ends_at_its_timeout() {
    let broker = Broker::start("timeout");
    let mut idle = FakeClient::new(&broker);
    idle.join([1; 4]);
    let mut asking = FakeClient::new(&broker);
    // The other client owes an answer and never gives one.
    let Answer::Merged(report) = asking.ask(Question::Merge { timeout_ms: Some(50) }).unwrap() else {
        panic!()
    };
    assert!(!report.finished && report.elapsed_ms >= 50, "{report:?}");
}

#[test]
fn a_second_broker_finds_the_first() {
    let broker = Broker::start("second");
    let client = broker.connect();
    let options = BrokerOptions {
        runtime_dir: Some(broker.path.clone()),
        ..Default::default()
    };
    assert_eq!(run_broker(&options, || ()).unwrap(), Started::Another);
    drop(client);
}

#[test]
fn a_runtime_directory_that_is_a_link_is_refused() {
    let real = std::env::temp_dir().join(format!("ksmrs-link-{}", std::process::id()));
    let link = real.with_extension("link");
    drop(RuntimeDir::open(&real).unwrap());
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let options = BrokerOptions {
        runtime_dir: Some(link.clone()),
        ..Default::default()
    };
    let error = run_broker(&options, || ()).unwrap_err();
    assert!(error.to_string().contains("link"), "{error}");
    std::fs::remove_file(&link).unwrap();
    std::fs::remove_dir_all(&real).unwrap();
}

#[test]
fn the_daemon_outlives_its_launcher_and_is_replaced_when_killed() {
    let path = std::env::temp_dir().join(format!("ksmrs-daemon-{}", std::process::id()));
    let launch = || {
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "child_that_starts_a_daemon",
                "--nocapture",
                "--ignored",
                "--test-threads=1",
            ])
            .env("KSMRS_TEST_DIR", &path)
            .env("KSMRS_IDLE_SECONDS", "2")
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
    };
    let pid_of = |client: &mut FakeClient| {
        let Answer::Status(status) = client.ask(Question::Status).unwrap() else {
            panic!()
        };
        assert!(
            status.resident_bytes > 0 && status.resident_bytes < 64 << 20,
            "{status:?}"
        );
        status.pid
    };
    launch();
    let mut client = FakeClient::over(connect(&path));
    let first = pid_of(&mut client);
    assert_ne!(first, std::process::id());
    launch();
    assert_eq!(pid_of(&mut client), first, "a second launch finds the first");
    let pid = rustix::process::Pid::from_raw(first as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let ends = std::time::Instant::now();
    while fake::receive(&client.connection).is_ok() {
        assert!(ends.elapsed() < PATIENCE);
    }
    launch();
    let mut next = FakeClient::over(connect(&path));
    assert_ne!(pid_of(&mut next), first);
    drop(next);
    let directory = RuntimeDir::open(&path).unwrap();
    // Asking by connecting would keep it from being idle.
    wait_for(|| directory.lock().unwrap().is_some(), || "the idle exit".into());
    assert!(directory.connect().unwrap().is_none());
    std::fs::remove_dir_all(&path).unwrap();
}

#[test]
#[ignore = "run as a process by the_daemon_outlives_its_launcher_and_is_replaced_when_killed"]
fn child_that_starts_a_daemon() {
    let Some(path) = std::env::var_os("KSMRS_TEST_DIR") else {
        return;
    };
    let options = BrokerOptions {
        runtime_dir: Some(path.into()),
        store_slots: Some(fake::STORE_SLOTS),
        ..Default::default()
    };
    std::process::exit(ksmrs_broker::start_daemon(&options).unwrap());
}

#[test]
fn an_embedded_broker_serves_its_client() {
    let (ours, theirs) = Peer::pair().unwrap();
    let options = BrokerOptions {
        store_slots: Some(fake::STORE_SLOTS),
        ..Default::default()
    };
    let fd = std::os::fd::AsFd::as_fd(&theirs).try_clone_to_owned().unwrap();
    drop(theirs);
    let thread = std::thread::spawn(move || ksmrs_broker::serve_embedded(fd, &options));
    let mut client = FakeClient::over(ksmrs_broker::wire::ClientEnd::over(ours));
    client.join([9; 5]);
    assert_eq!(client.merge().pages_merged, 5);
    client
        .connection
        .send(&ToBroker::Bye { reason: "done".into() }, None, Wait::Yes)
        .unwrap();
    drop(client);
    thread.join().unwrap().unwrap();
}

#[test]
fn an_extent_that_merges_whole_is_filled_whole() {
    let broker = Broker::start("extent");
    let mut client = FakeClient::new(&broker);
    // The fake's position modulo 512 is its word's, so both halves are whole extents.
    let (_, first_word) = client.join((0..1024).map(|i| i % 512 + 1));
    assert_eq!(first_word % 512, 0);
    assert_eq!(client.merge().pages_merged, 1024);
    client.verify();
    let extents = client.counter("frames_huge") + client.counter("frames_huge_declined");
    assert_eq!(extents, 1, "huge or not, as this kernel has it");
    assert_eq!(client.counter("store_bytes"), 2 << 20);
    let slots: Vec<u32> = (0..512).map(|i| client.word(i).frame().unwrap().1.0).collect();
    assert!(
        slots.windows(2).all(|pair| pair[0] + 1 == pair[1]) && slots[0].is_multiple_of(512),
        "one run"
    );
}
