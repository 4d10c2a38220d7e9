//! Packs programs of this host and looks into the archives, as the kernel would.

use super::*;
use cpio::newc::Reader;
use std::collections::BTreeMap;
use std::process::Command;

/// A folder for one test, gone with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("onde-pack-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    fn write(&self, name: &str, mode: u32, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    fn host(&self) -> Host {
        Host::new(self.0.clone()).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Path to mode and contents, for each entry of an archive.
fn unpack(image: &Image) -> BTreeMap<String, (u32, Vec<u8>)> {
    let archive = image.emit().unwrap();
    let mut rest = &archive[..];
    let mut entries = BTreeMap::new();
    let mut previous = String::new();
    loop {
        let mut reader = Reader::new(rest).unwrap();
        let entry = reader.entry();
        if entry.is_trailer() {
            return entries;
        }
        let (name, mode) = (entry.name().to_owned(), entry.mode());
        assert_eq!((entry.mtime(), entry.uid(), entry.gid()), (0, 0, 0));
        assert!(previous < name, "{previous} {name}");
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
        rest = reader.finish().unwrap();
        previous.clone_from(&name);
        entries.insert(name, (mode, bytes));
    }
}

/// Packs a program with the base of every guest and runs it in a root made of the archive.
fn check_runs(scratch: &Scratch, name: &str, args: &[&str], expect: &str) {
    let mut image = Image::default();
    add_base(&mut image).unwrap();
    let program = scratch.host().add_program(&mut image, OsStr::new(name)).unwrap();
    let root = scratch.0.join("root");
    std::fs::create_dir_all(&root).unwrap();
    for (path, (mode, bytes)) in unpack(&image) {
        let path = root.join(path);
        match mode & 0o170000 {
            0o040000 => std::fs::create_dir(&path).unwrap(),
            0o120000 => std::os::unix::fs::symlink(OsStr::from_bytes(&bytes), &path).unwrap(),
            _ => std::fs::write(&path, bytes).unwrap(),
        }
        if mode & 0o170000 != 0o120000 {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode & 0o7777)).unwrap();
        }
    }
    let mut command = Command::new("unshare");
    let output =
        command.arg("-r").arg("chroot").arg(&root).arg(program).args(args).output().unwrap();
    std::fs::remove_dir_all(&root).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, expect, "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn packed_programs_run_in_a_root_of_their_own() {
    let scratch = Scratch::new("run");
    check_runs(&scratch, "echo", &["dynamic"], "dynamic\n");
    check_runs(&scratch, "/bin/sh", &["-c", "echo linked"], "linked\n");
    scratch.write("script", 0o755, b"#!/bin/sh\necho script $1\n");
    check_runs(&scratch, "./script", &["a"], "script a\n");
    scratch.write("by-env", 0o755, b"#!/usr/bin/env -S bash -e\necho env\n");
    check_runs(&scratch, "./by-env", &[], "env\n");
    scratch.write("deep/script", 0o755, b"#! ../script\n");
    std::os::unix::fs::symlink("deep/../script", scratch.0.join("link")).unwrap();
    check_runs(&scratch, "./link", &["b"], "script b\n");
}

#[test]
fn a_static_program_brings_nothing_along() {
    let scratch = Scratch::new("static");
    let program = scratch.write("static", 0o755, &elf::tests::header(62, 2));
    let mut image = Image::default();
    scratch.host().add_program(&mut image, program.as_os_str()).unwrap();
    let files: Vec<_> =
        unpack(&image).into_iter().filter(|(_, (mode, _))| mode & 0o170000 != 0o040000).collect();
    assert_eq!(files.len(), 1);
    assert_eq!(files[0].0, program.to_str().unwrap().trim_start_matches('/'));
}

fn check_refused(scratch: &Scratch, name: &str, expect: &str) {
    let refused = scratch.host().add_program(&mut Image::default(), OsStr::new(name));
    let text = format!("{:#}", refused.unwrap_err()).replace(scratch.0.to_str().unwrap(), "");
    assert_eq!(text, expect, "{name}");
}

#[test]
fn what_is_no_program_for_a_vm_is_refused_in_words() {
    let scratch = Scratch::new("refused");
    scratch.write("arm", 0o755, &elf::tests::header(183, 2));
    scratch.write("old", 0o755, &elf::tests::header(3, 1));
    scratch.write("text", 0o755, b"echo\n");
    scratch.write("plain", 0o644, b"#!/bin/sh\n");
    scratch.write("lost", 0o755, b"#!/onde/nothing\n");
    scratch.write("loop", 0o755, format!("#!{}/loop\n", scratch.0.display()).as_bytes());
    check_refused(&scratch, "./arm", "/arm is for 64-bit ARM, and VMs are x86-64");
    check_refused(&scratch, "./old", "/old is for 32-bit x86, and VMs are x86-64");
    check_refused(&scratch, "./text", "/text is no program: neither ELF nor a script");
    check_refused(&scratch, "./plain", "/plain is not executable");
    check_refused(&scratch, "./missing", "there is no program ./missing");
    check_refused(&scratch, "./", "./ is a folder");
    check_refused(&scratch, "onde-nothing", "there is no program onde-nothing in PATH");
    let lost = scratch.host().add_program(&mut Image::default(), OsStr::new("./lost"));
    let text = format!("{:#}", lost.unwrap_err());
    assert!(text.contains("the interpreter of") && text.contains("/onde/nothing"), "{text}");
    let scripts = scratch.host().add_program(&mut Image::default(), OsStr::new("./loop"));
    assert!(format!("{:#}", scripts.unwrap_err()).contains("are 4 scripts"));
}

#[test]
fn named_files_and_folders_go_where_they_are_told() {
    let scratch = Scratch::new("named");
    scratch.write("input", 0o640, b"in");
    scratch.write("data/a/b", 0o755, b"b");
    scratch.write("od:d", 0o644, b"colon");
    std::os::unix::fs::symlink("a/b", scratch.0.join("data/link")).unwrap();
    let mut image = Image::default();
    for named in ["input", "input:/etc/x", "data", "data:copy", "od:d"] {
        scratch.host().add_named(&mut image, Path::new(named)).unwrap();
    }
    let entries = unpack(&image);
    let here = scratch.0.to_str().unwrap().trim_start_matches('/');
    let check = |path: &str, mode, bytes: &[u8]| {
        assert_eq!(entries.get(path), Some(&(mode, bytes.to_vec())), "{path}");
    };
    check("etc/x", 0o100640, b"in");
    check(&format!("{here}/input"), 0o100640, b"in");
    check(&format!("{here}/data/a/b"), 0o100755, b"b");
    check(&format!("{here}/copy/a/b"), 0o100755, b"b");
    check(&format!("{here}/copy/link"), 0o120777, b"a/b");
    check(&format!("{here}/od:d"), 0o100644, b"colon");
    let missing = scratch.host().add_named(&mut image, Path::new("nothing:/x"));
    assert!(missing.unwrap_err().to_string().starts_with("there is no file"));
    assert_eq!(scratch.host().hint(&image, OsStr::new("input")), None);
    assert_eq!(scratch.host().hint(&image, OsStr::new("-x")), None);
    assert_eq!(scratch.host().hint(&image, OsStr::new("/proc/uptime")), None);
    scratch.write("forgotten", 0o644, b"");
    let hint = scratch.host().hint(&image, OsStr::new("forgotten")).unwrap();
    assert_eq!(hint, "forgotten is a file here and not in the VM: --file forgotten");
}

#[test]
fn named_programs_bring_what_they_need() {
    let scratch = Scratch::new("tools");
    scratch.write("script", 0o755, b"#!/usr/bin/env date\n");
    scratch.write("strange", 0o755, b"#!/no/such/interpreter\n");
    scratch.write("data", 0o644, b"#!/bin/sh\n");
    let mut image = Image::default();
    for named in ["data", "strange"] {
        scratch.host().add_named(&mut image, Path::new(named)).unwrap();
    }
    let has = |image: &Image, end: &str| unpack(image).keys().any(|path| path.ends_with(end));
    assert!(!has(&image, "libc.so.6") && has(&image, "strange"));
    scratch.host().add_named(&mut image, Path::new("script:/opt/script")).unwrap();
    assert!(has(&image, "opt/script") && has(&image, "bin/date") && has(&image, "libc.so.6"));
}

#[test]
fn modules_lose_their_signature_and_nothing_else() {
    let mut module = b"code".to_vec();
    assert_eq!(unsigned(&module), b"code");
    module.extend([7; 5]);
    module.extend([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
    module.extend(b"~Module signature appended~\n");
    assert_eq!(unsigned(&module), b"code");
    assert_eq!(unsigned(&module[1..]), b"ode");
    assert_eq!(unsigned(&module[5..]), &module[5..]);
}

#[test]
fn links_of_the_image_are_followed_and_circles_end() {
    let mut image = Image::default();
    image.link(Path::new("/lib"), Path::new("usr/lib")).unwrap();
    image.file(Path::new("/lib/x"), 0o644, vec![1]).unwrap();
    assert_eq!(unpack(&image)["usr/lib/x"].1, [1]);
    assert!(image.file(Path::new("/usr/lib"), 0o644, vec![]).is_err());
    image.link(Path::new("/a"), Path::new("/b")).unwrap();
    image.link(Path::new("/b"), Path::new("a")).unwrap();
    assert!(image.file(Path::new("/a/x"), 0o644, vec![]).is_err());
}
