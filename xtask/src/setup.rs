//! `cargo xtask setup`: what this machine lacks. Installs Debian packages where
//! it may, else says how to, and unpacks the nodes' kernel into the cache.
//! Safe to repeat and to interrupt.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use onde_lab::kernel::{KernelCache, cache_dir};
use onde_lab::programs;

use crate::step::{output, show, step};

/// Programs that building and the lab need, and Debian's package of each.
const PROGRAMS: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("ip", "iproute2"),
    ("dpkg-deb", "dpkg"),
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
    ("cc", "gcc"),
    // The broker's tests run against a server of their own. Debian keeps its programs out of the PATH.
    ("initdb", "postgresql"),
];

/// The package that depends on Debian's newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Installs what is missing.
pub fn run() -> Result<()> {
    programs_of_the_host()?;
    match KernelCache::find() {
        Ok(kernel) => eprintln!("kernel {} is in the cache", kernel.version),
        Err(_) => step("kernel", kernel)?,
    }
    Ok(())
}

fn programs_of_the_host() -> Result<()> {
    let mut packages: Vec<_> = PROGRAMS
        .into_iter()
        .filter(|(program, _)| !is_there(program))
        .map(|(_, package)| package)
        .collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if programs::on_path("apt-get").is_none() {
        bail!("these Debian packages are missing, or what corresponds to them here: {list}");
    }
    let install = ["install", "--yes", "--no-install-recommends"];
    if !rustix::process::geteuid().is_root() {
        bail!("packages are missing\nhint: sudo apt-get {} {list}", install.join(" "));
    }
    step(&format!("install {list}"), || {
        apt_get(&["update"])?;
        apt_get(&[&install[..], &packages].concat())
    })
}

fn is_there(program: &str) -> bool {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders = versions.map(|version| version.path().join("bin"));
    programs::on_path(program).is_some() || folders.any(|folder| folder.join(program).exists())
}

fn apt_get(args: &[&str]) -> Result<()> {
    show(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive"))
        .context("hint: is a Debian mirror reachable? see /etc/apt/sources.list")
}

/// Leaves `kernel/{vmlinuz,vmlinux,modules,version}` in the cache, all or nothing.
fn kernel() -> Result<()> {
    let cache = cache_dir()?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let scratch = cache.join(format!("kernel.{}.tmp", std::process::id()));
    let made = unpack(&cache, &scratch);
    let placed = made.and_then(|()| place(&scratch.join("kernel"), &cache.join("kernel")));
    // Whatever happened, the scratch folder is of no further use.
    fs::remove_dir_all(&scratch).ok();
    placed
}

fn unpack(cache: &Path, scratch: &Path) -> Result<()> {
    let tree = scratch.join("tree");
    fs::create_dir_all(&tree)?;
    let package = fetch(cache, scratch)?;
    eprintln!("unpack {}", package.display());
    show(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&tree))?;
    let kernel = scratch.join("kernel");
    fs::create_dir(&kernel)?;
    let version = only_entry(&tree.join("lib/modules"))?;
    fs::rename(tree.join("boot").join(format!("vmlinuz-{version}")), kernel.join("vmlinuz"))?;
    let bzimage = fs::read(kernel.join("vmlinuz"))?;
    let vmlinux = onde_client::kernel::unpack(&bzimage)?;
    let vmlinux = vmlinux.context("vmlinuz is not packed with LZ4, as Debian's is")?;
    fs::write(kernel.join("vmlinux"), vmlinux)?;
    let modules = tree.join("lib/modules").join(&version).join("kernel");
    fs::rename(modules, kernel.join("modules"))?;
    fs::write(kernel.join("version"), version + "\n")?;
    Ok(())
}

fn only_entry(dir: &Path) -> Result<String> {
    let entry = fs::read_dir(dir)?.next().context("the package has no modules")??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// The kernel's package: from the cache, else from a Debian mirror, which then is kept there.
fn fetch(cache: &Path, scratch: &Path) -> Result<PathBuf> {
    let name = package_name()?;
    let kept = |dir: &Path| -> Result<Option<PathBuf>> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if file.starts_with(&format!("{name}_")) && file.ends_with(".deb") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    };
    if let Some(package) = kept(cache)? {
        return Ok(package);
    }
    eprintln!("download {name}");
    let download = || show(Command::new("apt-get").args(["download", &name]).current_dir(scratch));
    if download().is_err() {
        // The lists may be older than the mirror.
        update()?;
        download().context("hint: is a Debian mirror reachable? see /etc/apt/sources.list")?;
    }
    let package = kept(scratch)?.context("apt-get left no package behind")?;
    let target = cache.join(package.file_name().unwrap_or_default());
    fs::rename(&package, &target)?;
    Ok(target)
}

/// What the kernel's meta package depends on at present.
fn package_name() -> Result<String> {
    let look = || -> Result<Option<String>> {
        let text = output(Command::new("apt-cache").args(["depends", KERNEL]))?;
        let mut names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(names.find(|name| name.starts_with("linux-image-")).map(str::to_owned))
    };
    if let Ok(Some(name)) = look() {
        return Ok(name);
    }
    update()?;
    look()?.with_context(|| format!("{KERNEL} has no kernel\nhint: this needs a Debian host"))
}

fn update() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the package lists are missing or old\nhint: sudo apt-get update");
    }
    apt_get(&["update"])
}

/// Another `setup` at the same time may have been quicker: its kernel is as good.
fn place(made: &Path, target: &Path) -> Result<()> {
    if KernelCache::find().is_ok() {
        return Ok(());
    }
    if target.exists() {
        fs::remove_dir_all(target).context("cannot remove an incomplete kernel")?;
    }
    fs::rename(made, target).with_context(|| format!("cannot create {}", target.display()))
}
