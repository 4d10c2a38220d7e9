//! What a machine keeps for copying itself: which pages were written, and the windows through which the guest sees
//! that (BITMAP) and what FREEZE saved (FROZEN). `machine` calls this with all else held still.
//!
//! ```text
//!   off --TRACK--> tracking --FREEZE--> frozen --COMMIT--> (the machine ends)
//!                    ^  HARVEST            |
//!                    +------- ABORT -------+
//! ```

use onde_wire::machine::control::{RESULT_INVALID, RESULT_TOO_MANY};
use onde_wire::machine::{FROZEN_PAGES_MAX, Frozen, PAGE_SIZE, STATE_SIZE_MAX, Space};
use std::sync::Arc;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
    VolatileMemory, VolatileSlice,
};

use crate::fault::{Context, Fault, Part};
use crate::kvm::{Vm, Windows};
use crate::memory::{Disk, Region, View, clear_window, map_bitmap, map_frozen, prepare_window};
use crate::pages::PageSet;

/// Pages written, and the windows.
pub struct Checkpoint {
    ram: Arc<View>,
    disk: Option<Arc<Disk>>,
    space: Space,
    bitmap: MmapRegion,
    frozen: MmapRegion,
    tracking: bool,
    /// The pages in the FROZEN window, where it has any.
    held: Option<PageSet>,
}

/// Why FREEZE or HARVEST was not done: a `RESULT_*` for the guest.
pub type Refused = u32;

impl Checkpoint {
    /// Windows that are empty, for a machine with this RAM and disk.
    pub fn new(ram: Arc<View>, disk: Option<Arc<Disk>>, space: Space) -> Result<Self, Fault> {
        let bitmap = map_bitmap(space.bitmap_size())?;
        let frozen = map_frozen(Frozen::window_size())?;
        Ok(Self { ram, disk, space, bitmap, frozen, tracking: false, held: None })
    }

    /// The windows, to make slots of.
    pub fn windows<'a>(&'a self, registers: &'a MmapRegion) -> Windows<'a> {
        Windows { bitmap: &self.bitmap, frozen: &self.frozen, registers }
    }

    /// RAM, and the disk.
    fn regions(&self) -> impl Iterator<Item = &Region> {
        self.ram.iter().chain(self.disk.iter().map(|disk| &disk.region))
    }

    /// TRACK: starts with no page of RAM noted and all of the disk that is not empty, or ends.
    pub fn track(&mut self, vm: &Vm, on: bool) -> Result<(), Fault> {
        self.regions().try_for_each(|region| vm.log_writes(region, on))?;
        if on {
            // Some pages may be left from an earlier start: KVM goes on with its log if there is one.
            self.collect(vm)?;
            self.disk.iter().try_for_each(|disk| disk.mark_data())?;
            prepare_window(&self.frozen, PAGE_SIZE)?;
        } else if self.held.is_none() {
            clear_window(&self.frozen)?;
        }
        self.tracking = on;
        Ok(())
    }

    /// HARVEST: the pages written since the last time go to the BITMAP window.
    pub fn harvest(&mut self, vm: &Vm) -> Result<Result<(), Refused>, Fault> {
        if !self.tracking {
            return Ok(Err(RESULT_INVALID));
        }
        let pages = self.collect(vm)?;
        if self.held.is_none() && pages.count() <= FROZEN_PAGES_MAX {
            // FREEZE may have as many.
            let next = Frozen { state_size: 0, page_count: pages.count() };
            prepare_window(&self.frozen, next.pages_at() + PAGE_SIZE * next.page_count)?;
        }
        let window = self.bitmap.as_volatile_slice();
        window.write_slice(&pages.emit(), 0).fault(Part::Memory, "write BITMAP")?;
        Ok(Ok(()))
    }

    /// FREEZE, first part: the pages to save. With too many they count as written still.
    pub fn take_dirty(&mut self, vm: &Vm) -> Result<Result<PageSet, Refused>, Fault> {
        if !self.tracking || self.held.is_some() {
            return Ok(Err(RESULT_INVALID));
        }
        // They stay in KVM's log, where ABORT finds them again: nobody goes on to count from here.
        let pages = self.gather(|region| vm.read_log(region))?;
        if pages.count() > FROZEN_PAGES_MAX {
            self.note(&pages);
            return Ok(Err(RESULT_TOO_MANY));
        }
        Ok(Ok(pages))
    }

    /// FREEZE, second part: writes the FROZEN window.
    pub fn fill(&mut self, state: &[u8], pages: PageSet) -> Result<(), Fault> {
        assert!(state.len() <= STATE_SIZE_MAX as usize);
        let head = Frozen { state_size: state.len() as u64, page_count: pages.count() };
        let addresses: Vec<u8> = pages.addresses().flat_map(u64::to_le_bytes).collect();
        let window = self.frozen.as_volatile_slice();
        let put = |bytes: &[u8], at: u64| {
            window.write_slice(bytes, at as usize).fault(Part::Memory, "write FROZEN")
        };
        put(state, head.state_at())?;
        put(&addresses, head.addresses_at())?;
        for (index, address) in pages.addresses().enumerate() {
            let at = head.pages_at() + index as u64 * PAGE_SIZE;
            let target = window.subslice(at as usize, PAGE_SIZE as usize);
            let target = target.fault(Part::Memory, "find a page of FROZEN")?;
            self.page(address)?.copy_to_volatile_slice(target);
        }
        put(&head.emit(), 0)?;
        self.held = Some(pages);
        Ok(())
    }

    /// A page as it is now.
    fn page(&self, address: u64) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>, Fault> {
        let (region, at) = self
            .find(address)
            .ok_or_else(|| Fault::new(Part::Memory, "a page that is neither RAM nor disk"))?;
        region.get_slice(at, PAGE_SIZE as usize).fault(Part::Memory, "find a page")
    }

    /// The region of a page.
    fn find(&self, address: u64) -> Option<(&Region, MemoryRegionAddress)> {
        let mut regions = self.regions();
        regions.find_map(|region| Some((region, region.to_region_addr(GuestAddress(address))?)))
    }

    /// Whether there is something in the FROZEN window.
    pub fn is_frozen(&self) -> bool {
        self.held.is_some()
    }

    /// ABORT: empties the FROZEN window; its pages count as written again.
    pub fn discard(&mut self) -> Result<(), Fault> {
        if let Some(pages) = self.held.take() {
            self.note(&pages);
        }
        clear_window(&self.frozen)
    }

    /// Takes what KVM and the VMM's own writes noted.
    fn collect(&self, vm: &Vm) -> Result<PageSet, Fault> {
        self.gather(|region| vm.take_log(region))
    }

    fn gather(&self, log: impl Fn(&Region) -> Result<Vec<u64>, Fault>) -> Result<PageSet, Fault> {
        let mut pages = PageSet::empty(self.space);
        for region in self.regions() {
            let start = region.start_addr().0;
            pages.merge(start, &log(region)?);
            pages.merge(start, &(**region).bitmap().get_and_reset());
        }
        Ok(pages)
    }

    fn note(&self, pages: &PageSet) {
        for address in pages.addresses() {
            if let Some((region, at)) = self.find(address) {
                GuestMemoryRegion::bitmap(region).mark_dirty(at.0 as usize, PAGE_SIZE as usize);
            }
        }
    }
}
