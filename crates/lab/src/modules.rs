//! Kernel modules and what they need: reads `depends=` from the `.modinfo`
//! section of `.ko` files, because a Debian package carries no `modules.dep`.
//! Used to build node images and customers' guests; loads nothing itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Larger than any module of Debian's cloud kernel (the largest has 4 MiB).
const MODULE_SIZE_MAX: u64 = 32 << 20;
/// Debian's whole kernel has 4 000 modules.
const MODULES_MAX: usize = 20_000;

/// A kernel's modules: where each lies.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
}

/// `kvm-amd` and `kvm_amd` are the same module.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

impl Modules {
    /// All `.ko` files under `dir`.
    pub fn scan(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![dir.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(&folder)
                .with_context(|| format!("cannot read {}", folder.display()))?;
            for entry in entries {
                let entry = entry?;
                let (path, kind) = (entry.path(), entry.file_type()?);
                if kind.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|ext| ext == "ko") {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy();
                    files.insert(canonical(&name), path.clone());
                }
            }
            if files.len() + folders.len() > MODULES_MAX {
                bail!("{} has more than {MODULES_MAX} modules", dir.display());
            }
        }
        Ok(Self { files })
    }

    /// Whether the kernel has this module.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(&canonical(name))
    }

    /// The files of `names` and of all they need, each once, in an order in which they load.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in names {
            self.visit(&canonical(name), &mut order, 0)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
        // The deepest chain of Debian's kernel has 7 links; a cycle would have no end.
        if depth > 32 {
            bail!("modules depend on each other in a circle at {name}");
        }
        let file =
            self.files.get(name).with_context(|| format!("the kernel has no module {name}"))?;
        if order.contains(file) {
            return Ok(());
        }
        for needed in depends(file)? {
            self.visit(&needed, order, depth + 1)?;
        }
        order.push(file.clone());
        Ok(())
    }
}

/// Names of the modules that the module in `file` needs.
fn depends(file: &Path) -> Result<Vec<String>> {
    let size = file.metadata().with_context(|| format!("cannot read {}", file.display()))?.len();
    if size > MODULE_SIZE_MAX {
        bail!("{} is no module: {size} bytes", file.display());
    }
    let bytes = std::fs::read(file)?;
    let info =
        modinfo(&bytes).with_context(|| format!("{} is no kernel module", file.display()))?;
    let needed = info
        .split(|&byte| byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))
        .unwrap_or_default();
    let names = String::from_utf8_lossy(needed).into_owned();
    Ok(names.split(',').filter(|name| !name.is_empty()).map(canonical).collect())
}

/// The section `.modinfo` of a 64-bit ELF file (System V ABI, chapter 4).
fn modinfo(elf: &[u8]) -> Option<&[u8]> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let u64_at =
        |at: usize| usize::try_from(u64::from_le_bytes(*elf.get(at..)?.first_chunk()?)).ok();
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size) = (u64_at(0x28)?, usize::from(u16_at(0x3A)?));
    let header = |index: u16| table.checked_add(usize::from(index).checked_mul(size)?);
    let contents = |header: usize| {
        let start = u64_at(header.checked_add(0x18)?)?;
        elf.get(start..start.checked_add(u64_at(header.checked_add(0x20)?)?)?)
    };
    let names = contents(header(u16_at(0x3E)?)?)?;
    for index in 0..u16_at(0x3C)? {
        let section = header(index)?;
        let name = names.get(u32_at(section)? as usize..)?;
        if name.starts_with(b".modinfo\0") {
            return contents(section);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 64-bit ELF file of three sections: none, `.modinfo`, names.
    fn module(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.names\0";
        let mut elf = vec![0u8; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf.extend(names);
        elf.extend(info);
        let table = elf.len();
        for (name, offset, size) in
            [(0u32, 0, 0), (1, 64 + names.len(), info.len()), (10, 64, names.len())]
        {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3A..0x3C].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3C..0x3E].copy_from_slice(&3u16.to_le_bytes());
        elf[0x3E..0x40].copy_from_slice(&2u16.to_le_bytes());
        elf
    }

    fn check(tag: &str, modules: &[(&str, &str)], wanted: &[&str], expect: Result<&[&str], &str>) {
        let dir = std::env::temp_dir().join(format!("onde-modules-{tag}-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("kernel")).unwrap();
        for (name, needs) in modules {
            let file = dir.join("kernel").join(format!("{name}.ko"));
            std::fs::write(file, module(format!("license=GPL\0depends={needs}\0").as_bytes()))
                .unwrap();
        }
        let order = Modules::scan(&dir).unwrap().load_order(wanted);
        std::fs::remove_dir_all(&dir).unwrap();
        match (order, expect) {
            (Ok(files), Ok(names)) => {
                let stems: Vec<_> =
                    files.iter().map(|file| file.file_stem().unwrap().to_str().unwrap()).collect();
                assert_eq!(stems, names);
            }
            (Err(error), Err(text)) => assert!(error.to_string().contains(text), "{error}"),
            (order, expect) => panic!("{order:?} instead of {expect:?}"),
        }
    }

    #[test]
    fn load_order_puts_what_is_needed_first() {
        let kvm = [("kvm", "irqbypass"), ("kvm-amd", "kvm"), ("irqbypass", ""), ("tun", "")];
        check("chain", &kvm, &["kvm_amd"], Ok(&["irqbypass", "kvm", "kvm-amd"]));
        check(
            "once",
            &kvm,
            &["kvm", "kvm-amd", "tun"],
            Ok(&["irqbypass", "kvm", "kvm-amd", "tun"]),
        );
        check("missing", &[("a", "b")], &["a"], Err("no module b"));
        check("circle", &[("a", "b"), ("b", "a")], &["a"], Err("circle"));
    }

    #[test]
    fn a_broken_file_is_no_module() {
        let whole = module(b"depends=x\0");
        assert_eq!(modinfo(&whole), Some(&b"depends=x\0"[..]));
        for cut in 0..whole.len() {
            modinfo(&whole[..cut]);
        }
        let mut wild = whole.clone();
        wild[0x28..0x30].fill(0xFF);
        assert_eq!(modinfo(&wild), None);
    }
}
