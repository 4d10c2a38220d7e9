//! The scratch device of a node without disks: all of it becomes swap, whose signature is written anew at each boot, so
//! there is no file system to make, to trust or to repair, and nothing on it outlives the node. What VMs keep on disk
//! is in memory files ([`crate::files`]) that the kernel moves there when memory is short. Called by [`crate::init`].
//! Touches no device but the one that the kernel's command line names: it overwrites it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Size of a page of x86-64, bytes.
const PAGE: usize = 4096;
/// Of the device a sixteenth is not sold: room for memory that is there twice while a VM is written or read, and
/// for what the kernel moves on its own account.
const SPARE_SHARE: u64 = 16;

/// `onde.scratch=NAME` on the kernel's command line: `NAME` of `/dev`.
pub fn name(cmdline: &str) -> Option<&str> {
    let name = cmdline.split_whitespace().find_map(|word| word.strip_prefix("onde.scratch="))?;
    (!name.is_empty() && !name.contains(['/', '.'])).then_some(name)
}

/// Makes a device swap; the MiB of it that VMs can have.
pub fn open(device: &Path) -> io::Result<u32> {
    let mut file = File::options().read(true).write(true).open(device)?;
    let size = file.seek(SeekFrom::End(0))?;
    let header = header(size).ok_or_else(|| io::Error::other("too small"))?;
    file.write_all_at(&header, 0)?;
    file.sync_all()?;
    drop(file);
    onde_sys::swap::on(device)?;
    let mib = size >> 20;
    Ok((mib - mib.div_ceil(SPARE_SHARE)).try_into().unwrap_or(u32::MAX))
}

/// The first page of a swap area (linux/swap.h, `union swap_header`): version 1, the number of the last page, no bad
/// pages, and the signature at its end. `None` for an area without room for a page.
fn header(size: u64) -> Option<[u8; PAGE]> {
    let last = (size / PAGE as u64).checked_sub(1).filter(|last| *last > 0)?;
    let last = u32::try_from(last).unwrap_or(u32::MAX);
    let mut page = [0; PAGE];
    page[1024..1028].copy_from_slice(&1u32.to_le_bytes());
    page[1028..1032].copy_from_slice(&last.to_le_bytes());
    page[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    Some(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_device_that_is_named_is_touched() {
        assert_eq!(name("quiet onde.node=3 onde.scratch=vda\n"), Some("vda"));
        for line in ["quiet", "onde.scratch=", "onde.scratch=../vda", "xonde.scratch=vda"] {
            assert_eq!(name(line), None, "{line}");
        }
    }

    #[test]
    fn the_header_is_what_mkswap_writes() {
        let page = header(64 << 20).unwrap();
        assert_eq!(page[1024..1036], [1, 0, 0, 0, 0xFF, 0x3F, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&page[4086..], b"SWAPSPACE2");
        assert_eq!((header(0), header(4096)), (None, None));
    }
}
