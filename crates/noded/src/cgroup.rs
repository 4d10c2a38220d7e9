//! Control groups (version 2, Documentation/admin-guide/cgroup-v2.rst): one for each VM, with its limits and its
//! processor time. Called by [`crate::vm`]. Never moves a VM's process after it has started.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Controllers that cap a VM.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Most threads of a VMM: a vCPU has one, and there are a few more. A VMM that was taken over can make no more.
const THREADS_BESIDE_VCPUS: u32 = 8;
/// Period of the processor quota, microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// The folder that all VMs' groups are in.
pub struct Cgroups {
    folder: PathBuf,
    is_capped: bool,
}

/// One VM's group.
pub struct Cgroup {
    path: PathBuf,
    folder: File,
    cpu_stat: File,
    is_capped: bool,
}

impl Cgroups {
    /// Prepares a folder called `name` for VMs' groups. `is_capped` demands the controllers; without them VMs
    /// run unlimited.
    pub fn open(name: &str, is_capped: bool) -> io::Result<Self> {
        let mount = mount_point()?;
        let own = own_group(&mount)?;
        if let Some(own) = &own {
            // A group with processes of its own cannot hand controllers on: this program moves into a leaf.
            fs::create_dir_all(own.join("noded"))?;
            fs::write(own.join("noded/cgroup.procs"), std::process::id().to_string())?;
        }
        let parent = own.unwrap_or(mount);
        let folder = parent.join(name);
        if is_capped {
            enable(&parent)?;
            stay_in_memory(&parent)?;
        }
        bury_the_dead(&parent);
        fs::create_dir_all(&folder)?;
        if is_capped {
            enable(&folder)?;
        }
        Ok(Self { folder, is_capped })
    }

    /// The folder that VMs' groups are made in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes the group of a VM. `mem_mib` is for the VM and its VMM together.
    pub fn create(&self, name: &str, mem_mib: u32, vcpus: u16) -> io::Result<Cgroup> {
        let path = self.folder.join(name);
        fs::create_dir(&path)?;
        let folder = File::open(&path)?;
        let cpu_stat = File::open(path.join("cpu.stat"))?;
        let group = Cgroup { path, folder, cpu_stat, is_capped: self.is_capped };
        if self.is_capped {
            group.cap(mem_mib, vcpus).inspect_err(|_| {
                group.remove();
            })?;
        }
        Ok(group)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // It stays only if a VM's process does, which the kernel is killing.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Keeps this program and `packetd` out of swap: they answer at once, and their keys stay off the scratch device.
/// The first process leaves the root group for that, which nobody can limit.
fn stay_in_memory(parent: &Path) -> io::Result<()> {
    let leaf = parent.join("noded");
    if std::process::id() == 1 {
        fs::create_dir_all(&leaf)?;
        fs::write(leaf.join("cgroup.procs"), "1")?;
    }
    // A service that shares a group with others is its host's affair.
    if leaf.exists() { set_swap(&leaf, false) } else { Ok(()) }
}

fn set_swap(group: &Path, allowed: bool) -> io::Result<()> {
    let limit = if allowed { "max" } else { "0" };
    let file = File::options().write(true).open(group.join("memory.swap.max"));
    match file.and_then(|mut file| file.write_all(limit.as_bytes())) {
        // A kernel without swap accounting has no such file, and then no swap that matters.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes the groups `onde-PID` of services that were killed before they could. Their VMs died with them.
fn bury_the_dead(parent: &Path) {
    let is_left_over = |path: &Path| {
        let pid = path.file_name().and_then(|name| name.to_str()?.strip_prefix("onde-"));
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
    };
    for folder in folders(parent).into_iter().filter(|path| is_left_over(path)) {
        // A group in which something lives cannot be removed.
        folders(&folder).iter().chain([&folder]).for_each(|path| drop(fs::remove_dir(path)));
    }
}

/// The folders in a folder; none where it cannot be read.
fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Where version 2 is mounted.
fn mount_point() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| place.split(' ').nth(4).map(PathBuf::from))?
    });
    mount.ok_or_else(|| io::Error::other("cgroup version 2 is not mounted"))
}

/// The group that this program was given for itself (systemd's `Delegate=`): it is alone in it. `None` where it is
/// among others, and in the root group.
fn own_group(mount: &Path) -> io::Result<Option<PathBuf>> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    if path.is_empty() {
        return Ok(None);
    }
    let own = mount.join(path);
    let members = fs::read_to_string(own.join("cgroup.procs"))?;
    Ok((members.trim() == std::process::id().to_string()).then_some(own))
}

/// Hands the controllers on to the groups inside this one.
fn enable(folder: &Path) -> io::Result<()> {
    let wanted = CONTROLLERS.map(|name| format!("+{name}")).join(" ");
    fs::write(folder.join("cgroup.subtree_control"), wanted)
}

impl Cgroup {
    fn cap(&self, mem_mib: u32, vcpus: u16) -> io::Result<()> {
        let set = |file: &str, value: String| {
            File::options().write(true).open(self.path.join(file))?.write_all(value.as_bytes())
        };
        set("memory.max", (u64::from(mem_mib) << 20).to_string())?;
        // Killed whole: half a VMM is of no use.
        set("memory.oom.group", "1".into())?;
        set("cpu.max", format!("{} {CPU_PERIOD_US}", u64::from(vcpus) * CPU_PERIOD_US))?;
        set("pids.max", (u32::from(vcpus) + THREADS_BESIDE_VCPUS).to_string())?;
        Ok(())
    }

    /// Lets the kernel move its memory to swap, or no more: what is there comes back as it is used.
    pub fn swap(&self, allowed: bool) -> io::Result<()> {
        match self.is_capped {
            true => set_swap(&self.path, allowed),
            false => Ok(()),
        }
    }

    /// Processor time of all that ever ran in it, microseconds.
    pub fn cpu_us(&self) -> io::Result<u64> {
        let mut text = [0u8; 512];
        let size = self.cpu_stat.read_at(&mut text, 0)?;
        usage_us(&text[..size]).ok_or_else(|| io::Error::other("cpu.stat has no usage_usec"))
    }

    /// Whether something in it was killed because all of it may hold no more memory. Never where it is not capped.
    pub fn is_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills != "0")
    }

    /// Kills all that is in it.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Removes it; whether it is gone. It cannot go while something in it is still dying.
    pub fn remove(&self) -> bool {
        match fs::remove_dir(&self.path) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

fn usage_us(stat: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(stat).ok()?;
    text.lines().find_map(|line| line.strip_prefix("usage_usec "))?.parse().ok()
}
