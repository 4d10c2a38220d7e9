//! Finds the shared libraries that a program needs where the dynamic loader would (ld.so(8)): by the
//! paths written in the files, `LD_LIBRARY_PATH`, `/etc/ld.so.cache`, the loader's own folders. Reads the host's files only.

use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use super::elf;

/// Most libraries of one program; a browser has about 200.
const LIBRARIES_MAX: usize = 2000;
/// Largest library or program read, bytes; the same limit as for a whole image.
const FILE_MAX: u64 = 1 << 30;
/// Entries of the loader's cache; a desktop has a few thousand.
const CACHE_MAX: usize = 100_000;

/// Folders that loaders look into without being told.
const FOLDERS: [&str; 7] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/usr/local/lib",
];

/// The loader's cache.
pub const CACHE: &str = "/etc/ld.so.cache";
const CACHE_MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const CACHE_HEAD: usize = 48;
const CACHE_ENTRY: usize = 24;
/// Flags of a cache entry: a library for glibc on x86-64 (glibc, sysdeps/generic/ldconfig.h).
const CACHE_X86_64: u32 = 0x0303;

/// What was found.
#[derive(Debug, Default)]
pub struct Libraries {
    /// Paths of the libraries and of the loader, as the loader will ask for them.
    pub paths: Vec<PathBuf>,
    /// Whether the loader needs its cache to find them.
    pub needs_cache: bool,
}

/// A file whose libraries are to be found.
struct Object {
    path: PathBuf,
    elf: elf::Elf,
    /// RPATHs of those who loaded it.
    inherited: Vec<PathBuf>,
}

/// Where libraries may be.
pub struct Places {
    library_path: Vec<PathBuf>,
    cache: BTreeMap<String, PathBuf>,
}

impl Places {
    /// The host's, with this `LD_LIBRARY_PATH`.
    pub fn of_host(library_path: &str) -> Self {
        let cache = std::fs::read(CACHE).map(|bytes| parse_cache(&bytes)).unwrap_or_default();
        let library_path =
            library_path.split([':', ';']).filter(|path| !path.is_empty()).map(PathBuf::from);
        Self { library_path: library_path.collect(), cache }
    }

    /// All libraries that the program at `path` needs, and its loader.
    pub fn find_all(&self, path: &Path, program: elf::Elf) -> Result<Libraries> {
        let mut found = Libraries::default();
        found.paths.extend(program.interpreter.as_ref().map(PathBuf::from));
        let mut names = BTreeSet::new();
        let first = Object { path: path.to_owned(), elf: program, inherited: Vec::new() };
        let mut objects = VecDeque::from([first]);
        while let Some(object) = objects.pop_front() {
            for name in &object.elf.needed {
                if names.contains(name) {
                    continue;
                }
                let (library, by_cache) = self.find(name, &object).with_context(|| {
                    format!("{} needs the library {name}, which is not here", object.path.display())
                })?;
                found.needs_cache |= by_cache;
                found.paths.push(library.path.clone());
                names.insert(name.clone());
                objects.push_back(library);
            }
            if names.len() > LIBRARIES_MAX {
                bail!("{} needs more than {LIBRARIES_MAX} libraries", path.display());
            }
        }
        Ok(found)
    }

    /// A library, and whether only the cache knew where it is.
    fn find(&self, name: &str, by: &Object) -> Option<(Object, bool)> {
        if name.contains('/') {
            return load(Path::new(name), Vec::new()).map(|object| (object, false));
        }
        let own = |paths: &Option<String>| expand(paths.as_deref().unwrap_or_default(), &by.path);
        let mut rpath = Vec::new();
        if by.elf.runpath.is_none() {
            rpath = own(&by.elf.rpath);
            rpath.extend(by.inherited.iter().cloned());
        }
        let folders = rpath.iter().chain(&self.library_path).cloned().chain(own(&by.elf.runpath));
        let told = folders.map(|folder| (folder.join(name), false));
        let cached = self.cache.get(name).into_iter().cloned();
        let is_default =
            |path: &Path| path.parent().is_some_and(|p| FOLDERS.iter().any(|f| p == Path::new(f)));
        let cached = cached.map(|path| (path.clone(), !is_default(&path)));
        let default = FOLDERS.iter().map(|folder| (Path::new(folder).join(name), false));
        told.chain(cached)
            .chain(default)
            .find_map(|(path, by_cache)| Some((load(&path, rpath.clone())?, by_cache)))
    }
}

/// A library at `path`, if there is one for x86-64; the loader, too, goes on looking otherwise.
fn load(path: &Path, inherited: Vec<PathBuf>) -> Option<Object> {
    let meta = path.metadata().ok()?;
    if !meta.is_file() || meta.len() > FILE_MAX {
        return None;
    }
    let elf = elf::parse(&std::fs::read(path).ok()?).ok()?;
    Some(Object { path: path.to_owned(), elf, inherited })
}

/// The folders of an RPATH or RUNPATH in the file at `path`.
fn expand(paths: &str, path: &Path) -> Vec<PathBuf> {
    let origin = path.parent().unwrap_or(Path::new("/")).to_string_lossy();
    let expand = |folder: &str| {
        let folder = folder.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin);
        let folder = folder.replace("${LIB}", "lib/x86_64-linux-gnu");
        PathBuf::from(folder.replace("$LIB", "lib/x86_64-linux-gnu"))
    };
    paths.split(':').filter(|folder| !folder.is_empty()).map(expand).collect()
}

/// Names and paths in the loader's cache (glibc, elf/dl-cache.h), without variants for special processors.
fn parse_cache(bytes: &[u8]) -> BTreeMap<String, PathBuf> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize);
    let string = |at: usize| {
        let rest = bytes.get(at..)?;
        let size = rest.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&rest[..size]).ok()
    };
    let mut cache = BTreeMap::new();
    if !bytes.starts_with(CACHE_MAGIC) {
        return cache;
    }
    for index in 0..u32_at(20).unwrap_or(0).min(CACHE_MAX) {
        let at = CACHE_HEAD + index * CACHE_ENTRY;
        let plain = bytes.get(at + 16..at + CACHE_ENTRY).is_some_and(|hwcap| hwcap == [0; 8]);
        if !plain || u32_at(at) != Some(CACHE_X86_64 as usize) {
            continue;
        }
        let name = u32_at(at + 4).and_then(string);
        let path = u32_at(at + 8).and_then(string);
        if let (Some(name), Some(path)) = (name, path) {
            cache.entry(name.to_owned()).or_insert_with(|| path.into());
        }
    }
    cache
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf_of(path: &str) -> elf::Elf {
        elf::parse(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn libraries_are_the_ones_that_the_loader_lists() {
        for program in ["/bin/ls", "/bin/bash", "/usr/bin/git"] {
            let Ok(listed) = std::process::Command::new("/usr/bin/ldd").arg(program).output()
            else {
                panic!("no ldd");
            };
            // Lines such as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`.
            let listed = String::from_utf8(listed.stdout).unwrap();
            let mut expect: Vec<_> = listed
                .lines()
                .filter_map(|line| line.split(" => ").nth(1)?.split(" (").next())
                .map(|path| PathBuf::from(path).canonicalize().unwrap())
                .collect();
            let places = Places::of_host("");
            let elf = elf_of(program);
            let loader = PathBuf::from(elf.interpreter.clone().unwrap());
            let found = places.find_all(Path::new(program), elf).unwrap();
            assert_eq!(found.paths[0], loader);
            let mut paths: Vec<_> =
                found.paths[1..].iter().map(|path| path.canonicalize().unwrap()).collect();
            paths.sort();
            expect.sort();
            // ldd does not show the loader as a library that libc needs.
            paths.retain(|path| *path != loader.canonicalize().unwrap());
            assert_eq!(paths, expect, "{program}");
        }
    }

    #[test]
    fn paths_in_files_know_where_they_are() {
        let check = |paths, expect: &[&str]| {
            let folders = expand(paths, Path::new("/opt/a/bin/x"));
            assert_eq!(folders, expect.iter().map(PathBuf::from).collect::<Vec<_>>());
        };
        check("$ORIGIN/../lib:/x", &["/opt/a/bin/../lib", "/x"]);
        check("${ORIGIN}", &["/opt/a/bin"]);
        check("", &[]);
    }

    #[test]
    fn the_hosts_cache_has_its_libc_and_a_damaged_one_nothing() {
        let bytes = std::fs::read(CACHE).unwrap();
        assert!(parse_cache(&bytes).contains_key("libc.so.6"));
        for cut in (0..bytes.len()).step_by(97) {
            parse_cache(&bytes[..cut]);
        }
        let mut wild = bytes;
        wild[20..24].fill(0xFF);
        parse_cache(&wild);
    }

    #[test]
    fn what_is_not_here_is_named() {
        let elf = elf::Elf { needed: vec!["libonde-nothing.so.1".into()], ..elf::Elf::default() };
        let error = Places::of_host("").find_all(Path::new("/p"), elf).unwrap_err();
        let text = error.to_string();
        assert_eq!(text, "/p needs the library libonde-nothing.so.1, which is not here");
    }
}
