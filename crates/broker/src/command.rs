//! `broker audit`, `broker backup`, `broker restore` and `broker thaw`: what an owner does with a ledger beside or without a broker
//! that runs. `main` calls it.

use anyhow::{Context, Result};
use clap::Parser;
use onde_broker::audit::{Books, audit};
use onde_broker::backup::{backup, restore};
use onde_broker::settle::{frozen, thaw};
use onde_broker::store::{Store, shown};
use onde_client::api::Hex;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Looks after a broker's ledger.
#[derive(Parser)]
#[command(version, name = "broker")]
pub enum Command {
    /// Prove that the books balance and that the journal is whole, or name the first bad act
    Audit {
        #[command(flatten)]
        place: Place,
        /// What an earlier audit printed: proves that the journal up to there is still the same
        #[arg(long, value_name = "ACT:DIGEST", value_parser = noted)]
        noted: Option<(i64, [u8; 32])>,
    },
    /// Write all of the ledger to a new file, while brokers go on
    Backup {
        #[command(flatten)]
        place: Place,
        /// The file; it holds secrets, so only its owner can read it
        file: PathBuf,
    },
    /// Let a node's jobs sell again that were frozen since it was shown tokens which this ledger never sold: it lied, or the
    /// right ledger is back. They do once the node says what fits the ledger, and freeze again if it does not
    Thaw {
        #[command(flatten)]
        place: Place,
        /// The node's number
        #[arg(long, value_name = "N")]
        node: u32,
    },
    /// Read a backup into an empty ledger; jobs that were open sell no more tokens, and are settled by certificates
    Restore {
        #[command(flatten)]
        place: Place,
        /// What `broker backup` wrote
        file: PathBuf,
    },
}

/// Where the ledger is.
#[derive(clap::Args)]
pub struct Place {
    /// The ledger: a file, or a PostgreSQL database as postgres://...
    #[arg(long, value_name = "FILE|URL", env = "DATABASE_URL", hide_env_values = true)]
    db: String,
}

/// The words that make the first argument one of these commands.
pub const WORDS: [&str; 4] = ["audit", "backup", "restore", "thaw"];

fn noted(text: &str) -> Result<(i64, [u8; 32]), String> {
    let parse = || {
        let (act, digest) = text.split_once(':')?;
        Some((act.parse().ok()?, digest.parse::<Hex<32>>().ok()?.0))
    };
    parse().ok_or_else(|| "ACT:DIGEST as an audit printed it".into())
}

/// Does it.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Audit { place, noted } => {
            anyhow::ensure!(place.exists(), "there is no ledger {}", shown(&place.db));
            let store = place.open()?;
            let books = audit(&store, *noted)
                .with_context(|| format!("the ledger {} is unsound", shown(&place.db)))?;
            tell(&books)?;
            let frozen = store.read(frozen)?;
            if frozen > 0 {
                println!(
                    "{frozen} open jobs sell no more: the ledger may be older than what they sold"
                );
            }
            Ok(())
        }
        Command::Backup { place, file } => {
            anyhow::ensure!(place.exists(), "there is no ledger {}", shown(&place.db));
            let rows = write_backup(&place.open()?, file)
                .with_context(|| format!("writing the backup {}", file.display()))?;
            println!("{rows} rows in {}", file.display());
            Ok(())
        }
        Command::Thaw { place, node } => {
            anyhow::ensure!(place.exists(), "there is no ledger {}", shown(&place.db));
            println!("{} jobs of node {node} thaw", thaw(&place.open()?, *node)?);
            Ok(())
        }
        Command::Restore { place, file } => {
            let input = File::open(file)
                .with_context(|| format!("reading the backup {}", file.display()))?;
            tell(&restore(&place.open()?, &mut BufReader::new(input))?)
        }
    }
}

impl Place {
    fn exists(&self) -> bool {
        self.db.contains("://") || Path::new(&self.db).exists()
    }

    fn open(&self) -> Result<Store> {
        Store::open(&self.db).with_context(|| format!("opening the ledger {}", shown(&self.db)))
    }
}

/// Never over another file, and on disk when this returns.
fn write_backup(store: &Store, path: &Path) -> Result<u64> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let mut out = BufWriter::new(file);
    let done = backup(store, &mut out);
    if done.is_err() {
        // Half a backup is none.
        let _ = std::fs::remove_file(path);
    }
    let rows = done?;
    out.flush()?;
    out.get_ref().sync_all()?;
    Ok(rows)
}

fn tell(books: &Books) -> Result<()> {
    println!(
        "the books balance: {} acts, the last is {}:{}",
        books.acts,
        books.acts,
        Hex(books.head)
    );
    for (book, micro) in &books.micro {
        println!("{book:10} {micro:20} micro-tokens");
    }
    Ok(())
}
