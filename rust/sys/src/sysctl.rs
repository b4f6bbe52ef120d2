//! The kernel's own knobs, as far as they are numbers. Only reads them.

use std::path::Path;

/// A knob below /proc/sys, such as `vm/max_map_count`; `None` where it cannot be read.
pub fn read(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
    text.trim().parse().ok()
}

/// How many mappings the kernel lets a process have (`vm.max_map_count`); its own default where it does not say.
pub fn max_map_count() -> usize {
    const DEFAULT: usize = 65_530;
    read("vm/max_map_count").map_or(DEFAULT, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_or_nothing() {
        assert!(read("vm/max_map_count").unwrap() > 0);
        assert_eq!(read("kernel/ostype"), None, "no number");
        assert_eq!(read("no/such"), None);
    }
}
