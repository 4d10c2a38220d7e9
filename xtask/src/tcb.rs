//! `cargo xtask tcb`: how much code one has to trust. Counts the lines of the
//! programs that could betray an owner or a customer, and, apart, of what a
//! stranger's packet reaches before its authentication code is checked; the
//! latter has a limit, so that it stays as small as it is.

use std::fs;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::step::root;

/// Whoever trusts a node trusts these.
const TRUSTED: [&str; 6] =
    ["crates/wire", "crates/sys", "crates/packetd", "crates/noded", "crates/vmm", "mstrap"];

/// Files that a stranger's packet reaches whole. Of others, it is what lies between `BEGIN` and
/// `END`.
const STRANGER_FILES: [&str; 0] = [];
const BEGIN: &str = "// tcb:stranger-begin";
const END: &str = "// tcb:stranger-end";

/// What one person reads and checks in a morning.
const STRANGER_LINES_MAX: usize = 500;

/// Lines of code: not blank, no comment, no test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lines {
    all: usize,
    stranger: usize,
}

impl AddAssign for Lines {
    fn add_assign(&mut self, other: Self) {
        self.all += other.all;
        self.stranger += other.stranger;
    }
}

/// Prints the count; fails where strangers reach too much, or where nothing says what they reach.
pub fn run() -> Result<()> {
    let mut total = Lines::default();
    println!("{:16} {:>6} {:>18}", "program", "lines", "before the MAC");
    for program in TRUSTED {
        let mut lines = Lines::default();
        for file in sources(&root().join(program).join("src"))? {
            lines += count_file(&file)?;
        }
        println!("{program:16} {:6} {:18}", lines.all, lines.stranger);
        total += lines;
    }
    println!("{:16} {:6} {:18}", "total", total.all, total.stranger);
    ensure!(
        total.stranger > 0,
        "no source has {BEGIN:?}\nhint: mark what unverified packets reach"
    );
    if total.stranger > STRANGER_LINES_MAX {
        bail!("a stranger's packet reaches more than {STRANGER_LINES_MAX} lines");
    }
    Ok(())
}

/// All `.rs` files under `dir`; tests in files of their own are not among them.
fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("tests") {
            files.extend(sources(&path)?);
        } else if path.extension().is_some_and(|ext| ext == "rs" || ext == "s")
            && path.file_stem().is_some_and(|stem| stem != "tests")
        {
            files.push(path);
        }
    }
    Ok(files)
}

fn count_file(file: &Path) -> Result<Lines> {
    let text = fs::read_to_string(file)?;
    let whole = STRANGER_FILES.iter().any(|name| root().join(name) == file);
    count(&text, whole).with_context(|| file.display().to_string())
}

/// Counts formatted Rust: an item ends at the first line that closes it at its own indentation.
fn count(text: &str, whole: bool) -> Result<Lines> {
    let mut lines = Lines::default();
    let mut stranger = false;
    let mut rest = text.lines();
    while let Some(line) = rest.next() {
        let code = line.trim();
        if code == BEGIN || code == END {
            ensure!(stranger != (code == BEGIN), "unbalanced {code:?}");
            stranger = code == BEGIN;
        } else if code == "#[cfg(test)]" {
            skip_item(&mut rest);
        } else if !code.is_empty() && !code.starts_with("//") {
            lines.all += 1;
            lines.stranger += usize::from(stranger || whole);
        }
    }
    ensure!(!stranger, "{BEGIN:?} without an end");
    Ok(lines)
}

fn skip_item<'a>(rest: &mut impl Iterator<Item = &'a str>) {
    let mut indent = None;
    for line in rest {
        let depth = line.len() - line.trim_start().len();
        let first = *indent.get_or_insert(depth);
        let ends = line.ends_with(';') || line.trim_start().starts_with('}');
        if depth == first && ends {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, whole: bool, expect: Option<(usize, usize)>) {
        let lines = count(text, whole).ok().map(|lines| (lines.all, lines.stranger));
        assert_eq!(lines, expect, "{text}");
    }

    #[test]
    fn count_takes_code_only() {
        check("//! Head.\n\nuse a;\n// Why.\nfn f() {\n    g(); // here\n}\n", false, Some((4, 0)));
        check(
            "fn f() {}\n#[cfg(test)]\nmod tests {\n    fn t() {}\n}\nfn g() {}\n",
            false,
            Some((2, 0)),
        );
        check("#[cfg(test)]\nmod tests;\nfn g() {}\n", true, Some((1, 1)));
        check("a;\n// tcb:stranger-begin\nb;\n// tcb:stranger-end\nc;\n", false, Some((3, 1)));
        check("// tcb:stranger-begin\nb;\n", false, None);
        check("// tcb:stranger-end\nb;\n", false, None);
    }
}
