//! Packs a program into a guest: the program, its loader and libraries, the files that were named, the agent as
//! `/init`, the kernel modules of a virtual machine, and the few files that programs expect. `onde run`
//! calls it before it buys anything. Never packs what was not named or is not needed.

mod elf;
mod image;
mod libraries;

use anyhow::{Context, Result, bail};
use onde_lab::kernel::KernelCache;
use onde_wire::session::{LAUNCH_PATH, LOADER_PATH, Launch, MODULES_PATH, PAYLOAD_MAX, Window};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use crate::failure::hinted;
use elf::ElfError;
use image::Image;
use libraries::Places;

/// Drivers of the machine's devices, where the kernel has them as modules; what they need comes along. The
/// agent loads them in this order and begins its work once the network is there.
const MODULES: [&str; 4] = ["virtio_mmio", "virtio_net", "virtio_rng", "virtio_blk"];
/// Scripts whose interpreters are scripts: as many as Linux follows.
const SCRIPTS_MAX: usize = 4;
/// Longest first line of a script that Linux reads.
const SCRIPT_LINE_MAX: usize = 255;
/// Deepest folder that is packed.
const DEPTH_MAX: usize = 64;

const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Folders of every guest, and their modes.
const FOLDERS: [(&str, u32); 10] = [
    ("/dev", 0o755),
    ("/etc", 0o755),
    ("/onde", 0o755),
    ("/proc", 0o555),
    ("/root", 0o700),
    ("/run", 0o755),
    ("/sys", 0o555),
    ("/tmp", 0o1777),
    ("/var", 0o755),
    ("/var/tmp", 0o1777),
];
/// Folders that today's systems have as links into `/usr`; they are links in the guest where they are here.
const MERGED: [&str; 4] = ["/bin", "/lib", "/lib64", "/sbin"];

/// Folders that a guest's kernel fills.
const KERNELS: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Files of every guest, unless others were named.
const FILES: [(&str, &str); 4] = [
    (
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    ),
    ("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
];

/// What to pack.
pub struct Request<'a> {
    /// The program and its arguments. A name without a slash is looked for in PATH.
    pub command: &'a [OsString],
    /// Files and folders to take along, as PATH or PATH:PATH-IN-THE-GUEST.
    pub files: &'a [PathBuf],
    /// Environment: NAME=VALUE, or NAME for its value here.
    pub env: &'a [OsString],
    /// The terminal's size, where the program gets one.
    pub window: Option<Window>,
    /// The kernel whose modules go along.
    pub kernel: &'a KernelCache,
}

/// A packed guest.
pub struct Packed {
    /// Its initramfs, not compressed: the stream to the VM is.
    pub image: Vec<u8>,
    /// What the user may have forgotten, a line each.
    pub hints: Vec<String>,
}

/// Packs a program as it would start here and now.
pub fn pack(request: &Request<'_>) -> Result<Packed> {
    let cwd = std::env::current_dir().context("cannot tell the working folder")?;
    let agent = onde_lab::programs::find("onde-agent")?;
    let mut image = Image::default();
    add_base(&mut image)?;
    let (name, args) = request.command.split_first().context("no program to pack")?;
    let host = Host::new(cwd)?;
    let program = host.add_program(&mut image, name)?;
    for file in request.files {
        host.add_named(&mut image, file)?;
    }
    let cwd = image.folder(&host.cwd, 0o755)?;
    add_guest(&mut image, request.kernel, &agent)?;
    let launch = describe(&program, args, &cwd, request)?;
    image.file(Path::new(LAUNCH_PATH), 0o600, launch)?;
    let hints = args.iter().filter_map(|arg| host.hint(&image, arg)).collect();
    Ok(Packed { image: image.emit()?, hints })
}

/// Folders, and the links that stand for folders.
fn add_base(image: &mut Image) -> Result<()> {
    for path in MERGED.map(Path::new) {
        if path.is_symlink() && path.is_dir() {
            image.bring(path)?;
        }
    }
    for (path, mode) in FOLDERS {
        image.folder(Path::new(path), mode)?;
    }
    Ok(())
}

/// The agent, the kernel's modules, and files that nobody named.
fn add_guest(image: &mut Image, kernel: &KernelCache, agent: &Path) -> Result<()> {
    let read = |path: &Path| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    image.file(Path::new("/init"), 0o755, read(agent)?)?;
    image.link(Path::new("/usr/bin/onde-agent"), Path::new("/init"))?;
    // The guest sends it to VMs that it makes elsewhere.
    image.file(Path::new(LOADER_PATH), 0o600, read(&onde_lab::programs::find("loader")?)?)?;
    let modules = kernel.modules()?;
    let wanted: Vec<_> = MODULES.into_iter().filter(|name| modules.has(name)).collect();
    let mut list = String::new();
    for source in modules.load_order(&wanted)? {
        let name = source.file_name().unwrap_or_default().to_string_lossy();
        let target = format!("/onde/{name}");
        let mut module = read(&source)?;
        module.truncate(unsigned(&module).len());
        image.file(Path::new(&target), 0o644, module)?;
        list.push_str(&target);
        list.push('\n');
    }
    image.file(Path::new(MODULES_PATH), 0o644, list.into_bytes())?;
    for (path, text) in FILES {
        if !image.has(Path::new(path)) {
            image.file(Path::new(path), 0o644, text.as_bytes().to_vec())?;
        }
    }
    Ok(())
}

/// A module without its signature (kernel, include/linux/module_signature.h). A guest has nobody to prove
/// anything to, and checking signatures is most of what loading costs it at boot.
fn unsigned(module: &[u8]) -> &[u8] {
    const MARK: &[u8] = b"~Module signature appended~\n";
    const HEAD: usize = 12;
    let stripped = || {
        let (rest, size) = module.strip_suffix(MARK)?.split_last_chunk()?;
        let signature = u32::from_be_bytes(*size) as usize;
        rest.get(..rest.len().checked_sub(HEAD - size.len() + signature)?)
    };
    stripped().unwrap_or(module)
}

/// The description by which the agent starts the program.
fn describe(
    program: &Path,
    args: &[OsString],
    cwd: &Path,
    request: &Request<'_>,
) -> Result<Vec<u8>> {
    let mut argv = program.as_os_str().as_bytes().to_vec();
    argv.push(0);
    args.iter().for_each(|arg| push(&mut argv, arg.as_bytes()));
    let mut env = Vec::new();
    environment(request).iter().for_each(|pair| push(&mut env, pair.as_bytes()));
    let cwd = cwd.as_os_str().as_bytes();
    let launch = Launch { window: request.window, uid: 0, gid: 0, cwd, argv: &argv, env: &env };
    let mut out = vec![0; PAYLOAD_MAX];
    let size = launch.emit(&mut out).filter(|&size| Launch::parse(&out[..size]).is_some());
    let Some(size) = size else {
        bail!("arguments and environment have more than {} KiB", PAYLOAD_MAX >> 10);
    };
    out.truncate(size);
    Ok(out)
}

fn push(list: &mut Vec<u8>, string: &[u8]) {
    list.extend(string);
    list.push(0);
}

/// The program's environment: little of the host's, so that a program runs the same from everywhere.
fn environment(request: &Request<'_>) -> Vec<OsString> {
    let mut env: Vec<OsString> = vec![format!("PATH={PATH_DEFAULT}").into(), "HOME=/root".into()];
    let inherit = |name: &OsStr| {
        let mut pair = name.to_owned();
        pair.push("=");
        pair.push(std::env::var_os(name)?);
        Some(pair)
    };
    env.extend(request.window.and_then(|_| inherit(OsStr::new("TERM"))));
    env.extend(inherit(OsStr::new("LD_LIBRARY_PATH")));
    for wanted in request.env {
        match wanted.as_bytes().contains(&b'=') {
            true => env.push(wanted.clone()),
            false => env.extend(inherit(wanted)),
        }
    }
    env
}

/// Where programs and files are looked for.
struct Host {
    cwd: PathBuf,
    path: OsString,
    places: Places,
}

impl Host {
    fn new(cwd: PathBuf) -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| PATH_DEFAULT.into());
        let library_path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        Ok(Self { cwd, path, places: Places::of_host(&library_path) })
    }

    /// Adds a program and all it needs to start; returns its path, in the guest as here.
    fn add_program(&self, image: &mut Image, name: &OsStr) -> Result<PathBuf> {
        let path = self.find(name)?;
        self.add_at(image, &path, 0)?;
        Ok(path)
    }

    fn add_at(&self, image: &mut Image, path: &Path, depth: usize) -> Result<()> {
        let shown = path.display();
        let meta = path.metadata().with_context(|| format!("cannot run {shown}"))?;
        if meta.permissions().mode() & 0o111 == 0 && meta.is_file() {
            return Err(hinted(format!("{shown} is not executable"), "chmod +x makes it so"));
        }
        let bytes = image::read(path, &meta)?;
        image.bring(path)?;
        self.add_needs(image, path, &bytes, depth)
    }

    /// Adds what a program needs to start.
    fn add_needs(&self, image: &mut Image, path: &Path, bytes: &[u8], depth: usize) -> Result<()> {
        let shown = path.display();
        if let Some(line) = bytes.strip_prefix(b"#!") {
            return self.add_script(image, path, line, depth);
        }
        match elf::parse(bytes) {
            Ok(program) => self.add_libraries(image, path, program),
            Err(ElfError::NotElf) => Err(hinted(
                format!("{shown} is no program: neither ELF nor a script"),
                "a script begins with #! and its interpreter, such as #!/bin/sh",
            )),
            Err(error) => bail!("{shown} {error}"),
        }
    }

    fn add_libraries(&self, image: &mut Image, path: &Path, program: elf::Elf) -> Result<()> {
        let found = self.places.find_all(path, program)?;
        for library in &found.paths {
            image.bring(library)?;
        }
        if found.needs_cache {
            image.bring(Path::new(libraries::CACHE))?;
        }
        Ok(())
    }

    /// Adds a script's interpreter, and what `env` would start for it.
    fn add_script(&self, image: &mut Image, path: &Path, line: &[u8], depth: usize) -> Result<()> {
        if depth == SCRIPTS_MAX {
            bail!("{} and its interpreters are {SCRIPTS_MAX} scripts", path.display());
        }
        let line = &line[..line.len().min(SCRIPT_LINE_MAX)];
        let line = line.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let words: Vec<_> =
            line.split(|byte| b" \t\r".contains(byte)).filter(|word| !word.is_empty()).collect();
        let Some((interpreter, words)) = words.split_first() else {
            bail!("{} names no interpreter behind #!", path.display());
        };
        let interpreter = Path::new(OsStr::from_bytes(interpreter));
        self.add_at(image, interpreter, depth + 1)
            .with_context(|| format!("the interpreter of {}", path.display()))?;
        if interpreter.file_name() == Some(OsStr::new("env")) {
            let name = words.iter().find(|word| !word.starts_with(b"-") && !word.contains(&b'='));
            let name = name.with_context(|| format!("{}: env of what?", path.display()))?;
            let found = self.find(OsStr::from_bytes(name))?;
            self.add_at(image, &found, depth + 1)?;
        }
        Ok(())
    }

    /// The path of a program, absolute but with its links.
    fn find(&self, name: &OsStr) -> Result<PathBuf> {
        let shown = name.to_string_lossy();
        if name.as_bytes().contains(&b'/') {
            let path = self.absolute(Path::new(name));
            return match path.is_file() {
                true => Ok(path),
                false if path.is_dir() => bail!("{shown} is a folder"),
                false => bail!("there is no program {shown}"),
            };
        }
        let found = std::env::split_paths(&self.path)
            .map(|folder| self.absolute(&folder).join(name))
            .find(|file| is_program(file));
        found.ok_or_else(|| {
            let hint = match self.cwd.join(name).is_file() {
                true => "a program in this folder is called with a slash: ./NAME",
                false => "is it installed here? What runs in the VM comes from this machine",
            };
            hinted(format!("there is no program {shown} in PATH"), hint)
        })
    }

    /// The path made absolute, without `.` and `..`, as a shell would show it.
    fn absolute(&self, path: &Path) -> PathBuf {
        let mut out = PathBuf::new();
        for component in self.cwd.join(path).components() {
            match component {
                Component::ParentDir => drop(out.pop()),
                Component::CurDir => {}
                other => out.push(other),
            }
        }
        out
    }

    /// Adds a file or folder that was named, PATH or PATH:PATH.
    fn add_named(&self, image: &mut Image, named: &Path) -> Result<()> {
        let (source, target) = self.split(named);
        if !source.exists() {
            bail!("there is no file {}", source.display());
        }
        if source == target && !source.is_dir() {
            image.bring(&source)?;
        } else {
            add_tree(image, &source, &target, 0)?;
        }
        if is_program(&source) {
            let bytes = image::read(&source, &source.metadata()?)?;
            // It may be none of this machine's, or never be started: what is not here is not missed.
            let _ = self.add_needs(image, &source, &bytes, 0);
        }
        Ok(())
    }

    /// Where a named file is, and where it goes. A colon may be part of a name that exists.
    fn split(&self, named: &Path) -> (PathBuf, PathBuf) {
        let bytes = named.as_os_str().as_bytes();
        let whole = self.absolute(named);
        match bytes.iter().rposition(|&byte| byte == b':') {
            Some(at) if !whole.exists() => {
                let path = |bytes| self.absolute(Path::new(OsStr::from_bytes(bytes)));
                (path(&bytes[..at]), path(&bytes[at + 1..]))
            }
            _ => (whole.clone(), whole),
        }
    }

    /// What to say about an argument that looks like a file that was forgotten.
    fn hint(&self, image: &Image, arg: &OsStr) -> Option<String> {
        let path = self.absolute(Path::new(arg));
        let is_kernels = KERNELS.iter().any(|folder| path.starts_with(folder));
        // The root folder is always there.
        let is_path = !arg.is_empty() && path.parent().is_some();
        let is_forgotten = is_path && path.exists() && !image.has(&path) && !is_kernels;
        let shown = arg.to_string_lossy();
        is_forgotten.then(|| format!("{shown} is a file here and not in the VM: --file {shown}"))
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Adds a file, or a folder with all in it, under another path. Links inside of it stay links.
fn add_tree(image: &mut Image, source: &Path, target: &Path, depth: usize) -> Result<()> {
    let shown = source.display();
    if depth > DEPTH_MAX {
        bail!("{shown} is more than {DEPTH_MAX} folders deep");
    }
    // What was named itself may be a link; its target is meant.
    let meta = if depth == 0 { source.metadata() } else { source.symlink_metadata() };
    let meta = meta.with_context(|| format!("cannot pack {shown}"))?;
    let mode = meta.permissions().mode();
    if meta.is_symlink() {
        return image.link(target, &std::fs::read_link(source)?);
    }
    if !meta.is_dir() {
        return image.file(target, mode, image::read(source, &meta)?);
    }
    image.folder(target, mode & 0o777)?;
    for entry in std::fs::read_dir(source).with_context(|| format!("cannot pack {shown}"))? {
        let name = entry?.file_name();
        add_tree(image, &source.join(&name), &target.join(&name), depth + 1)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
