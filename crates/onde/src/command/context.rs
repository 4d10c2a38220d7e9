//! `onde context`: the clusters this machine knows.

use anyhow::Result;
use serde::Serialize;

use super::{print, print_json};
use crate::cli::Context;
use crate::config::Config;
use crate::report::Report;
use crate::table::render;

#[derive(Serialize)]
struct Row {
    name: String,
    current: bool,
    broker: String,
    lab: Option<std::path::PathBuf>,
}

pub fn run(command: Context, report: &Report) -> Result<()> {
    let mut config = Config::load()?;
    match command {
        Context::Ls { json } => list(&config, json),
        Context::Use { name } => {
            config.choose(Some(&name))?;
            report.line(&format!("context {name} is the current one"));
            config.current = Some(name);
            config.save()
        }
    }
}

fn list(config: &Config, json: bool) -> Result<()> {
    let row = |(name, context): (&String, &crate::config::Context)| Row {
        name: name.clone(),
        current: config.current.as_ref() == Some(name),
        broker: context.broker.clone(),
        lab: context.lab.clone(),
    };
    let rows: Vec<_> = config.contexts.iter().map(row).collect();
    if json {
        return print_json(&rows);
    }
    let cells = |row: &Row| {
        let mark = if row.current { "*" } else { "" };
        let lab = row.lab.as_ref().map_or(String::new(), |dir| dir.display().to_string());
        vec![mark.to_owned(), row.name.clone(), row.broker.clone(), lab]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    print(&render(&["", "NAME", "BROKER", "LAB"], &cells))
}
