//! Regions of real memory for the tests: contents by seed, processes of their own for what may hang or crash, and a broker that
//! can be stopped.
//!
//! Relies on the test binary being started again with one test's name. Every process it starts ends by its id, at the latest
//! when its time is up.
#![allow(dead_code, reason = "each test file uses its part")]

use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ksmrs_broker::client::{self, ConnectOptions, Kind, Region};
use ksmrs_broker::runtime_dir::RuntimeDir;
use ksmrs_broker::{BrokerOptions, run_broker};
use ksmrs_sys::State;
use ksmrs_sys::foreign::Foreign;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

pub const PAGE: usize = 4096;
/// Long enough for any machine; nothing waits for it to pass.
pub const PATIENCE: Duration = Duration::from_secs(30);
const ALONE: &str = "KSMRS_TEST_ALONE";
const DIRECTORY: &str = "KSMRS_TEST_DIR";

/// Runs the test of this name in a process of its own, which has so long to end well.
pub fn alone(test: &str, seconds: u64, program: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some_and(|running| running == test) {
        return program();
    }
    let path = std::env::temp_dir().join(format!("ksmrs-{test}-{}", std::process::id()));
    let mut child = again(test, &path).env(ALONE, test).spawn().unwrap();
    let ended = wait(&mut child, Duration::from_secs(seconds));
    let _ = std::fs::remove_dir_all(&path);
    match ended {
        Some(status) => assert!(status.success(), "{test}: {status}"),
        None => panic!("{test}: still running after {seconds} s"),
    }
}

/// This very binary, with one test to run.
fn again(test: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(DIRECTORY, path)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if begun.elapsed() > patience {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY).expect("run alone").into()
}

#[test]
#[ignore = "run as a process by BrokerProcess"]
fn a_broker() {
    if std::env::var_os(DIRECTORY).is_none() {
        return;
    }
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let options = BrokerOptions {
        runtime_dir: Some(directory()),
        idle: Some(PATIENCE),
        store_slots: None,
    };
    run_broker(&options, || ()).unwrap();
}

/// A broker as a process, and this process's client made to use it.
pub struct BrokerProcess(Child);

impl BrokerProcess {
    pub fn start() -> BrokerProcess {
        let path = directory();
        let broker = BrokerProcess(again("regions::a_broker", &path).env_remove(ALONE).spawn().unwrap());
        wait_for("a broker", || {
            path.exists() && RuntimeDir::open(&path).unwrap().connect().unwrap().is_some()
        });
        client::configure(ConnectOptions {
            runtime_dir: Some(path),
            embedded: false,
            domain: "default".into(),
            broker_command: vec!["false".into()],
            dirty_tracking: true,
        })
        .unwrap();
        broker
    }

    fn send(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    pub fn lowest_free_descriptor(&self) -> u64 {
        let is_free = |number: &u64| {
            let link = format!("/proc/{}/fd/{number}", self.0.id());
            std::fs::symlink_metadata(link).is_err()
        };
        (0..).find(is_free).unwrap()
    }

    /// Returns what the limit was.
    pub fn limit_descriptors(&self, count: u64) -> u64 {
        let limit = Rlimit {
            current: Some(count),
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        prlimit(Some(self.pid()), Resource::Nofile, limit)
            .unwrap()
            .current
            .unwrap()
    }

    pub fn stop(&self) {
        self.send(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.0.id());
        wait_for("the stop", || std::fs::read_to_string(&stat).unwrap().contains(") T "));
    }

    pub fn go_on(&self) {
        self.send(Signal::CONT);
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Maps so many pages of an object, to the end of the process; where.
pub fn mapped(object: impl AsFd, pages: usize) -> usize {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping where the kernel likes.
    let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), pages * PAGE, access, MapFlags::SHARED, object, 0) };
    start.unwrap() as usize
}

/// Opts some pages of what was [`mapped`] at an address in.
pub fn adopted(address: usize, pages: Range<usize>) -> Arc<Region> {
    let range = address + pages.start * PAGE..address + pages.end * PAGE;
    // SAFETY: the mapping stays as it is to the end.
    Region::adopt(unsafe { Foreign::look(range, false) }.unwrap()).unwrap()
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn word(address: usize, page: usize, at: usize) -> *mut u64 {
    std::ptr::with_exposed_provenance_mut(address + page * PAGE + at * 8)
}

pub fn poke(region: &Region, page: usize, at: usize, value: u64) {
    assert!(page * PAGE + at * 8 < region.len());
    // SAFETY: inside the region, which is mapped and writable as long as it lives; u64 by u64, aligned.
    unsafe { word(region.address(), page, at).write_volatile(value) }
}

pub fn peek(region: &Region, page: usize, at: usize) -> u64 {
    assert!(page * PAGE + at * 8 < region.len());
    // SAFETY: as in `poke`.
    unsafe { word(region.address(), page, at).read_volatile() }
}

fn content(seed: u64, page: usize, at: usize) -> u64 {
    seed ^ (page as u64 + 1) << 20 ^ (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub fn filled(pages: usize, kind: Kind, seed: u64) -> Arc<Region> {
    let region = Region::new(pages * PAGE, kind).unwrap();
    fill(&region, seed);
    region
}

pub fn fill(region: &Region, seed: u64) {
    for page in 0..region.len() / PAGE {
        (0..PAGE / 8).for_each(|at| poke(region, page, at, content(seed, page, at)));
    }
}

/// Pages that do not hold what was filled in. Allocates nothing, so a forked child may call it.
pub fn wrong(region: &Region, seed: u64) -> usize {
    (0..region.len() / PAGE)
        .filter(|&page| (0..PAGE / 8).any(|at| peek(region, page, at) != content(seed, page, at)))
        .count()
}

pub fn count(region: &Region, state: State) -> usize {
    let states = region.page_states();
    states.iter().filter(|found| **found == state as u8).count()
}

pub fn merge() -> client::MergeReport {
    client::merge(Some(PATIENCE), &mut || false).unwrap()
}

pub fn counter(name: &str) -> i64 {
    let counters = client::stats().unwrap();
    let found = counters.into_iter().find(|(found, _)| found == name);
    found.unwrap_or_else(|| panic!("no counter {name}")).1
}

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn alarm(seconds: u32) -> u32;
    fn _exit(status: i32) -> !;
}

/// A forked child, by its process id.
pub struct Forked(i32);

/// Forks a child that does this and ends, with the status that it returns; SIGALRM ends one that takes ten seconds.
pub fn forked(child: impl FnOnce() -> i32) -> Forked {
    // SAFETY: the child runs only what the test gave it, which takes no lock that a thread of the parent may hold, and ends by
    // _exit, so nothing of the parent is dropped or flushed twice.
    unsafe {
        match fork() {
            0 => {
                alarm(10);
                _exit(child())
            }
            pid => {
                assert!(pid > 0, "no fork");
                Forked(pid)
            }
        }
    }
}

impl Forked {
    /// Its wait status: 0 if it ended well.
    pub fn ended(self) -> i32 {
        let mut status = -1;
        // SAFETY: our own child, waited for once; the status is a local.
        let pid = unsafe { waitpid(self.0, &raw mut status, 0) };
        assert_eq!(pid, self.0);
        status
    }
}
