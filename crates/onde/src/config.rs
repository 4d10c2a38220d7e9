//! Contexts: the clusters that a user knows, in one file. Each has a broker, an API key, and for a lab its
//! folder. The file holds keys, so that only its owner may read it.

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::failure::hinted;

/// One cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// The broker: https://HOST:PORT, with #sha256:DIGEST where its certificate is pinned, or http://HOST:PORT.
    pub broker: String,
    /// The API key of the user's account there.
    pub key: String,
    /// For a lab: its folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lab: Option<PathBuf>,
}

/// The configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the current context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// All contexts by name.
    #[serde(default)]
    pub contexts: BTreeMap<String, Context>,
    /// What the broker of a context signs receipts with, by the context's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub receipt_keys: BTreeMap<String, String>,
}

impl Config {
    /// Reads the user's file; an empty configuration where there is none.
    pub fn load() -> Result<Self> {
        Self::read(&file()?)
    }

    fn read(file: &Path) -> Result<Self> {
        match fs::read_to_string(file) {
            Ok(text) => toml::from_str(&text).with_context(|| format!("in {}", file.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
        }
    }

    /// Writes the user's file.
    pub fn save(&self) -> Result<()> {
        self.write(&file()?)
    }

    fn write(&self, file: &Path) -> Result<()> {
        let text = toml::to_string(self).context("cannot write the configuration")?;
        let write = || -> std::io::Result<()> {
            let dir = file.parent().unwrap_or(Path::new("."));
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            let aside = file.with_extension("new");
            let mut out = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&aside)?;
            out.write_all(text.as_bytes())?;
            fs::rename(&aside, file)
        };
        write().with_context(|| format!("cannot write {}", file.display()))
    }

    /// The context asked for, or the current one, with its name.
    pub fn choose(&self, name: Option<&str>) -> Result<(&str, &Context)> {
        let Some(name) = name.or(self.current.as_deref()) else {
            return Err(hinted(
                "no cluster to talk to",
                "onde lab up makes one here; onde account use KEY --broker URL knows another",
            ));
        };
        let found = self.contexts.get_key_value(name);
        let unknown = || hinted(format!("no context `{name}`"), "onde context ls lists them");
        found.map(|(name, context)| (name.as_str(), context)).ok_or_else(unknown)
    }
}

/// `$ONDE_CONFIG`, else `$XDG_CONFIG_HOME/onde/config.toml`, else `~/.config/onde/config.toml`.
fn file() -> Result<PathBuf> {
    if let Some(file) = std::env::var_os("ONDE_CONFIG") {
        return Ok(file.into());
    }
    Ok(folder("XDG_CONFIG_HOME", ".config")?.join("onde/config.toml"))
}

/// Where job files are: `$XDG_STATE_HOME/onde/jobs`, else `~/.local/state/onde/jobs`.
pub fn jobs_dir() -> Result<PathBuf> {
    Ok(folder("XDG_STATE_HOME", ".local/state")?.join("onde/jobs"))
}

fn folder(variable: &str, in_home: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(variable) {
        return Ok(dir.into());
    }
    let home =
        std::env::var_os("HOME").with_context(|| format!("neither {variable} nor HOME is set"))?;
    Ok(PathBuf::from(home).join(in_home))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn is_read_back_as_written_by_its_owner_only() {
        let dir = std::env::temp_dir().join(format!("onde-config-{}", std::process::id()));
        let file = dir.join("sub/config.toml");
        assert_eq!(Config::read(&file).unwrap(), Config::default());
        let lab = Context {
            broker: "https://198.18.255.1:7034".to_owned(),
            key: "K".to_owned(),
            lab: Some("/tmp/lab".into()),
        };
        let contexts = [("lab".to_owned(), lab)].into();
        let config = Config { current: Some("lab".to_owned()), contexts, ..Config::default() };
        config.write(&file).unwrap();
        assert_eq!(Config::read(&file).unwrap(), config);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(config.choose(None).unwrap().0, "lab");
        assert_eq!(config.choose(Some("x")).unwrap_err().to_string(), "no context `x`");
        fs::write(&file, "currant = \"lab\"").unwrap();
        assert!(format!("{:#}", Config::read(&file).unwrap_err()).contains("currant"));
        fs::remove_dir_all(dir).unwrap();
    }
}
