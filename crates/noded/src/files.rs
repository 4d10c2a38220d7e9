//! What a VM writes to and finds again when it wakes up: memory files, without a name, each of a size that its VMM cannot
//! change. Their pages go to the node's scratch device (swap) when memory is short. They are freed when the last
//! descriptor is closed, so nothing is left of them whatever happens. Held by [`crate::world`], by job.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use onde_wire::machine::{CONSOLE_RING_SIZE, PAGE_SIZE};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use crate::node::Spec;

/// Bytes of a block as stat(2) counts them.
const BLOCK: u64 = 512;

/// The files of a job.
pub struct Files {
    /// The console ring.
    pub console: File,
    /// Its own disk.
    pub disk: Option<File>,
    /// Where its machine is written to.
    pub saved: Option<File>,
}

impl Files {
    /// Empty files for a new VM.
    pub fn new(spec: &Spec) -> io::Result<Self> {
        let of = |name, mib: u32| (mib > 0).then(|| memory(name, u64::from(mib) << 20)).transpose();
        Ok(Self {
            console: memory(c"console", PAGE_SIZE + CONSOLE_RING_SIZE)?,
            disk: of(c"disk", spec.disk_mib)?,
            saved: of(c"saved", spec.saved_mib)?,
        })
    }

    /// The files of a clone of the template that these are of, whose machine it can read and not write.
    pub fn of_clone(&self) -> io::Result<Self> {
        let saved = self.saved.as_ref().ok_or(io::ErrorKind::NotFound)?;
        // A description of its own: the access mode is the description's.
        let saved = File::open(format!("/proc/self/fd/{}", saved.as_raw_fd()))?;
        let console = memory(c"console", PAGE_SIZE + CONSOLE_RING_SIZE)?;
        Ok(Self { console, disk: None, saved: Some(saved) })
    }

    /// MiB that the machine takes, rounded up.
    pub fn saved_mib(&self) -> u32 {
        let blocks = self.saved.as_ref().and_then(|file| Some(file.metadata().ok()?.blocks()));
        (blocks.unwrap_or(0) * BLOCK).div_ceil(1 << 20) as u32
    }

    /// Gives back what the machine took.
    pub fn empty(&self) -> io::Result<()> {
        let Some(file) = &self.saved else { return Ok(()) };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, flags, 0, file.metadata()?.len())?)
    }
}

/// A memory file that neither end can make longer or shorter under the other.
pub fn memory(name: &CStr, size: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_saved_machine_is_counted_bounded_and_given_back() {
        let saved = memory(c"saved", 4 << 20).unwrap();
        let files =
            Files { console: memory(c"console", 1).unwrap(), disk: None, saved: Some(saved) };
        assert_eq!(files.saved_mib(), 0);
        let file = files.saved.as_ref().unwrap();
        file.write_all_at(&vec![1; 1 << 20], 100).unwrap();
        assert_eq!(files.saved_mib(), 2);
        assert!(file.write_all_at(&[1; 2], (4 << 20) - 1).is_err(), "beyond its end");
        let clone = files.of_clone().unwrap().saved.unwrap();
        let mut byte = [9];
        clone.read_exact_at(&mut byte, 200).unwrap();
        assert_eq!(byte, [1]);
        assert!(clone.write_all_at(&[2], 200).is_err(), "a clone wrote to its template");
        files.empty().unwrap();
        file.read_exact_at(&mut byte, 200).unwrap();
        assert_eq!((files.saved_mib(), byte, file.metadata().unwrap().len()), (0, [0], 4 << 20));
    }
}
