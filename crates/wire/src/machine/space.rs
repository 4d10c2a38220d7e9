//! How much of a machine there is: which guest-physical addresses it has, and what it takes from its node.

use super::{DISK_START, PAGE_SIZE, RAM_HIGH_START, RAM_LOW_END};

/// What a machine has of the guest-physical addresses: low RAM, high RAM, disk. Its pages are counted in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes of RAM, whole MiB.
    pub mem_bytes: u64,
    /// Bytes of disk, whole MiB; 0 for none.
    pub disk_bytes: u64,
}

impl Space {
    /// The addresses of so many MiB.
    pub fn of_mib(mem_mib: u32, disk_mib: u32) -> Self {
        Self { mem_bytes: u64::from(mem_mib) << 20, disk_bytes: u64::from(disk_mib) << 20 }
    }

    /// Start and size of the pieces of RAM; the second may be empty.
    pub fn ram(&self) -> [(u64, u64); 2] {
        let low = self.mem_bytes.min(RAM_LOW_END);
        [(0, low), (RAM_HIGH_START, self.mem_bytes - low)]
    }

    /// Start and size of all pieces; some may be empty.
    pub fn pieces(&self) -> [(u64, u64); 3] {
        let [low, high] = self.ram();
        [low, high, (DISK_START, self.disk_bytes)]
    }

    /// Whether `[address, address + size)` lies in one of them.
    pub fn holds(&self, address: u64, size: u64) -> bool {
        self.pieces().into_iter().any(|(start, all)| {
            let at = address.checked_sub(start);
            at.and_then(|at| at.checked_add(size)).is_some_and(|end| end <= all)
        })
    }

    /// Number of pages of RAM, which are counted first.
    pub fn ram_pages(&self) -> u64 {
        self.mem_bytes / PAGE_SIZE
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.ram_pages() + self.disk_bytes / PAGE_SIZE
    }

    /// Address of a page by its number.
    pub fn address(&self, page: u64) -> u64 {
        let mut at = page * PAGE_SIZE;
        for (start, size) in self.ram() {
            if at < size {
                return start + at;
            }
            at -= size;
        }
        DISK_START + at
    }

    /// Number of the page at an address.
    pub fn page(&self, address: u64) -> u64 {
        let [(_, low), (high_start, _)] = self.ram();
        let at = match address {
            DISK_START.. => address - DISK_START + self.mem_bytes,
            _ if address >= high_start => address - high_start + low,
            _ => address,
        };
        at / PAGE_SIZE
    }

    /// Bytes of the BITMAP window.
    pub fn bitmap_size(&self) -> u64 {
        self.pages().div_ceil(64) * 8
    }
}

/// Memory that a VM of `mem_mib` takes from its node, MiB: its RAM, the 16 MiB of FROZEN (BOOT, 8 MiB, is
/// gone when that comes), the VMM's own memory (some MiB, measured), and tables of KVM and the kernel for each page. Also its
/// cgroup's limit: too low and a guest that uses all its RAM is killed, too high and fewer VMs fit.
pub fn held_mib(mem_mib: u32) -> u32 {
    mem_mib + HELD_BASE_MIB + mem_mib / HELD_SHARE
}

/// The largest VM that fits `free_mib`: what HELLO calls free.
pub fn fits_mib(free_mib: u32) -> u32 {
    let most = u64::from(free_mib.saturating_sub(HELD_BASE_MIB));
    (most * u64::from(HELD_SHARE) / u64::from(HELD_SHARE + 1)) as u32
}

const HELD_BASE_MIB: u32 = 24;
const HELD_SHARE: u32 = 64;
