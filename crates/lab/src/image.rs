//! The node image: an initramfs with `noded` as init and everything it needs,
//! the same that real metal would netboot. Built by `up`; never contains
//! anything that is not in the list below or named by the caller.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

use crate::kernel::KernelCache;
use crate::programs;

/// Modules that a node loads, where its kernel has them; what they need comes along. The processor
/// decides which of the two for KVM will load.
const MODULES: [&str; 13] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_console",
    "e1000e",
    "ena",
    "af_packet",
    "bridge",
    "tun",
    "kvm",
    "kvm_amd",
    "kvm_intel",
];

/// Programs of ours in the image: name, and path in the image.
const PROGRAMS: [(&str, &str); 4] =
    [("noded", "init"), ("packetd", "bin/packetd"), ("vmm", "bin/vmm"), ("mstrap", "boot/mstrap")];

/// Folders of the image; those without files are mount points.
const FOLDERS: [&str; 14] = [
    "bin",
    "boot",
    "dev",
    "etc",
    "etc/onde",
    "lib",
    "lib/modules",
    "proc",
    "run",
    "sys",
    "tmp",
    "usr",
    "var",
    "var/lib",
];

/// One more file for the image, for benchmarks: where it is, and where it goes (no leading slash).
#[derive(Clone, Debug)]
pub struct Extra {
    /// The file here.
    pub source: PathBuf,
    /// Its path in the image.
    pub target: String,
}

/// Writes the node image to `file`, with the cluster file `cluster` in it.
pub fn build(file: &Path, kernel: &KernelCache, cluster: &[u8], extra: &[Extra]) -> Result<()> {
    let out = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    let mut image = Image::new(BufWriter::new(out));
    for folder in FOLDERS {
        image.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    for (name, target) in PROGRAMS {
        image.add_file(target, &programs::find(name)?)?;
    }
    image.add("etc/onde/cluster", ModeFileType::Regular, 0o600, cluster)?;
    image.add_modules(kernel)?;
    image.add_extras(extra)?;
    image.end()?.flush().with_context(|| format!("cannot write {}", file.display()))
}

/// An initramfs as it is written.
pub(crate) struct Image<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Image<W> {
    /// An empty one.
    pub(crate) fn new(out: W) -> Self {
        Self { out, inode: 1 }
    }

    /// Says that no more follows.
    pub(crate) fn end(self) -> Result<W> {
        Ok(trailer(self.out)?)
    }

    pub(crate) fn add(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        data: &[u8],
    ) -> Result<()> {
        self.inode += 1;
        // The kernel takes files of one inode number and more than one link for the same file.
        let entry = Builder::new(name).ino(self.inode).nlink(1).mode(mode).set_mode_file_type(kind);
        let size = u32::try_from(data.len()).context("a file of 4 GiB or more")?;
        let mut writer = entry.write(&mut self.out, size);
        writer.write_all(data)?;
        writer.finish()?;
        Ok(())
    }

    pub(crate) fn add_file(&mut self, name: &str, source: &Path) -> Result<()> {
        let data =
            std::fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        self.add(name, ModeFileType::Regular, 0o755, &data)
    }

    /// The caller's files, and the folders that they need.
    fn add_extras(&mut self, extra: &[Extra]) -> Result<()> {
        let targets = extra.iter().map(|extra| Path::new(&extra.target));
        let folders: BTreeSet<_> = targets.flat_map(|target| target.ancestors().skip(1)).collect();
        for folder in folders.iter().filter_map(|folder| folder.to_str()) {
            if !folder.is_empty() && !FOLDERS.contains(&folder) {
                self.add(folder, ModeFileType::Directory, 0o755, &[])?;
            }
        }
        extra.iter().try_for_each(|extra| self.add_file(&extra.target, &extra.source))
    }

    /// The modules and, in `etc/onde/modules`, the order to load them in.
    fn add_modules(&mut self, kernel: &KernelCache) -> Result<()> {
        let modules = kernel.modules()?;
        let wanted: Vec<_> = MODULES.into_iter().filter(|name| modules.has(name)).collect();
        let mut list = String::new();
        for source in modules.load_order(&wanted)? {
            let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
            self.add_file(&format!("lib/modules/{name}"), &source)?;
            list.push_str(&name);
            list.push('\n');
        }
        self.add("etc/onde/modules", ModeFileType::Regular, 0o644, list.as_bytes())
    }
}
