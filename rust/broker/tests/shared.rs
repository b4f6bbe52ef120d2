//! Shared memory of a program's own with a real client: who opens the object finds every byte in it.

mod regions;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use ksmrs_broker::client::{self, Region};
use ksmrs_sys::State;
use ksmrs_sys::foreign::Foreign;
use regions::{BrokerProcess, PAGE, PATIENCE, alone, count, wait_for};
use rustix::fs::Mode;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::shm;

/// Of a few contents, so that pages merge with each other.
fn byte(page: usize) -> u8 {
    (page % 64 + 1) as u8
}

/// A POSIX object, mapped once, unlinked at its end.
struct Named {
    name: String,
    address: usize,
    pages: usize,
}

impl Named {
    fn new(pages: usize) -> Named {
        let name = format!("/ksmrs-shared-test-{}", std::process::id());
        let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
        let fd = shm::open(&name, flags, Mode::RUSR | Mode::WUSR).unwrap();
        let bytes: Vec<u8> = (0..pages).flat_map(|page| [byte(page); PAGE]).collect();
        std::io::Write::write_all(&mut File::from(fd.try_clone().unwrap()), &bytes).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping where the kernel likes, which stays to the end.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), pages * PAGE, access, MapFlags::SHARED, &fd, 0) };
        // A lease wants the program to have it open.
        std::mem::forget(fd);
        Named {
            name,
            address: address.unwrap() as usize,
            pages,
        }
    }

    fn adopt(&self, pages: Range<usize>) -> Arc<Region> {
        let range = self.address + pages.start * PAGE..self.address + pages.end * PAGE;
        // SAFETY: the mapping stays as it is to the end.
        Region::adopt(unsafe { Foreign::look(range, false) }.unwrap()).unwrap()
    }

    /// How many pages whoever opens it now finds with other bytes.
    fn wrong(&self) -> usize {
        let mut outsider = File::from(shm::open(&self.name, shm::OFlags::RDONLY, Mode::empty()).unwrap());
        let mut found = vec![0; self.pages * PAGE];
        outsider.read_exact(&mut found).unwrap();
        let pages = found.chunks_exact(PAGE).enumerate();
        pages
            .filter(|(page, found)| found.iter().any(|found| *found != byte(*page)))
            .count()
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = shm::unlink(&self.name);
    }
}

/// The first region of an object is home at once, the second takes its time: the lease is both regions'.
#[test]
fn who_opens_an_object_waits_for_all_regions_over_it() {
    alone("who_opens_an_object_waits_for_all_regions_over_it", 60, || {
        let mut broker = Some(BrokerProcess::start());
        let named = Named::new(8192);
        let regions = [named.adopt(0..16), named.adopt(16..named.pages)];
        for killed in [false, true] {
            wait_for("merging", || {
                let _ = client::merge(Some(PATIENCE), &mut || false);
                regions.iter().map(|region| count(region, State::Merged)).sum::<usize>() > named.pages - 64
            });
            if killed {
                drop(broker.take());
            } else {
                client::disconnect().unwrap();
            }
            assert_eq!(named.wrong(), 0, "broker killed: {killed}");
            if !killed {
                client::connect().unwrap();
            }
        }
    });
}
