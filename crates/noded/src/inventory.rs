//! What the node holds in the kernel, counted from outside of its own books: printed on the console when the node
//! is ready and each time its last VM has ended, so that anybody can compare. Called by [`crate::run`]; frees
//! nothing.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Looks after each end, one a second: the kernel lets go of all that a VM held within two or three. If it does
/// not, that was said, and to say it again is no news.
const LOOKS: u32 = 10;
/// Memory that the kernel may keep for the next VM in its slabs, MiB: an eighth of what the smallest VM has.
const SLACK_MIB: u64 = 8;

/// Size of a page of x86-64, KiB.
const PAGE_KIB: u64 = 4;

/// Numbers of things, and what they leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// This program and all that descends from it, the dead that nobody waited for, too.
    pub processes: usize,
    /// VMs' network interfaces.
    pub taps: usize,
    /// VMs' cgroups.
    pub cgroups: usize,
    /// Memory that programs could have, MiB.
    pub free_mib: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processes, taps, cgroups, free_mib } = self;
        write!(f, "{processes} processes, {taps} taps, {cgroups} cgroups, {free_mib} MiB free")
    }
}

impl Counts {
    /// Counts now. What cannot be read counts as none.
    fn now(cgroups: &Path) -> Self {
        let taps = names(Path::new("/sys/class/net")).into_iter().filter(|name| is_tap(name));
        let is_group = |name: &String| cgroups.join(name).is_dir();
        Self {
            processes: family(std::process::id(), &processes()),
            taps: taps.count(),
            cgroups: names(cgroups).iter().filter(|name| is_group(name)).count(),
            free_mib: available_mib(),
        }
    }

    /// Whether nothing is left of what came after `first`.
    fn is_as(&self, first: &Self) -> bool {
        let things = |counts: &Self| (counts.processes, counts.taps, counts.cgroups);
        things(self) == things(first) && self.free_mib + SLACK_MIB >= first.free_mib
    }
}

/// When to count, and what was found.
pub struct Inventory {
    cgroups: PathBuf,
    /// What there was when the node was ready.
    at_first: Option<Counts>,
    printed: Option<Counts>,
    looks_left: u32,
}

impl Inventory {
    /// For a node whose VMs' cgroups are made in `cgroups`. The first look is due.
    pub fn new(cgroups: &Path) -> Self {
        Self { cgroups: cgroups.to_owned(), at_first: None, printed: None, looks_left: LOOKS }
    }

    /// Something ended: looks are due.
    pub fn disturb(&mut self) {
        self.printed = None;
        self.looks_left = LOOKS;
    }

    /// Counts if that is due, and prints what is new, until all is as it was at first. No VM lives now.
    pub fn look(&mut self) {
        if self.looks_left == 0 {
            return;
        }
        let counts = Counts::now(&self.cgroups);
        let is_as_at_first = counts.is_as(self.at_first.get_or_insert(counts));
        self.looks_left = if is_as_at_first { 0 } else { self.looks_left - 1 };
        if self.printed.replace(counts) != Some(counts) {
            println!("onde: idle: {counts}");
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Whether an interface is a VM's (see [`crate::vm`]), and not the filter's own.
fn is_tap(name: &str) -> bool {
    let number = name.strip_prefix("onde-").unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// All processes, each with its parent.
fn processes() -> Vec<(u32, u32)> {
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        parse_parent(&stat)
    };
    let pids = names(Path::new("/proc")).into_iter().filter_map(|name| name.parse().ok());
    pids.filter_map(|pid| Some((pid, parent(pid)?))).collect()
}

/// Field 4 of proc_pid_stat(5). The name before it may hold spaces and parentheses.
fn parse_parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Number of processes that descend from `root`, with itself.
fn family(root: u32, processes: &[(u32, u32)]) -> usize {
    let mut found = HashSet::from([root]);
    // Ends: each turn but the last finds one more of a fixed number.
    loop {
        let count = found.len();
        for (pid, parent) in processes {
            if found.contains(parent) {
                found.insert(*pid);
            }
        }
        if found.len() == count {
            return count;
        }
    }
}

/// Memory that programs could have now, MiB: what the kernel says (proc_meminfo(5)), and the free pages on lists
/// of each processor, which it leaves out. A VM that ends fills those by up to 18 MiB a processor.
fn available_mib() -> u64 {
    let text = |file| fs::read_to_string(file).unwrap_or_default();
    let (memory, zones) = (text("/proc/meminfo"), text("/proc/zoneinfo"));
    let line = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    (kib.unwrap_or(0) + listed_pages(&zones) * PAGE_KIB) / 1024
}

/// Sum of the lines `count: N` in proc_zoneinfo(5): one for each zone and processor.
fn listed_pages(zones: &str) -> u64 {
    let counts = zones.lines().filter_map(|line| line.trim().strip_prefix("count:"));
    counts.filter_map(|count| count.trim().parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_children_of_children_and_nobody_else() {
        let processes = [(1, 0), (2, 0), (7, 2), (30, 20), (20, 1), (10, 1)];
        assert_eq!(family(1, &processes), 4);
        assert_eq!(family(2, &processes), 2);
        assert_eq!(family(7, &processes), 1);
    }

    #[test]
    fn reads_parents_and_names() {
        let zones = "Node 0, zone DMA32\n  pages free 9\n  pagesets\n    cpu: 0\n      count: 12\n      high:  378\n    \
            cpu: 1\n      count: 30\n";
        assert_eq!(listed_pages(zones), 42);
        assert_eq!(parse_parent("12 (a) b) (c) S 7 12 12 0"), Some(7));
        assert_eq!(parse_parent("12 (a"), None);
        let taps = ["onde-1", "onde-42", "onde-", "onde-filter", "onde0", "eth0"].map(is_tap);
        assert_eq!(taps, [true, true, false, false, false, false]);
    }

    #[test]
    fn a_kernel_may_keep_a_little_memory_and_nothing_else() {
        let first = Counts { processes: 2, taps: 0, cgroups: 0, free_mib: 1000 };
        let check = |now: Counts, expect| assert_eq!(now.is_as(&first), expect, "{now}");
        check(first, true);
        check(Counts { free_mib: 992, ..first }, true);
        check(Counts { free_mib: 1100, ..first }, true);
        check(Counts { free_mib: 991, ..first }, false);
        check(Counts { processes: 3, ..first }, false);
        check(Counts { taps: 1, ..first }, false);
        check(Counts { cgroups: 1, ..first }, false);
    }

    #[test]
    fn stops_looking_when_all_is_as_at_first() {
        let folder = std::env::temp_dir().join(format!("onde-inventory-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let mut inventory = Inventory::new(&folder);
        inventory.look();
        assert_eq!((inventory.looks_left, inventory.at_first.unwrap().cgroups), (0, 0));
        fs::create_dir(folder.join("vm-1")).unwrap();
        inventory.disturb();
        inventory.look();
        assert_eq!((inventory.looks_left, inventory.printed.unwrap().cgroups), (LOOKS - 1, 1));
        fs::remove_dir_all(&folder).unwrap();
    }
}
