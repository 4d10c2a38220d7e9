//! Guest memory as the host sees it: where each window lies, and the mappings behind it.
//! Built once at start; afterwards only BOOT goes away. Never touches KVM: `kvm` reads the
//! list of regions from here and makes slots of them.

use std::fs::File;
use std::sync::Arc;

use onde_wire::machine::{
    BOOT_SIZE, BOOT_START, CONSOLE_RING_SIZE, DISK_START, PAGE_SIZE, Space, VIRTIO_STRIDE,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, VolatileMemory,
};

use crate::fault::{Context, Fault, Part};
use crate::saved::Piece;

/// Guest-physical memory that a device or the VMM may touch, bounds checked at every access. Notes which pages are
/// written: KVM knows of the guest's own writes only.
pub type View = GuestMemoryMmap<AtomicBitmap>;

/// One piece of a [`View`], or a disk.
pub type Region = GuestRegionMmap<AtomicBitmap>;

/// Huge pages of the host are this big; RAM that lies congruent to it is backed by them, which
/// saves 511 of 512 page faults.
const HUGE_PAGE: u64 = 2 << 20;

/// All mappings of one VM.
pub struct Memory {
    /// RAM only: what devices see once the guest runs.
    pub ram: Arc<View>,
    /// RAM and BOOT: what devices see until RESUME.
    pub ram_and_boot: Arc<View>,
    /// The disk, where there is one.
    pub disk: Option<Arc<Disk>>,
}

/// Start and size of each piece of RAM.
fn ram_ranges(space: &Space) -> impl Iterator<Item = (u64, u64)> {
    space.ram().into_iter().filter(|(_, size)| *size > 0)
}

/// A disk: its file, and the same bytes as memory that the guest sees at `DISK_START`.
pub struct Disk {
    /// The file.
    pub file: File,
    /// The memory, which notes the pages that are written through the file, too.
    pub region: Region,
}

impl Disk {
    /// Maps `size` bytes of a file.
    pub fn new(file: &File, size: u64) -> Result<Self, Fault> {
        check_length(file, size, "disk")?;
        let file = file.try_clone().fault(Part::Descriptors, "clone the disk's descriptor")?;
        let backing = file.try_clone().fault(Part::Descriptors, "clone the disk's descriptor")?;
        let bitmap = NewBitmap::with_len(size as usize);
        let mapping = MmapRegionBuilder::new_with_bitmap(size as usize, bitmap)
            .with_file_offset(FileOffset::new(backing, 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .fault(Part::Memory, "map the disk")?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(DISK_START))
            .ok_or_else(|| Fault::new(Part::Memory, "the disk overflows"))?;
        Ok(Self { file, region })
    }

    /// Notes that bytes were written.
    pub fn mark(&self, at: u64, size: usize) {
        GuestMemoryRegion::bitmap(&self.region).mark_dirty(at as usize, size);
    }

    /// Notes all bytes that were ever written.
    pub fn mark_data(&self) -> Result<(), Fault> {
        use rustix::fs::{SeekFrom, seek};
        let size = self.region.len();
        let mut at = 0;
        while at < size {
            let start = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // Nothing but a hole from here on.
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error).fault(Part::Memory, "find what is on the disk"),
            };
            at = seek(&self.file, SeekFrom::Hole(start)).fault(Part::Memory, "find a hole")?;
            self.mark(start, (at.min(size) - start.min(size)) as usize);
        }
        Ok(())
    }
}

impl Memory {
    /// Reserves address space for RAM and BOOT; pages come as the guest touches them.
    pub fn new(space: &Space, disk: Option<&File>) -> Result<Self, Fault> {
        let mut regions = Vec::new();
        for (start, size) in ram_ranges(space) {
            let region = ram_region(start, size, rustix::mm::Advice::LinuxHugepage)?;
            regions.push(Arc::new(region));
        }
        let boot = anonymous(BOOT_SIZE)?;
        let boot = GuestRegionMmap::new(boot, GuestAddress(BOOT_START))
            .ok_or_else(|| Fault::new(Part::Memory, "BOOT window overflows"))?;
        let ram = View::from_arc_regions(regions).fault(Part::Memory, "collect RAM")?;
        let with_boot =
            ram.insert_region(Arc::new(boot)).fault(Part::Memory, "collect RAM and BOOT")?;
        let disk = disk.map(|file| Disk::new(file, space.disk_bytes)).transpose()?;
        Ok(Self { ram: Arc::new(ram), ram_and_boot: Arc::new(with_boot), disk: disk.map(Arc::new) })
    }

    /// The memory of a template's clone: RAM that is in the file is the file's until it is written. There is no BOOT, and
    /// no disk.
    pub fn of_clone(space: &Space, file: &File, pieces: &[Piece]) -> Result<Self, Fault> {
        let regions = ram_ranges(space).map(|(start, size)| {
            // A clone that writes one byte shall not pay for 2 MiB.
            Ok(Arc::new(ram_region(start, size, rustix::mm::Advice::LinuxNoHugepage)?))
        });
        let regions = regions.collect::<Result<_, Fault>>()?;
        let ram = Arc::new(View::from_arc_regions(regions).fault(Part::Memory, "collect RAM")?);
        pieces.iter().try_for_each(|piece| map_over(&ram, file, piece))?;
        Ok(Self { ram_and_boot: ram.clone(), ram, disk: None })
    }

    /// Whether there is BOOT.
    pub fn has_boot(&self) -> bool {
        !Arc::ptr_eq(&self.ram, &self.ram_and_boot)
    }

    /// Forgets BOOT; its pages go back to the host when the last device has done the same.
    pub fn drop_boot(&mut self) {
        self.ram_and_boot = self.ram.clone();
    }
}

/// A private mapping without swap reservation: the VM's cgroup is the limit, not overcommit.
fn anonymous<B: NewBitmap>(size: u64) -> Result<MmapRegion<B>, Fault> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    MmapRegionBuilder::new_with_bitmap(size as usize, B::with_len(size as usize))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .build()
        .fault(Part::Memory, "map guest memory")
}

/// RAM from `start` on, its host address congruent to the guest's modulo [`HUGE_PAGE`].
fn ram_region(start: u64, size: u64, advice: rustix::mm::Advice) -> Result<Region, Fault> {
    GuestRegionMmap::new(aligned(size, advice)?, GuestAddress(start))
        .ok_or_else(|| Fault::new(Part::Memory, "RAM overflows"))
}

/// A private mapping that begins at a boundary of [`HUGE_PAGE`] and lives as long as the process.
fn aligned<B: NewBitmap>(size: u64, advice: rustix::mm::Advice) -> Result<MmapRegion<B>, Fault> {
    // Linux 6.1 does not align large anonymous mappings by itself: reserve one huge page more
    // and begin at the first boundary.
    let reserve = anonymous::<()>(size + HUGE_PAGE)?;
    let base = reserve.as_ptr();
    let skip = (base as u64).next_multiple_of(HUGE_PAGE) - base as u64;
    // The reservation is never unmapped.
    std::mem::forget(reserve);
    let host = base.wrapping_add(skip as usize);
    // SAFETY: `host..host + size` lies inside the reservation made above, which nothing else
    // refers to; the advice does not change contents. A kernel without huge pages refuses it,
    // which costs speed only.
    let _ = unsafe { rustix::mm::madvise(host.cast(), size as usize, advice) };
    let bitmap = B::with_len(size as usize);
    let builder = MmapRegionBuilder::new_with_bitmap(size as usize, bitmap);
    // SAFETY: the same range, mapped readable and writable for the rest of the process's life.
    unsafe { builder.with_raw_mmap_pointer(host) }
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .build()
        .fault(Part::Memory, "wrap guest memory")
}

/// Maps a piece of a file over RAM, copy on write.
fn map_over(ram: &View, file: &File, piece: &Piece) -> Result<(), Fault> {
    use rustix::mm::{MapFlags, ProtFlags};
    let beyond = || Fault::new(Part::Saved, "memory beyond the end of RAM");
    let (region, at) = ram.to_region_addr(GuestAddress(piece.address)).ok_or_else(beyond)?;
    if piece.size > region.len() - at.0 {
        return Err(beyond());
    }
    let host = region.as_ptr().wrapping_add(at.0 as usize);
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the range lies inside RAM, as was just checked, which `ram_region` reserved for good and nothing refers to
    // yet but this view. The file holds all of the piece (`saved::find`) and cannot shrink (`noded` sealed it).
    unsafe {
        rustix::mm::mmap(host.cast(), piece.size as usize, protection, flags, file, piece.offset)
    }
    .map(|_| ())
    .fault(Part::Memory, "map the template")
}

/// BITMAP, a window of the VMM's own, which the guest reads. Pages come as they are written.
pub fn map_bitmap(size: u64) -> Result<MmapRegion, Fault> {
    anonymous(size.next_multiple_of(PAGE_SIZE))
}

/// What the registers of `count` virtio devices read as, a page each: also a window that the guest reads.
pub fn map_registers(count: usize) -> Result<MmapRegion, Fault> {
    anonymous(count as u64 * VIRTIO_STRIDE)
}

/// FROZEN, another one. In huge pages: it is filled and read while the guest stands still.
pub fn map_frozen(size: u64) -> Result<MmapRegion, Fault> {
    aligned(size.next_multiple_of(HUGE_PAGE), rustix::mm::Advice::LinuxHugepage)
}

/// Has the huge pages of a window's first `size` bytes there before they are needed in haste. The window is empty.
pub fn prepare_window(window: &MmapRegion, size: u64) -> Result<(), Fault> {
    let mut starts = (0..size).step_by(HUGE_PAGE as usize);
    starts
        .try_for_each(|at| window.as_volatile_slice().write_obj(0u8, at as usize))
        .fault(Part::Memory, "prepare a window")
}

/// Gives a window's pages back to the host; it reads as zeros from then on.
pub fn clear_window(window: &MmapRegion) -> Result<(), Fault> {
    let advice = rustix::mm::Advice::LinuxDontNeed;
    // SAFETY: the mapping is private, anonymous and live; nothing refers to its contents but the guest, which may
    // see zeros, and the VMM's own copies through volatile accesses.
    unsafe { rustix::mm::madvise(window.as_ptr().cast(), window.size(), advice) }
        .fault(Part::Memory, "clear a window")
}

/// The info page, shared with `noded`.
pub fn map_info(file: File) -> Result<MmapRegion, Fault> {
    map_shared(file, PAGE_SIZE, "info page")
}

/// The console ring, shared with `noded`.
pub fn map_console(file: File) -> Result<MmapRegion, Fault> {
    map_shared(file, PAGE_SIZE + CONSOLE_RING_SIZE, "console ring")
}

fn map_shared(file: File, size: u64, name: &str) -> Result<MmapRegion, Fault> {
    check_length(&file, size, name)?;
    MmapRegion::from_file(FileOffset::new(file, 0), size as usize).fault(Part::Memory, name)
}

/// A mapping beyond the end of its file kills on access: refuses it.
fn check_length(file: &File, size: u64, name: &str) -> Result<(), Fault> {
    let length = file.metadata().fault(Part::Descriptors, name)?.len();
    if length < size {
        let text = format!("{name}: memory file has {length} bytes, {size} needed");
        return Err(Fault::new(Part::Descriptors, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_disk_notes_what_was_ever_written() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(1 << 20).unwrap();
        assert!(Disk::new(&file, (1 << 20) + 1).is_err());
        let disk = Disk::new(&file, 1 << 20).unwrap();
        file.write_all_at(&[1; 9000], 100 << 12).unwrap();
        disk.region.write_obj(1u8, vm_memory::MemoryRegionAddress(255 << 12)).unwrap();
        (*disk.region).bitmap().reset();
        disk.mark_data().unwrap();
        let noted = (*disk.region).bitmap().get_and_reset();
        let is_set = |page: &usize| noted[page / 64] >> (page % 64) & 1 == 1;
        assert_eq!((0..256).filter(is_set).collect::<Vec<_>>(), [100, 101, 102, 255]);
    }

    #[test]
    fn ram_is_aligned_and_boot_goes_away() {
        let mut memory = Memory::new(&Space::of_mib(64, 0), None).unwrap();
        let host = memory.ram.iter().next().unwrap().as_ptr() as u64;
        assert_eq!(host % HUGE_PAGE, 0);
        let boot = GuestAddress(BOOT_START + BOOT_SIZE - 1);
        assert!(memory.ram_and_boot.write_obj(1u8, boot).is_ok());
        assert!(memory.ram.write_obj(1u8, boot).is_err());
        memory.drop_boot();
        assert!(memory.ram_and_boot.write_obj(1u8, boot).is_err());
        assert_eq!(memory.ram.iter().map(|r| r.len()).sum::<u64>(), 64 << 20);
    }

    #[test]
    fn clones_see_their_template_and_not_each_other() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.write_all_at(&[7; 3 * 4096], 4096).unwrap();
        let pieces = [Piece { offset: 8192, address: 1 << 20, size: 8192 }];
        let clone = || Memory::of_clone(&Space::of_mib(64, 0), &file, &pieces).unwrap().ram;
        let (one, other) = (clone(), clone());
        let at = GuestAddress((1 << 20) + 4096);
        one.write_obj(9u8, at).unwrap();
        let seen = |ram: &View, at| ram.read_obj::<u8>(at).unwrap();
        assert_eq!((seen(&one, at), seen(&other, at)), (9, 7));
        assert_eq!(seen(&one, GuestAddress(0)), 0);
        let beyond = [Piece { address: (64 << 20) - 4096, ..pieces[0] }];
        assert!(Memory::of_clone(&Space::of_mib(64, 0), &file, &beyond).is_err());
    }
}
