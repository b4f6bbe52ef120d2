//! Tunables: the knobs, with the kernel's names and ranges.
//!
//! Values come and go as text, as under /sys/kernel/mm/ksm; a refused value changes nothing. Defaults differ where the
//! kernel's are known to be poor. Never acts on a knob: `decide.rs` and the trees read them.

use crate::advisor;
use serde::{Deserialize, Serialize};

/// Why a knob was not set or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunableError {
    /// There is no such knob.
    #[error("unknown knob {knob:?}; known are {known}", known = Tunables::NAMES.join(", "))]
    Unknown {
        /// As it was asked for.
        knob: String,
    },
    /// The knob cannot have that value.
    #[error("{knob} cannot be {value:?}; it takes {allowed}")]
    Invalid {
        /// The knob.
        knob: &'static str,
        /// As it was given.
        value: String,
        /// What it takes.
        allowed: String,
    },
    /// The knob cannot change while pages are merged (the kernel's EBUSY).
    #[error(
        "{knob} cannot change while {pages_shared} frames are shared and {pages_proposed} pages are on their way to one; \
         set run=2 and wait until pages_shared and pages_proposed are 0"
    )]
    Busy {
        /// The knob.
        knob: &'static str,
        /// Frames that pages show.
        pages_shared: u64,
        /// Pages that were offered one and have not answered.
        pages_proposed: u64,
    },
    /// The advisor sets `pages_to_scan`.
    #[error("pages_to_scan cannot be set while the advisor sets it; set advisor_mode=none first")]
    Advised,
}

/// Who sets `pages_to_scan`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdvisorMode {
    /// Whoever sets the knob.
    None,
    /// The advisor, so that a pass takes `advisor_target_scan_time`.
    ScanTime,
}

impl AdvisorMode {
    /// The kernel's names.
    const NAMES: [(&'static str, AdvisorMode); 2] = [("none", AdvisorMode::None), ("scan-time", AdvisorMode::ScanTime)];

    fn name(self) -> &'static str {
        match self {
            AdvisorMode::None => "none",
            AdvisorMode::ScanTime => "scan-time",
        }
    }

    fn parse(value: &str) -> Result<AdvisorMode, TunableError> {
        let known = AdvisorMode::NAMES.iter().find(|(name, _)| *name == line(value));
        known.map(|&(_, mode)| mode).ok_or_else(|| TunableError::Invalid {
            knob: "advisor_mode",
            value: value.to_owned(),
            allowed: "none or scan-time".to_owned(),
        })
    }
}

/// Pages per batch where no advisor says so: the kernel's 100 every 20 ms are 20 MB/s.
const DEFAULT_PAGES_TO_SCAN: u32 = 1024;

/// What `run` asks for.
pub(crate) mod run {
    /// Scan.
    pub(crate) const RUN: u32 = 1;
    /// Unmerge everything and stop.
    pub(crate) const UNMERGE: u32 = 2;
}

/// The knobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunables {
    /// 0 stop and keep what is merged, 1 run, 2 stop and unmerge everything.
    pub run: u32,
    /// Pages per batch, over all clients; what the advisor said last, if it is on.
    pub pages_to_scan: u32,
    /// Pause between batches.
    pub sleep_millisecs: u32,
    /// Whether pages of different NUMA nodes merge, 1 or 0.
    pub merge_across_nodes: u32,
    /// Whether zero pages merge with no memory at all.
    pub use_zero_pages: u32,
    /// References to one frame before its content gets another.
    pub max_page_sharing: u32,
    /// How often chains are pruned. Chains here lose a dup when it ends, so nothing is left to prune.
    pub stable_node_chains_prune_millisecs: u32,
    /// Whether pages that never merge are looked at less often.
    pub smart_scan: u32,
    /// Whether runs shorter than a huge page merge where that splits a huge page. Not among the kernel's knobs: it always splits.
    pub split_huge_pages: u32,
    /// Whether frames are moved so that runs join. Not among the kernel's knobs: what a page is mapped to costs it nothing.
    pub join_runs: u32,
    /// Who sets `pages_to_scan`.
    pub advisor_mode: AdvisorMode,
    /// Percent of one CPU the advisor may spend, over the broker and all clients.
    pub advisor_max_cpu: u32,
    /// Percent of one CPU that the scanner and the remapper of each client may take in the background. Not among the kernel's knobs, which
    /// has one thread for all.
    pub client_max_cpu: u32,
    /// Seconds in which the advisor wants a pass done.
    pub advisor_target_scan_time: u32,
    /// Where the advisor starts.
    pub advisor_min_pages_to_scan: u32,
    /// The advisor's upper bound of `pages_to_scan`.
    pub advisor_max_pages_to_scan: u32,
}

impl Default for Tunables {
    fn default() -> Tunables {
        Tunables {
            run: run::RUN,
            pages_to_scan: 500,
            sleep_millisecs: 20,
            merge_across_nodes: 1,
            use_zero_pages: 1,
            max_page_sharing: 256,
            stable_node_chains_prune_millisecs: 2000,
            smart_scan: 1,
            split_huge_pages: 1,
            join_runs: 1,
            advisor_mode: AdvisorMode::ScanTime,
            advisor_max_cpu: 70,
            client_max_cpu: 100,
            advisor_target_scan_time: 200,
            advisor_min_pages_to_scan: 500,
            advisor_max_pages_to_scan: 30000,
        }
    }
}

/// More than this many references would not fit a frame's 16-bit counts: a page that is detached, then broken, then given other memory
/// counts three times until its epochs are sealed.
pub(crate) const MOST_SHARING: u32 = 21_000;

/// Name, field, lowest and highest value of each numeric knob.
macro_rules! numeric_knobs {
    ($($name:ident $low:literal $high:expr),* $(,)?) => {
        impl Tunables {
            /// The knobs' names.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name),)* "advisor_mode"];

            /// A knob's value as text.
            ///
            /// # Errors
            /// [`TunableError::Unknown`].
            pub fn get(&self, knob: &str) -> Result<String, TunableError> {
                match knob {
                    $(stringify!($name) => Ok(self.$name.to_string()),)*
                    "advisor_mode" => Ok(self.advisor_mode.name().to_owned()),
                    _ => Err(TunableError::Unknown { knob: knob.to_owned() }),
                }
            }

            /// Sets a knob from text; some need that nothing is merged.
            pub(crate) fn set(&mut self, knob: &str, value: &str, in_use: InUse) -> Result<(), TunableError> {
                match knob {
                    $(stringify!($name) => {
                        let number = parse(stringify!($name), value, $low, $high)?;
                        if number != self.$name {
                            refuse_if_busy(stringify!($name), in_use)?;
                        }
                        if stringify!($name) == "pages_to_scan" && self.is_advised() {
                            return Err(TunableError::Advised);
                        }
                        self.$name = number;
                        Ok(())
                    })*
                    "advisor_mode" => {
                        self.change_mode(AdvisorMode::parse(value)?);
                        Ok(())
                    }
                    _ => Err(TunableError::Unknown { knob: knob.to_owned() }),
                }
            }
        }
    };
}

numeric_knobs! {
    run 0 2,
    pages_to_scan 0 u32::MAX,
    sleep_millisecs 0 u32::MAX,
    merge_across_nodes 0 1,
    use_zero_pages 0 1,
    max_page_sharing 2 MOST_SHARING,
    stable_node_chains_prune_millisecs 0 u32::MAX,
    smart_scan 0 1,
    split_huge_pages 0 1,
    join_runs 0 1,
    advisor_max_cpu 0 u32::MAX,
    client_max_cpu 1 200,
    advisor_target_scan_time 1 u32::MAX,
    advisor_min_pages_to_scan 0 u32::MAX,
    advisor_max_pages_to_scan 0 u32::MAX,
}

impl Tunables {
    /// Whether pages merge only with pages of the same NUMA node.
    pub fn nodes_count(&self) -> bool {
        self.merge_across_nodes == 0
    }

    /// Whether the advisor sets `pages_to_scan`.
    pub(crate) fn is_advised(&self) -> bool {
        self.advisor_mode == AdvisorMode::ScanTime
    }

    /// Another mode begins with a number of pages of its own, as in the kernel.
    fn change_mode(&mut self, mode: AdvisorMode) {
        if mode != self.advisor_mode {
            self.advisor_mode = mode;
            self.pages_to_scan = match mode {
                AdvisorMode::None => DEFAULT_PAGES_TO_SCAN,
                AdvisorMode::ScanTime => advisor::first(self),
            };
        }
    }
}

/// A value as it may be written to the kernel's files: with the end of its line.
fn line(value: &str) -> &str {
    value.strip_suffix('\n').unwrap_or(value)
}

/// Knobs that the kernel reads as yes or no (`kstrtobool`), and ours of that kind; of the others it wants a number.
const YES_OR_NO: [&str; 4] = ["use_zero_pages", "smart_scan", "split_huge_pages", "join_runs"];

fn parse(knob: &'static str, value: &str, low: u32, high: u32) -> Result<u32, TunableError> {
    let is_switch = YES_OR_NO.contains(&knob);
    let number = if is_switch {
        yes_or_no(value).map(u32::from)
    } else {
        line(value).parse().ok().filter(|number| (low..=high).contains(number))
    };
    number.ok_or_else(|| TunableError::Invalid {
        knob,
        value: value.to_owned(),
        allowed: if is_switch {
            "1, y, t, e or on, or 0, n, f, d or off".to_owned()
        } else {
            format!("{low} to {high}")
        },
    })
}

/// As the kernel's `kstrtobool`, which looks at the first letter, and at the second of "on" and "off". Those of "enabled" and "disabled"
/// it knows of late (`lib/kstrtox.c`); older kernels refuse them.
fn yes_or_no(value: &str) -> Option<bool> {
    let mut letters = value.chars().map(|letter| letter.to_ascii_lowercase());
    match (letters.next()?, letters.next()) {
        ('y' | 't' | 'e' | '1', _) | ('o', Some('n')) => Some(true),
        ('n' | 'f' | 'd' | '0', _) | ('o', Some('f')) => Some(false),
        _ => None,
    }
}

/// What forbids that some knobs change.
#[derive(Clone, Copy, Default)]
pub(crate) struct InUse {
    pub(crate) pages_shared: u64,
    pub(crate) pages_proposed: u64,
}

fn refuse_if_busy(knob: &'static str, in_use: InUse) -> Result<(), TunableError> {
    let InUse {
        pages_shared,
        pages_proposed,
    } = in_use;
    let busy = match knob {
        "max_page_sharing" => pages_shared > 0,
        // Who is on its way to a frame would show one of another node than its own.
        "merge_across_nodes" => pages_shared + pages_proposed > 0,
        _ => false,
    };
    if busy {
        return Err(TunableError::Busy {
            knob,
            pages_shared,
            pages_proposed,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: InUse = InUse {
        pages_shared: 4,
        pages_proposed: 0,
    };

    #[test]
    fn every_knob_reads_back_what_was_set() {
        let mut tunables = Tunables::default();
        tunables.set("advisor_mode", "none", SHARED).unwrap();
        let before = tunables.clone();
        for &knob in Tunables::NAMES {
            let value = tunables.get(knob).unwrap();
            assert_eq!(tunables.set(knob, &value, SHARED), Ok(()));
        }
        assert_eq!(tunables, before);
        tunables.set("pages_to_scan", "77\n", InUse::default()).unwrap();
        assert_eq!(tunables.get("pages_to_scan").unwrap(), "77");
    }

    #[test]
    fn pages_to_scan_is_the_advisors_while_it_is_on() {
        let mut tunables = Tunables::default();
        assert_eq!(tunables.get("advisor_mode").unwrap(), "scan-time");
        for value in ["77", "500"] {
            let refusal = tunables.set("pages_to_scan", value, InUse::default()).unwrap_err();
            assert_eq!(
                refusal.to_string(),
                "pages_to_scan cannot be set while the advisor sets it; set advisor_mode=none first"
            );
        }
        tunables.set("advisor_mode", "scan-time\n", InUse::default()).unwrap();
        assert_eq!(tunables, Tunables::default());
        tunables.set("advisor_mode", "none", InUse::default()).unwrap();
        assert_eq!(tunables.pages_to_scan, DEFAULT_PAGES_TO_SCAN);
        tunables.set("pages_to_scan", "77", InUse::default()).unwrap();
        tunables.set("advisor_mode", "none", InUse::default()).unwrap();
        assert_eq!(tunables.pages_to_scan, 77, "the same mode changes nothing");
        tunables
            .set("advisor_min_pages_to_scan", "800", InUse::default())
            .unwrap();
        tunables.set("advisor_mode", "scan-time", InUse::default()).unwrap();
        assert_eq!(tunables.pages_to_scan, 800);
    }

    #[test]
    fn yes_and_no_are_read_as_the_kernel_does() {
        let mut tunables = Tunables::default();
        for knob in YES_OR_NO {
            for (value, is) in [
                ("n", 0),
                ("Yes", 1),
                ("off", 0),
                ("on\n", 1),
                ("false", 0),
                ("True", 1),
                ("disabled", 0),
                ("Enabled", 1),
                ("00", 0),
                ("1", 1),
            ] {
                tunables.set(knob, value, SHARED).unwrap();
                assert_eq!(tunables.get(knob).unwrap(), is.to_string(), "{knob}={value}");
            }
            for value in ["2", "", "o", "oh", "-1", "maybe"] {
                let refusal = tunables.set(knob, value, InUse::default()).unwrap_err();
                assert!(
                    refusal
                        .to_string()
                        .ends_with("it takes 1, y, t, e or on, or 0, n, f, d or off"),
                    "{refusal}"
                );
            }
        }
        assert!(tunables.set("run", "y", InUse::default()).is_err(), "a number");
        assert!(
            tunables.set("merge_across_nodes", "n", InUse::default()).is_err(),
            "a number there too"
        );
    }

    #[test]
    fn knobs_without_effect_of_their_own_have_the_kernels_range() {
        let mut tunables = Tunables::default();
        for (value, fits) in [("0", true), ("4294967295", true), ("4294967296", false), ("-1", false)] {
            for knob in ["stable_node_chains_prune_millisecs", "advisor_max_cpu"] {
                assert_eq!(tunables.set(knob, value, SHARED).is_ok(), fits, "{knob}={value}");
            }
        }
    }

    #[test]
    fn a_refusal_names_knob_value_and_range_and_changes_nothing() {
        let mut tunables = Tunables::default();
        let refusal = tunables.set("run", "3", InUse::default()).unwrap_err();
        assert_eq!(refusal.to_string(), "run cannot be \"3\"; it takes 0 to 2");
        for (knob, value) in [
            ("run", "-1"),
            ("run", ""),
            ("max_page_sharing", "1"),
            ("sleep_millisecs", "4294967296"),
        ] {
            assert!(
                matches!(
                    tunables.set(knob, value, InUse::default()),
                    Err(TunableError::Invalid { .. })
                ),
                "{knob}={value}"
            );
        }
        assert!(matches!(
            tunables.set("advisor_mode", "[none] scan-time", InUse::default()),
            Err(TunableError::Invalid { .. })
        ));
        assert!(matches!(
            tunables.set("max_page_sharing", "9", SHARED),
            Err(TunableError::Busy { pages_shared: 4, .. })
        ));
        assert!(matches!(
            tunables.set("pages", "9", InUse::default()),
            Err(TunableError::Unknown { .. })
        ));
        let proposed = InUse {
            pages_shared: 0,
            pages_proposed: 2,
        };
        for in_use in [SHARED, proposed] {
            let refusal = tunables.set("merge_across_nodes", "0", in_use).unwrap_err();
            assert_eq!(
                refusal.to_string(),
                format!(
                    "merge_across_nodes cannot change while {} frames are shared and {} pages are on their way to one; \
                     set run=2 and wait until pages_shared and pages_proposed are 0",
                    in_use.pages_shared, in_use.pages_proposed
                )
            );
            assert_eq!(tunables.set("merge_across_nodes", "1", in_use), Ok(()), "it is 1");
        }
        assert_eq!(tunables, Tunables::default());
    }
}
