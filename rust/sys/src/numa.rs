//! NUMA nodes: on which one a page's memory lies, and on which one the kernel should look for memory first.
//!
//! Asked only while nodes count (`merge_across_nodes=0`). `move_pages` without targets moves nothing and tells where pages are, of the
//! own process, without a privilege; the answer may be old when it arrives, which costs nothing but a merge across nodes. A
//! preference is the calling thread's and only a preference: with no memory left there, or no such node, memory comes from another.
//! Never moves a page.
//!
//! A build with mutants can be told other nodes than the machine has: `KSMRS_FAKE_NODES` names a file of lines `start end node`,
//! addresses of this process and a node, all decimal. It is read each time; a page in none of the lines is on node 0.

use crate::error::{SysError, last_errno};
use crate::mapping::View;
use crate::protocol::{Page, Span};
use core::ffi::c_int;
use core::marker::PhantomData;
use libc::{MPOL_PREFERRED, c_ulong};
use rustix::io::Errno;

/// The node of a page without memory, or of one that nobody may ask for; also of one whose number does not fit.
pub const NO_NODE: u8 = u8::MAX;
/// Nodes that the kernel may be built for, and so the bits of each mask that it gives out (`CONFIG_NODES_SHIFT` is 10 at most).
const NODES: usize = 1024;
const MASK_WORDS: usize = NODES / c_ulong::BITS as usize;

/// Where the pages of spans are.
#[derive(Default)]
pub(crate) struct Nodes {
    addresses: Vec<usize>,
    answers: Vec<c_int>,
    /// Of the span that was asked for last, each page's.
    found: Vec<u8>,
    /// The kernel does not answer: then all pages have this.
    otherwise: Option<u8>,
    refusal: Option<SysError>,
}

impl Nodes {
    /// Forgets all pages, and makes room for this many.
    pub(crate) fn reset(&mut self, pages: u32) {
        self.found.clear();
        self.found.resize(pages as usize, NO_NODE);
    }

    /// The node of a page, counted from the span's first.
    pub(crate) fn of(&self, at: u32) -> u8 {
        self.found[at as usize]
    }

    /// Why the kernel does not tell, once, if it does not and there are several nodes: then no page has one.
    pub(crate) fn take_refusal(&mut self) -> Option<SysError> {
        self.refusal.take()
    }

    /// The node of a page, counted from the span's first, that was read just now and so has memory, if it had none before.
    pub(crate) fn of_read(&mut self, view: &View, page: Page, at: u32) -> u8 {
        if self.of(at) == NO_NODE {
            self.ask(view, Span::one(page), Page(page.0 - at));
        }
        self.of(at)
    }

    /// Asks for the pages of a span, and notes them counted from `from`.
    pub(crate) fn ask(&mut self, view: &View, span: Span, from: Page) {
        self.addresses.clear();
        self.addresses.extend(span.iter().map(|page| view.page(page).addr()));
        self.answers.clear();
        self.answers.resize(self.addresses.len(), -1);
        if self.otherwise.is_none()
            && let Err(error) = where_are(&self.addresses, &mut self.answers)
        {
            let node = only_node();
            self.refusal = node.is_none().then_some(error);
            self.otherwise = Some(node.unwrap_or(NO_NODE));
        }
        for (at, answer) in (span.first.0 - from.0..).zip(&self.answers) {
            let told = u8::try_from(*answer).unwrap_or(NO_NODE);
            self.found[at as usize] = self.otherwise.unwrap_or(told);
        }
    }
}

/// A node for each address, or a negative errno: no memory (ENOENT), or the shared page of zeros (EFAULT).
fn where_are(addresses: &[usize], answers: &mut [c_int]) -> Result<(), SysError> {
    assert_eq!(addresses.len(), answers.len(), "an answer for each address");
    #[cfg(feature = "mutants")]
    if let Some(nodes) = fake::Nodes::read() {
        for (address, answer) in addresses.iter().zip(answers) {
            *answer = nodes.of(*address);
        }
        return Ok(());
    }
    const THIS_PROCESS: c_int = 0;
    const NO_FLAGS: c_int = 0;
    // SAFETY: the kernel reads the addresses, which it looks up and never follows, and writes as many answers; without a list of
    // nodes it moves nothing.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            THIS_PROCESS,
            addresses.len(),
            addresses.as_ptr(),
            core::ptr::null::<c_int>(),
            answers.as_mut_ptr(),
            NO_FLAGS,
        )
    };
    if answer < 0 {
        return Err(SysError::call("move_pages", "the pages of a region")(last_errno()));
    }
    Ok(())
}

/// The machine's node, if it has one; 0 where the kernel knows no nodes.
fn only_node() -> Option<u8> {
    match std::fs::read_to_string("/sys/devices/system/node/online") {
        Ok(online) => online.trim().parse().ok(),
        Err(error) => (error.kind() == std::io::ErrorKind::NotFound).then_some(0),
    }
}

/// A thread's memory policy, as the kernel says it.
struct Policy {
    mode: c_int,
    nodes: [c_ulong; MASK_WORDS],
}

impl Policy {
    /// The calling thread's.
    fn current() -> Result<Policy, Errno> {
        let mut policy = Policy {
            mode: 0,
            nodes: [0; MASK_WORDS],
        };
        const OF_THREAD: c_ulong = 0;
        // SAFETY: the kernel writes a mode and a mask of so many bits, for which there is room.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut policy.mode,
                policy.nodes.as_mut_ptr(),
                NODES,
                0,
                OF_THREAD,
            )
        };
        if answer == 0 { Ok(policy) } else { Err(last_errno()) }
    }

    /// Makes it the calling thread's. The kernel counts one bit of the mask less than it is told.
    fn set(&self) -> Result<(), Errno> {
        // SAFETY: the kernel reads a mask of so many bits.
        let answer = unsafe { libc::syscall(libc::SYS_set_mempolicy, self.mode, self.nodes.as_ptr(), NODES + 1) };
        if answer == 0 { Ok(()) } else { Err(last_errno()) }
    }
}

/// While it lives, the kernel looks on one node first for memory that this thread needs; then as before.
pub struct Preferred {
    before: Policy,
    /// It is of the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Preferred {
    /// Prefers a node.
    ///
    /// # Errors
    /// EINVAL where the machine has no such node, EPERM under a seccomp filter, ENOSYS in a kernel without nodes. Nothing changes
    /// then.
    pub fn node(node: u8) -> Result<Preferred, SysError> {
        let before = Policy::current().map_err(SysError::call("get_mempolicy", "this thread"))?;
        let mut nodes = [0; MASK_WORDS];
        nodes[usize::from(node) / c_ulong::BITS as usize] = 1 << (u32::from(node) % c_ulong::BITS);
        let policy = Policy {
            mode: MPOL_PREFERRED,
            nodes,
        };
        policy.set().map_err(SysError::call("set_mempolicy", "this thread"))?;
        Ok(Preferred {
            before,
            _thread: PhantomData,
        })
    }
}

impl Drop for Preferred {
    fn drop(&mut self) {
        // It was the policy a moment ago. Were it refused all the same, memory would still come from where there is some.
        let _ = self.before.set();
    }
}

#[cfg(feature = "mutants")]
mod fake {
    use core::ffi::c_int;
    use core::ops::Range;
    use std::path::PathBuf;
    use std::sync::OnceLock;

    /// What the file says.
    pub(super) struct Nodes(Vec<(Range<usize>, c_int)>);

    impl Nodes {
        /// `None` where no file is named; a line that is none does not count.
        pub(super) fn read() -> Option<Nodes> {
            static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
            let file = FILE.get_or_init(|| std::env::var_os("KSMRS_FAKE_NODES").map(PathBuf::from));
            let text = std::fs::read_to_string(file.as_ref()?).unwrap_or_default();
            Some(Nodes::parse(&text))
        }

        pub(super) fn parse(text: &str) -> Nodes {
            let line = |line: &str| {
                let mut numbers = line.split_whitespace();
                let mut number = || numbers.next()?.parse::<usize>().ok();
                let (start, end, node) = (number()?, number()?, number()?);
                Some((start..end, c_int::try_from(node).ok()?))
            };
            Nodes(text.lines().filter_map(line).collect())
        }

        pub(super) fn of(&self, address: usize) -> c_int {
            let found = self.0.iter().find(|(pages, _)| pages.contains(&address));
            found.map_or(0, |(_, node)| *node)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use crate::protocol::Kind;

    const WRITTEN: u32 = 3;
    const UNTOUCHED: u32 = 5;

    /// A mapping of which one page has memory, and where the kernel says that is.
    fn one_page() -> (Mapping, Vec<u8>) {
        let mapping = Mapping::create(8, Kind::Private).unwrap();
        let view = mapping.view();
        // SAFETY: a page of this test's own.
        unsafe { view.page(Page(WRITTEN)).cast_mut().write_volatile(7) };
        let mut nodes = Nodes::default();
        nodes.reset(8);
        let span = Span {
            first: Page(2),
            pages: 4,
        };
        nodes.ask(&view, span, Page(0));
        assert_eq!(nodes.otherwise, None, "{:?}", nodes.refusal);
        let found = (0..8).map(|at| nodes.of(at)).collect();
        (mapping, found)
    }

    /// The nodes that have memory of the mapping at an address, as `N0=2` in its line of numa_maps, which says where it begins.
    fn in_numa_maps(address: usize) -> Vec<u8> {
        let text = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let start = |line: &&str| usize::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
        let line = text
            .lines()
            .filter(|line| start(line) <= address)
            .max_by_key(start)
            .unwrap();
        let nodes = line.split_whitespace().filter_map(|word| word.strip_prefix('N'));
        nodes.filter_map(|word| word.split('=').next()?.parse().ok()).collect()
    }

    #[test]
    fn a_page_is_where_numa_maps_says() {
        let (mapping, found) = one_page();
        let nodes = in_numa_maps(mapping.view().page(Page(WRITTEN)).addr());
        assert!(
            nodes.contains(&found[WRITTEN as usize]),
            "{found:?}, numa_maps: {nodes:?}"
        );
        assert_eq!(found[UNTOUCHED as usize], NO_NODE, "it has no memory");
        assert_eq!((found[1], found[6]), (NO_NODE, NO_NODE), "not asked for");
        mapping.unmap();
    }

    #[test]
    fn memory_comes_from_the_node_that_is_preferred_and_then_as_before() {
        let (mapping, found) = one_page();
        mapping.unmap();
        let node = found[WRITTEN as usize];
        let before = Policy::current().unwrap();
        let preferred = Preferred::node(node).unwrap();
        let now = Policy::current().unwrap();
        assert_eq!(now.mode, MPOL_PREFERRED);
        assert_eq!(now.nodes[usize::from(node) / 64], 1 << (node % 64));
        let (mapping, found) = one_page();
        assert_eq!(found[WRITTEN as usize], node);
        mapping.unmap();
        drop(preferred);
        let after = Policy::current().unwrap();
        assert_eq!((after.mode, after.nodes), (before.mode, before.nodes));
    }

    #[test]
    fn a_policy_of_before_is_put_back() {
        std::thread::spawn(|| {
            let outer = Preferred::node(0).unwrap();
            drop(Preferred::node(0).unwrap());
            assert_eq!(Policy::current().unwrap().mode, MPOL_PREFERRED, "the outer one still");
            drop(outer);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_node_that_is_not_there_is_refused_and_changes_nothing() {
        let before = Policy::current().unwrap();
        let refusal = Preferred::node(NO_NODE).map(drop).unwrap_err();
        assert_eq!(refusal.errno(), Some(libc::EINVAL), "{refusal}");
        assert_eq!(Policy::current().unwrap().mode, before.mode);
    }

    #[test]
    fn a_page_that_was_read_is_asked_for_again() {
        let mapping = Mapping::create(8, Kind::Shared).unwrap();
        let view = mapping.view();
        let mut nodes = Nodes::default();
        nodes.reset(6);
        nodes.ask(
            &view,
            Span {
                first: Page(2),
                pages: 6,
            },
            Page(2),
        );
        assert_eq!(nodes.of(3), NO_NODE, "nobody has touched it");
        let mut bytes = [0; crate::object::PAGE_SIZE];
        view.copy_out(Page(5), &mut bytes);
        assert_eq!(nodes.of_read(&view, Page(5), 3), nodes.of(3));
        assert_ne!(nodes.of(3), NO_NODE);
        assert_eq!(nodes.of(4), NO_NODE, "nor this one");
        mapping.unmap();
    }

    #[cfg(feature = "mutants")]
    #[test]
    fn a_file_may_say_otherwise() {
        let nodes = fake::Nodes::parse("4096 12288 1\nno line\n12288 16384 7\n");
        let found = [0, 4096, 12287, 12288, 16384].map(|address| nodes.of(address));
        assert_eq!(found, [0, 1, 1, 7, 0]);
    }
}
