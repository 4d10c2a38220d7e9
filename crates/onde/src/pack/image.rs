//! The tree of files that becomes a guest's first file system, and its bytes: a cpio archive in the
//! "newc" format that Linux unpacks as initramfs (kernel, driver-api/early-userspace/buffer-format).
//! The same input gives the same bytes: entries are sorted and carry no times.

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, ModeFileType, trailer};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

/// Most bytes of all files together: the image is in the guest's memory twice while it is unpacked.
pub const IMAGE_MAX: u64 = 1 << 30;
/// Most entries: each costs the guest about a KiB of memory and some microseconds at boot.
pub const ENTRIES_MAX: usize = 100_000;
/// Symbolic links followed on the way to one file, as Linux has it.
const LINKS_MAX: usize = 40;

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Folder(u32),
    File(u32, Vec<u8>),
    Link(String),
}

/// See the module. Paths are absolute.
#[derive(Debug, Default)]
pub struct Image {
    entries: BTreeMap<String, Entry>,
    size: u64,
}

impl Image {
    /// Whether something is at this path.
    pub fn has(&self, path: &Path) -> bool {
        path.to_str().is_some_and(|path| self.entries.contains_key(path))
    }

    /// Adds a folder and the folders above it; one that is there stays as it is.
    pub fn folder(&mut self, path: &Path, mode: u32) -> Result<PathBuf> {
        let path = self.resolve(path)?;
        for above in path.ancestors().skip(1).filter(|above| above.parent().is_some()) {
            self.add_if_new(above, Entry::Folder(0o755))?;
        }
        if path.parent().is_some() {
            self.add_if_new(&path, Entry::Folder(mode))?;
        }
        Ok(path)
    }

    /// Adds a file and the folders above it, in place of what was there.
    pub fn file(&mut self, path: &Path, mode: u32, bytes: Vec<u8>) -> Result<()> {
        let path = self.inside(path)?;
        self.size += bytes.len() as u64;
        if self.size > IMAGE_MAX {
            bail!("more than {} MiB to pack", IMAGE_MAX >> 20);
        }
        self.put(&path, Entry::File(mode & 0o777, bytes))
    }

    /// Adds a symbolic link and the folders above it.
    pub fn link(&mut self, path: &Path, target: &Path) -> Result<()> {
        let path = self.inside(path)?;
        let target = target.to_str().context("a symbolic link that is not UTF-8")?;
        self.put(&path, Entry::Link(target.to_owned()))
    }

    /// Adds the host's file at `path` under the same path: the folders and symbolic links on the way are
    /// added as they are here, and a folder without what is in it. Returns where the file really is.
    pub fn bring(&mut self, path: &Path) -> Result<PathBuf> {
        walk(path, |next| {
            let meta = next
                .symlink_metadata()
                .with_context(|| format!("cannot pack {}", next.display()))?;
            if !meta.is_symlink() {
                self.bring_one(next, &meta)?;
                return Ok(None);
            }
            let target = std::fs::read_link(next)?;
            if !self.has(next) {
                self.link(next, &target)?;
            }
            Ok(Some(target))
        })
    }

    fn bring_one(&mut self, path: &Path, meta: &std::fs::Metadata) -> Result<()> {
        if self.has(path) {
            return Ok(());
        }
        let mode = meta.permissions().mode();
        match meta.is_dir() {
            true => self.folder(path, mode & 0o777 | 0o500).map(drop),
            false => self.file(path, mode, read(path, meta)?),
        }
    }

    /// The path with links of the image on the way to its last name followed.
    fn inside(&mut self, path: &Path) -> Result<PathBuf> {
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("{} names no file", path.display());
        };
        Ok(self.folder(above, 0o755)?.join(name))
    }

    /// The path with all links of the image followed.
    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        walk(path, |next| match next.to_str().and_then(|next| self.entries.get(next)) {
            Some(Entry::Link(target)) => Ok(Some(target.into())),
            _ => Ok(None),
        })
    }

    fn add_if_new(&mut self, path: &Path, entry: Entry) -> Result<()> {
        match path.to_str().and_then(|path| self.entries.get(path)) {
            Some(Entry::File(..)) => bail!("{} is a file and a folder", path.display()),
            Some(_) => Ok(()),
            None => self.put(path, entry),
        }
    }

    fn put(&mut self, path: &Path, entry: Entry) -> Result<()> {
        let name = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
        if let Some(Entry::Folder(_)) = self.entries.get(name) {
            bail!("{name} is a folder and something else");
        }
        self.entries.insert(name.to_owned(), entry);
        if self.entries.len() > ENTRIES_MAX {
            bail!("more than {ENTRIES_MAX} files to pack");
        }
        Ok(())
    }

    /// The archive.
    pub fn emit(&self) -> Result<Vec<u8>> {
        // Heads and padding are below 512 bytes but for the longest paths.
        let mut out = Vec::with_capacity(self.size as usize + 512 * self.entries.len());
        for (index, (path, entry)) in self.entries.iter().enumerate() {
            let (kind, mode, bytes) = match entry {
                Entry::Folder(mode) => (ModeFileType::Directory, *mode, &[][..]),
                Entry::File(mode, bytes) => (ModeFileType::Regular, *mode, &bytes[..]),
                Entry::Link(target) => (ModeFileType::Symlink, 0o777, target.as_bytes()),
            };
            // The kernel takes files of one inode number and more than one link for the same file.
            let head = Builder::new(path.trim_start_matches('/')).ino(index as u32 + 1).nlink(1);
            let head = head.mode(mode).set_mode_file_type(kind);
            let mut writer = head.write(&mut out, u32::try_from(bytes.len())?);
            writer.write_all(bytes)?;
            writer.finish()?;
        }
        Ok(trailer(out)?)
    }
}

/// The path with all links on the way followed; `look` tells where each name leads that is a link.
fn walk(path: &Path, mut look: impl FnMut(&Path) -> Result<Option<PathBuf>>) -> Result<PathBuf> {
    let (mut rest, mut at, mut links) = (names(path), PathBuf::from("/"), 0);
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&name);
        let Some(target) = look(&next)? else {
            at = next;
            continue;
        };
        links += 1;
        if links > LINKS_MAX {
            bail!("too many symbolic links on the way to {}", path.display());
        }
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        names(&target).into_iter().rev().for_each(|name| rest.push_front(name));
    }
    Ok(at)
}

/// The names in a path, `..` included.
fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

/// A file's bytes, if it is one and fits.
pub fn read(path: &Path, meta: &std::fs::Metadata) -> Result<Vec<u8>> {
    if !meta.is_file() {
        bail!("{} is neither file nor folder", path.display());
    }
    if meta.len() > IMAGE_MAX {
        bail!("{} has more than {} MiB", path.display(), IMAGE_MAX >> 20);
    }
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
