//! Small guests that are none of Onde's: a customer's own system for `onde boot`, with a shell of the host, and one
//! program alone for the benchmarks. Only builds their initramfs; starts nothing.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpio::newc::ModeFileType;

use crate::image::Image;

/// Folders, in the order that the kernel makes them.
const FOLDERS: [&str; 5] = ["bin", "dev", "lib", "lib64", "lib/x86_64-linux-gnu"];
/// Programs of any Debian, and the libraries that they need.
const FILES: [&str; 4] =
    ["/bin/sh", "/bin/uname", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"];

/// An initramfs whose first program is the shell script `init`. Beside the shell it has `uname`.
pub fn initramfs(init: &str) -> Result<Vec<u8>> {
    let mut image = Image::new(Vec::new());
    for folder in FOLDERS {
        image.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    for file in FILES {
        image.add_file(&file[1..], Path::new(file))?;
    }
    let script = format!("#!/bin/sh\n{init}");
    image.add("init", ModeFileType::Regular, 0o755, script.as_bytes())?;
    image.end()
}

/// An initramfs of one static program, which writes to the console, and the modules that it is to load, in this order.
pub fn single(init: &Path, modules: &[PathBuf]) -> Result<Vec<u8>> {
    let mut image = Image::new(Vec::new());
    // The kernel's own initramfs has the console.
    image.add_file("init", init)?;
    let mut names = String::new();
    for module in modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        image.add_file(&name, module)?;
        names.push_str(&name);
        names.push('\n');
    }
    for folder in ["proc", "sys"] {
        image.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    image.add("modules", ModeFileType::Regular, 0o644, names.as_bytes())?;
    image.end()
}
